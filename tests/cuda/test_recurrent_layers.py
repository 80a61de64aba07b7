"""Recurrent layers that run at once: values against double precision, bits against the layers one by one."""

from __future__ import annotations

from dataclasses import dataclass, fields
from types import SimpleNamespace
from unittest import mock

import hypothesis
import pytest
import torch
from emulated import EMULATED, Emulated, Gpu
from hypothesis import strategies as st
from recurrent_cases import Case, on
from support import assert_same_bits
from torch import Tensor

import fastgen
from fastgen import random, reference
from fastgen._ops import recurrent as recurrent_ops
from fastgen.random import Generator
from fastgen.reference.recurrent import Mode, dropped

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# A result's own rounding, and those of h and of the first layer's product with the input.
ATOL = {torch.float32: 2e-6, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}
NAMES = ("output", "h_n", "c_n", "below", "passed", "gates", "cells")


@dataclass(frozen=True)
class Stack:
    """A call of the op, its operands a function of `seed` in numbers that every dtype holds."""

    mode: Mode = Mode.LSTM
    layers: int = 2
    hidden: int = 19
    inputs: int = 5
    lengths: tuple[int, ...] = (4, 4, 4)  # of the rows, falling; packed if they differ
    bias: bool = True
    masked: bool = False
    batch_first: bool = False
    dropout: float = 0.0
    seed: int = 0

    def __str__(self) -> str:
        others = (f for f in fields(self) if f.name != "mode" and getattr(self, f.name) != f.default)
        return "-".join([self.mode.name, *(f"{f.name}={getattr(self, f.name)}" for f in others)])

    def arguments(self, dtype: torch.dtype, gpu: Gpu | None = None, save: bool = True) -> tuple[object, ...]:
        g = Generator(self.seed)

        def normal(*shape: int, std: float = 1.0) -> Tensor:
            drawn = random.normal(*shape, std=std, generator=g).bfloat16().to(dtype)
            return drawn if gpu is None else gpu.put(drawn)

        batch, steps, packed = len(self.lengths), self.lengths[0], len(set(self.lengths)) > 1
        leading = (sum(self.lengths),) if packed else (batch, steps) if self.batch_first else (steps, batch)
        sizes = torch.tensor([sum(n > t for n in self.lengths) for t in range(steps)]) if packed else None
        rows, hidden = self.mode.gates * self.hidden, self.hidden
        x, weights = normal(*leading, self.inputs), []
        for layer in range(self.layers):
            width = hidden if layer else self.inputs
            weights += [normal(rows, width, std=width**-0.5), normal(rows, hidden, std=hidden**-0.5)]
            weights += [normal(rows), normal(rows)] if self.bias else []
        h_0 = normal(self.layers, batch, hidden)
        c_0 = normal(self.layers, batch, hidden) if self.mode == Mode.LSTM else None
        mask = normal(self.layers, batch, hidden) if self.masked else None
        draws = None
        if self.dropout:
            starts = 3 + 1000 * torch.arange(self.layers - 1)
            draws = torch.stack((torch.full_like(starts, self.seed), starts), -1)
            draws = draws if gpu is None else gpu.put(draws)
        return int(self.mode), x, sizes, weights, h_0, c_0, mask, self.batch_first, save, draws, self.dropout


def run(gpu: Gpu, stack: Stack, dtype: torch.dtype, save: bool = True) -> tuple[Tensor, ...]:
    return gpu.ops.recurrent_layers(*stack.arguments(dtype, gpu, save))


def one_by_one(gpu: Gpu, stack: Stack, dtype: torch.dtype) -> list[tuple[Tensor, ...]]:
    """(output, h_n, c_n, gates, cells, what the next layer is fed) of each layer by `recurrent`."""
    mode, x, sizes, weights, h_0, c_0, mask, batch_first, save, draws, p = stack.arguments(dtype, gpu)
    each, results = len(weights) // stack.layers, []
    for layer in range(stack.layers):
        w_ih, w_hh, b_ih, b_hh = (*weights[layer * each : (layer + 1) * each], None, None)[:4]
        h, c, m = (None if of is None else of[layer] for of in (h_0, c_0, mask))
        found = gpu.ops.recurrent(mode, x, sizes, w_ih, w_hh, b_ih, b_hh, None, h, c, m, batch_first, False, save)
        x = found[0]
        if draws is not None and layer < stack.layers - 1:
            x = dropped(x, torch.ops.fastgen.bernoulli(draws[layer], x.shape, torch.bool, 1 - p), p)
        results.append((*found, x))
    return results


