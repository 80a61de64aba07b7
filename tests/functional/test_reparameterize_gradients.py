"""Gradients of the reparameterisation, of every order and by every route, and its errors."""

from __future__ import annotations

import pytest
import torch
from support import FLOATS, assert_same_bits
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

from fastgen import random
from fastgen.functional import reparameterize, reparameterize_kl
from fastgen.random import Generator


def inputs(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [
        random.normal(*shape, generator=Generator(k), dtype=torch.float64).requires_grad_()
        for k, shape in enumerate(shapes)
    ]


FUNCTIONS = {
    "z": lambda mu, logvar, **noise: reparameterize(mu, logvar, **noise),
    "both": lambda mu, logvar, **noise: reparameterize_kl(mu, logvar, **noise),
    "z of both": lambda mu, logvar, **noise: reparameterize_kl(mu, logvar, **noise)[0],
    "kl of both": lambda mu, logvar, **noise: reparameterize_kl(mu, logvar, **noise)[1],
}
SHAPES = [((3, 4), (3, 4)), ((3, 1), (4,)), ((2, 1, 3), (1, 4, 3)), ((5,), (5,))]


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("shapes", SHAPES)
def test_gradcheck_and_gradgradcheck(name, shapes):
    mu, logvar = inputs(*shapes)
    function = FUNCTIONS[name]

    def drawn(mu, logvar):
        return function(mu, logvar, generator=Generator(7, 3))

    assert gradcheck(drawn, (mu, logvar))
    assert gradgradcheck(drawn, (mu, logvar))

    def given(mu, logvar, eps):
        return function(mu, logvar, eps=eps)

    (eps,) = inputs(torch.broadcast_shapes(*shapes))
    assert gradcheck(given, (mu, logvar, eps))
    assert gradgradcheck(given, (mu, logvar, eps))
    # One of them alone
    for i in range(3):
        only = [x if k == i else x.detach() for k, x in enumerate((mu, logvar, eps))]
        if name == "kl of both" and i == 2:
            continue
        assert gradcheck(given, only)


def test_third_order():
    mu, logvar, eps = inputs((3,), (3,), (3,))
    z, kl = reparameterize_kl(mu, logvar, eps=eps)
    value, plain = (z**2).sum() + kl, ((mu + (logvar / 2).exp() * eps) ** 2).sum()
    plain = plain + 0.5 * (mu**2 + logvar.exp() - 1 - logvar).sum()
    for variable in (logvar, logvar, logvar):
        (value,) = torch.autograd.grad(value.sum(), variable, create_graph=True)
        (plain,) = torch.autograd.grad(plain.sum(), variable, create_graph=True)
        torch.testing.assert_close(value, plain)


def test_the_gradient_of_unused_results_and_inputs():
    mu, logvar = inputs((3, 2), (3, 2))
    z, kl = reparameterize_kl(mu, logvar, generator=Generator(1))
    (to_mu,) = torch.autograd.grad(kl.sum(), mu, retain_graph=True)
    torch.testing.assert_close(to_mu, mu.detach())
    z, _ = reparameterize_kl(mu.detach(), logvar, generator=Generator(1))
    (to_logvar,) = torch.autograd.grad(z.sum(), logvar)
    torch.testing.assert_close(to_logvar, (z - mu).detach() / 2)
    assert not reparameterize(mu.detach(), logvar.detach()).requires_grad
    with torch.no_grad():
        assert not reparameterize(mu, logvar).requires_grad
    with torch.inference_mode():
        assert not reparameterize(mu, logvar).requires_grad


def test_backward_twice():
    mu, logvar = inputs((50, 3), (50, 3))
    z, kl = reparameterize_kl(mu, logvar, generator=Generator(1))
    loss = (z**2).sum() + kl.sum()
    first = torch.autograd.grad(loss, (mu, logvar), retain_graph=True)
    second = torch.autograd.grad(loss, (mu, logvar))
    for x, y in zip(first, second, strict=True):
        assert_same_bits(x, y)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, (mu, logvar))


