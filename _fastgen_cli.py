"""The program `fastgen`.

It stands outside the package because the package is imported before its first line of code runs, which takes
seconds and fails where an environment variable asks for what cannot be.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from types import FrameType

__all__ = ["main"]


def main() -> int:
    """Run the command line; exit codes as `fastgen.cli.main`."""
    try:
        with _ctrl_c_ends_at_once():
            import fastgen.cli

            with contextlib.suppress(ModuleNotFoundError):  # fastgen.cli.main says which extra is missing
                import fastgen.cli.app
    except RuntimeError as error:
        # The package's own complaints about the environment begin with the variable.
        if not str(error).startswith("FASTGEN_") or os.environ.get("FASTGEN_TRACEBACK", "0") not in ("", "0"):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    return fastgen.cli.main()


@contextlib.contextmanager
def _ctrl_c_ends_at_once() -> Iterator[None]:
    """For imports: nothing has to be cleaned up, and some of them would swallow a KeyboardInterrupt."""
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:  # a shell's `&` ignores Ctrl-C, say
        yield
        return

    def leave(number: int, frame: FrameType | None) -> None:
        os.write(2, b"aborted\n")
        os._exit(128 + number)

    signal.signal(signal.SIGINT, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
