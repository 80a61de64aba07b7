"""LSTM, GRU, RNN and their cells: PyTorch's classes with another `forward`.

Constructors, parameters, initial values, state dicts, shapes and errors are PyTorch's by inheritance. A call
that fastgen has no kernel for (its device or dtype), and one that PyTorch refuses, goes to PyTorch's own
`forward`: it computes the first as it always did, and words the error of the second.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.utils.rnn import PackedSequence

from fastgen import functional, random
from fastgen._load import kernel_devices
from fastgen._ops.library import transforming
from fastgen._ops.recurrent import Mode, recurrent_cell
from fastgen._validate import boolean, number
from fastgen.nn import _script

__all__ = ["GRU", "LSTM", "RNN", "GRUCell", "LSTMCell", "RNNCell"]

_DTYPES = frozenset((torch.float32, torch.float64, torch.bfloat16, torch.float16))

SEQUENCE_DEVICES, CELL_DEVICES = kernel_devices("recurrent"), kernel_devices("recurrent_cell")


def _ours(x: Tensor, devices: frozenset[str]) -> bool:
    """Whether fastgen is to compute with `x`: where it has kernels, and under what PyTorch's modules cannot be."""
    if not isinstance(x, Tensor) or torch.jit.is_tracing():  # type: ignore[attr-defined]
        return False  # a trace is to hold PyTorch's op, which ONNX and TorchScript know
    # `device.type` takes five times as long as `is_cpu`, a tenth of what a cell's checks take.
    return ("cpu" if x.is_cpu else x.device.type) in devices or transforming() or forward_ad._current_level >= 0


def _alike(x: Tensor, others: Iterable[Any]) -> bool:
    """Whether `x` has a dtype and a layout that we take, and the others its device and, but under autocast, its dtype.

    Of the weights, as in PyTorch, the first stands for all; functions check the rest.
    """
    dtype, device, mixed = x.dtype, x.device, torch._C._is_any_autocast_enabled()
    for other in others:
        if not isinstance(other, Tensor) or other.device != device or (other.dtype is not dtype and not mixed):
            return False
    return dtype in _DTYPES and x.layout is torch.strided


def _unpack(hx: Any, states: int) -> list[Any]:
    """What was given for the states, in a list: of an LSTM's (h, c) both, else one, of None none."""
    if hx is None:
        return []
    return list(hx) if states == 2 and isinstance(hx, (tuple, list)) else [hx]


def _weights(module: torch.nn.Module, names: Iterable[str]) -> list[Any]:
    """Parameters by name; None for what is not there."""
    parameters = module._parameters  # for `getattr` the module looks in three places first
    try:
        return [parameters[name] for name in names]
    except KeyError:  # one that is computed, as by a parametrisation
        return [getattr(module, name, None) for name in names]


def _mask(*size: int, p: float, like: Tensor) -> Tensor:
    """What a dropout of probability `p` multiplies by: 0, or 1 / (1 - p)."""
    return random.dropout_mask(*size, p=p, dtype=like.dtype, device=like.device) / (1 - p)


def _zoneout(value: Any, states: int) -> float | tuple[float, float]:
    """A probability for each state, or one for all."""
    if states == 2 and isinstance(value, (tuple, list)):
        if len(value) != 2:
            raise ValueError(f"zoneout: expected a number, or one for c and one for h, got {value!r}")
        return number("zoneout", value[0], minimum=0, below=1), number("zoneout", value[1], minimum=0, below=1)
    return number("zoneout", value, minimum=0, below=1)


