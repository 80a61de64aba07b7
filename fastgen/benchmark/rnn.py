"""Cases of a training step of `fastgen.models.RNN` on text against the same model in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastgen.benchmark.case import EAGER, OURS
from fastgen.benchmark.language_model import LanguageModelCase
from fastgen.models import RNN

__all__ = ["PlainRNN", "RNNCase", "cases"]


@dataclass(frozen=True, kw_only=True)
class RNNCase(LanguageModelCase):
    """An LSTM on one window of each of its streams, from a state of zeros.

    Attributes:
        layers: of the LSTM.
        embedding_dim: width of the embedding of a token.
    """

    seed = 20_150_521
    max_grad_norm = 1.0

    layers: int = 2
    embedding_dim: int = 256

    @property
    def workload(self) -> str:
        return f"rnn/LSTM+{self.layers}layers+{self.embedding_dim}embedding/training"

    @property
    def _weights(self) -> int:
        *_, vocabulary, hidden = self.shape
        first = 4 * (self.embedding_dim + hidden)
        return (first + 8 * hidden * (self.layers - 1) + vocabulary) * hidden

    @property
    def weights(self) -> tuple[int, int]:
        """The recurrent weights, read at every step of both passes."""
        _, length, _, hidden = self.shape
        return 4 * hidden * hidden * self.layers * self.dtype.itemsize, 2 * length

    def shrunk(self) -> RNNCase:
        return replace(self, shape=(2, 8, 16, 24), embedding_dim=12)

    def _new_model(self) -> RNN:
        *_, vocabulary, hidden = self.shape
        return RNN(vocab_size=vocabulary, hidden_size=hidden, num_layers=self.layers, embedding_dim=self.embedding_dim)

    def _plain(self, model: RNN) -> PlainRNN:
        return PlainRNN(model)

    def rivals(self) -> dict[str, Callable[..., Any]]:
        """Both take tokens and targets and give the loss; Dynamo refuses PyTorch's LSTM."""
        ours = self._model()
        plain = PlainRNN(ours).to(self.device)
        return {OURS: self._step(ours, lambda *batch: ours(*batch).loss), EAGER: self._step(plain, plain)}


class PlainRNN(nn.Module):
    """A model of text as it is usually written: `nn.Embedding`, `nn.LSTM`, `nn.Linear`, `F.cross_entropy`.

    Args:
        model: an LSTM, whose weights to copy; no dropout, an output of its own.
    """

    def __init__(self, model: RNN) -> None:
        super().__init__()
        config = model.config
        width = config.embedding_dim or config.hidden_size
        self.embedding = nn.Embedding(config.vocab_size, width)
        self.rnn = nn.LSTM(width, config.hidden_size, config.num_layers, batch_first=True)
        self.head = nn.Linear(config.hidden_size, config.vocab_size)
        self.load_state_dict(model.state_dict())

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        hidden, _ = self.rnn(self.embedding(tokens))
        return F.cross_entropy(self.head(hidden).flatten(0, 1), targets.flatten())


def cases(*, full: bool) -> list[RNNCase]:
    """The cases of `fastgen bench`: the model and batch that `fastgen train rnn` takes; that of `make demo` too."""
    chosen = [RNNCase(shape=(32, 128, 100, 256))]
    if full:
        chosen.append(RNNCase(shape=(32, 64, 100, 256), layers=1, embedding_dim=64))
    return chosen


def cuda_cases(*, full: bool) -> list[RNNCase]:
    """The cases of `fastgen bench --device cuda`: that of the CPU, and one that fills a GPU."""
    usual, large = RNNCase(shape=(32, 128, 100, 256)), RNNCase(shape=(64, 256, 4096, 768), embedding_dim=768)
    chosen = [usual, replace(large, dtype=torch.bfloat16)] if full else [usual]
    return chosen
