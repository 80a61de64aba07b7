"""Statistics of the draws, on millions of them, each against what the exact distribution gives.

The seeds are fixed, so nothing here is flaky; the bounds are those of a test at five standard errors or a
p-value of 1e-4 (one in thousands of good generators would miss one of them).
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support import FLOATS

from fastgen import random
from fastgen.random import Generator

COUNT = 1 << 20
WIDE = (torch.float32, torch.float64)


def within(value: float, expected: float, standard_error: float) -> None:
    assert abs(value - expected) < 5 * standard_error, (value, expected, standard_error)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-3.0, 0.5)])
def test_normal_moments(dtype, mean, std):
    z = (random.normal(COUNT, mean=mean, std=std, generator=Generator(101), dtype=dtype).double() - mean) / std
    # A half type rounds unbiasedly around 0, but -3 + z/2 to steps of 2^-7 relative: its own small noise.
    step = torch.finfo(dtype).eps * (abs(mean) + 4 * std) / std
    root = math.sqrt(COUNT)
    within(float(z.mean()), 0, 1 / root + step / 50)
    within(float(z.square().mean()), 1, math.sqrt(2) / root + step**2)
    within(float((z**3).mean()), 0, math.sqrt(15) / root + step / 20)
    within(float((z**4).mean()), 3, math.sqrt(96) / root + 6 * step**2)


@pytest.mark.parametrize("dtype", WIDE)
def test_normal_kolmogorov_smirnov(dtype):
    for seed, offset in ((1, 0), (2**64 - 1, 2**63 + 1)):
        z = random.normal(COUNT, generator=Generator(seed, offset), dtype=dtype).numpy()
        assert scipy.stats.kstest(z, "norm").pvalue > 1e-4
        # Each half of the Box-Muller pair on its own.
        assert scipy.stats.kstest(z[0::2], "norm").pvalue > 1e-4
        assert scipy.stats.kstest(z[1::2], "norm").pvalue > 1e-4


@pytest.mark.parametrize("dtype", WIDE)
def test_exponential_kolmogorov_smirnov_and_moments(dtype):
    e = random.exponential(COUNT, rate=4.0, generator=Generator(5), dtype=dtype).double().numpy() * 4
    assert scipy.stats.kstest(e, "expon").pvalue > 1e-4
    root = math.sqrt(COUNT)
    within(e.mean(), 1, 1 / root)
    within(np.square(e).mean(), 2, math.sqrt(20) / root)
    assert e.min() > 0


@pytest.mark.parametrize("dtype", WIDE)
def test_uniform_kolmogorov_smirnov(dtype):
    u = random.uniform(COUNT, low=-2.0, high=6.0, generator=Generator(6), dtype=dtype).double().numpy()
    assert scipy.stats.kstest(u, "uniform", args=(-2, 8)).pvalue > 1e-4
    assert u.min() >= -2
    assert u.max() < 6


@pytest.mark.parametrize("dtype", FLOATS)
@given(low=st.floats(-1e4, 1e4), width=st.floats(1e-6, 1e4))
@example(low=0.7, width=0.01)  # the nearest bfloat16 is under 0.7
@example(low=-1e-9, width=1.0)  # less than the least float16
@settings(max_examples=30)
def test_uniform_keeps_to_its_limits_in_every_dtype(dtype, low, width):
    high = low + width
    near = torch.tensor(low, dtype=torch.float64).to(dtype)
    above = torch.nextafter(near, torch.tensor(math.inf, dtype=dtype))
    if not any(low <= float(value) < high for value in (near, above)):
        with pytest.raises(ValueError, match=r"^low, high: expected a number of "):
            random.uniform(300, low=low, high=high, dtype=dtype)
        return
    u = random.uniform(300, low=low, high=high, generator=Generator(8), dtype=dtype)
    assert low <= float(u.double().min()) <= float(u.double().max()) < high


def test_uniform_without_a_number_between_its_limits():
    with pytest.raises(ValueError, match=r"expected a number of bfloat16 in \[low, high\), got 1.001 and 1.002$"):
        random.uniform(3, low=1.001, high=1.002, dtype=torch.bfloat16)


@pytest.mark.parametrize("dtype", FLOATS)
def test_uniform_takes_each_of_its_values_equally_often(dtype):
    """Every step of 2^-8 is hit as often as the others; bfloat16 has no more steps than those, and reaches 255/256."""
    u = random.uniform(COUNT, generator=Generator(7), dtype=dtype)
    counts = torch.bincount((u.double() * 256).floor().long(), minlength=256).numpy()
    assert counts.shape == (256,)
    assert scipy.stats.chisquare(counts).pvalue > 1e-4
    if dtype == torch.bfloat16:
        assert u.unique().numel() == 256
    if dtype == torch.float16:
        assert u.unique().numel() == 2048


def test_every_bit_of_the_words_is_fair():
    for dtype, width in ((torch.int32, 32), (torch.int64, 64)):
        words = random.bits(COUNT, generator=Generator(8), dtype=dtype)
        for bit in range(width):
            within(float((words >> bit & 1).double().mean()), 0.5, 0.5 / math.sqrt(COUNT))


@pytest.mark.parametrize("p", [1e-4, 0.1, 0.5, 0.93])
def test_bernoulli_frequency(p):
    for dtype in (torch.bool, *FLOATS):
        kept = random.bernoulli(COUNT, p=p, generator=Generator(9), dtype=dtype)
        assert kept.unique().tolist() == [0, 1]
        within(float(kept.double().mean()), p, math.sqrt(p * (1 - p) / COUNT))
        dropped = random.dropout_mask(COUNT, p=p, generator=Generator(10), dtype=dtype)
        within(float(dropped.double().mean()), 1 - p, math.sqrt(p * (1 - p) / COUNT))


def test_bernoulli_of_0_and_1_is_certain():
    for dtype in (torch.bool, *FLOATS):
        assert not random.bernoulli(COUNT, p=0.0, generator=Generator(9), dtype=dtype).any()
        assert random.bernoulli(COUNT, p=1.0, generator=Generator(9), dtype=dtype).all()
        assert random.dropout_mask(1000, p=0.0, generator=Generator(9), dtype=dtype).all()


def test_bernoulli_threshold_is_exact():
    """True where the word is below p 2^32: shown on p at and one step beside a word that comes."""
    words = random.bits(4096, generator=Generator(12)).long() % 2**32
    for index in (0, 1, 77, 4095):
        word = int(words[index])
        assert not random.bernoulli(4096, p=word / 2**32, generator=Generator(12))[index]
        assert random.bernoulli(4096, p=(word + 1) / 2**32, generator=Generator(12))[index]


@pytest.mark.parametrize("dtype", WIDE)
def test_nothing_is_correlated(dtype):
    """Neighbours up to 64 apart, values and squares; other streams, other seeds, forks."""
    z = random.normal(COUNT, generator=Generator(13), dtype=dtype).double()
    squares, root = z.square() - 1, math.sqrt(COUNT)
    for lag in (*range(1, 18), 31, 32, 33, 64):
        within(float((z[:-lag] * z[lag:]).mean()), 0, 1 / root)
        within(float((squares[:-lag] * squares[lag:]).mean()), 0, 2 / root)
    # The two of one pair: independent in their squares and signs as well.
    even, odd = z[0::2], z[1::2]
    within(float(((even**2 - 1) * (odd**2 - 1)).mean()), 0, 2 / math.sqrt(COUNT / 2))
    within(float((even.sign() * odd.sign()).mean()), 0, 1 / math.sqrt(COUNT / 2))

    parent = Generator(13)
    for other in (
        Generator(14),
        Generator(13 + 2**32),
        Generator(12),
        Generator(13, 2**34),
        parent.fork(0),
        parent.fork(1),
        parent.fork(0).fork(0),
        Generator(14).fork(0),
    ):
        within(float((z * random.normal(COUNT, generator=other, dtype=dtype).double()).mean()), 0, 1 / root)


def test_pairs_fill_the_plane():
    """The angle of a Box-Muller pair is uniform and independent of its radius."""
    z = random.normal(COUNT, generator=Generator(15)).double().numpy()
    x, y = z[0::2], z[1::2]
    angle = (np.arctan2(y, x) / (2 * math.pi)) % 1.0
    radius = -np.expm1(-(x**2 + y**2) / 2)
    assert scipy.stats.kstest(angle, "uniform").pvalue > 1e-4
    table, _, _ = np.histogram2d(angle, radius, bins=(32, 32), range=((0, 1), (0, 1)))
    assert scipy.stats.chisquare(table.ravel()).pvalue > 1e-4


@pytest.mark.parametrize("dtype", FLOATS)
def test_tails(dtype):
    """Counts beyond 3, 4 and 5 standard deviations in 2^24 draws: 45 298, 1 063 and 9.6 are expected."""
    z = random.normal(1 << 24, generator=Generator(16), dtype=dtype).abs_()
    assert torch.isfinite(z).all()
    for sigma in (3, 4, 5):
        # A half type compares with the midpoint under sigma, from which it rounds up.
        edge = sigma
        if dtype in (torch.bfloat16, torch.float16):
            below = torch.nextafter(torch.tensor(float(sigma), dtype=dtype), torch.tensor(0.0, dtype=dtype))
            edge = (sigma + float(below)) / 2
        expected = (1 << 24) * math.erfc(edge / math.sqrt(2))
        within(int((z >= sigma).sum()), expected, math.sqrt(expected))
    assert float(z.max()) > 5
