"""Scaled dot-product attention. Equations and sources: `fastgen/reference/attention.py`."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastgen._dtypes import dtype_name
from fastgen._ops import attention as ops
from fastgen._validate import choice, integer, number, tensor
from fastgen.random import AnyGenerator, seed_offset_for
from fastgen.reference._work import work_dtype

__all__ = ["scaled_dot_product_attention"]

_DTYPES = frozenset((torch.float32, torch.float64, torch.bfloat16, torch.float16))
_HALVES = frozenset((torch.bfloat16, torch.float16))
_ALIGNMENTS = ("upper_left", "lower_right")

_any_autocast = torch._C._is_any_autocast_enabled


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    alibi_slopes: Tensor | None = None,
    window_size: int | Sequence[int | None] | None = None,
    softcap: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    alignment: str = "upper_left",
    generator: AnyGenerator = None,
    return_lse: bool = False,
) -> Any:
    """softmax(scale query key^T + ...) value (Vaswani et al., 2017), in memory linear in the lengths.

    The positional arguments are those of `torch.nn.functional.scaled_dot_product_attention`. Differentiable in query,
    key, value, a floating attn_mask and alibi_slopes, to any order; a second derivative takes quadratic memory.

    Args:
        query, key, value: (..., H, Lq, D), (..., Hkv, Lk, D), (..., Hkv, Lk, Dv); leading dimensions broadcast, any
            strides are read in place. float32, float64, bfloat16 or float16 (computed in float32), all of one dtype.
            Under autocast all but float64 becomes the autocast dtype.
        attn_mask: broadcastable to (..., H, Lq, Lk). bool: True where a query may see a key. Floating, of query's
            dtype, or float32 beside a half type: added to the scores.
        dropout_p: probability, below 1, with which each weight is dropped after the softmax; what is kept is divided
            by 1 - dropout_p. As PyTorch's, it acts whenever it is given. The weight of a query and a key is decided
            by the element of the generator's stream with its row-major number in (..., H, Lq, Lk).
        is_causal: each query sees the keys up to its own position. Unlike in PyTorch, attn_mask may be given too.
        scale: of the scores; 1 / sqrt(D) by default.
        enable_gqa: H may be a multiple of Hkv; query head h reads key head h // (H / Hkv) (Ainslie et al., 2023).
        alibi_slopes: (H,) or (..., H): subtracts slope * distance from the scores (Press et al., 2022).
        window_size: keys at a distance of at most this many positions are seen (Beltagy et al., 2020, section 3.1):
            an int for both sides, or for the keys behind with is_causal; or a pair (behind, ahead) of ints or None
            for no bound.
        softcap: above 0: scores become softcap * tanh(score / softcap), before masks and slopes (Gemma 2, 2024).
        cu_seqlens_q, cu_seqlens_k: int32 or int64 (N + 1,) on the CPU, ascending from 0 to the length: sequences of
            different lengths, one after the other. Then query is (H, Lq, D) or (1, H, Lq, D), and sequence n is its
            rows cu_seqlens_q[n] to cu_seqlens_q[n + 1]; it sees its own keys, cu_seqlens_k[n] to cu_seqlens_k[n + 1].
            cu_seqlens_k is cu_seqlens_q by default. There is no attn_mask. (Nested tensors of layout torch.jagged,
            (B, H, L, D), need no cu_seqlens.)
        alignment: where the positions of queries and keys that is_causal, window_size and alibi_slopes compare are
            counted from: "upper_left", the first of each (PyTorch's), or "lower_right", the last, which a few new
            queries against a cache of keys need.
        generator: of the dropout: a `fastgen.random.Generator`, a `torch.Generator`, or None for torch's default one.
        return_lse: also give the logarithm of the sum of the exponentials of each query's scores.

    Returns:
        out (..., H, Lq, Dv), or (out, lse) with lse (..., H, Lq) in float32, or float64 for float64. A query that sees
        no key has out 0 and lse -inf. In memory out is laid out as query is, if query is dense.

    Raises:
        TypeError, ValueError: for a shape, dtype, device or option that does not fit, naming it.

    Example:
        >>> q, k, v = (torch.randn(2, 8, 128, 64, requires_grad=True) for _ in range(3))
        >>> out = scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=0.1)
        >>> out = scaled_dot_product_attention(q[:, :, -1:], k, v, is_causal=True, alignment="lower_right")
    """
    left, right = -1, 0 if is_causal else -1
    if window_size is not None:
        left, right = _window(window_size, is_causal)
    lower_right = alignment != "upper_left" and choice("alignment", alignment, _ALIGNMENTS) == "lower_right"
    cap = 0.0 if softcap is None else number("softcap", softcap, above=0)

    # The usual call, three tensors of four dimensions that fit, is told apart at once: in a short call Python is most
    # of the time.
    leading: tuple[int, ...] | None = None
    shape = _shape_if_all_fit(query, key, value, enable_gqa)
    if shape is None or cu_seqlens_q is not None or cu_seqlens_k is not None:
        _check_operands(query, key, value)
        if query.is_nested or key.is_nested or value.is_nested:
            if attn_mask is not None or cu_seqlens_q is not None or cu_seqlens_k is not None:
                raise ValueError("attn_mask, cu_seqlens_q, cu_seqlens_k: expected None with nested tensors")
            return _nested(
                *(query, key, value, dropout_p, is_causal, scale, enable_gqa),
                alibi_slopes=alibi_slopes,
                window_size=window_size,
                softcap=softcap,
                alignment=alignment,
                generator=generator,
                return_lse=return_lse,
            )
        query, key, value = _autocast(query, key, value)
        query, key, value, leading = _four_dimensional(query, key, value, enable_gqa)
        if cu_seqlens_q is not None or cu_seqlens_k is not None:
            cu_seqlens_q, cu_seqlens_k = _sequences(query, key, cu_seqlens_q, cu_seqlens_k, attn_mask)
        shape = query.shape

    if scale is None:
        scale = shape[3] ** -0.5
    elif not isinstance(scale, (int, float)):
        raise TypeError(f"scale: expected a number, got {type(scale).__name__}")
    if attn_mask is not None:
        attn_mask = _mask(attn_mask, query, shape[:2] if leading is None else leading, key.shape[2])
    if alibi_slopes is not None:
        alibi_slopes = _slopes(alibi_slopes, query, shape[:2] if leading is None else leading)
    seed_offset = None
    if dropout_p != 0.0:
        dropout_p = number("dropout_p", dropout_p, minimum=0, below=1)
        seed_offset = seed_offset_for(generator, math.prod(shape[:3]) * key.shape[2], query.device)

    out, lse = ops.attention(
        query,
        key,
        value,
        attn_mask,
        alibi_slopes,
        cu_seqlens_q,
        cu_seqlens_k,
        seed_offset,
        dropout_p,
        scale,
        cap,
        left,
        right,
        lower_right,
    )
    if leading is not None:
        out = out.reshape(*leading, shape[2], value.shape[-1])
        lse = lse.reshape(*leading, shape[2])
    return (out, lse) if return_lse else out


# ---------------------------------------------------------------------------------------------------
# Operands


def _shape_if_all_fit(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> torch.Size | None:
    """The shape of query if nothing is to be converted or broadcast, or refused; None if in doubt."""
    try:
        shape, dtype = query.shape, query.dtype
        if (
            key.dtype is not dtype
            or value.dtype is not dtype
            or dtype not in _DTYPES
            or not (query.is_cpu and key.is_cpu and value.is_cpu)
            or query.is_nested
            or _any_autocast()
        ):
            return None
        if key.shape == shape and value.shape == shape:  # tokens that look at each other: nothing to take apart
            return shape if len(shape) == 4 and shape[3] > 0 else None
        if len(shape) != 4 or key.dim() != 4 or value.dim() != 4:  # Dynamo follows no failed unpacking
            return None
        batch, heads, _, width = shape
        key_batch, key_heads, keys, key_width = key.shape
        value_batch, value_heads, value_keys, value_width = value.shape
        fit = (
            key_batch == batch
            and value_batch == batch
            and key_width == width
            and value_keys == keys
            and value_heads == key_heads
            and (key_heads == heads or (enable_gqa and heads % key_heads == 0))
            and width > 0
            and value_width > 0
        )
        return shape if fit else None
    except (AttributeError, TypeError, ValueError, ZeroDivisionError):
        return None
    except RuntimeError:  # a nested tensor of PyTorch's default layout has no shape
        return None


def _check_operands(query: Tensor, key: Tensor, value: Tensor) -> None:
    for name, x in (("query", query), ("key", key), ("value", value)):
        if tensor(name, x).dtype not in _DTYPES:
            raise TypeError(f"{name}: expected float32, float64, bfloat16 or float16, got {dtype_name(x.dtype)}")
        if x.device != query.device:
            raise ValueError(f"{name}: expected a tensor on {query.device} as query is, got one on {x.device}")
        if x.dim() < 2:
            raise ValueError(f"{name}: expected at least two dimensions (length, width), got {tuple(x.shape)}")


def _autocast(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The operands in one dtype: that of autocast, if it is on."""
    device = query.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        query, key, value = (x if x.dtype is torch.float64 else x.to(dtype) for x in (query, key, value))
    for name, x in (("key", key), ("value", value)):
        if x.dtype is not query.dtype:
            raise TypeError(f"{name}: expected {dtype_name(query.dtype)} as query is, got {dtype_name(x.dtype)}")
    return query, key, value


