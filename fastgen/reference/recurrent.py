"""The recurrent family: LSTM, GRU and Elman RNN, one layer in one direction, and single steps of them.

LSTM  c' = f c + i g,  h' = o tanh(c')  (Hochreiter & Schmidhuber, 1997; forget gate: Gers et al., 2000),
      h' = W_hr o tanh(c') with a projection (Sak et al., 2014);
      with layer norm (Ba, Kiros & Hinton, 2016, eqs. 20 to 22) the gates' sums are LN(W_ih x) + LN(W_hh h) + b, each
      norm over all 4 H of them, and h' = o tanh(LN(c'));
GRU   n = tanh(x_n + r (W_hn h + b_hn)),  h' = (1 - z) n + z h  (Cho et al., 2014, reset after the product);
RNN   h' = act(W_ih x + b_ih + W_hh h + b_hh)  (Elman, 1990).

Zoneout (Krueger et al., "Zoneout: regularizing RNNs by randomly preserving hidden activations", 2017) puts
d c + (1 - d) c' and d h + (1 - d) h' in the place of c' and h', where d is 1 with the probability given and
else 0, for each row, step and unit; or, where nothing is drawn, that probability. The o tanh(c') inside h' has
the c' without it.

Gates stand in torch's order, LSTM i, f, g, o and GRU r, z, n. Half types are computed in float32 and
rounded where a result is stored.

Sequences are (T, B, ...), (B, T, ...) with `batch_first`, or packed (N, ...) with `batch_sizes` (T,)
int64 in descending order: step t has the first batch_sizes[t] rows. T is at least 1. A result that does
not exist, or is not asked for, is an empty tensor of shape (0,).
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from fastgen.reference._work import or_empty, widen, without_autocast
from fastgen.reference.random import bernoulli


class Mode(IntEnum):
    """The cell; the numbers are those of `CellMode` in `csrc/common/params.h`."""

    LSTM = 0
    GRU = 1
    RNN_TANH = 2
    RNN_RELU = 3

    @property
    def gates(self) -> int:
        """G: how many blocks of H rows the weights have."""
        return 4 if self is Mode.LSTM else 3 if self is Mode.GRU else 1


# ---------------------------------------------------------------------------------------------------
# One step


class Norm(NamedTuple):
    """The layer norms of an LSTM: gains of the two products (4 H,), gain and bias of the cell (H,)."""

    ih: Tensor
    hh: Tensor
    c: Tensor
    c_bias: Tensor
    eps: float


def _norm_of(ih: Tensor | None, hh: Tensor | None, c: Tensor | None, c_bias: Tensor | None, eps: float) -> Norm | None:
    if ih is None or hh is None or c is None or c_bias is None:
        return None
    ih, hh, c, c_bias = widen(ih, hh, c, c_bias)
    return Norm(ih, hh, c, c_bias, eps)


def _standardise(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """((x - mean) s, s) along the last dimension, s = 1 / sqrt(variance + eps)."""
    scale = (x.var(-1, correction=0, keepdim=True) + eps).rsqrt()
    return (x - x.mean(-1, keepdim=True)) * scale, scale


def _standardise_backward(grad: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """The gradient of x from that of y, of `_standardise`: what is left of it beside 1 and y."""
    return scale * (grad - grad.mean(-1, keepdim=True) - y * (grad * y).mean(-1, keepdim=True))


def _cell(
    mode: int, from_input: Tensor, from_state: Tensor, h: Tensor, c: Tensor | None, norm: Norm | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(h', c', gates) from W_ih x + b_ih and W_hh h + b_hh, each (n, G H); h' is before the projection."""
    if mode == Mode.LSTM:
        assert c is not None
        i, f, g, o = (from_input + from_state).chunk(4, -1)
        i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
        c = f * c + i * g
        y = c if norm is None else _standardise(c, norm.eps)[0] * norm.c + norm.c_bias
        return o * y.tanh(), c, torch.cat((i, f, g, o), -1)
    if mode == Mode.GRU:
        x_r, x_z, x_n = from_input.chunk(3, -1)
        h_r, h_z, h_n = from_state.chunk(3, -1)
        r, z = (x_r + h_r).sigmoid(), (x_z + h_z).sigmoid()
        n = (x_n + r * h_n).tanh()
        return (1 - z) * n + z * h, None, torch.cat((r, z, n, h_n), -1)
    total = from_input + from_state
    return total.tanh() if mode == Mode.RNN_TANH else total.relu(), None, None


