"""Linear layers: a product of matrices, and where it is faster than PyTorch's.

PyTorch's float32 products on an x86 CPU are MKL's, which takes the AVX2 path on processors not made by Intel: half of
what the registers of AVX-512 would give. There, and where a product is large enough to be worth a call from Python,
`mm` is used; everywhere else PyTorch's own.
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

SCHEMAS = {"mm": "(Tensor left, Tensor right, Tensor? bias) -> Tensor"}


def _fake_mm(left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
    return left.new_empty((left.shape[0], right.shape[1]))


register(SCHEMAS, reference, {"mm": _fake_mm})

_mm = torch.ops.fastgen.mm.default

# Below, the call from Python costs more than the product gains; with few rows, packing the weight does, and a narrow
# result or a short sum leaves the tiles empty.
_LEAST_ROWS = 32
_LEAST_WIDTH = 16
_LEAST_PRODUCTS = 1 << 21
_TYPES = (Tensor, Parameter)
_DTYPES = (torch.float32, torch.float64)

# The instruction sets whose kernel beats PyTorch's float32 products on this CPU.
_FASTER = frozenset(
    isa for isa in _load.cpu_isas() if isa.startswith("avx512") and _load.cpu_vendor() != "GenuineIntel"
)


def mm_pays() -> bool:
    """Whether the active kernel beats PyTorch's float32 products on this CPU."""
    return _load.cpu_isa() in _FASTER


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(input, weight)
        return _forward(input, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        input, weight = ctx.saved_tensors
        needs_input, needs_weight, needs_bias = ctx.needs_input_grad
        rows, grads = input.reshape(-1, input.shape[-1]), grad.reshape(-1, grad.shape[-1])
        multiply = torch.mm if higher_order() else _mm_without_bias
        grad_input = multiply(grads, weight).view(input.shape) if needs_input else None
        grad_weight = multiply(grads.t(), rows) if needs_weight else None
        return grad_input, grad_weight, grads.sum(0) if needs_bias else None


def _mm_without_bias(left: Tensor, right: Tensor) -> Tensor:
    return _mm(left, right, None)


def _forward(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out = _mm(input.reshape(-1, input.shape[-1]), weight.t(), bias)
    # As PyTorch's, no view for autograd, which would refuse what changes the result in place, such as relu_.
    return torch.ops.aten._unsafe_view(out, (*input.shape[:-1], weight.shape[0]))


def linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear`, by whichever product is faster."""
    if not _serves(input, weight, bias):
        return F.linear(input, weight, bias)
    if torch.is_grad_enabled() and (
        input.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    ):
        return _Linear.apply(*distinct((input, weight, bias)))
    return _forward(input, weight, bias)


def product(left: Tensor, right: Tensor) -> Tensor:
    """left (M, K) @ right (K, N), by whichever product is faster; without a gradient."""
    if mm_pays() and _are_dense(left, right) and _is_large(left.shape[0], left.shape[1], right.shape[1]):
        return _mm(left, right, None)
    return left @ right


def _is_large(rows: int, depth: int, columns: int) -> bool:
    return rows >= _LEAST_ROWS and min(depth, columns) >= _LEAST_WIDTH and rows * depth * columns >= _LEAST_PRODUCTS


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
    """Whether `mm` takes the operands, and gains by it. What it does not take goes to PyTorch, errors included."""
    if not mm_pays() or not _are_dense(input, weight, bias) or input.dim() < 2 or weight.dim() != 2:
        return False
    columns, depth = weight.shape
    if input.shape[-1] != depth or depth == 0 or not _is_large(input.numel() // depth, depth, columns):
        return False
    if bias is not None and bias.shape != (columns,):
        return False
    if torch.jit.is_tracing():  # type: ignore[attr-defined]
        return False  # a trace is to hold PyTorch's op
    return not torch.is_autocast_enabled("cpu") and not plain_only()
