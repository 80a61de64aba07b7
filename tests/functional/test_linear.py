"""fastgen.functional.linear and fastgen.nn.Linear: PyTorch's results, by either product."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support import ISAS, assert_threads_change_no_bit, needs_inductor
from torch.nn import functional as F

import fastgen.nn as nn
from fastgen import _load
from fastgen._ops import linear as ops
from fastgen.functional import linear

needs_kernels = pytest.mark.skipif(not ISAS, reason="the CPU kernels are not built")


@pytest.fixture(params=[False, pytest.param(True, marks=needs_kernels)], ids=["torch", "kernel"])
def own(request, monkeypatch):
    """Whether the kernels serve, whatever CPU this is."""
    monkeypatch.setattr(ops, "mm_pays", lambda: request.param)
    calls = counted(monkeypatch)
    yield request.param
    assert bool(calls) == request.param


def counted(monkeypatch):
    """The names of the kernels that are called from here on."""
    calls = []
    for name in ("_mm", "_linear_rows", "_linear_rows_backward"):
        real = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *args, name=name, real=real: calls.append(name) or real(*args))
    return calls


def operands(*shape, dtype=torch.float32, bias=True, requires_grad=False, inputs=96):
    torch.manual_seed(0)
    x = torch.randn(*shape, inputs, dtype=dtype, requires_grad=requires_grad)
    w = (torch.randn(160, inputs, dtype=dtype) / inputs**0.5).requires_grad_(requires_grad)
    return x, w, torch.randn(160, dtype=dtype, requires_grad=requires_grad) if bias else None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("shape", "inputs"), [((200,), 96), ((3, 70), 96), ((2, 3, 40), 96), ((13,), 513), ((1, 2, 33), 517), ((63,), 96)]
)
def test_values_and_gradients(own, dtype, bias, shape, inputs):
    given = operands(*shape, dtype=dtype, bias=bias, requires_grad=True, inputs=inputs)
    grad = torch.randn(*shape, 160, dtype=dtype)
    wanted = [x for x in given if x is not None]
    out, expected = linear(*given), F.linear(*given)
    torch.testing.assert_close(out, expected)
    for ours, theirs in zip(
        torch.autograd.grad(out, wanted, grad), torch.autograd.grad(expected, wanted, grad), strict=True
    ):
        assert ours.shape == theirs.shape
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@needs_kernels
@pytest.mark.parametrize(
    ("dtype", "shape", "kernels"),
    [
        (torch.float32, (63,), ["_linear_rows", "_linear_rows_backward"]),
        (torch.float32, (64,), ["_mm", "_mm", "_mm"]),
        (torch.float32, (1, 2), ["_linear_rows", "_linear_rows_backward"]),
        (torch.float32, (1,), []),
        (torch.float16, (1,), ["_linear_rows", "_linear_rows_backward"]),
        (torch.float16, (70,), ["_linear_rows", "_linear_rows_backward"]),
        (torch.bfloat16, (2, 2), ["_linear_rows", "_linear_rows_backward"]),
        (torch.bfloat16, (5,), []),
    ],
)
def test_which_kernel_serves_where_gradients_are_recorded(monkeypatch, dtype, shape, kernels):
    """And that the errors of the gradients are no larger than twice PyTorch's."""
    monkeypatch.setattr(ops, "mm_pays", lambda: True)
    calls = counted(monkeypatch)
    given = [x.detach().to(dtype).requires_grad_() for x in operands(*shape, dtype=torch.float64, inputs=3300)]
    grad = torch.randn(*shape, 160).to(dtype)
    ours, theirs, exact = (
        torch.autograd.grad(function(*leaves), leaves, grad.to(leaves[0].dtype))
        for function, leaves in (
            (linear, given),
            (F.linear, given),
            (F.linear, [x.detach().double().requires_grad_() for x in given]),
        )
    )
    assert calls == kernels
    for a, b, want in zip(ours, theirs, exact, strict=True):
        assert (a.shape, a.dtype) == (want.shape, dtype)
        allowed = (b.double() - want).abs().max() + torch.finfo(dtype).eps * (1 + want.abs().max())
        assert (a.double() - want).abs().max() <= 2 * allowed


