"""Values and gradients of the recurrent functions: PyTorch's in float64, and errors beside PyTorch's in the rest."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from recurrent_cases import CELLS, EXAMPLES, Case, cases, taking, without_onednn
from support import ALL_ISAS, FLOATS, assert_same_bits

from fastgen import functional
from fastgen._ops import recurrent as ops
from fastgen.reference.recurrent import Mode

MODES = list(Mode)


def paths_and_dtypes(*dtypes: torch.dtype) -> list[tuple[str, torch.dtype]]:
    """Every instruction set with every dtype that it has kernels of its own for.

    The reference comes first; its products are PyTorch's, which promise no bits over thread counts or batches.
    """
    paths = ["reference", *ALL_ISAS]
    return [(path, dtype) for path in paths for dtype in dtypes if path != "avx512_bf16" or dtype == torch.bfloat16]


def results(outputs, leaves, grads):
    """Values, and the gradients of all leaves for the given gradients of the values."""
    return [*outputs, *torch.autograd.grad(outputs, leaves, grads)]


def both(case: Case, dtype: torch.dtype):
    """(what fastgen gives, what torch.nn gives): values and gradients of every operand and parameter."""
    module = case.module(dtype)
    x, hx = case.operands(dtype)
    leaves = [x, *(hx or ()), *module.parameters()]
    mine = case.ours(x, hx, list(module._flat_weights))
    draw = torch.Generator().manual_seed(case.seed)
    grads = [torch.randn(y.shape, generator=draw, dtype=torch.float64).to(dtype) for y in mine]
    theirs = case.theirs(x, hx, module)
    return results(mine, leaves, grads), results(theirs, leaves, grads)


def assert_no_worse(mine, theirs, exact, *, kinked=False):
    """Mean and, unless `kinked`, largest error at most twice PyTorch's; in float32 also some units at most."""
    unit = torch.finfo(mine.dtype).eps * float(exact.abs().max())
    mine_off, theirs_off = ((y.double() - exact).abs() for y in (mine, theirs))
    assert float(mine_off.mean()) <= 2 * float(theirs_off.mean()) + 0.5 * unit  # the rounding of the result itself
    if not kinked:
        assert float(mine_off.max()) <= 2 * float(theirs_off.max()) + 4 * unit  # one of many: partly luck
    if mine.dtype == torch.float32:
        assert float(mine_off.max()) <= 32 * max(unit, torch.finfo(mine.dtype).eps)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=cases())
@example(Case(lengths=(1,)))
@example(Case(lengths=(1, 1, 1), packed=True, bidirectional=True))
@example(Case(Mode.GRU, lengths=(7, 1, 1), packed=True, num_layers=3, bidirectional=True, batch_first=True))
@example(Case(proj_size=1, hidden_size=2, num_layers=2, bidirectional=True, bias=False))
def test_float64_is_torchs(path, case):
    with taking(path):
        mine, theirs = both(case, torch.float64)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def long_case(mode: Mode, **options) -> Case:
    return Case(mode=mode, input_size=24, hidden_size=40, lengths=(20,) * 6, seed=5, **options)


