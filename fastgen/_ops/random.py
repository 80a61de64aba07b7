"""The ops that draw from the random stream.

`seed_offset` is an int64 tensor (2,) on the device of the result; the draws also take (S, 2) and then
give S streams, stacked.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastgen import reference
from fastgen._ops.library import library, register

_DRAW = "(Tensor seed_offset, SymInt[] size, ScalarType dtype{}) -> Tensor"
SCHEMAS = {
    "claim": "(Tensor(a!) state, SymInt count) -> Tensor",
    "random_bits": _DRAW.format(""),
    "uniform": _DRAW.format(", float low, float high"),
    "normal": _DRAW.format(", float mean, float std"),
    "exponential": _DRAW.format(", float rate"),
    "bernoulli": _DRAW.format(", float p"),
}
DRAWS = tuple(name for name in SCHEMAS if name != "claim")


def _fake_draw(seed_offset: Tensor, size: list[int], dtype: torch.dtype, *_: float) -> Tensor:
    return seed_offset.new_empty([*seed_offset.shape[:-1], *size], dtype=dtype)


def _fake_claim(state: Tensor, count: int) -> Tensor:
    return state.new_empty(state.shape)


register(SCHEMAS, reference, {"claim": _fake_claim, **dict.fromkeys(DRAWS, _fake_draw)})


# vmap of the random ops: one stream a sample, stacked.


def _stacked_streams(op: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, int]]:
    def rule(info: Any, in_dims: tuple[Any, ...], seed_offset: Tensor, *rest: Any) -> tuple[Tensor, int]:
        seeds = seed_offset.movedim(in_dims[0], 0)
        return op(seeds.reshape(-1, 2), *rest).unflatten(0, seeds.shape[:-1]), 0

    return rule


for _name in DRAWS:
    torch.library.register_vmap(f"fastgen::{_name}", _stacked_streams(getattr(torch.ops.fastgen, _name)), lib=library)
