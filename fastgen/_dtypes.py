"""The precision that sums and losses are computed in, and the names of dtypes in messages."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["at_least_float32", "dtype_name"]


def at_least_float32(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def dtype_name(dtype: torch.dtype) -> str:
    """Such as "float32"."""
    return str(dtype).removeprefix("torch.")
