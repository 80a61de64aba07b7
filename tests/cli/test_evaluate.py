"""Scoring trained models through the command line."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import output, read_error

from fastgen.cli import main
from fastgen.data import load_series, load_text
from fastgen.evaluate import evaluate_series, evaluate_text
from fastgen.models import GPT, RNN
from fastgen.train import read_metrics, read_run

TEXT = "Who's there?\nNay, answer me: stand, and unfold yourself.\nLong live the king!\n" * 40
QUICK = ["--no-tensorboard", "--quiet", "--batch-size", "4", "--max-steps", "4"]
RNN_SIZE = ["--hidden-size", "16", "--num-layers", "1", "--seq-len", "16", "--sample-length", "20"]
GPT_SIZE = [
    *("--hidden-size", "16", "--num-layers", "1", "--num-heads", "2"),
    *("--seq-len", "16", "--sample-length", "20", "--tokenizer", "chars"),
]


def train(family: str, data: Path, *arguments: str) -> Path:
    out = data.with_name(f"{family}-{data.stem}")
    assert main(["train", family, "--data", str(data), *QUICK, *arguments, "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def play(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "play.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def rnn(play: Path) -> Path:
    return train("rnn", play, *RNN_SIZE)


@pytest.fixture(scope="module")
def gpt(play: Path) -> Path:
    return train("gpt", play, *GPT_SIZE)


@pytest.fixture(scope="module")
def series(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on two of the three columns of a table."""
    path = tmp_path_factory.mktemp("series") / "weather.csv"
    rows = [f"day {t};{20 + 5 * np.sin(t / 4):.3f};{t % 7}" for t in range(240)]
    path.write_text("date;degrees;weekday\n" + "\n".join(rows) + "\n")
    return train("rnn", path, *RNN_SIZE, "--time-column", "date", "--columns", "degrees,weekday")


@pytest.fixture(scope="module")
def pixels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("images") / "pixels.npy"
    np.save(path, np.random.default_rng(0).integers(256, size=(40, 8, 8), dtype=np.uint8))
    return path


@pytest.fixture(scope="module")
def vae(pixels: Path) -> Path:
    return train("vae", pixels, "--latent-dim", "2", "--hidden-sizes", "8", "--importance-samples", "3", "--seed", "5")


@pytest.fixture(scope="module")
def gan(pixels: Path) -> Path:
    return train("gan", pixels, "--latent-dim", "2", "--architecture", "mlp", "--hidden-sizes", "8", "--seed", "5")


def figures(capsys: pytest.CaptureFixture[str], tmp_path: Path, *arguments: str) -> dict[str, Any]:
    """What the command writes, with what it prints checked to be the same figures."""
    out = tmp_path / "figures.json"
    printed = output(capsys, "evaluate", *arguments, "--out", str(out))
    found: dict[str, Any] = json.loads(out.read_text())
    assert found.pop("run") == str(Path(arguments[0]).absolute())
    assert f"wrote {out}" in printed.replace("\n", " ")
    for value in found.values():
        if isinstance(value, float):
            assert f"{value:.6g}" in printed
    return found


def final(run: Path) -> dict[str, float]:
    row = read_metrics(run / "metrics.csv")[-1]
    assert row["split"] == "final"
    return {name: float(value) for name, value in row.items() if name != "split" and value}


