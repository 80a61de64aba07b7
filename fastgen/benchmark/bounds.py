"""What no implementation can beat: a plain pass over the bytes of a case, timed beside the rivals.

The bound of a case with a given traffic is one pass of PyTorch for each array written, by the arrays that
the pass reads: a fill (none), a copy (one) or an addition (two). It runs twice: into memory that is used
again (`IN_PLACE`, what the hardware can do), and into new memory (`NEW_MEMORY`, what an op that returns a
new tensor can do: the system has to map and clear its pages, if the allocator cannot reuse any).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from torch import Tensor

from fastgen.benchmark import machine
from fastgen.benchmark.case import Case, Traffic
from fastgen.benchmark.timing import interleave, use_threads

__all__ = ["IN_PLACE", "NEW_MEMORY", "bandwidth", "bounds_of", "passes"]

IN_PLACE, NEW_MEMORY = "bound", "bound (new memory)"


def passes(traffic: Traffic, array_bytes: int, *, new_memory: bool) -> Callable[[], object]:
    """A function that reads and writes as many arrays of `array_bytes` as `traffic` says, and little else."""
    count = max(1, array_bytes // 4)
    reads = [torch.ones(count) for _ in range(traffic.reads)]
    writes: list[Tensor | None] = [None if new_memory else torch.ones(count) for _ in range(traffic.writes)]
    # Two sources at most for each target, spread evenly: 5 reads and 3 writes are 2, 2 and 1.
    sources = [reads[i :: traffic.writes] for i in range(traffic.writes)]
    if any(len(group) > 2 for group in sources):
        raise ValueError(f"traffic: expected at most two reads a write, got {traffic}")

    def one(source: list[Tensor], target: Tensor | None) -> Tensor:
        if len(source) == 2:
            return torch.add(*source, out=target)
        if len(source) == 1:
            return source[0].clone() if target is None else target.copy_(source[0])
        return torch.full((count,), 1.0) if target is None else target.fill_(1.0)

    return lambda: [one(source, target) for source, target in zip(sources, writes, strict=True)]


def bounds_of(case: Case, threads: int) -> dict[str, Callable[[], object]]:
    """The bounds to time beside the rivals of `case`; none where calls cost more than bytes do (L1)."""
    if machine.residence(case.bytes, threads) == "L1":
        return {}
    array = case.elements * case.dtype.itemsize
    return {
        IN_PLACE: passes(case.traffic, array, new_memory=False),
        NEW_MEMORY: passes(case.traffic, array, new_memory=True),
    }


def bandwidth(threads: int, *, array: int = 128 << 20, budget: float = 1.0) -> dict[str, float]:
    """Bytes a second, read and written, of a copy of `array` bytes with `threads` threads, by kind of bound."""
    with use_threads(threads):
        copies = {name: passes(Traffic(1, 1), array, new_memory=name == NEW_MEMORY) for name in (IN_PLACE, NEW_MEMORY)}
        samples = interleave(copies, budget=budget)
    return {name: 2 * array / statistics.median(seconds) for name, seconds in samples.items()}
