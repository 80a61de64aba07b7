"""The recurrent ops themselves: PyTorch's own checks, the reference beside the kernels, torch.compile."""

from __future__ import annotations

import pytest
import torch
from recurrent_cases import CELLS, EXAMPLES, SEQUENCES, Case, taking
from support import FLOATS, call, needs_inductor
from torch._dynamo.testing import CompileCounterWithBackend

from fastgen import functional, nn, reference
from fastgen._ops import recurrent as recurrent_ops
from fastgen.random import Generator
from fastgen.reference._work import work_dtype
from fastgen.reference.recurrent import Mode

MODES = list(Mode)
ALL = 0b111111111111
FORWARD = {  # name -> does a step exist that other rows do not share, and so on: one example of each kind
    "padded": {},
    "batch_first": {"batch_first": True},
    "packed": {"packed": True},
    "masked": {"masked": True},
    "no bias": {"bias": False},
}


def sequence_arguments(mode: Mode, dtype: torch.dtype, reverse: bool = False, proj_size: int = 0, **kind: bool):
    """Arguments of `recurrent` with save=True, for 3 rows of up to 4 steps."""
    draw = torch.Generator().manual_seed(int(mode))

    def normal(*shape: int) -> torch.Tensor:
        return (0.5 * torch.randn(shape, generator=draw, dtype=torch.float64)).to(dtype)

    hidden, width, rows, steps = 5, 4, 3, 4
    state, wide = proj_size or hidden, mode.gates * hidden
    batch_first, bias = kind.get("batch_first", False), kind.get("bias", True)
    lengths = (steps, 2, 1) if kind.get("packed") else (steps,) * rows
    if kind.get("packed"):
        x = normal(sum(lengths), width)
    else:
        x = normal(*((rows, steps) if batch_first else (steps, rows)), width)
    return (
        int(mode),
        x,
        torch.tensor([sum(n > t for n in lengths) for t in range(steps)]) if kind.get("packed") else None,
        normal(wide, width),
        normal(wide, state),
        normal(wide) if bias else None,
        normal(wide) if bias else None,
        normal(proj_size, hidden) if proj_size else None,
        normal(rows, state),
        normal(rows, hidden) if mode == Mode.LSTM else None,
        (normal(rows, state) > 0).to(dtype) * 2 if kind.get("masked") else None,
        batch_first,
        reverse,
        True,
    )


def norm_and_zoneout(mode: Mode, norm: bool, drawn: bool) -> tuple:
    """What follows `save` in the arguments of `recurrent`."""
    sizes = (20, 20, 5, 5) if norm else ()
    weights = [torch.linspace(0.5, 1.5, n) for n in sizes] or [None] * 4
    zoneout = (0.4 if mode == Mode.LSTM else 0.0, 0.3)
    return (*weights, torch.tensor([7, 2]) if drawn else None, 1e-5, *zoneout)


def layers_arguments(mode: Mode, dtype: torch.dtype, save: bool = True, dropout: float = 0.0, **kind: bool) -> tuple:
    """Arguments of `recurrent_layers`, for three layers with the states and the mask of `sequence_arguments`."""
    _, x, sizes, *weights, _, h, c, mask, batch_first, _, _ = sequence_arguments(mode, dtype, **kind)
    weights = [w for w in weights if w is not None]
    upper = [weights[1] / 2, *weights[1:]]
    states = [None if state is None else torch.stack((state, -state, state / 2)) for state in (h, c, mask)]
    draws = torch.tensor([[7, 2], [7, 900]]) if dropout else None
    return int(mode), x, sizes, [*weights, *upper, *upper], *states, batch_first, save, draws, dropout


def backward_arguments(arguments: tuple, needs: int = ALL, absent: tuple[int, ...] = ()) -> tuple:
    """Arguments of `recurrent_backward` after `arguments` of `recurrent`, with ones for all gradients but `absent`."""
    mode, *operands, batch_first, reverse, _ = arguments[:14]
    output, h_n, c_n, gates, cells = reference.recurrent(*arguments)
    grads = [torch.ones_like(y) if i not in absent else None for i, y in enumerate((output, h_n, c_n))]
    if mode != Mode.LSTM:
        grads[2] = None
    return (mode, *grads, *operands, output, gates, cells, batch_first, reverse, needs, *arguments[14:])


