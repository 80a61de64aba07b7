"""fastgen.nn.LSTM, GRU, RNN and their cells against torch.nn's: numbers, gradients, errors, state, options."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import FLOATS, needs_inductor
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence, pad_packed_sequence

import fastgen.nn as nn
from fastgen import random as fastgen_random
from fastgen.nn import recurrent

SEQUENCES = ("LSTM", "GRU", "RNN")
CELLS = ("LSTMCell", "GRUCell", "RNNCell")
EPS = {dtype: torch.finfo(dtype).eps for dtype in FLOATS}


@pytest.fixture(autouse=True)
def ours_everywhere(monkeypatch):
    """Without kernels the modules would be PyTorch's; the op's reference is to pass the same tests."""
    monkeypatch.setattr(recurrent, "SEQUENCE_DEVICES", frozenset({"cpu"}))
    monkeypatch.setattr(recurrent, "CELL_DEVICES", frozenset({"cpu"}))


@pytest.fixture
def never_torch(monkeypatch):
    """PyTorch's own forward fails, so that what passes is ours."""

    def fail(*args):
        raise AssertionError("the call went to PyTorch")

    for name in SEQUENCES + CELLS:
        monkeypatch.setattr(getattr(torch.nn, name), "forward", fail)


def pair(name, *args, seed=0, **options):
    """A module of torch.nn and ours, each built under the same seed."""
    built = []
    for package in (torch.nn, nn):
        torch.manual_seed(seed)
        built.append(getattr(package, name)(*args, **options))
    return built


def states_of(hx):
    return [] if hx is None else list(hx) if isinstance(hx, tuple) else [hx]


def tensors(result):
    """All tensors of a forward's result, in order."""
    if isinstance(result, torch.Tensor):
        return [result]
    if isinstance(result, PackedSequence):
        return [result.data]
    return [tensor for part in result for tensor in tensors(part)]


def run(module, input, hx):
    """Results, and the gradients of input, states and parameters, under fixed cotangents."""
    data = (input.data if isinstance(input, PackedSequence) else input).detach().clone().requires_grad_()
    x = PackedSequence(data, *input[1:]) if isinstance(input, PackedSequence) else data
    states = [s.detach().clone().requires_grad_() for s in states_of(hx)]
    results = module(x, None if hx is None else tuple(states) if isinstance(hx, tuple) else states[0])
    outputs = tensors(results)
    draw = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(o.shape, generator=draw, dtype=torch.float64).to(o.dtype) for o in outputs]
    leaves = [data, *states, *module.parameters()]
    return results, outputs, torch.autograd.grad(outputs, leaves, cotangents)


def assert_no_worse(ours, theirs, exact, dtype):
    """err(ours) <= 2 err(torch) + atol, elementwise maxima over each tensor."""
    for a, b, e in zip(ours, theirs, exact, strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        a, b, e = a.detach().double(), b.detach().double(), e.detach()
        scale = float(e.abs().max())
        error, allowed = (float((value - e).abs().max()) for value in (a, b))
        assert error <= 2 * allowed + 4 * EPS[dtype] * max(1.0, scale)


@st.composite
def problems(draw):
    """A sequence module's options, an input in one of the forms, and initial states or None."""
    name = draw(st.sampled_from(SEQUENCES))
    inputs, hidden, layers = draw(st.integers(1, 9)), draw(st.integers(1, 9)), draw(st.integers(1, 3))
    options = {
        "num_layers": layers,
        "bias": draw(st.booleans()),
        "batch_first": draw(st.booleans()),
        "bidirectional": draw(st.booleans()),
    }
    if name == "RNN":
        options["nonlinearity"] = draw(st.sampled_from(("tanh", "relu")))
    if name == "LSTM" and hidden > 1 and draw(st.booleans()):
        options["proj_size"] = draw(st.integers(1, hidden - 1))
    form = draw(st.sampled_from(("padded", "unbatched", "packed", "packed unsorted")))
    batch = 1 if form == "unbatched" else draw(st.integers(1, 4))
    lengths = draw(st.lists(st.integers(1, 6), min_size=batch, max_size=batch))
    if form == "packed":
        lengths.sort(reverse=True)
    return name, inputs, hidden, options, form, lengths, draw(st.booleans()), draw(st.integers(0, 99))


def build(problem, dtype):
    """torch's module, ours, input and states of a problem in `dtype`."""
    name, inputs, hidden, options, form, lengths, with_states, seed = problem
    theirs, ours = (module.to(dtype) for module in pair(name, inputs, hidden, seed=seed, **options))
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype)

    if form == "unbatched":
        x, batch = normal(lengths[0], inputs), ()
    elif form == "padded":
        batch = (len(lengths),)
        x = normal(*batch, lengths[0], inputs) if options["batch_first"] else normal(lengths[0], *batch, inputs)
    else:
        batch = (len(lengths),)
        padded = normal(max(lengths), *batch, inputs)
        x = pack_padded_sequence(padded, torch.tensor(lengths), enforce_sorted=form == "packed")
    hx = None
    if with_states:
        layers = options["num_layers"] * (2 if options["bidirectional"] else 1)
        h = normal(layers, *batch, options.get("proj_size") or hidden)
        hx = (h, normal(layers, *batch, hidden)) if name == "LSTM" else h
    return theirs, ours, x, hx


