"""`fastgen bench`: our kernels against PyTorch on this machine."""

from __future__ import annotations

import os
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["bench"]

_BUDGETS = {False: (0.5, 7), True: (4.0, 21)}  # --full: seconds and least rounds a case


def bench(
    full: Annotated[
        bool, typer.Option("--full/--quick", help="All cases, about ten minutes; or those that tell most, about two.")
    ] = False,
    threads: Annotated[
        int | None, typer.Option(help="CPU threads. [default: as many as PyTorch uses]", show_default=False)
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    filter: Annotated[str, typer.Option(help="Only cases with this in their name, such as reparam or lstm.")] = "",
    compile: Annotated[
        bool, typer.Option("--compile/--no-compile", help="Whether torch.compile takes part (needs a C++ compiler).")
    ] = True,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for bench.json and bench.png. [default: runs/bench-TIME]",
            show_default=False,
            file_okay=False,
        ),
    ] = None,
) -> None:
    """Time fastgen against PyTorch and torch.compile on this machine.

    Every answer is checked before it is timed; rivals take turns, so that a busy machine slows all of them
    alike; beside them runs a plain pass over the same bytes, which nothing can beat. Close other programs all
    the same: the column +- tells how much the machine swung, and a figure with a ? was disturbed too much to
    be used. Exit code 1 if an answer of fastgen is wrong.

    Examples:

        fastgen bench

        fastgen bench --full --threads 1 --out runs/bench-1-thread

        fastgen bench --filter reparam --no-compile

        fastgen bench --device cuda --filter attention
    """
    import torch
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from fastgen import _validate
    from fastgen._extras import extra
    from fastgen.benchmark import Report, bandwidth, machine, measure, select

    with extra("train"):
        import matplotlib.figure  # noqa: F401  (it draws last: find it missing now, not after the minutes)

    if threads is not None and threads < 1:
        raise ValueError(f"threads: expected an int of at least 1, got {threads}")
    if device not in ("cpu", "cuda"):
        raise ValueError(f"--device: expected cpu or cuda, got {device!r}")
    if device == "cuda":
        _validate.cuda_is_there("--device", "cpu")
    count = threads or torch.get_num_threads()
    cases = select(full=full, filter=filter, threads=count, device=device)
    folder = out or Path("runs") / f"bench-{datetime.now():%Y%m%d-%H%M%S}"
    folder.mkdir(parents=True, exist_ok=True)  # an error here comes before the minutes, not after them
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"out: cannot write into {folder}")

    before = machine.describe(device)  # with the load of the machine before ours

    # Into a file or a pipe the tables take the width that they need.
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    budget, min_rounds = _BUDGETS[full]
    results = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("copy bandwidth", total=len(cases))
        copy = bandwidth(count, device=device)
        for case in cases:
            progress.update(task, description=case.name)
            results.append(measure(case, threads=count, budget=budget, min_rounds=min_rounds, compile=compile))
            progress.advance(task)

    settings: dict[str, object] = {"full": full, "filter": filter, "compile": compile, "device": device}
    settings |= {"budget": budget, "min_rounds": min_rounds}
    report = Report(results=results, threads=count, bandwidth=copy, settings=settings, machine=before)
    for line in report.header():
        console.print(line, highlight=False)
    for table in report.tables():
        console.print()
        console.print(table)
    console.print()
    for line in report.footer():
        console.print(line, highlight=False, soft_wrap=True)
    for path in report.write(folder):
        console.print(f"wrote {path}", highlight=False, soft_wrap=True)
    if report.wrong():
        raise typer.Exit(1)
