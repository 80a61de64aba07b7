"""Single steps of the recurrent family and the linear map of rows by the CUDA kernels, against double precision.

On the emulated device wherever the tests run, and on a GPU where one is.
"""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from emulated import EMULATED, Gpu
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from recurrent_cases import CELLS, cell_operands, on
from support import assert_same_bits
from torch import Tensor

from fastgen import random, reference
from fastgen.random import Generator
from fastgen.reference.recurrent import Mode

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# A result's own rounding, which both sides pay; of many rows, where the products are rounded, theirs too.
ATOL = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}
# Around units of 8, and vectors and chunks of 16 and 64 bytes.
SIZES = st.sampled_from([1, 2, 7, 8, 9, 15, 16, 17, 24, 32, 33, 40, 64, 65])
ROWS = st.sampled_from([1, 2, 7, 8, 9, 15, 16, 17, 33, 64, 65])
EPS = 1e-5
some = settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])


def put(gpu: Gpu, values):
    return [gpu.put(x) if isinstance(x, Tensor) else x for x in values]


def double(values):
    return [x.double() if isinstance(x, Tensor) else x for x in values]


def backward_of(ops, args, grad_h, grad_c):
    """Arguments of `recurrent_cell_backward` after a step with `args`, with all gradients."""
    _, _, gates, cells = ops.recurrent_cell(*args, True)
    return args[0], grad_h, grad_c, *args[1:], gates, cells, 0b1111111


def check(ours, args, op, dtype: torch.dtype) -> None:
    """Each result against the reference in double precision, and against the reference in this dtype."""
    for got, other, want in zip(ours, op(*args), op(*double(args)), strict=True):
        assert (got.shape, got.dtype) == (want.shape, other.dtype)
        if got.numel() == 0:
            continue
        scale = max(1.0, want.abs().max().item())
        error, allowed = ((x.cpu().double() - want).abs().max().item() for x in (got, other))
        assert error <= 2 * allowed + ATOL[dtype] * scale


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", Mode)
@some
@given(batch=ROWS, inputs=SIZES, hidden=SIZES, bias=st.booleans(), seed=st.integers(0, 99))
def test_values(gpu, mode, dtype, batch, inputs, hidden, bias, seed):
    args = cell_operands(mode, batch, inputs, hidden, dtype, bias, seed)
    for save in (True, False):
        given = *args, save
        check(gpu.ops.recurrent_cell(*put(gpu, given)), given, reference.recurrent_cell, dtype)


