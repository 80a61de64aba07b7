"""Linear layers: a product of matrices, and where it is faster than PyTorch's.

PyTorch's products in float32 and float64 on an x86 CPU are MKL's, which takes the AVX2 path on processors not made by
Intel: half of what the registers of AVX-512 would give. There, and where a product is large enough to be worth a call
from Python, fastgen's are used: `mm`, which packs the weight once for many rows, and `linear_rows`, which reads it as
it lies; of float16, for which PyTorch has no fast product, and of few rows of bfloat16 `linear_rows` too. Everywhere
else PyTorch's own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.parameter import Parameter

from fastgen import _load, reference
from fastgen._ops.library import distinct, higher_order, plain_only, register

__all__ = ["SCHEMAS", "linear", "mm_pays", "product"]

SCHEMAS = {
    "mm": "(Tensor left, Tensor right, Tensor? bias) -> Tensor",
    "linear_rows": "(Tensor input, Tensor weight, Tensor? bias) -> Tensor",
    "linear_rows_backward": "(Tensor grad, Tensor input, Tensor weight, int needs) -> "
    "(Tensor grad_input, Tensor grad_weight, Tensor grad_bias)",
}


def _fake_mm(left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
    return left.new_empty((left.shape[0], right.shape[1]))


def _fake_linear_rows(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return input.new_empty((input.shape[0], weight.shape[0]))


def _fake_linear_rows_backward(grad: Tensor, input: Tensor, weight: Tensor, needs: int) -> tuple[Tensor, ...]:
    of = (input.shape, weight.shape, weight.shape[:1])
    return tuple(grad.new_empty(shape if needs >> i & 1 else 0) for i, shape in enumerate(of))


register(
    SCHEMAS,
    reference,
    {"mm": _fake_mm, "linear_rows": _fake_linear_rows, "linear_rows_backward": _fake_linear_rows_backward},
)

_mm = torch.ops.fastgen.mm.default
_linear_rows = torch.ops.fastgen.linear_rows.default
_linear_rows_backward = torch.ops.fastgen.linear_rows_backward.default

# `mm` packs the weight, which takes many rows, fewer of long ones, and whole tiles of outputs to pay.
_MANY_ROWS = 256
_MANY_LONG_ROWS = 64
_LONG_ROWS = 512
_LEAST_OUTPUTS = 16
# Shorter sums leave the vectors of `linear_rows` empty.
_LEAST_INPUTS = 64
# Multiply-adds below which Python costs more than the product gains: its checks alone, and where gradients are recorded
# an autograd.Function.
_LEAST_PRODUCTS = 1 << 18
_LEAST_PRODUCTS_RECORDED = 1 << 19
_LEAST_PRODUCTS_RECORDED_HALF = 1 << 16
# PyTorch multiplies more rows of bfloat16 faster: in pairs.
_MOST_ROWS_BFLOAT16 = 8
_MOST_ROWS_BFLOAT16_RECORDED = 4
# In the backward pass packing pays from here on, but for float16, which `mm` does not take.
_MANY_ROWS_RECORDED = 64

_TYPES = (Tensor, Parameter)
_FULL = (torch.float32, torch.float64)
_DTYPES = (*_FULL, torch.float16, torch.bfloat16)

# The instruction sets whose kernels beat PyTorch's products on this CPU.
_FASTER = frozenset(
    isa for isa in _load.cpu_isas() if isa.startswith("avx512") and _load.cpu_vendor() != "GenuineIntel"
)


def mm_pays() -> bool:
    """Whether the active kernels beat PyTorch's products on this CPU."""
    return _load.cpu_isa() in _FASTER


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(input, weight)
        return _forward(input, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        input, weight = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        rows, grads = input.reshape(-1, input.shape[-1]), grad.reshape(-1, grad.shape[-1])
        if not higher_order() and (len(rows) < _MANY_ROWS_RECORDED or input.dtype is torch.float16):
            found = _linear_rows_backward(grads, rows, weight, wanted[0] + 2 * wanted[1] + 4 * wanted[2])
            grad_input, grad_weight, grad_bias = (x if want else None for x, want in zip(found, wanted, strict=True))
            return None if grad_input is None else grad_input.view(input.shape), grad_weight, grad_bias
        multiply = torch.mm if higher_order() else _mm_without_bias
        grad_input = multiply(grads, weight).view(input.shape) if wanted[0] else None
        grad_weight = multiply(grads.t(), rows) if wanted[1] else None
        return grad_input, grad_weight, grads.sum(0) if wanted[2] else None


def _mm_without_bias(left: Tensor, right: Tensor) -> Tensor:
    return _mm(left, right, None)


def _forward(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    inputs, outputs = input.shape[-1], weight.shape[0]
    rows = input if input.dim() == 2 else input.reshape(-1, inputs)
    many = len(rows) >= (_MANY_LONG_ROWS if inputs > _LONG_ROWS else _MANY_ROWS)
    packs = many and outputs >= _LEAST_OUTPUTS and input.dtype in _FULL
    out = _mm(rows, weight.t(), bias) if packs else _linear_rows(rows, weight, bias)
    if rows is input:
        return out
    # As PyTorch's, no view for autograd, which would refuse what changes the result in place, such as relu_.
    return torch.ops.aten._unsafe_view(out, (*input.shape[:-1], outputs))


def linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear`, by whichever product is faster."""
    if not _serves(input, weight, bias):
        return F.linear(input, weight, bias)
    if torch.is_grad_enabled() and (
        input.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    ):
        rows = input.numel() // input.shape[-1]
        if (
            (rows > _MOST_ROWS_BFLOAT16_RECORDED)
            if input.dtype is torch.bfloat16
            else (input.dtype in _FULL and rows == 1)
        ):
            return F.linear(input, weight, bias)
        return _Linear.apply(*distinct((input, weight, bias)))
    return _forward(input, weight, bias)


def product(left: Tensor, right: Tensor) -> Tensor:
    """left (M, K) @ right (K, N), by whichever product is faster; without a gradient."""
    large = left.numel() * right.shape[1] >= _LEAST_PRODUCTS
    if large and mm_pays() and _are_dense(left, right) and left.dtype in _FULL:
        return _mm(left, right, None)
    return left @ right


def _are_dense(*operands: Tensor | None) -> bool:
    """Whether all are plain tensors on the CPU, in one dtype of the kernel."""
    dtype = None
    for x in operands:
        if x is None:
            continue
        if type(x) not in _TYPES or x.layout is not torch.strided or not x.is_cpu:
            return False
        if (x.dtype not in _DTYPES) if dtype is None else (x.dtype is not dtype):
            return False
        dtype = x.dtype
    return True


def _serves(input: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the kernels take the operands and gain by it. What they do not take goes to PyTorch, errors included."""
    # What most small layers fail comes first.
    if type(input) not in _TYPES or type(weight) not in _TYPES or input.dim() == 0 or weight.dim() != 2:
        return False
    outputs, inputs = weight.shape
    least = _LEAST_PRODUCTS
    if torch.is_grad_enabled():
        least = _LEAST_PRODUCTS_RECORDED if input.dtype in _FULL else _LEAST_PRODUCTS_RECORDED_HALF
    if input.numel() * outputs < least or inputs < _LEAST_INPUTS or input.shape[-1] != inputs:
        return False
    if input.dtype is torch.bfloat16 and input.numel() > _MOST_ROWS_BFLOAT16 * inputs:
        return False
    if not mm_pays() or not _are_dense(input, weight, bias) or (bias is not None and bias.shape != (outputs,)):
        return False
    if torch.jit.is_tracing():  # type: ignore[attr-defined]
        return False  # a trace is to hold PyTorch's op
    return not torch.is_autocast_enabled("cpu") and not plain_only()
