"""torch.jit.script of a model with modules of fastgen's own: one line that says what to do."""

from __future__ import annotations

import pytest
import torch

import fastgen
import fastgen.nn as nn

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")


@pytest.mark.parametrize(
    ("module", "name"),
    [
        *(
            (getattr(nn, name)(4, 4), name)
            for name in ("LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell", "Linear")
        ),
        (nn.MultiheadAttention(8, 2), "MultiheadAttention"),
        (nn.TransformerEncoderLayer(8, 2), "MultiheadAttention"),
        (nn.TransformerDecoderLayer(8, 2), "MultiheadAttention"),
        (fastgen.accelerate(torch.nn.Sequential(torch.nn.ReLU(), torch.nn.LSTM(4, 4))), "LSTM"),
    ],
)
def test_a_module_of_ours_is_named(module, name):
    with pytest.raises(NotImplementedError) as caught:
        torch.jit.script(module)
    assert str(caught.value) == (
        f"torch.jit.script: expected torch.nn.{name}, got fastgen.nn.{name}; use torch.jit.trace, or load the state "
        "dict into a model of torch.nn"
    )


def test_what_is_torchs_is_scripted():
    module, x = nn.Sequential(nn.LayerNorm(4), nn.ReLU()), torch.randn(3, 4)
    torch.testing.assert_close(torch.jit.script(module)(x), module(x))