@pytest.mark.parametrize("function", [reparameterize, reparameterize_kl])
def test_only_the_inputs_are_kept(function):
    """No noise and no standard deviation: what stays for the backward pass is what the caller holds, and 16 bytes."""
    mu, logvar = (torch.zeros(1000, 8, requires_grad=True) for _ in range(2))
    kept: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        kept.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        function(mu, logvar, generator=Generator(1))
    own = [x for x in kept if x.data_ptr() not in (mu.data_ptr(), logvar.data_ptr())]
    assert len(kept) <= 3
    assert sum(x.nbytes for x in own) == 16

    # Broadcast operands are kept as they came.
    kept.clear()
    row = torch.zeros(8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        function(mu, row, generator=Generator(1))
    assert sum(x.untyped_storage().nbytes() for x in kept if x.data_ptr() != mu.data_ptr()) <= row.nbytes + 16


def test_a_changed_input_is_noticed():
    mu, logvar = inputs((4,), (4,))
    held = logvar * 1
    z = reparameterize(mu, held, generator=Generator(1))
    held.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()


def run_checkpointed(function, *arguments, **options):
    mu, logvar = (torch.linspace(-1, 1, 40).reshape(8, 5).requires_grad_() for _ in range(2))
    z, kl = checkpoint(function, mu, logvar, *arguments, **options)
    (z.square().sum() + kl.sum()).backward()
    return z.detach(), kl.detach(), mu.grad, logvar.grad


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_with_torch_generators(use_reentrant):
    def plain(mu, logvar):
        return reparameterize_kl(mu * 2, logvar * 2)

    torch.manual_seed(3)
    checkpointed = run_checkpointed(plain, use_reentrant=use_reentrant)
    torch.manual_seed(3)
    mu, logvar = (torch.linspace(-1, 1, 40).reshape(8, 5).requires_grad_() for _ in range(2))
    z, kl = plain(mu, logvar)
    (z.square().sum() + kl.sum()).backward()
    for x, y in zip(checkpointed, (z.detach(), kl.detach(), mu.grad, logvar.grad), strict=True):
        assert_same_bits(x, y)


def test_checkpointing_with_a_generator():
    """`checkpoint_contexts` replays the generator in the recomputation; without it the gradient is of other noise."""

    def draw(generator):
        def function(mu, logvar):
            return reparameterize_kl(mu * 2, logvar * 2, generator=generator)

        return function

    g = Generator(5, 8)
    checkpointed = run_checkpointed(draw(g), use_reentrant=False, context_fn=random.checkpoint_contexts(g))
    assert g.offset == 48
    reference = Generator(5, 8)
    mu, logvar = (torch.linspace(-1, 1, 40).reshape(8, 5).requires_grad_() for _ in range(2))
    z, kl = draw(reference)(mu, logvar)
    (z.square().sum() + kl.sum()).backward()
    for x, y in zip(checkpointed, (z.detach(), kl.detach(), mu.grad, logvar.grad), strict=True):
        assert_same_bits(x, y)

    other = Generator(5, 8)
    without = run_checkpointed(draw(other), use_reentrant=False)
    assert not torch.equal(without[3], logvar.grad)


def test_torch_manual_seed_repeats():
    x = torch.zeros(9, 9)
    torch.manual_seed(1)
    first, second = reparameterize(x, x), reparameterize(x, x)
    torch.manual_seed(1)
    assert_same_bits(reparameterize(x, x), first)
    assert not torch.equal(first, second)
    source = torch.Generator().manual_seed(2)
    a = reparameterize(x, x, generator=source)
    assert_same_bits(reparameterize(x, x, generator=torch.Generator().manual_seed(2)), a)


def test_a_generator_moves_by_the_elements_of_the_result():
    g = Generator(1)
    reparameterize(torch.zeros(3, 1), torch.zeros(4), generator=g)
    assert g.offset == 12
    reparameterize_kl(torch.zeros(5, 2), torch.zeros(5, 2), generator=g)
    assert g.offset == 22
    reparameterize(torch.zeros(3), torch.zeros(3), eps=torch.zeros(3))
    reparameterize(torch.zeros(0), torch.zeros(0), generator=g)
    assert g.offset == 22


def test_promotion_and_autocast():
    half, full, double = (torch.zeros(4, dtype=d) for d in (torch.bfloat16, torch.float32, torch.float64))
    assert reparameterize(half, full).dtype == torch.float32
    assert reparameterize(full, double).dtype == torch.float64
    assert reparameterize(half, half.half()).dtype == torch.float32
    assert reparameterize(half, half, eps=double).dtype == torch.bfloat16
    for dtype in (torch.bfloat16, torch.float16):
        x = torch.linspace(-2, 2, 64).to(dtype).requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            z, kl = reparameterize_kl(x, x, generator=Generator(1))
        assert z.dtype == kl.dtype == torch.float32
        want = reparameterize_kl(x.float(), x.float(), generator=Generator(1))
        assert_same_bits(z.detach(), want[0].detach())
        assert_same_bits(kl.detach(), want[1].detach())
        (z.sum() + kl).backward()
        assert x.grad.dtype == dtype
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert reparameterize(double, double).dtype == torch.float64


@pytest.mark.parametrize("dtype", FLOATS)
def test_gradients_have_the_dtypes_and_shapes_of_the_inputs(dtype):
    mu = torch.zeros(3, 1, dtype=dtype, requires_grad=True)
    logvar = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    z, kl = reparameterize_kl(mu, logvar)
    (z.sum() + kl.sum()).backward()
    assert (mu.grad.dtype, mu.grad.shape) == (dtype, (3, 1))
    assert (logvar.grad.dtype, logvar.grad.shape) == (torch.float64, (4,))


X = torch.zeros(3, 4)
BAD = [
    ((1.0, X), {}, TypeError, "mu: expected a tensor, got float"),
    ((X, None), {}, TypeError, "logvar: expected a tensor, got NoneType"),
    ((X, X), {"eps": 0.5}, TypeError, "eps: expected a tensor, got float"),
    ((X.int(), X), {}, TypeError, "mu: expected float32, float64, bfloat16 or float16, got int32"),
    ((X, X.bool()), {}, TypeError, "logvar: expected float32, float64, bfloat16 or float16, got bool"),
    ((X, X.to(torch.complex64)), {}, TypeError, "logvar: expected float32, .* got complex64"),
    ((X, X), {"eps": X.long()}, TypeError, "eps: expected float32, .* got int64"),
    ((X, X.to("meta")), {}, ValueError, "logvar: expected a tensor on cpu as mu is, got one on meta"),
    ((X, X), {"eps": X.to("meta")}, ValueError, "eps: expected a tensor on cpu as mu is, got one on meta"),
    (
        (X, X[:2]),
        {},
        ValueError,
        r"logvar, eps: expected shapes that broadcast with mu, got mu \(3, 4\), logvar \(2, 4\)",
    ),
    ((X, X), {"eps": torch.zeros(5)}, ValueError, r"logvar, eps: .* got mu \(3, 4\), logvar \(3, 4\), eps \(5,\)"),
    ((X, X), {"eps": X, "generator": Generator(1)}, ValueError, "generator: expected None where eps gives the noise"),
    ((X, X), {"generator": 7}, TypeError, "generator: expected a fastgen.random.Generator, .* got int"),
]


@pytest.mark.parametrize("function", [reparameterize, reparameterize_kl])
@pytest.mark.parametrize(("args", "options", "error", "message"), BAD)
def test_errors(function, args, options, error, message):
    with pytest.raises(error) as caught:
        function(*args, **options)
    caught.match(f"^{message}")
    assert "\n" not in str(caught.value)


def test_kl_of_a_scalar():
    with pytest.raises(ValueError, match=r"^mu: expected at least one dimension to sum the divergence over, got a 0-d"):
        reparameterize_kl(torch.tensor(0.0), torch.tensor(0.0))
