"""The recurrent family: LSTM, GRU and Elman RNN, stacked, over whole sequences, and single steps.

Equations and sources: `fastgen/reference/recurrent.py`. Arguments, layouts and gate order are PyTorch's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastgen import _validate
from fastgen._dtypes import dtype_name
from fastgen._ops import recurrent as ops
from fastgen._ops.recurrent import Mode
from fastgen.random import AnyGenerator, seed_offset_for

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_ONEDNN = (torch.float32, torch.bfloat16)  # what PyTorch's LSTM has oneDNN compute, padded and without a projection


def lstm(
    input: Tensor,
    hx: tuple[Tensor, Tensor] | None,
    flat_weights: Sequence[Tensor],
    bias: bool,
    num_layers: int,
    dropout: float,
    training: bool,
    bidirectional: bool,
    batch_first: bool = False,
    *,
    batch_sizes: Tensor | None = None,
    generator: AnyGenerator = None,
    state_dropout_mask: Tensor | None = None,
    norm_weights: Sequence[Tensor] | None = None,
    layer_norm_eps: float = 1e-5,
    zoneout: float | tuple[float, float] = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Stacked LSTM layers over a sequence (Hochreiter & Schmidhuber, 1997; projections: Sak et al., 2014).

    Args:
        input: (T, B, I), (B, T, I) with `batch_first`, or (N, I) with `batch_sizes`; T at least 1. float32,
            float64, bfloat16 or float16 (computed in float32). Under autocast all but float64 becomes the
            autocast dtype.
        hx: (h_0, c_0) of shapes (num_layers * D, B, P) and (num_layers * D, B, H), D = 2 if bidirectional
            else 1; None for zeros.
        flat_weights: w_ih (4 H, I or D P), w_hh (4 H, P), with `bias` b_ih (4 H,), b_hh (4 H,), and with a
            projection w_hr (P, H), for each layer and in it for each direction. P = H without a projection.
        dropout: probability of a dropout between layers while `training`, drawn from `generator`.
        batch_sizes: int64 (T,) on the CPU, descending: the rows of each step of a packed sequence, as in
            `torch.nn.utils.rnn.PackedSequence`. Row b of a reversed direction begins at its own last step.
        generator: a `fastgen.random.Generator`, a `torch.Generator`, or None for torch's default one. Each
            dropout takes as many elements as its operand has, in row-major order.
        state_dropout_mask: (num_layers * D, B, P), multiplies the h that enters the recurrent product, the
            same at every step (Gal & Ghahramani, 2016); it brings its own scale and has no gradient.
        norm_weights: for layer norm (Ba, Kiros & Hinton, 2016): norm_ih (4 H,), norm_hh (4 H,), norm_c (H,),
            norm_c_bias (H,) for each layer and in it for each direction. The gates' sums are then
            LN(W_ih x) norm_ih + LN(W_hh h) norm_hh + b, each norm over all 4 H, and tanh(c') becomes
            tanh(LN(c') norm_c + norm_c_bias); what is projected is not normalised.
        layer_norm_eps: what the norms add to a variance.
        zoneout: (p_c, p_h), or a number for both: the probability with which a unit of c, and of h, keeps its
            value of the step before (Krueger et al., 2017), drawn from `generator` while `training` for each row,
            step and unit; else that share of it. Each layer and direction takes (H + P) elements for each row of
            each step: those of c, in row-major order of the layout that the output has, then those of h.

    Returns:
        (output, h_n, c_n): output as input with D P for I; h_n and c_n as hx, each row's last states.

    Raises:
        TypeError, ValueError, RuntimeError: as PyTorch for what is no tensor, a dtype, a size; naming it.
    """
    if hx is not None and (not isinstance(hx, (tuple, list)) or len(hx) != 2):
        raise RuntimeError(f"hx: expected two states (h_0, c_0), got {_described(hx)}")
    h_0, c_0 = (None, None) if hx is None else hx
    return _layers(
        Mode.LSTM,
        input,
        h_0,
        c_0,
        flat_weights,
        bias,
        num_layers,
        dropout,
        training,
        bidirectional,
        batch_first,
        batch_sizes,
        generator,
        state_dropout_mask,
        zoneout if isinstance(zoneout, tuple) else (zoneout, zoneout),
        norm_weights,
        layer_norm_eps,
    )


