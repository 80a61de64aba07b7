"""The dtype in which the algebra of half types runs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

_P = ParamSpec("_P")
_R = TypeVar("_R")


def work_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for itself, float32 for float32 and the half types."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def widen(*tensors: Tensor | None) -> tuple[Any, ...]:
    return tuple(None if x is None else x.to(work_dtype(x.dtype)) for x in tensors)


def or_empty(tensor: Tensor | None, like: Tensor) -> Tensor:
    """The tensor, or one of shape (0,) for a result that does not exist or is not asked for."""
    return like.new_empty(0) if tensor is None else tensor


def without_autocast(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Autocast would take the products out of the work dtype; it has been applied before, to the operands."""

    @functools.wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        device = next(x.device.type for x in args if isinstance(x, Tensor))
        if device == "meta" or not torch.is_autocast_enabled(device):
            return function(*args, **kwargs)
        with torch.autocast(device, enabled=False):
            return function(*args, **kwargs)

    return call
