from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fastgen.data import load_images
from fastgen.random import Generator, normal
from fastgen.train.collapse import CollapseWatch, Diversity, gradient_norm, pairwise_accuracy

# ---------------------------------------------------------------------------------------------------
# Diversity


@pytest.fixture(scope="module")
def digits() -> Tensor:
    """(512, 1, 28, 28): real digits."""
    train, _ = load_images("mnist").split()
    return train.batch(slice(512))[0]


def test_the_effective_number_of_samples_that_have_nothing_in_common() -> None:
    # Eight pairs of neighbours at a distance of 1, far from each other: k^2 is exp(-2) in a pair, 0 elsewhere.
    pairs = torch.arange(8).repeat_interleave(2).double() * 1e3
    points = torch.stack((pairs, torch.tensor([0.0, 1.0]).double().repeat(8)), 1)
    diversity = Diversity(points)
    assert diversity.effective_size == pytest.approx(16 / (1 + math.exp(-2)), rel=1e-12)
    # Equal shares of m samples that are far apart count as m.
    for m in (1, 2, 4, 16):
        samples = torch.arange(16).remainder(m).double().mul(1e3).unsqueeze(1).expand(16, 2)
        assert diversity(samples) * diversity.effective_size == pytest.approx(m, rel=1e-12)


@given(scale=st.sampled_from([1e-3, 0.5, 40.0]), shift=st.floats(-2, 2), seed=st.integers(0, 100))
def test_diversity_knows_no_units_and_no_order(scale: float, shift: float, seed: int) -> None:
    data, samples = (normal(20, 3, 2, generator=Generator(seed + i), dtype=torch.float64) for i in range(2))
    before = Diversity(data)(samples)
    after = Diversity(data.flip(0) * scale + shift)(samples.roll(3, 0) * scale + shift)
    assert after == pytest.approx(before, rel=1e-6)
    assert 1 / 20 <= before * Diversity(data).effective_size <= 20


def test_diversity_of_digits(digits: Tensor) -> None:
    diversity = Diversity(digits[:256])
    assert 0.8 < diversity(digits[256:]) < 1.25  # others of the same
    noise = normal(256, 1, 28, 28, std=0.1, generator=Generator(1))
    assert diversity(digits[:1].expand(256, -1, -1, -1)) == pytest.approx(1 / diversity.effective_size)
    assert diversity(digits[:1] + noise) < 0.05
    assert diversity(digits[:2].repeat(128, 1, 1, 1)) < 0.05
    # The mean distance, a figure often used, would not see two modes that are far apart.
    distances = torch.cdist(digits[:256].flatten(1), digits[:256].flatten(1))
    far = int(distances[0].argmax())
    two = digits[[0, far]].repeat(128, 1, 1, 1).flatten(1)
    assert torch.cdist(two, two).mean() > 0.6 * distances.mean()  # while diversity says a twentieth
    assert diversity(two) < 0.05
    assert diversity(digits[:10].repeat(26, 1, 1, 1)[:256]) < 0.2


def test_diversity_of_halves_and_of_copies() -> None:
    data = normal(16, 5, generator=Generator(3))
    assert Diversity(data.bfloat16())(data.bfloat16()) == 1
    assert Diversity(torch.ones(4, 3))(torch.ones(4, 3)) == 1  # data without any variety: nothing to lose
    far = Diversity(data + 1e4)  # distances are small beside the place
    assert far(data + 1e4) == 1
    assert far.effective_size == pytest.approx(Diversity(data).effective_size, rel=1e-2)
    assert Diversity(data[[0, 0, 0, 1]]).effective_size < 2
    with pytest.raises(ValueError, match="data: expected at least 2 examples, got 1"):
        Diversity(data[:1])
    with pytest.raises(ValueError, match="samples: expected 16, as many as of the data, got 15"):
        Diversity(data)(data[1:])


# ---------------------------------------------------------------------------------------------------
# The other figures


def test_pairwise_accuracy() -> None:
    real, fake = torch.tensor([3.0, 1.0, 0.0]), torch.tensor([2.0, 1.0])
    # 3 > 2, 3 > 1, 1 < 2, 1 = 1, 0 < 2, 0 < 1
    assert float(pairwise_accuracy(real, fake)) == pytest.approx((2 + 0.5) / 6)
    assert float(pairwise_accuracy(real + 100, fake)) == 1
    assert float(pairwise_accuracy(real, real)) == 0.5
    assert not pairwise_accuracy(real.requires_grad_(), fake).requires_grad


