"""Low-rank adaptation: the formula, what is frozen, and merging."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastgen.nn.lora import LoRALinear, add_lora, lora_state_dict, merge_lora


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Sequential(nn.Linear(7, 3, bias=False))).double()


def adapted(rank: int = 2, alpha: float | None = None) -> nn.Sequential:
    net = network()
    add_lora(net, rank, alpha)
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, LoRALinear):
                module.lora_B.normal_()
    return net


def test_it_starts_as_what_it_adapts_and_trains_the_new_alone() -> None:
    net, x = network(), torch.randn(4, 5).double()
    expected = net(x)
    keys = set(net.state_dict())
    add_lora(net, 2)
    assert torch.equal(net(x), expected)
    trained = {name for name, parameter in net.named_parameters() if parameter.requires_grad}
    assert trained == {"0.lora_A", "0.lora_B", "2.0.lora_A", "2.0.lora_B"}
    assert set(net.state_dict()) == keys | trained
    net(x).sum().backward()
    assert net[0].weight.grad is None
    assert net[0].lora_B.grad.abs().sum() > 0


@pytest.mark.parametrize("alpha", [None, 8.0])
def test_the_formula_and_its_merge(alpha: float | None) -> None:
    net, x = adapted(alpha=alpha), torch.randn(4, 5).double()
    layer = net[0]
    scale = 1.0 if alpha is None else alpha / 2
    weight = layer.weight + scale * layer.lora_B @ layer.lora_A
    torch.testing.assert_close(layer(x), x @ weight.t() + layer.bias)
    expected, state = net(x), lora_state_dict(net)
    assert isinstance(net[0], LoRALinear)  # as it was
    merge_lora(net)
    assert not any(isinstance(module, LoRALinear) for module in net.modules())
    assert all(parameter.requires_grad for parameter in net.parameters())
    torch.testing.assert_close(net(x), expected)
    plain = network()
    plain.load_state_dict(state)
    torch.testing.assert_close(plain(x), expected)
    for name, value in net.state_dict().items():
        assert torch.equal(value, state[name])


def test_gradients() -> None:
    layer = adapted()[0]
    x = torch.randn(3, 5).double().requires_grad_()
    parameters = (layer.lora_A, layer.lora_B)

    def call(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(layer, {"lora_A": a, "lora_B": b}, (x,))

    assert torch.autograd.gradcheck(call, (x, *parameters))


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"^rank: expected an int of at least 1, got 0"):
        add_lora(network(), 0)
    with pytest.raises(ValueError, match=r"^alpha: expected a finite number above 0, got -1"):
        add_lora(network(), 2, -1)
    with pytest.raises(ValueError, match=r"^module: expected linear layers inside, found none"):
        add_lora(nn.Sequential(nn.Tanh()), 2)
    with pytest.raises(ValueError, match=r"^module: expected one without low-rank layers"):
        add_lora(adapted(), 2)