@pytest.mark.parametrize("family", ["rnn", "gpt"])
def test_text_held_out_is_scored_as_at_the_end_of_the_run(
    family: str, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run = request.getfixturevalue(family)
    found, row = figures(capsys, tmp_path, str(run), "--batch-size", "1"), final(run)
    for name in ("loss", "perplexity", "bits_per_character"):
        assert found[name] == pytest.approx(row[name], rel=1e-4)
    assert found["num_characters"] == read_run(run)["data"]["test"]
    assert found["num_tokens"] == found["num_characters"] - 1


@pytest.mark.parametrize("family", ["rnn", "gpt"])
def test_text_given_is_scored_as_from_python(
    family: str, request: pytest.FixtureRequest, play: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run = request.getfixturevalue(family)
    options = ["--data", str(play), "--batch-size", "3", "--seq-len", "8"]
    found = figures(capsys, tmp_path, str(run / "model"), *options)
    model = (RNN if family == "rnn" else GPT).from_pretrained(run / "model")
    score = evaluate_text(model, load_text(play).encode(model.tokenizer), batch_size=3, seq_len=8)
    assert found == {
        "data": "play",
        "loss": score.loss,
        "perplexity": score.perplexity,
        "bits_per_character": score.bits_per_character,
        "bits_per_byte": score.bits_per_byte,
        "num_tokens": score.num_tokens,
        "num_characters": len(TEXT),
    }


def test_series(series: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    found, row = figures(capsys, tmp_path, str(series)), final(series)
    assert found["loss"] == pytest.approx(row["loss"], rel=1e-4)
    assert [*found["rmse"]] == ["degrees", "weekday"]
    assert math.sqrt(sum(x * x for x in found["rmse"].values()) / 2) == pytest.approx(row["rmse"], rel=1e-4)
    table = series.with_name("weather.csv")
    whole = load_series(table, columns=["degrees", "weekday"], time_column="date")
    score = evaluate_series(RNN.from_pretrained(series / "model"), whole, batch_size=2, seq_len=32)
    found = figures(capsys, tmp_path, str(series), "--data", str(table), "--batch-size", "2", "--seq-len", "32")
    assert found["loss"] == score.loss
    assert tuple(found["rmse"].values()) == score.rmse
    assert found["num_steps"] == score.num_steps == 238


def test_vae(vae: Path, pixels: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    found, row = figures(capsys, tmp_path, str(vae)), final(vae)
    names = ("negative_elbo", "reconstruction_loss", "kl", "negative_iwae")
    assert [found[name] for name in names] == pytest.approx([row[name] for name in names], rel=1e-4)
    other = figures(capsys, tmp_path, str(vae), "--seed", "6")
    assert other["kl"] == found["kl"]
    assert other["negative_iwae"] != found["negative_iwae"]
    assert figures(capsys, tmp_path, str(vae), "--data", str(pixels))["num_images"] == 40


def test_gan(gan: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    found, row = figures(capsys, tmp_path, str(gan)), final(gan)
    for name in ("frechet_distance", "noise_floor"):
        assert found[name] == pytest.approx(row[name], rel=1e-4)
    assert figures(capsys, tmp_path, str(gan), "--seed", "6")["frechet_distance"] != found["frechet_distance"]


def test_dtype(rnn: Path, vae: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for run, name in ((rnn, "loss"), (vae, "negative_elbo")):
        exact, rounded = (figures(capsys, tmp_path, str(run), "--dtype", t)[name] for t in ("float32", "bfloat16"))
        assert rounded != exact
        assert rounded == pytest.approx(exact, rel=0.02)


@pytest.mark.parametrize(
    ("family", "arguments", "message"),
    [
        ("rnn", ["--seed", "1"], "--seed: expected none, as {run} is scored without noise"),
        ("vae", ["--seq-len", "8"], "--seq-len: expected none, as {run} makes no text and continues no series"),
        ("gan", ["--data", "x"], "--data: expected none, as {run} is a GAN, which is judged by what its run trained"),
        ("rnn", ["--out", "figures.csv"], "--out: expected a .json, got figures.csv"),
        ("rnn", ["--batch-size", "0"], "--batch-size: expected an int of at least 1, got 0"),
        ("gpt", ["--seq-len", "17"], "--seq-len: expected at most 16, the context of the model, got 17"),
        ("rnn", ["--dtype", "int8"], "--dtype: expected one of"),
        ("rnn", ["--data", "nowhere.txt"], "nowhere.txt: "),
        ("series", ["--data", "sine"], "--data: expected 2 columns as the model has, got 1: "),
    ],
)
def test_bad_input(
    family: str,
    arguments: list[str],
    message: str,
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = request.getfixturevalue(family)
    assert read_error(capsys, "evaluate", str(run), *arguments).startswith(message.format(run=run))


def test_text_outside_the_alphabet(rnn: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text("Wh\u00f8?")
    error = read_error(capsys, "evaluate", str(rnn), "--data", str(tmp_path / "other.txt"))
    assert error.startswith("--data: expected a text that the tokenizer of the model can read, but ")


def test_a_model_alone_says_that_it_needs_data(rnn: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    RNN.from_pretrained(rnn / "model").save_pretrained(tmp_path / "alone")
    error = read_error(capsys, "evaluate", str(tmp_path / "alone"))
    assert error.startswith(f"--data: expected what to score, as {tmp_path / 'alone'} is not in the folder of a run")


def test_data_that_has_changed_is_not_scored(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text(TEXT)
    run = train("rnn", path, *RNN_SIZE)
    path.write_text(TEXT[40:])
    error = read_error(capsys, "evaluate", str(run))
    assert error == f"--data: expected one, as {path} is no longer what {run} was started with, got none"
