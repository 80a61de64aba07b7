from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from fastgen.data import load_images
from fastgen.evaluate import RandomFeatures, frechet_distance
from fastgen.random import Generator, normal


@given(d=st.integers(1, 6), seed=st.integers(0, 50))
def test_the_distance_of_normal_samples(d: int, seed: int) -> None:
    x, y = (normal(40 + i, d, generator=Generator(seed + i), dtype=torch.float64) for i in range(2))
    y = y * 1.5 + 0.3
    # The formula, with the root of the product of the covariances taken as it stands.
    cx, cy = (torch.cov(z.T).view(d, d) for z in (x, y))
    root = torch.linalg.eigvals(cx @ cy).sqrt().real.sum()
    expected = (x.mean(0) - y.mean(0)).square().sum() + cx.trace() + cy.trace() - 2 * root
    assert frechet_distance(x, y) == pytest.approx(float(expected), rel=1e-9)
    assert frechet_distance(y, x) == pytest.approx(frechet_distance(x, y), rel=1e-9)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(x, x + 2) == pytest.approx(4 * d, rel=1e-9)


def test_a_covariance_that_is_not_of_full_rank() -> None:
    x = normal(10, 3, generator=Generator(1), dtype=torch.float64)
    flat = torch.cat((x, torch.zeros(10, 30)), 1)
    assert frechet_distance(flat, flat) == pytest.approx(0, abs=1e-6)
    assert math.isfinite(frechet_distance(flat.float(), flat.flip(0).float()))


def digits() -> tuple[Tensor, Tensor]:
    train, test = load_images("mnist").split()
    return train.batch(slice(500))[0], test.batch(slice(500))[0]


def test_what_looks_worse_is_farther_away() -> None:
    train, test = digits()
    features = RandomFeatures(test)
    known = features(test)

    def distance(x: Tensor) -> float:
        return frechet_distance(features(x), known)

    noise = normal(train.shape, generator=Generator(1))
    floor = distance(train)
    assert distance(test) == pytest.approx(0, abs=1e-6)
    blurred = [distance(F.avg_pool2d(train, 2 * r + 1, 1, r)) for r in (1, 2)]
    noisy = [distance((train + std * noise).clamp(0, 1)) for std in (0.1, 0.3)]
    assert 3 * floor < blurred[0] < blurred[1]
    assert 1.5 * floor < noisy[0] < noisy[1]
    assert distance(train[:1].expand_as(train)) > 10 * floor
    assert distance(train[:50].repeat(10, 1, 1, 1)) > 3 * floor


def test_features_of_any_shape_and_batch() -> None:
    for shape in ((9, 1, 1, 1), (9, 3, 8, 5), (9, 16, 2)):
        data = normal(shape, generator=Generator(2))
        features = RandomFeatures(data)
        whole = features(data)
        assert whole.shape == (9, 128)
        torch.testing.assert_close(features(data, batch_size=2), whole)
        # Units do not matter.
        torch.testing.assert_close(RandomFeatures(data * 50 + 7)(data * 50 + 7), whole, rtol=1e-3, atol=1e-4)
    assert RandomFeatures(torch.ones(3, 1, 8, 8))(torch.ones(3, 1, 8, 8)).eq(0).all()


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"x, y: expected \(n, d\) and \(m, d\), n, m >= 2, got \(1, 3\) and \(4, 3\)"):
        frechet_distance(torch.zeros(1, 3), torch.zeros(4, 3))
    with pytest.raises(ValueError, match=r"data: expected \(n, C, H, W\) or \(n, T, F\), not empty, got \(3, 4\)"):
        RandomFeatures(torch.zeros(3, 4))
