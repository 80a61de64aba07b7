"""`fastgen bench` from the command line to the files."""

import json
import os

import pytest
import torch
import typer
from PIL import Image
from typer.testing import CliRunner

import fastgen
from fastgen.benchmark import bounds
from fastgen.benchmark import random as random_cases
from fastgen.benchmark.case import WrongResult
from fastgen.cli.bench import bench

app = typer.Typer()
app.command()(bench)

SMALL = [
    random_cases.RandomCase(distribution="normal", shape=(5000,)),
    random_cases.RandomCase(distribution="uniform", shape=(40_000,), threads=1),
]


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs the command on small cases, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(random_cases, "cases", lambda full: SMALL)
    ops = ("reparameterize", "recurrent", "generate", "attention", "linear", "activation")
    for name in (*ops, "vae", "gan", "rnn", "gpt"):
        family = getattr(fastgen.benchmark, name)
        monkeypatch.setattr(family, "cases", lambda full: [])
    monkeypatch.setattr(
        fastgen.benchmark, "bandwidth", lambda threads, device: {bounds.IN_PLACE: 2e10, bounds.NEW_MEMORY: 4e9}
    )
    monkeypatch.setattr("fastgen.cli.bench._BUDGETS", {False: (0.0, 3), True: (0.0, 5)})
    return lambda *arguments: CliRunner().invoke(app, list(arguments))


def test_prints_the_table_and_writes_the_files(run, tmp_path):
    before = torch.get_num_threads()
    result = run("--out", "figures", "--threads", "2")
    assert result.exit_code == 0, result.output
    assert "normal/fp32/5000" in result.output
    assert "uniform/fp32/40000/1-thread" in result.output
    assert f"torch {torch.__version__}" in result.output
    assert f"wrote {os.path.join('figures', 'bench.json')}" in result.output
    content = json.loads((tmp_path / "figures" / "bench.json").read_text())
    assert [(row["case"], row["threads"], row["rounds"]) for row in content["results"]] == [
        ("random/normal/fp32/5000", 2, 3),
        ("random/uniform/fp32/40000/1-thread", 1, 3),
    ]
    assert content["build"] == json.loads(json.dumps(fastgen.build_info()))
    assert content["settings"]["full"] is False
    with Image.open(tmp_path / "figures" / "bench.png") as picture:
        assert picture.format == "PNG"
    assert torch.get_num_threads() == before


def test_writes_under_runs_by_default_and_full_takes_more_rounds(run, tmp_path):
    result = run("--full", "--filter", "normal")
    assert result.exit_code == 0, result.output
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("bench-")
    content = json.loads((folder / "bench.json").read_text())
    assert [(row["case"], row["rounds"]) for row in content["results"]] == [("random/normal/fp32/5000", 5)]


def test_a_wrong_answer_of_ours_is_exit_code_1(run, monkeypatch):
    def check(case, rival, function, inputs):
        if rival == "fastgen":
            raise WrongResult("mean 3 instead of 0")

    monkeypatch.setattr(random_cases.RandomCase, "check", check)
    result = run("--filter", "normal", "--out", "figures")
    assert result.exit_code == 1
    assert "random/normal/fp32/5000, fastgen: wrong result: mean 3 instead of 0" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--threads", "0"], "threads: expected an int of at least 1, got 0"),
        (["--filter", "diffusion"], "filter: expected a part of the name of a case"),
    ],
)
def test_bad_arguments_are_named_before_anything_runs(run, monkeypatch, arguments, message):
    monkeypatch.setattr(fastgen.benchmark, "measure", None)
    result = run(*arguments)
    assert isinstance(result.exception, ValueError)
    assert message in str(result.exception)


def test_a_folder_that_cannot_be_made_is_found_before_the_minutes(run, tmp_path, monkeypatch):
    monkeypatch.setattr(fastgen.benchmark, "measure", None)
    (tmp_path / "file").write_text("")
    result = run("--out", "file/figures")
    assert isinstance(result.exception, NotADirectoryError)


def test_help_teaches(run):
    text = CliRunner(env={"COLUMNS": "200", "TERM": "dumb"}).invoke(app, ["--help"]).output
    for word in ("--quick", "--full", "--threads", "--filter", "--no-compile", "--out", "Examples", "bench.png"):
        assert word in text


def test_a_device_that_is_not_there(run, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for device, message in (("tpu", "expected cpu or cuda, got 'tpu'"), ("cuda", "PyTorch finds no CUDA device")):
        result = run("--device", device)
        assert isinstance(result.exception, ValueError)
        assert message in str(result.exception)
