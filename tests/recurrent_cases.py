"""What the tests of the recurrent family share: cases, PyTorch's answer to a case, and the path that the ops take."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any
from unittest import mock

import torch
from emulated import Gpu
from hypothesis import strategies as st
from torch import Tensor

from fastgen import _load, functional, random, reference
from fastgen._ops import recurrent as ops
from fastgen.reference.recurrent import Mode

SEQUENCES = {
    Mode.LSTM: (torch.nn.LSTM, functional.lstm),
    Mode.GRU: (torch.nn.GRU, functional.gru),
    Mode.RNN_TANH: (torch.nn.RNN, functional.rnn_tanh),
    Mode.RNN_RELU: (torch.nn.RNN, functional.rnn_relu),
}
CELLS = {
    Mode.LSTM: (torch.nn.LSTMCell, functional.lstm_cell),
    Mode.GRU: (torch.nn.GRUCell, functional.gru_cell),
    Mode.RNN_TANH: (torch.nn.RNNCell, functional.rnn_tanh_cell),
    Mode.RNN_RELU: (torch.nn.RNNCell, functional.rnn_relu_cell),
}


@contextlib.contextmanager
def taking(path: str) -> Iterator[None]:
    """Every recurrent op by one path: "reference" or an instruction set."""
    with contextlib.ExitStack() as stack:
        if path == "reference":
            for name in ops.SCHEMAS:
                stack.enter_context(mock.patch.object(ops, f"_{name}", getattr(reference, name)))
        else:
            stack.enter_context(_load.use_cpu_isa(path))
        yield


@contextlib.contextmanager
def on(gpu: Gpu) -> Iterator[None]:
    """Every recurrent op by the CUDA kernels of this device."""
    with contextlib.ExitStack() as stack:
        for name in ops.SCHEMAS:
            stack.enter_context(mock.patch.object(ops, f"_{name}", getattr(gpu.ops, name).default))
        yield


def cell_operands(
    mode: Mode, batch: int, inputs: int, hidden: int, dtype: torch.dtype, bias: bool = True, seed: int = 0
) -> tuple[Any, ...]:
    """(mode, input, h, c, w_ih, w_hh, b_ih, b_hh) of a step; the size of the weights keeps the gates in their bend."""
    g = random.Generator(seed)

    def draw(*shape: int, std: float = 1.0) -> Tensor:
        return random.normal(*shape, std=std, generator=g).to(dtype)

    rows = mode.gates * hidden
    x, h, c = draw(batch, inputs), draw(batch, hidden), draw(batch, hidden)
    weights = draw(rows, inputs, std=max(inputs, 1) ** -0.5), draw(rows, hidden, std=hidden**-0.5)
    biases = (draw(rows), draw(rows)) if bias else (None, None)
    return mode, x, h, c if mode == Mode.LSTM else None, *weights, *biases


@contextlib.contextmanager
def without_onednn() -> Iterator[None]:
    """torch.nn by ATen's own loops: in every dtype on every machine, and differentiable twice."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "TF32 acceleration")  # of the switch itself
        with torch.backends.mkldnn.flags(enabled=False):
            yield


