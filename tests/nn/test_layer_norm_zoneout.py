"""Layer norm and zoneout of the modules: parameters, values, packed sequences, steps, what PyTorch must not compute."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn.functional import layer_norm
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fastgen.nn as nn
from fastgen import accelerate

NORMS = ("norm_weight_ih", "norm_weight_hh", "norm_weight_c", "norm_bias_c")


def by_hand(lstm, x, h, c):
    """Output and states of an LSTM of one layer, by PyTorch's own ops."""
    w_ih, w_hh, b_ih, b_hh = lstm._flat_weights
    gain_ih, gain_hh, gain_c, bias_c = (getattr(lstm, f"{name}_l0") for name in NORMS)
    outputs = []
    for step in x:
        sums = layer_norm(step @ w_ih.T, gain_ih.shape, gain_ih) + layer_norm(h @ w_hh.T, gain_hh.shape, gain_hh)
        i, f, g, o = (sums + b_ih + b_hh).chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * layer_norm(c, gain_c.shape, gain_c, bias_c).tanh()
        outputs.append(h)
    return torch.stack(outputs), (h, c)


def randomised(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module


def test_without_the_options_the_state_dict_is_pytorchs():
    for ours, theirs in ((nn.LSTM, torch.nn.LSTM), (nn.LSTMCell, torch.nn.LSTMCell)):
        assert list(ours(4, 5).state_dict()) == list(theirs(4, 5).state_dict())


def test_parameters():
    torch.manual_seed(0)
    module = nn.LSTM(4, 5, 2, bidirectional=True, proj_size=3, layer_norm=True)
    torch.manual_seed(0)
    plain = torch.nn.LSTM(4, 5, 2, bidirectional=True, proj_size=3)
    state = module.state_dict()
    for name, value in plain.state_dict().items():
        assert torch.equal(state.pop(name), value)
    suffixes = ("_l0", "_l0_reverse", "_l1", "_l1_reverse")
    assert list(state) == [name + suffix for suffix in suffixes for name in NORMS]
    for name, value in state.items():
        assert value.shape == (5 if "_c_" in name else 20,)
        assert value.eq(0 if "bias" in name else 1).all()
    randomised(module).reset_parameters()
    assert module.norm_weight_c_l1.eq(1).all()
    other = nn.LSTM(4, 5, 2, bidirectional=True, proj_size=3, layer_norm=True)
    other.load_state_dict(module.state_dict())
    x = torch.randn(3, 2, 4)
    torch.testing.assert_close(other(x)[0], copy.deepcopy(module)(x)[0])
    assert "layer_norm=True" in repr(module)
    assert nn.LSTMCell(4, 5, layer_norm=True, dtype=torch.float64).norm_weight_ih.dtype == torch.float64


def test_values_and_gradients():
    torch.manual_seed(1)
    lstm = randomised(nn.LSTM(4, 5, layer_norm=True).double())
    x, h, c = (torch.randn(*shape, dtype=torch.float64) for shape in ((6, 3, 4), (1, 3, 5), (1, 3, 5)))
    got, (h_n, c_n) = lstm(x, (h, c))
    want, (h_want, c_want) = by_hand(lstm, x, h[0], c[0])
    torch.testing.assert_close(got, want)
    torch.testing.assert_close((h_n[0], c_n[0]), (h_want, c_want))
    weights = torch.randn_like(got)
    grads = torch.autograd.grad((got * weights).sum(), list(lstm.parameters()))
    for a, b in zip(grads, torch.autograd.grad((want * weights).sum(), list(lstm.parameters())), strict=True):
        torch.testing.assert_close(a, b)


def test_packed_padded_and_batch_first_agree():
    torch.manual_seed(2)
    options = {"layer_norm": True, "zoneout": (0.3, 0.1), "bidirectional": True, "batch_first": True}
    lstm = randomised(nn.LSTM(4, 5, 2, **options).double()).eval()
    x, lengths = torch.randn(3, 6, 4, dtype=torch.float64), torch.tensor([3, 6, 1])
    packed, (h_n, c_n) = lstm(pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False))
    output, _ = pad_packed_sequence(packed, batch_first=True)
    for row, length in enumerate(lengths.tolist()):
        alone, (h, c) = lstm(x[row, :length])
        torch.testing.assert_close(output[row, :length], alone)
        torch.testing.assert_close((h_n[:, row], c_n[:, row]), (h, c))


