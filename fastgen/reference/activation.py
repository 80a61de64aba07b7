"""What stands between the two products of a feed-forward layer.

GELU (Hendrycks & Gimpel, "Gaussian error linear units", 2016) and SwiGLU (Shazeer, "GLU variants improve
Transformer", 2020).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fastgen.reference._work import work_dtype

__all__ = ["gelu", "gelu_backward", "swiglu", "swiglu_backward"]


def gelu(input: Tensor, bias: Tensor | None, tanh: bool) -> Tensor:
    """GELU(input + bias), input (..., N), bias (N,) or None; x Phi(x), or its approximation by a tanh."""
    return F.gelu(_biased(input, bias), approximate=_approximate(tanh)).to(input.dtype)


def gelu_backward(grad: Tensor, input: Tensor, bias: Tensor | None, tanh: bool) -> tuple[Tensor, Tensor]:
    """Gradients of input and of bias (of size 0 where there is none), from that of the result."""
    x = _biased(input, bias)
    d = torch.ops.aten.gelu_backward(grad.to(x.dtype), x, approximate=_approximate(tanh))
    if bias is None:
        return d.to(input.dtype), input.new_empty(0)
    grad_bias = d if d.dim() == 1 else d.flatten(0, -2).sum(0)
    return d.to(input.dtype), grad_bias.to(bias.dtype)


def swiglu(input: Tensor) -> Tensor:
    """silu(gate) up, of input (..., 2 N): gate and up."""
    gate, up = input.to(work_dtype(input.dtype)).chunk(2, dim=-1)
    return (F.silu(gate) * up).to(input.dtype)


def swiglu_backward(grad: Tensor, input: Tensor) -> Tensor:
    """The gradient of input from that of the result."""
    dtype = work_dtype(input.dtype)
    d = grad.to(dtype)
    gate, up = input.to(dtype).chunk(2, dim=-1)
    share = gate.sigmoid()
    gated = gate * share
    return torch.cat((d * up * (share + gated * (1 - share)), d * gated), dim=-1).to(input.dtype)


def _biased(input: Tensor, bias: Tensor | None) -> Tensor:
    x = input.to(work_dtype(input.dtype))
    return x if bias is None else x + bias.to(x.dtype)


def _approximate(tanh: bool) -> str:
    return "tanh" if tanh else "none"