def check(gpu: Gpu, stack: Stack, dtype: torch.dtype) -> None:
    ours = run(gpu, stack, dtype)
    exact = reference.recurrent_layers(*stack.arguments(torch.float64))
    theirs = reference.recurrent_layers(*stack.arguments(dtype))
    for name, got, other, want in zip(NAMES, ours, theirs, exact, strict=True):
        assert got.shape == want.shape, name
        assert got.dtype == other.dtype, name
        if got.numel():
            error, allowed = ((y.cpu().double() - want).abs().max().item() for y in (got, other))
            scale = max(1.0, want.abs().max().item())
            assert error <= 2 * allowed + ATOL[dtype] * scale, (name, error, allowed)


STACKS = [
    *(Stack(mode) for mode in Mode),
    *(Stack(mode, layers=3, lengths=(5, 3, 3, 1), masked=True, seed=1) for mode in Mode),
    *(Stack(mode, layers=4, bias=False, batch_first=True, hidden=8, seed=2) for mode in Mode),
    *(Stack(mode, dropout=0.4, lengths=(3,) * 18, hidden=33, seed=3) for mode in Mode),
    Stack(layers=6, dropout=0.2, lengths=(4, 4, 2), hidden=9),
    Stack(layers=1, lengths=(3, 2)),
    Stack(layers=3, lengths=(1,), hidden=1, inputs=1),
    Stack(layers=3, dropout=1.0),
    Stack(hidden=70, lengths=(2,) * 9, inputs=70),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stack", STACKS, ids=str)
def test_values(gpu, stack, dtype):
    check(gpu, stack, dtype)


@st.composite
def stacks(draw: st.DrawFn) -> Stack:
    lengths = sorted(draw(st.lists(st.integers(1, 5), min_size=1, max_size=20)), reverse=True)
    return Stack(
        mode=draw(st.sampled_from(Mode)),
        layers=draw(st.integers(1, 5)),
        hidden=draw(st.sampled_from([1, 2, 7, 8, 9, 16, 17, 31, 32, 33, 65])),
        inputs=draw(st.sampled_from([1, 3, 8])),
        lengths=tuple(lengths) if draw(st.booleans()) else (lengths[0],) * len(lengths),
        bias=draw(st.booleans()),
        masked=draw(st.booleans()),
        batch_first=draw(st.booleans()),
        dropout=draw(st.sampled_from([0.0, 0.0, 0.3, 0.9])),
        seed=draw(st.integers(0, 99)),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@hypothesis.settings(max_examples=20, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(stack=stacks())
def test_any_stack(gpu, dtype, stack):
    check(gpu, stack, dtype)


def launches(emulated: Emulated, stack: Stack) -> int:
    before = emulated.launches
    run(EMULATED, stack, torch.float32)
    return emulated.launches - before


def test_how_many_launches(emulated):
    """One packs the matrix of each layer; as many layers as fit beside each other are one more, at most four."""
    for multiprocessors, layers, want in ((1, 4, 4), (2, 4, 2), (3, 4, 2), (4, 4, 1), (16, 4, 1), (16, 6, 2)):
        with emulated.of_size(multiprocessors, 99 * 1024):
            assert launches(emulated, Stack(layers=layers, hidden=24)) == layers + want, multiprocessors
    # Many rows are worth more than the barriers that layers at once would save.
    with emulated.of_size(4):
        assert launches(emulated, Stack(hidden=256, lengths=(1,) * 64)) == 4
        assert launches(emulated, Stack(hidden=64, lengths=(1,) * 16)) == 3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize("kind", [{"masked": True, "lengths": (3, 3, 1)}, {"dropout": 0.4, "layers": 3}], ids=str)
def test_where_no_layers_fit_beside_each_other_they_are_those_of_their_own_op(emulated, mode, kind, dtype):
    stack = Stack(mode, hidden=65, **kind)
    with emulated.of_size(1, 84 * 1024):
        output, h_n, c_n, below, passed, gates, cells = run(EMULATED, stack, dtype)
        each = one_by_one(EMULATED, stack, dtype)
    for layer, (y, h, c, own_gates, own_cells, fed) in enumerate(each):
        last = layer == stack.layers - 1
        pairs = [(output if last else below[layer], y), (h_n[layer], h)]
        pairs += [(x[layer], own) for x, own in ((c_n, c), (gates, own_gates), (cells, own_cells)) if own.numel()]
        pairs += [(passed[layer], fed)] if stack.dropout and not last else []
        for got, want in pairs:
            assert_same_bits(got, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", Mode)
def test_bits(emulated, mode, dtype):
    """Those of the first layer are its own op's, and none depends on how many blocks share the work."""
    stack = Stack(mode, layers=3, hidden=20, lengths=(3,) * 18 + (2,) * 16, dropout=0.3)
    results = []
    for multiprocessors in (3, 5, 9, 20):
        with emulated.of_size(multiprocessors):
            results.append(run(EMULATED, stack, dtype))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert_same_bits(a, b)
    y, h, c, gates, cells, fed = one_by_one(EMULATED, stack, dtype)[0]
    _, h_n, c_n, below, passed, all_gates, all_cells = results[0]
    pairs = ((below, y), (h_n, h), (c_n, c), (passed, fed), (all_gates, gates), (all_cells, cells))
    for got, want in pairs:
        if want.numel():
            assert_same_bits(got[0], want)


def test_nothing_is_saved_unless_asked_for(gpu):
    for mode in Mode:
        stack = Stack(mode, dropout=0.5)
        saving, plain = (run(gpu, stack, torch.float32, save) for save in (True, False))
        for a, b in zip(saving[:3], plain[:3], strict=True):
            assert_same_bits(a, b)
        assert [x.shape for x in plain[3:]] == [(0,)] * 4


def test_what_is_not_finite_stays_in_its_row(gpu):
    stack = Stack(layers=3, hidden=11)
    arguments = stack.arguments(torch.float32, gpu, False)
    clean = gpu.ops.recurrent_layers(*arguments)[0]
    arguments[1][1, 1, 2] = float("nan")
    spoilt = gpu.ops.recurrent_layers(*arguments)[0]
    assert_same_bits(spoilt[:, ::2], clean[:, ::2])
    assert_same_bits(spoilt[0], clean[0])
    assert spoilt[1:, 1].isnan().all()


def test_an_empty_batch(gpu):
    _, _, _, weights, *_ = Stack().arguments(torch.float32, gpu)
    x, state = gpu.put(torch.zeros(3, 0, 5)), gpu.put(torch.zeros(2, 0, 19))
    results = gpu.ops.recurrent_layers(Mode.LSTM, x, None, weights, state, state, None, False, True)
    shapes = [(3, 0, 19), (2, 0, 19), (2, 0, 19), (1, 3, 0, 19), (0,), (2, 3, 0, 76), (2, 3, 0, 19)]
    assert [x.shape for x in results] == shapes


def test_double_precision_goes_to_the_reference(emulated):
    arguments = Stack(dropout=0.5).arguments(torch.float64)
    before = emulated.launches
    for a, b in zip(EMULATED.ops.recurrent_layers(*arguments), reference.recurrent_layers(*arguments), strict=True):
        assert_same_bits(a, b)
    assert emulated.launches == before


@pytest.mark.parametrize(
    ("shape", "dtype", "expected"),
    [((3, 2, 5), torch.float32, True), ((1, 2, 5), torch.float32, False), ((3, 2, 5), torch.float64, False)],
    ids=str,
)
def test_which_stacks_run_at_once(shape, dtype, expected):
    on_device = SimpleNamespace(is_cuda=True, shape=shape, dtype=dtype)
    assert recurrent_ops.at_once(on_device, None, False) is expected
    assert not recurrent_ops.at_once(torch.zeros(shape, dtype=dtype), None, False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({3: [torch.zeros(76, 5)] * 3}, "weights: expected 2 or 4 tensors for each of 2 layers, got 3"),
        ({3: [torch.zeros(76, 5), torch.zeros(76, 19)] * 2}, "w_ih: expected the dtype of input and a shape"),
        ({4: torch.zeros(3, 19)}, "h_0: expected 3 dimensions"),
        ({5: torch.zeros(1, 3, 19)}, "c_0, h_mask: expected 2 layers"),
        ({5: None}, "c_0: expected for an LSTM"),
        ({10: 0.5}, "dropout: expected a probability, above 0 with a seed_offset"),
        ({9: torch.zeros(2, 2, dtype=torch.int64), 10: 0.5}, "seed_offset: expected a row for each layer but the last"),
        ({9: torch.zeros(1, 2), 10: 0.5}, "seed_offset: expected an int64 tensor"),
    ],
)
def test_errors(gpu, change, message):
    arguments = list(Stack().arguments(torch.float32, gpu))
    for i, value in change.items():
        values = value if isinstance(value, list) else [value]
        put = [gpu.put(x) if isinstance(x, Tensor) else x for x in values]
        arguments[i] = put if isinstance(value, list) else put[0]
    with pytest.raises(RuntimeError, match=message):
        gpu.ops.recurrent_layers(*arguments)


@pytest.mark.cuda
def test_a_graph_can_be_captured_and_replayed():
    if not (fastgen.build_info()["cuda"] and torch.cuda.is_available()):
        pytest.skip(f"no CUDA kernels: {fastgen.build_info()['cuda_error'] or 'no device'}")
    gpu = Gpu(torch.device("cuda", torch.cuda.current_device()), torch.ops.fastgen)
    arguments = Stack(layers=3, hidden=70, lengths=(4, 2, 2, 1), dropout=0.3).arguments(torch.float32, gpu)
    gpu.ops.recurrent_layers(*arguments)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = gpu.ops.recurrent_layers(*arguments)
    arguments[1].copy_(torch.randn_like(arguments[1]))
    arguments[9][:, 1] += 99
    graph.replay()
    for got, want in zip(results, gpu.ops.recurrent_layers(*arguments), strict=True):
        assert_same_bits(got.cpu(), want.cpu())


CASES = [
    *(Case(mode, num_layers=2, lengths=(4, 4, 4)) for mode in Mode),
    *(Case(mode, num_layers=3, packed=True, lengths=(4, 2, 1), masked=True, bias=False) for mode in Mode),
    Case(num_layers=2, batch_first=True, states=False),
]


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_functions_and_their_gradients(gpu, case, dropout):
    """In a graph: gradients of all leaves, and a second derivative, against double precision layer by layer."""
    if gpu.device.type == "cuda" and case.masked:
        pytest.skip("Case draws its mask on the CPU")

    def run(dtype, device):
        (x, hx), weights = case.operands(dtype), case.weights(dtype)
        hx = None if hx is None else tuple(device(h.detach()).requires_grad_() for h in hx)
        x, *weights = (device(t.detach()).requires_grad_() for t in (x, *weights))
        leaves = [x, *(hx or ()), *weights]
        results = case.ours(x, hx, weights, dropout=dropout, generator=Generator(3))
        loss = sum((y * torch.linspace(-1, 1, y.numel()).to(y).view_as(y)).sum() for y in results)
        once = torch.autograd.grad(loss, leaves, retain_graph=True)
        grads = torch.autograd.grad(loss, leaves, create_graph=True)
        second = torch.autograd.grad(sum((g * g).sum() for g in grads), x)
        return [y.detach().cpu().double() for y in (*results, *grads, *once, *second)]

    want = run(torch.float64, lambda t: t)
    with on(gpu), mock.patch.object(recurrent_ops, "at_once", return_value=True):
        ours = run(torch.float32, gpu.put)
    for got, expected in zip(ours, want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
