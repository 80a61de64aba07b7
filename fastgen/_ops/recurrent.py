"""The recurrent family: LSTM, GRU and Elman RNN, a whole sequence or one step.

What the arguments and results are, shape by shape, stands in `fastgen/reference/recurrent.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from fastgen import reference
from fastgen._ops.library import distinct, higher_order, plain_only, register, through
from fastgen.reference._work import work_dtype
from fastgen.reference.recurrent import Mode, dropped

__all__ = [
    "SCHEMAS",
    "Mode",
    "Options",
    "at_once",
    "dropout",
    "plain_only",
    "recurrent",
    "recurrent_cell",
    "recurrent_layers",
    "recurrent_step",
]

Operands: TypeAlias = "tuple[Tensor | None, ...]"

_WEIGHTS = "Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh"
_SEQUENCE = f"Tensor input, Tensor? batch_sizes, {_WEIGHTS}, Tensor? w_hr, Tensor h_0, Tensor? c_0, Tensor? h_mask"
_NORM = "Tensor? norm_ih=None, Tensor? norm_hh=None, Tensor? norm_c=None, Tensor? norm_c_bias=None"
_ZONEOUT = "float zoneout_c=0., float zoneout_h=0."
_OPTIONS = f"{_NORM}, Tensor? seed_offset=None, float norm_eps=0., {_ZONEOUT}"
SCHEMAS = {
    "recurrent": f"(int mode, {_SEQUENCE}, bool batch_first, bool reverse, bool save, {_OPTIONS}) -> "
    "(Tensor output, Tensor h_n, Tensor c_n, Tensor gates, Tensor cells)",
    "recurrent_backward": f"(int mode, Tensor? grad_output, Tensor? grad_h_n, Tensor? grad_c_n, {_SEQUENCE}, "
    f"Tensor output, Tensor gates, Tensor cells, bool batch_first, bool reverse, int needs, {_OPTIONS}) -> "
    "(Tensor grad_input, Tensor grad_w_ih, Tensor grad_w_hh, Tensor grad_b_ih, Tensor grad_b_hh, Tensor grad_w_hr, "
    "Tensor grad_h_0, Tensor grad_c_0, Tensor grad_norm_ih, Tensor grad_norm_hh, Tensor grad_norm_c, "
    "Tensor grad_norm_c_bias)",
    "recurrent_layers": "(int mode, Tensor input, Tensor? batch_sizes, Tensor[] weights, Tensor h_0, Tensor? c_0, "
    "Tensor? h_mask, bool batch_first, bool save, Tensor? seed_offset=None, float dropout=0.) -> "
    "(Tensor output, Tensor h_n, Tensor c_n, Tensor below, Tensor passed, Tensor gates, Tensor cells)",
    "recurrent_cell": f"(int mode, Tensor input, Tensor h, Tensor? c, {_WEIGHTS}, bool save) -> "
    "(Tensor h_1, Tensor c_1, Tensor gates, Tensor cells)",
    "recurrent_step": f"(int mode, Tensor input, Tensor h, Tensor? c, {_WEIGHTS}, "
    "Tensor? norm_ih, Tensor? norm_hh, Tensor? norm_c, Tensor? norm_c_bias, float norm_eps, float zoneout_c, "
    "float zoneout_h) -> (Tensor h_1, Tensor c_1)",
    "recurrent_cell_backward": "(int mode, Tensor? grad_h_1, Tensor? grad_c_1, Tensor input, Tensor h, Tensor? c, "
    f"{_WEIGHTS}, Tensor gates, Tensor cells, int needs) -> (Tensor grad_input, Tensor grad_h, Tensor grad_c, "
    "Tensor grad_w_ih, Tensor grad_w_hh, Tensor grad_b_ih, Tensor grad_b_hh)",
}


def _fake_recurrent(
    mode: int,
    input: Tensor,
    batch_sizes: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    w_hr: Tensor | None,
    h_0: Tensor,
    c_0: Tensor | None,
    h_mask: Tensor | None,
    batch_first: bool,
    reverse: bool,
    save: bool,
    norm_ih: Tensor | None = None,
    norm_hh: Tensor | None = None,
    norm_c: Tensor | None = None,
    norm_c_bias: Tensor | None = None,
    seed_offset: Tensor | None = None,
    norm_eps: float = 0.0,
    zoneout_c: float = 0.0,
    zoneout_h: float = 0.0,
) -> tuple[Tensor, ...]:
    hidden, leading = w_hh.shape[0] // Mode(mode).gates, input.shape[:-1]
    gates, cells = input.new_empty(0), input.new_empty(0)
    if save and mode in (Mode.LSTM, Mode.GRU):
        gates = input.new_empty((*leading, (4 if norm_ih is None else 12) * hidden))
    elif save and zoneout_h > 0:
        gates = input.new_empty((*leading, hidden))
    if save and mode == Mode.LSTM:
        width = hidden if norm_ih is None else hidden + 2
        cells = input.new_empty((*leading, width), dtype=work_dtype(input.dtype))
    c_n = input.new_empty(0 if c_0 is None else c_0.shape)
    return input.new_empty((*leading, h_0.shape[-1])), input.new_empty(h_0.shape), c_n, gates, cells


def _fake_recurrent_backward(
    mode: int,
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    input: Tensor,
    batch_sizes: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    w_hr: Tensor | None,
    h_0: Tensor,
    c_0: Tensor | None,
    h_mask: Tensor | None,
    output: Tensor,
    gates: Tensor,
    cells: Tensor,
    batch_first: bool,
    reverse: bool,
    needs: int,
    norm_ih: Tensor | None = None,
    norm_hh: Tensor | None = None,
    norm_c: Tensor | None = None,
    norm_c_bias: Tensor | None = None,
    seed_offset: Tensor | None = None,
    norm_eps: float = 0.0,
    zoneout_c: float = 0.0,
    zoneout_h: float = 0.0,
) -> tuple[Tensor, ...]:
    of = (input, w_ih, w_hh, b_ih, b_hh, w_hr, h_0, c_0, norm_ih, norm_hh, norm_c, norm_c_bias)
    return tuple(input.new_empty(x.shape if x is not None and needs >> i & 1 else 0) for i, x in enumerate(of))


def _fake_recurrent_layers(
    mode: int,
    input: Tensor,
    batch_sizes: Tensor | None,
    weights: Sequence[Tensor],
    h_0: Tensor,
    c_0: Tensor | None,
    h_mask: Tensor | None,
    batch_first: bool,
    save: bool,
    seed_offset: Tensor | None = None,
    dropout: float = 0.0,
) -> tuple[Tensor, ...]:
    layers, hidden, leading = h_0.shape[0], h_0.shape[-1], input.shape[:-1]

    def stacked(exist: bool, count: int, width: int, dtype: torch.dtype = input.dtype) -> Tensor:
        return input.new_empty((count, *leading, width), dtype=dtype) if exist else input.new_empty(0)

    return (
        input.new_empty((*leading, hidden)),
        input.new_empty(h_0.shape),
        input.new_empty(0 if c_0 is None else c_0.shape),
        stacked(save, layers - 1, hidden),
        stacked(save and seed_offset is not None, layers - 1, hidden),
        stacked(save and mode in (Mode.LSTM, Mode.GRU), layers, 4 * hidden),
        stacked(save and mode == Mode.LSTM, layers, hidden, work_dtype(input.dtype)),
    )


def _fake_recurrent_cell(
    mode: int,
    input: Tensor,
    h: Tensor,
    c: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    save: bool,
) -> tuple[Tensor, ...]:
    c_1 = h.new_empty(0 if c is None else c.shape)
    gates, cells = h.new_empty(0), h.new_empty(0)
    if save:
        gates = h.new_empty((h.shape[0], (4 if mode in (Mode.LSTM, Mode.GRU) else 1) * h.shape[1]))
    if save and c is not None:
        cells = c.new_empty(c.shape, dtype=work_dtype(c.dtype))
    return h.new_empty(h.shape), c_1, gates, cells


def _fake_recurrent_step(mode: int, input: Tensor, h: Tensor, c: Tensor | None, *_: Any) -> tuple[Tensor, ...]:
    return h.new_empty(h.shape), h.new_empty(0 if c is None else c.shape)


def _fake_recurrent_cell_backward(
    mode: int,
    grad_h_1: Tensor | None,
    grad_c_1: Tensor | None,
    input: Tensor,
    h: Tensor,
    c: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    gates: Tensor,
    cells: Tensor,
    needs: int,
) -> tuple[Tensor, ...]:
    of = (input, h, c, w_ih, w_hh, b_ih, b_hh)
    return tuple(input.new_empty(x.shape if x is not None and needs >> i & 1 else 0) for i, x in enumerate(of))


register(
    SCHEMAS,
    reference,
    {
        "recurrent": _fake_recurrent,
        "recurrent_backward": _fake_recurrent_backward,
        "recurrent_layers": _fake_recurrent_layers,
        "recurrent_cell": _fake_recurrent_cell,
        "recurrent_step": _fake_recurrent_step,
        "recurrent_cell_backward": _fake_recurrent_cell_backward,
    },
)


# ---------------------------------------------------------------------------------------------------
# Gradients. A first derivative is an op. Where more is asked for (create_graph=True, batched gradients), it
# is taken by autograd through the reference instead, whose own derivatives of every order follow: correct
# everywhere, at the speed of plain PyTorch. Under torch.func and in forward mode the reference runs from the
# start, as in `differentiable`.


class Options(NamedTuple):
    """Of a layer of a sequence, what is no tensor."""

    batch_first: bool = False
    reverse: bool = False
    norm_eps: float = 0  # integers, as Dynamo makes symbols of the defaults that are floats
    zoneout_c: float = 0
    zoneout_h: float = 0
    changeable: bool = False  # whether the caller may change the output in place: the gradient then keeps a copy

    @property
    def numbers(self) -> tuple[float, float, float]:
        """Those of layer norm and zoneout, as the ops take them."""
        return self.norm_eps, self.zoneout_c, self.zoneout_h


# The tensors of a layer as its op takes them are `_FIRST`, the two flags, what is saved or needed, and the rest.
_FIRST = 10
# Those that have gradients, in the order of the results of the backward op; not batch_sizes, h_mask and seed_offset.
_WITH_GRADIENT = (0, 2, 3, 4, 5, 6, 7, 8, 10, 11, 12, 13)


def _call(op: Callable[..., Any], mode: int, operands: Operands, options: Options, save: bool) -> Any:
    """The op `recurrent`, or its plain form."""
    if len(operands) == _FIRST:
        return op(mode, *operands, options.batch_first, options.reverse, save)
    first, rest = operands[:_FIRST], operands[_FIRST:]
    return op(mode, *first, options.batch_first, options.reverse, save, *rest, *options.numbers)


class _Recurrent(torch.autograd.Function):
    """Saves the operands, the output, and the gates and cells that the backward kernel reads; nothing else."""

    @staticmethod
    def forward(ctx: Any, mode: int, options: Options, *operands: Tensor | None) -> Any:
        output, h_n, c_n, gates, cells = _call(_recurrent, mode, operands, options, True)
        ctx.save_for_backward(*operands, output.clone() if options.changeable else output, gates, cells)
        ctx.mode, ctx.options = mode, options
        ctx.set_materialize_grads(False)
        return output, h_n, c_n

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        mode, options = ctx.mode, ctx.options
        if mode != Mode.LSTM:
            grads = (*grads[:2], None)  # a compiled graph makes zeros for the empty c_n
        *operands, output, gates, cells = ctx.saved_tensors
        wanted = ctx.needs_input_grad[2:]
        if grads[0] is None and grads[1] is None and grads[2] is None:
            return (None,) * (2 + len(wanted))
        if higher_order():

            def forward(*operands: Tensor | None) -> tuple[Tensor, ...]:
                return _call(_plain, mode, operands, options, False)[:3]

            return None, None, *through(forward, operands, wanted, grads)
        places = [i for i in _WITH_GRADIENT if i < len(operands)]
        needs = sum(1 << bit for bit, i in enumerate(places) if wanted[i])
        found = _recurrent_backward(
            mode,
            *grads,
            *operands[:_FIRST],
            output,
            gates,
            cells,
            options.batch_first,
            options.reverse,
            needs,
            *operands[_FIRST:],
            *(options.numbers if len(operands) > _FIRST else ()),
        )
        results: list[Tensor | None] = [None] * len(operands)
        for i, grad in zip(places, found, strict=False):
            results[i] = grad if wanted[i] else None
        return None, None, *results


class _RecurrentLayers(torch.autograd.Function):
    """Of layers at once. The backward pass takes them one by one, from the last to the first."""

    @staticmethod
    def forward(ctx: Any, mode: int, batch_first: bool, dropout: float, *operands: Any) -> Any:
        input, batch_sizes, h_0, c_0, h_mask, seed_offset, *weights = operands
        output, h_n, c_n, *saved = _recurrent_layers(
            mode, input, batch_sizes, weights, h_0, c_0, h_mask, batch_first, True, seed_offset, dropout
        )
        ctx.save_for_backward(*operands, output, *saved)
        ctx.mode, ctx.batch_first, ctx.dropout = mode, batch_first, dropout
        ctx.set_materialize_grads(False)
        return output, h_n, c_n

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        mode, batch_first, p = ctx.mode, ctx.batch_first, ctx.dropout
        grad, grad_h_n, grad_c_n = grads
        if mode != Mode.LSTM:
            grad_c_n = None  # as above
        *operands, output, below, passed, gates, cells = ctx.saved_tensors
        _, _, _, *wanted = ctx.needs_input_grad
        if grad is None and grad_h_n is None and grad_c_n is None:
            return (None,) * (3 + len(wanted))
        if higher_order():

            def forward(*operands: Any) -> tuple[Tensor, ...]:
                input, batch_sizes, h_0, c_0, h_mask, seed_offset, *weights = operands
                return _plain_layers(
                    mode, input, batch_sizes, weights, h_0, c_0, h_mask, batch_first, False, seed_offset, p
                )[:3]

            return None, None, None, *through(forward, operands, tuple(wanted), (grad, grad_h_n, grad_c_n))
        input, batch_sizes, h_0, c_0, h_mask, seed_offset, *weights = operands
        layers = h_0.shape[0]
        each = len(weights) // layers
        of_weights: list[Tensor | None] = [None] * len(weights)
        of_h_0, of_c_0 = [], []
        for layer in reversed(range(layers)):
            x = input if layer == 0 else (below if seed_offset is None else passed)[layer - 1]
            places = range(layer * each, (layer + 1) * each)
            own = [weights[i] for i in places] + [None] * (4 - each)
            states = (None if state is None else state[layer] for state in (h_0, c_0, h_mask))
            # Bits: the input, the weights, and behind that of w_hr the states.
            needs = [layer > 0 or wanted[0], *(wanted[6 + i] for i in places), *[False] * (5 - each), *wanted[2:4]]
            found = _recurrent_backward(
                mode,
                grad,
                *(None if of is None else of[layer] for of in (grad_h_n, grad_c_n)),
                x,
                batch_sizes,
                *own,
                None,
                *states,
                output if layer == layers - 1 else below[layer],
                gates[layer] if gates.dim() > 1 else gates,
                cells[layer] if cells.dim() > 1 else cells,
                batch_first,
                False,
                sum(1 << bit for bit, want in enumerate(needs) if want),
            )
            grad = found[0]
            if layer > 0 and seed_offset is not None:
                grad = dropout(grad, seed_offset[layer - 1], p)
            for i, value in zip(places, found[1 : 1 + each], strict=True):
                of_weights[i] = value if wanted[6 + i] else None
            of_h_0.append(found[6])
            of_c_0.append(found[7])
        return (
            *(None, None, None),
            grad if wanted[0] else None,
            None,
            torch.stack(of_h_0[::-1]) if wanted[2] else None,
            torch.stack(of_c_0[::-1]) if wanted[3] else None,
            *(None, None),
            *of_weights,
        )


# On the CPU, measured: for so many rows of bfloat16 packing pays, as the sequence's product of pairs is twice as fast.
_PAIRED_ROWS = 64


def _of_one_step(time: int | None, operands: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    """The operands of a step, whose input may have a dimension `time` of one step."""
    if time is None:
        return operands
    input, *others = operands
    return input.squeeze(time), *others  # type: ignore[union-attr]


class _RecurrentCell(torch.autograd.Function):
    """Saves the operands and what the backward kernel reads; not the results, which may be changed in place."""

    @staticmethod
    def forward(ctx: Any, mode: int, time: int | None, *operands: Tensor | None) -> Any:
        """time: the dimension of the input along which it is a sequence of one step, or None: there is none."""
        h_1, c_1, gates, cells = _recurrent_cell(mode, *_of_one_step(time, operands), True)
        ctx.save_for_backward(*operands, gates, cells)
        ctx.mode, ctx.time = mode, time
        ctx.set_materialize_grads(False)
        return (h_1, c_1) if time is None else (h_1, c_1, h_1.unsqueeze(time).clone())

    @staticmethod
    def backward(ctx: Any, grad_h: Tensor | None, grad_c: Tensor | None, grad_output: Tensor | None = None) -> Any:
        mode, time = ctx.mode, ctx.time
        if mode != Mode.LSTM:
            grad_c = None  # as above
        if grad_output is not None:
            grad_output = grad_output.squeeze(time)
            grad_h = grad_output if grad_h is None else grad_h + grad_output
        *operands, gates, cells = ctx.saved_tensors
        # Here, as a view made in the forward pass would have no way back to the input for a second derivative.
        operands = _of_one_step(time, operands)
        _, _, *wanted = ctx.needs_input_grad
        if grad_h is None and grad_c is None:
            return (None,) * (2 + len(wanted))
        found: Sequence[Tensor | None]
        if higher_order():

            def forward(*operands: Tensor | None) -> tuple[Tensor, ...]:
                return _plain_cell(mode, *operands, False)[:2]

            found = through(forward, operands, tuple(wanted), (grad_h, grad_c))
        else:
            needs = sum(1 << i for i, want in enumerate(wanted) if want)
            found = _recurrent_cell_backward(mode, grad_h, grad_c, *operands, gates, cells, needs)
        results = [grad if want else None for grad, want in zip(found, wanted, strict=True)]
        if time is not None and results[0] is not None:
            results[0] = results[0].unsqueeze(time)
        return None, None, *results


def recurrent(mode: int, options: Options, *operands: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """(output, h_n, c_n) of the op `recurrent`, differentiable.

    operands: input, batch_sizes, w_ih, w_hh, b_ih, b_hh, w_hr, h_0, c_0, h_mask; with layer norm or zoneout also
    norm_ih, norm_hh, norm_c, norm_c_bias, seed_offset. h_mask has no gradient.
    """
    if _is_one_step(options, operands):
        input, _, w_ih, w_hh, b_ih, b_hh, _, h_0, c_0, _ = operands
        h_n, c_n, output = _cell(mode, 1 if options.batch_first else 0, input, h_0, c_0, w_ih, w_hh, b_ih, b_hh)
        return output, h_n, c_n
    if plain_only():
        return _call(_plain, mode, operands, options, False)[:3]
    if torch.is_grad_enabled():
        for value in operands:
            if value is not None and value.requires_grad:
                return _Recurrent.apply(mode, options, *distinct(operands))
    return _call(_recurrent, mode, operands, options, False)[:3]


def at_once(input: Tensor, batch_sizes: Tensor | None, batch_first: bool) -> bool:
    """Whether `recurrent_layers` is the way of a stack in one direction, without layer norm, zoneout and projection.

    In double precision CUDA has kernels for single layers.
    """
    if not input.is_cuda or input.dtype is torch.float64:
        return False
    return batch_sizes is not None or input.shape[1 if batch_first else 0] > 1


def recurrent_layers(
    mode: int,
    batch_first: bool,
    input: Tensor,
    batch_sizes: Tensor | None,
    weights: Sequence[Tensor],
    h_0: Tensor,
    c_0: Tensor | None,
    h_mask: Tensor | None,
    seed_offset: Tensor | None,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(output, h_n, c_n) of the op `recurrent_layers`, differentiable; h_mask has no gradient."""
    operands = (input, batch_sizes, weights, h_0, c_0, h_mask, batch_first, False, seed_offset, dropout)
    if plain_only():
        return _plain_layers(mode, *operands)[:3]
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (input, h_0, c_0, *weights)):
        tensors = distinct((input, batch_sizes, h_0, c_0, h_mask, seed_offset, *weights))
        return _RecurrentLayers.apply(mode, batch_first, dropout, *tensors)
    return _recurrent_layers(mode, *operands)[:3]