def step_options(hidden: int, dtype: torch.dtype, norm: bool, zoneout: tuple[float, float], seed: int = 0):
    g = Generator(seed + 50)
    wide = ((4 * hidden, 1), (4 * hidden, 1), (hidden, 1), (hidden, 0))
    weights = [random.normal(n, mean=m, std=0.3, generator=g).to(dtype) if norm else None for n, m in wide]
    return *weights, EPS, *zoneout


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", Mode)
@some
@given(
    batch=ROWS,
    inputs=SIZES,
    hidden=SIZES.filter(lambda n: n > 8),  # the norm of a few nearly equal cells magnifies any rounding
    options=st.tuples(st.booleans(), st.booleans(), st.sampled_from([0.0, 0.3, 1.0]), st.sampled_from([0.0, 0.1])),
    seed=st.integers(0, 99),
)
def test_layer_norm_and_zoneout(gpu, mode, dtype, batch, inputs, hidden, options, seed):
    bias, norm, of_c, of_h = options
    lstm = mode == Mode.LSTM
    args = cell_operands(mode, batch, inputs, hidden, dtype, bias, seed)
    args = *args, *step_options(hidden, dtype, norm and lstm, (of_c if lstm else 0.0, of_h), seed)
    check(gpu.ops.recurrent_step(*put(gpu, args)), args, reference.recurrent_step, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", Mode)
@some
@given(
    batch=ROWS,
    inputs=SIZES,
    hidden=SIZES,
    bias=st.booleans(),
    seed=st.integers(0, 99),
    which=st.sampled_from(["h", "c", "both"]),
)
def test_backward(gpu, mode, dtype, batch, inputs, hidden, bias, seed, which):
    args = cell_operands(mode, batch, inputs, hidden, dtype, bias, seed)
    g = Generator(seed + 1)
    grad_h, grad_c = (random.normal(batch, hidden, generator=g).to(dtype) for _ in range(2))
    if which == "c" and mode == Mode.LSTM:
        grad_h = None
    if which == "h" or mode != Mode.LSTM:
        grad_c = None
    args = backward_of(reference, args, grad_h, grad_c)
    ours = gpu.ops.recurrent_cell_backward(*put(gpu, args))
    check(ours, args, reference.recurrent_cell_backward, dtype)


@pytest.mark.parametrize("mode", Mode)
def test_only_the_gradients_that_are_wanted(gpu, mode):
    args = put(gpu, cell_operands(mode, 5, 7, 9, torch.float32))
    *given, _ = backward_of(gpu.ops, args, args[2], None)
    every = gpu.ops.recurrent_cell_backward(*given, 0b1111111)
    for i, want in enumerate(every):
        for k, got in enumerate(gpu.ops.recurrent_cell_backward(*given, 1 << i)):
            if k == i:
                assert_same_bits(got, want)
            else:
                assert got.shape == (0,)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@some
@given(rows=ROWS, inputs=st.sampled_from([0, 1, 8, 33, 64, 301]), outputs=SIZES, bias=st.booleans())
def test_linear_rows(gpu, dtype, rows, inputs, outputs, bias):
    g = Generator(rows * 71 + inputs)
    shapes = (rows, inputs), (outputs, inputs), (outputs,)
    args = [random.normal(*shape, std=0.5, generator=g).to(dtype) for shape in shapes]
    args[2] = args[2] if bias else None
    ours = gpu.ops.linear_rows(*put(gpu, args))
    check([ours], args, lambda *a: [torch.nn.functional.linear(*a)], dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_does_not_depend_on_its_batch(gpu, dtype):
    """Bit for bit, in every batch size and wherever in it: what generation rests on."""
    for mode in Mode:
        mode, x, h, c, *weights = put(gpu, cell_operands(mode, 70, 37, 21, dtype))
        norm = put(gpu, step_options(21, dtype, mode == Mode.LSTM, (0.0, 0.1)))

        def step(rows, mode=mode, x=x, h=h, c=c, weights=weights, norm=norm):
            return gpu.ops.recurrent_step(mode, x[rows], h[rows], None if c is None else c[rows], *weights, *norm)

        whole = step(slice(None))
        for n in (1, 2, 8, 9, 16, 17, 33, 65):
            for part in (slice(n), slice(70 - n, 70)):
                for got, want in zip(step(part), whole, strict=True):
                    assert_same_bits(got, want[part] if want.dim() == 2 else want)
        cell = gpu.ops.recurrent_cell(mode, x[:64], h[:64], None if c is None else c[:64], *weights, True)
        alone = gpu.ops.recurrent_cell(mode, x[5:6], h[5:6], None if c is None else c[5:6], *weights, True)
        for got, want in zip(alone, cell, strict=True):
            assert_same_bits(got, want[5:6] if want.dim() == 2 else want)
    whole = gpu.ops.linear_rows(x, weights[0], None)
    for n in (1, 9, 17, 65):
        assert_same_bits(gpu.ops.linear_rows(x[70 - n :], weights[0], None), whole[70 - n :])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", Mode)
def test_layouts(gpu, mode, dtype):
    """Slices, transposes and broadcasts are read as what they are; rows that begin anywhere, element by element."""
    # 32 of both: rows of whole vectors, which the copies are not.
    args = put(gpu, cell_operands(mode, 7, 32, 32, dtype))
    norm = put(gpu, step_options(32, dtype, mode == Mode.LSTM, (0.0, 0.0)))

    def twisted(x: Tensor) -> list[Tensor]:
        if x.dim() == 1:
            return [torch.stack([x, x], 1)[:, 0]]
        shifted = torch.cat([x[:, :1], x], 1)[:, 1:]
        return [shifted, torch.cat([x, x], 1)[:, : x.shape[1]], x.t().contiguous().t()]

    want, of_step = gpu.ops.recurrent_cell(*args, True), gpu.ops.recurrent_step(*args, *norm)
    for i, value in enumerate(args):
        for other in twisted(value) if isinstance(value, Tensor) else []:
            assert not other.is_contiguous()
            changed = [other if k == i else a for k, a in enumerate(args)]
            for got, exact in zip(gpu.ops.recurrent_cell(*changed, True), want, strict=True):
                assert_same_bits(got, exact)
            for got, exact in zip(gpu.ops.recurrent_step(*changed, *norm), of_step, strict=True):
                assert_same_bits(got, exact)
    x, w, b = args[1], args[4], args[6]
    right = gpu.ops.linear_rows(x, w, b)
    for other in twisted(x):
        assert_same_bits(gpu.ops.linear_rows(other, w, b), right)
    grad = gpu.put(random.normal(7, 32, generator=Generator(5)).to(dtype))
    saved = backward_of(gpu.ops, args, grad, grad if mode == Mode.LSTM else None)
    plain = gpu.ops.recurrent_cell_backward(*saved)
    saved = [a.t().contiguous().t() if isinstance(a, Tensor) and a.dim() == 2 else a for a in saved]
    # The products are PyTorch's, which may sum in another order for another layout.
    near = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    for got, exact in zip(gpu.ops.recurrent_cell_backward(*saved), plain, strict=True):
        torch.testing.assert_close(got, exact, rtol=near, atol=near)


@pytest.mark.parametrize("batch", [3, 66])
@pytest.mark.parametrize("mode", Mode)
def test_not_finite(gpu, mode, batch):
    """NaN reaches the unit it belongs to and no other; infinities saturate."""
    mode, x, h, c, w_ih, w_hh, *biases = cell_operands(mode, batch, 6, 20, torch.float32)
    w_ih[3, 2] = float("nan")
    x[1, 0] = float("inf")
    w_ih[:, 0] = 1.0
    args = mode, x, h, c, w_ih, w_hh, *biases
    h_1 = gpu.ops.recurrent_cell(*put(gpu, args), False)[0].cpu()
    assert h_1[:, 3].isnan().all()
    torch.testing.assert_close(h_1, reference.recurrent_cell(*args, False)[0], equal_nan=True)


def test_empty(gpu):
    for mode in Mode:
        _, x, h, c, *weights = put(gpu, cell_operands(mode, 3, 4, 5, torch.float32))
        no_rows = mode, x[:0], h[:0], None if c is None else c[:0], *weights
        h_1, c_1, gates, cells = gpu.ops.recurrent_cell(*no_rows, True)
        assert h_1.shape == (0, 5)
        assert c_1.shape == cells.shape == ((0, 5) if mode == Mode.LSTM else (0,))
        assert gates.shape == ((0, 20) if mode in (Mode.LSTM, Mode.GRU) else (0, 5))
        back = gpu.ops.recurrent_cell_backward(*backward_of(gpu.ops, no_rows, h[:0], None))
        assert [g.shape for g in back] == [torch.Size([0]) if a is None else a.shape for a in no_rows[1:]]
        assert not any(g.any() for g in back)
        # No inputs: the step goes on from the state alone.
        none = gpu.ops.recurrent_cell(mode, x[:, :0], h, c, weights[0][:, :0], *weights[1:], False)
        zero = gpu.ops.recurrent_cell(mode, torch.zeros_like(x), h, c, *weights, False)
        torch.testing.assert_close(none[0], zero[0], rtol=0, atol=0)
    assert gpu.ops.linear_rows(x[:0], weights[0], None).shape == (0, 5)


def test_double_precision_goes_to_the_reference(emulated):
    gpu = EMULATED
    before = emulated.launches
    args = cell_operands(Mode.LSTM, 3, 4, 9, torch.float64)
    norm = step_options(9, torch.float64, True, (0.1, 0.2))
    backward = backward_of(gpu.ops, args, args[2], None)
    for name, given_to in (
        ("recurrent_cell", (*args, True)),
        ("recurrent_step", (*args, *norm)),
        ("recurrent_cell_backward", backward),
    ):
        ours, want = (getattr(ops, name)(*given_to) for ops in (gpu.ops, reference))
        for a, b in zip(ours, want, strict=True):
            assert_same_bits(a, b)
    assert_same_bits(gpu.ops.linear_rows(args[1], args[4], None), reference.linear_rows(args[1], args[4], None))
    assert emulated.launches == before
    gpu.ops.recurrent_cell(*cell_operands(Mode.LSTM, 3, 4, 9, torch.float32), False)
    assert emulated.launches > before


@pytest.mark.parametrize("batch", [2, 12, 67])
@pytest.mark.parametrize("mode", Mode)
def test_functions_and_their_gradients(gpu, mode, batch):
    """What `fastgen.functional` makes of the ops: gradients of all operands, and a second derivative."""

    def run(dtype, device):
        _, x, h, c, *weights = (
            device(t.to(dtype)).requires_grad_() if isinstance(t, Tensor) else t
            for t in cell_operands(mode, batch, 4, 9, torch.float64)
        )
        results = CELLS[mode][1](x, (h, c) if mode == Mode.LSTM else h, *weights)
        results = results if mode == Mode.LSTM else (results,)
        loss = sum((y * torch.linspace(-1, 1, y.numel()).to(y).view_as(y)).sum() for y in results)
        leaves = [t for t in (x, h, c, *weights) if t is not None]
        grads = torch.autograd.grad(loss, leaves, retain_graph=True)
        again = torch.autograd.grad(loss, leaves, create_graph=True)
        second = torch.autograd.grad(sum((g * g).sum() for g in again), x)
        return [y.detach().cpu().double() for y in (*results, *grads, *second)]

    with on(gpu):
        ours = run(torch.float32, gpu.put)
    for got, want in zip(ours, run(torch.float64, lambda t: t), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))


@pytest.mark.parametrize("norm", [False, True])
def test_the_layers_of_a_generation(gpu, norm):
    """`step_layers` on a few rows of the states, as `RNN.generate` calls it."""
    g = Generator(3)
    hidden, each = 24, 8 if norm else 4

    def run(dtype, device, ops):
        h, c = (device(random.normal(2, 5, hidden, generator=Generator(k)).to(dtype)) for k in (1, 2))
        first = cell_operands(Mode.LSTM, 5, 6, hidden, dtype)
        second = cell_operands(Mode.LSTM, 5, hidden, hidden, dtype, seed=1)
        wide = step_options(hidden, dtype, norm, (0.0, 0.0))[: each - 4]
        weights = [device(t) for layer in (first, second) for t in (*layer[4:], *wide)]
        x = device(random.normal(3, 6, generator=g).to(dtype))
        rows = device(torch.tensor([0, 3, 4]))
        with mock.patch.object(torch.ops, "fastgen", ops):
            out = reference.generate.step_layers(Mode.LSTM, x, h, c, weights, rows, EPS, (0.1, 0.2))
        return [t.cpu().double() for t in (out, h, c)]

    ours = run(torch.float32, gpu.put, gpu.ops)
    g = Generator(3)
    for got, want in zip(ours, run(torch.float64, lambda t: t, torch.ops.fastgen), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: 4}, "mode: expected 0"),
        ({1: torch.zeros(3)}, "input: expected a matrix"),
        ({2: torch.zeros(2, 5)}, "h: expected a matrix of 3 x 5"),
        ({3: None}, "c: expected a tensor for an LSTM"),
        ({4: torch.zeros(19, 4)}, "w_ih: expected a matrix of 20 x 4"),
        ({5: torch.zeros(20, 5, dtype=torch.float64)}, "w_hh: expected the dtype and device"),
        ({7: None}, "b_ih, b_hh: expected both or neither"),
    ],
)
def test_errors(gpu, change, message):
    args = list(cell_operands(Mode.LSTM, 3, 4, 5, torch.float32))
    for i, value in change.items():
        args[i] = value
    with pytest.raises(RuntimeError, match=message):
        gpu.ops.recurrent_cell(*put(gpu, args), False)
