"""Cases of a training step of `fastgen.models.GAN` against the same networks in plain PyTorch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastgen.benchmark.case import COMPILED, EAGER, OURS, ProductCase, WrongResult, compiled, noise
from fastgen.models import GAN, GANConfig
from fastgen.random import Generator

__all__ = ["GANCase", "PlainGAN", "cases"]

_SEED = 20_140_610
_BETAS = (0.5, 0.999)
# Multiply-adds an example of each layer, in order: of the discriminator and of the generator.
_LAYERS = {
    "conv": ((14 * 14 * 32 * 16, 7 * 7 * 64 * 32 * 16, 3136), (64 * 3136, 7 * 7 * 64 * 32 * 16, 14 * 14 * 32 * 16)),
    "mlp": ((784 * 512, 512 * 256, 256), (64 * 256, 256 * 512, 512 * 784)),
}


@dataclass(frozen=True, kw_only=True)
class GANCase(ProductCase):
    """One step of both networks of the default GAN for 28x28 pictures, with Adam, on one batch.

    The discriminator moves, then the generator, on the same fakes. The learning rates are 0: the optimisers do all
    their work, and every call starts from the same weights. Each rival draws its own noise.

    Shape: (B, 1, 28, 28).

    Attributes:
        architecture: "conv" (DCGAN) or "mlp".
    """

    architecture: str = "conv"
    keeps_memory = True

    @property
    def workload(self) -> str:
        return f"gan/{self.architecture}/training"

    @property
    def elements(self) -> int:
        """Pictures of the batch."""
        return self.shape[0]

    @property
    def flops(self) -> int:
        """Products that a step needs, and no others.

        The generator: forward, gradients of its weights and of all inputs but the noise. The discriminator on data and
        fakes: forward, gradients of its weights and of all inputs but the pictures; on the fakes again, forward and
        the gradients of all inputs.
        """
        discriminator, generator = _LAYERS[self.architecture]
        updates = 3 * sum(generator) - generator[0] + 2 * (3 * sum(discriminator) - discriminator[0])
        return 2 * self.elements * (updates + 2 * sum(discriminator))

    @property
    def weights(self) -> tuple[int, int]:
        return self.bytes, 3

    @property
    def bytes(self) -> int:
        """Of the weights."""
        model = self._model()
        networks = (model.generator, model.discriminator)
        return sum(weight.numel() * weight.itemsize for network in networks for weight in network.parameters())

    def shrunk(self) -> GANCase:
        return replace(self, shape=(4, *self.shape[1:]))

    def _model(self) -> GAN:
        """The model, of the same weights each time."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_SEED)
            return GAN(GANConfig(architecture=self.architecture)).to(self.device)

    def inputs(self) -> tuple[Tensor, ...]:
        """Pictures (B, 1, 28, 28)."""
        return (torch.rand(self.shape, generator=torch.Generator().manual_seed(_SEED)).to(self.device),)

    def rivals(self) -> dict[str, Callable[..., Any]]:
        """All take pictures and give both losses, (2,); with a `generator` of fastgen's, of its noise."""
        plain = {name: PlainGAN(self._model()).to(self.device) for name in (EAGER, COMPILED)}
        return {
            OURS: _our_step(self._model()),
            EAGER: _plain_step(plain[EAGER], lambda function: function),
            COMPILED: _plain_step(plain[COMPILED], compiled),
        }

    def check(self, rival: str, function: Callable[..., Any], inputs: tuple[Tensor, ...]) -> None:
        """With the same noise both losses are within 64 roundings of those of plain PyTorch."""
        losses = function(*inputs, generator=Generator(_SEED))
        expected = _expected_losses(self)
        if not bool(((losses - expected).abs() <= 64 * torch.finfo(self.dtype).eps * expected).all()):  # also a NaN
            raise WrongResult(f"{self.name}, {rival}: losses {losses.tolist()} instead of {expected.tolist()}")


def _our_step(model: GAN) -> Callable[..., Tensor]:
    stream = Generator(_SEED + 1)  # not that of the check
    optimizers = [
        torch.optim.Adam(network.parameters(), lr=0.0, betas=_BETAS, fused=True)
        for network in (model.discriminator, model.generator)
    ]

    def step(real: Tensor, generator: Generator | None = None) -> Tensor:
        fake = model(model.noise(len(real), generator=generator or stream))
        losses = []
        for optimizer, half in zip(optimizers, (model.discriminator_loss, model.generator_loss), strict=True):
            optimizer.zero_grad()
            loss = half(real, fake=fake).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return torch.stack(losses)

    return step


