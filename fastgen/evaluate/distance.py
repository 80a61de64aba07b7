"""How far generated examples are from real ones, as a cheap figure to compare checkpoints of a run by."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgen import _validate
from fastgen.random import Generator, normal

__all__ = ["sliced_wasserstein_distance"]


def sliced_wasserstein_distance(x: Tensor, y: Tensor, *, num_projections: int = 256, seed: int = 0) -> float:
    """The root mean square, over random directions, of the 2-Wasserstein distance of the projected samples.

    SW(x, y)^2 = mean over unit vectors u of W2(x u, y u)^2 (Bonneel et al., "Sliced and Radon Wasserstein barycenters
    of measures", 2015); in one dimension W2 pairs the sorted values. It is 0 for equal samples and in the units of
    the data: a root mean square difference of an element, times the square root of the share of the examples'
    dimensions that differ.

    It needs no network and no training, and sees blur, noise, misplaced mass and missing modes. It does not judge
    meaning as a distance of learned features does: it hardly tells a well-drawn digit from one that is not quite one.
    Two samples of the same distribution have a distance too, that of `x` and other data of the same size: it is the
    least to hope for.

    Args:
        x, y: (n, ...) each, floats, as many of both.
        num_projections: directions, drawn uniformly.
        seed: names them: the same ones for all distances that are to be compared.

    Raises:
        ValueError: for samples of different shapes, or none.
    """
    _validate.integer("num_projections", num_projections, 1)
    if x.shape != y.shape or x.numel() == 0:
        raise ValueError(f"y: expected the shape of x, not empty, {tuple(x.shape)}, got {tuple(y.shape)}")
    x, y = (z.flatten(1).to(torch.promote_types(z.dtype, torch.float32)) for z in (x, y))
    size = (x.shape[1], num_projections)
    directions = normal(size, generator=Generator(seed), dtype=torch.float32, device=x.device).to(x.dtype)
    directions /= directions.norm(dim=0)
    distances = (x @ directions).sort(0).values - (y @ directions).sort(0).values
    return float(distances.double().square().mean().sqrt())
