"""torch.compile without graph breaks: the numbers of eager mode, generators that move, symbolic shapes."""

from __future__ import annotations

import pytest
import torch
from support import assert_same_bits, needs_inductor

from fastgen import random
from fastgen.functional import reparameterize_kl
from fastgen.random import Generator


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def loss_and_gradients(function, mu, logvar, *rest):
    mu, logvar = mu.clone().requires_grad_(), logvar.clone().requires_grad_()
    z, kl = function(mu, logvar, *rest)
    (z.square().sum() + kl.sum()).backward()
    return z.detach(), kl.detach(), mu.grad, logvar.grad


BACKENDS = ["aot_eager", pytest.param("inductor", marks=[pytest.mark.slow, needs_inductor])]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_with_a_generator(backend, dynamic):
    """Two calls, forward and backward: the generator moves between them, and the backward pass sees the old state."""

    def function(mu, logvar, g):
        return reparameterize_kl(mu * 1.5, logvar, generator=g)

    compiled = torch.compile(function, fullgraph=True, backend=backend, dynamic=dynamic)
    g, h = Generator(5, 2), Generator(5, 2)
    for rows in (6, 6, 9) if dynamic else (6, 6):
        mu, logvar = (random.normal(rows, 10, generator=Generator(k)) for k in range(2))
        want = loss_and_gradients(function, mu, logvar, h)
        got = loss_and_gradients(compiled, mu, logvar, g)
        assert g.offset == h.offset
        assert_same_bits(got[0], want[0])
        for x, y in zip(got, want, strict=True):
            torch.testing.assert_close(x, y)


@pytest.mark.parametrize("backend", BACKENDS)
def test_with_given_noise(backend):
    compiled = torch.compile(lambda m, v, e: reparameterize_kl(m, v, eps=e), fullgraph=True, backend=backend)
    mu, logvar, eps = (random.normal(4, 5, generator=Generator(k)) for k in range(3))
    got = loss_and_gradients(compiled, mu, logvar, eps)
    want = loss_and_gradients(lambda m, v, e: reparameterize_kl(m, v, eps=e), mu, logvar, eps)
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_a_generator(backend):
    compiled = torch.compile(reparameterize_kl, fullgraph=True, backend=backend)
    x = torch.zeros(8, 4)
    torch.manual_seed(0)
    first, second = compiled(x, x)[0], compiled(x, x)[0]
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    assert_same_bits(compiled(x, x)[0], first)
    # And the gradient is of the noise of the forward pass.
    z, _, _, to_logvar = loss_and_gradients(lambda m, v: (compiled(m, v)[0], torch.zeros(())), x, x)
    torch.testing.assert_close(to_logvar, z * z)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_draw(backend):
    def draws(g, n):
        return (
            random.normal(n, 3, generator=g),
            random.uniform(n, generator=g, low=-1.0),
            random.exponential(n, generator=g, dtype=torch.float64),
            random.bernoulli(2, n, p=0.3, generator=g),
            random.bits(n, generator=g, dtype=torch.int64),
            random.dropout_mask(n, generator=g),
            random.permutation(n, generator=g),
        )

    compiled = torch.compile(draws, fullgraph=True, backend=backend, dynamic=True)
    g, h = Generator(9), Generator(9)
    for n in (5, 8, 8):
        for x, y in zip(compiled(g, n), draws(h, n), strict=True):
            assert_same_bits(x, y)
        assert g.offset == h.offset


def test_under_autocast_and_without_gradient():
    function = torch.compile(reparameterize_kl, fullgraph=True, backend="aot_eager")
    x = torch.linspace(-1, 1, 12, dtype=torch.bfloat16).reshape(3, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z, kl = function(x, x, generator=Generator(1))
        want = reparameterize_kl(x, x, generator=Generator(1))
    assert z.dtype == torch.float32
    assert_same_bits(z, want[0])
    assert_same_bits(kl, want[1])
    with torch.no_grad():
        assert_same_bits(function(x, x, generator=Generator(1))[0], reparameterize_kl(x, x, generator=Generator(1))[0])
