"""Training a recurrent model and generating with it through the command line."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import output, read_error
from PIL import Image

from fastgen.cli import main
from fastgen.models import RNN
from fastgen.train import read_metrics, read_run

TEXT = "Who's there?\nNay, answer me: stand, and unfold yourself.\nLong live the king!\n" * 12
SMALL = ["--hidden-size", "16", "--num-layers", "1", "--no-tensorboard", "--sample-length", "40"]
QUICK = [*SMALL, "--seq-len", "16", "--batch-size", "4", "--epochs", "2", "--quiet"]


@pytest.fixture(scope="module")
def play(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "play.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def run(play: Path) -> Path:
    out = play.with_name("run")
    assert main(["train", "rnn", "--data", str(play), *QUICK, "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def series(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on two of the three columns of a table."""
    folder = tmp_path_factory.mktemp("series")
    rows = [f"day {t};{20 + 5 * np.sin(t / 4):.3f};{t % 7}" for t in range(240)]
    (folder / "weather.csv").write_text("date;degrees;weekday\n" + "\n".join(rows) + "\n")
    arguments = [*QUICK, "--time-column", "date", "--columns", "degrees,weekday"]
    assert main(["train", "rnn", "--data", str(folder / "weather.csv"), *arguments, "--out", str(folder / "run")]) == 0
    return folder / "run"


def test_the_run_folder_tells_everything(run: Path, play: Path) -> None:
    record = read_run(run)
    assert record["model_type"] == "rnn"
    assert record["source"] == {"data": str(play)}
    assert record["data"]["name"] == "play"
    assert record["data"]["tokenizer"] == "chars"
    assert record["data"]["train"] + record["data"]["test"] == len(TEXT)
    assert record["model"]["vocab_size"] == len(set(TEXT))
    table = read_metrics(run / "metrics.csv")
    assert table[-1]["split"] == "final"
    assert float(table[-1]["bits_per_character"]) < np.log2(len(set(TEXT)))
    assert {path.name for path in run.iterdir()} == {
        *("config.json", "tokenizer.json", "metrics.csv", "checkpoints", "samples", "model", "samples.txt", "loss.png")
    }


