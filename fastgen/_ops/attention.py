"""Scaled dot-product attention.

What the arguments and results are stands in `fastgen/reference/attention.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastgen import reference
from fastgen._ops.library import distinct, higher_order, plain_only, register, through
from fastgen.reference._work import work_dtype

__all__ = ["SCHEMAS", "attention"]

_OPERANDS = (
    "Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor? slopes, Tensor? cu_q, Tensor? cu_k, "
    "Tensor? seed_offset"
)
_OPTIONS = "float dropout_p, float scale, float softcap, int left, int right, bool lower_right"
SCHEMAS = {
    "attention": f"({_OPERANDS}, {_OPTIONS}) -> (Tensor out, Tensor lse)",
    "attention_backward": f"(Tensor? grad_out, Tensor? grad_lse, {_OPERANDS}, Tensor out, Tensor lse, {_OPTIONS}, "
    "int needs) -> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_mask, Tensor grad_slopes)",
}


def _empty(like: Tensor, width: int | torch.SymInt) -> Tensor:
    """(B, H, L, width) in the memory order of `like` (B, H, L, E)."""
    batch, heads, length, _ = like.shape
    if like.stride(2) > like.stride(1):
        return like.new_empty((batch, length, heads, width)).transpose(1, 2)
    return like.new_empty((batch, heads, length, width))


def _fake_attention(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    lse = query.new_empty(query.shape[:-1], dtype=work_dtype(query.dtype))
    return _empty(query, value.shape[-1]), lse


def _fake_attention_backward(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    slopes: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    needs = rest[-1]
    of = (query, key, value)
    grads = [_empty(x, x.shape[-1]) if needs >> i & 1 else x.new_empty(0) for i, x in enumerate(of)]
    for i, x in enumerate((mask, slopes), 3):
        grads.append(query.new_empty(0) if x is None else x.new_empty(x.shape if needs >> i & 1 else 0))
    return tuple(grads)


register(SCHEMAS, reference, {"attention": _fake_attention, "attention_backward": _fake_attention_backward})


class _Attention(torch.autograd.Function):
    """Saves the operands, the output and the log-sum-exp: O(L) of what attention makes of O(L^2) scores."""

    @staticmethod
    def forward(ctx: Any, options: tuple[Any, ...], *operands: Tensor | None) -> Any:
        out, lse = _attention(*operands, *options)
        ctx.save_for_backward(*operands, out, lse)
        ctx.options = options
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> Any:
        options, wanted = ctx.options, ctx.needs_input_grad[1:]
        if grad_out is None and grad_lse is None:
            return (None,) * (1 + len(wanted))
        *operands, out, lse = ctx.saved_tensors
        if higher_order():

            def forward(*operands: Tensor | None) -> tuple[Tensor, ...]:
                return _plain(*operands, *options)

            return None, *through(forward, operands, wanted, (grad_out, grad_lse))
        of_query, of_key, of_value, of_mask, of_slopes, *_ = wanted
        needs = of_query | of_key << 1 | of_value << 2 | of_mask << 3 | of_slopes << 4
        query, key, value, mask, slopes = _attention_backward(grad_out, grad_lse, *operands, out, lse, *options, needs)
        return (
            None,
            query if of_query else None,
            key if of_key else None,
            value if of_value else None,
            mask if of_mask else None,
            slopes if of_slopes else None,
            *(None, None, None),
        )


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    slopes: Tensor | None,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    seed_offset: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    """(out, lse) of the op `attention`, differentiable in query, key, value, mask and slopes."""
    if plain_only():
        return _plain(query, key, value, mask, slopes, cu_q, cu_k, seed_offset, *options)
    if torch.is_grad_enabled() and (
        query.requires_grad
        or key.requires_grad
        or value.requires_grad
        or (mask is not None and mask.requires_grad)
        or (slopes is not None and slopes.requires_grad)
    ):
        return _Attention.apply(options, *distinct((query, key, value, mask, slopes, cu_q, cu_k, seed_offset)))
    return _attention(query, key, value, mask, slopes, cu_q, cu_k, seed_offset, *options)


_plain: Callable[..., Any] = reference.attention
_attention = torch.ops.fastgen.attention.default
_attention_backward = torch.ops.fastgen.attention_backward.default
