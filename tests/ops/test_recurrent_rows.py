"""Layer norm and zoneout: values and gradients against double precision, bits over splits of the work, draws."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import ALL_ISAS, FLOATS, assert_same_bits, assert_threads_change_no_bit
from torch import Tensor
from torch.nn.functional import layer_norm

from fastgen import random, reference
from fastgen._load import use_cpu_isa
from fastgen.random import Generator
from fastgen.reference.recurrent import Mode

ops = torch.ops.fastgen
EPS = 1e-5
# A result's own rounding and that of what is kept for the backward pass, which both sides pay.
ATOL = {torch.float32: 2e-6, torch.float64: 4e-15, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}
SIZES = st.sampled_from([1, 2, 3, 5, 8, 9, 16, 17, 33])  # around the vectors of every instruction set
BATCHES = st.one_of(st.integers(1, 17), st.just(66))
ZONEOUT = st.sampled_from([0.0, 0.1, 0.5, 1.0])
needs_kernels = pytest.mark.skipif(not ALL_ISAS, reason="the CPU kernels are not built")


@st.composite
def calls(draw, smallest=1):
    """(mode, operands up to h_mask, batch_first, reverse, norm and zoneout operands) in double precision."""
    mode = draw(st.sampled_from(list(Mode)))
    batch, steps, hidden = draw(BATCHES), draw(st.integers(1, 4)), draw(SIZES.filter(lambda n: n >= smallest))
    inputs = draw(st.one_of(SIZES, st.just(0)))
    outputs = draw(st.one_of(st.none(), SIZES)) if mode == Mode.LSTM else None
    layout = draw(st.sampled_from(["steps first", "batch first", "packed"]))
    g = Generator(draw(st.integers(0, 99)))

    def normal(*shape: int, std: float = 1.0, mean: float = 0.0) -> Tensor:
        return random.normal(*shape, mean=mean, std=std, generator=g, dtype=torch.float64)

    batch_sizes = None
    if layout == "packed":
        lengths = draw(st.lists(st.integers(1, steps), min_size=batch - 1, max_size=batch - 1))
        lengths.append(steps)
        batch_sizes = torch.tensor([sum(n > t for n in lengths) for t in range(steps)])
        x = normal(sum(lengths), inputs)
    else:
        x = normal(batch, steps, inputs) if layout == "batch first" else normal(steps, batch, inputs)
    rows, state = mode.gates * hidden, outputs or hidden
    bias, mask = draw(st.booleans()), draw(st.booleans())
    operands = (
        x,
        batch_sizes,
        normal(rows, inputs),
        normal(rows, state),
        normal(rows) if bias else None,
        normal(rows) if bias else None,
        normal(outputs, hidden, std=hidden**-0.5) if outputs else None,
        normal(batch, state),
        normal(batch, hidden) if mode == Mode.LSTM else None,
        (normal(batch, state) > -0.5).double() * 1.5 if mask else None,
    )
    zoneout = draw(ZONEOUT) if mode == Mode.LSTM else 0.0, draw(ZONEOUT)
    norm = [None] * 4
    if mode == Mode.LSTM and (zoneout == (0.0, 0.0) or draw(st.booleans())):
        norm = [normal(n, mean=m) for n, m in ((rows, 1), (rows, 1), (hidden, 1), (hidden, 0))]
    if mode != Mode.LSTM and zoneout[1] == 0:
        zoneout = 0.0, 0.3
    seed_offset = torch.tensor([draw(st.integers(0, 99)), draw(st.integers(0, 9))]) if draw(st.booleans()) else None
    options = (*norm, seed_offset, EPS, *zoneout)
    return mode, operands, layout == "batch first", draw(st.booleans()), options


def to(dtype: torch.dtype, values):
    return tuple(x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for x in values)


def forward(namespace, call, dtype: torch.dtype):
    mode, operands, batch_first, reverse, options = call
    return namespace.recurrent(mode, *to(dtype, operands), batch_first, reverse, True, *to(dtype, options))


def backward(namespace, call, grads, dtype: torch.dtype, needs: int = 4095):
    mode, operands, batch_first, reverse, options = call
    output, _, _, gates, cells = forward(namespace, call, dtype)
    return namespace.recurrent_backward(
        mode,
        *to(dtype, grads),
        *to(dtype, operands),
        output,
        gates,
        cells,
        batch_first,
        reverse,
        needs,
        *to(dtype, options),
    )


def gradients(call, seed: int):
    """Of output, h_n and c_n, rounded to bfloat16, so that all dtypes hold them."""
    _, operands, *_ = call
    g = Generator(seed)
    shapes = (*operands[0].shape[:-1], operands[7].shape[-1]), operands[7].shape, getattr(operands[8], "shape", None)
    return [None if s is None else random.normal(*s, generator=g).bfloat16().double() for s in shapes]


def rounded(call):
    """The same call with operands that every dtype holds: what remains is the error of the algebra."""
    mode, operands, batch_first, reverse, options = call
    return mode, to(torch.float64, to(torch.bfloat16, operands)), batch_first, reverse, halved(options)


def halved(options):
    return to(torch.float64, to(torch.bfloat16, options))


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


# ---------------------------------------------------------------------------------------------------
# The definition: a loop over steps written with PyTorch's layer norm, and masks from fastgen.random


def by_hand(call):
    """(output, h_n, c_n) of a padded call by the formulas."""
    mode, operands, batch_first, reverse, (*norm, seed_offset, eps, zoneout_c, zoneout_h) = call
    x, _, w_ih, w_hh, b_ih, b_hh, w_hr, h, c, h_mask = operands
    x = x.transpose(0, 1) if batch_first else x
    steps, batch, _ = x.shape
    hidden = w_hh.shape[0] // mode.gates
    bias = (0, 0) if b_ih is None else (b_ih, b_hh)
    keep_c, keep_h = [zoneout_c] * steps, [zoneout_h] * steps
    if seed_offset is not None:
        seed, offset = seed_offset.tolist()
        places = (batch, steps) if batch_first else (steps, batch)
        of_c = 0 if c is None else steps * batch * hidden

        def masks(p, width, first):
            drawn = random.bernoulli(*places, width, p=p, generator=Generator(seed, offset + first), dtype=x.dtype)
            return drawn.transpose(0, 1) if batch_first else drawn

        keep_c = masks(zoneout_c, hidden, 0) if c is not None else keep_c
        keep_h = masks(zoneout_h, h.shape[1], of_c)
    outputs = [None] * steps
    for t in reversed(range(steps)) if reverse else range(steps):
        fed = h if h_mask is None else h * h_mask
        from_x, from_h = x[t] @ w_ih.T, fed @ w_hh.T
        if norm[0] is not None:
            width = (4 * hidden,)
            from_x, from_h = (
                layer_norm(from_x, width, norm[0], None, eps),
                layer_norm(from_h, width, norm[1], None, eps),
            )
        from_x, from_h = from_x + bias[0], from_h + bias[1]
        if mode == Mode.LSTM:
            i, f, g, o = (from_x + from_h).chunk(4, -1)
            new_c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            y = new_c if norm[0] is None else layer_norm(new_c, (hidden,), norm[2], norm[3], eps)
            new_h = o.sigmoid() * y.tanh()
            c = keep_c[t] * c + (1 - keep_c[t]) * new_c
        elif mode == Mode.GRU:
            (x_r, x_z, x_n), (h_r, h_z, h_n) = from_x.chunk(3, -1), from_h.chunk(3, -1)
            z = (x_z + h_z).sigmoid()
            new_h = (1 - z) * (x_n + (x_r + h_r).sigmoid() * h_n).tanh() + z * h
        else:
            total = from_x + from_h
            new_h = total.tanh() if mode == Mode.RNN_TANH else total.relu()
        new_h = new_h if w_hr is None else new_h @ w_hr.T
        h = outputs[t] = keep_h[t] * h + (1 - keep_h[t]) * new_h
    output = torch.stack(outputs, 1 if batch_first else 0)
    return (output, h) if c is None else (output, h, c)


def by_autograd(call, grads, dtype: torch.dtype):
    """Gradients of a padded call, by PyTorch's own ops in the dtype."""
    mode, operands, batch_first, reverse, options = call
    tensors = [*to(dtype, operands), *to(dtype, options[:4])]
    leaves = [x.clone().requires_grad_() if x is not None and i != 9 else x for i, x in enumerate(tensors)]
    outputs = by_hand((mode, leaves[:10], batch_first, reverse, (*leaves[10:], *options[4:])))
    wanted = [x for i, x in enumerate(leaves) if i not in (1, 9)]
    present = [x for x in wanted if x is not None]
    found = iter(torch.autograd.grad(outputs, present, to(dtype, grads[: len(outputs)]), allow_unused=True))
    none = torch.empty(0, dtype=dtype)
    results = [none if x is None else next(found) for x in wanted]
    return [torch.zeros_like(x) if g is None else g for x, g in zip(wanted, results, strict=True)]