def _four_dimensional(
    query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool
) -> tuple[Tensor, Tensor, Tensor, tuple[int, ...]]:
    """query, key and value with one batch dimension and one of heads, and what these two were, (..., H)."""
    if key.shape[-1] != query.shape[-1] or query.shape[-1] == 0:
        raise ValueError(
            f"key: expected a width (its last size) above 0 and equal to query's, got {key.shape[-1]} beside "
            f"{query.shape[-1]}"
        )
    if value.shape[-2] != key.shape[-2]:
        raise ValueError(
            f"value: expected the length of key, {key.shape[-2]}, as its last but one size, got {value.shape[-2]}"
        )
    if value.shape[-1] == 0:
        raise ValueError("value: expected a width (its last size) above 0, got 0")
    rank = max(query.dim(), key.dim(), value.dim())
    tensors = [x.reshape((1,) * (max(rank, 4) - x.dim()) + x.shape) for x in (query, key, value)]
    heads, key_heads, value_heads = (x.shape[-3] for x in tensors)
    grouped = key_heads == value_heads and (key_heads == 1 or (enable_gqa and key_heads > 0 and heads % key_heads == 0))
    try:
        batch = torch.broadcast_shapes(*(x.shape[:-3] for x in tensors))
        if not grouped:
            (heads,) = torch.broadcast_shapes(*(x.shape[-3:-2] for x in tensors))
    except RuntimeError:
        shapes = ", ".join(str(tuple(x.shape)) for x in (query, key, value))
        hint = "H a multiple of Hkv" if enable_gqa else "H = Hkv without enable_gqa"
        raise ValueError(
            "query, key, value: expected (..., H, Lq, D), (..., Hkv, Lk, D), (..., Hkv, Lk, Dv) with leading sizes "
            f"that broadcast and {hint}, got {shapes}"
        ) from None
    sizes = (heads, key_heads, value_heads) if grouped else (heads,) * 3
    query, key, value = (
        x.expand(*batch, size, *x.shape[-2:]).reshape(math.prod(batch), size, *x.shape[-2:])
        for x, size in zip(tensors, sizes, strict=True)
    )
    return query, key, value, (*batch, heads)[max(4 - rank, 0) :]


