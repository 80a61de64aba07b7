"""Gradients of the recurrent functions to every order and by every road; what a training step keeps."""

from __future__ import annotations

import pytest
import torch
from recurrent_cases import CELLS, EXAMPLES, WHOLE_ROWS, Case, taking, without_onednn
from support import FLOATS
from torch.autograd import forward_ad

from fastgen._ops import recurrent as ops
from fastgen.reference.recurrent import Mode

MODES = list(Mode)


def leaves_of(case: Case, dtype: torch.dtype = torch.float64):
    """(input, states or None, weights), all requiring gradients, and a function of them in one row."""
    x, hx = case.operands(dtype)
    weights = case.weights(dtype)
    count = len(hx or ())

    def function(x, *rest):
        return case.ours(x, rest[:count] if count else None, list(rest[count:]))

    return function, (x, *(hx or ()), *weights)


def cell_leaves(mode: Mode):
    draw = torch.Generator().manual_seed(int(mode))

    def normal(*shape):
        return torch.randn(shape, generator=draw, dtype=torch.float64).requires_grad_()

    rows = mode.gates * 3
    states = [normal(2, 3) for _ in range(2 if mode == Mode.LSTM else 1)]

    def function(x, *rest):
        states, weights = rest[:-4], rest[-4:]
        return CELLS[mode][1](x, states if mode == Mode.LSTM else states[0], *weights)

    return function, (normal(2, 4), *states, normal(rows, 4), normal(rows, 3), normal(rows), normal(rows))


@pytest.mark.parametrize("case", EXAMPLES + WHOLE_ROWS, ids=str)
def test_gradcheck(path, case):
    function, leaves = leaves_of(case)
    with taking(path):
        assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("case", EXAMPLES + WHOLE_ROWS, ids=str)
def test_gradgradcheck(case):
    """By whatever path the first order goes, the second goes through the reference."""
    function, leaves = leaves_of(case)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("mode", MODES)
def test_gradients_of_cells(path, mode):
    function, leaves = cell_leaves(mode)
    with taking(path):
        assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
        assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("case", EXAMPLES + WHOLE_ROWS, ids=str)
def test_a_gradient_is_the_same_with_and_without_a_graph(path, case, dtype):
    """create_graph=True goes another way (the reference) to the same numbers."""
    function, leaves = leaves_of(case, dtype)
    with taking(path):
        outputs = function(*leaves)
        grads = [torch.ones_like(y) for y in outputs]
        plain = torch.autograd.grad(outputs, leaves, grads, retain_graph=True)
        graph = torch.autograd.grad(outputs, leaves, grads, create_graph=True)
    for a, b in zip(plain, graph, strict=True):
        assert not a.requires_grad
        roundings = 64 if case.layer_norm else 8  # a norm divides by a deviation, which may be small
        tolerance = roundings * torch.finfo(dtype).eps * max(float(b.detach().abs().max()), 1)
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