@given(call=calls())
def test_the_reference_is_the_formula(call):
    if call[1][1] is not None:
        return
    got, want = forward(reference, call, torch.float64), by_hand(call)
    for a, b in zip(got, want, strict=False):
        torch.testing.assert_close(a, b)


@given(call=calls(), seed=st.integers(0, 99))
def test_the_backward_formulas_are_the_derivative(call, seed):
    mode, operands, batch_first, reverse, options = call
    # x / |x| has no derivative to speak of where the variance is next to none: one unit alone, a single row of zeros.
    if options[0] is not None and (operands[3].shape[0] == 4 or operands[0].shape[-1] == 0):
        return
    leaves = [
        x.requires_grad_() if x is not None and i not in (1, 9) else None
        for i, x in enumerate((*operands, *options[:4]))
    ]
    leaves = [x for i, x in enumerate(leaves) if i not in (1, 9)]
    outputs = forward(reference, call, torch.float64)[: 3 if mode == Mode.LSTM else 2]
    grads = gradients(call, seed)
    want = iter(torch.autograd.grad(outputs, [x for x in leaves if x is not None], grads[: len(outputs)]))
    detached = [x.detach() if isinstance(x, Tensor) else x for x in operands]
    plain = [x.detach() if isinstance(x, Tensor) else x for x in options]
    found = backward(reference, (mode, detached, batch_first, reverse, plain), grads, torch.float64)
    for x, grad in zip(leaves, found, strict=True):
        if x is None:
            assert grad.shape == (0,)
        else:
            torch.testing.assert_close(grad, next(want))


