"""Benchmarks that can be believed: what `fastgen bench` and the files of `benchmarks/` run.

The method, each point of which has its module:

* the answer of every rival is checked before it is timed (`case`, `random`, `reparameterize`, `recurrent`,
  `generate`, `attention`, `linear`, `activation`, and for training steps of whole models `vae`, `gan`,
  `rnn`, `gpt`);
* rivals take turns in one process with the same threads, and ratios are taken round by round (`timing`);
* the physical bound of a case is timed beside them, not looked up (`bounds`);
* losses are named (`report`).

What is timed is the call a user writes, with Python's part and the allocation of the result in it; on a GPU until
it has finished the calls of a sample, of which there are several where they are short.

Example:
    >>> from fastgen.benchmark import measure, select
    >>> for case in select(full=False, filter="normal"):
    ...     print(measure(case, threads=2))
"""

from __future__ import annotations

from dataclasses import replace

from fastgen.benchmark import (
    activation,
    attention,
    gan,
    generate,
    gpt,
    linear,
    random,
    recurrent,
    reparameterize,
    rnn,
    vae,
)
from fastgen.benchmark.bounds import bandwidth
from fastgen.benchmark.case import Case
from fastgen.benchmark.report import Report
from fastgen.benchmark.result import Result, measure
from fastgen.benchmark.timing import Spread, interleave

__all__ = ["Case", "Report", "Result", "Spread", "bandwidth", "interleave", "measure", "select"]


# Those whose ops have kernels on CUDA.
_ON_CUDA = (random, reparameterize, recurrent, attention, vae, gan, rnn, gpt)


def select(*, full: bool, filter: str = "", threads: int | None = None, device: str = "cpu") -> list[Case]:
    """The cases to run.

    Args:
        full: all cases, or the few that tell most.
        filter: a part of the names of the cases wanted, such as `reparam`, `lstm` or `64x20`; capitals do not matter.
        threads: of the run; with 1 the cases on one thread are left out, being there already.
        device: "cpu" or "cuda", which have cases of their own.

    Raises:
        ValueError: if no case's name has `filter` in it.
    """
    every: list[Case] = []
    if device == "cpu":
        for family in (*_ON_CUDA[:4], generate, linear, activation, *_ON_CUDA[4:]):
            every += family.cases(full=full)
    else:
        for family in _ON_CUDA:
            every += [replace(case, device=device) for case in family.cuda_cases(full=full)]
    chosen = [
        case for case in every if filter.lower() in case.name.lower() and not (threads == 1 and case.threads == 1)
    ]
    if not chosen:
        names = ", ".join(dict.fromkeys(case.workload for case in every))
        raise ValueError(f"filter: expected a part of the name of a case ({names}, ...), got {filter!r}")
    return chosen