@pytest.mark.parametrize(
    "options", [{"layer_norm": True}, {"zoneout": (0.2, 0.4)}, {"layer_norm": True, "zoneout": 0.2}]
)
def test_a_cell_is_a_step_of_the_layer(options):
    torch.manual_seed(3)
    lstm = randomised(nn.LSTM(4, 5, **options)).eval()
    cell = nn.LSTMCell(4, 5, **options).eval()
    cell.load_state_dict({name.removesuffix("_l0"): value for name, value in lstm.state_dict().items()})
    x, h, c = torch.randn(2, 4), torch.randn(2, 5), torch.randn(2, 5)
    _, (h_n, c_n) = lstm(x[None], (h[None], c[None]))
    with torch.no_grad():
        torch.testing.assert_close(cell(x, (h, c)), (h_n[0], c_n[0]))
        torch.testing.assert_close(cell(x[0], (h[0], c[0])), (h_n[0, 0], c_n[0, 0]))
    torch.testing.assert_close(cell(x, (h, c)), (h_n[0], c_n[0]))
    for a, b in zip(
        torch.autograd.grad(cell(x, (h, c))[0].sum(), list(cell.parameters())),
        torch.autograd.grad(lstm(x[None], (h[None], c[None]))[0].sum(), list(lstm.parameters())),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("sequence", "step"), [(nn.GRU, nn.GRUCell), (nn.RNN, nn.RNNCell)])
def test_zoneout_of_the_other_cells(sequence, step):
    torch.manual_seed(4)
    layer, cell = sequence(4, 5, zoneout=0.25).eval(), step(4, 5, zoneout=0.25).eval()
    cell.load_state_dict({name.removesuffix("_l0"): value for name, value in layer.state_dict().items()})
    plain = step(4, 5)
    plain.load_state_dict(cell.state_dict())
    x, h = torch.randn(2, 4), torch.randn(2, 5)
    want = 0.25 * h + 0.75 * plain(x, h)
    torch.testing.assert_close(cell(x, h), want)
    torch.testing.assert_close(layer(x[None], h[None])[0][0], want)


def test_zoneout_in_training():
    """Units keep their value about as often as they should; the seed repeats it; evaluation is the expectation."""
    module = nn.LSTM(4, 100, zoneout=(0.5, 0.25))
    x, h, c = torch.randn(1, 50, 4), torch.randn(1, 50, 100), torch.randn(1, 50, 100)
    torch.manual_seed(5)
    output, (h_n, c_n) = module(x, (h, c))
    torch.manual_seed(5)
    assert torch.equal(module(x, (h, c))[0], output)
    assert not torch.equal(module(x, (h, c))[0], output)
    assert abs(float((h_n == h).float().mean()) - 0.25) < 0.03
    assert abs(float((c_n == c).float().mean()) - 0.5) < 0.03
    plain = nn.LSTM(4, 100)
    plain.load_state_dict(module.state_dict())
    _, (h_plain, c_plain) = plain(x, (h, c))
    _, (h_mean, c_mean) = module.eval()(x, (h, c))
    torch.testing.assert_close(h_mean, 0.25 * h + 0.75 * h_plain)
    torch.testing.assert_close(c_mean, 0.5 * c + 0.5 * c_plain)
    torch.testing.assert_close(h_n[h_n != h], h_plain[h_n != h])


def test_no_rows():
    output, (h_n, c_n) = nn.LSTM(4, 5, layer_norm=True)(torch.zeros(3, 0, 4))
    assert output.shape == (3, 0, 5)
    assert h_n.shape == c_n.shape == (1, 0, 5)


def test_errors():
    with pytest.raises(ValueError, match="zoneout"):
        nn.LSTM(4, 5, zoneout=1.0)
    with pytest.raises(ValueError, match="zoneout: expected a number, or one for c and one for h"):
        nn.LSTM(4, 5, zoneout=(0.1, 0.2, 0.3))
    with pytest.raises(ValueError, match="zoneout"):
        nn.GRU(4, 5, zoneout=(0.1, 0.2))
    with pytest.raises(TypeError):
        nn.GRU(4, 5, layer_norm=True)
    with pytest.raises(RuntimeError, match=r"input.size\(-1\) must be equal to input_size"):
        nn.LSTM(4, 5, layer_norm=True)(torch.zeros(3, 2, 6))


def test_accelerate_leaves_them_alone():
    model = torch.nn.Sequential(nn.LSTM(4, 5, layer_norm=True))
    accelerate(model)
    assert model[0].layer_norm
