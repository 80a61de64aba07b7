"""The product of two matrices."""

from __future__ import annotations

import torch
from torch import Tensor


def mm(left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
    """left (M, K) times right (K, N), plus bias (N,) in every row: (M, N), contiguous."""
    out = left @ right if bias is None else torch.addmm(bias, left, right)
    return out.contiguous()
