"""What the cases of a training step of a language model share: tokens, the step, the loss that is expected."""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastgen.benchmark.case import ProductCase, WrongResult

__all__ = ["LanguageModelCase"]


@dataclass(frozen=True, kw_only=True)
class LanguageModelCase(ProductCase):
    """Forward pass, backward pass and AdamW of a language model, on one batch of tokens.

    The learning rate is 0: the optimiser does all its work, and every call starts from the same weights.

    Shape: (B, T, V, H): rows, tokens of a row, vocabulary, hidden size.

    Attributes:
        dtype: float32, or bfloat16 for autocast over float32 weights.
    """

    keeps_memory = True
    seed: ClassVar[int]
    """Of the weights and of the tokens."""
    max_grad_norm: ClassVar[float | None] = None
    """Gradients are scaled down to this norm before the step; None: they are left as they are."""

    @abstractmethod
    def _new_model(self) -> nn.Module:
        """The model, of weights that torch's default generator draws."""

    @abstractmethod
    def _plain(self, model: Any) -> nn.Module:
        """The model in plain PyTorch, with the same weights: it takes tokens and targets and gives the loss."""

    @property
    @abstractmethod
    def _weights(self) -> int:
        """Weights that every token is multiplied by."""

    @property
    def elements(self) -> int:
        """Tokens of the batch."""
        return self.shape[0] * self.shape[1]

    @property
    def flops(self) -> int:
        """Products with weights, forward and in both gradients."""
        return 6 * self.elements * self._weights

    @property
    def bytes(self) -> int:
        """Of the weights."""
        return self._weights * 4

    def inputs(self) -> tuple[Tensor, ...]:
        """Tokens and targets, (B, T) each."""
        rows, length, vocabulary, _ = self.shape
        draw = torch.Generator().manual_seed(self.seed)
        window = torch.randint(vocabulary, (rows, length + 1), generator=draw)
        return window[:, :-1].contiguous().to(self.device), window[:, 1:].contiguous().to(self.device)

    def _model(self) -> Any:
        """The model, of the same weights each time."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return self._new_model().to(self.device)

    def _step(self, model: nn.Module, loss_of: Callable[..., Any]) -> Callable[..., Tensor]:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)

        def step(*batch: Tensor) -> Tensor:
            optimizer.zero_grad()
            with torch.autocast(self.device, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
                loss: Tensor = loss_of(*batch)
            loss.backward()
            if self.max_grad_norm is not None:
                nn.utils.clip_grad_norm_(model.parameters(), self.max_grad_norm)
            optimizer.step()
            return loss.detach()

        return step

    def check(self, rival: str, function: Callable[..., Any], inputs: tuple[Tensor, ...]) -> None:
        """The loss is within 64 roundings of that of plain PyTorch in float32, of products in bfloat16 within one."""
        loss = float(function(*inputs))
        expected = _expected_loss(self)
        roundings = 64 if self.dtype == torch.float32 else 1
        if not abs(loss - expected) <= roundings * torch.finfo(self.dtype).eps * expected:  # also a NaN
            raise WrongResult(f"{self.name}, {rival}: loss {loss:.9g} instead of {expected:.9g}")


@functools.lru_cache(maxsize=1)
def _expected_loss(case: LanguageModelCase) -> float:
    with torch.no_grad():
        return float(case._plain(case._model()).to(case.device)(*case.inputs()))
