"""How fast training is on this machine: a step of each family against the same in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import torch

import fastgen
from fastgen.benchmark import Case, Result, Spread, machine, measure, select
from fastgen.benchmark.case import EAGER, OURS
from fastgen.benchmark.report import Verdict, duration, verdict

__all__ = ["Speed", "Timing", "case_of", "measure_families"]

_SECONDS, _ROUNDS = 2.5, 7  # for the rounds of a family
_BATCH = 64  # pictures or tokens that a step takes at least
_FLOPS = 10**10  # of a step that takes a moment: about a tenth of a second on two cores


@dataclass(frozen=True)
class Timing:
    """A training step of one family.

    Attributes:
        family: its `model_type`.
        result: of the case; None where `fastgen.benchmark` has none for the family.
    """

    family: str
    result: Result | None

    @property
    def ratio(self) -> Spread | None:
        """PyTorch's time over ours."""
        return self.result.speedups.get(EAGER) if self.result else None

    @property
    def verdict(self) -> Verdict | None:
        return verdict(self.ratio) if self.ratio else None

    @property
    def failure(self) -> str:
        """Why there is no ratio, or nothing."""
        if self.result is None:
            return "there is no benchmark of its training step"
        return "; ".join(f"{name}: {why}" for name, why in self.result.failures.items())

    def time(self, name: str) -> str:
        """The median of a step, in words; `name` is `fastgen` or `eager`."""
        return duration(self.result.seconds[name].median) if self.result and name in self.result.seconds else "-"

    def share(self, name: str) -> float:
        """The time of a step as a share of the longer of the two, from 0 to 1."""
        if not self.result or not {OURS, EAGER} <= self.result.seconds.keys():
            return 0.0
        return self.result.seconds[name].median / max(self.result.seconds[rival].median for rival in (OURS, EAGER))


@dataclass(frozen=True)
class Speed:
    """Timings of several families, and where they were taken."""

    timings: tuple[Timing, ...]
    threads: int = field(default_factory=torch.get_num_threads)
    machine: dict[str, Any] = field(default_factory=machine.describe)
    build: dict[str, Any] = field(default_factory=lambda: fastgen.build_info())
    taken: str = field(default_factory=lambda: f"{datetime.now().astimezone():%d %B %Y, %H:%M %Z}".lstrip("0"))

    @property
    def busy(self) -> bool:
        """Whether other programs ran before these began."""
        load = self.machine["load"]
        return load is not None and load > 0.5


def case_of(family: str) -> Case | None:
    """A training step in float32, on a batch as people take it, among the benchmarks of a family.

    Of those that take a moment the first, which is the family's default model; else the one with the least work.
    """
    try:
        cases = select(full=True, filter=f"{family}/")
    except ValueError:  # no case has the name
        return None
    steps = [
        case
        for case in cases
        if case.workload.startswith(f"{family}/")
        and "training" in case.workload
        and (case.dtype, case.threads) == (torch.float32, None)
        and case.elements >= _BATCH
    ]
    short = [case for case in steps if case.flops <= _FLOPS]
    return short[0] if short else min(steps, key=lambda case: case.flops, default=None)


def measure_families(families: Iterable[str], progress: Callable[[str], None] = lambda message: None) -> Speed:
    """Time a training step of each family here, in turns with plain PyTorch, with PyTorch's number of threads."""
    before = machine.describe()  # with the load of the machine before ours
    threads = torch.get_num_threads()
    timings = []
    for family in families:
        case = case_of(family)
        if case is None:
            timings.append(Timing(family, None))
            continue
        progress(f"timing {case.name}")
        result = measure(case, threads=threads, budget=_SECONDS, min_rounds=_ROUNDS, compile=False)
        timings.append(Timing(family, result))
    return Speed(tuple(timings), threads, before)