# ---------------------------------------------------------------------------------------------------
# Numbers


@settings(max_examples=150)
@given(problems())
def test_results_and_gradients_are_those_of_torch(problem):
    theirs, ours, x, hx = build(problem, torch.float64)
    expected, got = run(theirs, x, hx), run(ours, x, hx)
    assert type(got[0][0]) is type(expected[0][0])
    if isinstance(x, PackedSequence):
        for mine, other in zip(got[0][0][1:], expected[0][0][1:], strict=True):
            assert (mine is None) is (other is None)
            assert mine is None or torch.equal(mine, other)
    for mine, other in zip((*got[1], *got[2]), (*expected[1], *expected[2]), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@settings(max_examples=25)
@given(problem=problems())
def test_errors_are_no_worse_than_torchs(dtype, problem):
    compare(*build(problem, dtype), dtype)


# Beyond what a register, a cache or a count of 16 bits holds; each by itself, for the others cost time.
@pytest.mark.parametrize("name", SEQUENCES)
@pytest.mark.parametrize(
    ("batch", "steps", "inputs", "hidden", "dtype"),
    [
        (512, 3, 7, 33, torch.float32),
        (512, 3, 7, 33, torch.bfloat16),
        (3, 2, 5, 2048, torch.float32),
        (1, 2, 5, 2048, torch.float32),
        (40, 2, 5, 2048, torch.bfloat16),
        (2, 4096, 3, 9, torch.float32),
        (1, 4096, 3, 40, torch.float32),
    ],
)
def test_large_sizes(name, batch, steps, inputs, hidden, dtype):
    theirs, ours = (module.to(dtype) for module in pair(name, inputs, hidden))
    draw = torch.Generator().manual_seed(2)
    x = torch.randn(steps, batch, inputs, generator=draw).to(dtype)
    h, c = torch.randn(2, 1, batch, hidden, generator=draw).to(dtype)
    compare(theirs, ours, x, (h, c) if name == "LSTM" else h, dtype)


def compare(theirs, ours, x, hx, dtype):
    wide = copy.deepcopy(theirs).double()
    exact_x = PackedSequence(x.data.double(), *x[1:]) if isinstance(x, PackedSequence) else x.double()
    exact_hx = None if hx is None else tuple(s.double() for s in hx) if isinstance(hx, tuple) else hx.double()
    _, expected, expected_grads = run(theirs, x, hx)
    _, got, grads = run(ours, x, hx)
    _, exact, exact_grads = run(wide, exact_x, exact_hx)
    assert_no_worse(got, expected, exact, dtype)
    assert_no_worse(grads, expected_grads, exact_grads, dtype)


@settings(max_examples=60)
@given(
    name=st.sampled_from(CELLS),
    sizes=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    bias=st.booleans(),
    relu=st.booleans(),
    batch=st.sampled_from([(), (1,), (3,)]),
    with_states=st.booleans(),
)
def test_cells_are_those_of_torch(name, sizes, bias, relu, batch, with_states):
    options = {"bias": bias, "dtype": torch.float64}
    if name == "RNNCell" and relu:
        options["nonlinearity"] = "relu"
    theirs, ours = pair(name, *sizes, **options)
    x = torch.randn(*batch, sizes[0], dtype=torch.float64)
    hx = None
    if with_states:
        hx = torch.randn(*batch, sizes[1], dtype=torch.float64)
        hx = (hx, torch.randn_like(hx)) if name == "LSTMCell" else hx
    expected, got = run(theirs, x, hx), run(ours, x, hx)
    assert type(got[0]) is type(expected[0])
    for mine, other in zip((*got[1], *got[2]), (*expected[1], *expected[2]), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", SEQUENCES)
def test_every_form_of_input_stays_ours(name, never_torch):
    for options in ({}, {"batch_first": True, "bidirectional": True, "num_layers": 2}):
        module = getattr(nn, name)(3, 4, **options)
        module(torch.randn(5, 2, 3))
        module(torch.randn(5, 3))
        module(pack_sequence([torch.randn(2, 3), torch.randn(5, 3)], enforce_sorted=False))
        module.double()(torch.randn(5, 2, 3, dtype=torch.float64))
        with torch.no_grad():
            module.bfloat16()(torch.randn(5, 2, 3, dtype=torch.bfloat16))
    with pytest.raises(AssertionError, match="went to PyTorch"):
        module(torch.randn(5, 2, 7))


@pytest.mark.parametrize("name", CELLS)
def test_every_form_of_input_of_a_cell_stays_ours(name, never_torch):
    module = getattr(nn, name)(3, 4, bias=False)
    for x in (torch.randn(3), torch.randn(2, 3)):
        module(x, module(x))


# ---------------------------------------------------------------------------------------------------
# What PyTorch's classes promise


@pytest.mark.parametrize("name", SEQUENCES + CELLS)
def test_initial_values_names_and_state_dicts(name):
    options = {} if name in CELLS else {"num_layers": 2, "bidirectional": True}
    theirs, ours = pair(name, 5, 6, seed=3, **options)
    assert isinstance(ours, type(theirs))
    assert repr(ours) == repr(theirs)
    expected, got = theirs.state_dict(), ours.state_dict()
    assert list(got) == list(expected)
    assert all(torch.equal(got[key], expected[key]) for key in expected)
    again = pair(name, 5, 6, seed=4, **options)
    again[0].load_state_dict(got)
    again[1].load_state_dict(expected)
    assert all(torch.equal(a, b) for a, b in zip(again[0].parameters(), again[1].parameters(), strict=True))
    assert [key for key, _ in ours.named_parameters()] == [key for key, _ in theirs.named_parameters()]
    if name in SEQUENCES:
        listed = [weight for layer in ours.all_weights for weight in layer]
        assert all(a is b for a, b in zip(listed, ours.parameters(), strict=True))


@pytest.mark.parametrize("name", SEQUENCES + CELLS)
def test_copies_and_pickles(name):
    module = getattr(nn, name)(3, 4)
    x = torch.randn(2, 3)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    expected = tensors(module(x))
    for other in (
        copy.deepcopy(module),
        copy.copy(module),
        pickle.loads(pickle.dumps(module)),
        torch.load(file, weights_only=False),
    ):
        assert type(other) is type(module)
        assert all(torch.equal(a, b) for a, b in zip(tensors(other(x)), expected, strict=True))
    replica = copy.deepcopy(module)
    with torch.no_grad():
        for weight in replica.parameters():
            weight.zero_()
    assert not tensors(replica(x))[0].any()
    assert all(torch.equal(a, b) for a, b in zip(tensors(module(x)), expected, strict=True))


@pytest.mark.parametrize(
    ("name", "args", "options"),
    [
        ("LSTM", (0, 4), {}),
        ("LSTM", (3, 0), {}),
        ("LSTM", (3.0, 4), {}),
        ("LSTM", (3, 4, 0), {}),
        ("LSTM", (3, 4), {"dropout": 1.5}),
        ("LSTM", (3, 4), {"bias": 1}),
        ("LSTM", (3, 4), {"batch_first": 1}),
        ("LSTM", (3, 4), {"proj_size": 4}),
        ("LSTM", (3, 4), {"proj_size": -1}),
        ("LSTM", (3, 4), {"nothing": 1}),
        ("GRU", (3, 4), {"proj_size": 2}),
        ("RNN", (3, 4), {"proj_size": 2}),
        ("RNN", (3, 4), {"nonlinearity": "sin"}),
    ],
)
def test_errors_of_the_constructor_are_those_of_torch(name, args, options):
    errors = []
    for package in (torch.nn, nn):
        with pytest.raises((TypeError, ValueError)) as caught:
            getattr(package, name)(*args, **options)
        errors.append((caught.type, str(caught.value)))
    assert errors[0] == errors[1]


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


BAD_CALLS = [
    (zeros(3), None),
    (zeros(2, 2, 5, 3), None),
    (zeros(5, 2, 4), None),
    (zeros(5, 4), None),
    (zeros(0, 2, 3), None),
    (zeros(5, 2, 3, dtype=torch.float64), None),
    (zeros(5, 2, 3, dtype=torch.int64), None),
    (zeros(5, 2, 3), zeros(1, 3, 4)),
    (zeros(5, 2, 3), zeros(2, 2, 4)),
    (zeros(5, 2, 3), zeros(1, 2, 5)),
    (zeros(5, 2, 3), zeros(2, 4)),
    (zeros(5, 3), zeros(1, 1, 4)),
    (zeros(5, 3), zeros(2, 4)),
    (zeros(5, 2, 3), zeros(1, 2, 4, dtype=torch.float64)),
    (pack_sequence([zeros(3, 4), zeros(2, 4)]), None),
    (pack_sequence([zeros(3, 3), zeros(2, 3)]), zeros(1, 3, 4)),
]


@pytest.mark.parametrize("name", SEQUENCES)
@pytest.mark.parametrize("place", range(len(BAD_CALLS)))
def test_errors_of_a_call_are_those_of_torch(name, place):
    input, hx = BAD_CALLS[place]
    if name == "LSTM" and hx is not None:
        hx = (hx, hx)
    errors = []
    for module in pair(name, 3, 4):
        with pytest.raises(Exception) as caught:  # noqa: PT011  (its type and text are what is compared)
            module(input, hx)
        errors.append((caught.type, str(caught.value)))
    assert errors[0] == errors[1]


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize(
    ("input", "hx"),
    [
        (zeros(2, 5, 3), None),
        (zeros(2, 4), None),
        (zeros(2, 3), zeros(3, 4)),
        (zeros(2, 3), zeros(2, 5)),
        (zeros(2, 3), zeros(1, 2, 4)),
        (zeros(2, 3, dtype=torch.float64), None),
    ],
)
def test_errors_of_a_cell_are_those_of_torch(name, input, hx):
    if name == "LSTMCell" and hx is not None:
        hx = (hx, hx)
    errors = []
    for module in pair(name, 3, 4):
        with pytest.raises(Exception) as caught:  # noqa: PT011  (its type and text are what is compared)
            module(input, hx)
        errors.append((caught.type, str(caught.value)))
    assert errors[0] == errors[1]


def raised(module, *args):
    """The class and the words of the error that a call ends with; None where it ends well."""
    try:
        module(*args)
    except Exception as error:  # what is compared
        return type(error), str(error)
    return None


def wrong_states(size):
    """What is no (h, c), or no h, for a module whose states have this size."""
    h = zeros(*size)
    return {
        "one in a tuple": (h,),
        "one in a list": [h],
        "two": (h, h),
        "three": (h, h, h),
        "two in a tensor": zeros(2, *size),
        "an empty tuple": (),
        "an empty list": [],
        "None twice": (None, None),
        "h and None": (h, None),
        "a string": "h",
        "a number": 0,
        "a dict": {"h": h},
    }


@pytest.mark.parametrize("name", SEQUENCES + CELLS)
@pytest.mark.parametrize("kind", wrong_states((1, 2, 4)))
def test_states_of_another_kind_are_refused_as_torch_refuses_them(name, kind):
    """Taken as torch.nn takes them where it does: two states of an LSTM, one in a tensor of the others."""
    x, hx = (
        (zeros(2, 3), wrong_states((2, 4))[kind]) if name in CELLS else (zeros(5, 2, 3), wrong_states((1, 2, 4))[kind])
    )
    theirs, ours = pair(name, 3, 4)
    assert raised(ours, x, hx) == raised(theirs, x, hx)


@pytest.mark.parametrize("name", SEQUENCES + CELLS)
@pytest.mark.parametrize(
    "input", ["text", None, [[1.0, 2.0, 3.0]], 3, zeros(2, 3).numpy()], ids=lambda x: type(x).__name__
)
def test_what_is_no_tensor_is_refused_as_torch_refuses_it(name, input):
    theirs, ours = pair(name, 3, 4)
    expected = raised(theirs, input)
    assert expected is not None
    assert raised(ours, input) == expected


@pytest.mark.filterwarnings("ignore:.*nested tensors:UserWarning")
@pytest.mark.parametrize("name", SEQUENCES + CELLS)
def test_other_layouts_are_left_to_torch(name):
    """Whatever PyTorch does with them, it does: an LSTMCell takes a sparse input, nothing a nested one."""
    theirs, ours = pair(name, 3, 4)
    for x in (torch.eye(3).to_sparse(), torch.nested.nested_tensor([zeros(2, 3), zeros(1, 3)])):
        expected = raised(theirs, x)
        assert raised(ours, x) == expected
        if expected is None:
            torch.testing.assert_close(tensors(ours(x)), tensors(theirs(x)))


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("absent", ["bias_ih", "bias_hh"])
def test_a_cell_with_one_bias_is_torchs(name, absent):
    theirs, ours = pair(name, 3, 4)
    for module in (theirs, ours):
        setattr(module, absent, None)
    x = torch.randn(2, 3)
    torch.testing.assert_close(tensors(ours(x)), tensors(theirs(x)))


def test_an_unknown_nonlinearity_of_a_cell():
    for module in pair("RNNCell", 3, 4, nonlinearity="sin"):
        with pytest.raises(RuntimeError, match="Unknown nonlinearity: sin"):
            module(zeros(2, 3))


def test_sequences_of_no_length_are_refused_as_torch_refuses_them():
    with pytest.raises(RuntimeError, match="Length of all samples has to be greater than 0"):
        pack_padded_sequence(zeros(3, 2, 3), torch.tensor([3, 0]))


@pytest.mark.parametrize("name", SEQUENCES)
def test_empty_batches(name):
    theirs, ours = pair(name, 3, 4)
    for mine, other in zip(tensors(ours(zeros(5, 0, 3))), tensors(theirs(zeros(5, 0, 3))), strict=True):
        assert mine.shape == other.shape


def test_packed_in_packed_out_in_the_order_of_the_caller():
    sequences = [torch.randn(n, 3) for n in (2, 5, 1, 5)]
    module = nn.LSTM(3, 4, bidirectional=True)
    output, (h, c) = module(pack_sequence(sequences, enforce_sorted=False))
    padded, lengths = pad_packed_sequence(output)
    assert lengths.tolist() == [2, 5, 1, 5]
    for row, x in enumerate(sequences):
        alone, (h_1, c_1) = module(x)
        torch.testing.assert_close(padded[: len(x), row], alone)
        torch.testing.assert_close(h[:, row], h_1)
        torch.testing.assert_close(c[:, row], c_1)


# ---------------------------------------------------------------------------------------------------
# Weights that are not plain parameters


@pytest.mark.parametrize("package", [torch.nn, nn])
def test_weight_norm(package):
    torch.manual_seed(0)
    module = package.LSTM(3, 4)
    x = torch.randn(5, 2, 3)
    before = tensors(module(x))
    parametrizations.weight_norm(module, "weight_hh_l0")
    torch.testing.assert_close(tensors(module(x)), before)
    module(x)[0].sum().backward()
    assert module.parametrizations.weight_hh_l0.original0.grad.shape == (16, 1)
    parametrize.remove_parametrizations(module, "weight_hh_l0")
    assert type(module) is package.LSTM
    torch.testing.assert_close(tensors(module(x)), before)


def test_the_old_weight_norm():
    module = nn.GRU(3, 4)
    x = torch.randn(5, 2, 3)
    before = tensors(module(x))
    with pytest.warns(FutureWarning):
        torch.nn.utils.weight_norm(module, "weight_hh_l0")
    torch.testing.assert_close(tensors(module(x)), before)
    with torch.no_grad():
        module.weight_hh_l0_g.mul_(2)
    assert not torch.allclose(tensors(module(x))[0], before[0])


class Symmetric(torch.nn.Module):
    def forward(self, x):
        return x.triu() + x.triu(1).transpose(-1, -2)


@pytest.mark.parametrize("name", ["RNN", "RNNCell"])
def test_a_parametrisation_is_used_and_trained(name):
    module = getattr(nn, name)(3, 4)
    weight = "weight_hh" + ("" if name in CELLS else "_l0")
    parametrize.register_parametrization(module, weight, Symmetric())
    hx = torch.randn(2, 4)
    plain = getattr(torch.nn, name)(3, 4)
    plain.load_state_dict(
        {key.removeprefix("parametrizations.").removesuffix(".original"): v for key, v in module.state_dict().items()}
    )
    with torch.no_grad():
        getattr(plain, weight).copy_(getattr(module, weight))
    x = torch.randn(2, 3)
    hx = hx if name in CELLS else hx[:1]
    torch.testing.assert_close(tensors(module(x, hx)), tensors(plain(x, hx)))
    tensors(module(x, hx))[0].sum().backward()
    original = getattr(module.parametrizations, weight).original
    assert float(original.grad.triu().abs().sum()) > 0
    assert float(original.grad.tril(-1).abs().sum()) == 0
    assert type(copy.deepcopy(module)) is type(module)


def test_a_copy_after_a_forward_with_parametrised_weights():
    module = parametrizations.weight_norm(nn.LSTM(3, 4), "weight_hh_l0")
    module.double()
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    expected = tensors(module(x))
    torch.testing.assert_close(tensors(copy.deepcopy(module)(x)), expected)


def test_a_weight_that_is_replaced_is_used():
    module, other = nn.GRU(3, 4), nn.GRU(3, 4)
    x = torch.randn(5, 2, 3)
    module.weight_ih_l0 = other.weight_ih_l0
    module._parameters["weight_hh_l0"] = other.weight_hh_l0
    module.bias_ih_l0.data = other.bias_ih_l0.data
    module.bias_hh_l0 = other.bias_hh_l0
    assert torch.equal(module(x)[0], other(x)[0])


@pytest.mark.parametrize("name", ["LSTM", "GRU", "LSTMCell", "RNNCell"])
def test_functional_call_and_vmap_over_an_ensemble(name):
    """Also of weights in another dtype than the module's own."""
    models = [getattr(nn, name)(3, 4) for _ in range(3)]
    parameters, _ = torch.func.stack_module_state(models)
    x = torch.randn(2, 3)
    got = torch.vmap(lambda p: torch.func.functional_call(models[0], p, (x,)))(parameters)
    for place, model in enumerate(models):
        for one, all_of_them in zip(tensors(model(x)), tensors(got), strict=True):
            torch.testing.assert_close(all_of_them[place], one)
    wide = {key: value.double() for key, value in models[1].named_parameters()}
    got = torch.func.functional_call(models[0], wide, (x.double(),))
    torch.testing.assert_close([t.float() for t in tensors(got)], tensors(models[1](x)))
    assert tensors(models[0](x))[0].dtype == torch.float32


def test_forward_mode_and_double_backward():
    module = nn.LSTM(3, 4, num_layers=2, bidirectional=True).double()
    x, tangent = (torch.randn(4, 2, 3, dtype=torch.float64) for _ in range(2))
    _, directional = torch.func.jvp(lambda v: module(v)[0].square().sum(), (x,), (tangent,))
    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(module(leaf)[0].square().sum(), leaf, create_graph=True)
    torch.testing.assert_close((grad * tangent).sum(), directional)
    weight = module.weight_hh_l0_reverse
    (second,) = torch.autograd.grad(grad.square().sum(), weight)
    step = 1e-6
    moved = []
    for sign in (1, -1):
        with torch.no_grad():
            weight[1, 2] += sign * step
        (g,) = torch.autograd.grad(module(leaf)[0].square().sum(), leaf)
        moved.append(float(g.square().sum()))
        with torch.no_grad():
            weight[1, 2] -= sign * step
    assert float(second[1, 2]) == pytest.approx((moved[0] - moved[1]) / (2 * step), rel=1e-5, abs=1e-7)


def results_of(name, module, x, hx):
    """What a call gives, output first, states behind it."""
    return tensors(module(x, hx if name.startswith("LSTM") else hx[0]))


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize(
    ("name", "options"),
    [
        *[(name, {}) for name in (*SEQUENCES, "LSTMCell", "GRUCell")],
        *[(name, {"num_layers": 2}) for name in SEQUENCES],
        *[(name, {"bidirectional": True}) for name in SEQUENCES],
        ("LSTM", {"proj_size": 2}),
    ],
)
@pytest.mark.parametrize("rows", [2, 9])
@pytest.mark.parametrize("form", ["padded", "packed", "one step"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_results_may_be_changed_in_place_where_torchs_may(name, options, rows, form, dtype):
    """As `output += residual` does in training; the gradients are then those of the changed results."""
    theirs, ours = (module.to(dtype) for module in pair(name, 3, 4, **options))
    x = (
        torch.randn(rows, 3, dtype=dtype)
        if name in CELLS
        else torch.randn(1 if form == "one step" else 5, rows, 3, dtype=dtype)
    )
    if form == "packed":
        if name in CELLS:
            return
        x = pack_padded_sequence(x, torch.tensor([5, *[2] * (rows - 1)]))
    lead = (rows,) if name in CELLS else (options.get("num_layers", 1) * (2 if "bidirectional" in options else 1), rows)
    hx = tuple(torch.randn(*lead, size, dtype=dtype) for size in (options.get("proj_size", 4), 4))
    for place in range(len(results_of(name, theirs, x, hx))):
        found = []
        for module in (theirs, ours):
            results = results_of(name, module, x, hx)
            results[place].mul_(2)
            try:
                found.append(torch.autograd.grad(sum(t.square().sum() for t in results), list(module.parameters())))
            except RuntimeError:
                found.append(None)
        if found[0] is not None:
            assert found[1] is not None
            torch.testing.assert_close(found[1], found[0])


# ---------------------------------------------------------------------------------------------------
# Subclasses, hooks, replicas, devices


def test_a_subclass_extends_forward(never_torch):
    class Residual(nn.GRU):
        def __init__(self, size):
            super().__init__(size, size, batch_first=True)

        def forward(self, x, hx=None):
            output, h = super().forward(x, hx)
            return x + output, h

    module = Residual(4)
    x = torch.randn(2, 5, 4)
    plain = nn.GRU(4, 4, batch_first=True)
    plain.load_state_dict(module.state_dict())
    assert torch.equal(module(x)[0], x + plain(x)[0])


def test_hooks_see_what_goes_in_and_out():
    module = nn.LSTM(3, 4)
    seen = []
    module.register_forward_pre_hook(lambda m, args: seen.append(args[0].shape))
    module.register_forward_hook(lambda m, args, result: seen.append(result[1][1].shape))
    module.register_full_backward_hook(lambda m, grad_in, grad_out: seen.append(grad_out[0].shape))
    module(torch.randn(5, 2, 3, requires_grad=True))[0].sum().backward()
    assert seen == [(5, 2, 3), (1, 2, 4), (5, 2, 4)]


def test_a_replica_of_data_parallel_uses_its_own_weights():
    module = nn.LSTM(3, 4)
    replica = module._replicate_for_data_parallel()
    for name, value in module.named_parameters():
        setattr(replica, name, value.detach() * 2)
    doubled = copy.deepcopy(module)
    with torch.no_grad():
        for value in doubled.parameters():
            value.mul_(2)
    x = torch.randn(5, 2, 3)
    assert torch.equal(replica(x)[0], doubled(x)[0])


@pytest.mark.parametrize("name", SEQUENCES + CELLS)
def test_the_meta_device(name):
    module = getattr(nn, name)(3, 4, device="meta")
    for result in tensors(module(torch.empty(2, 3, device="meta"))):
        assert result.device.type == "meta"
        assert result.shape[-1] == 4


@pytest.mark.parametrize("name", SEQUENCES + CELLS)
def test_autocast(name):
    theirs, ours = pair(name, 3, 4)
    x = torch.randn(2, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, got = tensors(theirs(x)), tensors(ours(x))
        tensors(ours(x.bfloat16()))
    for mine, other in zip(got, expected, strict=True):
        assert mine.dtype == other.dtype
        torch.testing.assert_close(mine, other, rtol=0.03, atol=0.03)
    sum(t.float().sum() for t in got).backward()
    assert all(p.grad.dtype == torch.float32 for p in ours.parameters())


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize(
    ("name", "options"),
    [("LSTM", {}), ("LSTM", {"proj_size": 2}), ("LSTM", {"bidirectional": True}), ("GRU", {}), ("RNN", {})],
)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("of_states", [None, torch.float32, torch.bfloat16])
def test_autocast_gives_the_dtypes_that_torch_gives(name, options, packed, given, of_states):
    theirs, ours = pair(name, 3, 4, **options)
    x = torch.randn(5, 2, 3, dtype=given)
    if packed:
        x = pack_padded_sequence(x, torch.tensor([5, 2]))
    hx = None
    if of_states is not None:
        lead = (2 if "bidirectional" in options else 1, 2)
        hx = torch.randn(*lead, options.get("proj_size", 4), dtype=of_states)
        hx = (hx, torch.randn(*lead, 4, dtype=of_states)) if name == "LSTM" else hx
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, got = tensors(theirs(x, hx)), tensors(ours(x, hx))
    assert [t.dtype for t in got] == [t.dtype for t in expected]
    for mine, other in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=0.03, atol=0.03)


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", SEQUENCES)
def test_traces_hold_the_op_of_torch(name):
    module, x = getattr(nn, name)(3, 4), torch.randn(5, 2, 3)
    traced = torch.jit.trace(module, x)
    assert f"torch.{'lstm' if name == 'LSTM' else 'gru' if name == 'GRU' else 'rnn_tanh'}(" in traced.code
    torch.testing.assert_close(tensors(traced(x)), tensors(module(x)))


def test_other_dtypes_are_left_to_torch():
    """Whatever PyTorch does with them, it does."""
    results = []
    for module in pair("RNN", 3, 4, dtype=torch.complex64):
        try:
            results.append(tensors(module(torch.ones(5, 2, 3, dtype=torch.complex64))))
        except RuntimeError as error:
            results.append(str(error))
    assert type(results[0]) is type(results[1])
    if isinstance(results[0], str):
        assert results[0] == results[1]
    else:
        torch.testing.assert_close(*results)


def test_without_kernels_for_the_device_the_modules_are_torchs(monkeypatch, never_torch):
    monkeypatch.setattr(recurrent, "SEQUENCE_DEVICES", frozenset())
    monkeypatch.setattr(recurrent, "CELL_DEVICES", frozenset())
    for name in SEQUENCES + CELLS:
        with pytest.raises(AssertionError, match="went to PyTorch"):
            getattr(nn, name)(3, 4)(torch.randn(2, 3))


# ---------------------------------------------------------------------------------------------------
# torch.compile


@pytest.mark.parametrize("name", SEQUENCES)
@pytest.mark.parametrize("inside", [False, True])
def test_compiles_in_one_graph_for_every_length(name, inside):
    module = getattr(nn, name)(3, 4, num_layers=2, bidirectional=True)
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), module) if inside else module
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=count)
    for length in (4, 7, 9):
        x = torch.randn(length, 2, 3)
        got, expected = compiled(x), model(x)
        torch.testing.assert_close(tensors(got), tensors(expected))
    assert len(graphs) == 1
    torch.compiler.reset()


@pytest.mark.parametrize("name", SEQUENCES)
@pytest.mark.parametrize("with_states", [False, True])
def test_packed_sequences_compile_in_one_graph(name, with_states):
    module = getattr(nn, name)(3, 4)
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    for lengths in ([3, 2], [4, 1, 1]):
        packed = pack_sequence([torch.randn(n, 3) for n in lengths])
        hx = None
        if with_states:
            hx = torch.randn(1, len(lengths), 4)
            hx = (hx, 2 * hx) if name == "LSTM" else hx
        torch.testing.assert_close(tensors(compiled(packed, hx)), tensors(module(packed, hx)))
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("options", "with_states"),
    [
        ({"dropout": 0.3}, False),
        ({"input_dropout": 0.3, "weight_dropout": 0.3}, False),
        ({"state_dropout": 0.3}, False),
        ({"state_dropout": 0.3}, True),
        ({"zoneout": (0.3, 0.2)}, True),
        ({"layer_norm": True}, False),
    ],
)
def test_every_option_compiles_in_one_graph(options, with_states):
    """In training, with the draws of the eager call; packed, which is the hardest."""
    module = nn.LSTM(3, 4, num_layers=2, **options)
    hx = (torch.randn(2, 2, 4), torch.randn(2, 2, 4)) if with_states else None
    lengths = (3, 2) if with_states else (2, 3)
    x = pack_sequence([torch.randn(n, 3) for n in lengths], enforce_sorted=with_states)
    found = []
    for function in (module, torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)):
        torch.manual_seed(1)
        results = tensors(function(x, hx))
        loss = sum(t.square().sum() for t in results)
        found.append([*results, *torch.autograd.grad(loss, list(module.parameters()))])
    torch.testing.assert_close(found[1], found[0])
    torch.compiler.reset()