def dropout(x: Tensor, seed_offset: Tensor, p: float) -> Tensor:
    """x after a dropout with probability p, by the stream's elements in row-major order."""
    return dropped(x, torch.ops.fastgen.bernoulli(seed_offset, x.shape, torch.bool, 1.0 - p), p)


def _is_one_step(options: Options, operands: Operands) -> bool:
    """Whether a sequence is a step that `recurrent_cell` can take, which packs no weights for it, and had better."""
    input, batch_sizes, *_, w_hr, _, _, h_mask = operands[:_FIRST]
    assert input is not None
    plain = batch_sizes is None and w_hr is None and h_mask is None and len(operands) == _FIRST
    time = 1 if options.batch_first else 0
    if not plain or input.shape[time] != 1:
        return False
    return input.dtype is not torch.bfloat16 or not input.is_cpu or input.shape[1 - time] < _PAIRED_ROWS


def recurrent_cell(mode: int, *operands: Tensor | None) -> tuple[Tensor, Tensor]:
    """(h_1, c_1) of the op `recurrent_cell`, differentiable.

    operands: input, h, c, w_ih, w_hh, b_ih, b_hh.
    """
    return _cell(mode, None, *operands)


def _cell(mode: int, time: int | None, *operands: Tensor | None) -> Any:
    """(h_1, c_1), and where the input has a dimension `time` of one step the output, which has it too."""
    plain = plain_only()
    if not plain and torch.is_grad_enabled():
        for value in operands:
            if value is not None and value.requires_grad:
                return _RecurrentCell.apply(mode, time, *distinct(operands))
    op = _plain_cell if plain else _recurrent_cell
    if time is None:
        return op(mode, *operands, False)[:2]
    h_1, c_1, _, _ = op(mode, *_of_one_step(time, operands), False)
    return h_1, c_1, h_1.unsqueeze(time).clone()  # output and state are not to change with each other


