"""What the VAE and the GAN share: activations, labels as an input, shapes of a stack of convolutions, checks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

import fastgen.nn as nn
from fastgen import _validate
from fastgen._dtypes import dtype_name
from fastgen.random import AnyGenerator, Generator

__all__ = [
    "ACTIVATIONS",
    "ConditionalLinear",
    "Labels",
    "check_data",
    "conv_channels",
    "may_look_at",
    "no_channels",
    "noise_source",
    "one_hot",
    "pyramid",
]

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "leaky_relu": nn.LeakyReLU,
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
}
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)

Labels = Tensor | Sequence[int] | int | None


class ConditionalLinear(nn.Linear):
    """Linear layer that adds an embedding of the label, given as one-hot.

    Every layer has one, initialised as `torch.nn.Embedding` does. A label that is only a few more inputs
    of the first layer starts far too faint beside the rest: the latent then goes on carrying the class,
    and samples of one class come out as another.
    """

    def __init__(self, in_features: int, out_features: int, num_classes: int) -> None:
        super().__init__(in_features, out_features)
        self.embedding = nn.Embedding(num_classes, out_features) if num_classes else None

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        x = super().forward(x)
        if self.embedding is None or condition is None:
            return x
        return x + condition @ self.embedding.weight


def conv_channels(channels: Sequence[int] | None, shape: tuple[int, ...], sides: tuple[int, ...]) -> tuple[int, ...]:
    """The `channels` of a configuration, checked; its default halves the data until 4 <= the smallest side < 8."""
    side = min(sides)
    if channels is None:
        return tuple(min(32 << level, 256) for level in range(side.bit_length() - 3))
    checked = _validate.integers("channels", channels, 1)
    if side >> len(checked) == 0:
        raise ValueError(f"channels: expected at most {side.bit_length() - 1} for {shape}, got {len(checked)}")
    return checked


def no_channels(channels: Sequence[int] | None, architecture: str) -> tuple[int, ...]:
    if channels:
        raise ValueError(f"channels: expected none for {architecture!r}, got {channels!r}")
    return ()


def pyramid(shape: tuple[int, ...], channels: Sequence[int]) -> list[tuple[int, ...]]:
    """Shapes (C, *sides) of an example before the first convolution and after each.

    Kernels of 4 with stride 2 and padding 1 halve a side, rounding down. A kernel that the stride divides
    touches every pixel equally often, so the transposed one draws no checkerboard (Odena et al.,
    "Deconvolution and checkerboard artifacts", 2016).
    """
    shapes = [shape]
    for width in channels:
        shapes.append((width, *(side // 2 for side in shapes[-1][1:])))
    return shapes


def check_data(
    name: str, x: Tensor, shape: tuple[int, ...], data_range: tuple[float, float] | None, reason: str = ""
) -> None:
    """That `x` is (B, *shape), floating-point and, where that can be seen at no cost, in the range."""
    _validate.tensor(name, x)
    if x.shape[1:] != shape or x.dim() == 0:
        expected = ", ".join(str(extent) for extent in ("B", *shape))
        raise ValueError(f"{name}: expected shape ({expected}), got {tuple(x.shape)}")
    _validate.floats(name, x)
    if data_range is not None and may_look_at(x) and x.numel():
        least, greatest = data_range
        low, high = (float(value) for value in torch.aminmax(x.detach()))
        if not (low >= least and high <= greatest):
            raise ValueError(f"{name}: expected values in [{least:g}, {greatest:g}]{reason}, got {low:g} to {high:g}")


def one_hot(labels: Labels, batch: int, num_classes: int, like: Tensor) -> Tensor | None:
    """(batch, num_classes): one-hot, so that they can be blended; None for an unconditional model.

    `like` is a parameter of the model, whose device and dtype they get.
    """
    if num_classes == 0:
        if labels is not None:
            raise ValueError("labels: expected None, the model is unconditional (num_classes is 0)")
        return None
    if labels is None:
        raise ValueError(f"labels: expected {batch} labels for a conditional model, got None")
    if isinstance(labels, int):
        labels = [labels] * batch
    try:
        labels = torch.as_tensor(labels, device=like.device)
    except (TypeError, ValueError):
        raise TypeError(f"labels: expected ints, got {labels!r}") from None
    if labels.dtype not in _INTEGERS:
        raise TypeError(f"labels: expected ints, got {dtype_name(labels.dtype)}")
    if labels.shape != (batch,):
        raise ValueError(f"labels: expected shape ({batch},), got {tuple(labels.shape)}")
    if may_look_at(labels) and batch:
        low, high = (int(value) for value in torch.aminmax(labels))
        if low < 0 or high >= num_classes:
            raise ValueError(f"labels: expected 0 to {num_classes - 1}, got {low if low < 0 else high}")
    return F.one_hot(labels.long(), num_classes).to(like.dtype)


def noise_source(seed: int | None, generator: AnyGenerator) -> AnyGenerator:
    """The generator, or a new one of the seed where that is given instead."""
    if seed is None:
        return generator
    if generator is not None:
        raise ValueError("seed: expected None where a generator is given, got both")
    return Generator(seed)


def may_look_at(x: Tensor) -> bool:
    """Whether the values are at hand: not on a device that would have to be waited for, nor being traced."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()
