"""The command line, `fastgen`: it needs the extra `train`, but this module imports without it."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence

__all__ = ["main"]

_TRACEBACK = "FASTGEN_TRACEBACK"
# How torch's CPU allocator fails: by its own words, or inside an op of the stable ABI, which loses them.
_NO_MEMORY = (
    "can't allocate memory",
    "Storage size calculation overflowed",
    '"aten::empty"',
    "aoti_torch_empty_strided",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Bad input is one line on stderr and exit code 2, Ctrl-C one line and 130. With FASTGEN_TRACEBACK=1 in the
    environment every error shows where it came from.

    Args:
        arguments: default those of the process.
    """
    try:
        import rich  # noqa: F401 (typer does without, the commands do not)

        from fastgen.cli.app import app
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        return _fail(f"{error.name} is not installed: pip install 'fastgen-torch[train]'")
    try:
        code = app(
            args=None if arguments is None else list(arguments),
            prog_name="fastgen",
            standalone_mode=False,
        )
    except KeyboardInterrupt:  # while typer puts the commands together; in a command it is theirs
        print("aborted", file=sys.stderr)
        return 128 + signal.SIGINT
    except Exception as error:
        message = _one_line(error)
        if message is None or os.environ.get(_TRACEBACK, "0") not in ("", "0"):
            raise
        return _fail(message)
    return code if isinstance(code, int) else 0


def _one_line(error: Exception) -> str | None:
    """What to tell the user, or None for an error that is a bug rather than bad input."""
    import torch
    import typer

    if isinstance(error, typer.Abort):
        return "aborted"
    if hasattr(error, "format_message"):  # typer's own; their class moved between its versions
        text = error.format_message()
    elif isinstance(error, torch.OutOfMemoryError):
        text = f"the device is out of memory; try a smaller --batch-size ({error})"
    elif isinstance(error, OSError) and error.filename is not None:  # of the system: without its number
        text = f"{error.filename}: {error.strerror}"
    elif isinstance(error, (ValueError, OSError, ImportError, MemoryError, ArithmeticError)):
        text = str(error) or type(error).__name__
    elif isinstance(error, RuntimeError) and any(sign in str(error) for sign in _NO_MEMORY):
        text = "not enough memory for so much at once"
    else:
        return None
    return " ".join(text.split())


def _fail(message: str) -> int:
    if message:  # typer has none where it printed the help instead
        print(f"error: {message}", file=sys.stderr)
    return 2
