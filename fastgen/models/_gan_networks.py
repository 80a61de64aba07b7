"""The generators and discriminators of `fastgen.models.GAN`.

A generator maps (B, latent_dim) to (B, *input_shape) in the units of the data, a discriminator maps such
examples to logits (B,). Both take the label of a conditional model as one-hot, (B, num_classes).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.utils import parametrizations

import fastgen.nn as nn
from fastgen.models._layers import ACTIVATIONS, ConditionalLinear, pyramid

if TYPE_CHECKING:
    from fastgen.models.gan import GANConfig

__all__ = ["NORMALIZATIONS", "discriminator_of", "generator_of"]

NORMALIZATIONS = ("batch", "layer", "none")

_BATCH_NORMS: dict[int, Callable[..., nn.Module]] = {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d}
_CONVOLUTIONS: dict[int, Callable[..., nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d}
_TRANSPOSED_CONVOLUTIONS: dict[int, Callable[..., nn.Module]] = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d}


def generator_of(config: GANConfig) -> nn.Module:
    """The generator of an architecture: "conv", "mlp" or "lstm"."""
    networks: dict[str, Callable[[GANConfig], nn.Module]] = {
        "conv": _ConvGenerator,
        "mlp": _MLPGenerator,
        "lstm": _LSTMGenerator,
    }
    return networks[config.architecture](config)


def discriminator_of(config: GANConfig) -> nn.Module:
    """The discriminator of an architecture; spectrally normalised (Miyato et al., 2018) if that is asked for."""
    features: dict[str, Callable[[GANConfig], nn.Module]] = {
        "conv": _ConvFeatures,
        "mlp": _MLPFeatures,
        "lstm": _LSTMFeatures,
    }
    discriminator = _Discriminator(config, features[config.architecture](config))
    if config.spectral_norm:
        for module in list(discriminator.modules()):
            for name, parameter in list(module.named_parameters(recurse=False)):
                if "weight" in name and parameter.dim() > 1:  # a matrix, or the kernels of a convolution as one
                    parametrizations.spectral_norm(module, name)
    return discriminator


# ---------------------------------------------------------------------------------------------------
# Generators


class _ConvGenerator(nn.Module):
    """Dense layers, then transposed convolutions that double the sides (Radford et al., "DCGAN", 2016)."""

    def __init__(self, config: GANConfig) -> None:
        super().__init__()
        shapes = _channels_first_pyramid(config)[::-1]
        dim = len(shapes[0]) - 1
        sizes = (config.latent_dim, *reversed(config.hidden_sizes or ()), math.prod(shapes[0]))
        self.head = _Dense(sizes, config.activation, config.normalization, config.num_classes)
        self.features = nn.Sequential(nn.Unflatten(1, shapes[0]))
        last = len(shapes) - 2
        for depth, (before, after) in enumerate(itertools.pairwise(shapes)):
            self.features.extend(_normalized_activation(config.activation, config.normalization, dim, before[0]))
            self.features.append(
                _TRANSPOSED_CONVOLUTIONS[dim](
                    before[0],
                    after[0],
                    kernel_size=4,
                    stride=2,
                    padding=1,
                    # gives back the row or column that the halving dropped
                    output_padding=tuple(side % 2 for side in after[1:]),
                    bias=depth == last or config.normalization != "batch",  # a batch norm takes a constant away
                )
            )
        self.output = _Output(config)

    def forward(self, z: Tensor, condition: Tensor | None = None) -> Tensor:
        data: Tensor = self.output(self.features(self.head(z, condition)))
        return data


class _MLPGenerator(nn.Module):
    """Dense layers (Goodfellow et al., 2014)."""

    def __init__(self, config: GANConfig) -> None:
        super().__init__()
        sizes = (config.latent_dim, *reversed(config.hidden_sizes or ()), math.prod(config.input_shape))
        self.head = _Dense(sizes, config.activation, config.normalization, config.num_classes)
        self.output = _Output(config)

    def forward(self, z: Tensor, condition: Tensor | None = None) -> Tensor:
        data: Tensor = self.output(self.head(z, condition))
        return data


class _LSTMGenerator(nn.Module):
    """An LSTM that starts from a state made of the latent, and is given the latent again at every step."""

    def __init__(self, config: GANConfig) -> None:
        super().__init__()
        steps, features = config.input_shape
        sizes = config.hidden_sizes or ()
        self.steps = steps
        self.sizes = tuple(sizes)
        self.start = ConditionalLinear(config.latent_dim, sum(sizes), config.num_classes)
        self.layers = _lstms((config.latent_dim, *sizes))
        self.head = nn.Linear(sizes[-1], features)
        self.output = _Output(config)

    def forward(self, z: Tensor, condition: Tensor | None = None) -> Tensor:
        states = torch.tanh(self.start(z, condition)).split(self.sizes, dim=1)
        x = z.unsqueeze(1).expand(-1, self.steps, -1)
        for layer, state in zip(self.layers, states, strict=True):
            h = state.unsqueeze(0).contiguous()
            x, _ = layer(x, (h, torch.zeros_like(h)))
        data: Tensor = self.output(self.head(x))
        return data


class _Output(nn.Module):
    """Brings what a network gave to the shape and the range of the data."""

    def __init__(self, config: GANConfig) -> None:
        super().__init__()
        self.shape, self.data_range = config.input_shape, config.data_range
        self.channels_last = config.architecture == "conv" and len(config.input_shape) == 2

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(1, 2) if self.channels_last else x.view(len(x), *self.shape)
        if self.data_range is None:
            return x
        low, high = self.data_range
        x = torch.sigmoid(x)
        return x if (low, high) == (0, 1) else low + (high - low) * x


# ---------------------------------------------------------------------------------------------------
# Discriminators


class _Discriminator(nn.Module):
    """Logits of features phi of x: w phi + b, and for a label y + V_y phi (Miyato & Koyama, 2018, equation 5)."""

    def __init__(self, config: GANConfig, features: nn.Module) -> None:
        super().__init__()
        self.data_range = config.data_range
        self.features = features
        width = int(features.width)  # type: ignore[arg-type]
        self.output = nn.Linear(width, 1)
        self.projection = nn.Linear(width, config.num_classes, bias=False) if config.num_classes else None

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        if self.data_range is not None:  # to [-1, 1]
            low, high = self.data_range
            x = torch.sub(x, 0.5 * (low + high)) * (2 / (high - low))
        phi = self.features(x)
        logits: Tensor = self.output(phi).squeeze(-1)
        if self.projection is None or condition is None:
            return logits
        return logits + (self.projection(phi) * condition).sum(-1)


class _ConvFeatures(nn.Module):
    """Convolutions that halve the sides, then dense layers; the generator mirrored."""

    def __init__(self, config: GANConfig) -> None:
        super().__init__()
        shapes = _channels_first_pyramid(config)
        self.dim = len(shapes[0]) - 1
        normalization = config.discriminator_normalization
        self.layers = nn.Sequential()
        for depth, (before, after) in enumerate(itertools.pairwise(shapes)):
            kind = normalization if depth else "none"  # DCGAN leaves the first layer its statistics
            self.layers.append(
                _CONVOLUTIONS[self.dim](before[0], after[0], kernel_size=4, stride=2, padding=1, bias=kind != "batch")
            )
            self.layers.extend(_normalized_activation(config.activation, kind, self.dim, after[0]))
        self.layers.append(nn.Flatten())
        self.width = math.prod(shapes[-1])
        _append_dense(self.layers, (self.width, *(config.hidden_sizes or ())), config.activation, normalization)
        self.width = (self.width, *(config.hidden_sizes or ()))[-1]

    def forward(self, x: Tensor) -> Tensor:
        phi: Tensor = self.layers(x.transpose(1, 2) if self.dim == 1 else x)
        return phi


class _MLPFeatures(nn.Module):
    def __init__(self, config: GANConfig) -> None:
        super().__init__()
        sizes = (math.prod(config.input_shape), *(config.hidden_sizes or ()))
        self.layers = nn.Sequential(nn.Flatten())
        _append_dense(self.layers, sizes, config.activation, config.discriminator_normalization)
        self.width = sizes[-1]

    def forward(self, x: Tensor) -> Tensor:
        phi: Tensor = self.layers(x)
        return phi


class _LSTMFeatures(nn.Module):
    """The mean over time of an LSTM's outputs."""

    def __init__(self, config: GANConfig) -> None:
        super().__init__()
        sizes = config.hidden_sizes or ()
        self.layers = _lstms((config.input_shape[1], *sizes))
        self.width = sizes[-1]

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x, _ = layer(x)
        return x.mean(1)


