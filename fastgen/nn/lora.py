"""Low-rank adaptation (Hu et al., "LoRA: low-rank adaptation of large language models", 2022).

>>> add_lora(model.layers, rank=8)   # in place: of the model's parameters only the new ones want a gradient
>>> merge_lora(model.layers)         # in place: linear layers again, the change in their weights
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from torch.nn.init import kaiming_uniform_

from fastgen import _validate
from fastgen.functional import linear
from fastgen.nn.linear import Linear

__all__ = ["LoRALinear", "add_lora", "lora_state_dict", "merge_lora"]


class LoRALinear(Linear):
    """y = x W^T + bias + (alpha / rank) (x A^T) B^T, where W and bias are frozen; at first B is 0.

    Args:
        linear: whose weight (out_features, in_features) and bias it takes over.
        rank: of the change of W.
        alpha: its scale; None is `rank`.

    Attributes:
        lora_A, lora_B: (rank, in_features) and (out_features, rank).
    """

    def __init__(self, linear: torch.nn.Linear, rank: int, alpha: float | None = None) -> None:
        Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.rank = _validate.integer("rank", rank, 1)
        self.scale = (rank if alpha is None else _validate.number("alpha", alpha, above=0)) / rank
        self.weight, self.bias = linear.weight, linear.bias
        self.lora_A = Parameter(self.weight.new_empty(rank, self.in_features))
        self.lora_B = Parameter(self.weight.new_zeros(self.out_features, rank))
        kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        for frozen in (self.weight, self.bias):
            if frozen is not None:
                frozen.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.scale * linear(linear(x, self.lora_A), self.lora_B)

    def merged_weight(self) -> Tensor:
        """W + (alpha / rank) B A, without a gradient."""
        with torch.no_grad():
            return torch.addmm(self.weight, self.lora_B, self.lora_A, alpha=self.scale)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank}"


def add_lora(module: Module, rank: int, alpha: float | None = None) -> None:
    """Turn the linear layers inside `module` into `LoRALinear`, in place, and freeze all other parameters.

    Raises:
        ValueError: for a rank or alpha out of range, or where nothing inside is a linear layer, or one is adapted.
    """
    if any(isinstance(inner, LoRALinear) for inner in module.modules()):
        raise ValueError("module: expected one without low-rank layers, it has some already")
    places = [
        (parent, name, child)
        for parent in module.modules()
        for name, child in parent.named_children()
        if isinstance(child, torch.nn.Linear) and type(child) in (torch.nn.Linear, Linear)
    ]
    if not places:
        raise ValueError("module: expected linear layers inside, found none")
    module.requires_grad_(False)
    for parent, name, child in places:
        setattr(parent, name, LoRALinear(child, rank, alpha).train(child.training))


def merge_lora(module: Module) -> None:
    """Turn every `LoRALinear` inside `module` into a linear layer with the merged weight, in place."""
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if isinstance(child, LoRALinear):
                merged = Linear(child.in_features, child.out_features, bias=False, device="meta")
                merged.weight, merged.bias = Parameter(child.merged_weight()), child.bias
                setattr(parent, name, merged.train(child.training).requires_grad_(True))


def lora_state_dict(module: Module) -> dict[str, Tensor]:
    """The state dict that `module` would have after `merge_lora`; it stays as it is."""
    state = dict(module.state_dict())
    for name, inner in module.named_modules():
        if isinstance(inner, LoRALinear):
            prefix = f"{name}." if name else ""
            for part in ("lora_A", "lora_B"):
                del state[prefix + part]
            state[f"{prefix}weight"] = inner.merged_weight()
    return state
