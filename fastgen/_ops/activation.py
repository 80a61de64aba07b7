"""GELU, with the bias before it, and SwiGLU: one pass over memory each way.

What the arguments and results are stands in `fastgen/reference/activation.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastgen import reference
from fastgen._ops.library import differentiable, higher_order, register, through

__all__ = ["SCHEMAS", "gelu", "gelu_tanh", "swiglu"]

SCHEMAS = {
    "gelu": "(Tensor input, Tensor? bias, bool tanh) -> Tensor",
    "gelu_backward": "(Tensor grad, Tensor input, Tensor? bias, bool tanh) -> (Tensor grad_input, Tensor grad_bias)",
    "swiglu": "(Tensor input) -> Tensor",
    "swiglu_backward": "(Tensor grad, Tensor input) -> Tensor",
}


def _fake_gelu(input: Tensor, bias: Tensor | None, tanh: bool) -> Tensor:
    return input.new_empty(input.shape)


def _fake_gelu_backward(grad: Tensor, input: Tensor, bias: Tensor | None, tanh: bool) -> tuple[Tensor, Tensor]:
    return input.new_empty(input.shape), input.new_empty(0) if bias is None else bias.new_empty(bias.shape)


def _fake_swiglu(input: Tensor) -> Tensor:
    return input.new_empty((*input.shape[:-1], input.shape[-1] // 2))


def _fake_swiglu_backward(grad: Tensor, input: Tensor) -> Tensor:
    return input.new_empty(input.shape)


register(
    SCHEMAS,
    reference,
    {
        "gelu": _fake_gelu,
        "gelu_backward": _fake_gelu_backward,
        "swiglu": _fake_swiglu,
        "swiglu_backward": _fake_swiglu_backward,
    },
)


def _gelu_of(tanh: bool) -> Callable[..., Any]:
    op, op_backward = torch.ops.fastgen.gelu.default, torch.ops.fastgen.gelu_backward.default

    def plain(input: Tensor, bias: Tensor | None) -> Tensor:
        return reference.gelu(input, bias, tanh)

    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return None, None
        input, bias = ctx.saved_tensors
        if higher_order():
            return through(lambda *x: (plain(*x),), [input, bias], ctx.needs_input_grad, (grad,))
        grad_input, grad_bias = op_backward(grad, input, bias, tanh)
        return grad_input, None if bias is None else grad_bias

    return differentiable(lambda input, bias: op(input, bias, tanh), plain, backward, keep=(0, 1))


def _swiglu_backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,)
    (input,) = ctx.saved_tensors
    if higher_order():
        return through(lambda x: (reference.swiglu(x),), [input], (True,), (grad,))
    return (torch.ops.fastgen.swiglu_backward(grad, input),)


gelu = _gelu_of(tanh=False)
gelu_tanh = _gelu_of(tanh=True)
swiglu = differentiable(torch.ops.fastgen.swiglu.default, reference.swiglu, _swiglu_backward, keep=(0,))
