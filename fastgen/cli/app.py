"""The commands put together."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from fastgen._version import __version__
from fastgen.cli.bench import bench
from fastgen.cli.command import Command
from fastgen.cli.doctor import doctor
from fastgen.cli.evaluate import evaluate
from fastgen.cli.generate import generate
from fastgen.cli.report import report
from fastgen.cli.train import train

__all__ = ["app"]


class _Commands(TyperGroup):
    """Lists the commands in the order in which a user comes to need them, and ends on Ctrl-C by one line."""

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        with _one_line_on_ctrl_c():  # some versions of typer take a second for what comes before the command
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: Any) -> Any:
        with _one_line_on_ctrl_c():
            return super().invoke(ctx)

    def list_commands(self, ctx: object) -> list[str]:
        order = ("train", "generate", "evaluate", "report", "bench", "doctor")
        return sorted(self.commands, key=order.index)


@contextlib.contextmanager
def _one_line_on_ctrl_c() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:  # before typer sees it: some versions of it make an error of it, others say nothing
        typer.echo("aborted", err=True)
        raise typer.Exit(128 + signal.SIGINT) from None


app = typer.Typer(
    name="fastgen",
    cls=_Commands,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Bad input ends with one line and exit code 2; FASTGEN_TRACEBACK=1 shows where it came from.",
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fastgen {__version__}")
        raise typer.Exit


@app.callback()
def _fastgen(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Generative models on hand-built CPU and CUDA kernels.

    A first run, with the data of the extra `demo`, on 5,000 digits or on Shakespeare:

        fastgen train vae --data mnist --out runs/digits

        fastgen generate runs/digits --n 64 --seed 1 --out digits.png

        fastgen train rnn --data shakespeare --out runs/plays

        fastgen generate runs/plays --prompt "HAMLET:" --stream

    Each command explains itself: fastgen train vae --help, and so on.
    """


app.add_typer(train, name="train")
app.command(cls=Command)(generate)
app.command(cls=Command)(evaluate)
app.command(cls=Command)(report)
app.command(cls=Command)(bench)
app.command(cls=Command)(doctor)