def gru(
    input: Tensor,
    hx: Tensor | None,
    flat_weights: Sequence[Tensor],
    bias: bool,
    num_layers: int,
    dropout: float,
    training: bool,
    bidirectional: bool,
    batch_first: bool = False,
    *,
    batch_sizes: Tensor | None = None,
    generator: AnyGenerator = None,
    state_dropout_mask: Tensor | None = None,
    zoneout: float = 0,
) -> tuple[Tensor, Tensor]:
    """Stacked GRU layers over a sequence (Cho et al., 2014, with the reset gate after the product, as in PyTorch).

    Args:
        hx: h_0 of shape (num_layers * D, B, H), or None for zeros.
        flat_weights: w_ih (3 H, I or D H), w_hh (3 H, H), with `bias` b_ih (3 H,), b_hh (3 H,), for each layer
            and in it for each direction.
        zoneout: the probability of h; each layer and direction takes H elements for each row of each step.

    The others, and the errors, as for `lstm`.

    Returns:
        (output, h_n).
    """
    return _layers(
        Mode.GRU,
        input,
        hx,
        None,
        flat_weights,
        bias,
        num_layers,
        dropout,
        training,
        bidirectional,
        batch_first,
        batch_sizes,
        generator,
        state_dropout_mask,
        (0.0, zoneout),
    )[:2]


def rnn_tanh(
    input: Tensor,
    hx: Tensor | None,
    flat_weights: Sequence[Tensor],
    bias: bool,
    num_layers: int,
    dropout: float,
    training: bool,
    bidirectional: bool,
    batch_first: bool = False,
    *,
    batch_sizes: Tensor | None = None,
    generator: AnyGenerator = None,
    state_dropout_mask: Tensor | None = None,
    zoneout: float = 0,
) -> tuple[Tensor, Tensor]:
    """Stacked Elman layers with tanh (Elman, 1990). Arguments and results as for `gru`, with H rows for 3 H."""
    return _layers(
        Mode.RNN_TANH,
        input,
        hx,
        None,
        flat_weights,
        bias,
        num_layers,
        dropout,
        training,
        bidirectional,
        batch_first,
        batch_sizes,
        generator,
        state_dropout_mask,
        (0.0, zoneout),
    )[:2]


def rnn_relu(
    input: Tensor,
    hx: Tensor | None,
    flat_weights: Sequence[Tensor],
    bias: bool,
    num_layers: int,
    dropout: float,
    training: bool,
    bidirectional: bool,
    batch_first: bool = False,
    *,
    batch_sizes: Tensor | None = None,
    generator: AnyGenerator = None,
    state_dropout_mask: Tensor | None = None,
    zoneout: float = 0,
) -> tuple[Tensor, Tensor]:
    """Stacked Elman layers with max(0, x). Arguments and results as for `rnn_tanh`."""
    return _layers(
        Mode.RNN_RELU,
        input,
        hx,
        None,
        flat_weights,
        bias,
        num_layers,
        dropout,
        training,
        bidirectional,
        batch_first,
        batch_sizes,
        generator,
        state_dropout_mask,
        (0.0, zoneout),
    )[:2]


def lstm_cell(
    input: Tensor,
    hx: tuple[Tensor, Tensor],
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    norm_weights: Sequence[Tensor] | None = None,
    layer_norm_eps: float = 1e-5,
    zoneout: float | tuple[float, float] = 0,
    training: bool = False,
    generator: AnyGenerator = None,
) -> tuple[Tensor, Tensor]:
    """One step of an LSTM.

    Args:
        input: (B, I), of the dtypes of `lstm`.
        hx: (h, c), each (B, H).
        w_ih, w_hh: (4 H, I), (4 H, H).
        b_ih, b_hh: (4 H,), both or neither.
        norm_weights, layer_norm_eps, zoneout, generator: as for a layer of `lstm`. With layer norm or zoneout, a
            step that has a gradient is computed as a sequence of one.

    Returns:
        The next (h, c). A row's result does not depend on the batch it is in.

    Raises:
        TypeError, ValueError, RuntimeError: as for `lstm`.
    """
    if not isinstance(hx, (tuple, list)) or len(hx) != 2:
        raise RuntimeError(f"hx: expected two states (h, c), got {_described(hx)}")
    if norm_weights is None and not zoneout:
        return _cell(Mode.LSTM, input, *hx, w_ih, w_hh, b_ih, b_hh)
    both = zoneout if isinstance(zoneout, tuple) else (zoneout, zoneout)
    operands = (input, *hx, w_ih, w_hh, b_ih, b_hh)
    return _step(Mode.LSTM, operands, norm_weights, layer_norm_eps, both, training, generator)


