"""Cases of `fastgen.random`: filling a tensor with random numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgen import random as fastgen_random
from fastgen import reference
from fastgen.benchmark.case import EAGER, OURS, StreamCase, Traffic, require_close, require_moments

__all__ = ["DISTRIBUTIONS", "RandomCase", "cases"]

_SEED = 20_141_220
_PREFIX = 4096
_P = 0.3


class Distribution(NamedTuple):
    """One distribution, its moments, and how the two libraries and the reference draw from it."""

    mean: float
    variance: float
    kurtosis: float
    ours: Callable[[tuple[int, ...], torch.dtype, str], Tensor]
    eager: Callable[[tuple[int, ...], torch.dtype, str], Tensor]
    reference: Callable[[Tensor, list[int], torch.dtype], Tensor]


DISTRIBUTIONS = {
    "normal": Distribution(
        0.0,
        1.0,
        3.0,
        lambda shape, dtype, device: fastgen_random.normal(shape, dtype=dtype, device=device),
        lambda shape, dtype, device: torch.randn(shape, dtype=dtype, device=device),
        lambda state, shape, dtype: reference.normal(state, shape, dtype, 0.0, 1.0),
    ),
    "uniform": Distribution(
        0.5,
        1 / 12,
        9 / 5,
        lambda shape, dtype, device: fastgen_random.uniform(shape, dtype=dtype, device=device),
        lambda shape, dtype, device: torch.rand(shape, dtype=dtype, device=device),
        lambda state, shape, dtype: reference.uniform(state, shape, dtype, 0.0, 1.0),
    ),
    "exponential": Distribution(
        1.0,
        1.0,
        9.0,
        lambda shape, dtype, device: fastgen_random.exponential(shape, dtype=dtype, device=device),
        lambda shape, dtype, device: torch.empty(shape, dtype=dtype, device=device).exponential_(),
        lambda state, shape, dtype: reference.exponential(state, shape, dtype, 1.0),
    ),
    "bernoulli": Distribution(
        _P,
        _P * (1 - _P),
        1 / (_P * (1 - _P)) - 3,
        lambda shape, dtype, device: fastgen_random.bernoulli(shape, p=_P, dtype=dtype, device=device),
        lambda shape, dtype, device: torch.empty(shape, dtype=dtype, device=device).bernoulli_(_P),
        lambda state, shape, dtype: reference.bernoulli(state, shape, dtype, _P),
    ),
}


@dataclass(frozen=True, kw_only=True)
class RandomCase(StreamCase):
    """Draw one tensor, into new memory as a call without `out=` does."""

    distribution: str

    @property
    def workload(self) -> str:
        return f"random/{self.distribution}"

    @property
    def traffic(self) -> Traffic:
        return Traffic(reads=0, writes=1)

    def inputs(self) -> tuple[Tensor, ...]:
        return ()

    def rivals(self) -> dict[str, Callable[..., Any]]:
        distribution = DISTRIBUTIONS[self.distribution]
        return {
            OURS: lambda: distribution.ours(self.shape, self.dtype, self.device),
            EAGER: lambda: distribution.eager(self.shape, self.dtype, self.device),
        }

    def check(self, rival: str, function: Callable[..., Any], inputs: tuple[Tensor, ...]) -> None:
        """The moments of any rival; of ours also both ends of the stream, bit for bit."""
        distribution = DISTRIBUTIONS[self.distribution]
        with torch.random.fork_rng(devices=self.random_devices):
            torch.manual_seed(_SEED)
            state = fastgen_random.seed_offset_for(None, self.elements, torch.device(self.device)).cpu()
            torch.manual_seed(_SEED)
            values = function(*inputs).flatten()
        what = f"{self.name}, {rival}"
        require_moments(what, values, distribution.mean, distribution.variance, distribution.kurtosis)
        if rival == OURS:
            count = min(_PREFIX, self.elements)
            for first in (0, self.elements - count):
                there = state + torch.tensor([0, first])
                expected = distribution.reference(there, [count], self.dtype)
                drawn = values[first : first + count].cpu()
                require_close(f"{what}, stream from element {first}", drawn, expected)


def cases(*, full: bool) -> list[RandomCase]:
    """The cases of `fastgen bench`: a few that tell most, or all of them."""
    # 16M numbers are so many that the allocator maps new pages for them at each call, which takes longer than
    # filling them; 4M find their memory again.
    large, medium, small = (1 << 24,), (1 << 22,), (1 << 16,)
    chosen = [RandomCase(distribution=name, shape=large) for name in DISTRIBUTIONS]
    for name in DISTRIBUTIONS if full else ("normal",):
        chosen += [
            RandomCase(distribution=name, shape=medium),
            RandomCase(distribution=name, shape=small),
            RandomCase(distribution=name, shape=large, dtype=torch.float64),
            RandomCase(distribution=name, shape=large, dtype=torch.bfloat16),
            RandomCase(distribution=name, shape=large, threads=1),
        ]
    return chosen


def cuda_cases(*, full: bool) -> list[RandomCase]:
    """The cases of `fastgen bench --device cuda`."""
    large = (1 << 26,)
    chosen = [RandomCase(distribution="normal", shape=large, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)]
    if full:
        chosen += [RandomCase(distribution=name, shape=large) for name in DISTRIBUTIONS if name != "normal"]
        chosen += [RandomCase(distribution="normal", shape=(1 << 16,))]
    return chosen
