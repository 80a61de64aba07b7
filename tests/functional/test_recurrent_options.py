"""What goes around the recurrent ops: dropout and its stream, states, autocast, and every error."""

from __future__ import annotations

import functools

import pytest
import torch
from recurrent_cases import CELLS, SEQUENCES, Case
from support import FLOATS, assert_same_bits

from fastgen import functional, random
from fastgen._ops import recurrent as ops
from fastgen.random import Generator
from fastgen.reference.recurrent import Mode

MODES = list(Mode)


def stacked(mode=Mode.LSTM, dtype=torch.float64, layers=3, bidirectional=False, **options):
    case = Case(mode, 4, 5, num_layers=layers, bidirectional=bidirectional, lengths=(3, 3), **options)
    x, hx = case.operands(dtype)
    return case, x, hx, list(case.module(dtype)._flat_weights)


def run(case, x, hx, weights, p=0.5, training=True, generator=None, **options):
    return SEQUENCES[case.mode][1](
        x,
        hx if hx is None or case.mode == Mode.LSTM else hx[0],
        weights,
        case.bias,
        case.num_layers,
        p,
        training,
        case.bidirectional,
        case.batch_first,
        batch_sizes=case.batch_sizes,
        generator=generator,
        **options,
    )


# ---------------------------------------------------------------------------------------------------
# One step: a cell


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_one_step_is_torchs_and_takes_the_cell(mode, bidirectional, batch_first, monkeypatch):
    case = Case(mode, 4, 5, num_layers=2, bidirectional=bidirectional, batch_first=batch_first, lengths=(1, 1, 1))
    x, hx = case.operands(torch.float64)
    module = case.module(torch.float64)
    taken, real = [], ops._cell
    monkeypatch.setattr(ops, "_cell", lambda *given: taken.append(given) or real(*given))
    x.requires_grad_()
    output, *states = run(case, x, hx, list(module._flat_weights), 0.0)
    assert len(taken) == (4 if bidirectional else 2)
    expected, expected_states = module(x, hx if mode == Mode.LSTM else hx[0])
    expected_states = expected_states if mode == Mode.LSTM else (expected_states,)
    for ours, theirs in zip((output, *states), (expected, *expected_states), strict=False):
        torch.testing.assert_close(ours, theirs)
    wanted = (x, *module.parameters())
    for ours, theirs in zip(
        torch.autograd.grad(output.square().sum() + states[0].sum(), wanted),
        torch.autograd.grad(expected.square().sum() + expected_states[0].sum(), wanted),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def test_the_output_of_one_step_does_not_change_with_its_state():
    case, x, hx, weights = stacked(Mode.GRU, layers=1)
    output, h_n = run(case, x[:1], hx, weights, 0.0)
    before = h_n.clone()
    output.zero_()
    assert_same_bits(h_n, before)


# ---------------------------------------------------------------------------------------------------
# Dropout between layers


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("mode", MODES)
def test_dropout_is_that_of_the_stream(mode, dtype):
    """Layer by layer by hand: element i of what enters a layer survives by element i of the generator's stream."""
    case, x, hx, weights = stacked(mode, dtype, bidirectional=True)
    g = Generator(7, 3)
    got = run(case, x, hx, weights, 0.25, generator=g)
    h = Generator(7, 3)
    one, outputs = Case(mode, bidirectional=True, lengths=case.lengths), x
    for layer in range(3):
        if layer:
            mask = random.dropout_mask(outputs.shape, p=0.25, generator=h)
            outputs = outputs * mask / 0.75
        states = tuple(s[2 * layer : 2 * layer + 2] for s in hx)
        outputs, *_ = run(one, outputs, states, weights[8 * layer : 8 * layer + 8], 0.0)
    torch.testing.assert_close(got[0], outputs)
    assert g.offset == h.offset
    grads = torch.autograd.grad(got[0].sum(), [x, *weights]), torch.autograd.grad(outputs.sum(), [x, *weights])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_dropout_is_repeatable_and_off_outside_training():
    case, x, hx, weights = stacked()
    off = run(case, x, hx, weights, 0.5, training=False)
    assert_same_bits(off[0], run(case, x, hx, weights, 0.0)[0])
    torch.manual_seed(0)
    first, second = run(case, x, hx, weights)[0], run(case, x, hx, weights)[0]
    assert not torch.equal(first, second)
    assert not torch.equal(first, off[0])
    torch.manual_seed(0)
    assert_same_bits(run(case, x, hx, weights)[0], first)
    g = torch.Generator().manual_seed(4)
    third = run(case, x, hx, weights, generator=g)[0]
    assert_same_bits(run(case, x, hx, weights, generator=torch.Generator().manual_seed(4))[0], third)


def test_dropout_does_not_depend_on_threads_or_on_the_layout_of_others(threads):
    case, x, hx, weights = stacked(layers=2)
    threads(1)
    one = run(case, x, hx, weights, generator=Generator(1))[0]
    threads(3)
    torch.testing.assert_close(run(case, x, hx, weights, generator=Generator(1))[0], one, rtol=1e-12, atol=1e-12)


def test_dropout_of_one_is_a_layer_without_input():
    case, x, hx, weights = stacked(layers=2)
    got = run(case, x, hx, weights, 1.0)
    alone = Case(lengths=case.lengths, input_size=5)
    want = run(alone, torch.zeros(3, 2, 5, dtype=x.dtype), tuple(h[1:] for h in hx), weights[4:], 0.0)
    torch.testing.assert_close(got[0], want[0])
    (grad,) = torch.autograd.grad(got[0].sum(), [x])
    assert not grad.any()


def test_dropout_is_differentiable_twice_and_under_transforms():
    case, x, hx, weights = stacked(layers=2)

    def function(x, w):
        return run(case, x, hx, [w, *weights[1:]], generator=Generator(5))[0]

    leaves = (x, weights[0].detach().requires_grad_())
    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)
    xs = torch.stack([x.detach(), -x.detach()])
    got = torch.vmap(lambda v: function(v, leaves[1]), randomness="same")(xs)
    torch.testing.assert_close(got, torch.stack([function(v, leaves[1]) for v in xs]))
    pushed = torch.func.jvp(lambda v: function(v, leaves[1].detach()), (x.detach(),), (torch.ones_like(x),))[1]
    grad = torch.autograd.grad(function(*leaves).sum(), [x])[0].sum()
    torch.testing.assert_close(pushed.sum(), grad)


