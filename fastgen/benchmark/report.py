"""What was measured, as a table for people, JSON for programs and a picture for both."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import fastgen
from fastgen._extras import extra
from fastgen._files import atomic_path, write_text
from fastgen.benchmark import machine
from fastgen.benchmark.bounds import IN_PLACE, MULTIPLY_ADDS, NEW_MEMORY, READS
from fastgen.benchmark.case import COMPILED, CUDNN, EAGER, EFFICIENT, FLASH, OURS
from fastgen.benchmark.result import Result
from fastgen.benchmark.timing import Spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.table import Table

__all__ = ["SCHEMA", "Report", "duration", "verdict"]

SCHEMA = 1
RIVALS = (EAGER, COMPILED, FLASH, CUDNN, EFFICIENT)

Verdict = Literal["faster", "slower", "even"]
_STYLES: dict[Verdict, str] = {"faster": "green", "slower": "bold red", "even": "yellow"}
# Told apart in print and by the colour-blind.
_COLOURS = {EAGER: "#4477aa", COMPILED: "#ccbb44", FLASH: "#66ccee", CUDNN: "#228833", EFFICIENT: "#aa3377"}
_LOSS = "#cc3311"


def verdict(speedup: Spread) -> Verdict:
    """Faster or slower only where three rounds in four say so."""
    if speedup.q1 > 1:
        return "faster"
    return "slower" if speedup.q3 < 1 else "even"


def duration(seconds: float) -> str:
    """Three digits in the unit that suits: `12.3 us`, `4.56 ms`."""
    for unit, scale in (("ns", 1e-9), ("us", 1e-6), ("ms", 1e-3)):
        if seconds < 999.5 * scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds:.3g} s"


@dataclass(frozen=True)
class Report:
    """The results of one run and all that is needed to read them.

    Attributes:
        results: in the order in which they were taken.
        threads: of the cases that do not ask for their own number.
        bandwidth: bytes a second of a large copy, by kind of bound.
        settings: the options of the run.
        machine, build: see `fastgen.benchmark.machine.describe` and `fastgen.build_info`.
        created: UTC, ISO 8601.
    """

    results: Sequence[Result]
    threads: int
    bandwidth: dict[str, float]
    settings: dict[str, Any] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=machine.describe)
    build: dict[str, Any] = field(default_factory=lambda: fastgen.build_info())
    created: str = field(default_factory=lambda: datetime.now(timezone.utc).isoformat(timespec="seconds"))

    def lost(self) -> list[str]:
        """`case (rival)` of each comparison that we lose."""
        return [
            f"{result.case} ({name})"
            for result in self.results
            for name in RIVALS
            if name in result.speedups and verdict(result.speedups[name]) == "slower"
        ]

    def wrong(self) -> list[str]:
        """Cases where our own result did not pass the check."""
        return [result.case for result in self.results if OURS in result.failures]

    def disturbed(self) -> list[str]:
        """Cases with a figure that other work has spoilt."""
        return [result.case for result in self.results if result.disturbed]

    def header(self) -> list[str]:
        """Lines that name the machine and the build."""
        gpu = self.machine.get("gpu")
        none = "none, the plain PyTorch reference runs"
        if gpu is None:
            kernels = str(self.build["isa_active"]) if self.build["native"] else none
        else:
            kernels = f"cuda {', '.join(self.build['cuda_archs'])}" if self.build["cuda"] else none
        copy = {name: f"{value / 1e9:.3g} GB/s" for name, value in self.bandwidth.items()}
        load = self.machine["load"]
        busy = load is not None and load > 0.5
        return [
            f"{self.machine['cpu']}, {self.machine['cores']} cores, {self.threads} threads"
            + (f"; {gpu['name']}, {gpu['multiprocessors']} multiprocessors, CUDA {gpu['cuda']}" if gpu else "")
            + (f"; busy with other work (load {load:g}), expect swings" if busy else ""),
            f"fastgen {self.build['version']}, kernels: {kernels}; torch {self.machine['torch']}",
            f"copy (read + write): {copy[IN_PLACE]} in place, {copy[NEW_MEMORY]} into new memory",
        ]

    def tables(self) -> list[Table]:
        """One `rich` table for each family of cases."""
        families: dict[str, list[Result]] = {}
        for result in self.results:
            families.setdefault(result.case.split("/")[0], []).append(result)
        return [_table(name, results) for name, results in families.items()]

    def footer(self) -> list[str]:
        """What the columns mean, and what was lost or left out, in words (with `rich` markup)."""
        lines = [
            "Medians. A ratio is taken round by round: above 1x fastgen is faster. +-: half the interquartile range.",
            "bound: one plain pass over the bytes that have to move, and where they lie; "
            "of bound: the share of it reached (in place, into new memory). Of matrix products: "
            + (
                "their share of a large product of PyTorch's, or a copy of the bytes, whichever takes longer. "
                "Of PyTorch's attention kernels eager takes one."
                if self.machine.get("gpu")
                else "the multiply-adds on registers or the reads of the weights, whichever takes longer."
            ),
        ]
        for result in self.results:
            lines += [f"[red]{result.case}, {name}: {_escape(why)}[/]" for name, why in result.failures.items()]
        compared = sum(name in result.speedups for result in self.results for name in RIVALS)
        if lost := self.lost():
            lines.append(f"[bold red]Slower in {len(lost)} of {compared} comparisons:[/] {', '.join(lost)}")
        elif compared:
            lines.append(f"[green]Slower in none of {compared} comparisons.[/]")
        if disturbed := self.disturbed():
            lines.append(
                "[yellow]?: disturbed by other work, half of the rounds lie further apart than half the median; run "
                f"these again on a quieter machine:[/] {', '.join(disturbed)}"
            )
        return lines

    def to_dict(self) -> dict[str, Any]:
        """The content of bench.json: times in seconds, bandwidths in bytes a second."""
        content = dataclasses.asdict(self)
        for row, result in zip(content["results"], self.results, strict=True):
            row["disturbed"] = result.disturbed
        return {"schema": SCHEMA, **content}

    def write(self, folder: str | Path) -> tuple[Path, Path]:
        """Write bench.json and bench.png into `folder`; returns their paths."""
        data, picture = Path(folder) / "bench.json", Path(folder) / "bench.png"
        write_text(data, json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n")
        with atomic_path(picture) as temporary:
            self.plot(temporary)
        return data, picture

    def plot(self, path: str | Path) -> None:
        """Draw the speed-ups as bars on a log scale, a loss in red."""
        with extra("train"):
            from matplotlib.figure import Figure
            from matplotlib.patches import Patch

        shown = [result for result in self.results if any(name in result.speedups for name in RIVALS)]
        figure = Figure(figsize=(9, 1.9 + 0.45 * max(1, len(shown))), dpi=150, layout="constrained")
        axes = figure.add_subplot()
        _bars(axes, shown)
        axes.set_title("fastgen against PyTorch\n" + "\n".join(self.header()[:2]), loc="left", fontsize=9)
        legend = [Patch(**_bar_style(name), label=f"against {name}") for name in _rivals(shown)]
        legend.append(Patch(facecolor=_LOSS, label="fastgen is slower"))
        figure.legend(handles=legend, loc="outside lower center", ncols=len(legend), fontsize=8)
        figure.savefig(path)


def _escape(text: str) -> str:
    with extra("train"):
        from rich.markup import escape

    return escape(text)


def _table(family: str, results: Sequence[Result]) -> Table:
    with extra("train"):
        from rich.table import Table

    table = Table(title=family, title_justify="left", title_style="bold", header_style="bold")
    table.add_column("case", no_wrap=True)
    rate = "GFLOP/s" if any(result.flops for result in results) else "G elem/s"
    rivals = _rivals(results)
    versus = [f"vs {name}" for name in rivals]
    for column in ("fastgen", "+-", rate, *rivals, *versus, "bound", "of bound"):
        table.add_column(column, justify="right")
    for result in results:
        table.add_row(*_row(result, rivals))
    return table


def _rivals(results: Sequence[Result]) -> list[str]:
    """Those that always have a place, and those that took part."""
    return [
        name
        for name in RIVALS
        if name in (EAGER, COMPILED) or any(name in result.seconds or name in result.failures for result in results)
    ]


def _row(result: Result, rivals: Sequence[str]) -> list[str]:
    def time(name: str) -> str:
        if name in result.failures:
            return "[red]wrong[/]" if result.failures[name].startswith("wrong") else "[red]failed[/]"
        return duration(result.seconds[name].median) if name in result.seconds else "-"

    def against(name: str) -> str:
        if name not in result.speedups:
            return "-"
        speedup = result.speedups[name]
        word = verdict(speedup)
        return f"[{_STYLES[word]}]{speedup.median:.2f}x {word}[/]{_mark(speedup)}"

    ours = result.seconds.get(OURS)
    passes = [name for name in (IN_PLACE, NEW_MEMORY) if name in result.seconds]
    products = [name for name in (MULTIPLY_ADDS, READS) if name in result.seconds]
    if products:
        passes = [max(products, key=lambda name: result.seconds[name].median)]
        bound = f"{time(passes[0])} ({passes[0]})"
    else:
        bound = f"{time(IN_PLACE)} ({result.residence})" if passes else "call overhead"
    reached = [result.speedups[name] for name in passes]
    shares = [f"{share.median:.0%}{_mark(share)}" for share in reached]
    return [
        result.case.split("/", 1)[1],
        time(OURS),
        f"{ours.relative / 2:.0%}{_mark(ours)}" if ours else "-",
        f"{(result.flops or result.elements) / ours.median / 1e9:.3g}" if ours else "-",
        *map(time, rivals),
        *map(against, rivals),
        bound,
        ", ".join(shares) or "-",
    ]


def _mark(spread: Spread) -> str:
    return "[yellow]?[/]" if spread.disturbed else ""


def _bars(axes: Axes, results: Sequence[Result]) -> None:
    rivals = _rivals(results)
    height = 0.76 / len(rivals)
    for place, name in enumerate(rivals):
        for row, result in enumerate(results):
            if name not in result.speedups:
                continue
            speedup = result.speedups[name]
            word = verdict(speedup)
            centre = row + (place - (len(rivals) - 1) / 2) * height
            style = _bar_style(name) | ({"facecolor": _LOSS} if word == "slower" else {})
            axes.barh(centre, speedup.median - 1, height, left=1, **style)
            axes.annotate(
                f"{speedup.median:.3g}x{'' if word == 'faster' else f' {word}'}{'?' if speedup.disturbed else ''}",
                (max(speedup.median, 1), centre),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize=7,
                color=_LOSS if word == "slower" else "black",
            )
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xscale("log")
    axes.margins(x=0.12)  # room for the numbers
    axes.set_xlabel("times as fast as PyTorch, log scale (1 = even; red, left of it: fastgen is slower)", fontsize=8)
    axes.xaxis.set_major_formatter("{x:g}x")
    axes.grid(axis="x", which="major", alpha=0.3)
    axes.set_axisbelow(True)
    axes.set_yticks(range(len(results)), [result.case for result in results], fontsize=8)
    axes.set_ylim(max(1, len(results)) - 0.4, -0.6)


def _bar_style(rival: str) -> dict[str, Any]:
    return {"facecolor": _COLOURS[rival], "edgecolor": "white", "hatch": "//" if rival == COMPILED else ""}