def gru_cell(
    input: Tensor,
    hx: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    zoneout: float = 0,
    training: bool = False,
    generator: AnyGenerator = None,
) -> Tensor:
    """One step of a GRU: the next h (B, H). As `lstm_cell`, with one state and 3 H rows for 4 H."""
    if not zoneout:
        return _cell(Mode.GRU, input, hx, None, w_ih, w_hh, b_ih, b_hh)[0]
    operands = (input, hx, None, w_ih, w_hh, b_ih, b_hh)
    return _step(Mode.GRU, operands, None, 0.0, (0.0, zoneout), training, generator)[0]


def rnn_tanh_cell(
    input: Tensor,
    hx: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    zoneout: float = 0,
    training: bool = False,
    generator: AnyGenerator = None,
) -> Tensor:
    """One step of an Elman RNN with tanh: the next h (B, H). As `lstm_cell`, with one state and H rows for 4 H."""
    if not zoneout:
        return _cell(Mode.RNN_TANH, input, hx, None, w_ih, w_hh, b_ih, b_hh)[0]
    operands = (input, hx, None, w_ih, w_hh, b_ih, b_hh)
    return _step(Mode.RNN_TANH, operands, None, 0.0, (0.0, zoneout), training, generator)[0]


def rnn_relu_cell(
    input: Tensor,
    hx: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    zoneout: float = 0,
    training: bool = False,
    generator: AnyGenerator = None,
) -> Tensor:
    """One step of an Elman RNN with max(0, x), as `rnn_tanh_cell`."""
    if not zoneout:
        return _cell(Mode.RNN_RELU, input, hx, None, w_ih, w_hh, b_ih, b_hh)[0]
    operands = (input, hx, None, w_ih, w_hh, b_ih, b_hh)
    return _step(Mode.RNN_RELU, operands, None, 0.0, (0.0, zoneout), training, generator)[0]


# ---------------------------------------------------------------------------------------------------