def cell_arguments(mode: Mode, dtype: torch.dtype, rows: int = 3, bias: bool = True) -> tuple:
    _, x, _, w_ih, w_hh, b_ih, b_hh, _, h, c, _, _, _, _ = sequence_arguments(mode, dtype, bias=bias)
    return int(mode), x[0][:rows], h[:rows], None if c is None else c[:rows], w_ih, w_hh, b_ih, b_hh, True


def cell_backward_arguments(arguments: tuple, absent: tuple[int, ...] = (), needs: int = 0b1111111) -> tuple:
    """Arguments of `recurrent_cell_backward` after `arguments` of `recurrent_cell`."""
    mode, *operands, _ = arguments
    _, _, gates, cells = reference.recurrent_cell(*arguments)
    h, c = operands[1:3]
    grads = [None if i in absent else torch.ones_like(h) for i in range(2)]
    return mode, grads[0], grads[1] if c is not None else None, *operands, gates, cells, needs


def samples() -> list[tuple[str, tuple]]:
    out: list[tuple[str, tuple]] = []
    for mode in MODES:
        for dtype in FLOATS:
            arguments = sequence_arguments(mode, dtype)
            out += [("recurrent", (*arguments[:-1], False)), ("recurrent_cell", cell_arguments(mode, dtype))]
            out += [("recurrent_cell_backward", cell_backward_arguments(cell_arguments(mode, dtype)))]
        for kind in FORWARD.values():
            for reverse in (False, True):
                arguments = sequence_arguments(mode, torch.float32, reverse, **kind)
                out += [("recurrent", arguments), ("recurrent_backward", backward_arguments(arguments))]
            out += [("recurrent_layers", layers_arguments(mode, torch.float32, dropout=0.4, **kind))]
        out += [
            ("recurrent_layers", layers_arguments(mode, torch.float16, save=False)),
            ("recurrent_layers", layers_arguments(mode, torch.float32)),
            ("recurrent_backward", backward_arguments(arguments, needs=0b01000110)),
            ("recurrent_backward", backward_arguments(arguments, absent=(0,))),
            ("recurrent_cell", cell_arguments(mode, torch.float32, bias=False)),
            ("recurrent_cell", (*cell_arguments(mode, torch.float16)[:-1], False)),
            ("recurrent_cell", cell_arguments(mode, torch.float32, rows=0)),
            ("recurrent_cell_backward", cell_backward_arguments(cell_arguments(mode, torch.float32), absent=(1,))),
            ("recurrent_cell_backward", cell_backward_arguments(cell_arguments(mode, torch.float32), needs=0b0101010)),
            ("recurrent_cell_backward", cell_backward_arguments(cell_arguments(mode, torch.float32, bias=False))),
        ]
    for mode, norm, drawn, packed, proj_size in (
        (Mode.LSTM, True, False, False, 0),
        (Mode.LSTM, True, True, True, 2),
        (Mode.LSTM, False, True, False, 2),
        (Mode.GRU, False, True, True, 0),
        (Mode.RNN_TANH, False, False, False, 0),
    ):
        options = norm_and_zoneout(mode, norm, drawn)
        arguments = (*sequence_arguments(mode, torch.float32, proj_size=proj_size, packed=packed), *options)
        out += [("recurrent", arguments), ("recurrent_backward", backward_arguments(arguments))]
        *step, _ = cell_arguments(mode, torch.float32)
        out += [("recurrent_step", (*step, *options[:4], *options[5:]))]
    for packed in (False, True):
        arguments = sequence_arguments(Mode.LSTM, torch.float32, proj_size=2, packed=packed)
        out += [("recurrent", arguments), ("recurrent_backward", backward_arguments(arguments))]
    return out


@pytest.mark.parametrize("name", recurrent_ops.SCHEMAS)
def test_opcheck(name):
    """Schema (nothing is written or aliased), fake kernel (shapes, strides, dtypes) and dispatch."""
    op = getattr(torch.ops.fastgen, name).default
    mine = [args for op, args in samples() if op == name]
    for args in mine:
        torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor", "test_autograd_registration"))
    torch.library.opcheck(op, mine[-1])  # the slow one, with symbolic sizes


