"""Benchmarks that can be believed: what `fastgen bench` and the files of `benchmarks/` run.

The method, each point of which has its module:

* the answer of every rival is checked before it is timed (`case`, `random`, `reparameterize`, `recurrent`,
  `generate`, `attention`, `linear`, and for training steps of whole models `vae`, `gan`, `rnn`,
  `gpt`);
* rivals take turns in one process with the same threads, and ratios are taken round by round (`timing`);
* the physical bound of a case is timed beside them, not looked up (`bounds`);
* losses are named (`report`).

Times are of the CPU. What is timed is the call a user writes, with Python's part and the allocation of the
result in it.

Example:
    >>> from fastgen.benchmark import measure, select
    >>> for case in select(full=False, filter="normal"):
    ...     print(measure(case, threads=2))
"""

from __future__ import annotations

from fastgen.benchmark import attention, gan, generate, gpt, linear, random, recurrent, reparameterize, rnn, vae
from fastgen.benchmark.bounds import bandwidth
from fastgen.benchmark.case import Case
from fastgen.benchmark.report import Report
from fastgen.benchmark.result import Result, measure
from fastgen.benchmark.timing import Spread, interleave

__all__ = ["Case", "Report", "Result", "Spread", "bandwidth", "interleave", "measure", "select"]


def select(*, full: bool, filter: str = "", threads: int | None = None) -> list[Case]:
    """The cases to run.

    Args:
        full: all cases, or the few that tell most.
        filter: a part of the names of the cases wanted, such as `reparam`, `lstm` or `64x20`; capitals do not matter.
        threads: of the run; with 1 the cases on one thread are left out, being there already.

    Raises:
        ValueError: if no case's name has `filter` in it.
    """
    every: list[Case] = [
        *random.cases(full=full),
        *reparameterize.cases(full=full),
        *recurrent.cases(full=full),
        *generate.cases(full=full),
        *attention.cases(full=full),
        *linear.cases(full=full),
        *vae.cases(full=full),
        *gan.cases(full=full),
        *rnn.cases(full=full),
        *gpt.cases(full=full),
    ]
    chosen = [
        case for case in every if filter.lower() in case.name.lower() and not (threads == 1 and case.threads == 1)
    ]
    if not chosen:
        names = ", ".join(dict.fromkeys(case.workload for case in every))
        raise ValueError(f"filter: expected a part of the name of a case ({names}, ...), got {filter!r}")
    return chosen
