"""`torch.nn` with faster modules in the places where fastgen has them: `import fastgen.nn as nn`.

Every name of `torch.nn`, and every submodule of it, is here and, but for the modules below, is the same
object, so checkpoints, pickles, `isinstance` and `torch.compile` see no difference. A module of fastgen's own
lives in a file of this package and is imported below, after the star, under the name that it takes over from
PyTorch, of whose module it is a subclass: LSTM, GRU, RNN, LSTMCell, GRUCell, RNNCell, Linear,
MultiheadAttention, Transformer, TransformerEncoderLayer, TransformerDecoderLayer.
"""

import torch.nn as _torch_nn
from torch.nn import *  # noqa: F403

from fastgen.nn import _aliases, _dynamo
from fastgen.nn.linear import Linear as Linear
from fastgen.nn.recurrent import GRU as GRU
from fastgen.nn.recurrent import LSTM as LSTM
from fastgen.nn.recurrent import RNN as RNN
from fastgen.nn.recurrent import GRUCell as GRUCell
from fastgen.nn.recurrent import LSTMCell as LSTMCell
from fastgen.nn.recurrent import RNNCell as RNNCell
from fastgen.nn.transformer import MultiheadAttention as MultiheadAttention
from fastgen.nn.transformer import Transformer as Transformer
from fastgen.nn.transformer import TransformerDecoderLayer as TransformerDecoderLayer
from fastgen.nn.transformer import TransformerEncoderLayer as TransformerEncoderLayer

_aliases.install()
_dynamo.install()


def __getattr__(name: str) -> object:
    # What the star leaves out: private names, and submodules that torch.nn loads on demand.
    try:
        return getattr(_torch_nn, name)
    except AttributeError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name) from None


def __dir__() -> list[str]:
    return sorted({*globals(), *dir(_torch_nn)})