@pytest.mark.parametrize("mode", MODES)
def test_gradient_penalty_through_operands_that_depend_on_each_other(path, mode):
    """One tensor in several places, and operands made of other operands: each road is followed once."""
    case = Case(mode, 3, 3, lengths=(3, 3))
    weights = [w.detach() for w in case.module()._flat_weights]
    x = case.operands()[0].detach()
    joined = [w.clone().requires_grad_() for w in weights]

    def penalty(forward):
        start = joined[1][:2, :3]  # the states come of the recurrent weights, the input of the states
        hx = (start[None], start[None]) if mode == Mode.LSTM else (start[None],)
        inputs = x * start.sum()
        bias = joined[2]
        outputs = forward(inputs, hx, [joined[0], joined[1], bias, bias])
        (to_input,) = torch.autograd.grad(outputs[0].square().sum(), [inputs], create_graph=True)
        return torch.autograd.grad(to_input.square().sum(), joined[:3])

    module = case.module()

    def theirs(inputs, hx, weights):
        names = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
        given = hx if mode == Mode.LSTM else hx[0]
        with without_onednn():
            return torch.func.functional_call(module, dict(zip(names, weights, strict=True)), (inputs, given))

    with taking(path):
        mine = penalty(case.ours)
    for a, b in zip(mine, penalty(theirs), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("case", EXAMPLES[:5] + EXAMPLES[-1:] + WHOLE_ROWS[1:3], ids=str)
def test_any_part_of_the_outputs_and_operands(path, case):
    """Gradients that never arrive, and operands that want none: the rest as if all had been asked for."""
    function, leaves = leaves_of(case)
    with taking(path):
        outputs = function(*leaves)
        weights = [torch.randn_like(y) for y in outputs]
        for chosen in range(len(outputs)):
            want = torch.autograd.grad(outputs[chosen], leaves, weights[chosen], retain_graph=True, allow_unused=True)
            zeros = [w if i == chosen else torch.zeros_like(w) for i, w in enumerate(weights)]
            full = torch.autograd.grad(outputs, leaves, zeros, retain_graph=True)
            for a, b in zip(want, full, strict=True):
                torch.testing.assert_close(torch.zeros_like(b) if a is None else a, b)
        everything = torch.autograd.grad(outputs, leaves, weights)
        for k, value in enumerate(everything):
            alone = [x.detach().requires_grad_(i == k) for i, x in enumerate(leaves)]
            (grad,) = torch.autograd.grad(function(*alone), [alone[k]], weights)
            torch.testing.assert_close(grad, value)


def test_an_output_without_a_gradient_costs_nothing():
    """Undefined gradients come as None, not as zeros."""
    seen = []
    original = ops._recurrent_backward

    def spy(mode, grad_output, grad_h_n, grad_c_n, *rest):
        seen.append([g is not None for g in (grad_output, grad_h_n, grad_c_n)])
        return original(mode, grad_output, grad_h_n, grad_c_n, *rest)

    function, leaves = leaves_of(Case())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "_recurrent_backward", spy)
        output, _, c_n = function(*leaves)
        output.sum().backward(retain_graph=True)
        c_n.sum().backward()
    assert seen == [[True, False, False], [False, False, True]]


# ---------------------------------------------------------------------------------------------------
# Memory


