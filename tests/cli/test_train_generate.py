"""Training and generating through the command line, from data on disk to pictures."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastgen.cli import main
from fastgen.models import VAE, VAEConfig
from fastgen.train import read_metrics, read_run

TRAIN = [
    *("train", "vae", "--data", "digits", "--architecture", "mlp", "--hidden-sizes", "64", "--latent-dim", "4"),
    *("--importance-samples", "10", "--no-tensorboard", "--conditional"),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A conditional model of the 8x8 digits."""
    out = tmp_path_factory.mktemp("cli") / "run"
    assert main([*TRAIN, "--out", str(out), "--epochs", "8", "--quiet"]) == 0
    return out


def read_error(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    return line.removeprefix("error: ")


def test_the_run_folder_tells_everything(run: Path) -> None:
    record = read_run(run)
    assert record["source"] == {"data": "digits"}
    assert record["data"]["name"] == "digits"
    assert record["data"]["train"] + record["data"]["test"] == 1797
    assert record["model"]["num_classes"] == 10
    assert record["training"]["epochs"] == 8
    assert record["command"][0] == "fastgen"
    table = read_metrics(run / "metrics.csv")
    bounds = [float(row["negative_elbo"]) for row in table if row["split"] == "test"]
    assert len(bounds) == 8
    assert bounds[-1] < bounds[0] - 2
    assert table[-1]["split"] == "final"
    assert float(table[-1]["negative_iwae"]) < bounds[-1]


def test_it_prints_progress_and_where_everything_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert main([*TRAIN, "--out", str(out), "--epochs", "1"]) == 0
    captured = capsys.readouterr()
    assert "1,797 images of 1x8x8" in captured.err
    assert re.search(r"step 25/25  epoch 1  train loss [\d.]+ .*test negative_elbo [\d.]+", captured.err)
    assert captured.out.startswith("test negative ELBO ")
    for line in captured.out.splitlines()[1:-1]:
        assert Path(line.strip()).exists()
    command = captured.out.splitlines()[-1].removeprefix("next: fastgen ").split()
    assert main([*command[:-1], str(tmp_path / "generated.png")]) == 0


def test_the_same_out_again_offers_to_resume(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (run / "metrics.csv").read_bytes()
    message = read_error(capsys, *TRAIN, "--out", str(run), "--quiet")
    assert f"holds a run already; continue it with --resume {run}" in message
    assert (run / "metrics.csv").read_bytes() == before


def test_a_resumed_run_may_take_a_cheaper_final_evaluation(tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert main([*TRAIN, "--out", str(out), "--max-steps", "2", "--quiet"]) == 0
    before = read_metrics(out / "metrics.csv")[-1]
    assert main(["train", "vae", "--resume", str(out), "--importance-images", "20", "--quiet"]) == 0
    after = read_metrics(out / "metrics.csv")[-1]
    assert before["negative_elbo"] == after["negative_elbo"]
    assert before["negative_iwae"] != after["negative_iwae"]
    assert read_run(out)["evaluation"] == {
        "num_importance_samples": 10,
        "num_importance_images": 20,
        "num_pictures": 64,
    }


def test_a_damaged_resume(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"training": {"epocs": 3}, "source": {"data": "digits"}}))
    message = read_error(capsys, "train", "vae", "--resume", str(tmp_path))
    assert "its config.json is not of this version of fastgen" in message
    (tmp_path / "config.json").write_text(json.dumps({"training": {}}))
    assert "was started from Python" in read_error(capsys, "train", "vae", "--resume", str(tmp_path))


def test_a_grid_is_a_function_of_the_seed(run: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        out = str(tmp_path / f"{name}.png")
        assert main(["generate", str(run), "--n", "12", "--seed", str(seed), "--columns", "6", "--out", out]) == 0
    a, b, c = ((tmp_path / f"{name}.png").read_bytes() for name in "abc")
    assert a == b != c
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size == (66 * 6 + 2, 66 * 2 + 2)
        levels = np.array(picture)
    assert levels.min() < 60
    assert len(np.unique(levels)) > 50


def test_arrays_and_folders_have_the_models_own_images(run: Path, tmp_path: Path) -> None:
    model = VAE.from_pretrained(run / "model")
    expected = model.generate(12, seed=3, labels=[7, 1] * 6)
    options = ["--n", "12", "--seed", "3", "--labels", "7,1"]
    assert main(["generate", str(run / "model"), *options, "--out", str(tmp_path / "x.npy")]) == 0
    array = np.load(tmp_path / "x.npy")
    assert (array.shape, array.dtype) == ((12, 1, 8, 8), np.float32)
    torch.testing.assert_close(torch.from_numpy(array), expected)
    assert main(["generate", str(run), *options, "--out", str(tmp_path / "folder")]) == 0
    assert sorted(path.name for path in (tmp_path / "folder").iterdir()) == [f"{i:02d}.png" for i in range(12)]
    with Image.open(tmp_path / "folder" / "05.png") as picture:
        assert np.abs(np.array(picture) / 255 - expected[5, 0].numpy()).max() <= 0.5 / 255 + 1e-6


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_generation_in_another_dtype(dtype: str, run: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.npy"
    assert main(["generate", str(run), "--n", "5", "--seed", "3", "--dtype", dtype, "--out", str(out)]) == 0
    expected = VAE.from_pretrained(run / "model", dtype=getattr(torch, dtype)).generate(5, seed=3)
    assert expected.dtype == getattr(torch, dtype)
    assert np.load(out).dtype == np.float32
    torch.testing.assert_close(torch.from_numpy(np.load(out)), expected.float())


@pytest.mark.parametrize(
    ("names", "text", "labels"),
    [
        (("cat", "dog", "fox"), "dog,cat", [1, 0]),
        (("cat", "dog", "fox"), "2, dog", [2, 1]),
        (("cat", "dog, wet"), "dog, wet", [1]),
        (("1", "2", "3"), "1", [0]),  # the class of that name, not the one of that number
    ],
)
def test_labels_are_names_or_numbers(
    names: tuple[str, ...], text: str, labels: list[int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = VAEConfig(input_shape=(1, 8, 8), hidden_sizes=(8,), architecture="mlp", num_classes=len(names))
    (tmp_path / "config.json").write_text(json.dumps({"training": {}, "data": {"classes": names}}))
    model = VAE(config)
    model.save_pretrained(tmp_path / "model")
    out = tmp_path / "x.npy"
    assert main(["generate", str(tmp_path), "--n", "4", "--seed", "3", "--labels", text, "--out", str(out)]) == 0
    expected = model.generate(4, seed=3, labels=(labels * 4)[:4])
    torch.testing.assert_close(torch.from_numpy(np.load(out)), expected)
    capsys.readouterr()

    # On its own the model knows numbers alone.
    model.save_pretrained(tmp_path / "alone")
    arguments = ["generate", str(tmp_path / "alone"), "--n", "4", "--seed", "3", "--out", str(tmp_path / "y.npy")]
    (tmp_path / "config.json").unlink()
    assert main([*arguments, "--labels", ",".join(map(str, labels))]) == 0
    assert (tmp_path / "y.npy").read_bytes() == out.read_bytes()
    capsys.readouterr()
    assert read_error(capsys, *arguments, "--labels", "cat") == (
        "--labels: expected numbers of classes, with commas between them, got 'cat'"
    )
    assert read_error(capsys, *arguments, "--labels", "7") == (f"--labels: expected 0 to {len(names) - 1}, got 7")


def test_generate_errors(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "config.json").write_text("{}")
    (tmp_path / "begun" / "metrics.csv").touch()
    out = ("--out", str(tmp_path / "x.png"))

    assert read_error(capsys, "generate", str(run), "--n", "0", *out) == "--n: expected an int of at least 1, got 0"
    assert "absent: no such folder" in read_error(capsys, "generate", str(tmp_path / "absent"), *out)
    assert "neither a run folder nor a model" in read_error(capsys, "generate", str(tmp_path / "full"), *out)
    assert "no model yet" in read_error(capsys, "generate", str(tmp_path / "begun"), *out)
    classes = "--labels: expected classes of 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, with commas between them"
    assert read_error(capsys, "generate", str(run), "--labels", "10", *out) == f"{classes}, got '10'"
    assert read_error(capsys, "generate", str(run), "--labels", "3,one", *out) == f"{classes}, got '3,one'"
    assert "--temperature: expected" in read_error(capsys, "generate", str(run), "--temperature", "-1", *out)
    assert "--seed: expected" in read_error(capsys, "generate", str(run), "--seed", "-1", *out)
    assert "--columns" in read_error(capsys, "generate", str(run), "--columns", "0", *out)
    assert "--device: expected one of auto, cpu, cuda, got 'tpu'" in read_error(
        capsys, "generate", str(run), "--device", "tpu", *out
    )
    dtype = read_error(capsys, "generate", str(run), "--dtype", "bf16", *out)
    assert dtype == "--dtype: expected one of float32, bfloat16, float16, got 'bf16'"
    full = read_error(capsys, "generate", str(run), "--out", str(tmp_path / "full"))
    assert "full: expected a .png, a .npy or a new folder" in full
    below = read_error(capsys, "generate", str(run), "--out", str(tmp_path / "full" / "file" / "x.png"))
    assert "file" in below
    assert not (tmp_path / "x.png").exists()
    damaged = tmp_path / "damaged"
    VAE.from_pretrained(run / "model").save_pretrained(damaged)
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "model.safetensors: damaged" in read_error(capsys, "generate", str(damaged), *out)


def test_ctrl_c_saves_and_tells_how_to_go_on(tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = [sys.executable, "-m", "fastgen.cli", *TRAIN, "--out", str(out), "--epochs", "500"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stderr is not None
        assert any(line.startswith("step 25/") for line in process.stderr)  # waits for the first evaluation
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
    assert process.returncode == 130
    stopped = re.search(r"stopped after step (\d+) of 12500, the checkpoint is in .*; to go on: fastgen (.*)$", rest)
    assert stopped, rest
    step = int(stopped[1])
    assert (out / "checkpoints" / f"step-{step:08d}.safetensors").exists()
    resume = stopped[2].split()
    assert resume == ["train", "vae", "--resume", str(out)]
    assert main([*resume, "--max-steps", str(step + 3), "--quiet"]) == 0
    assert read_metrics(out / "metrics.csv")[-2]["step"] == str(step + 3)