def test_reference_has_the_strides_that_the_fake_kernels_promise():
    for name, args in samples():
        on_meta = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in args]
        promised, got = getattr(torch.ops.fastgen, name)(*on_meta), getattr(reference, name)(*args)
        for x, y in zip(got, promised, strict=True):
            assert (x.shape, x.dtype, x.stride()) == (y.shape, y.dtype, y.stride()), name


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("kind", FORWARD.values(), ids=FORWARD)
@pytest.mark.parametrize("mode", MODES)
def test_the_backward_formulas_are_the_derivative(mode, kind, reverse):
    """The reference's written-out backward against autograd through its forward."""
    for proj_size in (0, 2) if mode == Mode.LSTM else (0,):
        arguments = sequence_arguments(mode, torch.float64, reverse, proj_size, **kind)
        leaves = [None if x is None else x.requires_grad_() for x in (arguments[1], *arguments[3:10])]
        outputs = reference.recurrent(*arguments)[: 3 if mode == Mode.LSTM else 2]
        grads = [torch.randn_like(y) for y in outputs]
        present = [x for x in leaves if x is not None]
        want = iter(torch.autograd.grad(outputs, present, grads))
        given = list(backward_arguments(tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in arguments)))
        given[1 : 1 + len(grads)] = grads
        for x, found in zip(leaves, reference.recurrent_backward(*given), strict=False):  # of the norms there are none
            if x is None:
                assert found.shape == (0,)
            else:
                torch.testing.assert_close(found, next(want))


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_layers_at_once_are_layers_one_by_one(mode, packed, dropout, monkeypatch):
    """The function and its derivatives by the op for all layers, against those by an op a layer: same noise, too."""
    case = Case(mode, num_layers=3, packed=packed, lengths=(4, 2, 1) if packed else (4, 4), masked=True, seed=5)

    def run():
        (x, hx), weights = case.operands(), case.weights()
        results = case.ours(x, hx, weights, dropout=dropout, generator=Generator(3))
        assert torch.autograd.gradcheck(lambda *w: case.ours(x, hx, list(w)), weights, fast_mode=True)
        loss = sum((y * torch.linspace(-1, 1, y.numel()).to(y).view_as(y)).sum() for y in results)
        first = torch.autograd.grad(loss, [x, *hx, *weights], retain_graph=True)
        again = torch.autograd.grad(loss, [x, *hx, *weights], create_graph=True)
        return *results, *first, *again, *torch.autograd.grad(sum((g * g).sum() for g in again), x)

    with taking("reference"):
        want = run()
        monkeypatch.setattr(recurrent_ops, "at_once", lambda *_: True)
        got = run()
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_only_the_gradients_that_are_wanted(monkeypatch):
    monkeypatch.setattr(recurrent_ops, "at_once", lambda *_: True)
    case = Case(num_layers=2)
    (x, hx), weights = case.operands(), case.weights()
    every = torch.autograd.grad(case.ours(x, hx, weights)[1].sum(), [x, *hx, *weights])
    for i in range(len(every)):
        leaves = [leaf.detach() for leaf in (x, *hx, *weights)]
        leaves[i].requires_grad_()
        out = case.ours(leaves[0], tuple(leaves[1:3]), leaves[3:])
        torch.testing.assert_close(torch.autograd.grad(out[1].sum(), leaves[i])[0], every[i])


@needs_inductor
def test_layers_at_once_compile(monkeypatch):
    monkeypatch.setattr(recurrent_ops, "at_once", lambda *_: True)
    case = Case(num_layers=2, states=False)
    (x, hx), weights = case.operands(torch.float32), case.weights(torch.float32)

    def step(x, *weights):
        return case.ours(x, hx, list(weights), dropout=0.5, generator=Generator(1))[0]

    counter = CompileCounterWithBackend("inductor")
    found = []
    for f in (step, torch.compile(step, fullgraph=True, backend=counter)):
        y = f(x, *weights)
        found.append((y, *torch.autograd.grad(y.square().sum(), [x, *weights])))
    assert counter.frame_count == 1
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)
    torch.compiler.reset()


@pytest.mark.parametrize("mode", MODES)
def test_the_backward_of_a_step_is_the_derivative(mode):
    """The reference's written-out backward against autograd through its forward."""
    arguments = cell_arguments(mode, torch.float64)
    leaves = [x.requires_grad_() for x in arguments[1:-1] if x is not None]
    outputs = reference.recurrent_cell(*arguments)[: 2 if mode == Mode.LSTM else 1]
    grads = [torch.randn_like(y) for y in outputs]
    want = torch.autograd.grad(outputs, leaves, grads)
    plain = tuple(x.detach() if isinstance(x, torch.Tensor) else x for x in arguments)
    _, _, *saved = reference.recurrent_cell(*plain)
    found = reference.recurrent_cell_backward(mode, *(*grads, None)[:2], *plain[1:-1], *saved, 0b1111111)
    for got, exact in zip((x for x in found if x.numel()), want, strict=True):
        torch.testing.assert_close(got, exact)


