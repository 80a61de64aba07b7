"""The recurrent sequences of the CUDA kernels: values and gradients against double precision.

On the emulated device wherever the tests run, and on a GPU where one is.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import hypothesis
import pytest
import torch
from emulated import EMULATED
from hypothesis import strategies as st
from recurrent_cases import EXAMPLES, WHOLE_ROWS, on
from support import assert_same_bits
from torch import Tensor

import fastgen
from fastgen import random, reference
from fastgen.random import Generator
from fastgen.reference.recurrent import Mode

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FLOATS = (*DTYPES, torch.float64)
EPS = 1e-5
# A result's own rounding and that of what is kept for the backward pass, which both sides pay. Half types: h, and the
# product with the input, are rounded before they meet the weights.
ATOL = {torch.float32: 2e-6, torch.bfloat16: 1.6e-2, torch.float16: 2e-3, torch.float64: 1e-14}
NAMES = (
    *("output", "h_n", "c_n", "gates", "cells", "grad_input", "grad_w_ih", "grad_w_hh", "grad_b_ih", "grad_b_hh"),
    *("grad_w_hr", "grad_h_0", "grad_c_0", "grad_norm_ih", "grad_norm_hh", "grad_norm_c", "grad_norm_c_bias"),
)


@dataclass(frozen=True)
class Call:
    """A call of the op, its operands a function of `seed` in numbers that every dtype holds."""

    mode: Mode = Mode.LSTM
    hidden: int = 19
    inputs: int = 5
    lengths: tuple[int, ...] = (3, 3, 3)  # of the rows, falling; packed if they differ
    outputs: int | None = None
    bias: bool = True
    masked: bool = False
    batch_first: bool = False
    reverse: bool = False
    norm: bool = False
    zoneout: tuple[float, float] = (0.0, 0.0)
    drawn: bool = False
    seed: int = 0

    def __str__(self) -> str:
        others = (f for f in fields(self) if f.name != "mode" and getattr(self, f.name) != f.default)
        return "-".join([self.mode.name, *(f"{f.name}={getattr(self, f.name)}" for f in others)])

    def operands(self) -> tuple[tuple[Tensor | None, ...], tuple[object, ...]]:
        """Those from `input` to `h_mask`, and those from `norm_ih` on."""
        g = Generator(self.seed)

        def normal(*shape: int, std: float = 1.0, mean: float = 0.0) -> Tensor:
            return random.normal(*shape, mean=mean, std=std, generator=g).bfloat16().double()

        batch, steps, packed = len(self.lengths), self.lengths[0], len(set(self.lengths)) > 1
        leading = (sum(self.lengths),) if packed else (batch, steps) if self.batch_first else (steps, batch)
        rows, state = self.mode.gates * self.hidden, self.outputs or self.hidden
        first = (
            normal(*leading, self.inputs),
            torch.tensor([sum(n > t for n in self.lengths) for t in range(steps)]) if packed else None,
            normal(rows, self.inputs, std=max(self.inputs, 1) ** -0.5),
            normal(rows, state, std=state**-0.5),
            normal(rows) if self.bias else None,
            normal(rows) if self.bias else None,
            normal(self.outputs, self.hidden, std=self.hidden**-0.5) if self.outputs else None,
            normal(batch, state),
            normal(batch, self.hidden) if self.mode == Mode.LSTM else None,
            (normal(batch, state) > -0.5).double() * 1.5 if self.masked else None,
        )
        wide = ((rows, 1), (rows, 1), (self.hidden, 1), (self.hidden, 0))
        norm = [normal(n, mean=m, std=0.5) if self.norm else None for n, m in wide]
        seed_offset = torch.tensor([self.seed, 5]) if self.drawn else None
        return first, (*norm, seed_offset, EPS, *self.zoneout)


def put(gpu, dtype, values):
    """Floating-point tensors in the dtype on the device; batch_sizes stay where they are."""

    def one(x: object) -> object:
        if not isinstance(x, Tensor):
            return x
        return gpu.put(x.to(dtype)) if x.is_floating_point() else gpu.put(x) if x.shape == (2,) else x

    return [one(x) for x in values]


def in_dtype(dtype):
    return lambda values: [x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for x in values]


def forward(ops, call: Call, move) -> tuple[Tensor, ...]:
    first, options = call.operands()
    moved = move(first)
    moved[1] = first[1]
    return ops.recurrent(call.mode, *moved, call.batch_first, call.reverse, True, *move(options))


def gradients(call: Call, results) -> list[Tensor | None]:
    """Of output, h_n and c_n, in every second seed without one of them."""
    g = Generator(call.seed + 1)
    drawn = [random.normal(*x.shape, generator=g).bfloat16().double() if x.numel() else None for x in results[:3]]
    if call.seed % 4 < 2:
        drawn[call.seed % 4] = None
    return drawn


def backward(ops, call: Call, move, results, needs: int = 4095) -> tuple[Tensor, ...]:
    """From what the forward pass gave in double precision: a unit at the kink of a ReLU stays on its side."""
    first, options = call.operands()
    moved = move(first)
    moved[1] = first[1]
    output, gates, cells = move((results[0], *results[3:]))
    cells = cells.to(torch.float64 if output.dtype == torch.float64 else torch.float32)
    if cells.numel():
        cells.copy_(results[4])
    grads = move(gradients(call, results))
    flags = call.batch_first, call.reverse, needs
    return ops.recurrent_backward(call.mode, *grads, *moved, output, gates, cells, *flags, *move(options))


def check(gpu, call: Call, dtype: torch.dtype) -> None:
    def device(values):
        return put(gpu, dtype, values)

    exact = forward(reference, call, in_dtype(torch.float64))
    ours = (*forward(gpu.ops, call, device), *backward(gpu.ops, call, device, exact))
    theirs = (*forward(reference, call, in_dtype(dtype)), *backward(reference, call, in_dtype(dtype), exact))
    exact = (*exact, *backward(reference, call, in_dtype(torch.float64), exact))
    for name, got, other, want in zip(NAMES, ours, theirs, exact, strict=True):
        assert got.shape == want.shape, name
        assert got.dtype == other.dtype, name
        if got.numel() == 0:
            continue
        scale = max(1.0, want.abs().max().item())
        error, allowed = ((x.cpu().double() - want).abs().max().item() for x in (got, other))
        # The gradients of the gates are rounded before they are summed, over rows or, for these two, over gates.
        terms = call.mode.gates * call.hidden if name in ("grad_input", "grad_h_0") else sum(call.lengths)
        assert error <= 2 * allowed + ATOL[dtype] * scale * max(1, terms) ** 0.5, (name, error, allowed)


CALLS = [
    *(Call(mode) for mode in Mode),
    *(Call(mode, lengths=(4, 2, 2, 1), hidden=8) for mode in Mode),
    *(Call(mode, lengths=(4, 2, 2, 1), reverse=True, masked=True, bias=False, seed=1) for mode in Mode),
    *(Call(mode, batch_first=True, reverse=True, inputs=0, hidden=1, seed=2) for mode in Mode),
    *(Call(mode, lengths=(2,) * 18, hidden=33, masked=True, seed=3) for mode in Mode),
    Call(lengths=(1,)),
    Call(norm=True),
    Call(norm=True, lengths=(4, 2, 2, 1), hidden=8, masked=True, reverse=True, seed=1),
    Call(norm=True, lengths=(2,) * 18, hidden=33, bias=False, seed=2),
    Call(outputs=7),
    Call(outputs=40, lengths=(4, 2, 2, 1), masked=True, reverse=True, seed=1),
    Call(outputs=9, lengths=(2,) * 18, norm=True, batch_first=True, seed=2),
    *(Call(mode, zoneout=(0.3 * (mode == Mode.LSTM), 0.2), lengths=(4, 2, 2, 1), seed=3) for mode in Mode),
    *(Call(mode, zoneout=(0.3 * (mode == Mode.LSTM), 0.2), drawn=True, batch_first=True, seed=3) for mode in Mode),
    Call(norm=True, outputs=7, zoneout=(0.4, 0.0), drawn=True, lengths=(4, 2, 2, 1), seed=2),
    Call(norm=True, zoneout=(0.4, 1.0), lengths=(4, 2, 2, 1), reverse=True),
    Call(hidden=70, lengths=(2,) * 9),
    Call(Mode.GRU, hidden=70, lengths=(3,) * 12 + (1,) * 9, reverse=True),
]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("call", CALLS, ids=str)
def test_values(gpu, call, dtype):
    check(gpu, call, dtype)


@st.composite
def calls(draw: st.DrawFn) -> Call:
    mode = draw(st.sampled_from(Mode))
    lstm = mode == Mode.LSTM
    lengths = sorted(draw(st.lists(st.integers(1, 4), min_size=1, max_size=20)), reverse=True)
    share = st.sampled_from([0.0, 0.0, 0.3, 1.0])
    norm = lstm and draw(st.booleans())
    # The norm of a few nearly equal cells magnifies any rounding of what they were made from.
    sizes = [n for n in (1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 65) if n > 8 or not norm]
    return Call(
        mode=mode,
        hidden=draw(st.sampled_from(sizes)),
        inputs=draw(st.sampled_from([1, 3, 8])),
        lengths=tuple(lengths) if draw(st.booleans()) else (lengths[0],) * len(lengths),
        outputs=draw(st.sampled_from([None, None, 1, 8, 33])) if lstm else None,
        bias=draw(st.booleans()),
        masked=draw(st.booleans()),
        batch_first=draw(st.booleans()),
        reverse=draw(st.booleans()),
        norm=norm,
        zoneout=(draw(share) if lstm else 0.0, draw(share)),
        drawn=draw(st.booleans()),
        seed=draw(st.integers(0, 99)),
    )


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@hypothesis.settings(max_examples=25, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(call=calls())
def test_any_call(gpu, dtype, call):
    check(gpu, call, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", Mode)
def test_weights_that_do_not_fit_on_the_chip(emulated, mode, dtype):
    """The products read them from L2, with other rings; so does one of two matrices where only the other one fits."""
    with emulated.of_size(1, 99 * 1024) as gpu:  # the smallest that a GPU of compute capability 8 has
        check(gpu, Call(mode, hidden=70 if mode == Mode.LSTM else 150, lengths=(2,) * 9), dtype)
        if mode == Mode.LSTM:
            check(gpu, Call(hidden=150, outputs=9, norm=True, lengths=(2, 2, 1)), dtype)


@pytest.mark.parametrize(
    "call",
    [
        Call(lengths=(2,) * 34, hidden=20),
        Call(Mode.GRU, lengths=(2,) * 18 + (1,) * 3, hidden=40),
        Call(norm=True, outputs=24, zoneout=(0.5, 0.5), drawn=True, lengths=(2,) * 18),
    ],
    ids=str,
)
def test_how_many_blocks_share_the_work_changes_no_bit(emulated, call):
    device = in_dtype(torch.float32)
    exact = forward(reference, call, in_dtype(torch.float64))
    results = []
    for multiprocessors in (1, 2, 3, 11):
        with emulated.of_size(multiprocessors) as gpu:
            results.append((*forward(gpu.ops, call, device), *backward(gpu.ops, call, device, exact)))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert_same_bits(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "call",
    [
        Call(hidden=64),
        Call(hidden=70, lengths=(3,) * 9 + (2, 1), masked=True, seed=2),
        Call(hidden=150, lengths=(2,) * 18, seed=3),
        Call(Mode.GRU, hidden=100, lengths=(2,) * 40 + (1,), reverse=True),
        Call(norm=True, hidden=70, outputs=66, zoneout=(0.2, 0.3), lengths=(2,) * 18),
    ],
    ids=str,
)
def test_clusters(emulated, call, dtype):
    """From compute capability 9.0 on blocks share what the backward pass reads; that changes no bit."""
    device = in_dtype(dtype)
    exact = forward(reference, call, in_dtype(torch.float64))
    with emulated.of_size(16) as gpu:
        alone = backward(gpu.ops, call, device, exact)
    before = emulated.clustered
    with emulated.of_size(16, capability=90) as gpu:
        check(gpu, call, dtype)
        shared = backward(gpu.ops, call, device, exact)
    assert emulated.clustered == before + 2
    for got, want in zip(shared, alone, strict=True):
        assert_same_bits(got, want)


def test_more_steps_than_travel_in_one_launch(gpu):
    lengths = (301,) * 2
    check(gpu, Call(Mode.RNN_TANH, hidden=3, inputs=1, lengths=(*lengths, 5), bias=False), torch.float32)


@pytest.mark.parametrize("call", [Call(lengths=(3, 1)), Call(Mode.GRU), Call(norm=True, outputs=4)], ids=str)
def test_only_what_is_needed(gpu, call):
    def device(values):
        return put(gpu, torch.float32, values)

    exact = forward(reference, call, in_dtype(torch.float64))
    every = backward(gpu.ops, call, device, exact)
    for bit, want in enumerate(every):
        alone = backward(gpu.ops, call, device, exact, 1 << bit)
        for i, got in enumerate(alone):
            assert_same_bits(got, want if i == bit else want.new_empty(0))


def test_nothing_is_saved_unless_asked_for(gpu):
    for call in (Call(), Call(Mode.GRU), Call(Mode.RNN_TANH, zoneout=(0.0, 0.5)), Call(norm=True)):
        first, options = (put(gpu, torch.float32, values) for values in call.operands())
        saving, plain = (gpu.ops.recurrent(call.mode, *first, False, False, save, *options) for save in (True, False))
        for a, b in zip(saving[:3], plain[:3], strict=True):
            assert_same_bits(a, b)
        assert [x.shape for x in plain[3:]] == [(0,), (0,)]


@pytest.mark.parametrize("mode", Mode)
def test_strides(gpu, mode):
    """Operands that are not contiguous give the bits of their copies."""
    call = Call(mode, hidden=9, norm=mode == Mode.LSTM)

    def device(values):
        return put(gpu, torch.float32, values)

    def strided(values):
        def one(x):
            return x.repeat_interleave(2, -1)[..., ::2] if isinstance(x, Tensor) and x.is_floating_point() else x

        return [one(x) for x in device(values)]

    exact = forward(reference, call, in_dtype(torch.float64))
    for a, b in zip(forward(gpu.ops, call, device), forward(gpu.ops, call, strided), strict=True):
        assert_same_bits(a, b)
    pair = (backward(gpu.ops, call, move, exact) for move in (device, strided))
    for a, b in zip(*pair, strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", Mode)
def test_what_is_not_finite_stays_in_its_row(gpu, mode, dtype):
    call = Call(mode, hidden=11)
    first, options = (put(gpu, dtype, values) for values in call.operands())
    clean = gpu.ops.recurrent(mode, *first, False, False, False, *options)[0]
    first[0][1, 1, 2] = float("nan")
    spoilt = gpu.ops.recurrent(mode, *first, False, False, False, *options)[0]
    assert_same_bits(spoilt[:, ::2], clean[:, ::2])
    assert_same_bits(spoilt[0], clean[0])
    assert spoilt[1:, 1].isnan().all()


def test_an_empty_batch(gpu):
    call = replace(Call(), lengths=())
    g = Generator(0)
    w_ih, w_hh = (gpu.put(random.normal(76, n, generator=g)) for n in (5, 19))
    x, state = gpu.put(torch.zeros(3, 0, 5)), gpu.put(torch.zeros(0, 19))
    operands = x, None, w_ih, w_hh, None, None, None, state, state, None
    results = gpu.ops.recurrent(call.mode, *operands, False, False, True)
    assert [x.shape for x in results] == [(3, 0, 19), (0, 19), (0, 19), (3, 0, 76), (3, 0, 19)]
    grads = gpu.ops.recurrent_backward(
        call.mode, results[0], None, None, *operands, results[0], *results[3:], False, False, 255
    )
    assert grads[1].shape == (76, 5)
    assert not grads[1].any()


@pytest.mark.parametrize("call", [Call(), Call(norm=True)], ids=str)
def test_double_precision_has_kernels_too(emulated, call):
    """A few for each step, both ways."""
    before = emulated.launches
    results = forward(EMULATED.ops, call, in_dtype(torch.float64))
    between = emulated.launches
    backward(EMULATED.ops, call, in_dtype(torch.float64), results)
    assert between - before >= 3
    assert emulated.launches - between >= 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", [*EXAMPLES, *WHOLE_ROWS], ids=str)
def test_functions_and_their_gradients(gpu, case, dtype):
    """Layers and directions around the op, in a graph: gradients of all leaves, and a second derivative."""

    def run(dtype, device):
        (x, hx), weights = case.operands(dtype), case.weights(dtype)
        hx = None if hx is None else tuple(device(h.detach()).requires_grad_() for h in hx)
        x, *weights = (device(t.detach()).requires_grad_() for t in (x, *weights))
        leaves = [x, *(hx or ()), *weights]
        results = case.ours(x, hx, weights)
        loss = sum((y * torch.linspace(-1, 1, y.numel()).to(y).view_as(y)).sum() for y in results)
        first = torch.autograd.grad(loss, leaves, retain_graph=True)
        grads = torch.autograd.grad(loss, leaves, create_graph=True)
        second = torch.autograd.grad(sum((g * g).sum() for g in grads), x)
        return [y.detach().cpu().double() for y in (*results, *first, *grads, *second)]

    if gpu.device.type == "cuda" and (case.masked or case.zoneout):
        pytest.skip("Case draws its mask and zoneout on the CPU")
    with on(gpu):
        ours = run(dtype, gpu.put)
    near = 1e-4 if dtype == torch.float32 else 1e-12
    for got, want in zip(ours, run(torch.float64, lambda t: t), strict=True):
        torch.testing.assert_close(got, want, rtol=near, atol=near * float(want.abs().max()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({2: torch.zeros(20, 3)}, "w_ih: expected the dtype of input and a shape"),
        ({8: None}, "c_0: expected for an LSTM"),
        ({10: torch.zeros(20)}, "norm_ih, norm_hh, norm_c, norm_c_bias: expected all or none"),
        ({10: torch.zeros(20), 11: torch.zeros(20), 12: torch.zeros(5), 13: torch.zeros(4)}, "norm_c_bias: expected"),
        ({14: torch.zeros(2, dtype=torch.int32)}, "seed_offset: expected an int64 tensor"),
        ({17: 1.5}, "zoneout_c, zoneout_h: expected probabilities"),
    ],
)  # fmt: skip
def test_errors(gpu, change, message):
    arguments = [torch.zeros(3, 2, 4), None, torch.zeros(20, 4), torch.zeros(20, 5), None, None, None]
    arguments += [torch.zeros(2, 5), torch.zeros(2, 5), None, None, None, None, None, None, 0.0, 0.0, 0.0]
    for i, value in change.items():
        arguments[i] = value
    arguments = [gpu.put(x) if isinstance(x, Tensor) else x for x in arguments]
    with pytest.raises(RuntimeError, match=message):
        gpu.ops.recurrent(Mode.LSTM, *arguments[:10], False, False, False, *arguments[10:])


@pytest.mark.cuda
def test_a_graph_can_be_captured_and_replayed():
    if not (fastgen.build_info()["cuda"] and torch.cuda.is_available()):
        pytest.skip(f"no CUDA kernels: {fastgen.build_info()['cuda_error'] or 'no device'}")
    call = Call(lengths=(4, 2, 2, 1), hidden=70)
    first, options = call.operands()
    sizes = first[1]
    moved = [x if x is None else x.float().cuda() for x in first]
    moved[1] = sizes

    def run():
        return torch.ops.fastgen.recurrent(call.mode, *moved, False, False, True, *options)

    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    run()
    with torch.cuda.graph(graph):
        results = run()
    moved[0].copy_(torch.randn_like(moved[0]))
    graph.replay()
    for got, want in zip(results, run(), strict=True):
        assert_same_bits(got.cpu(), want.cpu())
