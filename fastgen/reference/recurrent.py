"""The recurrent family: LSTM, GRU and Elman RNN, one layer in one direction, and single steps of them.

LSTM  c' = f c + i g,  h' = o tanh(c')  (Hochreiter & Schmidhuber, 1997; forget gate: Gers et al., 2000),
      h' = W_hr o tanh(c') with a projection (Sak et al., 2014);
GRU   n = tanh(x_n + r (W_hn h + b_hn)),  h' = (1 - z) n + z h  (Cho et al., 2014, reset after the product);
RNN   h' = act(W_ih x + b_ih + W_hh h + b_hh)  (Elman, 1990).

Gates stand in torch's order, LSTM i, f, g, o and GRU r, z, n. Half types are computed in float32 and
rounded where a result is stored.

Sequences are (T, B, ...), (B, T, ...) with `batch_first`, or packed (N, ...) with `batch_sizes` (T,)
int64 in descending order: step t has the first batch_sizes[t] rows. T is at least 1. A result that does
not exist, or is not asked for, is an empty tensor of shape (0,).
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

import torch
from torch import Tensor
from torch.nn.functional import linear

from fastgen.reference._work import or_empty, widen, without_autocast


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


def _cell(
    mode: int, from_input: Tensor, from_state: Tensor, h: Tensor, c: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(h', c', gates) from W_ih x + b_ih and W_hh h + b_hh, each (n, G H); h' is before the projection."""
    if mode == Mode.LSTM:
        assert c is not None
        i, f, g, o = (from_input + from_state).chunk(4, -1)
        i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
        c = f * c + i * g
        return o * c.tanh(), c, torch.cat((i, f, g, o), -1)
    if mode == Mode.GRU:
        x_r, x_z, x_n = from_input.chunk(3, -1)
        h_r, h_z, h_n = from_state.chunk(3, -1)
        r, z = (x_r + h_r).sigmoid(), (x_z + h_z).sigmoid()
        n = (x_n + r * h_n).tanh()
        return (1 - z) * n + z * h, None, torch.cat((r, z, n, h_n), -1)
    total = from_input + from_state
    return total.tanh() if mode == Mode.RNN_TANH else total.relu(), None, None