@pytest.mark.parametrize("drawn", [False, True])
def test_zoneout_of_everything_keeps_the_very_bits(drawn):
    x, h, c = torch.randn(3, 2, 4), torch.randn(2, 5), torch.randn(2, 5)
    weights = torch.randn(20, 4), torch.randn(20, 5)
    seed_offset = torch.tensor([1, 2]) if drawn else None
    output, h_n, c_n, *_ = ops.recurrent(
        0, x, None, *weights, *[None] * 3, h, c, None, *[False] * 3, *[None] * 4, seed_offset, EPS, 1.0, 1.0
    )
    assert_same_bits(output, h.expand(3, 2, 5).contiguous())
    assert_same_bits(h_n, h)
    assert_same_bits(c_n, c)


# ---------------------------------------------------------------------------------------------------
# The kernels


@needs_kernels
@pytest.mark.parametrize("dtype", FLOATS)
@settings(max_examples=40)
@given(call=calls(smallest=2))
def test_values(dtype, call):
    call = rounded(call)
    exact = forward(reference, call, torch.float64)
    theirs = forward(reference, call, dtype)
    for isa in ALL_ISAS:
        with use_cpu_isa(isa):
            ours = forward(ops, call, dtype)
        assert [x.dtype for x in ours] == [x.dtype for x in theirs]
        assert_close(ours[:3], theirs[:3], exact[:3], dtype)
        assert [x.shape for x in ours] == [x.shape for x in theirs]


@needs_kernels
@pytest.mark.parametrize("dtype", FLOATS)
@settings(max_examples=40)
@given(call=calls(smallest=5), seed=st.integers(0, 99))
def test_gradients(dtype, call, seed):
    call = rounded(call)
    if call[1][1] is not None or (call[0] == Mode.RNN_RELU and dtype == torch.bfloat16):
        return  # PyTorch's loop is padded; and a unit at the kink may come out on its other side
    grads = gradients(call, seed)
    exact = backward(reference, call, grads, torch.float64)
    theirs = by_autograd(call, grads, dtype)
    for isa in ALL_ISAS:
        with use_cpu_isa(isa):
            ours = backward(ops, call, grads, dtype)
        assert {x.dtype for x in ours} == {dtype}
        assert_close(ours, theirs, exact, dtype)


@needs_kernels
@given(call=calls(), seed=st.integers(0, 99), needs=st.integers(0, 4095))
def test_only_what_is_needed(call, seed, needs):
    grads = gradients(call, seed)
    every = backward(ops, call, grads, torch.float32)
    for i, (got, want) in enumerate(zip(backward(ops, call, grads, torch.float32, needs), every, strict=True)):
        assert_same_bits(got, want if needs >> i & 1 else want.new_empty(0))


@needs_kernels
@pytest.mark.parametrize("dtype", FLOATS)
@settings(max_examples=40)
@given(call=calls(), seed=st.integers(0, 99))
def test_threads_and_repetition_change_no_bit(dtype, call, seed):
    grads = gradients(call, seed)
    assert_threads_change_no_bit(lambda: (*forward(ops, call, dtype), *backward(ops, call, grads, dtype)))


