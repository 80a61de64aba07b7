"""Configuration files: printed, edited and run again, for every family of models."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import tomlkit
from commands import output, read_error

from fastgen.cli import main
from fastgen.train import GANRecipe, GPTRecipe, VAERecipe, read_metrics, read_run

FAMILIES = ("vae", "gan", "rnn", "gpt")
TEXT = "Who's there?\nNay, answer me: stand, and unfold yourself.\n" * 12


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of each family, of options of all kinds."""
    folder = tmp_path_factory.mktemp("runs")
    np.save(folder / "images.npy", np.arange(40 * 64, dtype=np.uint8).reshape(40, 8, 8))
    (folder / "play.txt").write_text(TEXT)
    images = f"--data {folder}/images.npy --test-size 0.2"
    text = f"--data {folder}/play.txt --hidden-size 8 --num-layers 1 --seq-len 9 --sample-length 5"
    options = {
        "vae": f"{images} --architecture mlp --hidden-sizes 9,8 --importance-samples 2",
        "gan": f"{images} --architecture mlp --hidden-sizes 9,8 --latent-dim 3 --critic-steps 2 --r1 0.1",
        "rnn": f"{text} --zoneout 0.1,0.2 --locked-dropout",
        "gpt": f"{text} --num-heads 2 --tokenizer chars --no-tie-weights --prompt Nay",
    }
    for family, more in options.items():
        common = "--max-steps 3 --lr 1e-2 --batch-size 4 --no-tensorboard --seed 5 --quiet"
        assert main(["train", family, *more.split(), *common.split(), "--out", str(folder / family)]) == 0
    return {family: folder / family for family in FAMILIES}


@pytest.mark.parametrize("family", FAMILIES)
def test_all_families_leave_the_same_folder(family: str, runs: dict[str, Path]) -> None:
    run, text = runs[family], family in ("rnn", "gpt")
    sample = ".txt" if text else ".png"
    found = {path.name for path in run.iterdir()}
    common = {"config.json", "metrics.csv", "checkpoints", "samples", "model", f"samples{sample}", "loss.png"}
    further = {"vae": {"reconstructions.png", "interpolation.png"}, "gan": {"interpolation.png"}}
    assert found == common | further.get(family, {"tokenizer.json"})
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000003.safetensors"]
    assert {path.name for path in (run / "samples").iterdir()} == {f"step-0000000{step}{sample}" for step in (0, 3)}
    of_the_model = {"config.json", "model.safetensors"} | ({"tokenizer.json"} if text else set())
    assert {path.name for path in (run / "model").iterdir()} == of_the_model
    entries = ["format", "model_type", "model", "data", "evaluation", "training", "processes", "machine", "versions"]
    entries += ["source", "options", "command", "created"]
    assert [name for name in read_run(run) if name != "recipe"] == entries
    columns = list(read_metrics(run / "metrics.csv")[0])
    assert columns[:3] == ["split", "epoch", "step"]
    assert columns[-3:] == ["learning_rate", "tokens_per_second" if text else "examples_per_second", "seconds"]
    assert [row["split"] for row in read_metrics(run / "metrics.csv")] == ["train", "test", "final"]


