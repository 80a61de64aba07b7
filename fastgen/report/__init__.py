"""One self-contained HTML page about training runs: `fastgen report`.

* `run` reads a run folder, whatever the family of the model and whether it is finished;
* `chart` draws curves as SVG;
* `speed` times a training step of each family against plain PyTorch, by the cases of `fastgen.benchmark`;
* `page` puts them into the templates.

Example:
    >>> from fastgen.report import write_report
    >>> write_report(["runs/demo", "runs/demo-text"], "report.html")
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from fastgen._files import write_text
from fastgen.report.page import render
from fastgen.report.run import Run, read
from fastgen.report.speed import measure_families

__all__ = ["Run", "read", "render", "write_report"]


def write_report(
    runs: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    speed: bool = True,
    progress: Callable[[str], None] = lambda message: None,
) -> list[Run]:
    """Write one HTML file, which needs no other, about the runs in these folders.

    Args:
        runs: folders of `fastgen.train`, finished or not, in the order of the page.
        out: the file, ending in .html. An existing one is replaced.
        speed: whether to time a training step of each family here, against plain PyTorch: some seconds a family.
        progress: called with a line about what goes on.

    Returns:
        What was read of each run.

    Raises:
        FileNotFoundError: a folder is missing or not that of a run.
        ValueError: a file of a run is damaged, with its path; a run is given twice; `out` is no .html.
    """
    if not runs:
        raise ValueError("runs: expected at least one run folder, got none")
    if Path(out).suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"out: expected a file that ends in .html, got {str(out)!r}")
    folders = [Path(run).resolve() for run in runs]
    for place, folder in enumerate(folders):
        if folder in folders[:place]:
            raise ValueError(f"runs: {runs[place]} is given twice")
    read_runs = [read(run) for run in runs]
    families = dict.fromkeys(run.model_type for run in read_runs)
    measured = measure_families(families, progress) if speed else None
    write_text(out, render(read_runs, measured))
    return read_runs
