"""MultiheadAttention and the Transformer's layers: PyTorch's classes with another `forward`.

Constructors, parameters, initial values, state dicts, shapes and errors are PyTorch's by inheritance. What fastgen
has no kernel for, a call that asks for the weights of attention, and one that PyTorch refuses go to PyTorch's own
`forward`. (The file is not called attention.py, as `torch.nn.attention` is a package, and here under its own name.)
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from fastgen import functional
from fastgen._load import kernel_devices
from fastgen._ops.library import transforming
from fastgen.nn import _script
from fastgen.nn.linear import Linear

__all__ = ["MultiheadAttention", "Transformer", "TransformerDecoderLayer", "TransformerEncoderLayer", "take_over"]

DEVICES = kernel_devices("attention")
_DTYPES = frozenset((torch.float32, torch.float64, torch.bfloat16, torch.float16))


def _ours(x: Any) -> bool:
    """Whether fastgen is to compute with `x`: where it has kernels, and under what they are not asked."""
    if not isinstance(x, Tensor) or x.is_nested or torch.jit.is_tracing():  # type: ignore[attr-defined]
        return False  # nested tensors come from PyTorch's own encoder; a trace is to hold PyTorch's op
    return x.device.type in DEVICES or transforming() or forward_ad._current_level >= 0


class MultiheadAttention(torch.nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention` on fastgen's attention.

    Arguments, inputs and outputs are PyTorch's. With `need_weights=False`, as the Transformer's layers call it, memory
    is linear in the lengths in training too: dropout and masks included, key_padding_mask is not expanded, and dropout
    is drawn from the default stream of `fastgen.random`. With `need_weights=True`, PyTorch's default, and with
    `add_bias_kv` or `add_zero_attn`, PyTorch's own `forward` runs.
    """

    __prepare_scriptable__ = _script.refuse

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        if need_weights or not self._fits(query, key, value, key_padding_mask, attn_mask, is_causal):
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        batched = query.dim() == 3
        q, k, v = (self._heads(x, batched) for x in self._project(query, key, value))
        mask = _merged(None if is_causal else attn_mask, key_padding_mask, q)
        out = functional.scaled_dot_product_attention(
            q, k, v, mask, self.dropout if self.training else 0.0, is_causal=is_causal
        )
        if not batched:
            out = out.squeeze(0).transpose(0, 1)
        elif self.batch_first:
            out = out.transpose(1, 2)
        else:
            out = out.permute(2, 0, 1, 3)
        return functional.linear(out.flatten(-2), self.out_proj.weight, self.out_proj.bias), None

    def _fits(self, query: Any, key: Any, value: Any, padding: Any, mask: Any, is_causal: bool) -> bool:
        """Whether it is for us, and all shapes and dtypes are as they should be; PyTorch has the words for the rest."""
        weight = self.in_proj_weight if self._qkv_same_embed_dim else self.q_proj_weight
        if not (_ours(query) and isinstance(key, Tensor) and isinstance(value, Tensor)) or weight is None:
            return False
        rank, dtype = query.dim(), query.dtype
        batch_dim = 0 if self.batch_first else 1
        mixed = torch._C._is_any_autocast_enabled()
        fits = (
            rank in (2, 3)
            and (query.shape[-1], key.shape[-1], value.shape[-1]) == (self.embed_dim, self.kdim, self.vdim)
            and key.shape[:-1] == value.shape[:-1]
            and key.dim() == rank
            and (rank == 2 or query.shape[batch_dim] == key.shape[batch_dim])
            and dtype in _DTYPES
            and (mixed or dtype == key.dtype == value.dtype == weight.dtype)
            and query.device == key.device == value.device == weight.device
            and self.bias_k is None
            and not self.add_zero_attn
            and 0 <= self.dropout < 1
            and not (is_causal and mask is None)
        )
        if not fits:
            return False
        batch = 1 if rank == 2 else query.shape[batch_dim]
        lengths = tuple(x.shape[0] if rank == 2 else x.shape[1 - batch_dim] for x in (query, key))
        if mask is not None and (
            not _is_mask(mask, query) or mask.shape not in (lengths, (batch * self.num_heads, *lengths))
        ):
            return False
        return padding is None or (
            _is_mask(padding, query) and padding.shape == (lengths[1:] if rank == 2 else (batch, lengths[1]))
        )

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """query, key and value in the width of the heads, by as few products as can be."""
        bias = self.in_proj_bias
        if not self._qkv_same_embed_dim:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            biases = (None,) * 3 if bias is None else bias.chunk(3)
            operands = (query, key, value)
            return [functional.linear(x, w, b) for x, w, b in zip(operands, weights, biases, strict=True)]
        weight: Any = self.in_proj_weight
        if query is key and key is value:
            return list(functional.linear(query, weight, bias).chunk(3, -1))
        if key is value:
            sizes = [self.embed_dim, 2 * self.embed_dim]
            (w_q, w_kv), (b_q, b_kv) = weight.split(sizes), (None, None) if bias is None else bias.split(sizes)
            return [functional.linear(query, w_q, b_q), *functional.linear(key, w_kv, b_kv).chunk(2, -1)]
        biases = (None,) * 3 if bias is None else bias.chunk(3)
        return [
            functional.linear(x, w, b) for x, w, b in zip((query, key, value), weight.chunk(3), biases, strict=True)
        ]

    def _heads(self, x: Tensor, batched: bool) -> Tensor:
        """(B, H, L, D) as a view of (B, L, E), (L, B, E) or (L, E)."""
        x = x.unflatten(-1, (self.num_heads, self.head_dim))
        if not batched:
            return x.transpose(0, 1).unsqueeze(0)
        return x.transpose(1, 2) if self.batch_first else x.permute(1, 2, 0, 3)


