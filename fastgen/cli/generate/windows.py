"""Windows of a series, from `fastgen generate` with a GAN."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer

from fastgen import _files
from fastgen.cli.generate.series import table
from fastgen.models import GAN
from fastgen.train import read_run
from fastgen.train.plots import save_windows

__all__ = ["draw_windows"]

_OUT = Path("generated.png")


def draw_windows(model: GAN, folder: Path, options: Mapping[str, Any]) -> None:
    """Draw as the options of the command say; `folder` is that of the model."""
    n, out, across = options.get("n", 64), options.get("out", _OUT), options.get("columns")
    if across is not None and across < 1:
        raise ValueError(f"--columns: expected an int of at least 1, got {across}")
    kind = out.suffix.lower()
    if kind not in (".csv", ".npy", ".png"):
        raise ValueError(f"--out: expected a .csv, a .npy or a .png, got {out}")
    windows = model.generate(n, seed=options["seed"], truncation=options.get("truncation")).float().cpu()
    names = _columns(folder, windows.shape[2])
    if kind == ".png":
        save_windows(out, windows, names, across, "Samples")
    elif kind == ".npy":
        import numpy

        with _files.atomic_path(out) as temporary:
            numpy.save(temporary, windows.numpy())
    else:
        _files.write_text(out, table(windows, names))
    typer.echo(out)


def _columns(folder: Path, count: int) -> tuple[str, ...]:
    """The names of the columns, which the run folder around the model keeps; x0, x1 ... for a model on its own."""
    try:
        names = read_run(folder.absolute().parent)["data"]["columns"]
    except (OSError, ValueError, KeyError):
        names = []
    return tuple(names) if len(names) == count else tuple(f"x{index}" for index in range(count))