def _cell_backward(
    mode: int,
    grad_h: Tensor,
    grad_c: Tensor | None,
    h: Tensor,
    c: Tensor | None,
    h_1: Tensor,
    c_1: Tensor | None,
    gates: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of from_input and from_state of `_cell`, and what reaches h and c past the products.

    h, c: the states before the step; h_1, c_1, gates: what the step gave.
    """
    if mode == Mode.LSTM:
        assert c is not None
        assert c_1 is not None
        assert gates is not None
        i, f, g, o = gates.chunk(4, -1)
        t = c_1.tanh()
        dc = grad_h * o * (1 - t * t)
        if grad_c is not None:
            dc = dc + grad_c
        di, df, dg, do = dc * g, dc * c, dc * i, grad_h * t
        grad = torch.cat((di * i * (1 - i), df * f * (1 - f), dg * (1 - g * g), do * o * (1 - o)), -1)
        return grad, grad, None, dc * f
    if mode == Mode.GRU:
        assert gates is not None
        r, z, n, h_n = gates.chunk(4, -1)
        dn = grad_h * (1 - z) * (1 - n * n)
        dz = grad_h * (h - n) * z * (1 - z)
        dr = dn * h_n * r * (1 - r)
        return torch.cat((dr, dz, dn), -1), torch.cat((dr, dz, dn * r), -1), grad_h * z, None
    grad = grad_h * (1 - h_1 * h_1) if mode == Mode.RNN_TANH else grad_h * (h_1 > 0)
    return grad, grad, None, None


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
) -> tuple[Tensor, Tensor, Tensor]:
    """input (B, I), h and c (B, H) -> h_1 (B, H), c_1 (B, H), gates (B, 4 H)."""
    dtype = input.dtype
    input, h, c, w_ih, w_hh, b_ih, b_hh = widen(input, h, c, w_ih, w_hh, b_ih, b_hh)
    h_1, c_1, gates = _cell(mode, linear(input, w_ih, b_ih), linear(h, w_hh, b_hh), h, c)
    return h_1.to(dtype), or_empty(c_1, h_1).to(dtype), or_empty(gates, h_1).to(dtype)


def recurrent_cell_backward(
    mode: int,
    grad_h: Tensor | None,
    grad_c: Tensor | None,
    h: Tensor,
    c: Tensor | None,
    h_1: Tensor,
    c_1: Tensor,
    gates: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(grad_gates_ih (B, G H), grad_gates_hh (B, 3 H), grad_h (B, H), grad_c (B, H)) past the products.

    grad_gates_hh and grad_h exist for a GRU only: elsewhere the one equals grad_gates_ih and the other is zero.
    """
    dtype = h.dtype
    grad_h, grad_c, h, c, h_1, c_1, gates = widen(grad_h, grad_c, h, c, h_1, c_1, gates)
    if grad_h is None:
        grad_h = torch.zeros_like(h_1)
    from_input, from_state, to_h, to_c = _cell_backward(mode, grad_h, grad_c, h, c, h_1, c_1, gates)
    hidden = from_state if mode == Mode.GRU else None
    return (
        from_input.to(dtype),
        or_empty(hidden, h).to(dtype),
        or_empty(to_h, h).to(dtype),
        or_empty(to_c, h).to(dtype),
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(output, h_n, c_n, gates, cells) of one layer in one direction.

    Args:
        input: (T, B, I), (B, T, I) or packed (N, I).
        w_ih, w_hh, b_ih, b_hh, w_hr: (G H, I), (G H, P), (G H,), (G H,), (P, H); P = H without w_hr.
        h_0, c_0: (B, P), (B, H).
        h_mask: (B, P), multiplies the h that enters the product with W_hh, at every step.
        reverse: from the last step to the first; a packed row begins at its own last step.
        save: whether to give gates and cells.

    Returns:
        output as input with P for I; h_n (B, P) and c_n (B, H), each row's last states; gates, as input with
        4 H for I (LSTM i, f, g, o; GRU r, z, n and W_hn h + b_hn); cells, as input with H for I (LSTM c', in
        the work dtype).
    """
    dtype = input.dtype
    input, w_ih, w_hh, b_ih, b_hh, w_hr, h, c, h_mask = widen(input, w_ih, w_hh, b_ih, b_hh, w_hr, h_0, c_0, h_mask)
    steps = _split(linear(input, w_ih, b_ih), batch_sizes, batch_first)
    outputs, gates, cells = ([steps[0]] * len(steps) for _ in range(3))
    for t in _order(steps, reverse):
        # The rows that are not in this step have ended, or have not yet begun: their states stay.
        n = steps[t].shape[0]
        fed = h[:n] if h_mask is None else h[:n] * h_mask[:n]
        h_t, c_t, gates_t = _cell(mode, steps[t], linear(fed, w_hh, b_hh), h[:n], None if c is None else c[:n])
        if w_hr is not None:
            h_t = linear(h_t, w_hr)
        outputs[t], h = h_t, _set_rows(h, h_t)
        if c_t is not None:
            assert c is not None
            cells[t], c = c_t, _set_rows(c, c_t)
        if gates_t is not None:
            gates[t] = gates_t

    output = _join(outputs, batch_sizes, batch_first).to(dtype)
    none = output.new_empty(0)
    return (
        output,
        h.to(dtype),
        none if c is None else c.to(dtype),
        _join(gates, batch_sizes, batch_first).to(dtype) if save and mode in (Mode.LSTM, Mode.GRU) else none.clone(),
        _join(cells, batch_sizes, batch_first) if save and mode == Mode.LSTM else none.clone(),
    )


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of input, w_ih, w_hh, b_ih, b_hh, w_hr, h_0, c_0: those whose bit, from the lowest, is in `needs`.

    Of grad_output, grad_h_n and grad_c_n at least one is given. output, gates and cells are those that
    `recurrent` gave with save=True.
    """
    dtype = input.dtype
    grad_output, grad_h_n, grad_c_n = widen(grad_output, grad_h_n, grad_c_n)
    input, w_ih, w_hh, w_hr, h_0, c_0, h_mask = widen(input, w_ih, w_hh, w_hr, h_0, c_0, h_mask)
    output, gates, cells = widen(output, gates, cells)
    saved = [_split(x, batch_sizes, batch_first) if x.dim() > 1 else None for x in (output, gates, cells)]
    outputs, all_gates, all_cells = saved
    assert outputs is not None
    grad_outputs = None if grad_output is None else _split(grad_output, batch_sizes, batch_first)

    dh = torch.zeros_like(h_0) if grad_h_n is None else grad_h_n
    dc = None if c_0 is None else torch.zeros_like(c_0) if grad_c_n is None else grad_c_n
    from_input, from_state, fed, hidden, to_hidden = ([outputs[0]] * len(outputs) for _ in range(5))
    order = _order(outputs, reverse)
    for k in reversed(range(len(order))):
        t, before = order[k], order[k - 1] if k else None
        n = outputs[t].shape[0]
        h = _start_rows(h_0, n, None if before is None else outputs[before])
        c = c_t = None
        if all_cells is not None and c_0 is not None:
            c, c_t = _start_rows(c_0, n, None if before is None else all_cells[before]), all_cells[t]
        gates_t = None if all_gates is None else all_gates[t]

        dh_t = dh[:n] if grad_outputs is None else dh[:n] + grad_outputs[t]
        if w_hr is not None:
            assert gates_t is not None
            assert c_t is not None
            hidden[t], to_hidden[t] = gates_t.chunk(4, -1)[3] * c_t.tanh(), dh_t
            dh_t = dh_t @ w_hr
        from_input[t], from_state[t], direct, dc_t = _cell_backward(
            mode, dh_t, None if dc is None else dc[:n], h, c, outputs[t], c_t, gates_t
        )
        dh_t = from_state[t] @ w_hh
        if h_mask is not None:
            dh_t = dh_t * h_mask[:n]
        dh = _set_rows(dh, dh_t if direct is None else dh_t + direct)
        if dc is not None and dc_t is not None:
            dc = _set_rows(dc, dc_t)
        fed[t] = h if h_mask is None else h * h_mask[:n]

    # Products and sums over all rows of all steps at once; the order of the rows is that of `input`.
    def rows(steps: Sequence[Tensor]) -> Tensor:
        return _join(steps, batch_sizes, batch_first).flatten(0, -2)

    grad_ih, grad_hh = rows(from_input), rows(from_state)
    wanted = (
        lambda: (grad_ih @ w_ih).reshape(input.shape),
        lambda: grad_ih.T @ input.flatten(0, -2),
        lambda: grad_hh.T @ rows(fed),
        lambda: None if b_ih is None else grad_ih.sum(0),
        lambda: None if b_hh is None else grad_hh.sum(0),
        lambda: None if w_hr is None else rows(to_hidden).T @ rows(hidden),
        lambda: dh,
        lambda: dc,
    )
    results = [make() if needs >> i & 1 else None for i, make in enumerate(wanted)]
    return tuple(or_empty(x, input).to(dtype).contiguous() for x in results)  # type: ignore[return-value]


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
