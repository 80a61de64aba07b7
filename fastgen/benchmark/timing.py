"""Timing rivals against each other so that a machine's mood does not decide the winner.

Timings on a shared machine swing by a factor of two from minute to minute. So the rivals take turns, one
sample each a round, and whatever slows a round slows all of them. The order of a round is shuffled, so that
none of them always follows the one that filled the cache. A ratio is taken within each round, and the median
of the ratios is what is reported, with the quartiles as the spread.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

__all__ = ["Spread", "interleave", "ratio", "use_threads"]


_DISTURBED = 0.5  # a relative interquartile range; a quiet machine stays under a fifth of that


@dataclass(frozen=True)
class Spread:
    """The median of some samples and the quartiles around it."""

    median: float
    q1: float
    q3: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Spread:
        """Of at least two samples."""
        q1, median, q3 = statistics.quantiles(samples, n=4, method="inclusive")
        return cls(median, q1, q3)

    @property
    def relative(self) -> float:
        """The interquartile range as a share of the median."""
        return (self.q3 - self.q1) / self.median

    @property
    def disturbed(self) -> bool:
        """Whether the samples scatter so much that the median says little: other work was in the way."""
        return self.relative > _DISTURBED


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> Spread:
    """The spread of the quotients of samples taken in the same rounds."""
    return Spread.of([a / b for a, b in zip(numerator, denominator, strict=True)])


def interleave(
    functions: Mapping[str, Callable[[], object]],
    *,
    budget: float,
    min_rounds: int = 7,
    max_rounds: int = 1000,
    min_sample: float = 1e-3,
    clock: Callable[[], float] = time.perf_counter,
    finish: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Seconds a call of each function, one sample a round.

    Args:
        functions: what to time. A result is dropped as soon as it is there, as in a training loop that
            keeps nothing, so the time of a call includes freeing its memory.
        budget: seconds to spend on the rounds. It ends after the round in which it runs out.
        min_rounds, max_rounds: bounds on the number of rounds that win over the budget; min_rounds >= 2.
        min_sample: seconds that one sample lasts at least; shorter functions are called several times.
        clock: gives the time in seconds.
        finish: waits for what the calls have begun, as on a GPU; its time counts.

    Returns:
        The samples of each function; those at the same place come from the same round.
    """
    if min_rounds < 2:
        raise ValueError(f"min_rounds: expected an int of at least 2, got {min_rounds}")
    if not functions:
        raise ValueError("functions: expected at least one function, got none")

    def sample(function: Callable[[], object], calls: int) -> float:
        start = clock()
        for _ in itertools.repeat(None, calls):
            function()
        finish()
        return (clock() - start) / calls

    with _no_collection():
        calls = {}
        for name, function in functions.items():
            sample(function, 1)  # the first call fills caches and pools
            fastest = min(sample(function, 1) for _ in range(2))
            calls[name] = max(1, math.ceil(min_sample / max(fastest, 1e-9)))
        samples: dict[str, list[float]] = {name: [] for name in functions}
        order, shuffle = list(functions), random.Random(0)
        end = clock() + budget
        for done in range(max_rounds):
            if done >= min_rounds and clock() >= end:
                break
            for name in order:
                samples[name].append(sample(functions[name], calls[name]))
            shuffle.shuffle(order)
    return samples


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """No garbage collection inside the block: it would strike whoever is running."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextlib.contextmanager
def use_threads(count: int) -> Iterator[None]:
    """Run a block with `count` threads of PyTorch's pool."""
    if count < 1:
        raise ValueError(f"threads: expected an int of at least 1, got {count}")
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
