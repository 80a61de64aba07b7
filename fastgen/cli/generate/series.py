"""Series of `fastgen generate`."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import typer
from torch import Tensor

from fastgen import _files
from fastgen.data import SeriesSet, load_series
from fastgen.models import RNN
from fastgen.train import read_run
from fastgen.train.plots import save_continuation

__all__ = ["continue_series", "table"]

_READ = 1000  # last steps of the series that the model reads
_SHOWN = 200  # of them in a picture


def continue_series(model: RNN, folder: Path, options: Mapping[str, Any]) -> None:
    """Continue the series as the options of the command say; `folder` is that of the model."""
    n, out, seed, temperature = options.get("n", 1), options.get("out"), options["seed"], options["temperature"]
    kind = ".csv" if out is None else out.suffix.lower()
    if kind not in (".csv", ".npy", ".png"):
        raise ValueError(f"--out: expected a .csv, a .npy or a .png, got {out}")
    series = _series(folder, options.get("series"))
    if len(series.columns) != model.config.input_size:
        expected = f"{model.config.input_size} columns as the model has"
        raise ValueError(f"--series: expected {expected}, got {len(series.columns)}: {', '.join(series.columns)}")
    prompt = series.values[-_READ:].to(model.device)
    steps = options.get("max_new_tokens", 200)

    def ahead(n: int, temperature: float) -> Tensor:
        """(n, steps, columns)."""
        rows = model.generate([prompt], steps, n=n, seed=seed, temperature=temperature)
        return torch.stack(rows)[:, len(prompt) :].float().cpu()

    draws = ahead(n, temperature)
    if kind == ".png":
        assert out is not None
        before = series.values[-_SHOWN:]
        save_continuation(
            out, before, len(before), ahead(1, 0)[0], draws, series.columns, f"{series.name}, and how it goes on"
        )
    elif kind == ".npy":
        import numpy

        assert out is not None
        with _files.atomic_path(out) as temporary:
            numpy.save(temporary, draws.numpy())
    elif out is None:
        typer.echo(table(draws, series.columns), nl=False)
        return
    else:
        _files.write_text(out, table(draws, series.columns))
    typer.echo(out)


def _series(folder: Path, given: str | None) -> SeriesSet:
    """The series of the option, or that of the run folder around the model."""
    run = folder.absolute().parent
    record = read_run(run) if (run / "config.json").is_file() else {}
    source: dict[str, Any] = record.get("source", {})
    if given is None and not source:
        why = f"{run} was started from Python" if record else f"{folder} is not in the folder of a run"
        raise ValueError(f"--series: expected one, as {why} and does not say where its data is, got none")
    if given is not None and Path(given).suffix.lower() not in (".csv", ".tsv", ".txt"):
        return load_series(given)  # it has no names to choose columns by
    columns, time_column = source.get("columns"), source.get("time_column")
    return load_series(given or source["data"], columns=columns and columns.split(","), time_column=time_column)


def table(draws: Tensor, columns: tuple[str, ...]) -> str:
    """CSV: with several draws the first column numbers them, from 0."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    several = len(draws) > 1
    writer.writerow([*(["draw"] if several else []), *columns])
    for index, draw in enumerate(draws.tolist()):
        writer.writerows([[*([index] if several else []), *(f"{value:.7g}" for value in row)] for row in draw])
    return text.getvalue()
