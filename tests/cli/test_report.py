"""`fastgen report` on a run of the command line's own."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from commands import output, read_error

from fastgen.cli import main
from fastgen.report import speed


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    np.save(folder / "squares.npy", np.random.default_rng(0).integers(256, size=(40, 8, 8), dtype=np.uint8))
    options = ["--architecture", "mlp", "--hidden-sizes", "8", "--batch-size", "8", "--epochs", "2", "--quiet"]
    options += ["--no-tensorboard", "--importance-samples", "2"]
    data, out = str(folder / "squares.npy"), folder / "run"
    assert main(["train", "vae", "--data", data, *options, "--out", str(out)]) == 0
    return out


def test_a_run_and_its_page(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "report.html"
    assert output(capsys, "report", str(run), "--out", str(out), "--no-speed").startswith(f"wrote {out} (1 run, ")
    html = out.read_text()
    assert "Variational autoencoder on squares" in html
    assert html.count("data:image/png") >= 4  # two samples, reconstructions, interpolation
    assert re.search(r"\d threads?</dd>", html)  # the machine that the run was started on
    assert "Speed against" not in html


def test_speed_is_timed(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = speed.case_of("vae")
    assert case is not None
    monkeypatch.setattr(speed, "case_of", lambda family: case.shrunk())
    monkeypatch.setattr(speed, "_SECONDS", 0.0)
    out = tmp_path / "report.html"
    assert main(["report", str(run), "--out", str(out)]) == 0
    assert capsys.readouterr().err == f"timing {case.shrunk().name}\n"
    html = out.read_text()
    assert "Speed against plain PyTorch" in html
    assert case.shrunk().name in html


def test_errors_are_a_line(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "Missing argument" in read_error(capsys, "report")
    assert read_error(capsys, "report", str(tmp_path)) == f"{tmp_path}: not a run folder, it has no config.json"
    assert "--out: expected a file that ends in .html" in read_error(capsys, "report", str(run), "--out", "x.txt")
    assert "given twice" in read_error(capsys, "report", str(run), str(run))
    assert not Path("x.txt").exists()