class PlainGAN(nn.Module):
    """The default `fastgen.models.GAN` for 28x28 pictures as it is usually written: two `nn.Sequential`.

    Args:
        model: whose weights to copy.
    """

    def __init__(self, model: GAN) -> None:
        super().__init__()
        rectifier = functools.partial(nn.LeakyReLU, 0.2)
        if model.config.architecture == "conv":
            self.generator = nn.Sequential(
                nn.Linear(64, 64 * 7 * 7),
                nn.Unflatten(1, (64, 7, 7)),
                nn.BatchNorm2d(64),
                rectifier(),
                nn.ConvTranspose2d(64, 32, 4, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(32),
                rectifier(),
                nn.ConvTranspose2d(32, 1, 4, stride=2, padding=1),
                nn.Sigmoid(),
            )
            self.discriminator = nn.Sequential(
                nn.Conv2d(1, 32, 4, stride=2, padding=1),
                rectifier(),
                nn.Conv2d(32, 64, 4, stride=2, padding=1),
                rectifier(),
                nn.Flatten(),
                nn.Linear(64 * 7 * 7, 1),
            )
        else:
            self.generator = nn.Sequential(
                nn.Linear(64, 256),
                nn.BatchNorm1d(256),
                rectifier(),
                nn.Linear(256, 512),
                nn.BatchNorm1d(512),
                rectifier(),
                nn.Linear(512, 784),
                nn.Sigmoid(),
                nn.Unflatten(1, (1, 28, 28)),
            )
            self.discriminator = nn.Sequential(
                nn.Flatten(),
                nn.Linear(784, 512),
                rectifier(),
                nn.Linear(512, 256),
                rectifier(),
                nn.Linear(256, 1),
            )
        # Layers of one kind were made in the order of the model's own; batch norms start alike.
        for name in ("generator", "discriminator"):
            mine, theirs = (_layers(getattr(owner, name)) for owner in (self, model))
            for layer, other in zip(mine, theirs, strict=True):
                layer.load_state_dict(other.state_dict())

    def discriminator_loss(self, real: Tensor, fake: Tensor) -> Tensor:
        real_logits, fake_logits = self.discriminator(2 * real - 1), self.discriminator(2 * fake - 1)
        return F.binary_cross_entropy_with_logits(
            real_logits, torch.ones_like(real_logits)
        ) + F.binary_cross_entropy_with_logits(fake_logits, torch.zeros_like(fake_logits))

    def generator_loss(self, fake: Tensor) -> Tensor:
        logits = self.discriminator(2 * fake - 1)
        return F.binary_cross_entropy_with_logits(logits, torch.ones_like(logits))


def _layers(network: nn.Module) -> list[nn.Module]:
    return [module for module in network.modules() if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd))]


def _plain_step(model: PlainGAN, wrap: Callable[[Any], Any]) -> Callable[..., Tensor]:
    """The step of PyTorch's DCGAN example."""
    generator_optimizer, discriminator_optimizer = (
        torch.optim.Adam(network.parameters(), lr=0.0, betas=_BETAS, fused=True)
        for network in (model.generator, model.discriminator)
    )
    make, judge, persuade = wrap(model.generator), wrap(model.discriminator_loss), wrap(model.generator_loss)

    def step(real: Tensor, generator: Generator | None = None) -> Tensor:
        fake = make(noise((len(real), 64), real.device, generator))
        discriminator_optimizer.zero_grad()
        discriminator_loss = judge(real, fake.detach())
        discriminator_loss.backward()
        discriminator_optimizer.step()
        generator_optimizer.zero_grad()
        generator_loss = persuade(fake)
        generator_loss.backward()
        generator_optimizer.step()
        return torch.stack((discriminator_loss.detach(), generator_loss.detach()))

    return step


@functools.lru_cache(maxsize=2)
def _expected_losses(case: GANCase) -> Tensor:
    step = _plain_step(PlainGAN(case._model()).to(case.device), lambda function: function)
    return step(*case.inputs(), generator=Generator(_SEED))


def cases(*, full: bool) -> list[GANCase]:
    """The cases of `fastgen bench`: a DCGAN, and one of dense layers."""
    shape = (64, 1, 28, 28)
    chosen = [GANCase(shape=shape)]
    if full:
        chosen.append(GANCase(shape=shape, architecture="mlp"))
    return chosen


def cuda_cases(*, full: bool) -> list[GANCase]:
    """The cases of `fastgen bench --device cuda`: those of the CPU."""
    return cases(full=full)
