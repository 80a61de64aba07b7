"""The linear map of few rows and its backward pass: values against double precision, bits over threads and splits."""

from __future__ import annotations

import pytest
import torch
from generate_cases import normal
from hypothesis import given
from hypothesis import strategies as st
from support import FLOATS, ISAS, assert_same_bits

from fastgen import reference
from fastgen._load import use_cpu_isa
from fastgen.random import Generator

ops = torch.ops.fastgen
needs_kernels = pytest.mark.skipif(not ISAS, reason="the CPU kernels are not built")
ATOL = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 2e-2, torch.float16: 2e-3}


@needs_kernels
@pytest.mark.parametrize("dtype", FLOATS)
@given(rows=st.integers(1, 20), inputs=st.integers(0, 70), outputs=st.integers(1, 40), bias=st.booleans())
def test_linear_rows(dtype, rows, inputs, outputs, bias):
    g = Generator(rows * 71 + inputs)
    x, w = normal(g, rows, inputs, dtype=dtype), normal(g, outputs, inputs, std=0.2, dtype=dtype)
    b = normal(g, outputs, dtype=dtype) if bias else None
    exact = torch.nn.functional.linear(x.double(), w.double(), None if b is None else b.double())
    theirs = (torch.nn.functional.linear(x, w, b).double() - exact).abs().max().item()
    for isa in ISAS:
        with use_cpu_isa(isa):
            y = ops.linear_rows(x, w, b)
        assert (y.shape, y.dtype) == (exact.shape, dtype)
        assert (y.double() - exact).abs().max().item() <= 2 * theirs + ATOL[dtype]


@pytest.mark.parametrize("dtype", FLOATS)
def test_rows_of_a_product_do_not_depend_on_each_other(isa, dtype, threads):
    g = Generator(0)
    x, w, b = normal(g, 33, 301, dtype=dtype), normal(g, 77, 301, dtype=dtype), normal(g, 77, dtype=dtype)
    with use_cpu_isa(isa):
        whole = ops.linear_rows(x, w, b)
        for n in range(1, 34):
            assert_same_bits(ops.linear_rows(x[33 - n :], w, b), whole[33 - n :])
        for count in (1, 2, 3):
            threads(count)
            assert_same_bits(ops.linear_rows(x, w, b), whole)
        twisted = [t.t().contiguous().t() for t in (x, w)]
        assert_same_bits(ops.linear_rows(*twisted, torch.stack([b, b], 1)[:, 1]), whole)
        assert ops.linear_rows(x[:0], w, b).shape == (0, 77)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x, w, b: (x[0], w, b),
        lambda x, w, b: (x, w[0], b),
        lambda x, w, b: (x, w[:, :3], b),
        lambda x, w, b: (x, w.double(), b),
        lambda x, w, b: (x, w, b[:3]),
        lambda x, w, b: (x, w, b[None]),
        lambda x, w, b: (x, w, b.double()),
        lambda x, w, b: (x.int(), w.int(), b.int()),
    ],
)
def test_a_product_that_does_not_fit_raises(isa, wrong):
    with use_cpu_isa(isa), pytest.raises(RuntimeError, match="expected"):
        ops.linear_rows(*wrong(torch.zeros(2, 4), torch.zeros(5, 4), torch.zeros(5)))


def backward_operands(dtype, rows, inputs, outputs, seed=0):
    g = Generator(seed + rows * 71 + inputs)
    return (
        normal(g, rows, outputs, dtype=dtype),
        normal(g, rows, inputs, dtype=dtype),
        normal(g, outputs, inputs, std=0.2, dtype=dtype),
    )


@needs_kernels
@pytest.mark.parametrize("dtype", FLOATS)
@given(
    # Around tiles of 3 and 6 rows, groups of 64, panels of 128 columns, blocks of 128 outputs.
    rows=st.one_of(st.integers(0, 20), st.sampled_from([63, 64, 65, 130])),
    inputs=st.one_of(st.integers(0, 70), st.sampled_from([127, 128, 129, 200])),
    outputs=st.one_of(st.integers(1, 40), st.sampled_from([127, 128, 129, 300])),
)
def test_backward(dtype, rows, inputs, outputs):
    given = backward_operands(dtype, rows, inputs, outputs)
    exact = reference.linear_rows_backward(*(x.double() for x in given), 7)
    grad, x, w = given
    theirs = grad @ w, grad.t() @ x, grad.sum(0)
    for isa in ISAS:
        with use_cpu_isa(isa):
            ours = ops.linear_rows_backward(*given, 7)
        for got, other, want in zip(ours, theirs, exact, strict=True):
            assert (got.shape, got.dtype) == (want.shape, dtype)
            if got.numel() == 0:
                continue
            scale = max(1.0, want.abs().max().item())
            allowed = (other.double() - want).abs().max().item()
            assert (got.double() - want).abs().max().item() <= 2 * allowed + ATOL[dtype] * scale


@needs_kernels
@pytest.mark.parametrize("dtype", FLOATS)
def test_bits_of_the_backward_pass(isa, dtype, threads):
    """Over threads, layouts, and whichever of the results are wanted; gradients of inputs over the batch, too."""
    grad, x, w = backward_operands(dtype, 70, 300, 290)
    with use_cpu_isa(isa):
        every = ops.linear_rows_backward(grad, x, w, 7)
        for count in (1, 2, 3):
            threads(count)
            for got, want in zip(ops.linear_rows_backward(grad, x, w, 7), every, strict=True):
                assert_same_bits(got, want)
        for needs in range(7):
            for i, got in enumerate(ops.linear_rows_backward(grad, x, w, needs)):
                if needs >> i & 1:
                    assert_same_bits(got, every[i])
                else:
                    assert got.shape == (0,)
        twisted = [torch.stack((t, t), 2)[:, :, 0] for t in (grad, x, w)]
        for given in (twisted, [t.t().contiguous().t() for t in (grad, x, w)]):
            for got, want in zip(ops.linear_rows_backward(*given, 7), every, strict=True):
                assert_same_bits(got, want)
        for n in (1, 2, 5, 6, 7, 63, 64, 65):
            assert_same_bits(ops.linear_rows_backward(grad[70 - n :], x[70 - n :], w, 1)[0], every[0][70 - n :])


@needs_kernels
@pytest.mark.parametrize(
    "wrong",
    [
        lambda g, x, w: (g[:1], x, w),
        lambda g, x, w: (g[:, :2], x, w),
        lambda g, x, w: (g[0], x, w),
        lambda g, x, w: (g.double(), x, w),
        lambda g, x, w: (g, x[0], w),
        lambda g, x, w: (g, x[:, :2], w),
        lambda g, x, w: (g, x, w[0]),
        lambda g, x, w: (g, x, w.double()),
        lambda g, x, w: (g.int(), x.int(), w.int()),
    ],
)
def test_a_backward_that_does_not_fit_raises(isa, wrong):
    with use_cpu_isa(isa), pytest.raises(RuntimeError, match="expected"):
        ops.linear_rows_backward(*wrong(torch.zeros(2, 5), torch.zeros(2, 4), torch.zeros(5, 4)), 7)


@pytest.mark.parametrize("needs", [0, 2, 7])
def test_opcheck(needs):
    given = backward_operands(torch.float16, 3, 5, 7)
    torch.library.opcheck(ops.linear_rows_backward.default, (*given, needs))
