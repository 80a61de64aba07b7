"""Values of `reparameterize` and `reparameterize_kl`, forward and backward, against extended precision.

The rule: an error is at most twice that of the same formula in PyTorch's eager mode in the same dtype, element
by element counted in units of the operands' size, over many elements; and in float32 below a fixed number of units.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import FLOATS, ISAS, assert_same_bits, call
from torch import Tensor

from fastgen import random
from fastgen._load import use_cpu_isa
from fastgen.functional import reparameterize, reparameterize_kl
from fastgen.random import Generator

COUNT = 1 << 16


def wide(x: Tensor) -> np.ndarray:
    return x.detach().double().numpy().astype(np.longdouble)


def operands(dtype: torch.dtype, spread: float) -> tuple[Tensor, ...]:
    """mu, logvar, eps, grad_z of (COUNT / 32, 32) and grad_kl of its rows; `spread` is the size of logvar."""
    g = Generator(1)
    mu = random.normal(COUNT // 32, 32, generator=g, dtype=torch.float64)
    logvar = random.uniform(COUNT // 32, 32, low=-spread, high=spread, generator=g, dtype=torch.float64)
    eps, grad_z = (random.normal(COUNT // 32, 32, generator=g, dtype=torch.float64) for _ in range(2))
    grad_kl = random.normal(COUNT // 32, generator=g, dtype=torch.float64)
    return tuple(x.to(dtype) for x in (mu, logvar, eps, grad_z, grad_kl))


def eager(mu: Tensor, logvar: Tensor, eps: Tensor, grad_z: Tensor, grad_kl: Tensor) -> dict[str, Tensor]:
    """The formulas as a model in plain PyTorch has them."""
    mu, logvar = mu.clone().requires_grad_(), logvar.clone().requires_grad_()
    z = mu + torch.exp(0.5 * logvar) * eps
    kl = 0.5 * (mu.square() + logvar.exp() - 1 - logvar).sum(-1)
    grads = torch.autograd.grad((z, kl), (mu, logvar), (grad_z, grad_kl))
    return {"z": z, "kl": kl, "grad_mu": grads[0], "grad_logvar": grads[1]}


def ours(mu: Tensor, logvar: Tensor, eps: Tensor, grad_z: Tensor, grad_kl: Tensor) -> dict[str, Tensor]:
    mu, logvar = mu.clone().requires_grad_(), logvar.clone().requires_grad_()
    z, kl = reparameterize_kl(mu, logvar, eps=eps)
    assert_same_bits(reparameterize(mu, logvar, eps=eps).detach(), z.detach())
    grads = torch.autograd.grad((z, kl), (mu, logvar), (grad_z, grad_kl))
    return {"z": z, "kl": kl, "grad_mu": grads[0], "grad_logvar": grads[1]}


def exact(mu, logvar, eps, grad_z, grad_kl) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """name -> (value, size of its operands)."""
    m, v, e, gz, gk = (wide(x) for x in (mu, logvar, eps, grad_z, grad_kl))
    gk = gk[..., None]
    s = np.exp(v / 2)
    terms = m * m + (np.expm1(v) - v)
    return {
        "z": (m + s * e, np.abs(m) + np.abs(s * e)),
        "kl": (terms.sum(-1) / 2, (m * m + np.exp(v) + 1 + np.abs(v)).sum(-1) / 2),
        "grad_mu": (gz + gk * m, np.abs(gz) + np.abs(gk * m)),
        "grad_logvar": ((gz * s * e + gk * np.expm1(v)) / 2, (np.abs(gz * s * e) + np.abs(gk) * (np.exp(v) + 1)) / 2),
    }


def errors(got: dict[str, Tensor], want: dict[str, tuple[np.ndarray, np.ndarray]], dtype) -> dict[str, np.ndarray]:
    unit = torch.finfo(dtype).eps / 2
    return {k: np.abs(wide(got[k]) - value) / (size * unit) for k, (value, size) in want.items()}


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("spread", [1e-3, 1.0, 8.0])
def test_errors_are_at_most_twice_those_of_eager(isa, dtype, spread):
    inputs = operands(dtype, spread)
    want = exact(*inputs)
    with use_cpu_isa(isa):
        mine = errors(ours(*inputs), want, dtype)
    theirs = errors(eager(*inputs), want, dtype)
    for name in mine:
        for statistic in (np.mean, lambda x: np.quantile(x, 0.999), np.max):
            a, b = float(statistic(mine[name])), float(statistic(theirs[name]))
            assert a <= 2 * b + 0.5, (name, a, b)  # half a unit: the rounding of the result itself
        if dtype == torch.float32:
            assert float(mine[name].max()) < 6, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_divergence_is_accurate_near_its_zero(dtype):
    """Where mu and logvar are small, KL is about (mu^2 + logvar^2 / 2) / 2: exp(v) - 1 - v must not cancel."""
    for size in (1e-2, 1e-4, 1e-6):
        mu, logvar = (size * random.normal(512, 16, generator=Generator(k), dtype=dtype) for k in (1, 2))
        _, kl = reparameterize_kl(mu, logvar, eps=torch.zeros_like(mu))
        m, v = wide(mu), wide(logvar)
        series = sum(v**k / math.factorial(k) for k in range(2, 20))
        want = (m * m + series).sum(-1) / 2
        assert float((np.abs(wide(kl) - want) / want).max()) < 8 * torch.finfo(dtype).eps
        assert (kl >= 0).all()


@pytest.mark.parametrize("dtype", FLOATS)
def test_large_log_variances(isa, dtype):
    """|logvar| up to 100 and past the ends of exp: overflow and underflow where IEEE's are."""
    logvar = torch.linspace(-1600, 1600, 64_001, dtype=torch.float64).to(dtype)
    mu, eps = torch.zeros_like(logvar), torch.ones_like(logvar)
    with use_cpu_isa(isa):
        z = reparameterize(mu, logvar, eps=eps)
    with np.errstate(all="ignore"):
        want = np.exp(wide(logvar) / 2)
    info = torch.finfo(dtype)
    size, got = want.astype(np.float64), z.double().numpy()
    normal = (want >= float(info.tiny)) & (want < float(info.max) * (1 - info.eps))
    relative = np.abs(got[normal].astype(np.longdouble) - want[normal]) / want[normal]
    assert float(relative.max()) <= (1.01 if info.bits == 16 else 2) * info.eps
    assert np.isposinf(got[want > float(info.max) * (1 + info.eps)]).all()
    small = want < float(info.tiny)
    step = float(info.tiny) * info.eps  # of subnormal numbers
    assert (np.abs(got[small] - size[small]) <= step).all()
    assert (got >= 0).all()


