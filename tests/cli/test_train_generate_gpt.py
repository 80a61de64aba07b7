"""Training a GPT and generating with it through the command line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from commands import output, read_error

from fastgen.cli import main
from fastgen.models import GPT, GPTConfig
from fastgen.tokenizers import CharTokenizer
from fastgen.train import read_metrics, read_run

TEXT = "Who's there?\nNay, answer me: stand, and unfold yourself.\nLong live the king!\n" * 12
SMALL = ["--hidden-size", "16", "--num-layers", "1", "--num-heads", "2", "--seq-len", "16"]
QUICK = ["--batch-size", "4", "--epochs", "1", "--no-tensorboard", "--sample-length", "20", "--quiet"]


@pytest.fixture(scope="module")
def play(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "play.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def run(play: Path) -> Path:
    out = play.with_name("run")
    assert main(["train", "gpt", "--data", str(play), "--tokenizer", "chars", *SMALL, *QUICK, "--out", str(out)]) == 0
    return out


def test_the_run_folder_tells_everything(run: Path, play: Path) -> None:
    record = read_run(run)
    assert record["model_type"] == "gpt"
    assert record["source"] == {"data": str(play), "tokenizer": "chars"}
    assert record["data"]["seq_len"] == record["model"]["max_position_embeddings"] == 16
    assert record["recipe"]["lora_rank"] == 0
    assert record["model"]["num_attention_heads"] == 2
    table = read_metrics(run / "metrics.csv")
    assert table[-1]["split"] == "final"
    assert float(table[-1]["bits_per_character"]) < np.log2(len(set(TEXT)))
    assert {path.name for path in run.iterdir()} == {
        *("config.json", "tokenizer.json", "metrics.csv", "checkpoints", "samples", "model", "samples.txt", "loss.png")
    }


def test_text_is_that_of_the_model(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = GPT.from_pretrained(run / "model")
    options = ["--max-new-tokens", "30", "--seed", "5", "--temperature", "0.7", "--top-k", "9"]
    expected = model.generate("Who", seed=5, max_new_tokens=30, temperature=0.7, top_k=9)
    assert output(capsys, "generate", str(run), "--prompt", "Who", *options) == expected + "\n"
    assert output(capsys, "generate", str(run / "model"), "--prompt", "Who", *options, "--stream") == expected + "\n"
    assert "prompt: expected at most 16 tokens" in read_error(capsys, "generate", str(run), "--prompt", "Who" * 9)
    assert "--labels: expected none" in read_error(capsys, "generate", str(run), "--labels", "3")


def test_pieces_of_words_by_default(play: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train = ["train", "gpt", "--data", str(play), *SMALL, "--seq-len", "2", *QUICK, "--max-steps", "1"]
    assert main([*train, "--out", str(out)]) == 0
    tokenizer = GPT.from_pretrained(out / "model").tokenizer
    assert tokenizer is not None
    assert tokenizer.kind == "subwords"


def test_llama_with_bpe_goes_on_where_it_stopped(
    play: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for part, text in enumerate((TEXT[:400], TEXT[400:])):
        (folder / f"{part}.txt").write_text(text)
    more = ["--architecture", "llama", "--num-key-value-heads", "1", "--vocab-size", "280"]
    arguments = ["--separate-documents", "--gradient-accumulation-steps", "2", "--gradient-checkpointing"]
    out = tmp_path / "run"
    train = ["train", "gpt", "--data", str(folder), *SMALL, *QUICK, *more, *arguments, "--max-steps", "3"]
    assert main([*train, "--out", str(out)]) == 0
    record = read_run(out)
    assert record["model"]["normalization"] == "rms_norm"
    assert record["model"]["vocab_size"] == 280
    assert record["data"]["separate_documents"] is True
    assert record["recipe"]["gradient_accumulation_steps"] == 2
    assert main(["train", "gpt", "--resume", str(out), "--max-steps", "5", "--quiet"]) == 0
    assert read_metrics(out / "metrics.csv")[-1]["step"] == "5"
    text = output(capsys, "generate", str(out), "--prompt", "caf\u00e9", "--max-new-tokens", "5")
    assert text.startswith("caf\u00e9")


@pytest.mark.parametrize("lora", [[], ["--lora-rank", "2"]], ids=["all", "lora"])
def test_fine_tuning(lora: list[str], run: Path, play: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text(TEXT.replace("king", "thing"))
    train = ["train", "gpt", "--data", str(other), *QUICK, "--init-from", str(run), *lora, "--dropout", "0.1"]
    assert main([*train, "--seq-len", "12", "--max-steps", "4", "--out", str(tmp_path / "tuned")]) == 0
    record = read_run(tmp_path / "tuned")
    assert record["source"]["init_from"] == str(run)
    assert record["model"]["max_position_embeddings"] == 16
    assert record["model"]["dropout"] == 0.1
    assert record["data"]["seq_len"] == 12
    resume = ["train", "gpt", "--resume", str(tmp_path / "tuned"), "--max-steps", "6", "--quiet"]
    assert main(resume) == 0
    tuned, first = (GPT.from_pretrained(folder / "model") for folder in (tmp_path / "tuned", run))
    assert tuned.tokenizer == first.tokenizer
    assert tuned.state_dict().keys() == first.state_dict().keys()
    same = bool((tuned.embed_tokens.weight == first.embed_tokens.weight).all())
    assert same == bool(lora)
    # Killed before its first checkpoint, it begins again from the same weights.
    expected = (tmp_path / "tuned" / "model" / "model.safetensors").read_bytes()
    for checkpoint in (tmp_path / "tuned" / "checkpoints").glob("*"):
        checkpoint.unlink()
    assert main(resume) == 0
    assert (tmp_path / "tuned" / "model" / "model.safetensors").read_bytes() == expected


def test_a_checkpoint_of_transformers(play: Path, tmp_path: Path) -> None:
    config = GPTConfig(40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=16)
    GPT(config).save_pretrained(tmp_path / "gpt2", layout="huggingface")
    train = ["train", "gpt", "--data", str(play), *QUICK, "--init-from", str(tmp_path / "gpt2"), "--max-steps", "2"]
    assert main([*train, "--out", str(tmp_path / "run")]) == 2  # no tokenizer
    assert main([*train, "--tokenizer", "chars", "--out", str(tmp_path / "run")]) == 0
    assert read_run(tmp_path / "run")["model"]["vocab_size"] == 40


def test_train_errors(
    run: Path, play: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("short.txt").write_text("short")
    GPT(vocab_size=3, hidden_size=6, num_hidden_layers=1, tokenizer=CharTokenizer("abc")).save_pretrained("abc")

    def error(data: str | Path, *more: str) -> str:
        return read_error(capsys, "train", "gpt", "--data", str(data), *more)

    assert read_error(capsys, "train", "gpt") == "--data: expected a file, a folder or shakespeare; or --resume RUN"
    assert error("short.txt", "--tokenizer", "chars").startswith(
        "--seq-len: expected less than the 4 tokens to train on, got 256"
    )
    assert error(play, "--architecture", "bert") == "--architecture: expected one of gpt2, llama, got 'bert'"
    assert error(play, "--hidden-size", "16", "--num-heads", "3").startswith("--hidden-size: expected a multiple of")
    assert error(play, "--num-layers", "0") == "--num-layers: expected an int of at least 1, got 0"
    assert error(play, "--seq-len", "0") == "--seq-len: expected an int of at least 1, got 0"
    assert error(play, "--dropout", "1").startswith("--dropout: expected a finite number")
    assert error(play, "--lora-rank", "4").startswith("--lora-rank: expected a checkpoint to adapt (--init-from)")
    start = ("--init-from", str(run))
    assert error(play, *start, "--hidden-size", "8") == "--hidden-size: expected none with --init-from, got 8"
    assert error(play, *start, "--tokenizer", "bytes").startswith("--tokenizer: expected none, as the checkpoint has")
    assert error(play, *start, "--seq-len", "17").startswith("--seq-len: expected at most 16, the context of the model")
    assert "'W' in line 1, column 1 is not among the 3 characters" in error(play, "--init-from", "abc")
    assert "absent: no such folder" in error(play, "--init-from", "absent")
    assert not Path("runs").exists()


def test_resume_errors(run: Path, play: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    resume = ("train", "gpt", "--resume", str(run))
    assert "but --data was given too" in read_error(capsys, *resume, "--data", str(play))
    assert "but --seq-len was given too" in read_error(capsys, *resume, "--seq-len", "3")
    wrong = read_error(capsys, "train", "rnn", "--resume", str(run))
    assert wrong == f"{run}: holds a run of another model; continue it with: fastgen train gpt --resume {run}"
    record = json.loads((run / "config.json").read_text())
    del record["data"]["seq_len"]
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "config.json").write_text(json.dumps(record))
    assert "not of this version of fastgen" in read_error(capsys, "train", "gpt", "--resume", str(tmp_path / "old"))
