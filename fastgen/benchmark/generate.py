"""Cases of `fastgen.models.RNN.generate` against a loop in Python over `torch.nn.LSTM`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastgen.benchmark.case import EAGER, OURS, ProductCase, WrongResult
from fastgen.models import RNN

__all__ = ["GenerateCase", "cases"]

_SEED = 20_130_804


@dataclass(frozen=True, kw_only=True)
class GenerateCase(ProductCase):
    """Continue prompts of one token by an LSTM model whose embedding is as wide as its layers.

    Shape: (B, T, V, H): rows, tokens to draw, vocabulary, hidden units.

    Attributes:
        layers: of the LSTM.
        temperature: 0 for the likeliest token, 1 for samples.
    """

    layers: int = 2
    temperature: float = 1.0

    @property
    def workload(self) -> str:
        return f"generate/LSTM+{self.layers}layers/{'sampled' if self.temperature else 'greedy'}"

    @property
    def elements(self) -> int:
        """Tokens that are drawn."""
        return self.shape[0] * self.shape[1]

    @property
    def _weights(self) -> int:
        """Weights that every token is multiplied by."""
        *_, vocabulary, hidden = self.shape
        return (self.layers * 4 * 2 * hidden + vocabulary) * hidden

    @property
    def flops(self) -> int:
        return 2 * self.elements * self._weights

    @property
    def weights(self) -> tuple[int, int]:
        return self._weights * self.dtype.itemsize, self.shape[1]

    @property
    def bytes(self) -> int:
        """Of the weights, which is about all."""
        return self._weights * self.dtype.itemsize

    def shrunk(self) -> GenerateCase:
        return replace(self, shape=tuple(min(extent, 16) for extent in self.shape))

    def _model(self) -> RNN:
        """The model, of the same weights each time, with an output that tells tokens apart."""
        *_, vocabulary, hidden = self.shape
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_SEED)
            model = RNN(vocab_size=vocabulary, hidden_size=hidden, num_layers=self.layers)
            with torch.no_grad():
                model.head.weight.mul_(8)
        return model.to(self.dtype).eval().requires_grad_(False)

    def inputs(self) -> tuple[Tensor, ...]:
        """The prompts, (B, 1)."""
        rows, _, vocabulary, _ = self.shape
        return (torch.randint(vocabulary, (rows, 1), generator=torch.Generator().manual_seed(_SEED)),)

    def rivals(self) -> dict[str, Callable[..., Any]]:
        """Both take prompts (B, 1) and give tokens (B, 1 + T); Dynamo refuses PyTorch's LSTM."""
        model, steps, temperature = self._model(), self.shape[1], self.temperature
        return {
            OURS: lambda prompts: model.generate(prompts, steps, temperature=temperature, seed=_SEED),
            EAGER: self._eager(model),
        }

    def _eager(self, model: RNN) -> Callable[[Tensor], Tensor]:
        """As it stands in most character models written in PyTorch."""
        *_, hidden = self.shape
        lstm = torch.nn.LSTM(hidden, hidden, self.layers, batch_first=True).to(self.dtype).eval()
        lstm.load_state_dict(model.rnn.state_dict())
        output = torch.nn.Linear(hidden, self.shape[2]).to(self.dtype)
        output.load_state_dict(model.head.state_dict())
        embedding, temperature = model.embedding, self.temperature

        @torch.inference_mode()
        def generate(prompts: Tensor) -> Tensor:
            tokens, state = [prompts], None
            for _ in range(self.shape[1]):
                out, state = lstm(embedding(tokens[-1]), state)
                logits = output(out[:, -1])
                if temperature == 0:
                    tokens.append(logits.argmax(-1, keepdim=True))
                else:
                    tokens.append(torch.multinomial(torch.softmax(logits / temperature, -1), 1))
            return torch.cat(tokens, 1)

        return generate

    def check(self, rival: str, function: Callable[..., Any], inputs: tuple[Tensor, ...]) -> None:
        """In double precision, each greedy token is (about) the likeliest; samples are as likely as they should be.

        The surprise -log p of a sample less the entropy has mean 0 and a known variance at every step, whatever
        came before, so over all steps it stays within six standard errors.
        """
        rows, steps, vocabulary, _ = self.shape
        tokens = function(*inputs)
        if tokens.shape != (rows, 1 + steps) or not torch.equal(tokens[:, :1], inputs[0]):
            raise WrongResult(f"{self.name}, {rival}: tokens {tuple(tokens.shape)}, or not behind the prompt")
        if not 0 <= int(tokens.min()) <= int(tokens.max()) < vocabulary:
            raise WrongResult(f"{self.name}, {rival}: a token outside 0 to {vocabulary - 1}")
        logits = self._model().double()(tokens[:, :-1]).logits
        log_p = logits.log_softmax(-1)
        drawn = log_p.gather(-1, tokens[:, 1:, None]).squeeze(-1)
        if self.temperature == 0:
            short = float((log_p.amax(-1) - drawn).max())
            if not short <= 256 * torch.finfo(self.dtype).eps * float(logits.abs().max()):
                raise WrongResult(f"{self.name}, {rival}: a token less likely than the likeliest by {short:.3g} nats")
            return
        p = log_p.exp()
        entropy = -(p * log_p).sum(-1)
        variance = (p * log_p.square()).sum(-1) - entropy.square()
        off = float((-drawn - entropy).sum()) / math.sqrt(float(variance.sum()))
        if not abs(off) <= 6:
            raise WrongResult(f"{self.name}, {rival}: surprise off the entropy by {off:.1f} standard errors")


def cases(*, full: bool) -> list[GenerateCase]:
    """The cases of `fastgen bench`: one row, which tells most, or more rows and a larger vocabulary too."""
    chosen = [GenerateCase(shape=(1, 100, 128, 512))]
    if full:
        chosen += [
            GenerateCase(shape=(1, 100, 128, 512), temperature=0.0),
            GenerateCase(shape=(1, 100, 128, 128)),
            GenerateCase(shape=(16, 100, 128, 512)),
            GenerateCase(shape=(1, 100, 8192, 512)),
        ]
    return chosen
