"""The set-up of `make`: it says what it does, and what failed, with a Python and a pip that only pretend."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from support import ROOT

pytestmark = pytest.mark.skipif(not shutil.which("make"), reason="needs make")

# As python: `-m venv DIR` makes an environment of itself; all else is written down and succeeds, or fails if told to.
STAND_IN = """#!/bin/sh
echo "$@" >> "{calls}"
[ "$1 $2" = "-m venv" ] && mkdir -p "$3/bin" && cp "$0" "$3/bin/python" && cp "$0" "$3/bin/fastgen"
case "$*" in *"$FAILING"*) echo "no space left"; exit 1;; esac
[ "$1" = "-c" ] || echo noise
"""


@pytest.fixture
def make(tmp_path: Path):
    """Runs make on a copy of what it looks at; returns the exit code, the output and the calls."""
    for name in ("Makefile", "pyproject.toml", "setup.py", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("csrc", "fastgen"):
        (tmp_path / name).mkdir()
    calls, python = tmp_path / "calls", tmp_path / "python"
    python.write_text(STAND_IN.format(calls=calls))
    python.chmod(0o755)

    def run(target: str, failing: str = "nothing of this name") -> tuple[int, str, list[str]]:
        calls.write_text("")
        command = ["make", "--no-print-directory", target, f"PYTHON={python}", "VENV=env", "MAKEFLAGS="]
        environment = {**os.environ, "FAILING": failing}
        ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        return ended.returncode, ended.stdout + ended.stderr, calls.read_text().splitlines()

    return run


PHASES = [
    "Making an environment in env",
    "Downloading and installing PyTorch (200 MB; a CUDA build some GB)",
    "Compiling the kernels (minutes; CUDA ones too where nvcc is)",
    "Installing the packages of the extra test",
]


def test_each_phase_is_a_line_with_its_time(make) -> None:
    code, output, calls = make("test")
    assert code == 0, output
    lines = output.splitlines()
    assert all(re.fullmatch(r".* \.\.\. \d+ s", line) for line in lines[:4])
    assert [line.split(" ...")[0] for line in lines[:4]] == PHASES
    # The log of the tests ends with their summary, here the noise.
    tests, summary, benchmarks = lines[4:]
    assert tests.startswith("Running the tests (some minutes) ... ")
    assert summary == "noise"
    assert benchmarks.startswith("Running each benchmark once ... ")
    assert any("pytest -n" in call for call in calls)


def test_what_is_done_is_not_done_again(make) -> None:
    make("test")
    code, output, calls = make("test")
    assert code == 0
    assert len(output.splitlines()) == 3
    assert not any("pip" in call for call in calls)
    # Another extra asks for packages, not for another compilation.
    _, output, calls = make("demo")
    assert output.splitlines()[0].startswith("Installing the packages of the extra demo ... ")
    assert sum("pip" in call for call in calls) == 1


@pytest.mark.parametrize(
    ("failing", "phase"),
    [
        ("--editable", "Compiling the kernels (minutes; CUDA ones too where nvcc is)"),
        ("pytest -n", "Running the tests (some minutes)"),
    ],
)
def test_a_failure_shows_the_output(failing: str, phase: str, make) -> None:
    code, output, _ = make("test", failing)
    assert code != 0
    assert f"{phase} ... failed\nno space left\n" in output
    # And it is tried again the next time.
    assert make("test")[0] == 0


def test_the_demo_ends_with_a_page_about_its_runs(make, tmp_path: Path) -> None:
    for name in ("demo-gpt", "demo-other"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    code, output, calls = make("demo")
    assert code == 0, output
    assert "train vae --data mnist --out runs/demo" in calls
    # Of those that are there, whatever was trained of text.
    assert calls[-1] == "report runs/demo runs/demo-gpt --out runs/demo-report.html"
