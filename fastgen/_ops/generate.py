"""Generation: a draw from logits, and many tokens a call.

What the arguments are stands in `fastgen/reference/generate.py`. All are for inference: they have no gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastgen import reference
from fastgen._ops.library import register

__all__ = ["SCHEMAS"]

SCHEMAS = {
    "pick_tokens": "(Tensor logits, Tensor? seen, Tensor seed_offset, float temperature, int top_k, float top_p, "
    "float min_p, float repetition_penalty) -> Tensor",
    "rnn_generate": "(int mode, Tensor(a!) tokens, Tensor(b!) position, Tensor given, Tensor end, Tensor(c!) status, "
    "Tensor(d!) h, Tensor(e!)? c, Tensor(f!)? seen, Tensor embedding, Tensor[] weights, Tensor? projection, "
    "Tensor output_weight, Tensor? output_bias, Tensor seed_offset, float temperature, int top_k, float top_p, "
    "float min_p, float repetition_penalty, Tensor stop, int steps, float norm_eps=0., "
    "float zoneout_c=0., float zoneout_h=0.) -> ()",
}


def _fake_pick_tokens(logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty(logits.shape[0], dtype=torch.int64)


def _fake_rnn_generate(*_: Any) -> None:
    return None


register(
    SCHEMAS,
    reference,
    {"pick_tokens": _fake_pick_tokens, "rnn_generate": _fake_rnn_generate},
)
