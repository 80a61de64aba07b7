"""The kernels of GELU and SwiGLU against the formulas in double precision."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import FLOATS, ISAS, assert_same_bits, assert_threads_change_no_bit, call

needs_kernels = pytest.mark.skipif(not ISAS, reason="the CPU kernels are not built")
# Around the vector and the blocks of rows whose sums are added up.
WIDTHS = (1, 2, 7, 8, 15, 16, 17, 33, 100)
ROWS = (1, 2, 63, 64, 65, 200)


def exact(op: str, *args: object) -> tuple[torch.Tensor, ...]:
    result = call(op, "reference", *(x.double() if isinstance(x, torch.Tensor) else x for x in args))
    return result if isinstance(result, tuple) else (result,)


def assert_close_enough(op: str, isa: str, args: tuple[object, ...], sums: int = 1) -> None:
    """Errors are at most twice those of PyTorch's ops, or two units in the last place of the largest number; in double,
    where there is no better one to compare with, sixteen."""
    got, theirs = call(op, isa, *args), call(op, "reference", *args)
    got, theirs = (x if isinstance(x, tuple) else (x,) for x in (got, theirs))
    for mine, their, true in zip(got, theirs, exact(op, *args), strict=True):
        assert mine.shape == their.shape
        assert mine.dtype is their.dtype
        if true.numel() == 0:
            continue
        unit = torch.finfo(mine.dtype).eps * (true.abs().max() + 1)
        allowed = 2 * (their.double() - true).abs().max() + (16 if mine.dtype is torch.float64 else 2) * unit * sums
        assert (mine.double() - true).abs().max() <= allowed


@needs_kernels
@given(
    isa=st.sampled_from(ISAS or ["none"]),
    rows=st.sampled_from(ROWS),
    width=st.sampled_from(WIDTHS),
    dtype=st.sampled_from(FLOATS),
    tanh=st.booleans(),
    bias=st.sampled_from((None, "own", "float32")),
    spread=st.sampled_from((0.1, 1.0, 6.0)),
)
def test_gelu(isa, rows, width, dtype, tanh, bias, spread):
    torch.manual_seed(0)
    x, grad = (torch.randn(rows, width).mul(spread).to(dtype) for _ in range(2))
    kind = torch.float32 if bias == "float32" and dtype is not torch.float64 else dtype
    b = None if bias is None else torch.randn(width).to(kind)
    assert_close_enough("gelu", isa, (x, b, tanh))
    assert_close_enough("gelu_backward", isa, (grad, x, b, tanh), sums=1 + int(rows**0.5))


@needs_kernels
@given(
    isa=st.sampled_from(ISAS or ["none"]),
    rows=st.sampled_from(ROWS),
    width=st.sampled_from(WIDTHS),
    dtype=st.sampled_from(FLOATS),
    spread=st.sampled_from((0.1, 1.0, 6.0)),
)
def test_swiglu(isa, rows, width, dtype, spread):
    torch.manual_seed(0)
    x, grad = (torch.randn(rows, n).mul(spread).to(dtype) for n in (2 * width, width))
    assert_close_enough("swiglu", isa, (x,))
    assert_close_enough("swiglu_backward", isa, (grad, x))


def test_far_from_zero_nothing_is_left_but_the_limits(path):
    x = torch.tensor([60.0, -60.0, 0.0, -0.0, 200.0, -200.0])
    for tanh in (False, True):
        assert torch.equal(call("gelu", path, x, None, tanh), x.clamp(min=0))
        grad, _ = call("gelu_backward", path, torch.ones(6), x, None, tanh)
        torch.testing.assert_close(grad, torch.tensor([1.0, 0.0, 0.5, 0.5, 1.0, 0.0]))
    torch.testing.assert_close(call("swiglu", path, torch.cat((x, torch.ones(6)))), x.clamp(min=0))


def test_small_values_keep_their_digits(isa):
    """Where x Phi(x) is small, the error is small beside it, not beside 1: that of exp(-x^2 / 2), whose exponent has a
    rounding, and a few more."""
    for x in (torch.linspace(-12, 0, 4000)[:-1], -torch.logspace(-30, 0, 1000)):
        got, wide = call("gelu", isa, x, None, False).double(), x.double()
        true = wide / 2 * torch.erfc(wide * -(0.5**0.5))
        unit = torch.finfo(x.dtype).eps * true.abs()
        assert ((got - true).abs() <= unit * (4 + wide**2)).all()
    for dtype in (torch.bfloat16, torch.float16):  # nearly the nearest number of the dtype
        x = torch.linspace(-3, 3, 4000).to(dtype)
        got, true = call("gelu", isa, x, None, False), call("gelu", "reference", x.double(), None, False)
        assert ((got.double() - true).abs() <= 0.55 * torch.finfo(dtype).eps * true.abs()).all()


def test_infinities_are_those_of_the_formula(isa):
    x = torch.tensor([math.inf, -math.inf, 3e38, -3e38])
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        got = call("gelu", isa, x.to(dtype), None, False)
        assert got[1].isnan()  # -inf times 0
        assert torch.equal(got[[0, 2, 3]], x[[0, 2]].new_tensor([math.inf, 3e38, 0]).to(dtype))


def test_a_nan_stays_one(path):
    x = torch.tensor([float("nan"), 1.0])
    for tanh in (False, True):
        assert call("gelu", path, x, None, tanh).isnan().tolist() == [True, False]
        assert call("gelu_backward", path, torch.ones(2), x, None, tanh)[0].isnan().tolist() == [True, False]
    assert call("swiglu", path, torch.tensor([float("nan"), 1.0, 1.0, 1.0])).isnan().tolist() == [True, False]


def test_shapes_and_strides(path):
    torch.manual_seed(0)
    same = torch.testing.assert_close if path == "reference" else assert_same_bits
    wide = torch.randn(5, 6, 40)
    for x in (wide[..., ::2], wide.transpose(0, 1)[..., :20], wide[0, 0, :20], wide[:0, :, :20], wide[..., :0]):
        dense, b = x.contiguous(), torch.randn(x.shape[-1])
        same(call("gelu", path, x, b, True), call("gelu", path, dense, b, True))
        same(call("swiglu", path, x), call("swiglu", path, dense))
        for found, expected in zip(*(call("gelu_backward", path, y, y, b, True) for y in (x, dense)), strict=True):
            same(found, expected)
    assert torch.equal(call("gelu_backward", path, wide[:0], wide[:0], torch.ones(40), False)[1], torch.zeros(40))


def test_bits_depend_neither_on_the_threads_nor_on_the_other_rows(isa):
    torch.manual_seed(0)
    x, grad, b = torch.randn(1000, 90), torch.randn(1000, 90), torch.randn(90)
    assert_threads_change_no_bit(
        lambda: (
            call("gelu", isa, x, b, False),
            *call("gelu_backward", isa, grad, x, b, True),
            call("swiglu", isa, x),
            call("swiglu_backward", isa, grad[:, :45], x),
        )
    )
    assert_same_bits(call("gelu", isa, x, b, True)[700], call("gelu", isa, x[700], b, True))


@pytest.mark.parametrize("tanh", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_opcheck(tanh, bias):
    x, b = torch.randn(3, 4, 6), torch.randn(6) if bias else None
    torch.library.opcheck(torch.ops.fastgen.gelu.default, (x, b, tanh))
    torch.library.opcheck(torch.ops.fastgen.gelu_backward.default, (x, x, b, tanh))
    torch.library.opcheck(torch.ops.fastgen.swiglu.default, (x,))
    torch.library.opcheck(torch.ops.fastgen.swiglu_backward.default, (x[..., :3], x))


@needs_kernels
@pytest.mark.parametrize(
    ("op", "arguments", "message"),
    [
        ("gelu", (torch.ones(2, 3).int(), None, True), "expected float32, float64, bfloat16 or float16"),
        ("gelu", (torch.tensor(1.0), None, True), "input: expected at least one dimension"),
        ("gelu", (torch.ones(2, 3), torch.ones(4), True), "bias: expected a vector of the last size of input, 3"),
        ("gelu", (torch.ones(2, 3), torch.ones(3).double(), True), "bias: .* in its dtype"),
        ("gelu_backward", (torch.ones(3), torch.ones(2, 3), None, True), "grad: expected the shape and dtype"),
        ("swiglu", (torch.ones(2, 3),), "input: expected an even last size, gate and up, got 3"),
        ("swiglu_backward", (torch.ones(2, 4), torch.ones(2, 4)), "grad: expected the shape and dtype"),
    ],
)
def test_what_does_not_fit_is_named(op, arguments, message):
    with pytest.raises(RuntimeError, match=message):
        getattr(torch.ops.fastgen, op)(*arguments)