# ---------------------------------------------------------------------------------------------------
# States and precision


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("proj_size", [0, 2])
def test_no_states_are_zeros(mode, proj_size):
    if proj_size and mode != Mode.LSTM:
        pytest.skip("a projection is the LSTM's")
    case, x, hx, weights = stacked(mode, layers=2, bidirectional=True, proj_size=proj_size)
    zeros = tuple(torch.zeros_like(h) for h in hx)
    for a, b in zip(run(case, x, None, weights, 0.0), run(case, x, zeros, weights, 0.0), strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("target", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
def test_autocast(mode, target, given):
    """All operands go to the autocast dtype, as torch's LSTM does it; gradients come back in their own."""
    case, x, hx, weights = stacked(mode, given, layers=2)
    with torch.autocast("cpu", dtype=target):
        got = run(case, x, hx, weights, 0.0)
    want = run(case, x.to(target), tuple(h.to(target) for h in hx), [w.to(target) for w in weights], 0.0)
    for a, b in zip(got, want, strict=True):
        assert_same_bits(a.detach(), b.detach())
    grads = torch.autograd.grad(got[0].sum(), [x, *weights])
    assert {g.dtype for g in grads} == {given}
    cell = CELLS[mode][1]
    states = tuple(h[0] for h in hx) if mode == Mode.LSTM else hx[0][0]
    with torch.autocast("cpu", dtype=target):
        out = cell(x[0], states, *weights[:4])
    assert (out[0] if mode == Mode.LSTM else out).dtype == target


def test_autocast_leaves_float64_alone():
    case, x, hx, weights = stacked(layers=1)
    with torch.autocast("cpu"):
        got = run(case, x, hx, weights, 0.0)
        assert_same_bits(got[0], run(case, x, hx, weights, 0.0)[0])
    assert got[0].dtype == torch.float64


# ---------------------------------------------------------------------------------------------------
# Errors


def wrong_sequences():
    def case(name, error, match, **changes):
        return pytest.param(error, match, changes, id=name)

    return [
        case("input", TypeError, "input: expected a tensor, got list", input=[1.0]),
        case("integers", ValueError, "input: expected float32, .*, got int64", input=torch.ones(3, 2, 4).long()),
        case("dims", RuntimeError, r"input: expected 3 dimensions, got \(3, 4\)", input=torch.ones(3, 4)),
        case("steps", RuntimeError, "sequence length to be larger than 0", input=torch.ones(0, 2, 4)),
        case("features", RuntimeError, r"w_ih: expected shape \(20, 3\), got \(20, 4\)", input=torch.ones(3, 2, 3)),
        case("dtype", ValueError, "h_0: expected torch.float64 as input is", input=torch.ones(3, 2, 4).double()),
        case("one state", RuntimeError, r"hx: expected two states .*, got 1 values", hx=(torch.ones(2, 2, 5),)),
        case("states", RuntimeError, r"hx: expected two states .*, got a tensor", hx=torch.ones(2, 2, 5)),
        case("rows", RuntimeError, r"h_0: expected shape \(2, 2, 5\), got \(2, 3, 5\)", hx=(torch.ones(2, 3, 5),) * 2),
        case(
            "units",
            RuntimeError,
            r"c_0: expected shape \(2, 2, 5\), got \(2, 2, 4\)",
            hx=(torch.ones(2, 2, 5), torch.ones(2, 2, 4)),
        ),
        case("layers", RuntimeError, "flat_weights: expected 4 or 5 tensors for each of 3 layers", num_layers=3),
        case("no layers", RuntimeError, "flat_weights: expected 4", num_layers=0),
        case("no bias", RuntimeError, "flat_weights: expected 2 or 3 tensors", bias=False, drop=3),
        case("probability", ValueError, "dropout: expected a probability from 0 to 1, got 1.5", dropout=1.5),
        case("generator", TypeError, "generator: expected a fastgen.random.Generator", generator=3),
        case(
            "mask",
            RuntimeError,
            r"state_dropout_mask: expected shape \(2, 2, 5\), got \(2, 5\)",
            state_dropout_mask=torch.ones(2, 5),
        ),
        case(
            "mask with gradient",
            RuntimeError,
            "state_dropout_mask: expected a tensor without gradient",
            state_dropout_mask=torch.ones(2, 2, 5, requires_grad=True),
        ),
        case("packed dims", RuntimeError, r"input: expected 2 dimensions", batch_sizes=torch.tensor([2, 1])),
        case(
            "batch_sizes",
            RuntimeError,
            "batch_sizes: expected int64",
            input=torch.ones(3, 4),
            batch_sizes=torch.tensor([2, 1], dtype=torch.int32),
        ),
        case(
            "no batch_sizes",
            RuntimeError,
            "batch_sizes: expected at least one step",
            input=torch.ones(3, 4),
            batch_sizes=torch.tensor([], dtype=torch.int64),
        ),
        case(
            "packed rows",
            RuntimeError,
            r"h_0: expected shape \(2, 3, 5\), got \(2, 2, 5\)",
            input=torch.ones(4, 4),
            batch_sizes=torch.tensor([3, 1]),
        ),
        case(
            "sum of batch_sizes",
            RuntimeError,
            "batch_sizes|split",
            input=torch.ones(4, 4),
            batch_sizes=torch.tensor([2, 1]),
        ),
        case(
            "ascending batch_sizes",
            RuntimeError,
            "batch_sizes",
            input=torch.ones(5, 4),
            batch_sizes=torch.tensor([2, 3]),
        ),
    ]


@pytest.mark.parametrize(("error", "match", "changes"), wrong_sequences())
def test_errors_of_sequences(error, match, changes):
    module = torch.nn.LSTM(4, 5, 2)
    arguments = {
        "input": torch.ones(3, 2, 4),
        "hx": (torch.zeros(2, 2, 5), torch.zeros(2, 2, 5)),
        "flat_weights": module._flat_weights,
        "bias": True,
        "num_layers": 2,
        "dropout": 0.5,
        "training": True,
        "bidirectional": False,
    }
    drop = changes.pop("drop", 0)
    arguments |= changes
    if drop:
        arguments["flat_weights"] = arguments["flat_weights"][:-drop]
    with pytest.raises(error, match=match):
        functional.lstm(**arguments)


@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize("mode", MODES)
def test_a_wrong_weight_is_named(mode, place):
    case, x, hx, weights = stacked(mode, layers=1)
    name = ("w_ih", "w_hh", "b_ih", "b_hh")[place]
    for wrong, error in ((weights[place][:-1], RuntimeError), (weights[place].float(), ValueError)):
        changed = [wrong if i == place else w for i, w in enumerate(weights)]
        with pytest.raises(error, match=f"{name}: expected"):
            run(case, x, hx, changed, 0.0)
        states = tuple(h[0] for h in hx) if mode == Mode.LSTM else hx[0][0]
        with pytest.raises(error, match=f"{name}: expected"):
            CELLS[mode][1](x[0], states, *changed)
    with pytest.raises(TypeError, match=f"({name}|flat_weights): expected a tensor, got int"):
        run(case, x, hx, [1 if i == place else w for i, w in enumerate(weights)], 0.0)


def test_errors_of_projections():
    case, x, hx, weights = stacked(layers=1, proj_size=2)
    with pytest.raises(RuntimeError, match=r"w_hr: expected shape \(2, 5\), got \(1, 5\)"):
        run(case, x, hx, [*weights[:4], weights[4][:1]], 0.0)
    with pytest.raises(RuntimeError, match=r"c_0: expected shape \(1, 2, 2\), got \(1, 2, 5\)"):
        run(case, x, hx, weights[:4], 0.0)


def test_errors_of_cells():
    w = torch.nn.LSTMCell(4, 5)
    weights = (w.weight_ih, w.weight_hh, w.bias_ih, w.bias_hh)
    x, h = torch.ones(2, 4), torch.ones(2, 5)
    for error, match, call in (
        (TypeError, "input: expected a tensor", lambda: functional.lstm_cell(1, (h, h), *weights)),
        (RuntimeError, "input: expected 2 dimensions", lambda: functional.lstm_cell(x[0], (h[0], h[0]), *weights)),
        (RuntimeError, "hx: expected two states", lambda: functional.lstm_cell(x, h, *weights)),
        (RuntimeError, r"h: expected shape \(2, 5\)", lambda: functional.lstm_cell(x, (h[:1], h), *weights)),
        (RuntimeError, r"c: expected shape \(2, 5\)", lambda: functional.lstm_cell(x, (h, h[:1]), *weights)),
        (RuntimeError, "b_ih, b_hh: expected both", lambda: functional.lstm_cell(x, (h, h), *weights[:3])),
        (ValueError, "h: expected torch.float32", lambda: functional.lstm_cell(x, (h.double(), h), *weights)),
        (RuntimeError, "w_ih: expected shape", lambda: functional.lstm_cell(x[:, :3], (h, h), *weights)),
        (TypeError, "h: expected a tensor, got NoneType", lambda: functional.lstm_cell(x, (None, h), *weights)),
        (RuntimeError, "w_ih: expected shape", lambda: functional.gru_cell(x, h, *weights)),
    ):
        with pytest.raises(error, match=match):
            call()


def test_few_calls_around_the_op():
    """A small call is mostly overhead: one op, and no copy, for one layer and for a cell."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.seen.append(str(function))
            return function(*args, **(kwargs or {}))

    def ops_of(call):
        with torch.no_grad(), Count() as count:
            count.seen = []
            call()
        return count.seen

    case, x, hx, weights = stacked(layers=1)
    states = (hx[0][0], hx[1][0])
    one = functools.partial(functional.lstm_cell, x[0].detach(), states, *weights)
    assert ops_of(one) == ["fastgen.recurrent_cell.default"]
    sequence = [name for name in ops_of(lambda: run(case, x, None, weights, 0.0)) if "unsqueeze" not in name]
    assert sequence == ["aten.new_zeros.default", "fastgen.recurrent.default"]