def recurrent_step(
    mode: int,
    operands: Operands,
    norm: tuple[Tensor | None, ...],
    norm_eps: float,
    zoneout: tuple[float, float],
    seed_offset: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(h_1, c_1) of one step with layer norm or zoneout, differentiable: where it has a gradient, a sequence of one.

    operands: as for `recurrent_cell`. norm: norm_ih, norm_hh, norm_c, norm_c_bias. zoneout: of c and h.
    """
    recording = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (*operands, *norm))
    if not recording and seed_offset is None and not plain_only():
        return _recurrent_step(mode, *operands, *norm, norm_eps, *zoneout)
    input, h, c, *weights = operands
    assert input is not None
    options = Options(norm_eps=norm_eps, zoneout_c=zoneout[0], zoneout_h=zoneout[1])
    _, h_1, c_1 = recurrent(mode, options, input[None], None, *weights, None, h, c, None, *norm, seed_offset)
    return h_1, c_1


_plain: Callable[..., Any] = reference.recurrent
_plain_layers: Callable[..., Any] = reference.recurrent_layers
_plain_cell: Callable[..., Any] = reference.recurrent_cell
_recurrent = torch.ops.fastgen.recurrent.default
_recurrent_backward = torch.ops.fastgen.recurrent_backward.default
_recurrent_layers = torch.ops.fastgen.recurrent_layers.default
_recurrent_cell = torch.ops.fastgen.recurrent_cell.default
_recurrent_step = torch.ops.fastgen.recurrent_step.default
_recurrent_cell_backward = torch.ops.fastgen.recurrent_cell_backward.default
