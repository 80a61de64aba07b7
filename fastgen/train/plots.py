"""Curves of a run, from the rows of its metrics.csv."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from fastgen._extras import extra
from fastgen._files import atomic_path

__all__ = ["readable_limits", "save_curves"]


def save_curves(path: Path, rows: Sequence[Mapping[str, str]], titles: Mapping[str, str], title: str = "") -> None:
    """Draw train and test curves over the steps, a panel for each metric of `titles` (name -> title), as PNG.

    The steep fall of the first steps may leave a panel at its top, so that the rest can be read (`readable_limits`).
    """
    with extra("train"):
        from matplotlib.figure import Figure
    figure = Figure(figsize=(4.5 * len(titles), 3.6), dpi=100, layout="constrained")
    panels = figure.subplots(1, len(titles), squeeze=False)[0]
    for panel, (name, label) in zip(panels, titles.items(), strict=True):
        shown: list[tuple[int, float]] = []
        for split, style in (("train", {"color": "tab:blue"}), ("test", {"color": "tab:orange", "marker": "."})):
            points = [(int(row["step"]), float(row[name])) for row in rows if row["split"] == split and row[name]]
            if points:
                panel.plot(*zip(*points, strict=True), label=split, **style)
            shown += points
        panel.set(title=label, xlabel="step", ylabel="nats an example", ylim=readable_limits(shown))
        panel.grid(alpha=0.3)
        panel.legend()
    figure.suptitle(title)
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