# ---------------------------------------------------------------------------------------------------
# Parts


class _Dense(nn.Module):
    """Linear layers that hear the label, with normalisation and activation between them."""

    def __init__(self, sizes: Sequence[int], activation: str, normalization: str, num_classes: int) -> None:
        super().__init__()
        layers = [ConditionalLinear(size, following, num_classes) for size, following in itertools.pairwise(sizes)]
        for layer in layers:
            # The latent begins as loud as the label, or louder: else all samples of a class are long the same.
            if layer.embedding is not None:
                nn.init.normal_(layer.embedding.weight, std=0.2)
        self.layers = nn.ModuleList(layers)
        self.between = nn.ModuleList(
            nn.Sequential(*_normalized_activation(activation, normalization, 0, size)) for size in sizes[1:-1]
        )

    def forward(self, x: Tensor, condition: Tensor | None) -> Tensor:
        for depth, layer in enumerate(self.layers):
            x = layer(self.between[depth - 1](x) if depth else x, condition)
        return x


def _append_dense(layers: nn.Sequential, sizes: Sequence[int], activation: str, normalization: str) -> None:
    for size, following in itertools.pairwise(sizes):
        layers.append(nn.Linear(size, following))
        layers.extend(_normalized_activation(activation, normalization, 0, following))


def _normalized_activation(activation: str, normalization: str, dim: int, channels: int) -> list[nn.Module]:
    """Normalisation and activation of (B, channels) or, with `dim` sides, (B, channels, *sides)."""
    layers: list[nn.Module] = []
    if normalization == "batch":
        layers.append(_BATCH_NORMS[dim](channels))
    elif normalization == "layer":
        layers.append(nn.GroupNorm(1, channels))
    return [*layers, _activation(activation)]


def _activation(name: str) -> nn.Module:
    # In place, as no layer before it needs its output again. 0.2 is DCGAN's slope: torch's of 0.01 starves the
    # generator of gradient.
    if name == "leaky_relu":
        return nn.LeakyReLU(0.2, inplace=True)
    return nn.ReLU(inplace=True) if name == "relu" else ACTIVATIONS[name]()


def _lstms(sizes: Sequence[int]) -> nn.ModuleList:
    return nn.ModuleList(nn.LSTM(size, following, batch_first=True) for size, following in itertools.pairwise(sizes))


def _channels_first_pyramid(config: GANConfig) -> list[tuple[int, ...]]:
    """Shapes (C, *sides), largest first; a sequence (T, F) has F channels and one side, T."""
    shape = config.input_shape
    return pyramid(shape if len(shape) == 3 else shape[::-1], config.channels or ())