def _add_norm(module: torch.nn.Module, suffix: str, like: Tensor) -> tuple[str, ...]:
    """Adds the parameters of the layer norms of an LSTM with weights W_hh `like`; gives their names."""
    sizes = {"norm_weight_ih": like.shape[0], "norm_weight_hh": like.shape[0]}
    sizes |= {"norm_weight_c": like.shape[0] // 4, "norm_bias_c": like.shape[0] // 4}
    for name, size in sizes.items():
        module.register_parameter(name + suffix, torch.nn.Parameter(like.new_empty(size)))
    return tuple(name + suffix for name in sizes)


def _reset_norm(module: torch.nn.Module, names: Iterable[str]) -> None:
    for name in names:
        torch.nn.init.constant_(getattr(module, name), 0.0 if "bias" in name else 1.0)


class _Sequence(torch.nn.RNNBase):
    """The `forward` of LSTM, GRU and RNN, and the options that PyTorch does not have."""

    __prepare_scriptable__ = _script.refuse
    _states = 1

    # What a module has that PyTorch built and `fastgen.accelerate` took over.
    input_dropout: float = 0.0
    state_dropout: float = 0.0
    weight_dropout: float = 0.0
    zoneout: float | tuple[float, float] = 0.0
    layer_norm: bool = False
    layer_norm_eps: float = 1e-5
    _norm_names: tuple[str, ...] = ()

    def __init__(
        self,
        *args: Any,
        input_dropout: float = 0.0,
        state_dropout: float = 0.0,
        weight_dropout: float = 0.0,
        zoneout: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.zoneout = _zoneout(zoneout, self._states)
        self.input_dropout = number("input_dropout", input_dropout, minimum=0, below=1)
        self.state_dropout = number("state_dropout", state_dropout, minimum=0, below=1)
        self.weight_dropout = number("weight_dropout", weight_dropout, minimum=0, below=1)

    # PyTorch stores this list and looks at each call whether a weight has been replaced since. Read when it is
    # needed, it is never out of date, and keeps nothing alive that a parametrisation once computed.
    @property
    def _flat_weights(self) -> list[Any]:
        return _weights(self, self._flat_weights_names)

    @_flat_weights.setter
    def _flat_weights(self, value: object) -> None:
        pass

    def extra_repr(self) -> str:
        names = ("input_dropout", "state_dropout", "weight_dropout", "zoneout", "layer_norm")
        ours = [f"{name}={getattr(self, name)}" for name in names if getattr(self, name)]
        return ", ".join([super().extra_repr(), *ours])

    def forward(self, input: Any, hx: Any = None) -> Any:
        x, batch_sizes, order, inverse = input if isinstance(input, PackedSequence) else (input, None, None, None)
        states, weights = _unpack(hx, self._states), self._flat_weights
        drops = self.training and (self.input_dropout or self.state_dropout or self.weight_dropout)
        special = bool(self.zoneout) or self.layer_norm  # PyTorch cannot
        if not self._fits(x, batch_sizes, hx, states, weights, special):
            result = super().forward(input, hx)
            if special:
                raise RuntimeError(f"input: expected a tensor that fits {self}, got {tuple(x.shape)} of {x.dtype}")
            return result
        if not (special or drops or _ours(x, SEQUENCE_DEVICES)):
            return super().forward(input, hx)

        unbatched = batch_sizes is None and x.dim() == 2
        batch_dim = 0 if self.batch_first else 1
        if unbatched:
            x, states = x.unsqueeze(batch_dim), [s.unsqueeze(1) for s in states]
        elif order is not None:
            states = [s.index_select(1, order) for s in states]
        state_dtype = states[0].dtype if states else x.dtype
        state_mask = None
        if drops:
            x, weights, state_mask = self._drop(x, weights, states, batch_sizes, order)

        output, *states = _SEQUENCES[self.mode](
            x,
            None if hx is None else self._pack(states),
            weights,
            self.bias,
            self.num_layers,
            self.dropout,
            self.training,
            self.bidirectional,
            self.batch_first,
            batch_sizes=batch_sizes,
            state_dropout_mask=state_mask,
            **self._options(),
        )
        if output.dtype is not state_dtype:
            output, states = self._widened(output, states, state_dtype, batch_sizes is not None)
        if unbatched:
            return output.squeeze(batch_dim), self._pack([s.squeeze(1) for s in states])
        if inverse is not None:
            states = [s.index_select(1, inverse) for s in states]
        if batch_sizes is not None:
            return PackedSequence(output, batch_sizes, order, inverse), self._pack(states)
        return output, self._pack(states)

    def _widened(
        self, output: Tensor, states: list[Tensor], dtype: torch.dtype, packed: bool
    ) -> tuple[Tensor, list[Tensor]]:
        """What autocast made narrower than the states of `dtype` that came in, in the dtypes that PyTorch gives it.

        A GRU, and an LSTM that oneDNN does not compute (packed or with a projection), widen what products and states
        add up to; what a projection gives is a product.
        """
        if self.mode != "GRU" and not (self.mode == "LSTM" and (packed or self.proj_size)):
            return output, states
        products = [output, *states][: 2 if self.proj_size else 0]
        sums = [output, *states][len(products) :]
        output, *states = [*products, *(r.to(torch.promote_types(r.dtype, dtype)) for r in sums)]
        return output, states

    def _options(self) -> dict[str, Any]:
        """Those of the function, that PyTorch's do not have."""
        return {"zoneout": self.zoneout} if self.zoneout else {}

    def _pack(self, states: list[Tensor]) -> Any:
        return tuple(states) if self.mode == "LSTM" else states[0]

    def _fits(
        self, x: Tensor, batch_sizes: Tensor | None, hx: Any, states: list[Any], weights: list[Any], empty: bool
    ) -> bool:
        """Whether all types, shapes and dtypes are as they should be; PyTorch has the words for what is not.

        empty: whether the input may be without rows or features.
        """
        if x.dim() not in ((2, 3) if batch_sizes is None else (2,)) or x.is_nested:
            return False
        if x.size(-1) != self.input_size:
            return False
        if x.numel() == 0 and not empty:
            return False
        if not _alike(x, [*states, weights[0]]):
            return False
        if hx is None:
            return True
        layers = self.num_layers * (2 if self.bidirectional else 1)
        if batch_sizes is None:
            batch = [x.size(0 if self.batch_first else 1)] if x.dim() == 3 else []
        elif torch.compiler.is_compiling():
            batch = [states[0].size(-2)]  # a graph cannot depend on the number in batch_sizes
        else:
            batch = [int(batch_sizes[0])]
        sizes = [self.proj_size or self.hidden_size, *([self.hidden_size] if self.mode == "LSTM" else [])]
        return [list(s.shape) for s in states] == [[layers, *batch, size] for size in sizes]

    def _drop(
        self, x: Tensor, weights: list[Any], states: list[Tensor], batch_sizes: Tensor | None, order: Tensor | None
    ) -> tuple[Tensor, list[Any], Tensor | None]:
        """Input and weights after dropout, and the mask of the state; each row has its own, packed or not."""
        if batch_sizes is None:
            rows = x.size(0 if self.batch_first else 1)
        elif states:
            rows = states[0].size(1)
        else:
            rows = int(batch_sizes[0])
            torch._check(rows > 0)  # what a graph cannot know
        if self.input_dropout:
            mask = _mask(rows, self.input_size, p=self.input_dropout, like=x)
            if batch_sizes is None:
                mask = mask.unsqueeze(1 if self.batch_first else 0)
            else:
                # Step t holds the first batch_sizes[t] rows in sorted order, one step after the other.
                first = batch_sizes.cumsum(0) - batch_sizes
                row = torch.arange(x.size(0)) - first.repeat_interleave(batch_sizes, output_size=x.size(0))
                row = row.to(x.device)
                mask = mask[row if order is None else order[row]]
            x = x * mask
        if self.weight_dropout:
            for i, name in enumerate(self._flat_weights_names):
                if name.startswith("weight_hh"):
                    weights[i] = weights[i] * _mask(*weights[i].shape, p=self.weight_dropout, like=weights[i])
        state_mask = None
        if self.state_dropout:
            layers = self.num_layers * (2 if self.bidirectional else 1)
            state_mask = _mask(layers, rows, self.proj_size or self.hidden_size, p=self.state_dropout, like=x)
            if order is not None:
                state_mask = state_mask.index_select(1, order)
        return x, weights, state_mask


_SEQUENCES: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "LSTM": functional.lstm,
    "GRU": functional.gru,
    "RNN_TANH": functional.rnn_tanh,
    "RNN_RELU": functional.rnn_relu,
}


class LSTM(_Sequence, torch.nn.LSTM):
    """`torch.nn.LSTM` on fastgen's kernels, with three kinds of dropout, zoneout and layer norm of its own.

    Arguments, inputs and outputs are those of `torch.nn.LSTM`. The keyword arguments below are off by default;
    all but the last two are probabilities (0 <= p < 1). Dropout acts in training mode and scales what it keeps
    by 1 / (1 - p). It and zoneout draw from
    the default stream of `fastgen.random`, so that `torch.manual_seed` repeats them, as does what `dropout=`
    drops between layers. Parameters and state dict stay PyTorch's. Packed or padded, a sequence gets the same
    masks.

    Args:
        input_dropout: of a feature of the input, the same features at every time step, drawn for each sequence
            (Gal & Ghahramani, "A Theoretically Grounded Application of Dropout in Recurrent Neural Networks",
            2016, section 4).
        state_dropout: of a component of the hidden state on its way into the next step, the same components at
            every step, drawn for each sequence, layer and direction (ibid.). The output is not masked.
        weight_dropout: of an element of the hidden-to-hidden weights, drawn once a call (DropConnect: Merity,
            Keskar & Socher, "Regularizing and Optimizing LSTM Language Models", 2018, section 2).
        zoneout: of a unit to keep its value of the step before, for each step and sequence anew; (p_c, p_h) for
            cells and states, or a number for both. In evaluation a unit keeps that share (Krueger et al., "Zoneout:
            Regularizing RNNs by Randomly Preserving Hidden Activations", 2017).
        layer_norm: whether the products with the input and with the state, and the cells before the output, are
            normalised (Ba, Kiros & Hinton, "Layer Normalization", 2016). Each layer and direction then has the
            parameters `norm_weight_ih_l0` (4 hidden_size,), `norm_weight_hh_l0` (4 hidden_size,), `norm_weight_c_l0`
            (hidden_size,) and `norm_bias_c_l0` (hidden_size,), which start as ones and zeros. A projection
            (`proj_size`) follows behind and is not normalised.
        layer_norm_eps: what is added to a variance.

    Raises:
        ValueError: for a probability out of range; else what `torch.nn.LSTM` raises.
    """

    _states = 2

    def __init__(self, *args: Any, layer_norm: bool = False, layer_norm_eps: float = 1e-5, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.layer_norm = boolean("layer_norm", layer_norm)
        self.layer_norm_eps = number("layer_norm_eps", layer_norm_eps, minimum=0)
        if not layer_norm:
            return
        for name in self._flat_weights_names:
            if name.startswith("weight_hh"):
                self._norm_names += _add_norm(self, name.removeprefix("weight_hh"), getattr(self, name))
        _reset_norm(self, self._norm_names)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        _reset_norm(self, self._norm_names)

    def _options(self) -> dict[str, Any]:
        if not self.layer_norm:
            return super()._options()
        norm = [getattr(self, name) for name in self._norm_names]
        return {**super()._options(), "norm_weights": norm, "layer_norm_eps": self.layer_norm_eps}


class GRU(_Sequence, torch.nn.GRU):
    """`torch.nn.GRU` on fastgen's kernels; the three kinds of dropout and `zoneout` as of `LSTM`."""


class RNN(_Sequence, torch.nn.RNN):
    """`torch.nn.RNN` on fastgen's kernels; the three kinds of dropout and `zoneout` as of `LSTM`."""


def has_kernels(module: Any) -> bool:
    """Whether `module` is one of ours on a device with kernels, so that `torch.compile` will see one op of it."""
    return isinstance(module, _Sequence) and all(p.device.type in SEQUENCE_DEVICES for p in module.parameters())


# ---------------------------------------------------------------------------------------------------
# One step


_CELL_WEIGHTS = "weight_ih", "weight_hh", "bias_ih", "bias_hh"


class _Cell(torch.nn.RNNCellBase):
    """The `forward` of LSTMCell, GRUCell and RNNCell, and the options that PyTorch does not have."""

    __prepare_scriptable__ = _script.refuse
    _states = 1
    _mode: Mode | None
    """The kernel's; None where PyTorch is to say that it knows no such cell."""
    zoneout: float | tuple[float, float] = 0.0
    layer_norm: bool = False
    layer_norm_eps: float = 1e-5
    _norm_names: tuple[str, ...] = ()

    def __init__(self, *args: Any, zoneout: float = 0.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.zoneout = _zoneout(zoneout, self._states)

    def extra_repr(self) -> str:
        ours = [f"{name}={getattr(self, name)}" for name in ("zoneout", "layer_norm") if getattr(self, name)]
        return ", ".join([super().extra_repr(), *ours])

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        states, mode, weights = _unpack(hx, self._states), self._mode, _weights(self, _CELL_WEIGHTS)
        special = bool(self.zoneout) or self.layer_norm
        # Under autocast PyTorch's cells keep a state of full precision from step to step; so let them.
        ours = _ours(input, CELL_DEVICES) and not torch._C._is_any_autocast_enabled()
        if mode is None or not (ours or special) or not self._fits(input, hx, states, weights):
            result = super().forward(input, hx)
            if special:
                raise RuntimeError(f"input: expected a tensor that fits {self}, got {tuple(input.shape)}")
            return result

        unbatched = input.dim() == 1
        if unbatched:
            input, states = input.unsqueeze(0), [s.unsqueeze(0) for s in states]
        if not states:
            states = [input.new_zeros(input.size(0), self.hidden_size)] * self._states
        c = states[1] if mode is Mode.LSTM else None
        if special:
            h_1, c_1 = self._special(mode, input, states, weights)
        else:
            # Past `functional`, which would check again what fits: in a loop over steps Python is half of the time.
            h_1, c_1 = recurrent_cell(mode, input, states[0], c, *weights)
        if unbatched:
            h_1, c_1 = h_1.squeeze(0), c_1 if c is None else c_1.squeeze(0)
        return h_1 if c is None else (h_1, c_1)

    def _special(self, mode: Mode, input: Tensor, states: list[Tensor], weights: list[Any]) -> Any:
        """(h, c) with layer norm or zoneout; without c where there is none."""
        options: dict[str, Any] = {"zoneout": self.zoneout, "training": self.training}
        if self.layer_norm:
            norm = [getattr(self, name) for name in self._norm_names]
            options |= {"norm_weights": norm, "layer_norm_eps": self.layer_norm_eps}
        result = _CELLS[mode](input, tuple(states) if mode is Mode.LSTM else states[0], *weights, **options)
        return result if mode is Mode.LSTM else (result, None)

    def _fits(self, x: Tensor, hx: Any, states: list[Any], weights: list[Any]) -> bool:
        """Whether all types, shapes and dtypes are as they should be; PyTorch has the words for what is not."""
        if x.dim() not in (1, 2) or x.size(-1) != self.input_size or x.numel() == 0:
            return False
        if (weights[2] is None) != (weights[3] is None) or not _alike(x, (*states, weights[0])):
            return False
        if hx is not None:
            if len(states) != self._states:
                return False
            shape = (*x.shape[:-1], self.hidden_size)
            for state in states:
                if state.shape != shape:
                    return False
        return True


_ELMAN = {"tanh": Mode.RNN_TANH, "relu": Mode.RNN_RELU}
_CELLS: dict[Mode, Callable[..., Any]] = {
    Mode.LSTM: functional.lstm_cell,
    Mode.GRU: functional.gru_cell,
    Mode.RNN_TANH: functional.rnn_tanh_cell,
    Mode.RNN_RELU: functional.rnn_relu_cell,
}


class LSTMCell(_Cell, torch.nn.LSTMCell):
    """`torch.nn.LSTMCell` on fastgen's kernel; `zoneout`, `layer_norm` and `layer_norm_eps` as of `LSTM`.

    The parameters of layer norm are `norm_weight_ih`, `norm_weight_hh`, `norm_weight_c` and `norm_bias_c`.
    """

    _states = 2
    _mode = Mode.LSTM

    def __init__(self, *args: Any, layer_norm: bool = False, layer_norm_eps: float = 1e-5, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.layer_norm = boolean("layer_norm", layer_norm)
        self.layer_norm_eps = number("layer_norm_eps", layer_norm_eps, minimum=0)
        if layer_norm:
            self._norm_names = _add_norm(self, "", self.weight_hh)
            _reset_norm(self, self._norm_names)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        _reset_norm(self, self._norm_names)


class GRUCell(_Cell, torch.nn.GRUCell):
    """`torch.nn.GRUCell` on fastgen's kernel; `zoneout` as of `LSTM`."""

    _mode = Mode.GRU


class RNNCell(_Cell, torch.nn.RNNCell):
    """`torch.nn.RNNCell` on fastgen's kernel; `zoneout` as of `LSTM`."""

    @property
    def _mode(self) -> Mode | None:  # type: ignore[override]
        return _ELMAN.get(self.nonlinearity)
