"""Series of numbers: CSV and NumPy files, and two made by a formula.

>>> train, test = load_series("weather.csv", time_column="date").split(0.1)
>>> model = RNN(input_size=train.values.shape[1])
>>> model.set_scale(*train.scale())
>>> inputs, targets = train.streams(batch_size=16, seq_len=50)[0]  # (16, 50, columns) each
"""

from __future__ import annotations

import csv
import math
import os
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from fastgen._dtypes import dtype_name
from fastgen.data._split import held_out
from fastgen.data.streams import Streams
from fastgen.data.text import read_utf8
from fastgen.random import Generator, normal

__all__ = ["SeriesSet", "load_series"]

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

_LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True, eq=False, repr=False)
class SeriesSet:
    """One series in memory.

    Attributes:
        values: (T, F) float32, finite.
        columns: the names of the F columns.
        name: what to call the series in titles and file names.

    Raises:
        ValueError: for values of another shape or dtype, or that are not finite.
    """

    values: Tensor
    columns: tuple[str, ...] = ()
    name: str = "series"

    def __post_init__(self) -> None:
        values = self.values
        if values.dim() != 2 or values.numel() == 0 or values.dtype != torch.float32:
            dtype = dtype_name(values.dtype)
            raise ValueError(f"values: expected float32 (T, F), neither of them 0, got {dtype} {tuple(values.shape)}")
        if not bool(torch.isfinite(values).all()):
            step, column = (~torch.isfinite(values)).nonzero()[0].tolist()
            raise ValueError(f"values: expected finite numbers, got {values[step, column]} at step {step}")
        if not self.columns:
            object.__setattr__(self, "columns", tuple(f"x{index}" for index in range(values.shape[1])))
        if len(self.columns) != values.shape[1]:
            raise ValueError(f"columns: expected {values.shape[1]} names, got {len(self.columns)}")

    def __len__(self) -> int:
        """T, the steps."""
        return len(self.values)

    def __repr__(self) -> str:
        names = ", ".join(self.columns[:8]) + (", ..." if len(self.columns) > 8 else "")
        return f"{self.name}: {len(self):,} steps of {len(self.columns)} ({names})"

    def split(self, test_size: float | int = 0.1) -> tuple[SeriesSet, SeriesSet]:
        """(train, test): the last steps are held out.

        Args:
            test_size: a count of steps (int) or a fraction (float in (0, 1)).

        Raises:
            TypeError, ValueError: for a `test_size` that leaves one of the parts empty.
        """
        count = held_out(test_size, len(self), "steps")
        return replace(self, values=self.values[:-count]), replace(self, values=self.values[-count:])

    def scale(self) -> tuple[Tensor, Tensor]:
        """(mean, standard deviation), (F,) each; of a column that never changes the deviation is 1."""
        values = self.values.double()
        deviation = values.std(0, correction=0)
        return values.mean(0).float(), torch.where(deviation > 0, deviation, 1.0).float()

    def streams(self, batch_size: int, seq_len: int) -> Streams:
        """Windows of `seq_len` steps over `batch_size` parallel streams; see `Streams`."""
        return Streams(self.values, batch_size, seq_len)


