"""fastgen's attention inside the models of Hugging Face's transformers: `attn_implementation="fastgen"`.

Importing this module enters it under that name into the two registries of transformers, that of attention functions and
that of masks; `fastgen.accelerate(model)` does so by itself. Causal attention, sliding windows and padding then need no
mask of size L x L, grouped heads no copies of keys and values, and softcap and dropout no other way.

Example:
    >>> import fastgen.huggingface
    >>> model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="fastgen")
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastgen._extras import extra
from fastgen.functional import scaled_dot_product_attention

with extra("hf"):
    from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
    from transformers.masking_utils import sdpa_mask

__all__ = ["NAME", "attention", "mask", "why_not"]

NAME = "fastgen"


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers.

    Args:
        module: the attention layer; causal by its `is_causal`, unless the argument says otherwise.
        query, key, value: (B, H, Lq, D), (B, Hkv, Lk, D), (B, Hkv, Lk, Dv).
        attention_mask: (B or 1, H or 1, Lq, Lk), bool (True: seen) or added to the scores, which holds everything that
            is hidden. Where it is None or (B, Lk), bool, which hides padding alone, causality and sliding_window
            hold besides, counted from the last query and the last key.
        sliding_window: a query sees itself and the sliding_window - 1 keys before it.
        softcap: as in `scaled_dot_product_attention`.
        s_aux: (H,), the score of one more key, whose value is 0 (attention sinks, Xiao et al., 2024, section 3.3).
        position_bias: broadcastable to (B, H, Lq, Lk), added to the scores, with a gradient.

    Returns:
        (out (B, Lq, H, Dv), None); the weights do not exist.

    Raises:
        ValueError: for output_attentions and for a paged cache.
    """
    if others.get("output_attentions"):
        raise ValueError('output_attentions: expected False with attn_implementation="fastgen"; "eager" gives weights')
    if others.get("cache") is not None:
        raise ValueError('cache: expected none that is paged with attn_implementation="fastgen"; "sdpa" takes it')
    causal, window = False, None
    if attention_mask is None or attention_mask.dim() == 2:
        causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
        window = sliding_window - 1 if sliding_window is not None and causal else None
    if attention_mask is not None and attention_mask.dim() == 2:
        attention_mask = attention_mask[:, None, None]
    if attention_mask is None or position_bias is None:
        pass
    elif attention_mask.dtype == torch.bool:
        attention_mask = torch.where(attention_mask, position_bias, -torch.inf)
    else:
        attention_mask = attention_mask + position_bias
    result = scaled_dot_product_attention(
        query,
        key,
        value,
        position_bias if attention_mask is None else attention_mask,
        dropout,
        causal,
        scaling,
        enable_gqa=True,
        window_size=window,
        softcap=softcap,
        alignment="lower_right",
        return_lse=s_aux is not None,
    )
    if s_aux is not None:
        # One more term exp(s_aux) under the fraction: exp(lse) / (exp(lse) + exp(s_aux)) of each row is left.
        out, lse = result
        result = out * (lse - s_aux.unsqueeze(-1)).sigmoid().unsqueeze(-1).to(out.dtype)
    return result.transpose(1, 2).contiguous(), None


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,  # an int, or a tensor for a cache of fixed size
    kv_offset: int = 0,
    *,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    config: Any = None,
    **others: Any,
) -> Tensor | None:
    """A mask function of transformers: that of "sdpa", or where `attention` needs none but for padding, that, or None.

    That is where each query sees all keys, those up to its own, or those of a sliding window (which, as for
    FlashAttention, the model gives to the attention function too), and the last query stands at the last key.
    """
    plain = local_size is None or (
        local_size == getattr(config, "sliding_window", None) and getattr(config, "attention_chunk_size", None) is None
    )
    causal = (
        allow_is_causal_skip
        and plain
        and not others.get("allow_is_bidirectional_skip")
        and isinstance(q_offset, int)
        and q_offset + q_length == kv_offset + kv_length
    )
    length = kv_offset + kv_length
    if causal or (others.get("allow_is_bidirectional_skip") and local_size is None):
        if _all_seen(attention_mask, length):
            return None
        if attention_mask is not None and attention_mask.shape[1:] == (length,):
            return attention_mask[:, kv_offset:].bool()
    return sdpa_mask(
        batch_size,
        q_length,
        kv_length,
        q_offset,
        kv_offset,
        attention_mask=attention_mask,
        local_size=local_size,
        allow_is_causal_skip=False,
        config=config,
        **others,
    )


def _all_seen(padding: Tensor | None, length: int) -> bool:
    """Whether a padding mask (B, length), True for tokens, hides nothing."""
    if padding is None:
        return True
    if torch.compiler.is_compiling() or padding.shape[-1] != length:
        return False  # a graph cannot depend on its values
    return bool(padding.all())


def why_not(model: torch.nn.Module) -> str | None:
    """Why `model`, a PreTrainedModel of transformers, is to be left as it is; None if it can have our attention."""
    assert isinstance(model, PreTrainedModel)
    if model.config._attn_implementation == NAME:
        return "its attention is fastgen's already"
    if not model._can_set_attn_implementation():
        return "its attention cannot be chosen"
    if not model._supports_flash_attn:
        return "it does not tell its attention function everything, as FlashAttention would need it"
    return None


def _register() -> None:
    function: Callable[..., Any] = attention
    AttentionInterface.register(NAME, function)
    AttentionMaskInterface.register(NAME, mask)


_register()
