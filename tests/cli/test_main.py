"""The command line as a user meets it: help, version, errors."""

from __future__ import annotations

import importlib.util
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fastgen import __version__
from fastgen.cli import main


def error(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that a command with bad input prints."""
    assert main(arguments) == 2
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert captured.out == ""
    assert lines[-1].startswith("error: ")
    assert sum(line.startswith("error") for line in lines) == 1
    assert "Traceback" not in captured.err
    return lines[-1].removeprefix("error: ")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"fastgen {__version__}\n"


@pytest.mark.parametrize("command", [[], ["train"]])
def test_without_a_command_there_is_help(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command) == 2
    captured = capsys.readouterr()
    assert "Usage: fastgen" in captured.out
    assert captured.err == ""


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    commands = [text.index(f"\u2502 {command} ") for command in ("train", "generate", "bench", "doctor")]
    assert commands == sorted(commands)
    # The first steps of each family of models, and where to read on.
    for words in ("fastgen train vae --data", "fastgen train rnn --data", "--prompt", "fastgen train vae --help"):
        assert words in text


@pytest.mark.parametrize("command", ["train vae", "train rnn", "generate", "bench", "doctor"])
def test_help_teaches_by_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command.split(), "--help"]) == 0
    text = capsys.readouterr().out
    assert "Examples:" in text
    assert f"fastgen {command}" in text.split("Examples:")[1]


def test_help_has_the_defaults_of_the_library(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import inspect

    from fastgen.models import VAEConfig
    from fastgen.train import TrainingConfig, VAERecipe

    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERMINAL_WIDTH", "200")
    assert main(["train", "vae", "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    samples = inspect.signature(VAERecipe).parameters["num_importance_samples"].default
    for option, default in (
        ("--latent-dim", VAEConfig().latent_dim),
        ("--architecture", VAEConfig().architecture),
        ("--epochs", TrainingConfig().epochs),
        ("--batch-size", TrainingConfig().batch_size),
        ("--lr", TrainingConfig().learning_rate),
        ("--importance-samples", samples),
    ):
        (line,) = [line for line in lines if f"{option} " in line and "torchrun" not in line and "fastgen" not in line]
        assert f"[default: {default}]" in line


def test_unknown_commands_and_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert "No such command 'trian'" in error(capsys, "trian")
    assert "--epocs" in error(capsys, "train", "vae", "--epocs", "3")
    assert "--epochs" in error(capsys, "train", "vae", "--epochs", "many")


def test_train_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    np.save("images.npy", np.zeros((20, 8, 8), np.uint8))
    Path("damaged.npy").write_bytes(Path("images.npy").read_bytes()[:100])
    Path("occupied").mkdir()
    Path("occupied/thesis.tex").touch()
    vae = ("train", "vae", "--data", "images.npy")
    assert error(capsys, "train", "vae").startswith("--data: expected a folder, a file, mnist or digits")
    assert "absent" in error(capsys, "train", "vae", "--data", "absent")
    assert "damaged.npy" in error(capsys, "train", "vae", "--data", "damaged.npy")
    assert "occupied: not empty" in error(capsys, *vae, "--out", "occupied")
    assert "thesis.tex" in error(capsys, *vae, "--out", "occupied/thesis.tex")
    assert error(capsys, *vae, "--epochs", "0") == "--epochs: expected an int of at least 1, got 0"
    assert error(capsys, *vae, "--latent-dim", "0").startswith("--latent-dim: expected an int of at least 1")
    assert error(capsys, *vae, "--lr", "0") == "--lr: expected a finite number above 0, got 0.0"
    assert error(capsys, *vae, "--kl-warmup", "-1") == "--kl-warmup: expected an int of at least 0, got -1"
    assert error(capsys, *vae, "--image-size", "0").startswith("--image-size: expected an int of at least 1")
    assert error(capsys, *vae, "--channels", "0,4").startswith("--channels: expected a sequence of ints")
    assert error(capsys, *vae, "--image-channels", "2").startswith("--image-channels: expected 1, 3 or None")
    assert (
        error(capsys, *vae, "--hidden-sizes", "5,x")
        == "--hidden-sizes: expected ints with commas between them, got '5,x'"
    )
    assert error(capsys, *vae, "--test-size", "some") == "--test-size: expected a count or a fraction, got 'some'"
    assert error(capsys, *vae, "--test-size", "20") == "--test-size: expected 1 to 19 of the 20 images, got 20"
    assert error(capsys, *vae, "--conditional").startswith("--conditional: expected data with labels")
    assert error(capsys, *vae, "--importance-samples", "0").startswith("--importance-samples: expected an int")
    assert "no such run folder" in error(capsys, "train", "vae", "--resume", "absent")
    assert "not a run folder" in error(capsys, "train", "vae", "--resume", "occupied")
    given = error(capsys, "train", "vae", "--resume", "occupied", "--lr", "0.1")
    assert given == (
        "--resume: goes on with the run as it was started, but --lr was given too; what may change "
        "is --epochs, --max-steps, --max-seconds, --patience, --device, --compile, --save-every, --keep-checkpoints, "
        "--tensorboard, --importance-samples, --importance-images"
    )
    assert not Path("runs").exists()


def test_advice_names_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "images.npy", np.zeros((40, 8, 8), np.uint8))
    vae = ("train", "vae", "--data", str(tmp_path / "images.npy"), "--no-tensorboard", "--warmup-steps", "0")
    message = error(capsys, *vae, "--likelihood", "gaussian", "--lr", "1e30", "--out", str(tmp_path / "run"), "--quiet")
    assert message.endswith("try a lower --lr (1e+30 now) or --max-grad-norm")


def test_other_data_at_resume(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = tmp_path / "images.npy", tmp_path / "batch_size"
    np.save(path, np.zeros((40, 8, 8), np.uint8))
    arguments = ("train", "vae", "--data", str(path), "--out", str(out), "--epochs", "1", "--quiet")
    assert main([*arguments, "--importance-samples", "1"]) == 0
    np.save(path, np.ones((40, 8, 8), np.uint8))
    message = error(capsys, "train", "vae", "--resume", str(out), "--quiet")
    assert re.fullmatch(r"--data: expected checksum '\w{8}', as .*/batch_size was started with, got '\w{8}'", message)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_unwritable_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "images.npy", np.zeros((20, 8, 8), np.uint8))
    (tmp_path / "locked").mkdir(mode=0o500)
    message = error(
        capsys, "train", "vae", "--data", str(tmp_path / "images.npy"), "--out", str(tmp_path / "locked" / "run")
    )
    assert "Permission denied" in message


def test_an_out_below_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "images.npy", np.zeros((20, 8, 8), np.uint8))
    out = str(tmp_path / "images.npy" / "run")
    message = error(capsys, "train", "vae", "--data", str(tmp_path / "images.npy"), "--out", out)
    assert message == f"{out}: Not a directory"


def test_bugs_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise KeyError("bug")

    monkeypatch.setattr("fastgen.cli.train.vae.load_images", broken)
    with pytest.raises(KeyError):
        main(["train", "vae", "--data", "digits"])


def test_traceback_on_demand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTGEN_TRACEBACK", "1")
    with pytest.raises(FileNotFoundError):
        main(["train", "vae", "--data", "absent"])


def test_without_typer_or_rich_the_extra_is_named() -> None:
    # As if they had never been installed: the finder of files does not find them.
    program = """
import importlib.machinery, sys
from fastgen.cli import main
find = importlib.machinery.PathFinder.find_spec
for hidden in ("typer", "rich"):
    for name in [name for name in sys.modules if name.partition(".")[0] == hidden]:
        del sys.modules[name]
    importlib.machinery.PathFinder.find_spec = lambda name, *rest: None if name == hidden else find(name, *rest)
    print(main(["--version"]))
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ended.stdout.splitlines() == ["2", "2"]
    assert ended.stderr.splitlines() == [
        "error: typer is not installed: pip install 'fastgen-torch[train]'",
        "error: rich is not installed: pip install 'fastgen-torch[train]'",
    ]


@pytest.mark.parametrize("missing", ["accelerate", "matplotlib", "PIL", "safetensors", "tensorboard"])
def test_a_missing_extra_is_named_before_anything_is_written(
    missing: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None if name == missing else find(name, *rest))
    monkeypatch.chdir(tmp_path)
    np.save("images.npy", np.zeros((20, 8, 8), np.uint8))
    message = error(capsys, "train", "vae", "--data", "images.npy")
    assert message == f"{missing} is not installed: pip install 'fastgen-torch[train]'"
    assert not Path("runs").exists()


def program(before: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the installed program, after the statements `before`."""
    start = f"import sys\n{before}\nfrom _fastgen_cli import main\nsys.exit(main())"
    command = [sys.executable, "-c", start, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})


def test_the_program_is_the_command_line() -> None:
    ended = program("", "--version")
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, f"fastgen {__version__}\n", "")


@pytest.mark.parametrize("module", ["fastgen", "fastgen.cli"])
def test_the_package_and_its_command_line_are_modules_to_run(
    module: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for arguments, code in (["--version"], 0), (["trian"], 2):
        monkeypatch.setattr("sys.argv", [module, *arguments])
        with pytest.raises(SystemExit) as ended:
            runpy.run_module(module, run_name="__main__", alter_sys=False)
        assert ended.value.code == code
    captured = capsys.readouterr()
    assert captured.out == f"fastgen {__version__}\n"
    assert "No such command 'trian'" in captured.err


def test_a_variable_that_cannot_be_is_one_line() -> None:
    ended = program("", "doctor", FASTGEN_CPU_ISA="bogus")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == "error: FASTGEN_CPU_ISA: expected one of generic, avx2, avx512, avx512_bf16, got 'bogus'\n"
    assert "Traceback" in program("", "doctor", FASTGEN_CPU_ISA="bogus", FASTGEN_TRACEBACK="1").stderr


@pytest.mark.parametrize("module", ["torch", "fastgen.cli.app"])
def test_ctrl_c_during_the_imports_is_one_line(module: str) -> None:
    # The finder presses Ctrl-C and swallows it, as code with a bare `except` does.
    ended = program(f"""
import os, signal, time
class Finder:
    def find_spec(self, name, *rest):
        if name == "{module}":
            try:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(60)
            except BaseException:
                pass
sys.meta_path.insert(0, Finder())
""")
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "aborted\n")


def test_ctrl_c_in_a_command_is_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fastgen.cli.doctor.diagnose", interrupted)
    assert main(["doctor"]) == 130
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "aborted\n")
