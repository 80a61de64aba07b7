"""Training and generating with GANs through the command line."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import output, read_error
from PIL import Image

from fastgen.cli import main
from fastgen.models import GAN
from fastgen.train import read_metrics, read_run

QUICK = ["--no-tensorboard", "--device", "cpu", "--quiet"]
SMALL = ["--architecture", "mlp", "--hidden-sizes", "32", "--latent-dim", "4"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A conditional model of the 8x8 digits."""
    out = tmp_path_factory.mktemp("cli") / "run"
    arguments = ["train", "gan", "--data", "digits", *SMALL, "--conditional", "--epochs", "4", "--evaluate-every", "1"]
    assert main([*arguments, "--out", str(out), *QUICK]) == 0
    return out


@pytest.fixture(scope="module")
def waves(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of windows of two columns of a table."""
    folder = tmp_path_factory.mktemp("waves")
    time = np.arange(300)
    lines = ["date,up,down,noise", *(f"{t},{np.sin(t / 5):.4f},{np.cos(t / 5):.4f},{t % 7}" for t in time)]
    (folder / "waves.csv").write_text("\n".join(lines))
    options = ["--columns", "up,down", "--window", "16", "--architecture", "lstm", "--hidden-sizes", "8"]
    arguments = ["train", "gan", "--data", str(folder / "waves.csv"), *options, "--loss", "wasserstein"]
    assert main([*arguments, "--max-steps", "3", "--out", str(folder / "run"), *QUICK]) == 0
    return folder / "run"


def test_the_run_folder_tells_everything(run: Path) -> None:
    record = read_run(run)
    assert record["model_type"] == "gan"
    assert record["source"] == {"data": "digits"}
    assert record["model"]["num_classes"] == 10
    assert record["recipe"]["augment"] == "translation"
    table = read_metrics(run / "metrics.csv")
    distances = [float(row["frechet_distance"]) for row in table if row["split"] == "test"]
    assert len(distances) == 4
    assert distances[-1] < distances[0]
    assert table[-1]["split"] == "final"
    assert 0 < float(table[-1]["noise_floor"]) < float(table[-1]["frechet_distance"])
    trained = [row for row in table if row["split"] == "train"]
    for name in ("score_gap", "accuracy", "diversity", "generator_gradient_norm", "discriminator_gradient_norm"):
        assert all(row[name] for row in trained), name
    assert {path.name for path in run.iterdir()} == {
        *("config.json", "metrics.csv", "checkpoints", "samples", "model"),
        *("samples.png", "interpolation.png", "loss.png"),
    }


def test_it_prints_progress_and_where_everything_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["train", "gan", "--data", "digits", *SMALL, "--epochs", "1", "--no-tensorboard"]
    assert main([*arguments, "--out", str(tmp_path / "run")]) == 0
    captured = capsys.readouterr()
    assert re.search(r"step 25/25  epoch 1  train generator_loss [\d.]+ .*test frechet_distance [\d.]+", captured.err)
    assert captured.out.startswith("Frechet distance ")
    lines = captured.out.splitlines()
    assert all(Path(line.strip()).exists() for line in lines[1:-1])
    command = lines[-1].removeprefix("next: fastgen ").split()
    assert main([*command[:-1], str(tmp_path / "generated.png")]) == 0


def test_every_option_reaches_its_place(tmp_path: Path) -> None:
    options = "--loss hinge --spectral-norm --normalization layer --activation relu --lr 1e-3 --discriminator-lr 2e-3"
    options += " --betas 0,0.99 --critic-steps 2 --augment color,cutout --r1 1 --r2 2 --penalty-interval 4"
    options += " --gradient-penalty 3 --ema-decay 0.9 --schedule cosine --pictures 9 --max-steps 2 --batch-size 16"
    arguments = ["train", "gan", "--data", "digits", *SMALL, *options.split(), *QUICK]
    assert main([*arguments, "--out", str(tmp_path / "run")]) == 0
    record = read_run(tmp_path / "run")
    assert record["recipe"] == {
        "discriminator_learning_rate": 2e-3,
        "betas": [0.0, 0.99],
        "num_critic_steps": 2,
        "augment": "color,cutout",
        "r1_gamma": 1.0,
        "r2_gamma": 2.0,
        "gradient_penalty_weight": 3.0,
        "penalty_interval": 4,
        "ema_decay": 0.9,
    }
    wanted = {"loss": "hinge", "spectral_norm": True, "normalization": "layer", "activation": "relu"}
    assert {name: record["model"][name] for name in wanted} == wanted
    assert record["training"]["learning_rate"] == 1e-3
    with Image.open(tmp_path / "run" / "samples.png") as picture:
        assert picture.size == (66 * 3 + 2, 66 * 3 + 2)
    assert main(["train", "gan", "--resume", str(tmp_path / "run"), "--max-steps", "3", "--quiet"]) == 0
    assert read_metrics(tmp_path / "run" / "metrics.csv")[-2]["step"] == "3"


def test_pictures_are_those_of_the_model(run: Path, tmp_path: Path) -> None:
    model = GAN.from_pretrained(run / "model")
    out = tmp_path / "x.npy"
    arguments = ["generate", str(run), "--n", "6", "--seed", "3", "--labels", "7,1", "--out", str(out)]
    assert main(arguments) == 0
    labels = [7, 1] * 3
    torch.testing.assert_close(torch.from_numpy(np.load(out)), model.generate(6, seed=3, labels=labels))
    assert main([*arguments, "--truncation", "0.5"]) == 0
    truncated = model.generate(6, seed=3, labels=labels, truncation=0.5)
    torch.testing.assert_close(torch.from_numpy(np.load(out)), truncated)
    assert main(["generate", str(run), "--n", "12", "--columns", "6", "--out", str(tmp_path / "x.png")]) == 0
    with Image.open(tmp_path / "x.png") as picture:
        assert picture.size == (66 * 6 + 2, 66 * 2 + 2)


def test_windows_of_a_series(waves: Path, tmp_path: Path) -> None:
    record = read_run(waves)
    assert record["model"]["input_shape"] == [16, 2]
    assert record["model"]["data_range"] == pytest.approx([-1.1, 1.1], abs=1e-2)
    assert record["data"]["columns"] == ["up", "down"]
    model = GAN.from_pretrained(waves / "model")
    arguments = ["generate", str(waves), "--n", "5", "--seed", "2", "--out"]
    assert main([*arguments, str(tmp_path / "x.npy")]) == 0
    windows = np.load(tmp_path / "x.npy")
    torch.testing.assert_close(torch.from_numpy(windows), model.generate(5, seed=2))
    assert main([*arguments, str(tmp_path / "x.csv")]) == 0
    with open(tmp_path / "x.csv") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["draw", "up", "down"]
    assert len(rows) == 1 + 5 * 16
    assert [float(value) for value in rows[17][1:]] == pytest.approx(windows[1, 0].tolist(), rel=1e-5)
    assert main([*arguments, str(tmp_path / "x.png")]) == 0
    with Image.open(tmp_path / "x.png") as picture:
        assert len(picture.convert("RGB").getcolors(maxcolors=1 << 20) or []) > 20


def test_errors_name_the_options(run: Path, waves: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def error(*options: str) -> str:
        return read_error(capsys, "train", "gan", *options, "--out", str(tmp_path / "run"))

    assert error().startswith("--data: expected a folder, a file, mnist, digits, sine or mackey-glass")
    digits = ("--data", "digits")
    assert error(*digits, "--loss", "gan").startswith("--loss: expected one of minimax, ")
    assert error(*digits, "--r1", "-1") == "--r1: expected a finite number of at least 0, got -1.0"
    assert error(*digits, "--discriminator-lr", "0").startswith("--discriminator-lr: expected a finite number above 0")
    assert error(*digits, "--critic-steps", "0") == "--critic-steps: expected an int of at least 1, got 0"
    assert error(*digits, "--betas", "x") == "--betas: expected numbers with commas between them, got 'x'"
    assert error(*digits, "--betas", "0.5") == "--betas: expected two numbers, got (0.5,)"
    assert "expected one of color, translation, cutout, got 'flip'" in error(*digits, "--augment", "flip")
    assert error(*digits, "--columns", "a") == "--columns: expected none for images, got 'a'"
    assert error("--data", "sine", "--image-size", "8") == "--image-size: expected none for a series, got 8"
    assert error("--data", "sine", "--conditional") == "--conditional: expected data with labels, sine has none"
    assert error("--data", "sine", "--window", "500").startswith("test: expected at least 500 steps, a window of the")
    assert not (tmp_path / "run").exists()

    out = ("--out", str(tmp_path / "x.png"))
    message = f"--temperature: expected none, as {run} is a GAN"
    assert read_error(capsys, "generate", str(run), "--temperature", "0.5", *out) == message
    assert "--truncation: expected" in read_error(capsys, "generate", str(run), "--truncation", "0", *out)
    message = f"--labels: expected none, as {waves} makes windows of a series"
    assert read_error(capsys, "generate", str(waves), "--labels", "1", *out) == message
    assert "--out: expected a .csv" in read_error(capsys, "generate", str(waves), "--out", str(tmp_path / "folder"))


def test_a_run_of_a_vae_is_not_resumed_as_a_gan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = {"format": 1, "training": {}, "source": {"data": "digits"}, "model_type": "vae"}
    (tmp_path / "config.json").write_text(json.dumps(record))
    message = read_error(capsys, "train", "gan", "--resume", str(tmp_path))
    assert "holds a run of another model; continue it with: fastgen train vae --resume" in message


def test_its_options_are_a_file(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = output(capsys, "train", "gan", "--config", str(run), "--print-config")
    assert re.search(r"^conditional = true", text, re.MULTILINE)
    assert re.search(r'^data = "digits"', text, re.MULTILINE)