@pytest.mark.parametrize("shape", [(200,), (3, 70), (40,)])
def test_the_result_may_be_changed_in_place(own, shape):
    """As by `ReLU(inplace=True)`."""
    x, w, b = operands(*shape, requires_grad=True)
    got, want = (function(x, w, b).relu_() for function in (linear, F.linear))
    torch.testing.assert_close(got, want)
    for ours, theirs in zip(*(torch.autograd.grad(y.sum(), (x, w, b)) for y in (got, want)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_only_the_gradients_that_are_asked_for(own):
    x, w, b = operands(200)
    (linear(x, w, b.requires_grad_()).sum()).backward()
    torch.testing.assert_close(b.grad, torch.full((160,), 200.0))
    x.requires_grad_()
    linear(x, w).sum().backward()
    torch.testing.assert_close(x.grad, w.sum(0).expand(200, 96))


def test_second_derivatives(own):
    x, w, b = operands(200, dtype=torch.float64, requires_grad=True)
    probe = torch.randn(200, 160, dtype=torch.float64)

    def penalty(product):
        (grad,) = torch.autograd.grad((product(x, w, b).square() * probe).sum(), x, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), (x, w, b))

    for ours, theirs in zip(penalty(linear), penalty(F.linear), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_gradcheck(own):
    x, w, b = operands(320, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *given: linear(*given).sin(), (x, w, b), fast_mode=True)


@needs_kernels
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("dtype", "shape", "inputs", "kernel"),
    [
        (torch.float32, (1,), 1700, "_linear_rows"),
        (torch.float32, (), 1700, "_linear_rows"),
        (torch.float64, (2, 9), 96, "_linear_rows"),
        (torch.float32, (63,), 600, "_linear_rows"),
        (torch.float32, (64,), 600, "_mm"),
        (torch.float32, (255,), 512, "_linear_rows"),
        (torch.float32, (256,), 512, "_mm"),
        (torch.float16, (300,), 600, "_linear_rows"),
        (torch.bfloat16, (2, 4), 600, "_linear_rows"),
        (torch.bfloat16, (9,), 600, None),
    ],
)
def test_without_gradients(monkeypatch, dtype, shape, inputs, kernel, bias):
    """Which kernel serves, and that its error is no larger than twice PyTorch's."""
    monkeypatch.setattr(ops, "mm_pays", lambda: True)
    calls = counted(monkeypatch)
    given = operands(*shape, dtype=torch.float64, bias=bias, inputs=inputs)
    given = tuple(None if x is None else x.to(dtype) for x in given)
    x, w, b = (None if x is None else x.double().numpy().astype(np.longdouble) for x in given)
    exact = x @ w.T + (0 if b is None else b)
    with torch.no_grad():
        out, theirs = linear(*given), F.linear(*given)
    assert calls == ([] if kernel is None else [kernel])
    assert out.dtype == dtype
    assert out.shape == theirs.shape
    ours, torchs = (np.abs(y.double().numpy() - exact).max() for y in (out, theirs))
    assert ours <= 2 * torchs + torch.finfo(dtype).eps


@needs_kernels
def test_a_weight_of_any_strides(monkeypatch):
    monkeypatch.setattr(ops, "mm_pays", lambda: True)
    x, w, b = operands(40, inputs=600)
    for weight in (w.t().contiguous().t(), w.repeat(1, 2)[:, ::2], w[:1].expand(160, 600)):
        torch.testing.assert_close(linear(x, weight, b), F.linear(x, weight, b), rtol=1e-4, atol=1e-5)


@needs_kernels
def test_small_and_foreign_products_are_torchs(monkeypatch):
    monkeypatch.setattr(ops, "mm_pays", lambda: True)

    def refuse(*args):
        raise AssertionError("a kernel was asked")

    for name in ("_mm", "_linear_rows", "_linear_rows_backward"):
        monkeypatch.setattr(ops, name, refuse)
    x, w, b = operands(200)
    linear(x[:4], w, b)  # little work
    linear(x[0], w, b)
    linear(x[:, :40], w[:, :40], b)  # short sums
    linear(x.bfloat16(), w.bfloat16(), b.bfloat16())
    linear(x[:1].repeat(1, 100), w.repeat(1, 100).requires_grad_())  # the gradient of one row
    linear(x.to("meta"), w.to("meta"), b.to("meta"))
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, w, b).dtype is torch.bfloat16
    torch.func.vmap(lambda v: linear(v, w, b))(x.view(4, 50, 96))
    torch.func.jvp(lambda v: linear(v, w, b), (x,), (x,))
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
        linear(x, w[:, :5], b)
    with pytest.raises(RuntimeError):
        linear(x, w.double(), b)
    with pytest.raises(RuntimeError):
        linear(x, w, b.to("meta"))
    with pytest.raises(TypeError):
        linear("x", w, b)
    torch.testing.assert_close(linear(x.to_sparse(), w), F.linear(x, w))


@needs_kernels
def test_the_kernel_serves_where_mkl_does_not(isa):
    with _load.use_cpu_isa(isa):
        assert ops.mm_pays() == (isa.startswith("avx512") and _load.cpu_vendor() != "GenuineIntel")


def test_module(own):
    torch.manual_seed(0)
    ours = nn.Linear(96, 160)
    torch.manual_seed(0)
    theirs = torch.nn.Linear(96, 160)
    assert isinstance(ours, torch.nn.Linear)
    assert repr(ours) == repr(theirs)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    x = torch.randn(200, 96)
    torch.testing.assert_close(ours(x), theirs(x))
    x = torch.randn(5, 96)
    torch.testing.assert_close(ours(x), theirs(x))


def test_bits_do_not_depend_on_the_threads(own):
    x, w, b = operands(3000, requires_grad=True)
    grad = torch.randn(3000, 160)

    def compute():
        out = linear(x, w, b)
        return out.detach(), *torch.autograd.grad(out, (x, w, b), grad)

    if own:
        assert_threads_change_no_bit(compute)
    else:  # PyTorch's affair
        compute()


@pytest.mark.slow
@needs_inductor
@needs_kernels
def test_one_tensor_twice_compiled(monkeypatch):
    monkeypatch.setattr(ops, "mm_pays", lambda: True)
    x = torch.randn(160, 160, requires_grad=True)
    out = torch.compile(lambda x: linear(x, x), fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(out, F.linear(x, x), rtol=1e-5, atol=1e-4)


@pytest.mark.slow
@needs_inductor
@needs_kernels
def test_compiled(monkeypatch):
    monkeypatch.setattr(ops, "mm_pays", lambda: True)
    x, w, b = operands(200, requires_grad=True)
    compiled = torch.compile(linear, fullgraph=True, dynamic=True)
    for rows in (200, 333):
        x = torch.randn(rows, 96, requires_grad=True)
        out, expected = compiled(x, w, b), F.linear(x, w, b)
        torch.testing.assert_close(out, expected)
        for ours, theirs in zip(
            torch.autograd.grad(out.square().sum(), (x, w, b)),
            torch.autograd.grad(expected.square().sum(), (x, w, b)),
            strict=True,
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)
