"""Where a run tells of itself: metrics.csv, TensorBoard, and the terminal."""

from __future__ import annotations

import abc
import contextlib
import csv
import io
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TextIO

from fastgen._extras import extra
from fastgen._files import write_text

__all__ = ["EventLog", "MetricsFile", "Progress", "ProgressMode", "make_progress", "read_metrics"]

Number = int | float
_QUIET_SECONDS = 10.0  # between two lines about the same evaluation
ProgressMode = Literal["auto", "bar", "lines", "quiet"]


def read_metrics(path: Path) -> list[dict[str, str]]:
    """The rows of a metrics.csv; a last line cut short by a kill is left out."""
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    return list(csv.DictReader(io.StringIO(whole)))


class MetricsFile:
    """metrics.csv: one row for each log point and each evaluation.

    Args:
        path: the file. Rows of an earlier process after `step`, and final ones, are dropped, because the
            run is about to write them again.
        columns: the header.
        step: where the run starts.
    """

    def __init__(self, path: Path, columns: Sequence[str], step: int) -> None:
        self.path = path
        self._columns = tuple(columns)
        kept = []
        if path.exists():
            kept = [row for row in read_metrics(path) if int(row["step"]) <= step and row["split"] != "final"]
        text = io.StringIO()
        writer = csv.DictWriter(text, self._columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(kept)
        write_text(path, text.getvalue())
        self._file = open(path, "a", encoding="utf-8", newline="")  # noqa: SIM115 (closed by close)
        self._writer = csv.DictWriter(self._file, self._columns, restval="", lineterminator="\n")

    def write(self, row: Mapping[str, str | Number]) -> None:
        with _named(self.path):
            self._writer.writerow(row)
            self._file.flush()

    def sync(self) -> None:
        """Bring the rows to the disk: to be done before the checkpoint that builds on them."""
        with _named(self.path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        with _named(self.path):
            self._file.close()


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Errors of the system, such as a full disk, name the file."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


class EventLog:
    """TensorBoard events in `folder`, from `step` on; later ones of an earlier process are hidden."""

    def __init__(self, folder: Path, step: int) -> None:
        with extra("train"):
            import tensorboard  # noqa: F401 (torch's own message would not name the extra)
            from torch.utils.tensorboard import SummaryWriter
        self._folder = folder
        self._writer: Any = SummaryWriter(str(folder), purge_step=step + 1)
        self._excepthook = threading.excepthook
        threading.excepthook = self._on_exception

    def _on_exception(self, failed: threading.ExceptHookArgs) -> None:
        # What fails in the writer's own thread it raises again in ours, at the next write.
        if not type(failed.thread).__module__.startswith("tensorboard."):
            self._excepthook(failed)

    def write(self, split: str, step: int, metrics: Mapping[str, Number]) -> None:
        with _named(self._folder):
            for name, value in metrics.items():
                self._writer.add_scalar(f"{split}/{name}", value, step)

    def close(self) -> None:
        try:
            with _named(self._folder):
                self._writer.close()
        finally:
            threading.excepthook = self._excepthook


class Progress(abc.ABC):
    """What a user sees while a run goes on. Everything goes to stderr."""

    @abc.abstractmethod
    def start(self, step: int, total: int) -> None: ...

    @abc.abstractmethod
    def advance(self, step: int) -> None:
        """Called after every step, so it must cost next to nothing."""

    @abc.abstractmethod
    def report(self, split: str, epoch: int, step: int, metrics: Mapping[str, Number], rate: float | None) -> None:
        """New figures: `rate` in examples (or whatever the unit is) a second."""

    @abc.abstractmethod
    def evaluate(self, done: int, total: int) -> None:
        """How far the final evaluation is."""

    @abc.abstractmethod
    def message(self, text: str) -> None: ...

    @abc.abstractmethod
    def stop(self) -> None: ...


class Quiet(Progress):
    """Nothing at all."""

    def start(self, step: int, total: int) -> None:
        pass

    def advance(self, step: int) -> None:
        pass

    def report(self, split: str, epoch: int, step: int, metrics: Mapping[str, Number], rate: float | None) -> None:
        pass

    def evaluate(self, done: int, total: int) -> None:
        pass

    def message(self, text: str) -> None:
        pass

    def stop(self) -> None:
        pass


class Lines(Progress):
    """A line for each evaluation, for logs and notebooks."""

    def __init__(
        self, unit: str = "examples", stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._unit = unit
        self._stream = stream or sys.stderr
        self._clock = clock
        self._train = ""
        self._started = 0.0
        self._first = self._total = 0
        self._evaluation: tuple[float, int] | None = None  # when and where it was looked at first
        self._told = 0.0

    def start(self, step: int, total: int) -> None:
        self._first, self._total, self._started = step, total, self._clock()

    def advance(self, step: int) -> None:
        pass

    def report(self, split: str, epoch: int, step: int, metrics: Mapping[str, Number], rate: float | None) -> None:
        if split == "train":
            speed = "" if rate is None else f"  {rate:,.0f} {self._unit}/s"
            name, value = next(iter(metrics.items()))
            self._train = f"train {name} {_figure(value)}{speed}"
            return
        left = ""
        if step > self._first and split == "test":
            seconds = (self._clock() - self._started) / (step - self._first) * (self._total - step)
            left = f"  {_duration(seconds)} left"
        train = f"{self._train}  " if self._train and split == "test" else ""
        self.message(f"step {step}/{self._total}  epoch {epoch}  {train}{split} {_figures(metrics)}{left}")

    def evaluate(self, done: int, total: int) -> None:
        now = self._clock()
        if self._evaluation is None:
            self._evaluation, self._told = (now, done), now
        began, before = self._evaluation
        if now - self._told >= _QUIET_SECONDS and before < done < total:
            self._told = now
            left = (now - began) / (done - before) * (total - done)
            self.message(f"final evaluation  {done:,}/{total:,}  {_duration(left)} left")

    def message(self, text: str) -> None:
        print(text, file=self._stream, flush=True)

    def stop(self) -> None:
        pass


class Bar(Progress):
    """A live bar for terminals, with the evaluations as lines above it."""

    def __init__(self, unit: str = "examples") -> None:
        with extra("train"):
            from rich import progress
            from rich.console import Console
        self._console = Console(stderr=True, highlight=False)
        self._unit = unit
        self._progress = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TextColumn("{task.fields[figures]}"),
            progress.TimeElapsedColumn(),
            progress.TextColumn("left"),
            progress.TimeRemainingColumn(),
            console=self._console,
        )
        self._task = self._progress.add_task("train", total=None, figures="")
        self._evaluation: progress.TaskID | None = None

    def start(self, step: int, total: int) -> None:
        self._progress.update(self._task, total=total, completed=step)
        self._progress.start()

    def advance(self, step: int) -> None:
        self._progress.update(self._task, completed=step)

    def report(self, split: str, epoch: int, step: int, metrics: Mapping[str, Number], rate: float | None) -> None:
        if split == "train":
            name, value = next(iter(metrics.items()))
            speed = "" if rate is None else f"  {rate:,.0f} {self._unit}/s"
            self._progress.update(self._task, description=f"epoch {epoch}", figures=f"{name} {_figure(value)}{speed}")
        else:
            self.message(f"step {step}  epoch {epoch}  {split} {_figures(metrics)}")

    def evaluate(self, done: int, total: int) -> None:
        if self._evaluation is None:
            self._evaluation = self._progress.add_task("final evaluation", total=total, figures="")
        self._progress.update(self._evaluation, completed=done)

    def message(self, text: str) -> None:
        self._console.print(text, markup=False)

    def stop(self) -> None:
        self._progress.stop()


def make_progress(mode: ProgressMode, unit: str = "examples") -> Progress:
    """ "auto": a bar where stderr is a terminal, else lines. `unit`: what the speed is counted in."""
    if mode == "auto":
        mode = "bar" if sys.stderr.isatty() else "lines"
    modes: dict[str, Callable[[], Progress]] = {"bar": lambda: Bar(unit), "lines": lambda: Lines(unit), "quiet": Quiet}
    if mode not in modes:
        raise ValueError(f"progress: expected 'auto', 'bar', 'lines' or 'quiet', got {mode!r}")
    return modes[mode]()


def _figures(metrics: Mapping[str, Number]) -> str:
    return "  ".join(f"{name} {_figure(value)}" for name, value in metrics.items())


def _figure(value: Number) -> str:
    return f"{value:.2f}" if abs(value) >= 10 else f"{value:.3f}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