@dataclass(frozen=True)
class Case:
    """One call of a stacked recurrent function, with its operands as a function of `seed`."""

    mode: Mode = Mode.LSTM
    input_size: int = 4
    hidden_size: int = 5
    proj_size: int = 0
    num_layers: int = 1
    bias: bool = True
    bidirectional: bool = False
    batch_first: bool = False
    lengths: tuple[int, ...] = (3, 3)  # of the rows; packed if `packed`, else all equal
    packed: bool = False
    states: bool = True
    masked: bool = False
    layer_norm: bool = False
    zoneout: float | tuple[float, float] = 0.0
    seed: int = 0

    def __str__(self) -> str:
        """What differs from the plain case."""
        others = (f for f in fields(self) if f.name != "mode" and getattr(self, f.name) != f.default)
        return "-".join([self.mode.name, *(f"{f.name}={getattr(self, f.name)}" for f in others)])

    def module(self, dtype: torch.dtype = torch.float64) -> torch.nn.RNNBase:
        extra: dict[str, object] = {}
        if self.mode == Mode.LSTM:
            extra["proj_size"] = self.proj_size
        if self.mode in (Mode.RNN_TANH, Mode.RNN_RELU):
            extra["nonlinearity"] = "relu" if self.mode == Mode.RNN_RELU else "tanh"
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(self.seed)
            return SEQUENCES[self.mode][0](
                self.input_size,
                self.hidden_size,
                self.num_layers,
                bias=self.bias,
                batch_first=self.batch_first,
                bidirectional=self.bidirectional,
                dtype=torch.float64,
                **extra,
            ).to(dtype)

    @property
    def batch_sizes(self) -> Tensor | None:
        if not self.packed:
            return None
        return torch.tensor([sum(n > t for n in self.lengths) for t in range(self.lengths[0])])

    def operands(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        """input and hx, leaves that require gradients; the numbers are those of float64, rounded."""
        draw = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype).requires_grad_()

        rows, steps = len(self.lengths), self.lengths[0]
        if self.packed:
            x = normal(sum(self.lengths), self.input_size)
        else:
            x = normal(*((rows, steps) if self.batch_first else (steps, rows)), self.input_size)
        if not self.states:
            return x, None
        stacked = self.num_layers * (2 if self.bidirectional else 1)
        h = normal(stacked, rows, self.proj_size or self.hidden_size)
        return x, (h, normal(stacked, rows, self.hidden_size)) if self.mode == Mode.LSTM else (h,)

    def weights(self, dtype: torch.dtype = torch.float64) -> list[Tensor]:
        """Leaves that require gradients: the flat weights, and with layer norm its own behind them."""
        draw = torch.Generator().manual_seed(self.seed)
        weights = list(self.module()._flat_weights)
        if self.layer_norm:
            wide, narrow = self.mode.gates * self.hidden_size, self.hidden_size
            for _ in range(self.num_layers * (2 if self.bidirectional else 1)):
                weights += [1 + torch.randn(n, generator=draw, dtype=torch.float64) / 4 for n in (wide, wide, narrow)]
                weights.append(torch.randn(narrow, generator=draw, dtype=torch.float64) / 4)
        return [w.detach().to(dtype).requires_grad_() for w in weights]

    def mask(self, dtype: torch.dtype = torch.float64) -> Tensor | None:
        if not self.masked:
            return None
        stacked = self.num_layers * (2 if self.bidirectional else 1)
        shape = (stacked, len(self.lengths), self.proj_size or self.hidden_size)
        numbers = torch.arange(math.prod(shape)).reshape(shape)  # not drawn: vmap would object
        return (numbers * 7 % 10 < 7).to(dtype) / 0.7

    def ours(
        self,
        x: Tensor,
        hx: tuple[Tensor, ...] | None,
        weights: list[Tensor],
        dropout: float = 0.0,
        **options: object,
    ) -> tuple[Tensor, ...]:
        """(output, h_n[, c_n]) by fastgen.functional; the draws of zoneout are the same each time."""
        if self.layer_norm:
            count = 4 * self.num_layers * (2 if self.bidirectional else 1)
            weights, options["norm_weights"] = weights[:-count], weights[-count:]
        if self.zoneout:
            options.update(zoneout=self.zoneout, generator=random.Generator(self.seed))
        return SEQUENCES[self.mode][1](
            x,
            hx if hx is None or self.mode == Mode.LSTM else hx[0],
            weights,
            self.bias,
            self.num_layers,
            dropout,
            True,
            self.bidirectional,
            self.batch_first,
            batch_sizes=self.batch_sizes,
            state_dropout_mask=self.mask(x.dtype),
            **options,
        )

    def theirs(self, x: Tensor, hx: tuple[Tensor, ...] | None, module: torch.nn.RNNBase) -> tuple[Tensor, ...]:
        """(output, h_n[, c_n]) by torch.nn; it knows no mask, layer norm or zoneout."""
        assert not self.masked
        assert not self.layer_norm
        assert not self.zoneout
        given = x if not self.packed else torch.nn.utils.rnn.PackedSequence(x, self.batch_sizes)
        output, states = module(given, hx if hx is None or self.mode == Mode.LSTM else hx[0])
        output = output.data if self.packed else output
        return (output, *states) if self.mode == Mode.LSTM else (output, states)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    mode = draw(st.sampled_from(Mode))
    packed = draw(st.booleans())
    lengths = draw(st.lists(st.integers(1, 7), min_size=1, max_size=5))
    hidden = draw(st.sampled_from((1, 2, 3, 5, 8, 9, 16, 17, 33)))
    return Case(
        mode=mode,
        input_size=draw(st.sampled_from((1, 2, 3, 7, 8, 17))),
        hidden_size=hidden,
        proj_size=draw(st.integers(0, hidden - 1)) if mode == Mode.LSTM else 0,
        num_layers=draw(st.integers(1, 3)),
        bias=draw(st.booleans()),
        bidirectional=draw(st.booleans()),
        batch_first=draw(st.booleans()),
        lengths=tuple(sorted(lengths, reverse=True)) if packed else (lengths[0],) * len(lengths),
        packed=packed,
        states=draw(st.booleans()),
        seed=draw(st.integers(0, 2**31)),
    )


# One case for each thing that can be asked for, small enough for numerical gradients.
EXAMPLES = [
    *(Case(mode=mode) for mode in Mode),
    *(Case(mode=mode, batch_first=True, lengths=(1, 1)) for mode in Mode),
    *(Case(mode=mode, packed=True, lengths=(4, 2, 1), num_layers=2, bidirectional=True) for mode in Mode),
    *(Case(mode=mode, masked=True, batch_first=True, bias=False, lengths=(3, 3)) for mode in Mode),
    Case(proj_size=2, num_layers=2, states=False),
    Case(proj_size=3, packed=True, lengths=(3, 3, 1), bidirectional=True, masked=True),
]
# And for what PyTorch does not have, where the cell needs whole rows of units.
WHOLE_ROWS = [
    Case(layer_norm=True),
    Case(layer_norm=True, packed=True, lengths=(4, 2, 1), num_layers=2, bidirectional=True, zoneout=(0.3, 0.1)),
    Case(layer_norm=True, proj_size=3, batch_first=True, bias=False, masked=True, zoneout=(0.0, 0.3)),
    *(Case(mode=mode, zoneout=0.4, lengths=(3, 2), packed=True) for mode in Mode),
]