def _mask(mask: Tensor, query: Tensor, leading: tuple[int, ...], keys: int) -> Tensor:
    """The mask in four dimensions, of sizes 1 or those of the scores."""
    if tensor("attn_mask", mask).dtype in _HALVES and _any_autocast():
        mask = mask.to(query.dtype)
    if mask.dtype not in (torch.bool, query.dtype, torch.float32):
        allowed = " or ".join(dict.fromkeys(("bool", dtype_name(query.dtype), "float32")))
        raise TypeError(f"attn_mask: expected {allowed}, got {dtype_name(mask.dtype)}")
    if mask.device != query.device:
        raise ValueError(f"attn_mask: expected a tensor on {query.device} as query is, got one on {mask.device}")
    scores, size = (*leading, query.shape[2], keys), mask.shape
    if len(size) > len(scores) or any(a not in (1, b) for a, b in zip(reversed(size), reversed(scores), strict=False)):
        raise ValueError(f"attn_mask: expected a shape that broadcasts to {scores}, got {tuple(size)}")
    if query.dtype is torch.float64 and mask.dtype is torch.float32:
        mask = mask.double()
    if len(size) == len(scores) == 4:
        return mask
    mask = mask.reshape((1,) * (max(len(scores), 4) - len(size)) + size)
    if len(scores) > 4:
        shared = all(n == 1 for n in mask.shape[:-3])
        mask = (mask if shared else mask.expand(*leading[:-1], *mask.shape[-3:])).flatten(0, -4)
    return mask


