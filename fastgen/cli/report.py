"""`fastgen report`: a page about training runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["report"]


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="Run folders of `fastgen train`.")],
    out: Annotated[Path, typer.Option(help="The HTML file to write; one that is there is replaced.")] = Path(
        "report.html"
    ),
    speed: Annotated[
        bool,
        typer.Option(
            "--speed/--no-speed",
            help="Whether to time a training step of each family on this machine, against plain PyTorch: some seconds "
            "a family.",
        ),
    ] = True,
) -> None:
    """Write a page about training runs: samples over time, curves, final figures, and speed on this machine.

    It is one file with everything in it, to be opened in any browser, mailed or put on a server. Runs that have not
    ended yet are shown as far as they are.

    Examples:

        fastgen report runs/demo --out report.html

        fastgen report runs/demo runs/demo-text runs/demo-gpt --no-speed
    """
    from fastgen.report import write_report

    read = write_report(runs, out, speed=speed, progress=lambda message: print(message, file=sys.stderr))
    size = out.stat().st_size
    unit = f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.0f} kB"
    typer.echo(f"wrote {out} ({len(read)} run{'' if len(read) == 1 else 's'}, {unit})")
