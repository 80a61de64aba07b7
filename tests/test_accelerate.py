"""fastgen.accelerate: what is swapped becomes faster and stays the same object; the rest is left and reported."""

from __future__ import annotations

import copy
import types

import pytest
import torch
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.rnn import pack_sequence

import fastgen
import fastgen.nn as nn
from fastgen._accelerate import Swap

NAMES = ("LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell", "Linear")


class Attentive(torch.nn.LSTM):
    def forward(self, x, hx=None):
        output, hx = super().forward(x, hx)
        return 2 * output, hx


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(7, 4)
        self.layers = torch.nn.ModuleList([torch.nn.LSTM(4, 4, batch_first=True), torch.nn.GRU(4, 4, 2)])
        self.tied = self.layers[0]
        self.custom = Attentive(4, 4)
        self.cell = torch.nn.LSTMCell(4, 4)

    def forward(self, tokens):
        x, _ = self.layers[0](self.embedding(tokens))
        x, _ = self.layers[1](x)
        x, _ = self.tied(x)
        x, _ = self.custom(x)
        return self.cell(x[:, -1])[0]


def first(result):
    return result if isinstance(result, torch.Tensor) else first(result[0])


@pytest.mark.parametrize("name", NAMES)
def test_each_class_of_torch_becomes_ours_and_computes_the_same(name):
    module = getattr(torch.nn, name)(3, 4)
    x = torch.randn(2, 3)
    expected = first(module(x))
    parameters = list(module.parameters())
    assert fastgen.accelerate(module) is module  # the root itself
    assert type(module) is getattr(nn, name)
    assert all(a is b for a, b in zip(module.parameters(), parameters, strict=True))
    torch.testing.assert_close(first(module(x)), expected)


def test_a_model_keeps_all_but_the_classes():
    torch.manual_seed(0)
    model = Model()
    plain = copy.deepcopy(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    model.layers[1].weight_hh_l0.requires_grad_(False)
    model.cell.eval()
    calls = []
    model.tied.register_forward_hook(lambda *_: calls.append("hook"))
    before = {name: id(module) for name, module in model.named_modules()}
    state = {name: id(value) for name, value in model.state_dict(keep_vars=True).items()}

    swaps = []
    assert fastgen.accelerate(model, report=swaps.append) is model
    assert {name: id(module) for name, module in model.named_modules()} == before
    assert {name: id(value) for name, value in model.state_dict(keep_vars=True).items()} == state
    assert model.tied is model.layers[0]
    assert [type(m) for m in (*model.layers, model.custom, model.cell)] == [nn.LSTM, nn.GRU, Attentive, nn.LSTMCell]
    assert not model.layers[1].weight_hh_l0.requires_grad
    assert not model.cell.training
    assert model.layers[1].training
    assert swaps == [
        Swap("layers.0", torch.nn.LSTM),
        Swap("layers.1", torch.nn.GRU),
        Swap("custom", Attentive, "it is a subclass of LSTM"),
        Swap("cell", torch.nn.LSTMCell),
    ]

    tokens = torch.randint(7, (3, 5))
    torch.testing.assert_close(model(tokens), plain(tokens))
    assert calls == ["hook", "hook"]
    old = model.layers[0].weight_ih_l0.clone()
    model(tokens).sum().backward()
    optimizer.step()
    assert not torch.equal(model.layers[0].weight_ih_l0, old)
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(tokens), plain(tokens))


def test_a_second_call_changes_nothing():
    model = fastgen.accelerate(Model())
    types_before = [type(module) for module in model.modules()]
    swaps = []
    fastgen.accelerate(model, report=swaps.append)
    assert [type(module) for module in model.modules()] == types_before
    assert {swap.left for swap in swaps} == {"it is fastgen's already", "it is a subclass of LSTM"}


def test_the_report_in_words(capsys):
    fastgen.accelerate(Model(), report=print)
    assert capsys.readouterr().out.splitlines() == [
        "layers.0: LSTM swapped",
        "layers.1: GRU swapped",
        "custom: Attentive left, it is a subclass of LSTM",
        "cell: LSTMCell swapped",
    ]
    fastgen.accelerate(Model())
    fastgen.accelerate(torch.nn.LSTM(3, 4), report=print)
    assert capsys.readouterr().out == "(the model): LSTM swapped\n"