@needs_inductor
def test_compiled_training():
    torch.manual_seed(0)
    module = nn.LSTM(3, 4)
    compiled = torch.compile(module, fullgraph=True, dynamic=True)
    for length in (4, 7):
        x = torch.randn(length, 2, 3)
        expected = torch.autograd.grad(module(x)[0].square().sum(), list(module.parameters()))
        got = torch.autograd.grad(compiled(x)[0].square().sum(), list(module.parameters()))
        torch.testing.assert_close(got, expected)
    torch.compiler.reset()


def test_dynamo_still_breaks_at_torchs_own():
    compiled = torch.compile(torch.nn.LSTM(3, 4), fullgraph=True, backend="eager")
    with pytest.raises(torch._dynamo.exc.Unsupported):
        compiled(torch.randn(5, 2, 3))
    assert torch._dynamo.config.allow_rnn is False
    torch.compiler.reset()


@pytest.mark.parametrize("name", CELLS)
def test_cells_compile_in_one_graph(name):
    module = getattr(nn, name)(3, 4)
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    x = torch.randn(2, 3)
    torch.testing.assert_close(tensors(compiled(x, module(x))), tensors(module(x, module(x))))
    torch.compiler.reset()


# ---------------------------------------------------------------------------------------------------
# Dropout of fastgen's own


