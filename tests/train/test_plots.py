"""The curves of a run can be read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fastgen.train.plots import readable_limits, save_curves


def test_the_first_point_does_not_squeeze_the_rest() -> None:
    fall = [(50, 543.0)] + [(50 * i, 100 + 20 / i) for i in range(2, 41)]
    low, high = readable_limits(fall)
    late = [value for step, value in fall if step > 200]
    assert low <= min(late)
    assert max(late) <= high < 150
    assert (max(late) - min(late)) / (high - low) > 0.6
    rise = [(step, -value) for step, value in fall]
    assert readable_limits(rise) == (-high, -low)


@given(
    st.lists(st.tuples(st.integers(1, 10_000), st.floats(-1e6, 1e6, width=32)), min_size=1, max_size=50, unique=True)
)
def test_the_late_values_are_inside_and_fill_the_panel(points: list[tuple[int, float]]) -> None:
    low, high = readable_limits(points)
    last = max(step for step, _ in points)
    late = [value for step, value in points if step > last / 10]
    assert low < high
    assert low <= min(late) <= max(late) <= high
    spread = max(late) - min(late)
    assert spread == 0 or spread / (high - low) > 0.6


def test_a_curve_without_points_has_no_limits() -> None:
    assert readable_limits([]) is None


def test_the_picture_shows_the_late_part(tmp_path: Path) -> None:
    """The orange of the test curve spans most of the height, though the first row is far above."""
    losses = [900.0] + [110.0 - i for i in range(1, 20)]
    rows = [{"split": "test", "step": str(i + 1), "loss": str(loss)} for i, loss in enumerate(losses)]
    save_curves(tmp_path / "loss.png", rows, {"loss": "loss"})
    with Image.open(tmp_path / "loss.png") as picture:
        pixels = np.array(picture.convert("RGB")).astype(int)
    orange = (np.abs(pixels - np.array([255, 127, 14])).sum(-1) < 30).nonzero()[0]
    assert np.ptp(orange) > 0.5 * len(pixels)


@pytest.mark.parametrize("value", [0.0, 3.0, -3.0])
def test_a_constant_has_room_around_it(value: float) -> None:
    low, high = readable_limits([(1, value), (2, value)])
    assert low < value < high