def load_series(
    source: str | os.PathLike[str],
    *,
    columns: Sequence[str] | None = None,
    time_column: str | None = None,
    delimiter: str | None = None,
) -> SeriesSet:
    """Read a series of numbers.

    Args:
        source: one of

            * a text file with a row a step (.csv, .tsv, .txt): with or without a line of names, columns
              apart by comma, semicolon, tab or spaces. Without names the columns are x0, x1, ...;
            * a .npy file (T,) or (T, F), or a .npz file of one such array, of floats or integers;
            * "sine": 2,000 steps of sin(2 pi t / 25) + 0.1 e_t, e_t standard normal;
            * "mackey-glass": 2,000 steps of the chaotic series of Mackey & Glass ("Oscillation and chaos in
              physiological control systems", 1977), delay 17, a step a unit of time.

            For a file of such a name write "./sine" or give a Path.
        columns: take these of a text file, in this order; None: all but the time.
        time_column: leave this one out, whatever it holds.
        delimiter: what stands between columns, one character; None: the first of semicolon, tab, comma and space
            that the first line has.

    Raises:
        FileNotFoundError, PermissionError: as named, with the path.
        ValueError: for what is no number, with its line and column, or damaged or contradictory input.
    """
    if isinstance(source, str) and source in _FORMULAS:
        _no_options(source, columns, time_column, delimiter)
        return SeriesSet(_FORMULAS[source]().float().unsqueeze(1), ("x",), source)
    path = Path(source)
    try:
        path.stat()
    except FileNotFoundError:
        formulas = " or ".join(f'"{name}"' for name in _FORMULAS)
        raise FileNotFoundError(f"{path}: no such file, and not {formulas}") from None
    if path.is_dir():
        raise ValueError(f"{path}: expected a file with a series, got a folder")
    title = path.name.split(".")[0] or path.name
    if path.suffix in (".npy", ".npz"):
        _no_options(path, columns, time_column, delimiter)
        return SeriesSet(_read_numpy(path), name=title)
    rows, found = _read_rows(path, columns, time_column, delimiter)
    return SeriesSet(torch.tensor(rows, dtype=torch.float64).float(), found, title)


def _no_options(source: object, columns: object, time_column: object, delimiter: object) -> None:
    given = {"columns": columns, "time_column": time_column, "delimiter": delimiter}
    for name, value in given.items():
        if value is not None:
            raise ValueError(f"{name}: expected None for {source}, which is no text file, got {value!r}")


# ---------------------------------------------------------------------------------------------------
# Text


def _read_rows(
    path: Path, columns: Sequence[str] | None, time_column: str | None, delimiter: str | None
) -> tuple[list[list[float]], tuple[str, ...]]:
    """The numbers of the columns wanted, a list a row, and their names."""
    if delimiter is not None and len(delimiter) != 1:
        raise ValueError(f"delimiter: expected one character, got {delimiter!r}")
    lines = read_utf8(path, keep_newlines=True).splitlines()
    if delimiter is None:
        first = next((line.strip() for line in lines if line.strip()), "")
        delimiter = next((character for character in ";\t, " if character in first), ",")
    reader = csv.reader(lines, delimiter=delimiter, skipinitialspace=True)
    table: list[tuple[int, list[str]]] = []  # (line, cells)
    last = 0
    try:
        for fields in reader:
            if table and reader.line_num > last + 1:
                raise ValueError(f"{path}: line {last + 1}: a quotation mark has no end")
            last = reader.line_num
            if any(cells := [field.strip() for field in fields]):
                table.append((last, cells))
    except csv.Error as error:
        raise ValueError(f"{path}: line {reader.line_num}: not a table ({error})") from None
    if not table:
        raise ValueError(f"{path}: expected rows of numbers, got an empty file")

    # A line of names has no number in it.
    top, head = table[0]
    figure = next((cell for cell in head if _number(cell) is not None), None)
    taken_for_values = "" if figure is None else f"; line {top} is taken for values, as {figure!r} is no name"
    names = head if figure is None else [f"x{index}" for index in range(len(head))]
    table = table[1:] if figure is None else table
    if not table:
        raise ValueError(f"{path}: expected rows of numbers, got one line without a number, {lines[top - 1][:60]!r}")
    for name in (*(columns or ()), *(() if time_column is None else (time_column,))):
        if names.count(name) != 1:
            hint = taken_for_values if name in head else ""
            raise ValueError(
                f"{path}: expected one column {name!r}, got {names.count(name)}; there are {', '.join(names)}{hint}"
            )
    wanted = _wanted(path, names, columns, time_column)
    rows = []
    for line, cells in table:
        if len(cells) != len(names):
            count = f"{len(names)} column{'s' if len(names) > 1 else ''}"
            raise ValueError(
                f"{path}: line {line}: expected {count} as in line {top}, apart by {delimiter!r}, got {len(cells)}"
            )
        row = [_number(cells[index]) for index in wanted]
        for index, value in zip(wanted, row, strict=True):
            if value is None or not abs(value) <= _LARGEST:
                cell = cells[index]
                got = repr(cell) if cell else "nothing"
                column = repr(names[index]) if names[index] else f"{index + 1}, which has no name"
                number = "a number" if value is None or not math.isfinite(value) else "a number that float32 holds"
                hint = ""
                if value is None and cell:
                    hint = taken_for_values if line == top else ""
                    if _number(cell.replace(",", ".", 1)) is not None:
                        hint += "; decimals stand behind a point"
                    elif time_column is None and len(wanted) > 1 and _has_no_number(table, index):
                        hint += f"; time_column {names[index]} leaves it out"
                raise ValueError(f"{path}: line {line}, column {column}: expected {number}, got {got}{hint}")
        rows.append([value for value in row if value is not None])
    return rows, tuple(names[index] for index in wanted)


