"""The CUDA kernels against the CPU's: the same random bits, the same algebra, the right stream.

They run where a GPU is and the library is loaded (FASTGEN_CUDA_EXPERIMENTAL=1 while it is off by default).
"""

from __future__ import annotations

import pytest
import torch
from support import FLOATS, assert_same_bits

import fastgen
from fastgen import random, reference
from fastgen.functional import reparameterize, reparameterize_kl
from fastgen.random import Generator

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(
        not (fastgen.build_info()["cuda"] and torch.cuda.is_available()),
        reason=f"no CUDA kernels: {fastgen.build_info()['cuda_error'] or 'no device'}",
    ),
]

STATES = [(0, 0), (3, 1), (2**63, 2), (7, 2**34 - 5), (11, 2**64 - 3)]
SIZES = [0, 1, 3, 4, 5, 31, 32, 33, 1023, 1024, 1025, 300_001]
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
def test_draws_have_the_bits_of_the_cpu(name, dtype, arguments):
    op = getattr(torch.ops.fastgen, name)
    for state in STATES:
        seed_offset = torch.tensor([signed(word) for word in state])
        for size in SIZES:
            drawn = op(seed_offset.cuda(), [size], dtype, *arguments)
            assert drawn.is_cuda
            assert_same_bits(drawn.cpu(), op(seed_offset, [size], dtype, *arguments))


def test_several_streams():
    states = torch.tensor([[1, 0], [2, 5], [3, 2**40]])
    got = torch.ops.fastgen.normal(states.cuda(), [7, 9], torch.float32, 0.0, 1.0)
    assert_same_bits(got.cpu(), torch.ops.fastgen.normal(states, [7, 9], torch.float32, 0.0, 1.0))


def operands(shape, dtype, layout):
    mu, logvar = (random.normal(*shape, generator=Generator(k), std=2.0).to(dtype).cuda() for k in (1, 2))
    if layout == "transposed":
        return mu.transpose(0, -1), logvar.transpose(0, -1)
    if layout == "broadcast":
        return mu, logvar[..., :1].expand_as(mu)
    if layout == "sliced":
        return mu[..., ::2], logvar[..., 1::2] if shape[-1] % 2 == 0 else logvar[..., ::2]
    return mu, logvar


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "broadcast", "sliced"])
@pytest.mark.parametrize("shape", [(1,), (5,), (64, 20), (3, 1, 17), (2, 4099), (1000, 2), (1, 300_000)])
def test_reparameterize_agrees_with_the_oracle(shape, dtype, layout):
    mu, logvar = operands(shape, dtype, layout)
    state = torch.tensor([9, 3]).cuda()
    work = torch.float64 if dtype == torch.float64 else torch.float32
    noise = reference.normal(state.cpu(), list(mu.shape), work, 0.0, 1.0).double()
    m, v = mu.cpu().double(), logvar.cpu().double()
    grad_z, grad_kl = torch.ones_like(mu), torch.full(mu.shape[:-1], 0.5, dtype=dtype, device="cuda")

    z, kl = torch.ops.fastgen.reparameterize_kl(mu, logvar, state, None)
    got = [z, kl, *torch.ops.fastgen.reparameterize_kl_backward(grad_z, grad_kl, mu, logvar, state, None)]
    want = [
        *reference.reparameterize_kl(m, v, None, noise),
        *reference.reparameterize_kl_backward(grad_z.cpu().double(), grad_kl.cpu().double(), m, v, None, noise),
    ]
    assert_same_bits(torch.ops.fastgen.reparameterize(mu, logvar, state, None), z)
    for actual, exact in zip(got, want, strict=True):
        # Rounded once to dtype after arithmetic in `work`, whose errors scale with the largest terms.
        allowed = torch.finfo(dtype).eps * exact.abs() + 16 * torch.finfo(work).eps * exact.abs().max()
        assert ((actual.cpu().double() - exact).abs() <= allowed).all()


def test_z_has_the_bits_of_the_cpu():
    mu, logvar = (random.normal(257, 33, generator=Generator(k)) for k in (1, 2))
    on_gpu = reparameterize(mu.cuda(), logvar.cuda(), generator=Generator(4))
    assert_same_bits(on_gpu.cpu(), reparameterize(mu, logvar, generator=Generator(4)))


def test_gradients():
    mu, logvar = (random.normal(4, 6, generator=Generator(k), dtype=torch.float64).cuda() for k in (1, 2))
    inputs = (mu.requires_grad_(), logvar.requires_grad_())

    def function(m, v):
        return reparameterize_kl(m, v, generator=Generator(3))

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_on_a_stream_of_its_own():
    """The kernel waits for what its stream did before, and for nothing else."""
    stream = torch.cuda.Stream()
    mu = torch.zeros(1 << 20, device="cuda")
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        mu.fill_(3.0)
        z = reparameterize(mu, torch.full_like(mu, -200.0))  # sigma is 0 to rounding
    stream.synchronize()
    assert (z == 3.0).all()


def test_a_graph_draws_fresh_numbers_at_each_replay():
    generator = Generator(5, device="cuda")
    mu, logvar = torch.zeros(1000, device="cuda"), torch.zeros(1000, device="cuda")
    reparameterize(mu, logvar, generator=generator)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        z = reparameterize(mu, logvar, generator=generator)
    replays = []
    for _ in range(3):
        graph.replay()
        replays.append(z.clone())
    want = random.normal(4000, generator=Generator(5))[1000:].reshape(3, 1000)
    assert_same_bits(torch.stack(replays).cpu(), want)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_device_of_the_operands():
    mu = torch.zeros(1000, device="cuda:1")
    assert reparameterize(mu, mu).device == mu.device
    assert torch.cuda.current_device() == 0
