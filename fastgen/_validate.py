"""Checks of configuration fields and arguments: each returns the value or raises one line that names it."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from fastgen._dtypes import dtype_name

__all__ = ["boolean", "choice", "cuda_is_there", "floats", "integer", "integers", "number", "tensor"]


def integer(name: str, value: Any, minimum: int) -> int:
    """An int from an int or what stands for one, such as a NumPy integer."""
    if not _is_integer(value) or value < minimum:
        raise ValueError(f"{name}: expected an int of at least {minimum}, got {value!r}")
    return operator.index(value)


def integers(name: str, value: Any, minimum: int, *, allow_empty: bool = False) -> tuple[int, ...]:
    """A tuple of ints from any sequence of them; JSON has lists where a configuration has tuples."""
    what = f"{name}: expected a sequence of ints of at least {minimum}"
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        raise ValueError(f"{what}, got {value!r}")
    items = tuple(value)
    if not all(_is_integer(item) and item >= minimum for item in items):
        raise ValueError(f"{what}, got {items!r}")
    if not items and not allow_empty:
        raise ValueError(f"{what}, got an empty one")
    return tuple(operator.index(item) for item in items)


def number(
    name: str, value: Any, *, above: float = -math.inf, minimum: float = -math.inf, below: float = math.inf
) -> float:
    """A finite float with above < value < below and value >= minimum."""
    ok = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not ok or not (above < value < below and value >= minimum):  # false of inf and nan
        limits = [f"above {above:g}"] if above > -math.inf else []
        limits += [f"of at least {minimum:g}"] if minimum > -math.inf else []
        limits += [f"below {below:g}"] if below < math.inf else []
        raise ValueError(f"{name}: expected a finite number {' and '.join(limits)}".rstrip() + f", got {value!r}")
    return float(value)


def boolean(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{name}: expected True or False, got {value!r}")
    return value


def choice(name: str, value: Any, allowed: Iterable[str]) -> str:
    names = tuple(allowed)
    if value not in names:
        raise ValueError(f"{name}: expected one of {', '.join(names)}, got {value!r}")
    return str(value)


def tensor(name: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    return value


def floats(name: str, value: Any) -> Tensor:
    """A tensor of floating-point values."""
    if not tensor(name, value).is_floating_point():
        raise TypeError(f"{name}: expected floating-point values, got {dtype_name(value.dtype)}")
    return value


def cuda_is_there(name: str, instead: str) -> None:
    """Refuse "cuda" where PyTorch finds none; `instead`: what to give."""
    if not torch.cuda.is_available():
        raise ValueError(f"{name}: expected {instead}, as PyTorch finds no CUDA device, got 'cuda'")


def _is_integer(value: Any) -> bool:
    return (isinstance(value, int) or hasattr(value, "__index__")) and not isinstance(value, (bool, Tensor))
