"""Curves of a run, from the rows of its metrics.csv."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from fastgen._extras import extra
from fastgen._files import atomic_path

__all__ = ["readable_limits", "save_continuation", "save_curves", "save_windows"]


def save_curves(
    path: Path,
    rows: Sequence[Mapping[str, str]],
    titles: Mapping[str, str],
    title: str = "",
    *,
    units: str = "nats an example",
) -> None:
    """Draw train and test curves over the steps, a panel for each metric of `titles` (name -> title), as PNG.

    The steep fall of the first steps may leave a panel at its top, so that the rest can be read (`readable_limits`).
    """
    with extra("train"):
        from matplotlib.figure import Figure
    columns = len(titles) if len(titles) <= 4 else 3
    lines = math.ceil(len(titles) / columns)
    figure = Figure(figsize=(4.5 * columns, 3.6 * lines), dpi=100, layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).flat
    for panel in panels[len(titles) :]:
        panel.set_axis_off()
    for panel, (name, label) in zip(panels[: len(titles)], titles.items(), strict=True):
        shown: list[tuple[int, float]] = []
        for split, style in (("train", {"color": "tab:blue"}), ("test", {"color": "tab:orange", "marker": "."})):
            points = [(int(row["step"]), float(row[name])) for row in rows if row["split"] == split and row[name]]
            if points:
                panel.plot(*zip(*points, strict=True), label=split, **style)
            shown += points
        panel.set(title=label, xlabel="step", ylabel=units, ylim=readable_limits(shown))
        panel.grid(alpha=0.3)
        panel.legend()
    figure.suptitle(title)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")


def save_continuation(
    path: Path,
    truth: Tensor,
    start: int,
    mean: Tensor,
    draws: Tensor,
    columns: Sequence[str],
    title: str = "",
) -> None:
    """Draw how a series goes on beside the truth, a panel for each of the first eight columns, as PNG.

    Args:
        truth: (T, F), what was.
        start: the step of `truth` from which on it is continued.
        mean: (S, F), the continuation by means.
        draws: (n, S, F), continuations that were drawn.
        columns: the names of the F columns.
    """
    with extra("train"):
        from matplotlib.figure import Figure
    shown = columns[:8]
    figure = Figure(figsize=(10, 2.6 * len(shown)), dpi=100, layout="constrained")
    panels = figure.subplots(len(shown), 1, squeeze=False, sharex=True)[:, 0]
    steps, ahead = range(-start, len(truth) - start), range(len(mean))
    for column, (panel, name) in enumerate(zip(panels, shown, strict=True)):
        for draw in draws[..., column]:
            panel.plot(ahead, draw, color="tab:orange", alpha=0.35, linewidth=0.8)
        panel.plot(steps, truth[:, column], color="black", linewidth=1, label="truth")
        panel.plot(ahead, mean[:, column], color="tab:red", linewidth=1.2, label="mean ahead, and draws")
        panel.axvline(0, color="grey", linestyle=":")
        panel.set(ylabel=name)
        panel.grid(alpha=0.3)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper right", ncols=2)
    panels[-1].set(xlabel="steps ahead")
    figure.suptitle(title)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")


def save_windows(
    path: Path, windows: Tensor, columns: Sequence[str], across: int | None = None, title: str = ""
) -> None:
    """Draw windows of a series as small curves in rows, all to one scale, a colour for each of eight columns, as PNG.

    Args:
        windows: (n, T, F) floats on the CPU.
        columns: the names of the F columns.
        across: windows a row; default about a square.
    """
    with extra("train"):
        from matplotlib.figure import Figure
    windows = windows[..., :8].float()
    count, steps, features = windows.shape
    across = across or math.ceil(math.sqrt(count))
    down = math.ceil(count / across)
    figure = Figure(figsize=(1.2 * across, 0.8 * down + 0.8), dpi=100, layout="constrained")
    panel = figure.subplots()
    # One panel for all, each curve shifted to its place: hundreds of panels would take a minute.
    low, high = float(windows.min()), float(windows.max())
    heights = (windows - low) / max(high - low, 1e-30)
    place = torch.arange(count).view(-1, 1)
    x = place % across * 1.15 + torch.linspace(0, 1, steps)
    gap = torch.full((count, 1), math.nan)
    for feature, name in zip(range(features), columns, strict=False):
        y = heights[..., feature] - place // across * 1.2
        lines = (torch.cat((axis, gap), 1).flatten().numpy() for axis in (x, y))
        panel.plot(*lines, linewidth=0.8, label=name)
    panel.set_axis_off()
    if features > 1:
        figure.legend(loc="outside lower center", ncols=4)
    figure.suptitle(f"{title}  (from {low:.4g} to {high:.4g})")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")


def readable_limits(points: Sequence[tuple[int, float]]) -> tuple[float, float] | None:
    """Limits of the second coordinate for (step, value) points; None where there are none.

    All values of the last nine tenths of the steps are inside, in at least two thirds of the height; earlier ones
    as far as they fit into the rest.
    """
    if not points:
        return None
    last = max(step for step, _ in points)
    values = [value for _, value in points]
    late = [value for step, value in points if 10 * step > last]
    room = 0.25 * (max(late) - min(late)) or 0.05 * abs(late[0]) or 1.0
    low, high = max(min(values), min(late) - room), min(max(values), max(late) + room)
    margin = 0.05 * (high - low) or room
    return low - margin, high + margin
