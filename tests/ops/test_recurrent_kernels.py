"""The kernels of the sequence form: values against double precision, bits over splits of the work and layouts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import ALL_ISAS, FLOATS, assert_same_bits, assert_threads_change_no_bit
from torch import Tensor

from fastgen import random, reference
from fastgen._load import use_cpu_isa
from fastgen.random import Generator
from fastgen.reference.recurrent import Mode

ops = torch.ops.fastgen
# A result's own rounding and that of what is kept for the backward pass, which both sides pay.
ATOL = {torch.float32: 1e-6, torch.float64: 2e-15, torch.bfloat16: 8e-3, torch.float16: 1e-3}
# Around the vectors and panels of every instruction set.
SIZES = st.sampled_from([1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 33, 64, 65])
BATCHES = st.one_of(st.integers(1, 20), st.sampled_from([33, 64, 70]))
pytestmark = pytest.mark.skipif(not ALL_ISAS, reason="the CPU kernels are not built")


@st.composite
def calls(draw):
    """(mode, operands of the op from `input` to `h_mask`, batch_first, reverse) in double precision."""
    mode = draw(st.sampled_from(list(Mode)))
    batch, steps, hidden = draw(BATCHES), draw(st.integers(1, 9)), draw(SIZES)
    inputs = draw(st.one_of(SIZES, st.just(0)))
    outputs = draw(st.one_of(st.none(), SIZES)) if mode == Mode.LSTM else None
    layout = draw(st.sampled_from(["steps first", "batch first", "packed"]))
    g = Generator(draw(st.integers(0, 99)))

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return random.normal(*shape, std=std, generator=g, dtype=torch.float64)

    batch_sizes = None
    if layout == "packed":
        lengths = draw(st.lists(st.integers(1, steps), min_size=batch - 1, max_size=batch - 1))
        lengths.append(steps)
        batch_sizes = torch.tensor([sum(n > t for n in lengths) for t in range(steps)])
        x = normal(sum(lengths), inputs)
    else:
        x = normal(batch, steps, inputs) if layout == "batch first" else normal(steps, batch, inputs)
    rows, state = mode.gates * hidden, outputs or hidden
    bias = draw(st.booleans())
    mask = draw(st.booleans())
    operands = (
        x,
        batch_sizes,
        normal(rows, inputs, std=max(inputs, 1) ** -0.5),
        normal(rows, state, std=state**-0.5),
        normal(rows) if bias else None,
        normal(rows) if bias else None,
        normal(outputs, hidden, std=hidden**-0.5) if outputs else None,
        normal(batch, state),
        normal(batch, hidden) if mode == Mode.LSTM else None,
        (normal(batch, state) > -0.5).double() * 1.5 if mask else None,
    )
    return mode, operands, layout == "batch first", draw(st.booleans())


def to(dtype: torch.dtype, tensors):
    return tuple(x.to(dtype) if x is not None and x.is_floating_point() else x for x in tensors)


def forward(namespace, call, dtype: torch.dtype):
    mode, operands, batch_first, reverse = call
    return namespace.recurrent(mode, *to(dtype, operands), batch_first, reverse, True)


def backward(namespace, call, grads, dtype: torch.dtype, needs: int = 255):
    mode, operands, batch_first, reverse = call
    output, _, _, gates, cells = forward(namespace, call, dtype)
    return namespace.recurrent_backward(
        mode, *to(dtype, grads), *to(dtype, operands), output, gates, cells, batch_first, reverse, needs
    )


def gradients(call, seed: int, which: int):
    """Of output, h_n and c_n, without the one of number `which`; rounded to bfloat16, so that all dtypes hold them."""
    mode, operands, *_ = call
    g = Generator(seed)
    shapes = (*operands[0].shape[:-1], operands[7].shape[-1]), operands[7].shape, getattr(operands[8], "shape", None)
    drawn = [None if s is None else random.normal(*s, generator=g).bfloat16().double() for s in shapes]
    if which == 0 or (which == 1 and mode == Mode.LSTM):
        drawn[which] = None
    return drawn


def rounded(call):
    """The same call with operands that every dtype holds: what remains is the error of the algebra."""
    mode, operands, *rest = call
    return mode, to(torch.float64, to(torch.bfloat16, operands)), *rest


def assert_close(ours, theirs, exact, dtype):
    """Twice the error of plain PyTorch; sums over n rows may differ by the root of n roundings."""
    sums = max(1.0, exact[0].shape[:-1].numel() ** 0.5)
    for got, other, want in zip(ours, theirs, exact, strict=True):
        assert got.shape == want.shape
        if got.numel() == 0:
            continue
        scale = max(1.0, want.abs().max().item())
        error, allowed = ((x.double() - want).abs().max().item() for x in (got, other))
        assert error <= 2 * allowed + ATOL[dtype] * scale * sums


@pytest.mark.parametrize("dtype", FLOATS)
@given(call=calls())
def test_values(dtype, call):
    call = rounded(call)
    exact = forward(reference, call, torch.float64)
    theirs = forward(reference, call, dtype)
    for isa in ALL_ISAS:
        with use_cpu_isa(isa):
            ours = forward(ops, call, dtype)
        assert [x.dtype for x in ours] == [x.dtype for x in theirs]
        assert_close(ours, theirs, exact, dtype)


@pytest.mark.parametrize("dtype", FLOATS)
@given(call=calls(), seed=st.integers(0, 99), which=st.integers(0, 3))
def test_gradients(dtype, call, seed, which):
    call = rounded(call)
    grads = gradients(call, seed, which)
    exact = backward(reference, call, grads, torch.float64)
    theirs = backward(reference, call, grads, dtype)
    for isa in ALL_ISAS:
        if isa == "avx512_bf16" and dtype == torch.bfloat16 and call[0] == Mode.RNN_RELU:
            continue  # h enters the product rounded: a unit at the kink may come out on its other side
        with use_cpu_isa(isa):
            ours = backward(ops, call, grads, dtype)
        assert {x.dtype for x in ours} == {dtype}
        assert_close(ours, theirs, exact, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_over_many_rows(dtype):
    """More than the panels of the weights' gradients hold at once, and no whole number of their blocks."""
    steps, batch, inputs, hidden = 301, 7, 5, 6
    g = Generator(2)
    rows = Mode.LSTM.gates * hidden
    operands = [
        random.normal(steps, batch, inputs, generator=g),
        None,
        *(random.normal(rows, n, std=n**-0.5, generator=g) for n in (inputs, hidden)),
        *(random.normal(rows, generator=g) for _ in range(2)),
        None,
        *(random.normal(batch, hidden, generator=g) for _ in range(2)),
        None,
    ]
    call = rounded((Mode.LSTM, operands, False, False))
    grads = gradients(call, 1, 3)
    exact = backward(reference, call, grads, torch.float64)
    theirs = backward(reference, call, grads, dtype)
    for isa in ALL_ISAS:
        with use_cpu_isa(isa):
            assert_close(backward(ops, call, grads, dtype), theirs, exact, dtype)


