"""The recurrent sequences of the CUDA kernels: values and gradients against double precision.

On the emulated device wherever the tests run, and on a GPU where one is.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import pytest
import torch
from torch import Tensor

from fastgen import random, reference
from fastgen.random import Generator
from fastgen.reference.recurrent import Mode

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EPS = 1e-5
# A result's own rounding and that of what is kept for the backward pass, which both sides pay. Half types: h, and the
# product with the input, are rounded before they meet the weights.
ATOL = {torch.float32: 2e-6, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}
NAMES = (
    *("output", "h_n", "c_n", "gates", "cells", "grad_input", "grad_w_ih", "grad_w_hh", "grad_b_ih", "grad_b_hh"),
    *("grad_w_hr", "grad_h_0", "grad_c_0", "grad_norm_ih", "grad_norm_hh", "grad_norm_c", "grad_norm_c_bias"),
)


@dataclass(frozen=True)
class Call:
    """A call of the op, its operands a function of `seed` in numbers that every dtype holds."""

    mode: Mode = Mode.LSTM
    hidden: int = 19
    inputs: int = 5
    lengths: tuple[int, ...] = (3, 3, 3)  # of the rows, falling; packed if they differ
    outputs: int | None = None
    bias: bool = True
    masked: bool = False
    batch_first: bool = False
    reverse: bool = False
    norm: bool = False
    zoneout: tuple[float, float] = (0.0, 0.0)
    drawn: bool = False
    seed: int = 0

    def __str__(self) -> str:
        others = (f for f in fields(self) if f.name != "mode" and getattr(self, f.name) != f.default)
        return "-".join([self.mode.name, *(f"{f.name}={getattr(self, f.name)}" for f in others)])

    def operands(self) -> tuple[tuple[Tensor | None, ...], tuple[object, ...]]:
        """Those from `input` to `h_mask`, and those from `norm_ih` on."""
        g = Generator(self.seed)

        def normal(*shape: int, std: float = 1.0, mean: float = 0.0) -> Tensor:
            return random.normal(*shape, mean=mean, std=std, generator=g).bfloat16().double()

        batch, steps, packed = len(self.lengths), self.lengths[0], len(set(self.lengths)) > 1
        leading = (sum(self.lengths),) if packed else (batch, steps) if self.batch_first else (steps, batch)
        rows, state = self.mode.gates * self.hidden, self.outputs or self.hidden
        first = (
            normal(*leading, self.inputs),
            torch.tensor([sum(n > t for n in self.lengths) for t in range(steps)]) if packed else None,
            normal(rows, self.inputs, std=max(self.inputs, 1) ** -0.5),
            normal(rows, state, std=state**-0.5),
            normal(rows) if self.bias else None,
            normal(rows) if self.bias else None,
            normal(self.outputs, self.hidden, std=self.hidden**-0.5) if self.outputs else None,
            normal(batch, state),
            normal(batch, self.hidden) if self.mode == Mode.LSTM else None,
            (normal(batch, state) > -0.5).double() * 1.5 if self.masked else None,
        )
        wide = ((rows, 1), (rows, 1), (self.hidden, 1), (self.hidden, 0))
        norm = [normal(n, mean=m, std=0.5) if self.norm else None for n, m in wide]
        seed_offset = torch.tensor([self.seed, 5]) if self.drawn else None
        return first, (*norm, seed_offset, EPS, *self.zoneout)


def put(gpu, dtype, values):
    """Floating-point tensors in the dtype on the device; batch_sizes stay where they are."""

    def one(x: object) -> object:
        if not isinstance(x, Tensor):
            return x
        return gpu.put(x.to(dtype)) if x.is_floating_point() else gpu.put(x) if x.shape == (2,) else x

    return [one(x) for x in values]


def in_dtype(dtype):
    return lambda values: [x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for x in values]


def forward(ops, call: Call, move) -> tuple[Tensor, ...]:
    first, options = call.operands()
    moved = move(first)
    moved[1] = first[1]
    return ops.recurrent(call.mode, *moved, call.batch_first, call.reverse, True, *move(options))


def gradients(call: Call, results) -> list[Tensor | None]:
    """Of output, h_n and c_n, in every second seed without one of them."""
    g = Generator(call.seed + 1)
    drawn = [random.normal(*x.shape, generator=g).bfloat16().double() if x.numel() else None for x in results[:3]]
    if call.seed % 4 < 2:
        drawn[call.seed % 4] = None
    return drawn


def backward(ops, call: Call, move, results, needs: int = 4095) -> tuple[Tensor, ...]:
    """From what the forward pass gave in double precision: a unit at the kink of a ReLU stays on its side."""
    first, options = call.operands()
    moved = move(first)
    moved[1] = first[1]
    output, gates, cells = move((results[0], *results[3:]))
    cells = cells.to(torch.float64 if output.dtype == torch.float64 else torch.float32)
    if cells.numel():
        cells.copy_(results[4])
    grads = move(gradients(call, results))
    flags = call.batch_first, call.reverse, needs
    return ops.recurrent_backward(call.mode, *grads, *moved, output, gates, cells, *flags, *move(options))


def check(gpu, call: Call, dtype: torch.dtype) -> None:
    def device(values):
        return put(gpu, dtype, values)

    exact = forward(reference, call, in_dtype(torch.float64))
    ours = (*forward(gpu.ops, call, device), *backward(gpu.ops, call, device, exact))
    theirs = (*forward(reference, call, in_dtype(dtype)), *backward(reference, call, in_dtype(dtype), exact))
    exact = (*exact, *backward(reference, call, in_dtype(torch.float64), exact))
    sums = max(1.0, sum(call.lengths) ** 0.5)
    for name, got, other, want in zip(NAMES, ours, theirs, exact, strict=True):
        assert got.shape == want.shape, name
        assert got.dtype == other.dtype, name
        if got.numel() == 0:
            continue
        scale = max(1.0, want.abs().max().item())
        error, allowed = ((x.cpu().double() - want).abs().max().item() for x in (got, other))
        assert error <= 2 * allowed + ATOL[dtype] * scale * sums, (name, error, allowed)


CALLS = [
    *(Call(mode) for mode in Mode),
    *(Call(mode, lengths=(4, 2, 2, 1), hidden=8) for mode in Mode),
    *(Call(mode, lengths=(4, 2, 2, 1), reverse=True, masked=True, bias=False, seed=1) for mode in Mode),
    *(Call(mode, batch_first=True, reverse=True, inputs=0, hidden=1, seed=2) for mode in Mode),
    *(Call(mode, lengths=(2,) * 18, hidden=33, masked=True, seed=3) for mode in Mode),
    Call(lengths=(1,)),
    Call(norm=True),
    Call(norm=True, lengths=(4, 2, 2, 1), hidden=8, masked=True, reverse=True, seed=1),
    Call(norm=True, lengths=(2,) * 18, hidden=33, bias=False, seed=2),
    Call(outputs=7),
    Call(outputs=40, lengths=(4, 2, 2, 1), masked=True, reverse=True, seed=1),
    Call(outputs=9, lengths=(2,) * 18, norm=True, batch_first=True, seed=2),
    *(Call(mode, zoneout=(0.3 * (mode == Mode.LSTM), 0.2), lengths=(4, 2, 2, 1), seed=3) for mode in Mode),
    *(Call(mode, zoneout=(0.3 * (mode == Mode.LSTM), 0.2), drawn=True, batch_first=True, seed=3) for mode in Mode),
    Call(norm=True, outputs=7, zoneout=(0.4, 0.0), drawn=True, lengths=(4, 2, 2, 1), seed=2),
    Call(norm=True, zoneout=(0.4, 1.0), lengths=(4, 2, 2, 1), reverse=True),
    Call(hidden=70, lengths=(2,) * 9),
    Call(Mode.GRU, hidden=70, lengths=(3,) * 12 + (1,) * 9, reverse=True),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("call", CALLS, ids=str)
def test_values(gpu, call, dtype):
    check(gpu, call, dtype)
