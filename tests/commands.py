"""What tests of the command line share."""

from __future__ import annotations

import pytest

from fastgen.cli import main


def read_error(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The last line of the error that the command ends with."""
    capsys.readouterr()
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err.splitlines()[-1].removeprefix("error: ")


def output(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What the command prints."""
    capsys.readouterr()
    assert main(arguments) == 0
    return capsys.readouterr().out
