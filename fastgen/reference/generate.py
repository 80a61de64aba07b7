"""Generation of tokens by a recurrent model: the loop over embedding, cells, output and draw.

A row's tokens are a function of its own prompt, seed and state: each row is fed one token a turn, prompt
and continuation alike, so neither the batch nor the point where a text was cut into prompt and rest shows
in the bits (as far as those of `recurrent_step` and `linear_rows` do not: the kernels' do not).

From the logits on, every step has one result on every machine. The scores are single IEEE operations in
double precision, the probabilities integers in units of 2^-40 of the largest, and sums of integers have no
rounding that could depend on their order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from enum import IntEnum

import torch
from torch import Tensor

from fastgen.reference.random import uniform

# ln 2 = high + low, where k * high is exact for every exponent k, and 1 / n! for exp.
_LN2_HIGH, _LN2_LOW = 6.93147180369123816490e-01, 1.90821492927058770002e-10
_LOG2_E = 1.4426950408889634
_EXP = tuple(1.0 / math.factorial(n) for n in range(14))

_UNIT_BITS = 40
_SMALLEST = -28.0  # exp of less is under one unit


class Status(IntEnum):
    """Of a row in `rnn_generate`."""

    RUNNING = 0
    STOPPED = 1  # it drew a stop token
    FULL = 2
    NOT_FINITE = 3  # its scores have no maximum to draw by
    INVALID = 4  # on a GPU, where it would be too late to raise: its numbers do not fit, or it has a token that is none


def rnn_generate(
    mode: int,
    tokens: Tensor,
    position: Tensor,
    given: Tensor,
    end: Tensor,
    status: Tensor,
    h: Tensor,
    c: Tensor | None,
    seen: Tensor | None,
    embedding: Tensor,
    weights: Sequence[Tensor],
    projection: Tensor | None,
    output_weight: Tensor,
    output_bias: Tensor | None,
    seed_offset: Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    repetition_penalty: float,
    stop: Tensor,
    steps: int,
    norm_eps: float = 0.0,
    zoneout_c: float = 0.0,
    zoneout_h: float = 0.0,
    process: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> None:
    """Feed each running row up to `steps` tokens, and draw the next one wherever the prompt is over.

    Row r of the buffer `tokens` (n, L) int64 holds its tokens from the left; the others of its arguments
    are (n,) int64. What changes: tokens, position, status, h, c, seen.

    Args:
        mode: the cell, see `Mode`.
        position: how many tokens of the row have been fed; the one there is next, and always valid.
        given: the length of the row's prompt, at least 1.
        end: how long the row may become, given < end <= L.
        status: see `Status`; only running rows are touched.
        h, c: (layers, n, H) each, the states; c for LSTM, else None.
        seen: (n, V) bool, what the repetition penalty applies to, or None.
        embedding: (V, E).
        weights: a layer after the other, w_ih, w_hh, if there are biases b_ih, b_hh, and with layer norm norm_ih,
            norm_hh, norm_c, norm_c_bias.
        projection: (P, H) or None: applied to the last layer's h before the output.
        output_weight, output_bias: (V, P or H) and (V,) or None.
        seed_offset: (n, 2) int64: the row's seed, and the element of its stream that stands at index 0. The
            token at index i of the buffer is drawn by element offset + i.
        temperature, top_k, top_p, min_p, repetition_penalty: see `pick_tokens`.
        stop: (S,) int64, tokens after which a row stops.
        steps: tokens to feed to a row at most.
        norm_eps, zoneout_c, zoneout_h: see `recurrent_step`.
        process: not in the op: (rows (k,), their logits (k, V)) -> the logits to pick from.
    """
    product = torch.ops.fastgen.linear_rows
    for _ in range(steps):
        rows = (status == Status.RUNNING).nonzero().squeeze(1)
        if rows.numel() == 0:
            return
        index = position[rows]
        x = step_layers(mode, embedding[tokens[rows, index]], h, c, weights, rows, norm_eps, (zoneout_c, zoneout_h))
        index = index + 1
        position[rows] = index

        drawing = (index >= given[rows]).nonzero().squeeze(1)
        if drawing.numel() == 0:
            continue
        rows, index, x = rows[drawing], index[drawing], x[drawing]
        if projection is not None:
            x = product(x, projection, None)
        logits = product(x, output_weight, output_bias)
        if process is not None:
            logits = process(rows, logits)
        drawn = torch.ops.fastgen.pick_tokens(
            logits,
            None if seen is None else seen[rows],
            torch.stack((seed_offset[rows, 0], seed_offset[rows, 1] + index), dim=-1),
            temperature,
            top_k,
            top_p,
            min_p,
            repetition_penalty,
        )
        failed = drawn < 0
        status[rows[failed]] = Status.NOT_FINITE
        rows, index, drawn = rows[~failed], index[~failed], drawn[~failed]
        tokens[rows, index] = drawn
        if seen is not None:
            seen[rows, drawn] = True
        status[rows[index + 1 == end[rows]]] = Status.FULL
        status[rows[torch.isin(drawn, stop)]] = Status.STOPPED


def step_layers(
    mode: int,
    x: Tensor,
    h: Tensor,
    c: Tensor | None,
    weights: Sequence[Tensor],
    rows: Tensor,
    norm_eps: float = 0.0,
    zoneout: Sequence[float] = (0.0, 0.0),
) -> Tensor:
    """Feed x (k, I) to the layers for the k rows `rows` of h and c, which change; returns the last h (k, H)."""
    each = len(weights) // len(h)
    for layer in range(len(h)):
        w_ih, w_hh, *more = weights[layer * each : (layer + 1) * each]
        biases = more[:2] if each % 4 == 0 else (None, None)
        norm = more[-4:] if each > 4 else [None] * 4
        states = h[layer, rows], None if c is None else c[layer, rows]
        x, c_1 = torch.ops.fastgen.recurrent_step(mode, x, *states, w_ih, w_hh, *biases, *norm, norm_eps, *zoneout)
        h[layer, rows] = x
        if c is not None:
            c[layer, rows] = c_1
    return x


def pick_tokens(
    logits: Tensor,
    seen: Tensor | None,
    seed_offset: Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    repetition_penalty: float,
) -> Tensor:
    """(n,) int64: a token for each row of logits (n, V), or -1 where they have NaN or no finite maximum.

    In this order, which is that of Hugging Face's `generate`:

    * repetition penalty (Keskar et al., "CTRL", 2019): a seen token's score x becomes x * penalty where it is
      negative, else x / penalty; 1 is off. `seen` is (n, V) bool.
    * temperature 0: the first of the largest scores, nothing is filtered or drawn. Else scores / temperature.
    * top_k: only the k most likely, and what equals the least of them; 0 is off.
    * top_p (Holtzman et al., "The curious case of neural text degeneration", 2020): only the fewest most
      likely tokens that have this share of what is left; among equals the lower ones; 1 is off.
    * min_p (Nguyen et al., "Turning up the heat", 2024): only tokens with at least this fraction of the
      probability of the most likely one; 0 is off.
    * the draw: the first token whose cumulated probability exceeds u, a float64 uniform number; row r
      takes the element of `seed_offset[r]` (seed, element), int64 (n, 2).
    """
    scores = logits.double()
    if seen is not None:
        scores = torch.where(
            seen, torch.where(scores < 0, scores * repetition_penalty, scores / repetition_penalty), scores
        )
    if temperature != 0:
        scores = scores / temperature
    largest = scores.amax(-1, keepdim=True)  # NaN where there is one
    usable = torch.isfinite(largest)
    if temperature == 0:
        return torch.where(usable.squeeze(-1), scores.argmax(-1), -1)

    weights = probability_units(torch.where(usable, scores - largest, 0.0))
    if 0 < top_k < weights.shape[-1]:
        weights = weights.masked_fill(weights < weights.topk(top_k).values[..., -1:], 0)
    if top_p < 1:
        ordered, order = weights.sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(-1) - ordered
        limit = top_p * ordered.sum(-1, keepdim=True).double()
        weights = torch.zeros_like(weights).scatter(-1, order, ordered.masked_fill(before.double() >= limit, 0))
    if min_p > 0:
        weights = weights.masked_fill(weights.double() < min_p * 2.0**_UNIT_BITS, 0)

    cumulated = weights.cumsum(-1)
    total = cumulated[..., -1:]
    u = uniform(seed_offset, [1], torch.float64, 0.0, 1.0)
    threshold = torch.minimum((u * total.double()).long(), total - 1)
    drawn = torch.searchsorted(cumulated, threshold, right=True)
    return torch.where(usable, drawn, -1).squeeze(-1)


def probability_units(x: Tensor) -> Tensor:
    """exp(x) for x <= 0 (float64), as an int64 count of units of 2^-40, rounded down.

    exp(x) = 2^k exp(r) with k the nearest integer to x / ln 2, and exp(r) by its Taylor series of degree 13.
    """
    large = x >= _SMALLEST
    x = torch.where(large, x, 0.0)
    k = (x * _LOG2_E).round()
    r = (x - k * _LN2_HIGH) - k * _LN2_LOW
    value = torch.full_like(r, _EXP[-1])
    for coefficient in _EXP[-2::-1]:
        value = value * r + coefficient
    power = ((k.long() + (1023 + _UNIT_BITS)) << 52).view(torch.float64)
    return torch.where(large, (value * power).long(), 0)