class _CellGradients(NamedTuple):
    """Of from_input and from_state of `_cell`; what reaches h and c past the products; and, with a layer norm, the
    gradient behind the norm of the cell, and what that norm gave."""

    from_input: Tensor
    from_state: Tensor
    h: Tensor | None = None
    c: Tensor | None = None
    behind_norm: Tensor | None = None
    normed: Tensor | None = None


def _cell_backward(
    mode: int,
    grad_h: Tensor,
    grad_c: Tensor | None,
    h: Tensor,
    c: Tensor | None,
    h_1: Tensor,
    c_1: Tensor | None,
    gates: Tensor | None,
    norm: Norm | None = None,
) -> _CellGradients:
    """h, c: the states before the step; h_1, c_1, gates: what `_cell` gave."""
    if mode == Mode.LSTM:
        assert c is not None
        assert c_1 is not None
        assert gates is not None
        i, f, g, o = gates.chunk(4, -1)
        behind = normed = None
        if norm is None:
            t = c_1.tanh()
            dc = grad_h * o * (1 - t * t)
        else:
            normed, scale = _standardise(c_1, norm.eps)
            t = (normed * norm.c + norm.c_bias).tanh()
            behind = grad_h * o * (1 - t * t)
            dc = _standardise_backward(behind * norm.c, normed, scale)
        if grad_c is not None:
            dc = dc + grad_c
        di, df, dg, do = dc * g, dc * c, dc * i, grad_h * t
        grad = torch.cat((di * i * (1 - i), df * f * (1 - f), dg * (1 - g * g), do * o * (1 - o)), -1)
        return _CellGradients(grad, grad, None, dc * f, behind, normed)
    if mode == Mode.GRU:
        assert gates is not None
        r, z, n, h_n = gates.chunk(4, -1)
        dn = grad_h * (1 - z) * (1 - n * n)
        dz = grad_h * (h - n) * z * (1 - z)
        dr = dn * h_n * r * (1 - r)
        return _CellGradients(torch.cat((dr, dz, dn), -1), torch.cat((dr, dz, dn * r), -1), grad_h * z)
    grad = grad_h * (1 - h_1 * h_1) if mode == Mode.RNN_TANH else grad_h * (h_1 > 0)
    return _CellGradients(grad, grad)