@needs_kernels
@pytest.mark.parametrize("projection", [None, 80])
def test_steps_that_threads_share(threads, isa, projection):
    """Few rows and wide layers: units and rows of a step are split. Bits and values as on one thread."""
    steps, batch, hidden = 9, 3, 400
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
    norm = [random.normal(n, mean=1.0, generator=g) for n in (4 * hidden, 4 * hidden, hidden, hidden)]
    call = Mode.LSTM, operands, False, False, (*norm, torch.tensor([3, 1]), EPS, 0.3, 0.1)
    grads = gradients(call, 1)
    results = []
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


@given(call=calls())
def test_a_packed_call_is_that_of_each_sequence(call):
    """Without draws, whose elements follow the layout."""
    mode, operands, _, reverse, options = call
    sizes = operands[1]
    if sizes is None:
        return
    options = (*options[:4], None, *options[5:])
    packed = forward(ops, (mode, operands, False, reverse, options), torch.float64)
    firsts = sizes.cumsum(0) - sizes
    for row in range(operands[7].shape[0]):
        places = firsts[sizes > row] + row
        alone = list(operands)
        alone[0], alone[1] = operands[0][places].unsqueeze(1), None
        for i in (7, 8, 9):
            alone[i] = None if operands[i] is None else operands[i][row : row + 1]
        output, h_n, c_n, *_ = forward(ops, (mode, alone, False, reverse, options), torch.float64)
        torch.testing.assert_close(packed[0][places], output[:, 0])
        torch.testing.assert_close(packed[1][row], h_n[0])
        if mode == Mode.LSTM:
            torch.testing.assert_close(packed[2][row], c_n[0])


@needs_kernels
@given(call=calls(smallest=2), dtype=st.sampled_from(FLOATS))
def test_a_step_is_a_sequence_of_one(call, dtype):
    """The dot form, without draws; a row's bits do not depend on the others."""
    mode, operands, _, _, (*norm, _, eps, zoneout_c, zoneout_h) = rounded(call)
    x, sizes, w_ih, w_hh, b_ih, b_hh, w_hr, h, c, _ = operands
    if w_hr is not None:
        return
    x = x[: h.shape[0]] if sizes is not None else x[:, 0] if call[2] else x[0]
    arguments = (mode, x, h, c, w_ih, w_hh, b_ih, b_hh, *norm, eps, zoneout_c, zoneout_h)
    exact, theirs = (reference.recurrent_step(*to(d, arguments)) for d in (torch.float64, dtype))
    sequence = reference.recurrent(
        mode,
        x[None],
        None,
        *(w_ih, w_hh, b_ih, b_hh, None, h, c, None, False, False, False),
        *(*norm, None, eps, zoneout_c, zoneout_h),
    )
    for a, b in zip(exact, sequence[1:3], strict=True):
        torch.testing.assert_close(a, b)
    for isa in ALL_ISAS:
        with use_cpu_isa(isa):
            ours = ops.recurrent_step(*to(dtype, arguments))
            first = [v[:1] if i in (1, 2, 3) and v is not None else v for i, v in enumerate(to(dtype, arguments))]
            alone = ops.recurrent_step(*first)
        assert_close(ours, theirs, exact, dtype)
        for a, b in zip(alone, ours, strict=True):
            assert_same_bits(a, b[:1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([torch.ones(20), None, None, None, None, EPS, 0.0, 0.0], "norm_ih, norm_hh, norm_c, norm_c_bias"),
        ([*[torch.ones(20)] * 3, torch.ones(5), None, EPS, 0.0, 0.0], "norm_c: expected a vector of 5"),
        ([*[torch.ones(20).double()] * 2, *[torch.ones(5)] * 2, None, EPS, 0.0, 0.0], "norm_ih: expected the dtype"),
        ([None, None, None, None, None, EPS, 1.5, 0.0], "zoneout_c, zoneout_h: expected probabilities"),
        ([None, None, None, None, torch.zeros(3).long(), EPS, 0.5, 0.0], "seed_offset: expected an int64"),
    ],
)
@needs_kernels
def test_errors(options, message):
    weights = torch.zeros(20, 4), torch.zeros(20, 5)
    states = torch.zeros(2, 5), torch.zeros(2, 5)
    with pytest.raises(RuntimeError, match=message):
        ops.recurrent(0, torch.zeros(3, 2, 4), None, *weights, *[None] * 3, *states, None, *[False] * 3, *options)
