"""What only a GPU shows of the CUDA kernels: the right stream and device, and the capture in a graph.

FASTGEN_CUDA_EXPERIMENTAL=1 loads the library while it is off by default.
"""

from __future__ import annotations

import functools

import pytest
import torch
from generate_cases import assert_same, model_call
from support import assert_same_bits

import fastgen
from fastgen import random
from fastgen.functional import lstm, lstm_cell, reparameterize, reparameterize_kl, scaled_dot_product_attention
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


def attend(x: torch.Tensor, generator: Generator, **options: object) -> torch.Tensor:
    return scaled_dot_product_attention(x, x, x, is_causal=True, dropout_p=0.5, generator=generator, **options)


def attend_to_ragged(x: torch.Tensor, generator: Generator) -> torch.Tensor:
    return attend(x[:1], generator, cu_seqlens_q=torch.tensor([0, 3, 40, x.shape[-2]]))


WEIGHTS = torch.randn(2, 256, 64, generator=torch.Generator().manual_seed(1)) / 8


@functools.cache
def weights_on(device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    return tuple(WEIGHTS.to(device, dtype))  # once, and not while a graph is captured


def recur(x: torch.Tensor, generator: Generator) -> torch.Tensor:
    weights = weights_on(x.device, x.dtype)
    zeros = torch.zeros(1, x.shape[1], 64, device=x.device, dtype=x.dtype)
    options = (False, 1, 0.0, True, False, True)
    return lstm(x[0], (zeros, zeros), weights, *options, generator=generator, zoneout=(0.3, 0.0))[0]


def recur_once(x: torch.Tensor, generator: Generator) -> torch.Tensor:
    noisy = reparameterize(x[0, 0, :16], x[0, 1, :16], generator=generator)
    return lstm_cell(noisy, (noisy, noisy), *weights_on(x.device, x.dtype))[0]


# Functions of a tensor (2, 4, 96, 64) that draw from the stream.
CALLS = [
    pytest.param(lambda x, generator: reparameterize(x, x, generator=generator), id="reparameterize"),
    pytest.param(attend, id="attention"),
    pytest.param(attend_to_ragged, id="ragged-attention"),
    pytest.param(recur, id="lstm"),
    pytest.param(recur_once, id="lstm-cell"),
]


def operand(dtype: torch.dtype, device: str = "cuda") -> torch.Tensor:
    return torch.randn(2, 4, 96, 64, generator=torch.Generator().manual_seed(0)).to(device, dtype)


@pytest.mark.parametrize("call", CALLS)
def test_on_a_stream_of_its_own(call):
    """The kernels wait for what their stream did before, and for nothing else."""
    stream, x = torch.cuda.Stream(), operand(torch.bfloat16)
    want = call(x, Generator(7, device="cuda"))
    late = torch.full_like(x, torch.nan)
    generator = Generator(7, device="cuda")  # which waits for its state to arrive
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late.copy_(x)
        got = call(late, generator)
    stream.synchronize()
    assert_same_bits(got, want)


@pytest.mark.parametrize("call", CALLS)
def test_a_graph_draws_fresh_numbers_at_each_replay(call):
    """Forward and backward, captured once: each replay gives what a call there would have given."""
    x = operand(torch.bfloat16).requires_grad_()

    def step(generator: Generator) -> tuple[torch.Tensor, torch.Tensor]:
        out = call(x, generator)
        return out.detach(), torch.autograd.grad(out, x, torch.ones_like(out))[0]

    eager, captured = Generator(5, device="cuda"), Generator(5, device="cuda")
    want = [step(eager) for _ in range(4)]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(captured)  # the first call, which allocates
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step(captured)
    for expected in want[1:]:
        graph.replay()
        for got, exact in zip(results, expected, strict=True):
            assert_same_bits(got, exact)
    assert not torch.equal(want[1][0], want[2][0])


@pytest.mark.parametrize("vocabulary", [23, 5000])
def test_a_graph_holds_a_whole_generation(vocabulary):
    """Nothing is asked of the device while it is captured, and a replay goes on from where the rows stand."""
    start = model_call(n=5, vocabulary=vocabulary, top_p=0.9, repetition_penalty=1.1, steps=6).to(torch.Tensor.cuda)
    want = start.copy().run()
    captured = start.copy()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        start.copy().run()  # the first call, which allocates
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.run()
    for _ in range(2):
        graph.replay()
        assert_same(captured, want)
        want.run()


@pytest.mark.skipif(
    len({torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}) != 1
    or torch.cuda.device_count() < 2,
    reason="needs two GPUs of one kind",
)
@pytest.mark.parametrize("call", CALLS)
def test_the_device_of_the_operands(call):
    x = operand(torch.bfloat16, "cuda:1")
    got = call(x, Generator(7, device="cuda:1"))
    assert got.device == x.device
    assert torch.cuda.current_device() == 0
    assert_same_bits(got.cpu(), call(x.to("cuda:0"), Generator(7, device="cuda:0")).cpu())