@pytest.mark.parametrize("name", recurrent_ops.SCHEMAS)
def test_kernels_agree_with_the_reference(isa, name):
    """Either backward follows either forward: the saved tensors mean the same."""
    for op, args in samples():
        if op != name:
            continue
        got, want = call(name, isa, *args), call(name, "reference", *args)
        for a, b in zip(got, want, strict=True):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
            # The state that enters the next product may be rounded to the storage dtype.
            unit = torch.finfo(args[1].dtype if args[1] is not None else args[2].dtype).eps
            torch.testing.assert_close(a, b, rtol=16 * unit, atol=16 * unit, check_dtype=False)


WRONG = [
    lambda a: (4, *a[1:]),
    lambda a: (-1, *a[1:]),
    lambda a: (a[0], a[1].long(), *a[2:]),
    lambda a: (a[0], a[1][0], *a[2:]),
    lambda a: (a[0], a[1][..., :3], *a[2:]),
    lambda a: (a[0], a[1].double(), *a[2:]),
    lambda a: (*a[:3], a[3][:-1], *a[4:]),
    lambda a: (*a[:4], a[4][:, :-1], *a[5:]),
    lambda a: (*a[:5], a[5][:-1], *a[6:]),
    lambda a: (*a[:8], a[8][:1], *a[9:]),
    lambda a: (*a[:8], a[8][:, :2], *a[9:]),
    lambda a: (*a[:9], None, *a[10:]),
    lambda a: (*a[:9], a[9][:1], *a[10:]),
    lambda a: (*a[:10], a[8][:1], *a[11:]),
]


@pytest.mark.parametrize("wrong", range(len(WRONG)))
def test_a_kernel_called_past_its_python_function_still_checks(isa, wrong):
    """Whatever arrives, it neither reads nor writes out of bounds: it raises."""
    with pytest.raises(RuntimeError):
        call("recurrent", isa, *WRONG[wrong](sequence_arguments(Mode.LSTM, torch.float32)))


@pytest.mark.parametrize(
    "sizes", [[3, 2, 2, 1], [3, 1, 1, 1], [2, 2, 1, 2], [3, 3, 2], [4, 1, 1, 1], [3, 4, 0, 0], [-1, 8]]
)
def test_a_kernel_checks_batch_sizes(isa, sizes):
    arguments = sequence_arguments(Mode.LSTM, torch.float32, packed=True)
    with pytest.raises(RuntimeError, match="batch_sizes"):
        call("recurrent", isa, *arguments[:2], torch.tensor(sizes), *arguments[3:])


# ---------------------------------------------------------------------------------------------------
# torch.compile


@pytest.fixture
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


inductor = {"marks": [pytest.mark.slow, needs_inductor]}


