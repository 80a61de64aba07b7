"""What stands between the two products of a feed-forward layer. Sources: `fastgen/reference/activation.py`."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgen._dtypes import dtype_name
from fastgen._ops import activation as ops
from fastgen._validate import choice, tensor
from fastgen.reference._work import work_dtype

__all__ = ["gelu", "swiglu"]

_DTYPES = frozenset((torch.float32, torch.float64, torch.bfloat16, torch.float16))


def gelu(input: Tensor, bias: Tensor | None = None, *, approximate: str = "none") -> Tensor:
    """GELU(input + bias): `torch.nn.functional.gelu` with the bias of the layer before it, in one pass each way.

    x Phi(x), or x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2 (Hendrycks & Gimpel, 2016). Differentiable in input
    and bias, to any order. Half types are computed in float32 and rounded once.

    Args:
        input: (..., N), float32, float64, bfloat16 or float16.
        bias: (N,) in the dtype of input, or float32 beside a half type; None for 0.
        approximate: "none" or "tanh".

    Returns:
        As input.

    Raises:
        TypeError, ValueError: for a shape, dtype or option that does not fit, naming it.
    """
    _check_input(input)
    if bias is not None:
        if tensor("bias", bias).dtype not in (input.dtype, work_dtype(input.dtype)):
            raise TypeError(f"bias: expected {dtype_name(input.dtype)} as input is, got {dtype_name(bias.dtype)}")
        if bias.shape != input.shape[-1:]:
            raise ValueError(f"bias: expected shape {tuple(input.shape[-1:])}, got {tuple(bias.shape)}")
    out: Tensor = (ops.gelu_tanh if choice("approximate", approximate, ("none", "tanh")) == "tanh" else ops.gelu)(
        input, bias
    )
    return out


def swiglu(input: Tensor) -> Tensor:
    """silu(gate) * up for input = (gate, up) along the last dimension (Shazeer, 2020), one pass over memory each way.

    silu(x) = x sigmoid(x). Differentiable to any order. Half types are computed in float32 and rounded once.

    Args:
        input: (..., 2 N), float32, float64, bfloat16 or float16: what one product has made of both.

    Returns:
        (..., N) in the dtype of input.

    Raises:
        TypeError, ValueError: for a shape or dtype that does not fit, naming it.
    """
    _check_input(input)
    if input.shape[-1] % 2:
        raise ValueError(f"input: expected an even last size, gate and up, got {input.shape[-1]}")
    out: Tensor = ops.swiglu(input)
    return out


def _check_input(input: Tensor) -> None:
    if tensor("input", input).dtype not in _DTYPES:
        raise TypeError(f"input: expected float32, float64, bfloat16 or float16, got {dtype_name(input.dtype)}")
    if input.dim() == 0:
        raise ValueError("input: expected at least one dimension, got a scalar")
