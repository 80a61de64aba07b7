"""Windows of a series, from `fastgen generate` with a GAN."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer

from fastgen import _files
from fastgen.cli.generate.pictures import OUT, data_names
from fastgen.cli.generate.series import table
from fastgen.models import GAN
from fastgen.train.plots import save_windows

__all__ = ["draw_windows"]


def draw_windows(model: GAN, folder: Path, options: Mapping[str, Any]) -> None:
    """Draw as the options of the command say; `folder` is that of the model."""
    n, out = options.get("n", 64), options.get("out", OUT)
    kind = out.suffix.lower()
    if kind not in (".csv", ".npy", ".png"):
        raise ValueError(f"--out: expected a .csv, a .npy or a .png, got {out}")
    windows = model.generate(n, seed=options["seed"], truncation=options.get("truncation")).float().cpu()
    count = windows.shape[2]
    names = tuple(data_names(folder, "columns", count) or (f"x{index}" for index in range(count)))
    if kind == ".png":
        save_windows(out, windows, names, options.get("columns"), "Samples")
    elif kind == ".npy":
        import numpy

        with _files.atomic_path(out) as temporary:
            numpy.save(temporary, windows.numpy())
    else:
        _files.write_text(out, table(windows, names))
    typer.echo(out)
