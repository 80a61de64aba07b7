"""How far generated examples are from real ones, as a cheap figure to compare checkpoints of a run by."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from fastgen.random import Generator, normal

__all__ = ["RandomFeatures", "frechet_distance"]


class RandomFeatures:
    """Features of images or sequences by a small convolutional network of random weights, always the same ones.

    Three convolutions of stride 2, with 32, 64 and 128 channels and leaky rectifiers, then the mean over all places:
    128 numbers that tell what strokes and textures there are, and how many, but hardly where. Random features compare
    distributions of pictures that are unlike the photographs which pretrained networks know (Naeem et al., "Reliable
    fidelity and diversity metrics for generative models", 2020, section 3.3), cost next to nothing, and are the same
    for everybody.

    Args:
        data: (n, C, H, W) images or (n, T, F) sequences, floats: their mean and standard deviation, over all elements,
            are what examples are scaled by.
    """

    def __init__(self, data: Tensor) -> None:
        if data.dim() not in (3, 4) or data.numel() == 0:
            raise ValueError(f"data: expected (n, C, H, W) or (n, T, F), not empty, got {tuple(data.shape)}")
        self._mean, deviation = float(data.double().mean()), float(data.double().std(correction=0))
        self._deviation = deviation or 1.0
        generator = Generator(0)
        self._weights = []
        width = data.shape[1] if data.dim() == 4 else data.shape[2]
        for channels in (32, 64, 128):
            shape = (channels, width, *(3,) * (data.dim() - 2))
            std = math.sqrt(2 / math.prod(shape[1:]))  # keeps the size of the signal (He et al., 2015)
            weight = normal(shape, std=std, generator=generator, dtype=torch.float32)
            self._weights.append(weight.to(data.device))
            width = channels

    @torch.no_grad()
    def __call__(self, examples: Tensor, *, batch_size: int = 256) -> Tensor:
        """(n, 128) float32: the features of examples like the data."""
        return torch.cat([self._features(batch) for batch in examples.split(batch_size)])

    def _features(self, x: Tensor) -> Tensor:
        x = (x.float() - self._mean) / self._deviation
        x = x if x.dim() == 4 else x.transpose(1, 2)
        convolution = F.conv2d if x.dim() == 4 else F.conv1d
        for weight in self._weights:
            x = F.leaky_relu(convolution(x, weight, stride=2, padding=1), 0.2)
        return x.flatten(2).mean(2)


def frechet_distance(x: Tensor, y: Tensor) -> float:
    """The squared 2-Wasserstein distance between normal distributions with the moments of two samples.

    |m_x - m_y|^2 + tr(C_x + C_y - 2 (C_x C_y)^(1/2)) (Dowson & Landau, "The Frechet distance between multivariate
    normal distributions", 1982), as Heusel et al. ("GANs trained by a two time-scale update rule", 2017) take it of
    the features of Inception. It grows with the scatter of the moments: compare samples of one size only. That of two
    samples of the same distribution is the least to hope for.

    Args:
        x, y: (n, d) and (m, d) features, n and m at least 2.
    """
    if x.dim() != 2 or y.dim() != 2 or x.shape[1] != y.shape[1] or min(len(x), len(y)) < 2:
        raise ValueError(f"x, y: expected (n, d) and (m, d), n, m >= 2, got {tuple(x.shape)} and {tuple(y.shape)}")
    x, y = x.double(), y.double()
    covariances = torch.cov(x.T).view(x.shape[1], -1), torch.cov(y.T).view(x.shape[1], -1)
    # C_x C_y has the eigenvalues of S C_y S, S^2 = C_x, which is symmetric.
    values, vectors = torch.linalg.eigh(covariances[0])
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    mixed = torch.linalg.eigvalsh(root @ covariances[1] @ root).clamp_min(0).sqrt().sum()
    means = (x.mean(0) - y.mean(0)).square().sum()
    return float(means + covariances[0].trace() + covariances[1].trace() - 2 * mixed)