def _slopes(slopes: Tensor, query: Tensor, leading: tuple[int, ...]) -> Tensor:
    """The slopes as (H,) or (B, H), in the dtype that the op takes."""
    if not isinstance(slopes, Tensor) or not slopes.is_floating_point():
        got = dtype_name(slopes.dtype) if isinstance(slopes, Tensor) else type(slopes).__name__
        raise TypeError(f"alibi_slopes: expected a floating tensor, got {got}")
    batch, heads = query.shape[:2]
    if slopes.shape not in ((heads,), leading):
        wanted = " or ".join(dict.fromkeys((str((heads,)), str(tuple(leading)))))
        raise ValueError(f"alibi_slopes: expected shape {wanted}, got {tuple(slopes.shape)}")
    if slopes.device != query.device:
        raise ValueError(f"alibi_slopes: expected a tensor on {query.device} as query is, got one on {slopes.device}")
    slopes = slopes.to(work_dtype(query.dtype))
    return slopes if slopes.dim() == 1 else slopes.reshape((heads,) if batch == 1 else (batch, heads))


# ---------------------------------------------------------------------------------------------------
# Positions and sequences


def _window(window: int | Sequence[int | None], is_causal: bool) -> tuple[int, int]:
    """(left, right) of the op: how far behind and ahead a query sees, -1 for without bound."""
    sides = tuple(window) if isinstance(window, (tuple, list)) else (window, window)
    if len(sides) != 2:
        raise ValueError(f"window_size: expected an int or a pair (behind, ahead), got {len(sides)} values")
    left, right = (-1 if side is None else min(integer("window_size", side, 0), 2**62) for side in sides)
    return left, 0 if is_causal else right


def _sequences(
    query: Tensor, key: Tensor, cu_q: Tensor | None, cu_k: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    if cu_q is None:
        raise ValueError("cu_seqlens_q: expected a tensor beside cu_seqlens_k, got None")
    if mask is not None:
        raise ValueError("attn_mask: expected None with cu_seqlens_q, got a mask")
    if query.shape[0] != 1:
        raise ValueError(
            f"query: expected (H, L, D) or (1, H, L, D) with cu_seqlens_q, got a batch of {query.shape[0]}"
        )
    _check_boundaries("cu_seqlens_q", cu_q, "query", query.shape[2])
    if cu_k is None:
        cu_k = cu_q
    _check_boundaries("cu_seqlens_k", cu_k, "key", key.shape[2])
    if cu_k.shape != cu_q.shape:
        raise ValueError(f"cu_seqlens_k: expected {cu_q.shape[0]} values as in cu_seqlens_q, got {cu_k.shape[0]}")
    return cu_q, cu_k


def _check_boundaries(name: str, cu: Tensor, of: str, length: int) -> None:
    if not isinstance(cu, Tensor) or cu.dtype not in (torch.int32, torch.int64) or cu.dim() != 1 or not cu.is_cpu:
        got = type(cu).__name__
        if isinstance(cu, Tensor):
            got = f"{dtype_name(cu.dtype)} {tuple(cu.shape)} on {cu.device}"
        raise ValueError(f"{name}: expected int32 or int64 of shape (N + 1,) on the CPU, got {got}")
    if torch.compiler.is_compiling():
        return  # a graph cannot depend on its values
    values = cu.tolist()
    if not values or values[0] != 0 or values[-1] != length:
        got = f"{values[0]} to {values[-1]}" if values else "no values"
        raise ValueError(f"{name}: expected values from 0 to the length of {of}, {length}, got {got}")
    if any(a > b for a, b in itertools.pairwise(values)):
        raise ValueError(f"{name}: expected values that ascend, got {values[:8]}{' ...' if len(values) > 8 else ''}")


def _nested(query: Tensor, key: Tensor, value: Tensor, *args: Any, return_lse: bool, **options: Any) -> Any:
    """Attention of nested tensors (B, H, L, D), ragged in L."""
    rows, offsets = [], []
    for name, x in (("query", query), ("key", key), ("value", value)):
        nested: Any = x  # a NestedTensor, which carries no types
        if not x.is_nested or x.layout is not torch.jagged or x.dim() != 4 or nested._ragged_idx != 2:
            raise ValueError(
                f"{name}: expected a nested tensor (B, H, L, D) of layout torch.jagged, ragged in L, beside other "
                "nested tensors"
            )
        if nested.lengths() is not None:
            raise ValueError(f"{name}: expected a nested tensor without holes; its contiguous() has none")
        rows.append(nested.values())
        offsets.append(nested.offsets())
    if offsets[1] is not offsets[2] and not torch.equal(offsets[1], offsets[2]):
        raise ValueError("value: expected the lengths of key, got others")
    results = scaled_dot_product_attention(
        *(*rows, None, *args),
        cu_seqlens_q=offsets[0],
        cu_seqlens_k=offsets[1],
        return_lse=True,
        **options,
    )
    out, lse = (torch.nested.nested_tensor_from_jagged(x, offsets[0], jagged_dim=2) for x in results)
    return (out, lse) if return_lse else out
