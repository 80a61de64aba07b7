"""Scaled dot-product attention (Vaswani et al., "Attention is all you need", 2017, section 3.2.1).

For query row i of a head and the key rows j of its sequence, at distance d = i + offset - j:

    s = scale q.k,  s = softcap tanh(s / softcap) if there is a cap,  s = s + mask - slope |d|
    p = softmax of s over the keys that row i sees,  out = sum_j p v,  lse = log sum_j exp(s)

Row i sees key j if the mask allows it and -right <= d <= left, where a negative bound stands for none. offset is 0, or
Lk - Lq with `lower_right`, which lets the last query stand at the last key. A row that sees no key has out 0 and lse
-inf. (ALiBi: Press et al., 2022, equation 3 with |d|; softcap: Gemma 2, 2024, section 2; grouped-query heads: Ainslie
et al., 2023.)

Dropout acts on p after the softmax: element (b, h, i, j) is kept if the Bernoulli draw of probability 1 - dropout_p
with its row-major number in (B, H, Lq, Lk) is 1, and what is kept is divided by 1 - dropout_p.

Arguments of both functions:
    query (B, H, Lq, D), key (B, Hkv, Lk, D), value (B, Hkv, Lk, Dv), of any strides. H is a multiple of Hkv, and query
        head h reads key head h // (H / Hkv).
    mask: bool (True: seen) or floating, of sizes 1 or those of (B, H, Lq, Lk); or None.
    slopes: (H,) or (B, H) in the work dtype, or None.
    cu_q, cu_k: int32 or int64 (N + 1,) on the CPU, ascending from 0, or None: sequence n is the rows cu[n] to
        cu[n + 1] of query, or of key and value; B is 1, there is no mask, and slopes are (H,). Rows of different
        sequences do not see each other.
    seed_offset: int64 (2,), None if and only if dropout_p is 0.
    softcap: 0 for none.
Half types are computed in float32 and rounded once; lse stays in the work dtype.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastgen.reference._work import or_empty, widen, without_autocast

__all__ = ["attention", "attention_backward"]


@without_autocast
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    slopes: Tensor | None,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    seed_offset: Tensor | None,
    dropout_p: float,
    scale: float,
    softcap: float,
    left: int,
    right: int,
    lower_right: bool,
) -> tuple[Tensor, Tensor]:
    """(out (B, H, Lq, Dv) in the memory order of query, lse (B, H, Lq))."""
    q, k, v, added, slopes = widen(query, key, value, None if _is_bool(mask) else mask, slopes)
    distance, seen = _geometry(q, k, mask, cu_q, cu_k, left, right, lower_right)
    scores, _ = _scores(q, k, added, slopes, distance, seen, scale, softcap)

    # Neither softmax nor logsumexp has a gradient where all scores are -inf: such rows are set apart.
    top = scores.detach().amax(-1, keepdim=True) if scores.shape[-1] else scores.new_zeros((*scores.shape[:-1], 1))
    top = torch.where(top == -torch.inf, 0.0, top)
    weights = (scores - top).exp()
    total = weights.sum(-1, keepdim=True)
    sees_none = total == 0
    total = torch.where(sees_none, 1.0, total)
    lse = torch.where(sees_none, -torch.inf, total.log() + top).squeeze(-1)
    weights = _drop(weights / total, seed_offset, dropout_p)
    out = _ungroup(_group(weights, v) @ v, q)
    return _laid_out(out.to(query.dtype), query), lse.clone(memory_format=torch.contiguous_format)


@without_autocast
def attention_backward(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    slopes: Tensor | None,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    seed_offset: Tensor | None,
    out: Tensor,
    lse: Tensor,
    dropout_p: float,
    scale: float,
    softcap: float,
    left: int,
    right: int,
    lower_right: bool,
    needs: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value, mask and slopes: those whose bit, from the lowest, is in `needs`.

    Of grad_out and grad_lse at least one is given; out and lse are those of `attention`. Gradients of query, key and
    value are in the memory order of these, the others contiguous; what is not wanted is an empty tensor (0,).

        ds = p (dp - delta + grad_lse),  dp = keep / (1 - dropout_p) (grad_out . v),  delta = grad_out . out
    """
    q, k, v, added, work_slopes = widen(query, key, value, None if _is_bool(mask) else mask, slopes)
    grad_out, grad_lse, out = widen(grad_out, grad_lse, out)
    distance, seen = _geometry(q, k, mask, cu_q, cu_k, left, right, lower_right)
    scores, capped = _scores(q, k, added, work_slopes, distance, seen, scale, softcap)
    lse = lse.unsqueeze(-1)
    weights = (scores - torch.where(lse == -torch.inf, 0.0, lse)).exp()

    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    to_weights = _drop(_ungroup(_group(grad_out, v) @ v.transpose(-1, -2), q), seed_offset, dropout_p)
    ds = to_weights - (grad_out * out).sum(-1, keepdim=True)
    if grad_lse is not None:
        ds = ds + grad_lse.unsqueeze(-1)
    # Of a row that sees no key the weights are 0, and so is ds even if grad_lse is not finite, as log(0) may make it.
    ds = torch.where(lse == -torch.inf, 0.0, weights * ds)

    grad_query = grad_key = grad_value = grad_mask = grad_slopes = None
    if needs >> 2 & 1:
        grad_value = _group(_drop(weights, seed_offset, dropout_p), v).transpose(-1, -2) @ _group(grad_out, v)
        grad_value = _laid_out(grad_value.to(value.dtype), value)
    if mask is not None and needs >> 3 & 1:
        grad_mask = ds.sum_to_size(mask.shape)
    if slopes is not None and needs >> 4 & 1:
        grad_slopes = -(ds * distance.abs()).sum((-1, -2)).sum_to_size(slopes.shape)
    if capped is not None:
        ds = ds * (1 - capped * capped)
    ds = _group(ds * scale, k)
    if needs & 1:
        grad_query = _laid_out(_ungroup(ds @ k, q).to(query.dtype), query)
    if needs >> 1 & 1:
        grad_key = _laid_out((ds.transpose(-1, -2) @ _group(q, k)).to(key.dtype), key)
    return (
        or_empty(grad_query, query),
        or_empty(grad_key, key),
        or_empty(grad_value, value),
        query.new_empty(0) if mask is None else or_empty(grad_mask, mask).to(mask.dtype).contiguous(),
        query.new_empty(0) if slopes is None else or_empty(grad_slopes, slopes).contiguous(),
    )