def _is_mask(mask: Any, query: Tensor) -> bool:
    return (
        isinstance(mask, Tensor)
        and mask.device == query.device
        and mask.dtype in (torch.bool, torch.float32, query.dtype)
    )


def _merged(mask: Tensor | None, padding: Tensor | None, query: Tensor) -> Tensor | None:
    """Both masks as one of scaled_dot_product_attention, where True means seen.

    mask: (L, S) or (B H, L, S); padding: (B, S) or (S,); in both True means hidden.
    """
    batch, heads = query.shape[:2]
    if mask is not None and mask.dim() == 3:
        mask = mask.unflatten(0, (batch, heads))
    if padding is not None:
        padding = padding.reshape(batch, 1, 1, padding.shape[-1])
    given = [x for x in (mask, padding) if x is not None]
    if not given:
        return None
    if all(x.dtype == torch.bool for x in given):
        return (given[0] if len(given) == 1 else given[0] | given[1]).logical_not()
    if len(given) == 1:
        return given[0]
    first, second = (
        torch.zeros_like(x, dtype=query.dtype).masked_fill_(x, -math.inf) if x.dtype == torch.bool else x for x in given
    )
    return first + second


class TransformerEncoderLayer(torch.nn.TransformerEncoderLayer):
    """`torch.nn.TransformerEncoderLayer` on fastgen's attention, in training and in evaluation."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        take_over(self)

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        # PyTorch's has a fused way of its own, for evaluation, past the attention module.
        if not _ours(src) or not isinstance(self.self_attn, MultiheadAttention):
            return super().forward(src, src_mask, src_key_padding_mask, is_causal)
        x = src
        if self.norm_first:
            x = x + self._sa_block(self.norm1(x), src_mask, src_key_padding_mask, is_causal)
            return x + self._ff_block(self.norm2(x))
        x = self.norm1(x + self._sa_block(x, src_mask, src_key_padding_mask, is_causal))
        return self.norm2(x + self._ff_block(x))

    def _ff_block(self, x: Tensor) -> Tensor:
        # The wide activations in place, as in PyTorch's fused way: the pages of a second tensor can cost more than the
        # products. The gradient of relu needs its result only.
        x = self.linear1(x)
        if self.linear1._forward_hooks:
            x = self.activation(x)
        elif self.activation is F.relu:
            x = x.relu_()
        elif self.activation is F.gelu and not x.requires_grad:
            x = torch.ops.aten.gelu_(x)
        else:
            x = self.activation(x)
        return self.dropout2(self.linear2(self.dropout(x)))


class TransformerDecoderLayer(torch.nn.TransformerDecoderLayer):
    """`torch.nn.TransformerDecoderLayer` on fastgen's attention, to itself and to the memory."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        take_over(self)


class Transformer(torch.nn.Transformer):
    """`torch.nn.Transformer` of fastgen's layers, where it makes them itself."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        take_over(self)


FASTER: dict[type[torch.nn.Module], type[torch.nn.Module]] = {
    torch.nn.Linear: Linear,
    torch.nn.MultiheadAttention: MultiheadAttention,
    torch.nn.TransformerEncoderLayer: TransformerEncoderLayer,
    torch.nn.TransformerDecoderLayer: TransformerDecoderLayer,
}


def take_over(module: torch.nn.Module) -> None:
    """Give what PyTorch's constructor has put into `module` our `forward`s, by their classes."""
    for child in module.modules():
        if type(child) in FASTER:
            child.__class__ = FASTER[type(child)]