def _has_no_number(table: list[tuple[int, list[str]]], index: int) -> bool:
    return all(index < len(cells) and _number(cells[index]) is None for _, cells in table)


def _number(cell: str) -> float | None:
    try:
        return float(cell)
    except ValueError:
        return None


def _wanted(path: Path, names: list[str], columns: Sequence[str] | None, time_column: str | None) -> list[int]:
    """The indices of the columns to take."""
    if columns is not None:
        if not columns or time_column in columns:
            raise ValueError(f"columns: expected at least one, without the time, got {list(columns)}")
        return [names.index(name) for name in columns]
    wanted = [index for index, name in enumerate(names) if name != time_column]
    if not wanted:
        raise ValueError(f"{path}: expected a column beside {time_column!r}, found none")
    return wanted


# ---------------------------------------------------------------------------------------------------
# NumPy


def _read_numpy(path: Path) -> Tensor:
    try:
        if path.suffix == ".npz":
            # ZipFile, because np.load takes a file that is no archive for a pickle and says so.
            with zipfile.ZipFile(path), np.load(path, allow_pickle=False) as file:
                arrays = {key: file[key] for key in file.files}
        else:
            arrays = {"array": np.load(path, allow_pickle=False)}
    except PermissionError:
        raise
    except Exception as error:  # the decoders raise anything at all on damaged bytes
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path}: not a readable {path.suffix} file ({reason})") from None
    if len(arrays) != 1:
        raise ValueError(f"{path}: expected one array, got {', '.join(arrays) or 'none'}")
    array: Array = next(iter(arrays.values()))
    if array.dtype.kind not in "fiu" or array.ndim not in (1, 2) or array.size == 0:
        raise ValueError(f"{path}: expected numbers (T,) or (T, F), none of them 0, got {array.dtype} {array.shape}")
    table = array.reshape(len(array), -1).astype(np.float32)
    bad = np.argwhere(~np.isfinite(table))
    if len(bad):
        row, column = bad[0]
        raise ValueError(
            f"{path}: row {row}, column {column}: expected a number, got {array.reshape(table.shape)[row, column]}"
        )
    return torch.from_numpy(table)


# ---------------------------------------------------------------------------------------------------
# Formulas

_STEPS = 2000


def _sine() -> Tensor:
    t = torch.arange(_STEPS, dtype=torch.float64)
    return torch.sin(2 * math.pi / 25 * t) + 0.1 * normal(_STEPS, generator=Generator(0), dtype=torch.float64)


def _mackey_glass() -> Tensor:
    """dx/dt = 0.2 x(t - 17) / (1 + x(t - 17)^10) - 0.1 x(t), from 1.2, after 300 units of time.

    Euler's method in steps of 1/10: halving them changes the path, as that of any chaos, but not its kind.
    """
    step, delay, skipped = 0.1, 170, 3000
    x = [1.2] * (delay + 1)
    for _ in range(skipped + 10 * _STEPS):
        late = x[-1 - delay]
        x.append(x[-1] + step * (0.2 * late / (1 + late**10) - 0.1 * x[-1]))
    return torch.tensor(x[-10 * _STEPS :: 10], dtype=torch.float64)


_FORMULAS: dict[str, Callable[[], Tensor]] = {"sine": _sine, "mackey-glass": _mackey_glass}
