"""Curves of a run, from the rows of its metrics.csv."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from fastgen._extras import extra
from fastgen._files import atomic_path

__all__ = ["save_curves"]


def save_curves(path: Path, rows: Sequence[Mapping[str, str]], titles: Mapping[str, str], title: str = "") -> None:
    """Draw train and test curves over the steps, a panel for each metric of `titles` (name -> title), as PNG."""
    with extra("train"):
        from matplotlib.figure import Figure
    figure = Figure(figsize=(4.5 * len(titles), 3.6), dpi=100, layout="constrained")
    panels = figure.subplots(1, len(titles), squeeze=False)[0]
    for panel, (name, label) in zip(panels, titles.items(), strict=True):
        for split, style in (("train", {"color": "tab:blue"}), ("test", {"color": "tab:orange", "marker": "."})):
            points = [(int(row["step"]), float(row[name])) for row in rows if row["split"] == split and row[name]]
            if points:
                panel.plot(*zip(*points, strict=True), label=split, **style)
        panel.set(title=label, xlabel="step", ylabel="nats an example")
        panel.grid(alpha=0.3)
        panel.legend()
    figure.suptitle(title)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")