SPECIAL = [0.0, -0.0, 1.0, -2.5, 1e-30, math.inf, -math.inf, math.nan, 300.0, -300.0, 3e4]


@pytest.mark.parametrize("dtype", FLOATS)
def test_what_is_not_finite_comes_out_as_in_the_formula(isa, dtype):
    """Every combination of special mu, logvar, eps and gradients: inf, -inf and nan where PyTorch has them."""
    values = torch.tensor(SPECIAL, dtype=torch.float64).to(dtype)
    mu, logvar, eps = (x.reshape(-1, 1).contiguous() for x in torch.meshgrid(values, values, values, indexing="ij"))
    # In the dtype the algebra runs in, so that only the algebra decides.
    work = torch.float64 if dtype == torch.float64 else torch.float32
    for gradient in (1.0, 0.0, math.inf, math.nan):
        grad_z, grad_kl = torch.full_like(mu, gradient), torch.full_like(mu[:, 0], gradient)
        with use_cpu_isa(isa):
            got = ours(mu, logvar, eps, grad_z, grad_kl)
        m, v, e = mu.to(work), logvar.to(work), eps.to(work)
        gz, gk = grad_z.to(work), grad_kl.to(work)[:, None]
        s = torch.exp(0.5 * v)
        want = {
            "z": m + s * e,
            "kl": 0.5 * (m * m + (torch.expm1(v) - v)).sum(-1),
            "grad_mu": gz + gk * m,
            "grad_logvar": 0.5 * (gz * (s * e) + gk * torch.expm1(v)),
        }
        for name, value in want.items():
            expected = value.to(dtype)
            kind = lambda x: torch.stack([x.isnan(), x.isposinf(), x.isneginf()])  # noqa: E731
            assert torch.equal(kind(got[name].detach()), kind(expected)), name


def test_zero_in_zero_out(isa):
    z, kl = call("reparameterize_kl", isa, torch.zeros(3, 5), torch.zeros(3, 5), None, torch.zeros(3, 5))
    assert not z.any()
    assert not kl.any()