@pytest.mark.parametrize(("path", "dtype"), paths_and_dtypes(torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_errors_are_at_most_twice_those_of_torch(path, mode, dtype, packed):
    case = long_case(mode, num_layers=2)
    if packed:
        case = Case(**{**vars(case), "packed": True, "lengths": (20, 17, 9, 9, 3, 1)})
    # The same operands in both precisions: the oracle gets the rounded numbers.
    module = case.module(dtype)
    exact = case.module(torch.float64)
    exact.load_state_dict(module.state_dict())
    x, hx = case.operands(dtype)
    draw = torch.Generator().manual_seed(case.seed)
    shapes = [y.shape for y in case.theirs(x, hx, module)]
    grads = [torch.randn(shape, generator=draw).to(dtype) for shape in shapes]

    def wide(t):
        return t.detach().double().requires_grad_()

    x64, hx64 = wide(x), tuple(wide(h) for h in hx)
    want = results(case.theirs(x64, hx64, exact), [x64, *hx64, *exact.parameters()], [g.double() for g in grads])
    leaves = [x, *hx, *module.parameters()]
    with taking(path):
        mine = results(case.ours(x, hx, list(module._flat_weights)), leaves, grads)
    with without_onednn():
        theirs = results(case.theirs(x, hx, module), leaves, grads)
    # Products of bfloat16 in pairs take h rounded: a unit near a kink may come out on its other side, and the whole of
    # its gradient with it.
    kinked = mode == Mode.RNN_RELU and path == "avx512_bf16" and dtype == torch.bfloat16
    for i, (a, b, w) in enumerate(zip(mine, theirs, want, strict=True)):
        assert_no_worse(a.detach(), b.detach(), w.detach(), kinked=kinked and i >= len(shapes))


@pytest.mark.parametrize(("path", "dtype"), paths_and_dtypes(torch.float32, torch.bfloat16)[2:])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_thread_counts_have_the_same_bits(path, mode, dtype, packed, threads):
    lengths = (9, 9, 7, 6, 5, 5, 3, 2, 2, 2, 1) if packed else (9,) * 11
    case = Case(mode, 19, 70, lengths=lengths, packed=packed, bidirectional=True, seed=3)
    module = case.module(dtype)
    x, hx = case.operands(dtype)
    leaves = [x, *hx, *module.parameters()]
    found = []
    for count in (1, 2, 3):
        threads(count)
        with taking(path):
            outputs = case.ours(x, hx, list(module._flat_weights))
            found.append(results(outputs, leaves, [torch.ones_like(y) for y in outputs]))
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert_same_bits(a, b)


@pytest.mark.parametrize(("path", "dtype"), paths_and_dtypes(*FLOATS)[4:])
@pytest.mark.parametrize("mode", MODES)
def test_a_row_has_the_same_bits_alone_and_in_a_batch(path, mode, dtype):
    case = Case(mode, 19, 33, lengths=(5,) * 37)
    weights = list(case.module(dtype)._flat_weights)
    x, hx = case.operands(dtype)
    with taking(path):
        full = case.ours(x, hx, weights)
        for b in (0, 17, 36):
            alone = Case(mode, 19, 33, lengths=(5,)).ours(x[:, b : b + 1], tuple(h[:, b : b + 1] for h in hx), weights)
            for a, f in zip(alone, full, strict=True):
                assert_same_bits(a.detach(), f[:, b : b + 1].detach())


@pytest.mark.parametrize("mode", MODES)
def test_the_equations(path, mode):
    """One unit, two steps, by the formulas of the papers on plain numbers."""

    def sigmoid(a):
        return 1 / (1 + math.exp(-a))

    rng = np.random.default_rng(int(mode))
    gates = mode.gates
    w, u, b, d = (rng.normal(size=gates) for _ in range(4))
    xs, h, c = rng.normal(size=2), float(rng.normal()), float(rng.normal())
    start = (h, c)
    for x in xs:
        a, s = w * x + b, u * h + d
        if mode == Mode.LSTM:
            i, f, g, o = sigmoid(a[0] + s[0]), sigmoid(a[1] + s[1]), math.tanh(a[2] + s[2]), sigmoid(a[3] + s[3])
            c = f * c + i * g
            h = o * math.tanh(c)
        elif mode == Mode.GRU:
            r, z = sigmoid(a[0] + s[0]), sigmoid(a[1] + s[1])
            n = math.tanh(a[2] + r * s[2])
            h = (1 - z) * n + z * h
        else:
            h = math.tanh(a[0] + s[0]) if mode == Mode.RNN_TANH else max(0.0, a[0] + s[0])
    case = Case(mode, 1, 1, lengths=(2,))
    weights = [torch.tensor(v) for v in (w[:, None], u[:, None], b, d)]
    hx = tuple(torch.full((1, 1, 1), v, dtype=torch.float64) for v in start[: 2 if mode == Mode.LSTM else 1])
    with taking(path):
        output, h_n, *c_n = case.ours(torch.tensor(xs)[:, None, None], hx, weights)
    assert float(output[-1]) == pytest.approx(h, rel=1e-12)
    assert float(h_n) == pytest.approx(h, rel=1e-12)
    assert [float(v) for v in c_n] == pytest.approx([c] if mode == Mode.LSTM else [], rel=1e-12)


@pytest.mark.parametrize("case", [c for c in EXAMPLES if c.masked], ids=str)
def test_a_mask_is_that_of_the_formula(path, case):
    """Locked state dropout: what enters the recurrent product is h * mask, the same mask at every step."""
    module, (x, hx), mask = case.module(), case.operands(), case.mask()
    assert case.num_layers == 1
    weights = list(module._flat_weights)
    each = len(weights) // (2 if case.bidirectional else 1)
    with taking(path):
        output, h_n, *_ = case.ours(x, hx, weights)
    for k in range(2 if case.bidirectional else 1):
        w_ih, w_hh, *more = weights[k * each : (k + 1) * each]
        b_ih, b_hh = more[:2] if case.bias else (torch.zeros(1), torch.zeros(1))
        for row, length in enumerate(case.lengths):
            if case.packed:
                starts = torch.cat((torch.zeros(1, dtype=torch.long), case.batch_sizes.cumsum(0)))
                places = [int(starts[t]) + row for t in range(length)]
                steps, outputs = x[places], output[places]
            else:
                steps, outputs = (x[row], output[row]) if case.batch_first else (x[:, row], output[:, row])
            h, c = hx[0][k, row], hx[1][k, row] if case.mode == Mode.LSTM else None
            width = h.shape[0]
            for t in range(length) if k == 0 else reversed(range(length)):
                a, s = w_ih @ steps[t] + b_ih, w_hh @ (h * mask[k, row]) + b_hh
                if case.mode == Mode.LSTM:
                    i, f, g, o = (a + s).chunk(4)
                    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
                    h = o.sigmoid() * c.tanh()
                    h = more[-1] @ h if case.proj_size else h
                elif case.mode == Mode.GRU:
                    (a_r, a_z, a_n), (s_r, s_z, s_n) = a.chunk(3), s.chunk(3)
                    z = (a_z + s_z).sigmoid()
                    h = (1 - z) * (a_n + (a_r + s_r).sigmoid() * s_n).tanh() + z * h
                else:
                    h = (a + s).tanh() if case.mode == Mode.RNN_TANH else (a + s).relu()
                torch.testing.assert_close(outputs[t, k * width : (k + 1) * width], h)
            torch.testing.assert_close(h_n[k, row], h)


@pytest.mark.parametrize("mode", MODES)
def test_packed_rows_are_those_of_each_row_alone(path, mode):
    case = Case(mode, lengths=(6, 4, 4, 1), packed=True, num_layers=2, bidirectional=True, seed=9)
    weights = list(case.module()._flat_weights)
    x, hx = case.operands()
    starts = [0, *case.batch_sizes.cumsum(0).tolist()]
    with taking(path):
        output, *states = case.ours(x, hx, weights)
        for row, length in enumerate(case.lengths):
            places = [starts[t] + row for t in range(length)]
            alone = Case(**{**vars(case), "lengths": (length,), "packed": False})
            want, *want_states = alone.ours(x[places][:, None], tuple(h[:, row : row + 1] for h in hx), weights)
            torch.testing.assert_close(output[places], want[:, 0], rtol=1e-12, atol=1e-12)
            for a, b in zip(states, want_states, strict=True):
                torch.testing.assert_close(a[:, row], b[:, 0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_strides_are_read_as_they_are(path, mode, batch_first):
    """Slices, transposes, expanded gradients and non-contiguous weights and states."""
    case = Case(mode, 6, 7, lengths=(4, 4, 4), batch_first=batch_first)
    weights = list(case.module()._flat_weights)
    x, hx = case.operands()

    def strided(t):
        """The same numbers, every other one of a transposed buffer."""
        t = t.detach()
        buffer = torch.zeros(*reversed(t.shape), 2, dtype=t.dtype)
        view = buffer[..., 0].permute(*reversed(range(t.dim())))
        view.copy_(t)
        return view.requires_grad_()

    x2, hx2, weights2 = strided(x), tuple(strided(h) for h in hx), [strided(w) for w in weights]
    with taking(path):
        mine = [case.ours(x, hx, weights), case.ours(x2, hx2, weights2)]
        grads = [
            torch.autograd.grad([y.sum() for y in mine[0]], [x, *hx, *weights]),
            torch.autograd.grad([y.sum() for y in mine[1]], [x2, *hx2, *weights2]),
        ]
    for a, b in zip((*mine[0], *grads[0]), (*mine[1], *grads[1]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_an_empty_input_row(path, mode, packed):
    """No features, and (padded) no rows: legal, with gradients of zeros or nothing."""
    case = Case(mode, 4, 5, lengths=(3, 2) if packed else (3, 3), packed=packed)
    weights = list(case.module()._flat_weights)
    x, hx = case.operands()
    narrow = [weights[0][:, :0].detach().requires_grad_(), *weights[1:]]
    with taking(path):
        got = case.ours(x[..., :0], hx, narrow)
        want = case.ours(x, hx, [torch.zeros_like(weights[0]), *weights[1:]])
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)
        (to_w_ih,) = torch.autograd.grad(got[0].sum(), [narrow[0]])
        assert to_w_ih.shape == narrow[0].shape
        if not packed:
            none = Case(mode, 4, 5, lengths=(3, 3)).ours(x[:, :0], tuple(h[:, :0] for h in hx), weights)
            assert none[0].shape == (3, 0, 5)
            assert none[1].shape == (1, 0, 5)
            for grad in torch.autograd.grad(none[0].sum(), weights):
                assert not grad.any()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_what_is_not_finite_stays_in_its_row(path, mode, dtype):
    case = Case(mode, 5, 6, lengths=(4,) * 5)
    weights = list(case.module(dtype)._flat_weights)
    x, hx = case.operands(dtype)
    bad = x.detach().clone()
    bad[1, 2, 3] = math.nan
    with taking(path):
        output = case.ours(bad, hx, weights)[0]
        clean = case.ours(x, hx, weights)[0]
    assert output[1:, 2].isnan().all()
    assert_same_bits(output[0].detach(), clean[0].detach())
    rows = [0, 1, 3, 4]
    assert_same_bits(output[:, rows].detach(), clean[:, rows].detach())


# ---------------------------------------------------------------------------------------------------
# Cells


def cell_operands(mode: Mode, dtype: torch.dtype, batch: int = 3, width: int = 4, hidden: int = 5, bias: bool = True):
    extra = {"nonlinearity": "relu"} if mode == Mode.RNN_RELU else {}
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(int(mode))
        cell = CELLS[mode][0](width, hidden, bias=bias, dtype=torch.float64, **extra).to(dtype)
        x, h, c = (
            torch.randn(batch, n, dtype=torch.float64).to(dtype).requires_grad_() for n in (width, hidden, hidden)
        )
    weights = [cell.weight_ih, cell.weight_hh, *([cell.bias_ih, cell.bias_hh] if bias else [])]
    return cell, x, (h, c) if mode == Mode.LSTM else h, weights


def listed(value):
    return list(value) if isinstance(value, tuple) else [value]


@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 7, 33), (5, 16, 16), (9, 3, 17), (0, 3, 4)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_cells_in_float64_are_torchs(path, mode, bias, sizes):
    cell, x, hx, weights = cell_operands(mode, torch.float64, *sizes, bias=bias)
    leaves = [x, *listed(hx), *weights]
    with taking(path):
        mine = listed(CELLS[mode][1](x, hx, *weights))
        grads = [torch.randn_like(y) for y in mine]
        mine = results(mine, leaves, grads)
    for a, b in zip(mine, results(listed(cell(x, hx)), leaves, grads), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", MODES)
def test_errors_of_cells_are_at_most_twice_those_of_torch(path, mode, dtype):
    cell, x, hx, weights = cell_operands(mode, dtype, 16, 40, 70)
    exact, *_ = cell_operands(mode, torch.float64, 16, 40, 70)
    exact.load_state_dict(cell.state_dict())
    leaves = [x, *listed(hx), *weights]
    wide = [t.detach().double().requires_grad_() for t in leaves[: -len(weights)]]
    want = listed(exact(wide[0], tuple(wide[1:]) if mode == Mode.LSTM else wide[1]))
    grads = [torch.randn_like(y).to(dtype) for y in want]
    want = results(want, [*wide, *exact.parameters()], [g.double() for g in grads])
    with taking(path):
        mine = results(listed(CELLS[mode][1](x, hx, *weights)), leaves, grads)
    theirs = results(listed(cell(x, hx)), leaves, grads)
    for a, b, w in zip(mine, theirs, want, strict=True):
        assert_no_worse(a.detach(), b.detach(), w.detach())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("batch_first", [False, True])
def test_one_step_of_many_rows_of_bfloat16_is_a_sequence_and_of_few_a_cell(mode, batch_first):
    _, _, _, weights = cell_operands(mode, torch.bfloat16, 1, 40, 70)
    weights = [w.detach() for w in weights]
    draw = torch.Generator().manual_seed(0)
    for rows in (63, 64):
        x, h, c = (torch.randn(rows, n, generator=draw).bfloat16() for n in (weights[0].shape[1], 70, 70))
        c = c if mode == Mode.LSTM else None
        operands = x.unsqueeze(1 if batch_first else 0), None, *weights, None, h, c, None
        output, h_n, _ = ops.recurrent(mode, ops.Options(batch_first), *operands)
        if rows < 64:
            expected = torch.ops.fastgen.recurrent_cell(mode, x, h, c, *weights, False)[0]
        else:
            expected = torch.ops.fastgen.recurrent(mode, *operands, batch_first, False, False)[1]
        assert torch.equal(h_n, expected)
        assert torch.equal(output, h_n.unsqueeze(1 if batch_first else 0))


@pytest.mark.parametrize("mode", MODES)
def test_gradients_of_a_single_row_are_as_exact_as_torchs(mode):
    """On the average, where no slack for the rounding of the result hides a sum in a worse order."""
    mine_off, theirs_off = 0.0, 0.0
    for seed in range(20):
        draw = torch.Generator().manual_seed(seed)
        cell, *_ = cell_operands(mode, torch.float32, 1, 8, 64)
        x, h, c, grad = (torch.randn(1, n, generator=draw) for n in (8, 64, 64, 64))
        found = []
        for function, dtype in ((CELLS[mode][1], torch.float32), (None, torch.float32), (None, torch.float64)):
            states = [s.to(dtype).requires_grad_() for s in ((h, c) if mode == Mode.LSTM else (h,))]
            hx = tuple(states) if mode == Mode.LSTM else states[0]
            result = function(x, hx, *cell.parameters()) if function else cell.to(dtype)(x.to(dtype), hx)
            found.append(torch.autograd.grad(listed(result)[0], states[0], grad.to(dtype))[0])
        mine, theirs, exact = found
        mine_off += float((mine - exact).abs().mean())
        theirs_off += float((theirs - exact).abs().mean())
    assert mine_off <= 1.5 * theirs_off


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", MODES)
def test_thread_counts_have_the_same_bits_in_a_batch_of_cells(isa, mode, dtype, threads):
    _, x, hx, weights = cell_operands(mode, dtype, 9, 33, 70)
    found = []
    for count in (1, 2, 3):
        threads(count)
        with taking(isa):
            outputs = listed(CELLS[mode][1](x, hx, *weights))
            found.append(results(outputs, [x, *listed(hx), *weights], [torch.ones_like(y) for y in outputs]))
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert_same_bits(a.detach(), b.detach())


@pytest.mark.parametrize("mode", MODES)
def test_a_sequence_is_its_cells(path, mode):
    """The step form and the sequence form are one definition."""
    case = Case(mode, lengths=(5, 5, 5))
    weights = list(case.module()._flat_weights)
    x, hx = case.operands()
    with taking(path):
        output = case.ours(x, hx, weights)[0]
        h, c = hx[0][0], hx[1][0] if mode == Mode.LSTM else None
        for t in range(5):
            if mode == Mode.LSTM:
                h, c = functional.lstm_cell(x[t], (h, c), *weights)
            else:
                h = CELLS[mode][1](x[t], h, *weights)
            torch.testing.assert_close(output[t], h, rtol=1e-12, atol=1e-12)
