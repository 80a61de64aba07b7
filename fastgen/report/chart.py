"""Curves as SVG that takes its colours from the page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from fastgen.report.run import Metric
from fastgen.train.plots import readable_limits

__all__ = ["curve", "figure", "ticks"]

WIDTH, HEIGHT = 320, 210
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 10, 10, 38
_POINTS = 300  # that a line is drawn through at most


def curve(metric: Metric) -> str:
    """A panel with the values of a metric over the steps, of training as a line and held out as dots on a line.

    Of more than 300 points each stands for the mean of several. What leaves the panel at its top is the steep
    beginning (`readable_limits`). Empty where there are fewer than two points.
    """
    train, test = _thinned(metric.train), _thinned(metric.test)
    if max(len(train), len(test)) < 2:
        return ""
    low, high = readable_limits([*train, *test]) or (0.0, 1.0)
    last = max(step for step, _ in (*train, *test))
    wide, high_ = WIDTH - _LEFT - _RIGHT, HEIGHT - _TOP - _BOTTOM

    def x(step: float) -> float:
        return _LEFT + step / last * wide

    def y(value: float) -> float:
        return _TOP + (high - value) / (high - low) * high_

    parts = [f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(_words(metric))}">']
    for value in ticks(low, high, 5):
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{figure(value)}</text>')
    for step in ticks(0, last, 4):
        parts.append(f'<text x="{x(step):.1f}" y="{HEIGHT - _BOTTOM + 17}" text-anchor="middle">{step:,.0f}</text>')
    parts.append(f'<text x="{_LEFT + wide / 2}" y="{HEIGHT - 5}" text-anchor="middle">step</text>')
    # A nested svg cuts off what lies outside of it.
    parts.append(
        f'<svg x="{_LEFT}" y="{_TOP}" width="{wide}" height="{high_}" viewBox="{_LEFT} {_TOP} {wide} {high_}">'
    )
    for name, points in (("train", train), ("test", test)):
        if points:
            line = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in points)
            parts.append(f'<polyline class="{name}" points="{line}"/>')
    if len(test) <= 60:
        parts += [f'<circle class="test" cx="{x(step):.1f}" cy="{y(value):.1f}" r="2.6"/>' for step, value in test]
    parts.append("</svg>")
    parts.append(f'<line class="axis" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{_TOP + high_}" y2="{_TOP + high_}"/>')
    return "".join([*parts, "</svg>"])


def ticks(low: float, high: float, count: int) -> list[float]:
    """Round numbers from low to high, about `count` of them."""
    rough = (high - low) / count
    magnitude = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * magnitude for factor in (1, 2, 5, 10) if factor * magnitude >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [place * step for place in range(first, last + 1)]


def figure(value: float) -> str:
    """A number with four digits at most, without noise: 1,234, 12.34, 0.0012."""
    if value == 0 or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def _thinned(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """The means of groups of points, at most 300 of them."""
    size = math.ceil(len(points) / _POINTS)
    groups = [points[start : start + size] for start in range(0, len(points), max(1, size))]
    return [(group[-1][0], sum(value for _, value in group) / len(group)) for group in groups]


def _words(metric: Metric) -> str:
    """The curve for those who do not see it."""
    parts = []
    for name, points in (("in training", metric.train), ("held out", metric.test)):
        if points:
            (first, before), (last, after) = points[0], points[-1]
            parts.append(f"{name} from {figure(before)} at step {first:,} to {figure(after)} at step {last:,}")
    unit = f" in {metric.unit}" if metric.unit else ""
    return f"{metric.title}{unit} over the steps: {'; '.join(parts)}"
