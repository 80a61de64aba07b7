"""`fastgen.reference`, the definition of every op: small cases worked by hand, and its roots of every dtype."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from support import FLOATS

from fastgen import _ops, reference
from fastgen.random import Generator


def test_every_op_has_a_reference():
    for name in _ops.SCHEMAS:
        assert callable(getattr(reference, name))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_root_is_correctly_rounded(dtype):
    """As IEEE's square root (NumPy's), on numbers of all sizes that occur: twice an exponential number."""
    rng = np.random.default_rng(1)
    x = np.exp(rng.uniform(math.log(2.0**-64), math.log(91), 500_000)).astype(
        np.float64 if dtype.itemsize == 8 else np.float32
    )
    assert np.array_equal(reference.random._sqrt(torch.from_numpy(x)).numpy(), np.sqrt(x))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("high", [1.0, 0.0, -1.0, 0.3, 1e-7, -1e-7, 1 + 1e-12, 255.9, 65504.0, 3.0000001])
def test_below(dtype, high):
    """The largest number of the dtype under `high`: nothing of the dtype lies between."""
    value = reference.below(high, dtype)
    assert value < high
    as_dtype = torch.tensor(value, dtype=torch.float64).to(dtype)
    assert float(as_dtype) == value
    above = torch.nextafter(as_dtype, torch.tensor(math.inf, dtype=dtype))
    assert float(above.double()) >= high


def test_box_muller_of_known_words():
    """One pair of seed 0, with the functions of the math module."""
    state = Generator(0).get_state()
    for dtype, bits in ((torch.float32, 32), (torch.float64, 64)):
        kind = {32: torch.int32, 64: torch.int64}[bits]
        words = [int(w) % 2**bits for w in reference.random_bits(state, [2], kind)]
        radius = math.sqrt(-2 * math.log1p(-(words[0] + 0.5) / 2**bits))
        angle = 2 * math.pi * words[1] / 2**bits
        z = reference.normal(state, [2], dtype, 0.0, 1.0)
        assert z.tolist() == pytest.approx([radius * math.cos(angle), radius * math.sin(angle)], rel=1e-6)
        e = reference.exponential(state, [2], dtype, 2.0)
        assert e.tolist() == pytest.approx([-math.log1p(-(w + 0.5) / 2**bits) / 2 for w in words], rel=1e-6)
        u = reference.uniform(state, [2], dtype, 3.0, 5.0)
        assert u.tolist() == pytest.approx([3 + 2 * w / 2**bits for w in words], rel=1e-6)
        b = reference.bernoulli(state, [2], torch.bool, 0.7)
        first = [int(w) % 2**32 for w in reference.random_bits(state, [2], torch.int32)]
        assert b.tolist() == [w < 0.7 * 2**32 for w in first]


def test_reparameterization_by_hand():
    mu, logvar, eps = torch.tensor([[1.0, -2.0]]), torch.tensor([[0.0, math.log(4.0)]]), torch.tensor([[3.0, 0.5]])
    z, kl = reference.reparameterize_kl(mu, logvar, None, eps)
    assert z.tolist() == [[4.0, -1.0]]
    assert float(kl) == pytest.approx(0.5 * ((1 + 1 - 1 - 0) + (4 + 4 - 1 - math.log(4))))
    grad_z, grad_kl = torch.tensor([[1.0, 2.0]]), torch.tensor([10.0])
    to_mu, to_logvar = reference.reparameterize_kl_backward(grad_z, grad_kl, mu, logvar, None, eps)
    assert to_mu.tolist() == [[11.0, -18.0]]
    # (gz s eps + gk (s^2 - 1)) / 2
    assert to_logvar[0].tolist() == pytest.approx([(1 * 1 * 3 + 0) / 2, (2 * 2 * 0.5 + 10 * 3) / 2], rel=1e-6)
    assert reference.reparameterize_backward(grad_z, logvar, None, eps)[0].tolist() == pytest.approx([1.5, 1.0])


def test_the_divergence_is_that_of_two_normals():
    """Against the quadrature of its definition."""
    mu, logvar = 0.7, -0.9
    x = torch.linspace(-12, 12, 400_001, dtype=torch.float64)
    sigma = math.exp(logvar / 2)
    log_q = -0.5 * ((x - mu) / sigma) ** 2 - math.log(sigma) - 0.5 * math.log(2 * math.pi)
    log_p = -0.5 * x**2 - 0.5 * math.log(2 * math.pi)
    quadrature = float(torch.trapezoid(log_q.exp() * (log_q - log_p), x))
    kl = reference.kl_divergence(torch.tensor([mu], dtype=torch.float64), torch.tensor([logvar], dtype=torch.float64))
    assert float(kl) == pytest.approx(quadrature, rel=1e-9)
