"""Cases of a training step of `fastgen.models.RNN` on text against the same model in plain PyTorch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastgen.benchmark.case import EAGER, OURS, ProductCase, WrongResult
from fastgen.models import RNN

__all__ = ["PlainRNN", "RNNCase", "cases"]

_SEED = 20_150_521


@dataclass(frozen=True, kw_only=True)
class RNNCase(ProductCase):
    """Forward pass, backward pass and AdamW of an LSTM on text, on one window of each of its streams.

    The learning rate is 0: the optimiser does all its work, and every call starts from the same weights, and from a
    state of zeros.

    Shape: (B, T, V, H): rows, tokens of a row, vocabulary, hidden units.

    Attributes:
        layers: of the LSTM.
        embedding_dim: width of the embedding of a token.
    """

    keeps_memory = True

    layers: int = 2
    embedding_dim: int = 256

    @property
    def workload(self) -> str:
        return f"rnn/LSTM+{self.layers}layers+{self.embedding_dim}embedding/training"

    @property
    def elements(self) -> int:
        """Tokens of the batch."""
        return self.shape[0] * self.shape[1]

    @property
    def _weights(self) -> int:
        """Weights that every token is multiplied by."""
        *_, vocabulary, hidden = self.shape
        first = 4 * (self.embedding_dim + hidden)
        return (first + 8 * hidden * (self.layers - 1) + vocabulary) * hidden

    @property
    def flops(self) -> int:
        """Products with weights forward and in both gradients."""
        return 6 * self.elements * self._weights

    @property
    def weights(self) -> tuple[int, int]:
        """The recurrent weights, read at every step of both passes."""
        _, length, _, hidden = self.shape
        return 4 * hidden * hidden * self.layers * self.dtype.itemsize, 2 * length

    @property
    def bytes(self) -> int:
        """Of the weights."""
        return self._weights * self.dtype.itemsize

    def shrunk(self) -> RNNCase:
        return replace(self, shape=(2, 8, 16, 24), embedding_dim=12)

    def _model(self) -> RNN:
        """The model, of the same weights each time."""
        *_, vocabulary, hidden = self.shape
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_SEED)
            return RNN(
                vocab_size=vocabulary, hidden_size=hidden, num_layers=self.layers, embedding_dim=self.embedding_dim
            )

    def inputs(self) -> tuple[Tensor, ...]:
        """Tokens and targets, (B, T) each."""
        rows, length, vocabulary, _ = self.shape
        draw = torch.Generator().manual_seed(_SEED)
        window = torch.randint(vocabulary, (rows, length + 1), generator=draw)
        return window[:, :-1].contiguous(), window[:, 1:].contiguous()

    def rivals(self) -> dict[str, Callable[..., Any]]:
        """Both take tokens and targets and give the loss; Dynamo refuses PyTorch's LSTM."""
        ours = self._model()
        plain = PlainRNN(ours)
        return {OURS: _step(ours, lambda *batch: ours(*batch).loss), EAGER: _step(plain, plain)}

    def check(self, rival: str, function: Callable[..., Any], inputs: tuple[Tensor, ...]) -> None:
        """The loss is within 64 roundings of that of plain PyTorch."""
        loss = float(function(*inputs))
        expected = _expected_loss(self)
        if not abs(loss - expected) <= 64 * torch.finfo(self.dtype).eps * expected:  # also a NaN
            raise WrongResult(f"{self.name}, {rival}: loss {loss:.9g} instead of {expected:.9g}")


def _step(model: nn.Module, loss_of: Callable[..., Tensor]) -> Callable[..., Tensor]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)

    def step(*batch: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(*batch)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.detach()

    return step


@functools.lru_cache(maxsize=1)
def _expected_loss(case: RNNCase) -> float:
    with torch.no_grad():
        return float(PlainRNN(case._model())(*case.inputs()))


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