def weights(run: Path) -> bytes:
    return (run / "model" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_can_be_printed_and_run_again(
    family: str, runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = runs[family]
    printed = output(capsys, "train", family, "--config", str(run), "--print-config")
    file = tmp_path / "config.toml"
    file.write_text(printed)
    for name, config in (("folder", run), ("file", file)):
        assert main(["train", family, "--config", str(config), "--out", str(tmp_path / name), "--quiet"]) == 0
        assert weights(tmp_path / name) == weights(run)
        ours, theirs = read_run(tmp_path / name), read_run(run)
        for entry in ("options", "model", "training", "data", "source", "evaluation"):
            assert ours[entry] == theirs[entry]
    assert output(capsys, "train", family, "--config", str(file), "--print-config") == printed


@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_has_every_option_with_its_default(
    family: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERMINAL_WIDTH", "200")
    printed = output(capsys, "train", family, "--print-config")
    assert f"fastgen train {family} --config FILE" in printed.split("[data]")[0]
    assert tomlkit.parse(printed).unwrap() == {
        "model_type": family,
        **{table: {} for table in ("data", "model", "training", "run")},
    }
    # With the default wherever it is a value; the others are for the user to fill in.
    commented = re.findall(r"^#(\w+) =(.*)$", printed, re.MULTILINE)
    capsys.readouterr()
    help = output(capsys, "train", family, "--help")
    command_only = {"resume", "config", "print_config", "quiet"}
    options = {name.replace("-", "_") for name in re.findall(r"--([a-z][a-z0-9-]+)", help.split("Data ")[1])}
    options = {name for name in options if not name.startswith("no_")} - command_only - {"help"}
    assert {name for name, _ in commented} == options
    defaults = tomlkit.parse("\n".join(f"{name} ={value}" for name, value in commented if value)).unwrap()
    recipes = {"vae": VAERecipe, "gan": GANRecipe, "gpt": GPTRecipe}
    if family in recipes:  # those of the RNN are in words, for text and for a series
        assert defaults["lr"] == recipes[family].training_config().learning_rate
    assert defaults["seed"] == 0
    assert defaults["tensorboard"] is True
    assert defaults["compile"] is False
    assert defaults["dtype"] == "float32"
    assert "max_steps" not in defaults
    assert defaults.get("test_size") == {"gpt": "0.05"}.get(family)


def test_the_command_line_comes_before_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "some.toml"
    file.write_text(
        "[data]\ndata = 'digits'\ntest_size = 0.25\n[model]\nhidden_sizes = [32, 16]\nconditional = true\nbeta = 2\n"
        "[training]\nepochs = 3\n[run]\nout = 'runs/x'\n"
    )
    more = ("--epochs", "4", "--no-conditional", "--seed", "7")
    printed = output(capsys, "train", "vae", "--config", str(file), *more, "--print-config")
    assert tomlkit.parse(printed).unwrap() == {
        "model_type": "vae",
        "data": {"data": "digits", "test_size": "0.25"},
        "model": {"hidden_sizes": "32,16", "conditional": False, "beta": 2.0},
        "training": {"epochs": 4, "seed": 7},
        "run": {"out": "runs/x"},
    }


def test_a_resumed_run_keeps_its_options_up_to_date(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert main(["train", "vae", "--config", str(runs["vae"]), "--out", str(run), "--quiet"]) == 0
    assert main(["train", "vae", "--resume", str(run), "--max-steps", "5", "--quiet"]) == 0
    assert read_run(run)["options"] == {**read_run(runs["vae"])["options"], "max_steps": 5}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("data = 'x'\n", "FILE: 'data': expected a table, got 'x'"),
        ("epochs = 3\n", "FILE: 'epochs': expected in the table [training], got it before all"),
        ("[trainning]\nepochs = 3\n", "FILE: [trainning]: no such table; did you mean 'training'?"),
        (
            "[training]\nepocs = 3\n",
            "FILE: [training] 'epocs': no such option of train vae; did you mean 'epochs'?",
        ),
        (
            "[training]\nquiet = true\n",
            "FILE: [training] 'quiet': no such option of train vae; --print-config shows all",
        ),
        ("[model]\nbatch_size = 3\n", "FILE: 'batch_size': expected in the table [training], got it in [model]"),
        ("[training]\nbatch_size = 'many'\n", "FILE: [training] 'batch_size': expected an int, got 'many'"),
        ("[training]\nbatch_size = 3.0\n", "FILE: [training] 'batch_size': expected an int, got 3.0"),
        ("[training]\nbatch_size = true\n", "FILE: [training] 'batch_size': expected an int, got True"),
        ("[training]\nlr = '1e-3'\n", "FILE: [training] 'lr': expected a number, got '1e-3'"),
        ("[model]\nconditional = 1\n", "FILE: [model] 'conditional': expected true or false, got 1"),
        (
            "[model]\narchitecture = false\n",
            "FILE: [model] 'architecture': expected text, a number or a list of these, got False",
        ),
        ("[run]\nout = 3\n", "FILE: [run] 'out': expected a path in quotation marks, got 3"),
        ("[training]\nepochs = 0\n", "--epochs: expected an int of at least 1, got 0"),
        ("model_type = 'gpt'\n", "FILE: expected options of train vae, got those of train gpt"),
        ("[training]\nepochs =\n", "FILE: not TOML: .* at line 2 col 8"),
        ("[training]\nepochs = 3\nepochs = 4\n", "FILE: not TOML: .*epochs.*"),
        ("<config epochs='3'/>", "FILE: not TOML: .* at line 1 col 0"),
        (b"[data]\ndata = '\xe9'\n", "FILE: not UTF-8 text: byte 0xe9 at offset 15"),
    ],
)
def test_what_a_file_may_not_be(
    content: str | bytes, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "batch_size.toml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    data = [] if "data" in str(content) else ["--data", "digits"]
    pattern = re.escape(message).replace(re.escape(".*"), ".*").replace("FILE", re.escape(str(file)))
    assert re.fullmatch(pattern, read_error(capsys, "train", "vae", "--config", str(file), *data))


def test_what_is_no_configuration(runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    vae = ("train", "vae", "--config")
    assert read_error(capsys, *vae, str(tmp_path / "absent")) == f"{tmp_path}/absent: No such file or directory"
    assert read_error(capsys, *vae, str(tmp_path)) == f"{tmp_path}: not a run folder, it has no config.json"
    other = runs["rnn"]
    assert read_error(capsys, *vae, str(other)) == f"{other}: expected options of train vae, got those of train rnn"
    (tmp_path / "config.json").write_text('{"model_type": "vae", "training": {}}')
    assert read_error(capsys, *vae, str(tmp_path)).startswith(f"{tmp_path}: has no options to take over")
    resumed = read_error(capsys, *vae, str(other), "--resume", str(other))
    assert resumed.startswith("--config: expected none with --resume")
    resumed = read_error(capsys, "train", "vae", "--print-config", "--resume", str(other))
    assert resumed == f"--print-config: expected --config {other}, which is a run, got --resume"
