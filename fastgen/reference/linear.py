"""The product of two matrices, and the linear map of few rows."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgen.reference._work import widen


def mm(left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
    """left (M, K) times right (K, N), plus bias (N,) in every row: (M, N), contiguous."""
    out = left @ right if bias is None else torch.addmm(bias, left, right)
    return out.contiguous()


def linear_rows(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """input (B, K), weight (N, K), bias (N,) -> (B, N); a row's bits do not depend on the other rows."""
    rows = [torch.mv(weight, row) for row in input]
    output = torch.stack(rows) if rows else input.new_empty(0, weight.shape[0])
    return output if bias is None else output + bias


def linear_rows_backward(grad: Tensor, input: Tensor, weight: Tensor, needs: int) -> tuple[Tensor, Tensor, Tensor]:
    """grad (B, N), input (B, K), weight (N, K) -> gradients of input, weight and bias (N,), each where its bit is 1.

    Half types are summed in float32; what is not wanted is (0,).
    """
    dtype = grad.dtype
    grad, input, weight = widen(grad, input, weight)
    nothing = grad.new_empty(0)
    results = (
        grad @ weight if needs & 1 else nothing,
        grad.T @ input if needs & 2 else nothing,
        grad.sum(0) if needs & 4 else nothing,
    )
    return tuple(result.to(dtype).contiguous() for result in results)  # type: ignore[return-value]