@pytest.mark.parametrize(
    ("dtype", "length"),
    [(torch.float32, n) for n in (*range(1, 21), 31, 1023, 1024, 1025, 5000)]
    + [(dtype, n) for dtype in FLOATS[1:] for n in (1, 2, 3, 5, 8, 9, 15, 16, 17, 1023, 1025, 5000)],
)
def test_every_instruction_set_and_thread_count_has_the_same_bits(dtype, length, threads):
    """z, KL and both gradients, noise drawn and noise given."""
    rows = max(3, 36_000 // length)  # enough for three threads
    g = Generator(5)
    mu, logvar, eps, grad_z = (random.normal(rows, length, generator=g, dtype=dtype) for _ in range(4))
    grad_kl = random.normal(rows, generator=g, dtype=dtype)
    state = Generator(6, 2**64 - 1000).get_state()
    for seed_offset, noise in ((state, None), (None, eps)):
        calls = (
            ("reparameterize", mu, logvar, seed_offset, noise),
            ("reparameterize_kl", mu, logvar, seed_offset, noise),
            ("reparameterize_backward", grad_z, logvar, seed_offset, noise),
            ("reparameterize_kl_backward", grad_z, grad_kl, mu, logvar, seed_offset, noise),
            ("reparameterize_kl_backward", None, grad_kl, mu, logvar, seed_offset, noise),
            ("reparameterize_kl_backward", grad_z, None, mu, logvar, seed_offset, noise),
        )
        for name, *args in calls:
            threads(1)
            want = call(name, "generic", *args)
            for isa, count in [(isa, 1) for isa in ISAS] + [("generic", 3), (ISAS[0], 8)]:
                threads(count)
                got = call(name, isa, *args)
                pairs = zip(got, want, strict=True) if isinstance(want, tuple) else [(got, want)]
                for x, y in pairs:
                    assert_same_bits(x, y)


def test_the_noise_of_an_element_is_its_place_in_the_stream(isa):
    state = Generator(3, 77).get_state()
    for dtype in FLOATS:
        work = torch.float64 if dtype == torch.float64 else torch.float32
        noise = random.normal(2, 3, 41, generator=Generator(3, 77), dtype=work)
        zero = torch.zeros(2, 3, 41, dtype=dtype)
        assert_same_bits(call("reparameterize", isa, zero, zero, state, None), (zero + noise).to(dtype))
        # Strides and broadcasting do not move it.
        turned = torch.zeros(41, 3, 2, dtype=dtype).permute(2, 1, 0)
        assert_same_bits(call("reparameterize", isa, turned, zero, state, None), (zero + noise).to(dtype))


def test_the_backward_pass_draws_the_noise_of_the_forward_pass():
    for dtype in (torch.float32, torch.float64):
        mu, logvar = (torch.zeros(700, 3, dtype=dtype, requires_grad=True) for _ in range(2))
        z = reparameterize(mu, logvar, generator=Generator(4))
        z.sum().backward()
        assert_same_bits(logvar.grad, (z.detach() * 0.5))
        assert_same_bits(mu.grad, torch.ones_like(z))


@given(
    length=st.integers(1, 40),
    rows=st.integers(1, 9),
    dtype=st.sampled_from(FLOATS),
    seed=st.integers(0, 2**64 - 1),
    offset=st.integers(0, 2**64 - 1),
)
def test_kernels_agree_with_the_reference(length, rows, dtype, seed, offset):
    state = Generator(seed, offset).get_state()
    mu, logvar, grad_z = (random.normal(rows, length, generator=Generator(k), dtype=dtype) for k in range(3))
    grad_kl = random.normal(rows, generator=Generator(3), dtype=dtype)
    tolerance = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 16 * torch.finfo(dtype).eps}
    for name, args in (
        ("reparameterize", (mu, logvar)),
        ("reparameterize_kl", (mu, logvar)),
        ("reparameterize_backward", (grad_z, logvar)),
        ("reparameterize_kl_backward", (grad_z, grad_kl, mu, logvar)),
        ("reparameterize_kl_backward", (None, grad_kl, mu, logvar)),
        ("reparameterize_kl_backward", (grad_z, None, mu, logvar)),
    ):
        want = call(name, "reference", *args, state, None)
        for isa in ISAS:
            torch.testing.assert_close(call(name, isa, *args, state, None), want, **tolerance)