def gradients(outputs, leaves):
    return torch.autograd.grad(sum(y.square().sum() for y in outputs), leaves)


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize(
    ("mode", "backend"), [*((mode, "aot_eager") for mode in MODES), pytest.param(Mode.LSTM, "inductor", **inductor)]
)
def test_compiled_with_any_number_of_steps(mode, backend):
    """No graph break, one graph for every T; values, gradients and dropout are those of eager mode."""

    def function(g, x, *weights):
        return SEQUENCES[mode][1](x, None, weights, True, 2, 0.5, True, False, generator=g)

    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(function, fullgraph=True, backend=counter, dynamic=True)
    weights = [w.detach().requires_grad_() for w in Case(mode, num_layers=2).module()._flat_weights]
    for steps in (6, 7, 9):  # none the size of something else, which Dynamo would take for its equal
        x = torch.randn(steps, 3, 4, dtype=torch.float64, requires_grad=True)
        got, want = (f(Generator(3), x, *weights) for f in (compiled, function))
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)
        for a, b in zip(gradients(got, [x, *weights]), gradients(want, [x, *weights]), strict=True):
            torch.testing.assert_close(a, b)
    with torch.no_grad():
        torch.testing.assert_close(compiled(Generator(3), x, *weights)[0], want[0])
    assert counter.frame_count <= 2  # with and without gradients


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("states", [False, True])
def test_compiled_packed_sequences(states):
    case = Case(bidirectional=True, packed=True)
    weights = [w.detach().requires_grad_() for w in case.module()._flat_weights]

    def function(x, sizes, *hx):
        return functional.lstm(x, hx or None, weights, True, 1, 0.0, True, True, batch_sizes=sizes)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    hx = [torch.randn(2, 3, 5, dtype=torch.float64) for _ in range(2)] if states else []
    for lengths in ((4, 2, 1), (6, 5, 5), (3, 3, 2)):
        sizes = torch.tensor([sum(n > t for n in lengths) for t in range(lengths[0])])
        x = torch.randn(sum(lengths), 4, dtype=torch.float64, requires_grad=True)
        got, want = compiled(x, sizes, *hx), function(x, sizes, *hx)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)
        for a, b in zip(gradients(got, [x, *weights]), gradients(want, [x, *weights]), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("mode", MODES)
def test_compiled_cells(mode):
    """A loop over a cell, with one tensor for both states at its start."""
    weights = [w.detach().requires_grad_() for w in Case(mode).module()._flat_weights]
    cell = CELLS[mode][1]

    def function(x, h):
        states = (h, h) if mode == Mode.LSTM else h
        for step in x:
            states = cell(step, states, *weights)
        return states if mode == Mode.LSTM else (states,)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    x, h = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((3, 2, 4), (2, 5)))
    got, want = compiled(x, h), function(x, h)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
    for a, b in zip(gradients(got, [x, h, *weights]), gradients(want, [x, h, *weights]), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.usefixtures("fresh")
def test_compiled_under_autocast_and_transforms():
    weights = [w.detach() for w in Case().module(torch.float32)._flat_weights]

    def function(x):
        return functional.lstm(x, None, weights, True, 1, 0.0, True, False)[0]

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 2, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = compiled(x)
        torch.testing.assert_close(got, function(x))
    assert got.dtype == torch.bfloat16
    mapped = torch.compile(torch.vmap(function), fullgraph=True, backend="aot_eager")
    xs = torch.stack([x, -x])
    torch.testing.assert_close(mapped(xs), torch.stack([function(x), function(-x)]))


def test_export():
    weights = torch.nn.ParameterList(Case().module()._flat_weights)

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weights = weights

        def forward(self, x):
            return functional.lstm(x, None, list(self.weights), True, 1, 0.0, False, False)[0]

    model, x = Model(), torch.randn(5, 2, 4, dtype=torch.float64)
    exported = torch.export.export(model, (x,), dynamic_shapes={"x": {0: torch.export.Dim("T")}}).module()
    for steps in (5, 3):
        torch.testing.assert_close(exported(x[:steps]), model(x[:steps]))


def test_a_saved_export_takes_any_batch_and_length(tmp_path):
    model = nn.GRU(4, 3, batch_first=True).eval()
    x = torch.randn(5, 6, 4)
    shapes = {"input": {0: torch.export.Dim("B"), 1: torch.export.Dim("T")}}
    torch.export.save(torch.export.export(model, (x,), dynamic_shapes=shapes), tmp_path / "gru.pt2")
    loaded = torch.export.load(tmp_path / "gru.pt2").module()
    for rows, steps in ((5, 6), (2, 3)):
        torch.testing.assert_close(loaded(x[:rows, :steps]), model(x[:rows, :steps]))


def test_every_example_runs_on_meta_tensors():
    for case in EXAMPLES:
        module = case.module()
        x, hx = case.operands()
        on_meta = [None if hx is None else tuple(h.detach().to("meta") for h in hx)]
        weights = [w.detach().to("meta").requires_grad_() for w in module._flat_weights]
        outputs = case.ours(x.detach().to("meta"), *on_meta, weights) if not case.masked else ()
        for a, b in zip(outputs, case.theirs(x, hx, module) if not case.masked else (), strict=True):
            assert a.is_meta
            assert a.shape == b.shape
        if outputs:
            assert [g.shape for g in gradients(outputs, weights)] == [w.shape for w in weights]


def test_work_dtype():
    assert [work_dtype(d) for d in FLOATS] == [torch.float32, torch.float64, torch.float32, torch.float32]