@given(call=calls(), seed=st.integers(0, 99), needs=st.integers(0, 255))
def test_only_what_is_needed(call, seed, needs):
    grads = gradients(call, seed, 3)
    every = backward(ops, call, grads, torch.float32)
    for i, (got, want) in enumerate(zip(backward(ops, call, grads, torch.float32, needs), every, strict=True)):
        assert_same_bits(got, want if needs >> i & 1 else want.new_empty(0))


@pytest.mark.parametrize("dtype", FLOATS)
@given(call=calls(), seed=st.integers(0, 99))
def test_threads_and_repetition_change_no_bit(dtype, call, seed):
    grads = gradients(call, seed, 3)
    assert_threads_change_no_bit(lambda: (*forward(ops, call, dtype), *backward(ops, call, grads, dtype)))


@pytest.mark.parametrize("isa", ALL_ISAS)
@pytest.mark.parametrize(("batch", "steps", "hidden"), [(1, 70, 400), (3, 70, 400), (17, 5, 520)])
@pytest.mark.parametrize("projection", [None, 80])
def test_steps_that_threads_share(threads, isa, batch, steps, hidden, projection):
    """Few rows and wide layers, or large weights: the units of a step are split. Bits and values as on one thread."""
    mode = Mode.LSTM
    g = Generator(3)
    state = projection or hidden
    operands = [
        random.normal(steps, batch, 20, generator=g),
        None,
        *(random.normal(4 * hidden, n, std=n**-0.5, generator=g) for n in (20, state)),
        *(random.normal(4 * hidden, generator=g) for _ in range(2)),
        random.normal(projection, hidden, std=hidden**-0.5, generator=g) if projection else None,
        random.normal(batch, state, generator=g),
        random.normal(batch, hidden, generator=g),
        None,
    ]
    call = mode, operands, False, False
    grads = gradients(call, 1, 3)
    results = []
    with use_cpu_isa(isa):
        for count in (1, 2, 3):
            threads(count)
            results.append((*forward(ops, call, torch.float32), *backward(ops, call, grads, torch.float32)))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert_same_bits(a, b)
    exact = (*forward(reference, call, torch.float64), *backward(reference, call, grads, torch.float64))
    for got, want in zip(results[0], exact, strict=True):
        torch.testing.assert_close(
            got.double(), want.double(), rtol=1e-4, atol=1e-4 * float(want.abs().amax() if want.numel() else 0)
        )


@given(call=calls(), rows=st.integers(1, 4))
def test_a_row_does_not_depend_on_its_batch(call, rows):
    mode, operands, batch_first, reverse = call
    if operands[1] is not None:
        return
    rows = min(rows, operands[7].shape[0])
    whole = forward(ops, call, torch.float32)
    first = [
        None if x is None else x[:rows] if i > 6 else x if i > 0 else x.narrow(0 if batch_first else 1, 0, rows)
        for i, x in enumerate(operands)
    ]
    part = forward(ops, (mode, first, batch_first, reverse), torch.float32)
    assert_same_bits(part[0], whole[0].narrow(0 if batch_first else 1, 0, rows))
    assert_same_bits(part[1], whole[1][:rows])