def test_a_report_that_is_no_function_leaves_the_model_as_it_was():
    model = torch.nn.LSTM(3, 4)
    with pytest.raises(TypeError, match="report: expected a function of a Swap, such as print, got True"):
        fastgen.accelerate(model, report=True)
    assert type(model) is torch.nn.LSTM


def test_models_without_modules_of_ours_are_left_in_silence(capsys):
    fastgen.accelerate(torch.nn.Conv1d(3, 4, 1), report=print)
    assert capsys.readouterr().out == ""


def test_subclasses_of_ours_are_fastgens_already():
    class Mine(nn.GRU):
        pass

    swaps = []
    fastgen.accelerate(Mine(3, 4), report=swaps.append)
    assert swaps == [Swap("", Mine, "it is fastgen's already")]


def test_a_replaced_forward_is_left():
    module = torch.nn.LSTM(3, 4)
    module.forward = types.MethodType(lambda self, x: x, module)
    swaps = []
    fastgen.accelerate(module, report=swaps.append)
    assert swaps == [Swap("", torch.nn.LSTM, "its forward has been replaced")]
    assert type(module) is torch.nn.LSTM


@pytest.mark.parametrize("name", ["LSTM", "GRUCell"])
def test_parametrisations_stay_and_are_trained(name):
    module = getattr(torch.nn, name)(3, 4)
    weight = "weight_hh" if name == "GRUCell" else "weight_hh_l0"
    parametrizations.weight_norm(module, weight)
    other = copy.deepcopy(module)  # shares its dynamic class with `module`
    x = torch.randn(2, 3)
    expected = first(module(x))
    keys = list(module.state_dict())

    swaps = []
    fastgen.accelerate(module, report=swaps.append)
    assert swaps == [Swap("", getattr(torch.nn, name))]
    assert isinstance(module, getattr(nn, name))
    assert type(module).__name__ == f"Parametrized{name}"
    assert list(module.state_dict()) == keys
    torch.testing.assert_close(first(module(x)), expected)
    first(module(x)).sum().backward()
    assert getattr(module.parametrizations, weight).original0.grad is not None
    copied = copy.deepcopy(module)
    torch.testing.assert_close(first(copied(x)), expected)
    fastgen.accelerate(module, report=swaps.append)
    assert swaps[1].left == "it is fastgen's already"

    assert not isinstance(other, getattr(nn, name))
    torch.testing.assert_close(first(other(x)), expected)
    parametrize.remove_parametrizations(module, weight)
    assert type(module) is getattr(nn, name)
    torch.testing.assert_close(first(module(x)), expected)


def test_what_follows_a_swap_still_works():
    """Moves of dtype, packed input, a replaced weight, and state dicts in both directions."""
    module = torch.nn.LSTM(3, 4, bidirectional=True)
    plain = copy.deepcopy(module)
    fastgen.accelerate(module)
    packed = pack_sequence([torch.randn(2, 3), torch.randn(4, 3)], enforce_sorted=False)
    torch.testing.assert_close(module(packed)[0].data, plain(packed)[0].data)
    module.double()
    assert first(module(torch.randn(2, 3, dtype=torch.float64))).dtype == torch.float64
    module.float()
    module.weight_ih_l0 = torch.nn.Parameter(torch.zeros_like(module.weight_ih_l0))
    plain.load_state_dict(module.state_dict())
    x = torch.randn(5, 2, 3)
    torch.testing.assert_close(module(x)[0], plain(x)[0])
    assert module.input_dropout == module.state_dropout == module.weight_dropout == 0.0
    assert repr(module) == repr(plain)


@pytest.mark.parametrize("value", [None, torch.nn.LSTM, "model"])
def test_what_is_no_module_is_refused(value):
    with pytest.raises(TypeError, match=r"^module: expected a torch.nn.Module, got "):
        fastgen.accelerate(value)