@without_autocast
def recurrent_cell(
    mode: int,
    input: Tensor,
    h: Tensor,
    c: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """input (B, I), h and c (B, H) -> h_1 (B, H), c_1 (B, H), and what the backward pass reads, gates and cells.

    gates: (B, 4 H), of an RNN (B, H), a copy of h_1. cells: (B, H), of an LSTM c_1 in the dtype of the algebra. What
    there is not, or without `save`, is (0,).
    """
    dtype = input.dtype
    input, h, c, w_ih, w_hh, b_ih, b_hh = widen(input, h, c, w_ih, w_hh, b_ih, b_hh)
    h_1, c_1, gates = _cell(mode, linear(input, w_ih, b_ih), linear(h, w_hh, b_hh), h, c)
    nothing = h_1.new_empty(0)
    kept = nothing if not save else h_1.clone() if gates is None else gates
    cells = nothing.to(dtype) if c_1 is None or not save else c_1.clone()
    return h_1.to(dtype), or_empty(c_1, h_1).to(dtype), kept.to(dtype), cells


@without_autocast
def recurrent_step(
    mode: int,
    input: Tensor,
    h: Tensor,
    c: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    norm_ih: Tensor | None,
    norm_hh: Tensor | None,
    norm_c: Tensor | None,
    norm_c_bias: Tensor | None,
    norm_eps: float,
    zoneout_c: float,
    zoneout_h: float,
) -> tuple[Tensor, Tensor]:
    """(h_1, c_1) as of `recurrent_cell`, with layer norm and the expectation of zoneout; for inference."""
    dtype = input.dtype
    input, h, c, w_ih, w_hh, b_ih, b_hh = widen(input, h, c, w_ih, w_hh, b_ih, b_hh)
    norm = _norm_of(norm_ih, norm_hh, norm_c, norm_c_bias, norm_eps)
    if norm is None:
        from_input, from_state = linear(input, w_ih, b_ih), linear(h, w_hh, b_hh)
    else:
        from_input = _plus(_standardise(linear(input, w_ih), norm.eps)[0] * norm.ih, b_ih)
        from_state = _plus(_standardise(linear(h, w_hh), norm.eps)[0] * norm.hh, b_hh)
    h_1, c_1, _ = _cell(mode, from_input, from_state, h, c, norm)
    h_1 = _kept(zoneout_h or None, h, h_1)
    if c is None or c_1 is None:
        return h_1.to(dtype), h_1.new_empty(0, dtype=dtype)
    return h_1.to(dtype), _kept(zoneout_c or None, c, c_1).to(dtype)


def recurrent_cell_backward(
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
    """Gradients of (input, h, c, w_ih, w_hh, b_ih, b_hh); (0,) without such an operand, or where its bit of needs is 0.

    gates, cells: those of `recurrent_cell`.
    """
    dtype, of = input.dtype, (input, h, c, w_ih, w_hh, b_ih, b_hh)
    grad_h_1, grad_c_1, input, h, c, w_ih, w_hh, gates, cells = widen(
        grad_h_1, grad_c_1, input, h, c, w_ih, w_hh, gates, cells
    )
    if grad_h_1 is None:
        grad_h_1 = torch.zeros_like(h)
    found = _cell_backward(mode, grad_h_1, grad_c_1, h, c, gates, cells, gates)
    to_input, to_state = found.from_input, found.from_state
    to_h = to_state @ w_hh
    results = (
        to_input @ w_ih,
        to_h if found.h is None else to_h + found.h,
        found.c,
        to_input.T @ input,
        to_state.T @ h,
        to_input.sum(0),
        to_state.sum(0),
    )
    return tuple(
        grad.to(dtype) if grad is not None and x is not None and needs >> i & 1 else input.new_empty(0, dtype=dtype)
        for i, (grad, x) in enumerate(zip(results, of, strict=True))
    )


# ---------------------------------------------------------------------------------------------------
# A sequence


@without_autocast
def recurrent(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(output, h_n, c_n, gates, cells) of one layer in one direction.

    Args:
        input: (T, B, I), (B, T, I) or packed (N, I).
        w_ih, w_hh, b_ih, b_hh, w_hr: (G H, I), (G H, P), (G H,), (G H,), (P, H); P = H without w_hr.
        h_0, c_0: (B, P), (B, H).
        h_mask: (B, P), multiplies the h that enters the product with W_hh, at every step.
        reverse: from the last step to the first; a packed row begins at its own last step.
        save: whether to give gates and cells.
        norm_ih, norm_hh, norm_c, norm_c_bias: (4 H,), (4 H,), (H,), (H,), gains of the norms of W_ih x, W_hh h and c',
            and the bias of the last; all or none, for an LSTM only.
        seed_offset: (2,) int64: zoneout draws its d, for c by the elements from the offset on, in the row-major order
            of (*input without I, H), and behind those for h likewise with P. None: it takes the probabilities for d.
        norm_eps: what the norms add to a variance.
        zoneout_c, zoneout_h: probabilities; 0 for c where there is none.

    Returns:
        output as input with P for I; h_n (B, P) and c_n (B, H), each row's last states; gates, as input with
        4 H for I (LSTM i, f, g, o; GRU r, z, n and W_hn h + b_hn), 12 H with layer norm (the standardised W_ih x and
        W_hh h as well), and for an RNN with zoneout H (h'); cells, as input with H for I (LSTM c after zoneout, in
        the work dtype), H + 2 with layer norm (what those two were multiplied by).
    """
    dtype = input.dtype
    input, w_ih, w_hh, b_ih, b_hh, w_hr, h, c, h_mask = widen(input, w_ih, w_hh, b_ih, b_hh, w_hr, h_0, c_0, h_mask)
    norm = _norm_of(norm_ih, norm_hh, norm_c, norm_c_bias, norm_eps)
    keep_c, keep_h = _zones(seed_offset, input, batch_sizes, batch_first, c, h, zoneout_c, zoneout_h)
    if norm is None:
        steps, x_hats, x_scales = _split(linear(input, w_ih, b_ih), batch_sizes, batch_first), None, None
    else:
        x_hat, x_scale = _standardise(linear(input, w_ih), norm.eps)
        steps, x_hats, x_scales = (
            _split(x, batch_sizes, batch_first) for x in (_plus(x_hat * norm.ih, b_ih), x_hat, x_scale)
        )
    outputs, gates, cells = ([steps[0]] * len(steps) for _ in range(3))
    for t in _order(steps, reverse):
        # The rows that are not in this step have ended, or have not yet begun: their states stay.
        n = steps[t].shape[0]
        h_before, c_before = h[:n], None if c is None else c[:n]
        fed = h_before if h_mask is None else h_before * h_mask[:n]
        if norm is None or x_hats is None or x_scales is None:
            h_t, c_t, gates_t = _cell(mode, steps[t], linear(fed, w_hh, b_hh), h_before, c_before)
        else:
            h_hat, h_scale = _standardise(linear(fed, w_hh), norm.eps)
            h_t, c_t, gates_t = _cell(mode, steps[t], _plus(h_hat * norm.hh, b_hh), h_before, c_before, norm)
            assert gates_t is not None
            gates_t = torch.cat((gates_t, x_hats[t], h_hat), -1)
        if w_hr is not None:
            h_t = linear(h_t, w_hr)
        gates[t] = h_t if gates_t is None else gates_t
        h_t = _kept(keep_h[t], h_before, h_t)
        outputs[t], h = h_t, _set_rows(h, h_t)
        if c_t is not None:
            assert c is not None
            assert c_before is not None
            c_t = _kept(keep_c[t], c_before, c_t)
            cells[t], c = c_t, _set_rows(c, c_t)
            if x_scales is not None:
                cells[t] = torch.cat((c_t, x_scales[t], h_scale), -1)

    output = _join(outputs, batch_sizes, batch_first).to(dtype)
    none = output.new_empty(0)
    keeps_gates = save and (mode in (Mode.LSTM, Mode.GRU) or zoneout_h > 0)
    return (
        output,
        h.to(dtype),
        none if c is None else c.to(dtype),
        _join(gates, batch_sizes, batch_first).to(dtype) if keeps_gates else none.clone(),
        _join(cells, batch_sizes, batch_first) if save and mode == Mode.LSTM else none.clone(),
    )


def recurrent_layers(
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
    """(output, h_n, c_n, below, passed, gates, cells) of L layers of `recurrent`, each fed by the one before.

    Args:
        weights: w_ih, w_hh, and with biases b_ih and b_hh, of each layer.
        h_0, c_0, h_mask: (L, B, H) each.
        save: whether to give below, passed, gates and cells.
        seed_offset: (L - 1, 2) int64, the draws of the dropout behind each layer but the last, an element each in
            row-major order; None without dropout.
        dropout: the probability.

    The others as of `recurrent`, of which there is neither projection nor layer norm nor zoneout.

    Returns:
        output of the last layer; h_n and c_n (L, B, H); below (L - 1, ...), the outputs of the others, and passed
        (L - 1, ...), where there is dropout, these after it; gates and cells (L, ...) of all.
    """
    layers = h_0.shape[0]
    each = len(weights) // layers
    results: list[tuple[Tensor, ...]] = []
    passed: list[Tensor] = []
    x = input
    for layer in range(layers):
        w_ih, w_hh, *bias = weights[layer * each : (layer + 1) * each]
        b_ih, b_hh = bias or (None, None)
        c, mask = (None if state is None else state[layer] for state in (c_0, h_mask))
        results.append(
            recurrent(mode, x, batch_sizes, w_ih, w_hh, b_ih, b_hh, None, h_0[layer], c, mask, batch_first, False, save)
        )
        x = results[-1][0]
        if seed_offset is not None and layer < layers - 1:
            x = dropped(x, bernoulli(seed_offset[layer], list(x.shape), torch.bool, 1.0 - dropout), dropout)
            passed.append(x)
    outputs, h_n, c_n, gates, cells = zip(*results, strict=True)

    def stacked(tensors: Sequence[Tensor], exist: bool) -> Tensor:
        if not exist:
            return input.new_empty(0)
        return torch.stack(tuple(tensors)) if tensors else outputs[0].new_empty(0, *outputs[0].shape)

    return (
        outputs[-1],
        torch.stack(h_n),
        stacked(c_n, mode == Mode.LSTM),
        stacked(outputs[:-1], save),
        stacked(passed, save and seed_offset is not None),
        stacked(gates, gates[0].dim() > 1),
        stacked(cells, cells[0].dim() > 1),
    )


def dropped(x: Tensor, kept: Tensor, p: float) -> Tensor:
    """x after a dropout with probability p that has left what is `kept` (bool)."""
    return x * kept * (1.0 / (1.0 - p) if p < 1.0 else 0.0)


@without_autocast
def recurrent_backward(
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
    """Gradients of input, w_ih, w_hh, b_ih, b_hh, w_hr, h_0, c_0, norm_ih, norm_hh, norm_c, norm_c_bias.

    Those whose bit, from the lowest, is in `needs`. Of grad_output, grad_h_n and grad_c_n at least one is given.
    output, gates and cells are those that `recurrent` gave with save=True.
    """
    dtype = input.dtype
    grad_output, grad_h_n, grad_c_n = widen(grad_output, grad_h_n, grad_c_n)
    input, w_ih, w_hh, w_hr, h_0, c_0, h_mask = widen(input, w_ih, w_hh, w_hr, h_0, c_0, h_mask)
    norm = _norm_of(norm_ih, norm_hh, norm_c, norm_c_bias, norm_eps)
    keep_c, keep_h = _zones(seed_offset, input, batch_sizes, batch_first, c_0, h_0, zoneout_c, zoneout_h)
    hidden_size = w_hh.shape[0] // Mode(mode).gates
    cells, *scales = cells.split([hidden_size, 1, 1], -1) if norm is not None else (cells,)
    gates, *hats = gates.split(4 * hidden_size, -1) if norm is not None else (gates,)
    output, gates, cells = widen(output, gates, cells)
    saved = [_split(x, batch_sizes, batch_first) if x.dim() > 1 else None for x in (output, gates, cells)]
    outputs, all_gates, all_cells = saved
    assert outputs is not None
    x_hats, h_hats, x_scales, h_scales = (
        [_split(x, batch_sizes, batch_first) for x in widen(*hats, *scales)] if norm is not None else [outputs] * 4
    )
    grad_outputs = None if grad_output is None else _split(grad_output, batch_sizes, batch_first)

    dh = torch.zeros_like(h_0) if grad_h_n is None else grad_h_n
    dc = None if c_0 is None else torch.zeros_like(c_0) if grad_c_n is None else grad_c_n
    from_input, from_state, fed, hidden, to_hidden = ([outputs[0]] * len(outputs) for _ in range(5))
    to_gates, behind_norm, c_hats = ([outputs[0]] * len(outputs) for _ in range(3))
    order = _order(outputs, reverse)
    for k in reversed(range(len(order))):
        t, before = order[k], order[k - 1] if k else None
        n = outputs[t].shape[0]
        h = _start_rows(h_0, n, None if before is None else outputs[before])
        gates_t = None if all_gates is None else all_gates[t]
        h_t = outputs[t] if mode == Mode.LSTM or mode == Mode.GRU or gates_t is None else gates_t
        c = c_t = None
        if all_cells is not None and c_0 is not None:
            c, c_t = _start_rows(c_0, n, None if before is None else all_cells[before]), all_cells[t]
            if zoneout_c > 0:  # the c' that zoneout has overwritten in part
                assert gates_t is not None
                i, f, g, _ = gates_t.chunk(4, -1)
                c_t = f * c + i * g

        dh_t = dh[:n] if grad_outputs is None else dh[:n] + grad_outputs[t]
        past_h, dh_t = _kept_backward(keep_h[t], dh_t)
        if w_hr is not None:
            assert gates_t is not None
            assert c_t is not None
            y = c_t if norm is None else _standardise(c_t, norm.eps)[0] * norm.c + norm.c_bias
            hidden[t], to_hidden[t] = gates_t.chunk(4, -1)[3] * y.tanh(), dh_t
            dh_t = dh_t @ w_hr
        past_c, dc_t = (None, None) if dc is None else _kept_backward(keep_c[t], dc[:n])
        found = _cell_backward(mode, dh_t, dc_t, h, c, h_t, c_t, gates_t, norm)
        from_input[t], from_state[t] = found.from_input, found.from_state
        if norm is not None:
            assert found.behind_norm is not None
            assert found.normed is not None
            to_gates[t], behind_norm[t], c_hats[t] = found.from_input, found.behind_norm, found.normed
            from_input[t] = _standardise_backward(to_gates[t] * norm.ih, x_hats[t], x_scales[t])
            from_state[t] = _standardise_backward(to_gates[t] * norm.hh, h_hats[t], h_scales[t])
        dh_t = from_state[t] @ w_hh
        if h_mask is not None:
            dh_t = dh_t * h_mask[:n]
        dh = _set_rows(dh, _plus(_plus(dh_t, found.h), past_h))
        if dc is not None and found.c is not None:
            dc = _set_rows(dc, _plus(found.c, past_c))
        fed[t] = h if h_mask is None else h * h_mask[:n]

    # Products and sums over all rows of all steps at once; the order of the rows is that of `input`.
    def rows(steps: Sequence[Tensor]) -> Tensor:
        return _join(steps, batch_sizes, batch_first).flatten(0, -2)

    grad_ih, grad_hh = rows(from_input), rows(from_state)
    to_bias_ih, to_bias_hh = (grad_ih, grad_hh) if norm is None else (rows(to_gates),) * 2
    wanted = (
        lambda: (grad_ih @ w_ih).reshape(input.shape),
        lambda: grad_ih.T @ input.flatten(0, -2),
        lambda: grad_hh.T @ rows(fed),
        lambda: None if b_ih is None else to_bias_ih.sum(0),
        lambda: None if b_hh is None else to_bias_hh.sum(0),
        lambda: None if w_hr is None else rows(to_hidden).T @ rows(hidden),
        lambda: dh,
        lambda: dc,
        lambda: None if norm is None else (to_bias_ih * rows(x_hats)).sum(0),
        lambda: None if norm is None else (to_bias_hh * rows(h_hats)).sum(0),
        lambda: None if norm is None else (rows(behind_norm) * rows(c_hats)).sum(0),
        lambda: None if norm is None else rows(behind_norm).sum(0),
    )
    results = [make() if needs >> i & 1 else None for i, make in enumerate(wanted)]
    return tuple(or_empty(x, input).to(dtype).contiguous() for x in results)


# What zoneout keeps of a state: a mask, a share of it, or (None) nothing.
_Zone = Tensor | float | None


def _zones(
    seed_offset: Tensor | None,
    input: Tensor,
    batch_sizes: Tensor | None,
    batch_first: bool,
    c: Tensor | None,
    h: Tensor,
    zoneout_c: float,
    zoneout_h: float,
) -> tuple[Sequence[_Zone], Sequence[_Zone]]:
    """The d of c and of h for every step; c and h give the widths."""
    steps = input.shape[1 if batch_first else 0] if batch_sizes is None else batch_sizes.shape[0]
    if seed_offset is None or (zoneout_c == 0 and zoneout_h == 0):
        return [zoneout_c or None] * steps, [zoneout_h or None] * steps

    def drawn(p: float, width: int, first: int) -> Sequence[_Zone]:
        if p == 0:
            return [None] * steps
        shift = torch.tensor([0, first], device=seed_offset.device)
        mask = bernoulli(seed_offset + shift, [*input.shape[:-1], width], torch.bool, p)
        return _split(mask.to(input.dtype), batch_sizes, batch_first)

    of_c = 0 if c is None else c.shape[-1]
    return drawn(zoneout_c, of_c, 0), drawn(zoneout_h, h.shape[-1], input.shape[:-1].numel() * of_c)


def _kept(zone: _Zone, before: Tensor, after: Tensor) -> Tensor:
    return after if zone is None else zone * before + (1 - zone) * after


def _kept_backward(zone: _Zone, grad: Tensor) -> tuple[Tensor | None, Tensor]:
    """Gradients of `before` and `after` of `_kept`."""
    return (None, grad) if zone is None else (zone * grad, (1 - zone) * grad)


def _plus(x: Tensor, y: Tensor | None) -> Tensor:
    return x if y is None else x + y


def _split(x: Tensor, batch_sizes: Tensor | None, batch_first: bool) -> Sequence[Tensor]:
    """The steps of a sequence."""
    if batch_sizes is not None:
        return x.split(batch_sizes.tolist())
    return x.unbind(1 if batch_first else 0)


def _join(steps: Sequence[Tensor], batch_sizes: Tensor | None, batch_first: bool) -> Tensor:
    """The sequence of the steps: the inverse of `_split`."""
    if batch_sizes is not None:
        return torch.cat(tuple(steps))
    return torch.stack(tuple(steps), 1 if batch_first else 0)


def _order(steps: Sequence[Tensor], reverse: bool) -> Sequence[int]:
    return range(len(steps) - 1, -1, -1) if reverse else range(len(steps))


def _set_rows(state: Tensor, rows: Tensor) -> Tensor:
    """`state` with its first rows replaced."""
    return rows if rows.shape[0] == state.shape[0] else torch.cat((rows, state[rows.shape[0] :]))


def _start_rows(start: Tensor, n: int, before: Tensor | None) -> Tensor:
    """The states that the n rows of a step began with: of the step before it, or of the start where that had none."""
    if before is None:
        return start[:n]
    return torch.cat((before[:n], start[before.shape[0] : n]))
