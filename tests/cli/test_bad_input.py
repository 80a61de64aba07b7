"""Bad input, full disks and Ctrl-C: one line that names the file and the place, and an exit code, in every family."""

from __future__ import annotations

import io
import json
import re
import resource
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import numpy as np
import pytest
from commands import read_error
from PIL import Image

from fastgen import __version__
from fastgen.cli import main
from fastgen.train import read_run

FAMILIES = ("vae", "gan", "rnn", "gpt")


def png() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(256, size=(64, 64), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    np.save(folder / "images.npy", np.arange(40 * 64, dtype=np.uint8).reshape(40, 8, 8))
    (folder / "play.txt").write_text("Who's there?\nNay, answer me.\n" * 20)
    for family in FAMILIES:
        arguments = [*train(family, folder), "--out", str(folder / family), "--max-steps", "4"]
        assert main(arguments) == 0
    return {family: folder / family for family in FAMILIES}


def train(family: str, folder: Path) -> list[str]:
    """A run whose files are a few kB."""
    text = f"--data {folder}/play.txt --hidden-size 8 --num-layers 1 --seq-len 9 --sample-length 5"
    options = {
        "vae": f"--data {folder}/images.npy --architecture mlp --hidden-sizes 8 --latent-dim 2 --importance-samples 2",
        "gan": f"--data {folder}/images.npy --architecture mlp --hidden-sizes 8 --latent-dim 2",
        "rnn": text,
        "gpt": f"{text} --num-heads 2 --tokenizer chars",
    }
    return ["train", family, *options[family].split(), "--no-tensorboard", "--batch-size", "4", "--quiet"]


@pytest.mark.parametrize(
    ("family", "files", "message"),
    [
        ("vae", {"a/good.png": png(), "b/cut.png": png()[:900]}, "b/cut.png: not a readable image (image file is tru"),
        ("vae", {"a/good.png": png(), "b/zero.png": b""}, "b/zero.png: not a readable image (cannot identify"),
        ("vae", {"a/good.png": png(), "b/words.jpg": b"words"}, "b/words.jpg: not a readable image (cannot identify"),
        ("vae", {"notes.txt": b"words"}, ": expected images, found none (1 other file)"),
        ("vae", {}, ": expected images, found none (0 other files)"),
        (
            "rnn",
            {"a.txt": b"good\n", "b.txt": b"1\ncaf\xe9\n"},
            "b.txt: not UTF-8 text: byte 0xe9 at offset 5 (line 2)",
        ),
        (
            "gpt",
            {"a.txt": b"good\n", "b.txt": b"1\ncaf\xe9\n"},
            "b.txt: not UTF-8 text: byte 0xe9 at offset 5 (line 2)",
        ),
        ("rnn", {"empty.txt": b""}, ": expected text files, found none (0 other files)"),
        ("gpt", {"picture.png": png()}, ": expected text files, found none (1 other files)"),
    ],
)
def test_folders(
    family: str, files: dict[str, bytes], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    out = tmp_path / "run"
    error = read_error(capsys, "train", family, "--data", str(folder), "--out", str(out))
    assert error.startswith(f"{folder}{'' if message[0] == ':' else '/'}{message}")
    assert not out.exists()


@pytest.mark.parametrize(
    ("family", "name", "content", "message"),
    [
        ("vae", "x.npy", b"", "not a readable .npy file (No data left in file)"),
        ("vae", "x.npz", b"PK\x03\x04", "not a readable .npz file (File is not a zip file)"),
        ("vae", "x.png", b"", "expected a folder, an IDX file (idx3 in its name, or .gz), a .npy or a .npz file"),
        ("rnn", "x.txt", b"", "expected text, got an empty file"),
        ("gpt", "x.txt", b"\xff\xfeh\0", "expected UTF-8, got UTF-16; convert it with: iconv -f UTF-16 -t UTF-8"),
        ("rnn", "x.csv", b"", "expected rows of numbers, got an empty file"),
        ("rnn", "x.csv", b"a,b\n1,2\n3,\n", "line 3, column 'b': expected a number, got nothing"),
        (
            "rnn",
            "x.csv",
            b"a,b\nred,2\nblue,4\n",
            "line 2, column 'a': expected a number, got 'red'; --time-column a leaves it out",
        ),
        ("rnn", "x.csv", b"a,b\n1,2\n3\n", "line 3: expected 2 columns as in line 1, apart by ',', got 1"),
        ("rnn", "x.npy", b"", "not a readable .npy file (No data left in file)"),
    ],
)
def test_files(
    family: str, name: str, content: bytes, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = tmp_path / name, tmp_path / "run"
    path.write_bytes(content)
    assert read_error(capsys, "train", family, "--data", str(path), "--out", str(out)) == f"{path}: {message}"
    assert not out.exists()


@pytest.fixture
def copied(request: pytest.FixtureRequest, runs: dict[str, Path], tmp_path: Path) -> Path:
    """A run of its own for a test that spoils it."""
    return Path(shutil.copytree(runs[request.getfixturevalue("family")], tmp_path / "run"))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_of_a_newer_fastgen(family: str, copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = read_run(copied)
    assert record["format"] == 1
    record |= {"format": 2, "versions": {"fastgen": "9.1.0"}}
    (copied / "config.json").write_text(json.dumps(record))
    expected = (
        f"{copied}/config.json: expected a run folder of format 1 or older, as this is fastgen {__version__}, "
        "got format 2 of fastgen 9.1.0"
    )
    assert read_error(capsys, "train", family, "--resume", str(copied)) == expected
    assert read_error(capsys, "train", family, "--config", str(copied)) == expected
    assert read_error(capsys, "generate", str(copied)) == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_of_an_older_fastgen(family: str, copied: Path) -> None:
    """Before there was a number, dtype had another name, and there were no options to take over."""
    record = read_run(copied)
    for name in ("format", "options"):
        del record[name]
    del record["training"]["dtype"], record["training"]["compile"]
    record["training"]["mixed_precision"] = "no"
    (copied / "config.json").write_text(json.dumps(record))
    assert read_run(copied)["training"]["dtype"] == "float32"
    assert main(["train", family, "--resume", str(copied), "--max-steps", "5", "--quiet"]) == 0
    record = read_run(copied)
    assert (record["format"], record["training"]["max_steps"]) == (1, 5)
    assert "mixed_precision" not in (copied / "config.json").read_text()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_damaged_run(family: str, copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (checkpoint,) = (copied / "checkpoints").iterdir()
    whole = checkpoint.read_bytes()
    resume = ("train", family, "--resume", str(copied), "--max-steps", "6", "--quiet")
    for content in (b"", whole[:5], whole[:-9], b"\xff" * len(whole)):
        checkpoint.write_bytes(content)
        assert read_error(capsys, *resume).startswith(f"{checkpoint}: damaged checkpoint (")
    shutil.copy(copied / "model" / "model.safetensors", checkpoint)
    assert read_error(capsys, *resume) == f"{checkpoint}: expected a checkpoint of format 'fastgen-checkpoint-1'"
    checkpoint.write_bytes(whole)
    for content in ("", "{", "[]", '{"model_type": "vae"}', "\0"):
        (copied / "config.json").write_text(content)
        assert read_error(capsys, *resume).startswith(str(copied))
        assert read_error(capsys, "generate", str(copied)).startswith(str(copied))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_of_another_family(family: str, runs: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    other = FAMILIES[FAMILIES.index(family) - 1]
    go_on = f"fastgen train {other} --resume {runs[other]}"
    error = read_error(capsys, "train", family, "--resume", str(runs[other]))
    assert error == f"{runs[other]}: holds a run of another model; continue it with: {go_on}"


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """A disk that is full when a file has `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("size", "message"),
    [
        (100, "/(config|tokenizer).json: File too large"),
        (12_000, r"/checkpoints/step-00000003.safetensors: cannot write the checkpoint: .*File too large.*"),
    ],
)
def test_a_full_disk(
    family: str,
    size: int,
    message: str,
    runs: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "run"
    arguments = [*train(family, runs["vae"].parent), "--max-steps", "3", "--out", str(out)]
    with largest_file(size):
        assert re.fullmatch(f"{out}{message}", read_error(capsys, *arguments))
    assert not list(out.rglob(".*"))  # nothing half written
    if (out / "config.json").exists():  # with room again, the run goes on
        assert main(["train", family, "--resume", str(out), "--quiet"]) == 0


@pytest.mark.parametrize(("tensorboard", "name"), [("--tensorboard", "events"), ("--no-tensorboard", "metrics.csv")])
def test_a_disk_that_is_full_between_checkpoints(
    tensorboard: str, name: str, runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, hook = tmp_path / "run", threading.excepthook
    rows = ["--log-every", "1", "--epochs", "50", "--evaluate-every", "50", tensorboard]
    arguments = [*train("vae", runs["vae"].parent), *rows, "--out", str(out)]
    with largest_file(12_000):
        assert main(arguments) == 2
    assert capsys.readouterr().err == f"error: {out}/{name}: File too large\n"
    assert threading.excepthook is hook
    assert main(["train", "vae", "--resume", str(out), "--epochs", "2", "--quiet"]) == 0


def test_a_disk_that_is_full_when_a_model_is_saved(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from fastgen.models import VAE

    model = VAE.from_pretrained(runs["vae"] / "model")
    message = f"^{tmp_path}/model/model.safetensors: cannot write the weights"
    with largest_file(500), pytest.raises(OSError, match=message):
        model.save_pretrained(tmp_path / "model")
    with largest_file(500):
        error = read_error(capsys, "generate", str(runs["vae"]), "--out", str(tmp_path / "x.npy"))
    assert error.startswith(f"{tmp_path}/x.npy: ")
    assert not list(tmp_path.rglob("*.*"))


@pytest.mark.parametrize(
    ("command", "place", "message"),
    [
        ("train", "typer.core.TyperGroup.make_context", "aborted"),
        ("train", "fastgen.cli.train.vae.load_images", "aborted"),
        ("train", "fastgen.train.vae.VAERecipe.train_step", "stopped after step 1 of "),
        ("train", "fastgen.train.vae.VAERecipe.save_pretrained", "stopped after step 2 of 2"),
        ("train", "fastgen.train.vae.VAERecipe.save_report", "stopped after step 2 of 2"),
        ("generate", "fastgen.models.vae.VAE.generate", "aborted"),
        ("generate", "fastgen.cli.generate.images.save_png", "aborted"),
    ],
)
def test_ctrl_c(
    command: str,
    place: str,
    message: str,
    runs: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    called = resolve_name(place)
    pressed = []

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        if not pressed:
            pressed.append(place)
            signal.raise_signal(signal.SIGINT)
        return called(*args, **kwargs)

    monkeypatch.setattr(place, interrupted)
    out = ["--out", str(tmp_path / "out")]
    if command == "train":
        arguments = [*train("vae", runs["vae"].parent), *out, "--max-steps", "2"]
    else:
        arguments = ["generate", str(runs["vae"]), *out]
    capsys.readouterr()
    assert main(arguments) == 130
    captured = capsys.readouterr()
    assert pressed
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith(message)
    if message != "aborted":
        go_on = line.split("; to go on: fastgen ")[1].split()
        assert main([*go_on, "--quiet"]) == 0
