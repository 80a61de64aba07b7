"""Cases of a training step of `fastgen.models.VAE` against the same model in plain PyTorch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastgen.benchmark.case import COMPILED, EAGER, OURS, ProductCase, WrongResult, compiled, noise
from fastgen.models import VAE, VAEConfig
from fastgen.random import Generator

__all__ = ["PlainVAE", "VAECase", "cases"]

_SEED = 20_131_220
_CONFIG = VAEConfig()
# Multiply-adds an example: the convolution that sees the pixels, whose own gradient nobody wants, and the other layers.
_FIRST = 14 * 14 * 32 * 16
_OTHERS = (
    7 * 7 * 64 * 32 * 16 + 3136 * 256 + 256 * 32 + 16 * 256 + 256 * 3136 + 7 * 7 * 64 * 32 * 16 + 14 * 14 * 32 * 16
)


@dataclass(frozen=True, kw_only=True)
class VAECase(ProductCase):
    """Forward pass, backward pass and AdamW of the default VAE for 28x28 pictures, on one batch.

    The learning rate is 0: the optimiser does all its work, and every call starts from the same weights. Each rival
    draws its own noise.

    Shape: (B, 1, 28, 28).
    """

    keeps_memory = True

    @property
    def workload(self) -> str:
        return "vae/conv/training"

    @property
    def elements(self) -> int:
        """Pictures of the batch."""
        return self.shape[0]

    @property
    def flops(self) -> int:
        """Products forward and in both gradients, but for the gradient of the pixels."""
        return self.elements * (4 * _FIRST + 6 * _OTHERS)

    @property
    def weights(self) -> tuple[int, int]:
        return self.bytes, 3

    @property
    def bytes(self) -> int:
        """Of the weights."""
        return sum(weight.numel() * weight.itemsize for weight in self._model().parameters())

    def shrunk(self) -> VAECase:
        return replace(self, shape=(4, *self.shape[1:]))

    def _model(self) -> VAE:
        """The model, of the same weights each time."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_SEED)
            return VAE(_CONFIG).to(self.device)

    def inputs(self) -> tuple[Tensor, ...]:
        """Pictures (B, 1, 28, 28)."""
        return (torch.rand(self.shape, generator=torch.Generator().manual_seed(_SEED)).to(self.device),)

    def rivals(self) -> dict[str, Callable[..., Any]]:
        """All take pictures and give the loss; with a `generator` of fastgen's, of its noise."""
        ours = self._model()
        plain = {name: PlainVAE(ours).to(self.device) for name in (EAGER, COMPILED)}
        stream = Generator(_SEED + 1)  # not that of the check
        return {
            OURS: _step(ours, lambda x, generator: ours(x, generator=generator or stream).loss),
            EAGER: _step(plain[EAGER], _with_noise(plain[EAGER])),
            COMPILED: _step(plain[COMPILED], _with_noise(compiled(plain[COMPILED]))),
        }

    def check(self, rival: str, function: Callable[..., Any], inputs: tuple[Tensor, ...]) -> None:
        """With the same noise the loss is within 64 roundings of that of plain PyTorch."""
        loss = float(function(*inputs, generator=Generator(_SEED)))
        expected = _expected_loss(self)
        if not abs(loss - expected) <= 64 * torch.finfo(self.dtype).eps * expected:  # also a NaN
            raise WrongResult(f"{self.name}, {rival}: loss {loss:.9g} instead of {expected:.9g}")


def _step(model: nn.Module, loss_of: Callable[[Tensor, Generator | None], Tensor]) -> Callable[..., Tensor]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)

    def step(x: Tensor, generator: Generator | None = None) -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(x, generator)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def _noise(x: Tensor, generator: Generator | None) -> Tensor:
    return noise((len(x), _CONFIG.latent_dim), x.device, generator)


def _with_noise(model: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Generator | None], Tensor]:
    return lambda x, generator: model(x, _noise(x, generator))


@functools.lru_cache(maxsize=1)
def _expected_loss(case: VAECase) -> float:
    (x,) = case.inputs()
    with torch.no_grad():
        return float(PlainVAE(case._model()).to(case.device)(x, _noise(x, Generator(_SEED))))


class PlainVAE(nn.Module):
    """The default `fastgen.models.VAE` for 28x28 pictures as it is usually written.

    Args:
        model: whose weights to copy; None: new ones.
    """

    def __init__(self, model: VAE | None = None) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, 32, 4, stride=2, padding=1),
            nn.GELU(),
            nn.Conv2d(32, 64, 4, stride=2, padding=1),
            nn.GELU(),
            nn.Flatten(),
            nn.Linear(64 * 7 * 7, 256),
            nn.GELU(),
            nn.Linear(256, 2 * 16),
        )
        self.decoder = nn.Sequential(
            nn.Linear(16, 256),
            nn.GELU(),
            nn.Linear(256, 64 * 7 * 7),
            nn.Unflatten(1, (64, 7, 7)),
            nn.GELU(),
            nn.ConvTranspose2d(64, 32, 4, stride=2, padding=1),
            nn.GELU(),
            nn.ConvTranspose2d(32, 1, 4, stride=2, padding=1),
        )
        if model is not None:  # the modules were made in the order of the model's own, and so are the names
            self.load_state_dict(dict(zip(self.state_dict(), model.state_dict().values(), strict=True)))

    def forward(self, x: Tensor, eps: Tensor | None = None) -> Tensor:
        mu, logvar = self.encoder(x).chunk(2, dim=-1)
        eps = torch.randn_like(mu) if eps is None else eps
        z = mu + torch.exp(0.5 * logvar) * eps
        kl = -0.5 * (1 + logvar - mu.pow(2) - logvar.exp()).sum(dim=-1)
        reconstruction = F.binary_cross_entropy_with_logits(self.decoder(z), x, reduction="none").flatten(1).sum(-1)
        loss: Tensor = (reconstruction + kl).mean()
        return loss


def cases(*, full: bool) -> list[VAECase]:
    """The cases of `fastgen bench`: the batch that `fastgen train vae` takes; a small and a large one too."""
    sizes = (64, 16, 256) if full else (64,)
    return [VAECase(shape=(size, 1, 28, 28)) for size in sizes]


def cuda_cases(*, full: bool) -> list[VAECase]:
    """The cases of `fastgen bench --device cuda`: those of the CPU."""
    return cases(full=full)