def test_gradient_norm() -> None:
    layer = nn.Linear(3, 2)
    assert gradient_norm(layer.parameters()) == 0.0
    layer.weight.grad, layer.bias.grad = torch.full((2, 3), 2.0), torch.tensor([3.0, 4.0])
    assert gradient_norm(layer.parameters()) == pytest.approx((6 * 4 + 25) ** 0.5)


# ---------------------------------------------------------------------------------------------------
# The watch, on figures made up


def told(step: int = 50, **columns: list[float]) -> list[tuple[int, str]]:
    """(step, first words) of the warnings of a run with these figures, a row every `step` steps; else healthy ones."""
    count = max(len(values) for values in columns.values())
    table = {"diversity": [1.0] * count, "accuracy": [0.8] * count, "score_gap": [1.0] * count, **columns}
    watch = CollapseWatch()
    warnings = []
    for index in range(count):
        row = {"step": float(step * (index + 1)), **{name: values[index] for name, values in table.items()}}
        warnings += [(int(row["step"]), " ".join(text.split()[1:5])) for text in watch(row)]
    return warnings


COLLAPSED, AWAY = "the generator has collapsed", "the discriminator has run"


def test_a_collapse_is_told_once_an_episode() -> None:
    # The first 15 rows, of 750 steps, are not judged; then it has to last for 250 steps.
    assert told(diversity=[0.03] * 80) == [(1050, COLLAPSED)]
    assert told(diversity=[1.0] * 40 + [0.03] * 40) == [(2300, COLLAPSED)]
    # Recovered, and once more.
    assert told(diversity=[0.03] * 30 + [0.5] * 2 + [0.03] * 30) == [(1050, COLLAPSED), (1900, COLLAPSED)]
    # Not recovered: between the two limits.
    assert told(diversity=[0.03] * 30 + [0.2] * 2 + [0.03] * 30) == [(1050, COLLAPSED)]


def test_what_is_no_collapse() -> None:
    assert told(diversity=[0.03] * 18 + [0.2, 0.5, 0.9] + [1.0] * 20) == []  # slow at the beginning
    assert told(diversity=[1.0] * 20 + [0.03, 1.0] * 20) == []  # does not last
    assert told(diversity=[1.0] * 20 + [0.03, 0.03, 0.15] * 20) == []
    assert told(diversity=[0.3] * 100) == []


def test_a_runaway_is_told_once_an_episode() -> None:
    assert told(accuracy=[1.0] * 80, score_gap=[10.0 + i for i in range(80)]) == [(1050, AWAY)]
    assert told(accuracy=[0.8] * 30 + [1.0] * 30) == [(1800, AWAY)]
    assert told(accuracy=[1.0] * 25 + [0.9] + [1.0] * 10) == [(1050, AWAY), (1600, AWAY)]


def test_what_is_no_runaway() -> None:
    assert told(accuracy=[0.97] * 100) == []
    # All apart, but by less and less: a critic that is trained well, and a generator that learns from it.
    assert told(accuracy=[1.0] * 60, score_gap=[20.0 * 0.96**i for i in range(60)]) == []


def test_rows_far_apart_and_close_together() -> None:
    """Three rows at least, whatever their distance; as many steps, however many rows."""
    assert told(step=1000, diversity=[0.03] * 8) == [(3000, COLLAPSED)]
    assert told(step=5, diversity=[0.03] * 250) == [(1005, COLLAPSED)]


def test_warnings_say_what_to_try() -> None:
    watch = CollapseWatch(warmup=0, patience=0)
    texts: list[str] = []
    for step in (1, 2, 3):
        texts += watch({"step": step, "diversity": 0.031, "accuracy": 0.9987, "score_gap": 12.34})
    collapse, runaway = texts
    assert "its samples are much alike (diversity 0.03; that of the data is 1)" in collapse
    assert "Try DiffAugment" in collapse
    assert "tells 99.9% of pairs" in runaway
    assert "(score gap 12.3)" in runaway
    assert "Try a lower learning rate of the discriminator" in runaway
