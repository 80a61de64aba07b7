"""The recurrent family: LSTM, GRU and Elman RNN, a whole sequence or one step.

What the arguments and results are, shape by shape, stands in `fastgen/reference/recurrent.py`.
"""

from __future__ import annotations

from torch import Tensor

from fastgen import reference
from fastgen._ops.library import register
from fastgen.reference.recurrent import Mode, work_dtype

__all__ = ["SCHEMAS", "Mode"]

_WEIGHTS = "Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh"
_SEQUENCE = f"Tensor input, Tensor? batch_sizes, {_WEIGHTS}, Tensor? w_hr, Tensor h_0, Tensor? c_0, Tensor? h_mask"
SCHEMAS = {
    "recurrent": f"(int mode, {_SEQUENCE}, bool batch_first, bool reverse, bool save) -> "
    "(Tensor output, Tensor h_n, Tensor c_n, Tensor gates, Tensor cells)",
    "recurrent_backward": f"(int mode, Tensor? grad_output, Tensor? grad_h_n, Tensor? grad_c_n, {_SEQUENCE}, "
    "Tensor output, Tensor gates, Tensor cells, bool batch_first, bool reverse, int needs) -> "
    "(Tensor grad_input, Tensor grad_w_ih, Tensor grad_w_hh, Tensor grad_b_ih, Tensor grad_b_hh, Tensor grad_w_hr, "
    "Tensor grad_h_0, Tensor grad_c_0)",
    "recurrent_cell": f"(int mode, Tensor input, Tensor h, Tensor? c, {_WEIGHTS}) -> "
    "(Tensor h_1, Tensor c_1, Tensor gates)",
    "recurrent_cell_backward": "(int mode, Tensor? grad_h, Tensor? grad_c, Tensor h, Tensor? c, Tensor h_1, "
    "Tensor c_1, Tensor gates) -> (Tensor grad_gates_ih, Tensor grad_gates_hh, Tensor grad_h, Tensor grad_c)",
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
) -> tuple[Tensor, ...]:
    hidden, leading = w_hh.shape[0] // Mode(mode).gates, input.shape[:-1]
    gates, cells = input.new_empty(0), input.new_empty(0)
    if save and mode in (Mode.LSTM, Mode.GRU):
        gates = input.new_empty((*leading, 4 * hidden))
    if save and mode == Mode.LSTM:
        cells = input.new_empty((*leading, hidden), dtype=work_dtype(input.dtype))
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
) -> tuple[Tensor, ...]:
    of = (input, w_ih, w_hh, b_ih, b_hh, w_hr, h_0, c_0)
    return tuple(input.new_empty(x.shape if x is not None and needs >> i & 1 else 0) for i, x in enumerate(of))


def _fake_recurrent_cell(
    mode: int,
    input: Tensor,
    h: Tensor,
    c: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
) -> tuple[Tensor, ...]:
    c_1 = h.new_empty(0 if c is None else c.shape)
    gated = mode in (Mode.LSTM, Mode.GRU)
    return h.new_empty(h.shape), c_1, h.new_empty((h.shape[0], 4 * h.shape[1]) if gated else 0)


def _fake_recurrent_cell_backward(
    mode: int,
    grad_h: Tensor | None,
    grad_c: Tensor | None,
    h: Tensor,
    c: Tensor | None,
    h_1: Tensor,
    c_1: Tensor,
    gates: Tensor,
) -> tuple[Tensor, ...]:
    grad = h.new_empty((h.shape[0], Mode(mode).gates * h.shape[1]))
    gru = mode == Mode.GRU
    return (
        grad,
        h.new_empty(grad.shape if gru else 0),
        h.new_empty(h.shape if gru else 0),
        h.new_empty(0 if c is None else c.shape),
    )


register(
    SCHEMAS,
    reference,
    {
        "recurrent": _fake_recurrent,
        "recurrent_backward": _fake_recurrent_backward,
        "recurrent_cell": _fake_recurrent_cell,
        "recurrent_cell_backward": _fake_recurrent_cell_backward,
    },
)
