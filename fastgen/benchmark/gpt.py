"""Cases of a training step of `fastgen.models.GPT` against the same model in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastgen.benchmark.case import COMPILED, EAGER, OURS, compiled
from fastgen.benchmark.language_model import LanguageModelCase
from fastgen.models import GPT, GPTConfig

__all__ = ["GPTCase", "cases"]


@dataclass(frozen=True, kw_only=True)
class GPTCase(LanguageModelCase):
    """A GPT-2.

    Attributes:
        layers, heads: of the model.
    """

    seed = 20_190_214

    layers: int = 6
    heads: int = 6

    @property
    def workload(self) -> str:
        return f"gpt/{self.layers}layers+{self.heads}heads/training"

    @property
    def _weights(self) -> int:
        *_, vocabulary, hidden = self.shape
        return (12 * self.layers * hidden + vocabulary) * hidden

    @property
    def flops(self) -> int:
        """Products with weights forward and in both gradients, and of attention what the causal mask leaves."""
        _, length, _, hidden = self.shape
        attention = self.layers * (length + 1) * hidden  # scores and values: 2 products of half the places
        return super().flops + 6 * self.elements * attention

    @property
    def weights(self) -> tuple[int, int]:
        return self.bytes, 3

    def shrunk(self) -> GPTCase:
        return replace(self, shape=(2, 8, 16, 4 * self.heads), layers=2)

    def _new_model(self) -> GPT:
        _, length, vocabulary, hidden = self.shape
        return GPT(GPTConfig(vocabulary, hidden, self.layers, self.heads, max_position_embeddings=length))

    def _plain(self, model: GPT) -> PlainGPT:
        return PlainGPT(model)

    def rivals(self) -> dict[str, Callable[..., Any]]:
        """All take tokens and targets and give the loss."""
        ours = self._model()
        plain = {name: PlainGPT(ours).to(self.device) for name in (EAGER, COMPILED)}
        return {
            OURS: self._step(ours, lambda *batch: ours(*batch).loss),
            EAGER: self._step(plain[EAGER], plain[EAGER]),
            COMPILED: self._step(plain[COMPILED], compiled(plain[COMPILED])),
        }


class PlainGPT(nn.Module):
    """GPT-2 as it is usually written: PyTorch's modules, `F.scaled_dot_product_attention`, `F.cross_entropy`.

    Args:
        model: whose weights to copy; no dropout, tied embeddings.
    """

    def __init__(self, model: GPT) -> None:
        super().__init__()
        config = model.config
        width, inner = config.hidden_size, config.intermediate_size
        self.heads = config.num_attention_heads
        self.tokens = nn.Embedding(config.vocab_size, width)
        self.places = nn.Embedding(config.max_position_embeddings, width)
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm_1": nn.LayerNorm(width),
                    "qkv": nn.Linear(width, 3 * width),
                    "out": nn.Linear(width, width),
                    "norm_2": nn.LayerNorm(width),
                    "up": nn.Linear(width, inner),
                    "down": nn.Linear(inner, width),
                }
            )
            for _ in range(config.num_hidden_layers)
        )
        self.norm = nn.LayerNorm(width)
        # The modules were made in the order of the model's own, and so are the names.
        with torch.no_grad():
            for mine, theirs in zip(self.parameters(), model.parameters(), strict=True):
                mine.copy_(theirs)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        rows, length = tokens.shape
        x = self.tokens(tokens) + self.places(torch.arange(length, device=tokens.device))
        layer: Any
        for layer in self.layers:
            parts = layer["qkv"](layer["norm_1"](x)).chunk(3, -1)
            query, key, value = (part.view(rows, length, self.heads, -1).transpose(1, 2) for part in parts)
            attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
            x = x + layer["out"](attended.transpose(1, 2).reshape(x.shape))
            x = x + layer["down"](F.gelu(layer["up"](layer["norm_2"](x)), approximate="tanh"))
        logits = F.linear(self.norm(x), self.tokens.weight)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def cases(*, full: bool) -> list[GPTCase]:
    """The cases of `fastgen bench`: a small model on characters; a smaller one, GPT-2 (124 M weights), autocast."""
    characters = GPTCase(shape=(12, 256, 65, 384))  # nanoGPT's for Shakespeare
    chosen = [characters]
    if full:
        gpt2 = GPTCase(shape=(4, 64, 50257, 768), layers=12, heads=12)  # llm.c's on a CPU
        demo = GPTCase(shape=(16, 64, 100, 128), layers=4, heads=4)  # of the size that `make demo` trains
        chosen += [demo, gpt2, *(replace(case, dtype=torch.bfloat16) for case in (characters, gpt2))]
    return chosen


def cuda_cases(*, full: bool) -> list[GPTCase]:
    """The cases of `fastgen bench --device cuda`: nanoGPT's model of characters, and GPT-2, both with autocast."""
    characters = GPTCase(shape=(64, 256, 65, 384), dtype=torch.bfloat16)
    gpt2 = replace(characters, shape=(16, 1024, 50257, 768), layers=12, heads=12)
    return [characters, gpt2] if full else [characters]
