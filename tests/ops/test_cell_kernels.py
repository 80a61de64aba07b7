"""The kernels of the step form: values against double precision, bits over batches, tiles and threads."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from recurrent_cases import cell_operands
from support import FLOATS, ISAS, assert_same_bits
from torch import Tensor

from fastgen import random, reference
from fastgen._load import use_cpu_isa
from fastgen.random import Generator
from fastgen.reference.recurrent import Mode

ops = torch.ops.fastgen
TORCH_CELLS = {
    Mode.LSTM: torch.lstm_cell,
    Mode.GRU: torch.gru_cell,
    Mode.RNN_TANH: torch.rnn_tanh_cell,
    Mode.RNN_RELU: torch.rnn_relu_cell,
}
# A result's own rounding, which both sides pay.
ATOL = {torch.float32: 1e-6, torch.float64: 4e-15, torch.bfloat16: 2e-2, torch.float16: 2e-3}
# Around the vectors and tiles of every instruction set: 4 and 8 outputs, 3 and 6 rows, 4 to 16 lanes, blocks of 16.
SIZES = st.sampled_from([1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 33, 40, 65])
BATCHES = st.integers(1, 20)
pytestmark = pytest.mark.skipif(not ISAS, reason="the CPU kernels are not built")


def to(dtype: torch.dtype, args):
    return [a.to(dtype) if isinstance(a, Tensor) else a for a in args]


def cells_dtype(mode, dtype: torch.dtype) -> torch.dtype:
    """Of the cells, which an LSTM saves in the dtype of the sums."""
    return torch.float32 if mode == Mode.LSTM and dtype != torch.float64 else dtype


def torch_cell(mode, x, h, c, *weights):
    out = TORCH_CELLS[mode](x, (h, c) if mode == Mode.LSTM else h, *weights)
    return out if mode == Mode.LSTM else (out,)


def error(got: Tensor, exact: Tensor) -> float:
    return (got.double() - exact).abs().max().item() if exact.numel() else 0.0


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("mode", Mode)
@given(batch=BATCHES, inputs=SIZES, hidden=SIZES, bias=st.booleans(), seed=st.integers(0, 99))
def test_values(mode, dtype, batch, inputs, hidden, bias, seed):
    args = cell_operands(mode, batch, inputs, hidden, dtype, bias, seed)
    exact = reference.recurrent_cell(*to(torch.float64, args), True)
    theirs = torch_cell(*args)
    for isa in ISAS:
        with use_cpu_isa(isa):
            ours, unsaved = ops.recurrent_cell(*args, True), ops.recurrent_cell(*args, False)
        for got, want, kind in zip(ours, exact, (dtype, dtype, dtype, cells_dtype(mode, dtype)), strict=True):
            assert (got.shape, got.dtype) == (want.shape, kind)
        for got, other, want in zip(ours, theirs, exact, strict=False):  # h_1 and c_1; torch keeps nothing
            assert error(got, want) <= 2 * error(other, want) + ATOL[dtype]
        # W_hn h + b_hn, the last of a GRU's gates, is not squashed.
        for got, want in zip(ours[2:], exact[2:], strict=True):
            scale = max(1.0, want.abs().max().item()) if want.numel() else 1.0
            assert error(got, want) <= ATOL[dtype] * scale
        for got, want in zip(unsaved[:2], ours[:2], strict=True):
            assert_same_bits(got, want)
        assert [x.shape for x in unsaved[2:]] == [(0,), (0,)]


ALL = (1 << 7) - 1


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("mode", Mode)
@given(
    batch=st.one_of(BATCHES, st.sampled_from([63, 64, 65, 256])),  # 256 x 65 units go to the kernel of sequences
    inputs=SIZES,
    hidden=SIZES,
    bias=st.booleans(),
    seed=st.integers(0, 99),
    which=st.sampled_from(["h", "c", "both"]),
)
def test_backward(mode, dtype, batch, inputs, hidden, bias, seed, which):
    args = cell_operands(mode, batch, inputs, hidden, dtype, bias, seed)
    g = Generator(seed + 1)
    grad_h, grad_c = (random.normal(batch, hidden, generator=g).to(dtype) for _ in range(2))
    if which == "c" and mode == Mode.LSTM:
        grad_h = None
    if which == "h" or mode != Mode.LSTM:
        grad_c = None
    leaves = [a.requires_grad_() for a in to(torch.float64, args[1:]) if isinstance(a, Tensor)]
    given_to = iter(leaves)
    outputs = reference.recurrent_cell(mode, *(next(given_to) if isinstance(a, Tensor) else a for a in args[1:]), False)
    pairs = [(y, grad.double()) for y, grad in zip(outputs, (grad_h, grad_c), strict=False) if grad is not None]
    y, grads = zip(*pairs, strict=True)
    wanted = iter(torch.autograd.grad(y, leaves, grads, materialize_grads=True))
    exact = [next(wanted) if isinstance(a, Tensor) else None for a in args[1:]]
    plain = backward_of(reference, args, grad_h, grad_c)
    for isa in ISAS:
        with use_cpu_isa(isa):
            ours = backward_of(ops, args, grad_h, grad_c)
        for got, other, want in zip(ours, plain, exact, strict=True):
            assert got.dtype == dtype
            if want is None:
                assert got.shape == (0,)
                continue
            assert got.shape == want.shape
            # What is saved is rounded, and of many rows of half types the gradients before the products.
            scale = max(1.0, want.abs().max().item())
            assert error(got, want) <= 2 * error(other, want) + ATOL[dtype] * scale


def backward_of(ops, args, grad_h, grad_c, needs: int = ALL):
    _, _, gates, cells = ops.recurrent_cell(*args, True)
    return ops.recurrent_cell_backward(args[0], grad_h, grad_c, *args[1:], gates, cells, needs)


@pytest.mark.parametrize("batch", [1, 3, 7, 65, 110])
@pytest.mark.parametrize("mode", Mode)
def test_only_the_gradients_that_are_wanted(isa, mode, batch):
    """Any of them alone, in the same bits; nothing of those that are not."""
    args = cell_operands(mode, batch, 37, 150, torch.float32)
    grad = random.normal(batch, 150, generator=Generator(5))
    with use_cpu_isa(isa):
        every = backward_of(ops, args, grad, None)
        for i, want in enumerate(every):
            for k, got in enumerate(backward_of(ops, args, grad, None, 1 << i)):
                if k == i:
                    assert_same_bits(got, want)
                else:
                    assert got.shape == (0,)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("mode", Mode)
def test_a_row_does_not_depend_on_its_batch(isa, mode, dtype):
    """Bit for bit: alone, in every batch size, and wherever in it."""
    mode, x, h, c, *weights = cell_operands(mode, 33, 37, 21, dtype)
    with use_cpu_isa(isa):
        whole = ops.recurrent_cell(mode, x, h, c, *weights, True)
        for n in range(1, 34):
            part = ops.recurrent_cell(mode, x[:n], h[:n], None if c is None else c[:n], *weights, True)
            for a, b in zip(part, whole, strict=True):
                assert_same_bits(a, b[:n] if b.dim() == 2 else b)
        back = torch.arange(32, -1, -1)
        turned = ops.recurrent_cell(mode, x[back], h[back], None if c is None else c[back], *weights, True)
        for a, b in zip(turned, whole, strict=True):
            assert_same_bits(a, b[back] if b.dim() == 2 else b)


@pytest.mark.parametrize("mode", Mode)
def test_threads(isa, mode, threads):
    """The same bits over thread counts, where there is work enough for several: forward and backward."""
    args = cell_operands(mode, 24, 300, 288, torch.float32)
    grad = random.normal(24, 288, generator=Generator(5))
    results = []
    with use_cpu_isa(isa):
        for count in (1, 2, 3):
            threads(count)
            to_c = grad if mode == Mode.LSTM else None
            results.append((*ops.recurrent_cell(*args, True), *backward_of(ops, args, grad, to_c)))
    for other in results[1:]:
        for a, b in zip(other, results[0], strict=True):
            assert_same_bits(a, b)


@pytest.mark.parametrize("mode", Mode)
def test_layouts(isa, mode):
    """Slices, transposes and broadcasts are read as what they are."""
    args = cell_operands(mode, 7, 11, 13, torch.float32)

    def twisted(x: Tensor) -> list[Tensor]:
        if x.dim() == 1:
            return [torch.stack([x, x], 1)[:, 0]]
        wide = torch.cat([x, x], 1)
        return [wide[:, : x.shape[1]], x.t().contiguous().t(), torch.stack([x, x], 2)[:, :, 0]]

    with use_cpu_isa(isa):
        want = ops.recurrent_cell(*args, True)
        for i, value in enumerate(args):
            if not isinstance(value, Tensor):
                continue
            for other in twisted(value):
                assert not other.is_contiguous()
                got = ops.recurrent_cell(*[other if k == i else a for k, a in enumerate(args)], True)
                for a, b in zip(got, want, strict=True):
                    assert_same_bits(a, b)
        row = args[1][:1].expand(7, -1)
        got = ops.recurrent_cell(mode, row, *args[2:], False)
        same = ops.recurrent_cell(mode, row.contiguous(), *args[2:], False)
        assert_same_bits(got[0], same[0])

        grad = random.normal(7, 13, generator=Generator(5))
        saved = [mode, grad, grad if mode == Mode.LSTM else None, *args[1:], *want[2:], ALL]
        plain = ops.recurrent_cell_backward(*saved)
        saved = [a.t().contiguous().t() if isinstance(a, Tensor) and a.dim() == 2 else a for a in saved]
        for a, b in zip(ops.recurrent_cell_backward(*saved), plain, strict=True):
            assert_same_bits(a, b)


@pytest.mark.parametrize("mode", Mode)
def test_not_finite(isa, mode):
    """NaN reaches the unit it belongs to and no other; infinities saturate."""
    mode, x, h, c, w_ih, w_hh, *biases = cell_operands(mode, 3, 6, 20, torch.float32)
    w_ih[3, 2] = float("nan")
    x[1, 0] = float("inf")
    w_ih[:, 0] = 1.0
    with use_cpu_isa(isa):
        h_1 = ops.recurrent_cell(mode, x, h, c, w_ih, w_hh, *biases, False)[0]
    assert h_1[:, 3].isnan().all()
    others = torch.arange(20) != 3
    assert not h_1[0, others].isnan().any()
    want = torch_cell(mode, x, h, c, w_ih, w_hh, *biases)[0]
    torch.testing.assert_close(h_1, want, equal_nan=True)


def test_empty(isa):
    with use_cpu_isa(isa):
        for mode in Mode:
            args = cell_operands(mode, 3, 4, 5, torch.float32)
            mode, x, h, c, *weights = args
            none = (mode, x[:0], h[:0], None if c is None else c[:0], *weights)
            h_1, c_1, gates, cells = ops.recurrent_cell(*none, True)
            assert h_1.shape == (0, 5)
            assert c_1.shape == cells.shape == ((0, 5) if mode == Mode.LSTM else (0,))
            assert gates.shape == ((0, 20) if mode in (Mode.LSTM, Mode.GRU) else (0, 5))
            for got, of in zip(backward_of(ops, none, h[:0], None), none[1:], strict=True):
                assert got.shape == ((0,) if of is None else of.shape)
                assert not got.any()
        # No inputs: the step goes on from the state alone.
        mode, _, h, c, w_ih, w_hh, *biases = cell_operands(Mode.LSTM, 3, 4, 5, torch.float32)
        none = ops.recurrent_cell(mode, torch.zeros(3, 0), h, c, w_ih[:, :0], w_hh, *biases, False)
        zero = ops.recurrent_cell(mode, torch.zeros(3, 4), h, c, w_ih, w_hh, *biases, False)
        assert_same_bits(none[0], zero[0])


WRONG = [
    lambda m, x, h, c, wi, wh, bi, bh: (4, x, h, c, wi, wh, bi, bh),
    lambda m, x, h, c, wi, wh, bi, bh: (-1, x, h, c, wi, wh, bi, bh),
    lambda m, x, h, c, wi, wh, bi, bh: (m, x[0], h, c, wi, wh, bi, bh),
    lambda m, x, h, c, wi, wh, bi, bh: (m, x[:, :3], h, c, wi, wh, bi, bh),
    lambda m, x, h, c, wi, wh, bi, bh: (m, x[:2], h, c, wi, wh, bi, bh),
    lambda m, x, h, c, wi, wh, bi, bh: (m, x.double(), h, c, wi, wh, bi, bh),
    lambda m, x, h, c, wi, wh, bi, bh: (m, x.int(), h.int(), c.int(), wi.int(), wh.int(), bi.int(), bh.int()),
    lambda m, x, h, c, wi, wh, bi, bh: (m, x, h[:, :4], c, wi, wh, bi, bh),
    lambda m, x, h, c, wi, wh, bi, bh: (m, x, h[0], c, wi, wh, bi, bh),
    lambda m, x, h, c, wi, wh, bi, bh: (m, x, h, c[:, :4], wi, wh, bi, bh),
    lambda m, x, h, c, wi, wh, bi, bh: (m, x, h, c[:2], wi, wh, bi, bh),
    lambda m, x, h, c, wi, wh, bi, bh: (m, x, h, None, wi, wh, bi, bh),
    lambda m, x, h, c, wi, wh, bi, bh: (1, x, h, c, wi[:15], wh[:15], bi[:15], bh[:15]),
    lambda m, x, h, c, wi, wh, bi, bh: (1, x, h, None, wi, wh, bi, bh),
    lambda m, x, h, c, wi, wh, bi, bh: (m, x, h, c, wi[:19], wh, bi, bh),
    lambda m, x, h, c, wi, wh, bi, bh: (m, x, h, c, wi, wh[:19], bi, bh),
    lambda m, x, h, c, wi, wh, bi, bh: (m, x, h, c, wi, wh[:, :4], bi, bh),
    lambda m, x, h, c, wi, wh, bi, bh: (m, x, h, c, wi, wh.double(), bi, bh),
    lambda m, x, h, c, wi, wh, bi, bh: (m, x, h, c, wi, wh, bi, None),
    lambda m, x, h, c, wi, wh, bi, bh: (m, x, h, c, wi, wh, bi[:19], bh),
    lambda m, x, h, c, wi, wh, bi, bh: (m, x, h, c, wi, wh, bi, bh.double()),
    lambda m, x, h, c, wi, wh, bi, bh: (m, x, h, c, wi, wh, bi[None], bh),
]


@pytest.mark.parametrize("wrong", WRONG)
def test_what_does_not_fit_raises(isa, wrong):
    args = cell_operands(Mode.LSTM, 3, 4, 5, torch.float32)
    with use_cpu_isa(isa), pytest.raises(RuntimeError, match="expected"):
        ops.recurrent_cell(*wrong(*args), True)


@pytest.mark.parametrize("batch", [3, 1 << 12])
def test_a_backward_that_does_not_fit_raises(isa, batch):
    args = cell_operands(Mode.LSTM, batch, 4, 5, torch.float32)
    h, c = args[2], args[3]
    _, _, gates, cells = ops.recurrent_cell(*args, True)
    good = (Mode.LSTM, h, None, *args[1:], gates, cells, ALL)
    wrong = {
        0: [7, Mode.GRU],
        1: [h[:2], h.double()],
        2: [h[:, :3]],
        3: [args[1][:2], args[1][:, :3], args[1].double(), args[1][0]],
        4: [h[:2], h[:, :3], h[0]],
        5: [None, c[:1]],
        6: [args[4][:19]],
        7: [args[5][:, :4]],
        8: [args[6][:19]],
        9: [args[7][None]],
        10: [gates[:2], gates[:, :5]],
        11: [cells[:, :2], cells.double()],
    }
    with use_cpu_isa(isa):
        ops.recurrent_cell_backward(*good)
        for i, values in wrong.items():
            for value in values:
                with pytest.raises(RuntimeError, match="expected"):
                    ops.recurrent_cell_backward(*good[:i], value, *good[i + 1 :])
