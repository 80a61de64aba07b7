"""What is read of a run folder, finished or not, and how damage is told."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import pytest
from run_folders import MODELS, TOKENS, make_run, png

from fastgen.report import run as run_module
from fastgen.report.run import read


def test_a_finished_run_of_pictures(tmp_path: Path) -> None:
    run = read(make_run(tmp_path / "digits", machine={"cpu": "Zen", "threads": 2, "device": "cpu"}))
    assert run.title == "Variational autoencoder on mnist"
    assert run.architecture == "conv encoder and decoder, 16 latent dimensions, bernoulli likelihood"
    assert run.data == "mnist: 4,500 images to train on, 500 held out"
    assert run.machine == "Zen, 2 threads"
    assert (run.steps, run.best_step, run.seconds, run.finished) == (40, 40, 125.0, True)
    assert run.weights == 2020  # without the averages
    assert [(frame.caption, frame.width, frame.height) for frame in run.frames] == [
        (f"step {step}", 60, 60) for step in (10, 20, 30, 40)
    ]
    assert run.frames[1].picture == png(60, 60, 2)
    # The last sample is not shown again, nor the curves.
    assert [frame.caption for frame in run.results] == ["From one example to the next, a row each"]
    assert not run.is_text
    assert not run.is_wide


def test_the_sample_of_before_training_is_the_first(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "digits", evaluations=2)
    (folder / "samples" / "step-00000000.png").write_bytes(png(60, 60, 7))
    assert [frame.caption for frame in read(folder).frames] == ["before training", "step 10", "step 20"]
    stopped = make_run(tmp_path / "stopped", evaluations=0, finished=False)
    (stopped / "samples" / "step-00000000.png").write_bytes(png(60, 60, 7))
    assert [frame.caption for frame in read(stopped).frames] == ["before training"]


def test_metrics(tmp_path: Path) -> None:
    loss, kl, last = read(make_run(tmp_path / "digits")).metrics
    assert (loss.title, loss.unit, loss.final) == ("loss", "nats an image", 41.5)
    assert loss.train == ((10, 100.0), (20, 60.0), (30, 20 + 80 / 3), (40, 40.0))
    assert loss.test[0] == (10, 101.0)
    assert (kl.title, kl.test, kl.final) == ("KL divergence", (), None)
    assert (last.name, last.train, last.test, last.final) == ("final_only", (), (), 7.25)


def test_commands(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "my digits")
    assert read(folder).commands == [
        ("Sample from it", f"fastgen generate '{folder}' --n 64 --seed 1 --out 'my digits.png'"),
        ("How it was started", "fastgen train vae --data 'two words'"),
    ]
    stopped = make_run(tmp_path / "stopped", "gpt", text="x", finished=False)
    assert read(stopped).commands[:2] == [
        ("Sample from it", f"fastgen generate {stopped} --temperature 0.6 --seed 1 --stream"),
        ("Go on with it", f"fastgen train gpt --resume {stopped}"),
    ]
    series = make_run(tmp_path / "series", "rnn", data={"name": "sine", "train": 9, "test": 3, "columns": ["x"]})
    assert read(series).commands[0][1].endswith("--n 20 --seed 1 --out series.png")


@pytest.mark.parametrize("model_type", MODELS)
def test_every_family(model_type: str, tmp_path: Path) -> None:
    run = read(make_run(tmp_path / "run", model_type, text="To be" if model_type in ("rnn", "gpt") else None))
    assert run.title.startswith(run_module.FAMILIES[model_type])
    assert run.architecture
    assert "?" not in run.architecture
    if run.is_text:
        assert run.data == "plays: 1,234,567 characters to train on, 999 held out"
        assert run.metrics[0].unit == "nats a token"
        assert run.frames[-1].text == "To be 4\n"
    else:
        assert "4,500 images" in run.data


def test_words(tmp_path: Path) -> None:
    gan = read(make_run(tmp_path / "gan", "gan", machine={"cpu": "Zen", "threads": 1, "device": "cuda:0"}))
    assert gan.architecture == "conv generator and discriminator, 64 latent dimensions, non-saturating loss"
    assert gan.machine == "Zen, 1 thread, cuda:0"
    assert gan.metrics[0].unit == ""
    rnn = read(make_run(tmp_path / "rnn", "rnn", text="x"))
    assert rnn.architecture == "LSTM, 1 layer of 24 units"


def test_an_unknown_family_is_shown_too(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    record = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({"model_type": "flow", "training": {}, "source": record["source"]}))
    run = read(folder)
    assert (run.title, run.architecture, run.data) == ("FLOW on data", "", "unknown")


def test_runs_that_have_not_ended(tmp_path: Path) -> None:
    run = read(make_run(tmp_path / "stopped", finished=False))
    assert (run.finished, run.best_step, run.steps, run.results) == (False, None, 40, ())
    assert all(metric.final is None for metric in run.metrics)
    empty = make_run(tmp_path / "empty", evaluations=0, finished=False)
    (empty / "metrics.csv").unlink()
    run = read(empty)
    assert (run.steps, run.seconds, run.weights, run.metrics, run.frames) == (0, 0.0, None, (), ())
    assert [what for what, _ in run.commands] == ["Go on with it", "How it was started"]


def test_a_line_that_a_kill_cut_short_is_left_out(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", finished=False)
    with open(folder / "metrics.csv", "a") as file:
        file.write("train,5,5")
    assert read(folder).steps == 40


def test_many_samples_are_thinned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_run(tmp_path / "run", evaluations=100)
    steps = [frame.step for frame in read(folder).frames]
    assert (len(steps), steps[0], steps[-1]) == (run_module.MAX_FRAMES, 10, 1000)
    assert all(30 <= after - before <= 50 for before, after in itertools.pairwise(steps))
    # Of large pictures fewer: as many as fit, at least three.
    size = len(png(60, 60))
    monkeypatch.setattr(run_module, "MAX_BYTES", 7 * size + size // 2)
    assert len(read(folder).frames) == 7
    monkeypatch.setattr(run_module, "MAX_BYTES", size)
    assert [frame.step for frame in read(folder).frames] == [10, 510, 1000]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", b"{", "config.json: damaged"),
        ("config.json", b"{}", "not a run folder, its config.json is that of a model"),
        ("metrics.csv", b"split,step,loss\ntrain,10,x\n", "metrics.csv: damaged in line 2 (ValueError"),
        ("metrics.csv", b"split,step,loss\ntrain,1\ntrain,ten,1\n", "metrics.csv: damaged in line 3"),
        ("metrics.csv", b"a,b\n1,2\n", "metrics.csv: damaged in line 2 (KeyError"),
        ("metrics.csv", b"split,step\ntrain,1,2,3\n", "metrics.csv: damaged in line 2"),
        ("metrics.csv", b"\xff\xfe\n\n", "metrics.csv: damaged"),
        ("samples/step-00000010.png", b"GIF89a", "step-00000010.png: damaged, expected a PNG"),
        ("samples/step-00000020.png", png()[:-20], "step-00000020.png: damaged, expected a PNG"),
        ("interpolation.png", b"", "interpolation.png: damaged, expected a PNG"),
        ("model/model.safetensors", b"abc", "model.safetensors: damaged"),
        ("model/model.safetensors", b"\xff" * 64, "model.safetensors: damaged (the header is longer"),
        ("model/model.safetensors", b"\x04" + b"\0" * 7 + b"[{}]", "model.safetensors: damaged"),
    ],
)
def test_damage_is_named(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        read(folder)
    assert "\n" not in str(raised.value)


def test_not_a_run_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such run folder"):
        read(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match=r"not a run folder, it has no config\.json"):
        read(tmp_path)


def test_text_of_a_tokenizer_of_pieces(tmp_path: Path) -> None:
    data = {**TOKENS, "tokenizer": "bpe"}
    assert "1,234,567 tokens" in read(make_run(tmp_path / "run", "gpt", text="x", data=data)).data