@pytest.mark.parametrize("option", ["input_dropout", "state_dropout", "weight_dropout"])
def test_options_out_of_range(option):
    for value in (-0.1, 1.0, float("nan"), "0.5", True):
        with pytest.raises(ValueError, match=f"^{option}: expected a finite number of at least 0 and below 1, got "):
            nn.LSTM(3, 4, **{option: value})


@pytest.mark.parametrize("name", SEQUENCES)
@pytest.mark.parametrize("option", ["input_dropout", "state_dropout", "weight_dropout"])
def test_options_are_repeatable_act_in_training_only_and_leave_the_state_dict(name, option):
    theirs, ours = pair(name, 8, 16)
    dropping = getattr(nn, name)(8, 16, **{option: 0.5})
    dropping.load_state_dict(theirs.state_dict())
    assert list(dropping.state_dict()) == list(theirs.state_dict())
    assert f"{option}=0.5" in repr(dropping)
    x = torch.randn(5, 2, 8)
    torch.manual_seed(1)
    first = dropping(x)[0]
    second = dropping(x)[0]
    torch.manual_seed(1)
    assert torch.equal(dropping(x)[0], first)
    assert not torch.equal(first, second)
    dropping.eval()
    ours.load_state_dict(theirs.state_dict())
    assert torch.equal(dropping(x)[0], ours(x)[0])