# ---------------------------------------------------------------------------------------------------


def _is_bool(mask: Tensor | None) -> bool:
    return mask is not None and mask.dtype is torch.bool


class _Geometry(NamedTuple):
    distance: Tensor
    """(Lq, Lk) int64: d."""

    seen: Tensor | None
    """What may be seen, broadcast to (B, H, Lq, Lk); None for everything."""


def _geometry(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    left: int,
    right: int,
    lower_right: bool,
) -> _Geometry:
    total_q, total_k, device = query.shape[-2], key.shape[-2], query.device
    conditions = []
    if cu_q is not None and cu_k is not None:
        seq_q, i = _places(cu_q.long(), total_q)
        seq_k, j = _places(cu_k.long(), total_k)
        if lower_right:
            i = i + (cu_k.diff() - cu_q.diff())[seq_q]
        conditions.append((seq_q.unsqueeze(1) == seq_k).to(device))
    else:
        i, j = torch.arange(total_q), torch.arange(total_k)
        if lower_right:
            i = i + (total_k - total_q)
    distance = (i.unsqueeze(1) - j).to(device)
    if left >= 0:
        conditions.append(distance <= left)
    if right >= 0:
        conditions.append(-distance <= right)
    if mask is not None and _is_bool(mask):
        conditions.append(mask)
    seen = None
    for condition in conditions:
        seen = condition if seen is None else seen & condition
    return _Geometry(distance, seen)


def _places(cu: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """Of each row: the number of its sequence, and its place there."""
    rows = torch.arange(total)
    sequence = torch.bucketize(rows, cu[1:], right=True)
    return sequence, rows - cu[sequence]


def _scores(
    q: Tensor,
    k: Tensor,
    added: Tensor | None,
    slopes: Tensor | None,
    distance: Tensor,
    seen: Tensor | None,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor | None]:
    """(scores (B, H, Lq, Lk), -inf where nothing is seen; tanh of the cap, if there is one)."""
    scores = _ungroup(_group(q, k) @ k.transpose(-1, -2), q) * scale
    capped = None
    if softcap > 0:
        capped = (scores / softcap).tanh()
        scores = softcap * capped
    if added is not None:
        scores = scores + added
    if slopes is not None:
        scores = scores - slopes[..., None, None] * distance.abs()
    if seen is not None:
        scores = torch.where(seen, scores, -torch.inf)
    return scores, capped


def _group(x: Tensor, kv: Tensor) -> Tensor:
    """(B, H, Lq, E) -> (B, Hkv, H / Hkv Lq, E): the rows of all heads that read one key head, without a copy of it."""
    batch, heads, length, width = x.shape
    return x.reshape(batch, kv.shape[1], heads // max(kv.shape[1], 1) * length, width)


def _ungroup(x: Tensor, q: Tensor) -> Tensor:
    """The inverse of `_group`."""
    return x.reshape(*q.shape[:-1], x.shape[-1])


def _drop(weights: Tensor, seed_offset: Tensor | None, p: float) -> Tensor:
    if seed_offset is None:
        return weights
    keep = torch.ops.fastgen.bernoulli(seed_offset, weights.shape, torch.bool, 1.0 - p)
    return weights * keep * (1.0 / (1.0 - p))


def _laid_out(x: Tensor, like: Tensor) -> Tensor:
    """A dense copy of x (B, H, L, E): as (B, L, H, E) in memory where the heads of `like` lie inside its rows."""
    if like.stride(2) > like.stride(1):
        return x.transpose(1, 2).clone(memory_format=torch.contiguous_format).transpose(1, 2)
    return x.clone(memory_format=torch.contiguous_format)
