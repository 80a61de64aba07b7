"""What only a GPU shows of the CUDA kernels: the right stream and device, and the capture in a graph.

FASTGEN_CUDA_EXPERIMENTAL=1 loads the library while it is off by default.
"""

from __future__ import annotations

import pytest
import torch
from support import assert_same_bits

import fastgen
from fastgen import random
from fastgen.functional import reparameterize, reparameterize_kl
from fastgen.random import Generator

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(
        not (fastgen.build_info()["cuda"] and torch.cuda.is_available()),
        reason=f"no CUDA kernels: {fastgen.build_info()['cuda_error'] or 'no device'}",
    ),
]


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