def test_input_dropout_is_locked_over_time_and_drawn_for_each_sequence():
    """Seen through a network that copies its input."""
    module = nn.RNN(400, 400, nonlinearity="relu", bias=False, input_dropout=0.25)
    with torch.no_grad():
        module.weight_ih_l0.copy_(torch.eye(400))
        module.weight_hh_l0.zero_()
    for batch_first in (False, True):
        module.batch_first = batch_first
        x = torch.ones(2, 5, 400) if batch_first else torch.ones(5, 2, 400)
        dropped = module(x)[0] if batch_first else module(x)[0].transpose(0, 1)
        assert set(dropped.unique().tolist()) == {0.0, float(torch.tensor(1 / 0.75))}
        assert (dropped == dropped[:, :1]).all()  # over time
        assert not torch.equal(dropped[0], dropped[1])
        assert float((dropped == 0).float().mean()) == pytest.approx(0.25, abs=0.08)


def reference_step(name, x, h, c, w_ih, w_hh, b_ih, b_hh, mask):
    """One step of torch's cell with the masked state in the recurrent product only."""
    import torch.nn.functional as F

    gi, gh = F.linear(x, w_ih, b_ih), F.linear(h * mask, w_hh, b_hh)
    if name == "LSTM":
        i, f, g, o = (gi + gh).chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c
    if name == "GRU":
        (ir, iz, i_n), (hr, hz, hn) = gi.chunk(3, -1), gh.chunk(3, -1)
        r, z = (ir + hr).sigmoid(), (iz + hz).sigmoid()
        return (1 - z) * (i_n + r * hn).tanh() + z * h, c
    return (gi + gh).tanh(), c