def test_it_prints_samples_and_where_everything_is(
    play: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    arguments = [argument for argument in QUICK if argument != "--quiet"]
    assert main(["train", "rnn", "--data", str(play), *arguments, "--out", str(out)]) == 0
    captured = capsys.readouterr()
    assert f"play: {len(TEXT):,} characters" in captured.err
    assert "tokens/s  test loss" in captured.err
    untrained, *samples = sorted((out / "samples").iterdir())
    assert untrained.name == "step-00000000.txt"
    assert len(samples) == 2
    for sample in samples:
        assert "".join(f"  | {line}\n" for line in sample.read_text()[:-1].split("\n")) in captured.err
    assert captured.out.startswith("test perplexity ")
    lines = captured.out.splitlines()
    assert all(Path(line.strip()).exists() for line in lines[1:-1])
    assert lines[-1] == f"next: fastgen generate {out} --temperature 0.6 --stream"


@pytest.mark.parametrize(("tokenizer", "vocab_size"), [("bytes", 256), ("bpe", 280), ("file", 280)])
def test_tokenizers(
    tokenizer: str, vocab_size: int, play: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    more = ["--vocab-size", "280"] if tokenizer == "bpe" else []
    if tokenizer == "file":
        from fastgen.tokenizers import train_tokenizer

        tokenizer = str(tmp_path / "tokenizer.json")
        train_tokenizer("bpe", TEXT, 280).save(tokenizer)
    arguments = ["train", "rnn", "--data", str(play), "--tokenizer", tokenizer, *more, *QUICK, "--max-steps", "3"]
    assert main([*arguments, "--out", str(out)]) == 0
    assert RNN.from_pretrained(out / "model").config.vocab_size == vocab_size
    (tmp_path / "tokenizer.json").unlink(missing_ok=True)  # the run has its own
    assert main(["train", "rnn", "--resume", str(out), "--max-steps", "4", "--quiet"]) == 0
    text = output(capsys, "generate", str(out), "--prompt", "caf\u00e9", "--max-new-tokens", "5")
    assert text.startswith("caf\u00e9")


def test_text_is_that_of_the_model(run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    model = RNN.from_pretrained(run / "model")
    options = ["--max-new-tokens", "30", "--seed", "5", "--temperature", "0.7", "--top-k", "9", "--top-p", "0.9"]
    arguments = {"max_new_tokens": 30, "temperature": 0.7, "top_k": 9, "top_p": 0.9}
    expected = model.generate("Who", seed=5, **arguments)
    assert output(capsys, "generate", str(run), "--prompt", "Who", *options) == expected + "\n"
    assert output(capsys, "generate", str(run / "model"), "--prompt", "Who", *options, "--stream") == expected + "\n"
    # The default prompt is a new line that is not shown.
    unprompted = model.generate("\n", seed=5, **arguments)[1:]
    assert output(capsys, "generate", str(run), *options) == unprompted + "\n"
    three = f"\n{'-' * 80}\n".join(model.generate(["Who"] * 3, seed=5, **arguments)) + "\n"
    assert output(capsys, "generate", str(run), "--prompt", "Who", *options, "--n", "3") == three
    assert output(capsys, "generate", str(run), "--prompt", "Who", *options, "--n", "3", "--stream") == three
    path = tmp_path / "three.txt"
    more = ["--n", "3", "--out", str(path)]
    assert output(capsys, "generate", str(run), "--prompt", "Who", *options, *more) == f"{path}\n"
    assert path.read_text() == three
    # Each of several prompts n times, every text with a seed of its own.
    prompts = ["Who", "Nay,", "L"]
    both = f"\n{'-' * 80}\n".join(model.generate(prompts, seed=5, n=2, **arguments)) + "\n"
    several = [
        "generate",
        str(run),
        *(word for prompt in prompts for word in ("--prompt", prompt)),
        *options,
        "--n",
        "2",
    ]
    assert output(capsys, *several) == both
    assert output(capsys, *several, "--stream") == both


def test_layer_norm_and_zoneout(play: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["train", "rnn", "--data", str(play), *QUICK, "--layer-norm", "--zoneout", "0.4,0.1"]
    assert main([*arguments, "--out", str(tmp_path / "run")]) == 0
    config = RNN.from_pretrained(tmp_path / "run" / "model").config
    assert config.layer_norm
    assert config.zoneout == (0.4, 0.1)
    assert len(output(capsys, "generate", str(tmp_path / "run"), "--prompt", "Who", "--max-new-tokens", "20")) > 20


def test_generation_stops(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    greedy = ["generate", str(run), "--prompt", "Who", "--temperature", "0", "--max-new-tokens", "200"]
    text = output(capsys, *greedy)
    stop = text[10:12]
    assert output(capsys, *greedy, "--stop", "kingking", "--stop", stop) == text[: 3 + text[3:].index(stop) + 2] + "\n"


def test_a_series_goes_on(series: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generate = ["generate", str(series), "--max-new-tokens", "6", "--seed", "3"]
    rows = list(csv.reader(io.StringIO(output(capsys, *generate))))
    assert rows[0] == ["degrees", "weekday"]
    values = torch.tensor([[float(value) for value in row] for row in rows[1:]])
    model = RNN.from_pretrained(series / "model")
    from fastgen.data import load_series

    data = load_series(series.with_name("weather.csv"), time_column="date").values
    expected = model.generate(data, 6, seed=3)[len(data) :]
    torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-5)

    rows = list(csv.reader(io.StringIO(output(capsys, *generate, "--n", "2"))))
    assert rows[0] == ["draw", "degrees", "weekday"]
    assert [row[0] for row in rows[1:]] == ["0"] * 6 + ["1"] * 6
    assert main([*generate, "--n", "4", "--out", str(tmp_path / "x.npy")]) == 0
    assert np.load(tmp_path / "x.npy").shape == (4, 6, 2)
    assert main([*generate, "--out", str(tmp_path / "x.png")]) == 0
    with Image.open(tmp_path / "x.png") as picture:
        assert picture.size == (1000, 520)


def test_it_says_which_options_are_for_another_model(
    run: Path, series: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert read_error(capsys, "generate", str(run), "--labels", "3") == f"--labels: expected none, as {run} makes text"
    assert "--series: expected none" in read_error(capsys, "generate", str(run), "--series", "sine")
    assert "--prompt: expected none, as" in read_error(capsys, "generate", str(series), "--prompt", "x")
    assert "--top-k: expected none, as" in read_error(capsys, "generate", str(series), "--top-k", "3")


def test_generate_errors(run: Path, series: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    generate = ("generate", str(run), "--prompt", "Who")
    assert "'\u00e9' in line 1, column 1" in read_error(capsys, "generate", str(run), "--prompt", "\u00e9")
    assert read_error(capsys, "generate", str(run), "--prompt", "").startswith("--prompt: expected at least one token")
    assert read_error(capsys, *generate, "--n", "0") == "--n: expected an int of at least 1, got 0"
    assert read_error(capsys, *generate, "--n", "0", "--stream") == "--n: expected an int of at least 1, got 0"
    assert read_error(capsys, *generate, "--max-new-tokens", "0").startswith("--max-new-tokens: expected an int")
    assert read_error(capsys, *generate, "--top-p", "1.5").startswith("--top-p: expected")
    assert read_error(capsys, *generate, "--temperature", "-1").startswith("--temperature: expected")
    assert "expected a file for the text, got a folder" in read_error(capsys, *generate, "--out", str(tmp_path))
    assert "--stream" in read_error(capsys, *generate, "--stream", "--out", str(tmp_path / "x"))
    assert "--out: expected a .csv" in read_error(capsys, "generate", str(series), "--out", str(tmp_path / "x.txt"))
    other = tmp_path / "other.csv"
    other.write_text("degrees\n1\n2\n")
    assert "other.csv: expected one column" in read_error(capsys, "generate", str(series), "--series", str(other))
    one = read_error(capsys, "generate", str(series), "--series", "sine")
    assert one == "--series: expected 2 columns as the model has, got 1: x"
    alone = tmp_path / "alone"
    RNN.from_pretrained(series / "model").save_pretrained(alone / "model")
    assert "--series: expected one" in read_error(capsys, "generate", str(alone / "model"))


def test_train_errors(
    play: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("latin.txt").write_bytes("caf\u00e9".encode("latin-1") * 50)
    Path("empty.txt").touch()
    Path("short.txt").write_text("short")
    Path("holes.csv").write_text("a,b\n1,2\n3,\n5,6\n")
    Path("flat.csv").write_text("a\n" + "1\n" * 30)

    def error(data: str, *more: str) -> str:
        return read_error(capsys, "train", "rnn", "--data", data, *more)

    assert read_error(capsys, "train", "rnn").startswith("--data: expected a file, a folder, shakespeare, sine")
    assert "absent: no such file" in error("absent")
    assert "latin.txt: not UTF-8 text: byte 0xe9 at offset 3" in error("latin.txt")
    assert "empty.txt: expected text, got an empty file" in error("empty.txt")
    assert error("short.txt").startswith("--seq-len: expected less than the 4 tokens to train on, got 128")
    assert "holes.csv: line 3, column 'b': expected a number, got nothing" in error("holes.csv")
    assert error("flat.csv").startswith("--seq-len: expected less than the 27 steps to train on, got 50")
    assert error(str(play), "--seq-len", "5000").startswith("--seq-len: expected less than the")
    assert error(str(play), "--cell", "qrnn").startswith("--cell: expected one of lstm, gru, rnn_tanh, rnn_relu")
    assert error(str(play), "--zoneout", "often").startswith("--zoneout: expected a number, or one for c and one for h")
    assert error(str(play), "--cell", "gru", "--zoneout", "0.5,0.1").startswith("--zoneout: expected a number for gru")
    assert error(str(play), "--cell", "gru", "--layer-norm").startswith("--layer-norm: expected")
    assert error(str(play), "--hidden-size", "0").startswith("--hidden-size: expected an int of at least 1")
    assert error(str(play), "--vocab-size", "300").startswith("--vocab-size: expected with --tokenizer bpe only")
    assert error(str(play), "--tokenizer", "words").startswith("--tokenizer: expected chars, bytes, bpe or a")
    assert error(str(play), "--time-column", "date").startswith("--time-column: expected none for text, got 'date'")
    assert error(str(play), "--num-components", "3").startswith("--num-components: expected none for text")
    assert error("sine", "--tokenizer", "bpe").startswith("--tokenizer: expected none for a series, got 'bpe'")
    assert error("sine", "--prompt", "x").startswith("--prompt: expected none for a series")
    unknown = error(str(play), "--prompt", "\u00e9")
    assert unknown.startswith("--prompt: ")
    assert "'\u00e9' in line 1, column 1" in unknown
    assert not Path("runs").exists()


def test_resume_errors(run: Path, play: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    resume = ("train", "rnn", "--resume", str(run))
    assert "but --data was given too" in read_error(capsys, *resume, "--data", str(play))
    assert "but --seq-len was given too" in read_error(capsys, *resume, "--seq-len", "3")
    wrong = read_error(capsys, "train", "vae", "--resume", str(run))
    assert wrong == f"{run}: holds a run of another model; continue it with: fastgen train rnn --resume {run}"
    assert main([*resume, "--epochs", "3", "--prompt", "Long", "--quiet"]) == 0

    try:
        play.write_text(TEXT.replace("king", "King"))
        capsys.readouterr()
        message = read_error(capsys, *resume, "--epochs", "4")
        assert message.startswith("--data: expected that which")
        assert "'K'" in message
        play.write_text(TEXT.replace("king", "ring"))
        assert read_error(capsys, *resume, "--epochs", "4").startswith("--data: expected checksum")
    finally:
        play.write_text(TEXT)
    record = json.loads((run / "config.json").read_text())
    del record["data"]["seq_len"]
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "config.json").write_text(json.dumps(record))
    assert "not of this version of fastgen" in read_error(capsys, "train", "rnn", "--resume", str(tmp_path / "old"))