@given(call=calls(), seed=st.integers(0, 99))
def test_strides(call, seed):
    """Operands that are not contiguous give the bits of their copies."""
    mode, operands, batch_first, reverse = call
    grads = gradients(call, seed, 3)

    def strided(x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        wide = x.new_zeros(*x.shape[:-1], 2 * x.shape[-1] + 1)
        wide[..., 1::2] = x
        return wide[..., 1::2] if seed % 2 else wide.new_zeros(*x.shape[:-1], x.shape[-1] + 3)[..., 2:-1].copy_(x)

    other = mode, [strided(x) for x in operands], batch_first, reverse
    for a, b in zip(forward(ops, call, torch.float64), forward(ops, other, torch.float64), strict=True):
        assert_same_bits(a, b)
    plain = backward(ops, call, grads, torch.float64)
    for a, b in zip(plain, backward(ops, other, [strided(x) for x in grads], torch.float64), strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("isa", ALL_ISAS)
@pytest.mark.parametrize("mode", Mode)
def test_what_is_not_finite_stays_in_its_row(mode, dtype, isa):
    g = Generator(5)
    x = random.normal(4, 3, 5, generator=g).to(dtype)
    weights = [random.normal(mode.gates * 6, n, generator=g).to(dtype) for n in (5, 6)]
    h = torch.zeros(3, 6, dtype=dtype)
    with use_cpu_isa(isa):
        clean = ops.recurrent(
            mode, x, None, *weights, *[None] * 3, h, h if mode == Mode.LSTM else None, None, *[False] * 3
        )
        x[1, 1, 2] = float("nan")
        out = ops.recurrent(
            mode, x, None, *weights, *[None] * 3, h, h if mode == Mode.LSTM else None, None, *[False] * 3
        )
    assert_same_bits(out[0][:, ::2], clean[0][:, ::2])
    assert_same_bits(out[0][0], clean[0][0])
    assert out[0][1:, 1].isnan().all()


def test_long_sums_of_weight_gradients():
    """Many rows: the error of the sum grows with the root of the blocks, not with their number."""
    g = Generator(7)
    x, h = random.normal(600, 16, 4, generator=g), torch.zeros(16, 8)
    call = (
        Mode.RNN_TANH,
        [x, None, *(random.normal(8, n, generator=g) for n in (4, 8)), *[None] * 3, h, None, None],
        False,
        False,
    )
    grads = [torch.ones(600, 16, 8, dtype=torch.float64), None, None]
    ours, theirs, exact = (
        backward(n, call, grads, d)
        for n, d in ((ops, torch.float32), (reference, torch.float32), (reference, torch.float64))
    )
    for i in (1, 2):
        error, allowed = ((r[i].double() - exact[i]).abs().max() for r in (ours, theirs))
        assert error <= 2 * allowed + 1e-6 * exact[i].abs().max()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(3, 2, 4, 1)}, "input: expected 3 dimensions, got 4"),
        ({0: torch.zeros(0, 2, 4)}, "input: expected at least one step"),
        ({0: torch.zeros(3, 5, 4)}, "h_0: expected the batch size of input, 5, got 2"),
        ({2: torch.zeros(20, 3)}, "w_ih: expected the dtype of input and a shape"),
        ({3: torch.zeros(21, 5)}, "w_hh: expected a matrix with a row for each gate and unit"),
        ({4: torch.zeros(20, dtype=torch.float64)}, "b_ih: expected the dtype of input"),
        ({7: torch.zeros(2, 6)}, "h_0: expected the dtype of input and a shape"),
        ({8: None}, "c_0: expected for an LSTM"),
        ({9: torch.zeros(1, 5)}, "h_mask: expected the dtype"),
        ({0: torch.zeros(4, 4), 1: torch.tensor([1, 3])}, "batch_sizes: expected positive numbers in descending order"),
        ({0: torch.zeros(4, 4), 1: torch.tensor([2, 1])}, "batch_sizes: expected the sum 4, got 3"),
        ({0: torch.zeros(2, 4), 1: torch.tensor([2], dtype=torch.int32)}, "batch_sizes: expected an int64 tensor"),
    ],
)  # fmt: skip
def test_errors(change, message):
    operands = [torch.zeros(3, 2, 4), None, torch.zeros(20, 4), torch.zeros(20, 5), None, None, None]
    operands += [torch.zeros(2, 5), torch.zeros(2, 5), None]
    for i, value in change.items():
        operands[i] = value
    with pytest.raises(RuntimeError, match=message):
        ops.recurrent(Mode.LSTM, *operands, False, False, False)