def saved_bytes(function, *args) -> int:
    """Bytes that a forward pass keeps for its backward pass, besides the arguments."""
    kept: dict[int, int] = {}
    given = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}

    def pack(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in given:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        output = function(*args)
    del output
    return sum(kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_a_training_step_keeps_no_more_than_torchs(mode, packed, dtype):
    case = Case(mode, 16, 32, lengths=(12, 9, 9, 5) if packed else (12,) * 4, packed=packed, num_layers=2)
    module = case.module(dtype)
    weights = list(module._flat_weights)
    x, hx = case.operands(dtype)
    args = (x, *hx, *weights)
    mine = saved_bytes(lambda x, *_: case.ours(x, hx, weights), *args)
    theirs = saved_bytes(lambda x, *_: case.theirs(x, hx, module), *args)
    tokens = sum(case.lengths)
    gates = 4 * 32 if mode in (Mode.LSTM, Mode.GRU) else 0
    cells = 32 * (8 if dtype == torch.float64 else 4) if mode == Mode.LSTM else 0
    # Two layers of output, gates and cells; the states and batch_sizes are small change.
    size = dtype.itemsize
    assert mine <= 2 * tokens * ((32 + gates) * size + cells) + 64 * 32 * size
    if dtype != torch.bfloat16 or mode != Mode.LSTM:  # there torch's oneDNN keeps a workspace that no hook sees
        assert mine <= theirs
    with torch.no_grad():
        assert saved_bytes(lambda x, *_: case.ours(x, hx, weights), *args) == 0


# ---------------------------------------------------------------------------------------------------
# torch.func and forward mode


@pytest.mark.parametrize("case", EXAMPLES + WHOLE_ROWS, ids=str)
def test_vmap(case):
    """Over every operand at once, and over the weights alone (an ensemble)."""
    function, leaves = leaves_of(case)
    stacks = [torch.stack([x.detach(), 2 * x.detach(), -x.detach()]) for x in leaves]
    states = len(leaves) - len(case.weights())
    got = torch.vmap(function)(*stacks)
    want = [function(*(s[i] for s in stacks)) for i in range(3)]
    for a, b in zip(got, zip(*want, strict=True), strict=True):
        torch.testing.assert_close(a, torch.stack(b))
    dims = [None] * states + [0] * (len(leaves) - states)
    some = [x.detach() if d is None else s for x, d, s in zip(leaves, dims, stacks, strict=True)]
    got = torch.vmap(function, in_dims=tuple(dims))(*some)
    want = [function(*(s if d is None else s[i] for s, d in zip(some, dims, strict=True))) for i in range(3)]
    for a, b in zip(got, zip(*want, strict=True), strict=True):
        torch.testing.assert_close(a, torch.stack(b))


@pytest.mark.parametrize("case", EXAMPLES + WHOLE_ROWS, ids=str)
def test_jvp(case):
    """Forward mode, by torch.func and by dual tensors, is the transpose of the backward pass."""
    function, leaves = leaves_of(case)
    outputs = function(*leaves)
    draw = torch.Generator().manual_seed(1)
    tangents = [torch.randn(x.shape, generator=draw, dtype=x.dtype) for x in leaves]
    cotangents = [torch.randn(y.shape, generator=draw, dtype=y.dtype) for y in outputs]
    grads = torch.autograd.grad(outputs, leaves, cotangents)
    want = sum((g * t).sum() for g, t in zip(grads, tangents, strict=True))

    values = tuple(x.detach() for x in leaves)
    _, pushed = torch.func.jvp(function, values, tuple(tangents))
    torch.testing.assert_close(sum((c * p).sum() for c, p in zip(cotangents, pushed, strict=True)), want)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, t) for x, t in zip(values, tangents, strict=True)]
        dual = [forward_ad.unpack_dual(y).tangent for y in function(*duals)]
    for a, b in zip(dual, pushed, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("mode", MODES)
def test_transforms_of_cells(mode):
    function, leaves = cell_leaves(mode)
    values = tuple(x.detach() for x in leaves)

    def first(*args):
        result = function(*args)
        return result[0] if isinstance(result, tuple) else result

    stacks = tuple(torch.stack([x, -x]) for x in values)
    got = torch.vmap(first)(*stacks)
    torch.testing.assert_close(got, torch.stack([first(*(s[i] for s in stacks)) for i in range(2)]))
    forward = torch.func.jacfwd(first, argnums=3)(*values)
    torch.testing.assert_close(forward, torch.func.jacrev(first, argnums=3)(*values))

    def by_autograd(w):
        return torch.autograd.functional.jacobian(lambda v: first(*values[:3], v, *values[4:]), w)

    torch.testing.assert_close(forward, by_autograd(values[3]))


@pytest.mark.parametrize("mode", MODES)
def test_per_sample_gradients(mode):
    case = Case(mode, lengths=(4, 4, 4))
    function, leaves = leaves_of(case)
    x, *rest = (v.detach() for v in leaves)
    states, weights = rest[: -len(case.module()._flat_weights)], rest[-len(case.module()._flat_weights) :]

    def loss(w, x, *states):
        return function(x[:, None], *(h[:, None] for h in states), w, *weights[1:])[0].square().sum()

    dims = (None, 1, *[1] * len(states))
    got = torch.vmap(torch.func.grad(loss), in_dims=dims)(weights[0], x, *states)
    for i in range(3):
        w = weights[0].clone().requires_grad_()
        (want,) = torch.autograd.grad(loss(w, x[:, i], *(h[:, i] for h in states)), [w])
        torch.testing.assert_close(got[i], want)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("create_graph", [False, True])
def test_batched_gradients(mode, create_graph):
    """is_grads_batched=True and jacobian(vectorize=True), which run the backward pass under an older vmap."""
    case = Case(mode, 3, 3, lengths=(3, 2), packed=True)
    function, leaves = leaves_of(case)
    output = function(*leaves)[0]
    cotangents = torch.randn(4, *output.shape, dtype=output.dtype)
    options = {"retain_graph": True, "create_graph": create_graph}
    got = torch.autograd.grad(output, leaves, cotangents, is_grads_batched=True, **options)
    each = [torch.autograd.grad(output, leaves, c, **options) for c in cotangents]
    for a, b in zip(got, zip(*each, strict=True), strict=True):
        torch.testing.assert_close(a, torch.stack(b))
    if create_graph:
        second = torch.autograd.grad(sum(g.square().sum() for g in got), leaves, retain_graph=True)
        want = torch.autograd.grad(sum(g.square().sum() for e in each for g in e), leaves)
        for a, b in zip(second, want, strict=True):
            torch.testing.assert_close(a, b)
