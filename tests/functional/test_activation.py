"""fastgen.functional.gelu and swiglu: PyTorch's results and derivatives."""

from __future__ import annotations

import pytest
import torch
from support import needs_inductor
from torch.nn import functional as F

from fastgen.functional import gelu, swiglu

APPROXIMATE = ("none", "tanh")


def operands(dtype=torch.float64):
    torch.manual_seed(0)
    return torch.randn(3, 4, 6, dtype=dtype, requires_grad=True), torch.randn(6, dtype=dtype, requires_grad=True)


def torchs_swiglu(x):
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


@pytest.mark.parametrize("approximate", APPROXIMATE)
def test_gelu_is_torchs(approximate):
    x, b = operands(torch.float32)
    grad = torch.randn_like(x)
    torch.testing.assert_close(gelu(x, approximate=approximate), F.gelu(x, approximate=approximate))
    ours, theirs = gelu(x, b, approximate=approximate), F.gelu(x + b, approximate=approximate)
    torch.testing.assert_close(ours, theirs)
    for mine, their in zip(
        torch.autograd.grad(ours, (x, b), grad), torch.autograd.grad(theirs, (x, b), grad), strict=True
    ):
        torch.testing.assert_close(mine, their)


def test_swiglu_is_torchs():
    x, _ = operands(torch.float32)
    grad = torch.randn(3, 4, 3)
    torch.testing.assert_close(swiglu(x), torchs_swiglu(x))
    torch.testing.assert_close(*(torch.autograd.grad(f(x), x, grad) for f in (swiglu, torchs_swiglu)))


@pytest.mark.parametrize("approximate", APPROXIMATE)
def test_derivatives(approximate):
    x, b = operands()

    def function(x, b):
        return gelu(x, b, approximate=approximate)

    assert torch.autograd.gradcheck(function, (x, b))
    assert torch.autograd.gradgradcheck(function, (x, b))
    assert torch.autograd.gradgradcheck(lambda x: gelu(x, approximate=approximate), (x,))
    assert torch.autograd.gradcheck(swiglu, (x,))
    assert torch.autograd.gradgradcheck(swiglu, (x,))


def test_only_the_gradients_that_are_asked_for():
    x, b = operands()
    (found,) = torch.autograd.grad(gelu(x.detach(), b).sum(), b)
    (expected,) = torch.autograd.grad(F.gelu(x.detach() + b).sum(), b)
    torch.testing.assert_close(found, expected)
    (found,) = torch.autograd.grad(gelu(x, b.detach()).sum(), x)
    torch.testing.assert_close(found, torch.autograd.grad(F.gelu(x + b.detach()).sum(), x)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_bias_of_float32_beside_a_half_type(dtype):
    x, b = operands(torch.float32)
    half = x.detach().to(dtype).requires_grad_()
    out = gelu(half, b)
    assert out.dtype is dtype
    grad_x, grad_b = torch.autograd.grad(out.sum(), (half, b))
    assert (grad_x.dtype, grad_b.dtype) == (dtype, torch.float32)
    torch.testing.assert_close(out, F.gelu(half.float() + b).to(dtype))
    torch.testing.assert_close(grad_b, torch.autograd.grad(F.gelu(half.float() + b).sum(), b)[0])


def test_transforms():
    x, b = operands()
    torch.testing.assert_close(torch.func.vmap(gelu, in_dims=(0, None))(x, b), F.gelu(x + b))
    torch.testing.assert_close(torch.func.vmap(swiglu)(x), torchs_swiglu(x))
    ours, theirs = (torch.func.jvp(f, (x,), (x,))[1] for f in (swiglu, torchs_swiglu))
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(
        torch.func.hessian(lambda x: gelu(x).sum())(x), torch.func.hessian(lambda x: F.gelu(x).sum())(x)
    )


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (lambda x: gelu(x.int()), TypeError, "input: expected float32, float64, bfloat16 or float16, got int32"),
        (lambda x: gelu(x[0, 0]), ValueError, "input: expected at least one dimension"),
        (lambda x: gelu(x, torch.ones(3)), ValueError, r"bias: expected shape \(4,\), got \(3,\)"),
        (lambda x: gelu(x, torch.ones(4).half()), TypeError, "bias: expected float32 as input is, got float16"),
        (lambda x: gelu(x, approximate="erf"), ValueError, "approximate: expected"),
        (lambda x: swiglu(x[:, :3]), ValueError, "input: expected an even last size, gate and up, got 3"),
        (lambda x: swiglu(x.bool()), TypeError, "input: expected float32, float64, bfloat16 or float16, got bool"),
    ],
)
def test_what_does_not_fit_is_named(function, error, message):
    with pytest.raises(error, match=message):
        function(torch.ones(2, 4))


@pytest.mark.slow
@needs_inductor
def test_compiled():
    def function(x, b):
        return gelu(x, b, approximate="tanh").sum() + swiglu(x).sum()

    x, b = operands(torch.float32)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(
        torch.autograd.grad(compiled(x, b), (x, b)), torch.autograd.grad(function(x, b), (x, b)), strict=True
    ):
        torch.testing.assert_close(ours, theirs)