def _layers(
    mode: Mode,
    input: Tensor,
    h_0: Tensor | None,
    c_0: Tensor | None,
    flat_weights: Sequence[Tensor],
    bias: bool,
    num_layers: int,
    dropout: float,
    training: bool,
    bidirectional: bool,
    batch_first: bool,
    batch_sizes: Tensor | None,
    generator: AnyGenerator,
    state_dropout_mask: Tensor | None,
    zoneout: tuple[float, float],
    norm_weights: Sequence[Tensor] | None = None,
    layer_norm_eps: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """(output, h_n, c_n), c_n empty unless LSTM."""
    _check_input(input, batch_sizes, batch_first)
    if not training:
        dropout = 0.0
    _check_probability("dropout", dropout)
    _check_zoneout(zoneout)
    compiling = torch.compiler.is_compiling()
    directions = 2 if bidirectional else 1
    total = num_layers * directions
    unprojected = 4 if bias else 2
    count = len(flat_weights)
    projected = mode is Mode.LSTM and count == total * (unprojected + 1)
    each = unprojected + projected
    if count != total * each or total == 0:
        raise RuntimeError(
            f"flat_weights: expected {unprojected}{f' or {unprojected + 1}' if mode is Mode.LSTM else ''} tensors "
            f"for each of {num_layers} layers in {directions} directions, got {count}"
        )
    if _autocast(input):
        dtype = torch.get_autocast_dtype(input.device.type)
        input, h_0, c_0, state_dropout_mask = _cast(dtype, input, h_0, c_0, state_dropout_mask)
        flat_weights = _cast(dtype, *flat_weights)
        norm_weights = norm_weights if norm_weights is None else _cast(dtype, *norm_weights)

    if batch_sizes is None:
        batch = input.shape[0 if batch_first else 1]
    elif compiling and (h_0 is not None or state_dropout_mask is not None):
        # A graph cannot compare the number in batch_sizes.
        batch = (state_dropout_mask if h_0 is None else h_0).shape[1]  # type: ignore[union-attr]
    else:
        batch = int(batch_sizes[0])
    state = _validate.tensor("flat_weights", flat_weights[1]).shape[-1]
    hidden = _validate.tensor("flat_weights", flat_weights[each - 1]).shape[-1] if projected else state
    if h_0 is not None:
        _check("h_0", h_0, (total, batch, state), input)
    if c_0 is not None:
        _check("c_0", c_0, (total, batch, hidden), input)
    if state_dropout_mask is not None:
        _check("state_dropout_mask", state_dropout_mask, (total, batch, state), input)
        if state_dropout_mask.requires_grad:
            raise RuntimeError("state_dropout_mask: expected a tensor without gradient, got one that requires it")
    zoned = zoneout != (0.0, 0.0)
    if compiling and (zoned or norm_weights is not None):
        zoneout, layer_norm_eps = (_constant(zoneout[0]), _constant(zoneout[1])), _constant(layer_norm_eps)
    at_once = num_layers > 1 and ops.at_once(input, batch_sizes, batch_first)
    if at_once and not (bidirectional or projected or zoned or norm_weights is not None):
        return _layers_at_once(
            mode,
            input,
            h_0,
            c_0,
            flat_weights,
            num_layers,
            dropout,
            batch_first,
            batch_sizes,
            generator,
            state_dropout_mask,
            batch,
            state,
        )

    h: Sequence[Tensor]
    c: Sequence[Tensor | None] = [None] * total
    mask: Sequence[Tensor | None] = [None] * total
    if h_0 is None:
        h = [input.new_zeros(batch, state)] * total
        if mode is Mode.LSTM:
            c = [input.new_zeros(batch, hidden)] * total if projected else h
    else:
        h = h_0.unbind(0)
        if c_0 is not None:
            c = c_0.unbind(0)
    if state_dropout_mask is not None:
        mask = state_dropout_mask.unbind(0)

    if norm_weights is not None:
        _check_norms(norm_weights, total, hidden, input)
    # As that of PyTorch may be, but for what oneDNN computes. Two directions end in a tensor of their own.
    onednn = mode is Mode.LSTM and batch_sizes is None and not projected and input.dtype in _ONEDNN
    changeable = directions == 1 and not onednn
    h_n, c_n = [], []
    for layer in range(num_layers):
        if layer > 0 and dropout > 0:
            input = _dropout(input, dropout, generator)
        outputs = []
        for k in range(layer * directions, (layer + 1) * directions):
            w_ih, w_hh, *more = flat_weights[k * each : (k + 1) * each]
            b_ih, b_hh = (more[0], more[1]) if bias else (None, None)
            w_hr = more[-1] if projected else None
            _check_weights(mode, input, input.shape[-1], hidden, state, w_ih, w_hh, b_ih, b_hh, w_hr)
            options = ops.Options(batch_first, k % directions == 1, changeable=changeable and layer == num_layers - 1)
            more_operands: list[Tensor | None] = []
            if zoned or norm_weights is not None:
                norm = (None,) * 4 if norm_weights is None else norm_weights[4 * k : 4 * k + 4]
                seed_offset = None
                if zoned and training:
                    count = input.shape[:-1].numel() * (state + hidden if mode is Mode.LSTM else state)
                    seed_offset = seed_offset_for(generator, count, input.device)
                options = options._replace(norm_eps=layer_norm_eps, zoneout_c=zoneout[0], zoneout_h=zoneout[1])
                more_operands = [*norm, seed_offset]
            output, h_k, c_k = ops.recurrent(
                mode,
                options,
                input,
                batch_sizes,
                w_ih,
                w_hh,
                b_ih,
                b_hh,
                w_hr,
                h[k],
                c[k],
                mask[k],
                *more_operands,
            )
            outputs.append(output)
            h_n.append(h_k)
            c_n.append(c_k)
        input = outputs[0] if directions == 1 else torch.cat(outputs, -1)
    if total == 1:
        return input, h_n[0].unsqueeze(0), c_n[0].unsqueeze(0)
    return input, torch.stack(h_n), torch.stack(c_n)


def _layers_at_once(
    mode: Mode,
    input: Tensor,
    h_0: Tensor | None,
    c_0: Tensor | None,
    flat_weights: Sequence[Tensor],
    num_layers: int,
    dropout: float,
    batch_first: bool,
    batch_sizes: Tensor | None,
    generator: AnyGenerator,
    state_dropout_mask: Tensor | None,
    batch: int,
    hidden: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """`_layers` by one op for all layers, which draws the same noise."""
    each = len(flat_weights) // num_layers
    for layer in range(num_layers):
        w_ih, w_hh, *bias = flat_weights[layer * each : (layer + 1) * each]
        b_ih, b_hh = bias or (None, None)
        width = input.shape[-1] if layer == 0 else hidden
        _check_weights(mode, input, width, hidden, hidden, w_ih, w_hh, b_ih, b_hh, None)
    if h_0 is None:
        h_0 = input.new_zeros(num_layers, batch, hidden)
        if mode is Mode.LSTM:
            c_0 = h_0
    seed_offset = None
    if dropout > 0:
        count = input.shape[:-1].numel() * hidden
        draws = [seed_offset_for(generator, count, input.device) for _ in range(num_layers - 1)]
        seed_offset = torch.stack(draws)
    return ops.recurrent_layers(
        mode, batch_first, input, batch_sizes, flat_weights, h_0, c_0, state_dropout_mask, seed_offset, dropout
    )


def _cell(
    mode: Mode,
    input: Tensor,
    h: Tensor,
    c: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
) -> tuple[Tensor, Tensor]:
    return ops.recurrent_cell(mode, *_checked_cell(mode, input, h, c, w_ih, w_hh, b_ih, b_hh))


def _constant(value: float) -> float:
    """The number for a graph: Dynamo fails where several layers take a symbol, as `dynamic=True` makes of a float."""
    from torch.fx.experimental.symbolic_shapes import guard_scalar

    return float(guard_scalar(value))


def _checked_cell(
    mode: Mode,
    input: Tensor,
    h: Tensor,
    c: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor, Tensor | None, Tensor | None]:
    """The operands, under autocast in its dtype."""
    _check_tensor("input", input)
    _check_tensor("w_hh", w_hh)
    if input.dim() != 2:
        raise RuntimeError(f"input: expected 2 dimensions (B, I), got {tuple(input.shape)}")
    if _autocast(input):
        dtype = torch.get_autocast_dtype(input.device.type)
        input, h, c, w_ih, w_hh, b_ih, b_hh = _cast(dtype, input, h, c, w_ih, w_hh, b_ih, b_hh)
    hidden = w_hh.shape[-1]
    _check_weights(mode, input, input.shape[-1], hidden, hidden, w_ih, w_hh, b_ih, b_hh, None)
    _check("h", h, (input.shape[0], hidden), input)
    if c is not None:
        _check("c", c, (input.shape[0], hidden), input)
    return input, h, c, w_ih, w_hh, b_ih, b_hh


def _step(
    mode: Mode,
    operands: tuple[Tensor | None, ...],
    norm_weights: Sequence[Tensor] | None,
    layer_norm_eps: float,
    zoneout: tuple[float, float],
    training: bool,
    generator: AnyGenerator,
) -> tuple[Tensor, Tensor]:
    """`_cell` with layer norm or zoneout."""
    input, h, c, w_ih, w_hh, b_ih, b_hh = _checked_cell(mode, *operands)  # type: ignore[arg-type]
    _check_zoneout(zoneout)
    if norm_weights is None:
        norm: tuple[Tensor | None, ...] = (None,) * 4
    else:
        norm = tuple(_cast(input.dtype, *norm_weights) if _autocast(input) else norm_weights)
        _check_norms(norm, 1, h.shape[1], input)
    seed_offset = None
    if training and zoneout != (0.0, 0.0):
        seed_offset = seed_offset_for(generator, h.numel() * (1 if c is None else 2), input.device)
    operands = (input, h, c, w_ih, w_hh, b_ih, b_hh)
    return ops.recurrent_step(mode, operands, norm, layer_norm_eps, zoneout, seed_offset)


class _Dropout(torch.autograd.Function):
    """x * mask / (1 - p) with the mask of the stream's elements; it is drawn again for the gradient, not kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, seed_offset: Tensor, p: float) -> Tensor:
        ctx.save_for_backward(seed_offset)
        ctx.p = p
        return ops.dropout(x, seed_offset, p)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (seed_offset,) = ctx.saved_tensors
        return _Dropout.apply(grad, seed_offset, ctx.p), None, None


def _dropout(x: Tensor, p: float, generator: AnyGenerator) -> Tensor:
    seed_offset = seed_offset_for(generator, x.numel(), x.device)
    if ops.plain_only():
        return ops.dropout(x, seed_offset, p)
    return _Dropout.apply(x, seed_offset, p)


# ---------------------------------------------------------------------------------------------------
# Checks. Their classes are those of the errors that torch.nn raises for the same mistakes.


def _described(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return f"{len(value)} values"
    return f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _check_tensor(name: str, value: Any) -> None:
    if _validate.tensor(name, value).dtype not in _DTYPES:
        raise ValueError(f"{name}: expected float32, float64, bfloat16 or float16, got {dtype_name(value.dtype)}")


def _check(name: str, value: Tensor, shape: tuple[int, ...], input: Tensor) -> None:
    """That an operand has the shape, and the dtype and device of the input."""
    try:
        if value.shape == shape and value.dtype is input.dtype and value.device == input.device:
            return
    except AttributeError:
        _check_tensor(name, value)
    if value.dtype is not input.dtype:
        raise ValueError(f"{name}: expected {input.dtype} as input is, got {value.dtype}")
    if value.device != input.device:
        raise RuntimeError(f"{name}: expected a tensor on {input.device} as input is, got one on {value.device}")
    raise RuntimeError(f"{name}: expected shape {tuple(shape)}, got {tuple(value.shape)}")


def _check_input(input: Tensor, batch_sizes: Tensor | None, batch_first: bool) -> None:
    _check_tensor("input", input)
    if batch_sizes is not None:
        if input.dim() != 2:
            raise RuntimeError(f"input: expected 2 dimensions (N, I) with batch_sizes, got {tuple(input.shape)}")
        if batch_sizes.dtype is not torch.int64 or batch_sizes.dim() != 1 or not batch_sizes.is_cpu:
            raise RuntimeError(
                f"batch_sizes: expected int64 (T,) on the CPU, got {batch_sizes.dtype} {tuple(batch_sizes.shape)} "
                f"on {batch_sizes.device}"
            )
        if batch_sizes.shape[0] == 0:
            raise RuntimeError("batch_sizes: expected at least one step, got none")
    elif input.dim() != 3:
        raise RuntimeError(f"input: expected 3 dimensions, got {tuple(input.shape)}")
    elif input.shape[1 if batch_first else 0] == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")  # torch's words


def _check_weights(
    mode: Mode,
    input: Tensor,
    width: int,
    hidden: int,
    state: int,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    w_hr: Tensor | None,
) -> None:
    rows = mode.gates * hidden
    _check("w_ih", w_ih, (rows, width), input)
    _check("w_hh", w_hh, (rows, state), input)
    if (b_ih is None) != (b_hh is None):
        raise RuntimeError("b_ih, b_hh: expected both or neither, got one")
    if b_ih is not None and b_hh is not None:
        _check("b_ih", b_ih, (rows,), input)
        _check("b_hh", b_hh, (rows,), input)
    if w_hr is not None:
        _check("w_hr", w_hr, (state, hidden), input)


def _check_norms(norm_weights: Sequence[Tensor | None], layers: int, hidden: int, input: Tensor) -> None:
    if len(norm_weights) != 4 * layers:
        raise RuntimeError(f"norm_weights: expected 4 tensors for each layer and direction, got {len(norm_weights)}")
    for i, weight in enumerate(norm_weights):
        _check("norm_weights", weight, (4 * hidden if i % 4 < 2 else hidden,), input)  # type: ignore[arg-type]


def _check_probability(name: str, p: float) -> None:
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"{name}: expected a probability from 0 to 1, got {p}")


def _check_zoneout(zoneout: tuple[float, float]) -> None:
    if len(zoneout) != 2:
        raise ValueError(f"zoneout: expected a probability, or one of c and one of h, got {zoneout}")
    for p in zoneout:
        _check_probability("zoneout", p)


def _autocast(input: Tensor) -> bool:
    if not torch._C._is_any_autocast_enabled() or input.dtype is torch.float64 or input.is_meta:
        return False
    return torch.is_autocast_enabled(input.device.type)


def _cast(dtype: torch.dtype, *tensors: Tensor | None) -> list[Any]:
    return [None if x is None else x.to(dtype) for x in tensors]