@pytest.mark.parametrize("name", SEQUENCES)
def test_state_dropout_masks_the_product_with_one_mask_for_all_steps(name):
    module = getattr(nn, name)(3, 8, state_dropout=0.5, dtype=torch.float64)
    x = torch.randn(6, 2, 3, dtype=torch.float64)
    torch.manual_seed(5)
    got = module(x)[0]
    torch.manual_seed(5)
    mask = fastgen_random.dropout_mask(1, 2, 8, p=0.5, dtype=torch.float64)[0] * 2
    h, c = (torch.zeros(2, 8, dtype=torch.float64) for _ in range(2))
    for t in range(6):
        h, c = reference_step(name, x[t], h, c, *module.parameters(), mask)
        torch.testing.assert_close(got[t], h)


def test_weight_dropout_is_one_mask_a_call_on_each_hidden_to_hidden_weight():
    module = nn.GRU(3, 8, num_layers=2, weight_dropout=0.25, dtype=torch.float64)
    x = torch.randn(6, 2, 3, dtype=torch.float64)
    torch.manual_seed(5)
    got = module(x)
    torch.manual_seed(5)
    plain = torch.nn.GRU(3, 8, num_layers=2, dtype=torch.float64)
    plain.load_state_dict(module.state_dict())
    torch.manual_seed(5)
    with torch.no_grad():
        for weight in (plain.weight_hh_l0, plain.weight_hh_l1):
            weight.mul_(fastgen_random.dropout_mask(24, 8, p=0.25, dtype=torch.float64) / 0.75)
    torch.testing.assert_close(tensors(got), tensors(plain(x)))
    got[0].sum().backward()
    assert 0 < int((module.weight_hh_l1.grad == 0).sum()) < 24 * 8


@pytest.mark.parametrize("option", ["input_dropout", "state_dropout"])
def test_packed_and_padded_get_the_same_masks(option):
    module = nn.LSTM(5, 6, **{option: 0.5})
    lengths = torch.tensor([2, 6, 4])
    padded = torch.randn(6, 3, 5)
    torch.manual_seed(2)
    expected = module(padded)[0]
    torch.manual_seed(2)
    output, _ = pad_packed_sequence(module(pack_padded_sequence(padded, lengths, enforce_sorted=False))[0])
    for row, length in enumerate(lengths):
        torch.testing.assert_close(output[:length, row], expected[:length, row])


def test_dropout_between_layers_is_repeatable_and_off_in_eval():
    module = nn.LSTM(8, 16, num_layers=3, dropout=0.5)
    plain = torch.nn.LSTM(8, 16, num_layers=3)
    plain.load_state_dict(module.state_dict())
    x = torch.randn(5, 2, 8)
    torch.manual_seed(1)
    first = module(x)[0]
    torch.manual_seed(1)
    assert torch.equal(module(x)[0], first)
    assert not torch.allclose(first, plain(x)[0])
    torch.testing.assert_close(module.eval()(x)[0], plain(x)[0])
