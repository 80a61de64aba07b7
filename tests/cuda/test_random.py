"""The random numbers and reparameterised sampling of the CUDA kernels against the CPU's: the same bits.

On the emulated device wherever the tests run, and on a GPU where one is.
"""

from __future__ import annotations

import pytest
import torch
from support import FLOATS, assert_same_bits

from fastgen import random, reference
from fastgen.random import Generator

STATES = [(0, 0), (3, 1), (2**63, 2), (7, 2**34 - 5), (11, 2**64 - 3)]
SIZES = [0, 1, 3, 4, 5, 31, 32, 33, 1023, 1024, 1025, 30_001]
DRAWS = [
    ("random_bits", torch.int32, ()),
    ("random_bits", torch.int64, ()),
    ("bernoulli", torch.bool, (0.3,)),
    *[("bernoulli", dtype, (0.3,)) for dtype in FLOATS],
    *[("uniform", dtype, (0.0, 1.0)) for dtype in FLOATS],
    *[("uniform", dtype, (-1.3, 2.7)) for dtype in FLOATS],
    *[("normal", dtype, (0.0, 1.0)) for dtype in FLOATS],
    *[("normal", dtype, (0.5, 2.0)) for dtype in FLOATS],
    *[("exponential", dtype, (3.0,)) for dtype in FLOATS],
]


def signed(word: int) -> int:
    return word - 2**64 if word >= 2**63 else word


@pytest.mark.parametrize(("name", "dtype", "arguments"), DRAWS)
def test_draws_have_the_bits_of_the_cpu(gpu, name, dtype, arguments):
    for state in STATES:
        seed_offset = torch.tensor([signed(word) for word in state])
        for size in SIZES:
            drawn = getattr(gpu.ops, name)(gpu.put(seed_offset), [size], dtype, *arguments)
            assert drawn.device == gpu.device
            assert_same_bits(drawn.cpu(), getattr(torch.ops.fastgen, name)(seed_offset, [size], dtype, *arguments))


def test_several_streams(gpu):
    states = torch.tensor([[1, 0], [2, 5], [3, 2**40]])
    got = gpu.ops.normal(gpu.put(states), [7, 9], torch.float32, 0.0, 1.0)
    assert_same_bits(got.cpu(), torch.ops.fastgen.normal(states, [7, 9], torch.float32, 0.0, 1.0))


def operands(gpu, shape, dtype, layout):
    mu, logvar = (gpu.put(random.normal(*shape, generator=Generator(k), std=2.0).to(dtype)) for k in (1, 2))
    if layout == "transposed":
        return mu.transpose(0, -1), logvar.transpose(0, -1)
    if layout == "broadcast":
        return mu, logvar[..., :1].expand_as(mu)
    if layout == "sliced":
        return mu[..., ::2], logvar[..., 1::2] if shape[-1] % 2 == 0 else logvar[..., ::2]
    return mu, logvar


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "broadcast", "sliced"])
@pytest.mark.parametrize("shape", [(1,), (5,), (64, 20), (3, 1, 17), (2, 4099), (1000, 2), (1, 30_000)])
def test_reparameterize_agrees_with_the_oracle(gpu, shape, dtype, layout):
    mu, logvar = operands(gpu, shape, dtype, layout)
    state = torch.tensor([9, 3])
    work = torch.float64 if dtype == torch.float64 else torch.float32
    noise = reference.normal(state, list(mu.shape), work, 0.0, 1.0).double()
    m, v = mu.cpu().double(), logvar.cpu().double()
    state = gpu.put(state)
    grad_z, grad_kl = torch.ones_like(mu), torch.full(mu.shape[:-1], 0.5, dtype=dtype, device=gpu.device)

    z, kl = gpu.ops.reparameterize_kl(mu, logvar, state, None)
    got = [z, kl, *gpu.ops.reparameterize_kl_backward(grad_z, grad_kl, mu, logvar, state, None)]
    want = [
        *reference.reparameterize_kl(m, v, None, noise),
        *reference.reparameterize_kl_backward(grad_z.cpu().double(), grad_kl.cpu().double(), m, v, None, noise),
    ]
    assert_same_bits(gpu.ops.reparameterize(mu, logvar, state, None), z)
    for actual, exact in zip(got, want, strict=True):
        # Rounded once to dtype after arithmetic in `work`, whose errors scale with the largest terms.
        allowed = torch.finfo(dtype).eps * exact.abs() + 16 * torch.finfo(work).eps * exact.abs().max()
        overflows = exact.to(dtype).isinf()
        assert_same_bits(actual.cpu()[overflows], exact.to(dtype)[overflows])
        assert ((actual.cpu().double() - exact).abs() <= allowed)[~overflows].all()


def test_z_has_the_bits_of_the_cpu(gpu):
    mu, logvar = (random.normal(257, 33, generator=Generator(k)) for k in (1, 2))
    state = torch.tensor([4, 0])
    drawn = gpu.ops.reparameterize(gpu.put(mu), gpu.put(logvar), gpu.put(state), None)
    assert_same_bits(drawn.cpu(), torch.ops.fastgen.reparameterize(mu, logvar, state, None))
