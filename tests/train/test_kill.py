"""Runs killed with SIGKILL at any moment end with the bits of one that was not."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from toys import images

from fastgen.train import read_metrics
from fastgen.train.checkpoint import Checkpoint

KILLED = signal.SIGKILL


class Zygote:
    def __init__(self) -> None:
        command = [sys.executable, str(Path(__file__).with_name("zygote.py"))]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def run(self, *arguments: str, kill_after: float | None = None, die: int | None = None) -> int:
        """The child's exit code, or minus the signal that ended it."""
        assert self.process.stdin is not None
        request = {"arguments": [*arguments, "--quiet"], "kill_after": kill_after, "die": die}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return os.waitstatus_to_exitcode(int(self.answer()))

    def answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    zygote = Zygote()
    assert zygote.answer() == "ready\n"
    yield zygote
    zygote.close()


def vae(folder: Path) -> str:
    """The options of a run of 50 steps on data in `folder`."""
    np.savez(folder / "blobs.npz", images=images(120).images.numpy(), labels=images(120).labels.numpy())
    options = "--architecture mlp --hidden-sizes 16 --latent-dim 3 --dropout 0.2 --conditional --kl-warmup 30"
    return f"vae --data {folder}/blobs.npz {options} --epochs 5 --batch-size 10 --importance-samples 5"


def rnn(folder: Path) -> str:
    """The same of a recurrent network, with all kinds of dropout and a state that goes on from step to step."""
    (folder / "cats.txt").write_text("the cat sat on the mat.\n" * 20)
    options = "--hidden-size 16 --num-layers 2 --dropout 0.2 --locked-dropout --state-dropout 0.1 --weight-dropout 0.1"
    return f"rnn --data {folder}/cats.txt {options} --epochs 5 --batch-size 4 --seq-len 11 --sample-length 20"


def gan(folder: Path) -> str:
    """The same of two networks with two optimisers, an average and a penalty every third update."""
    np.savez(folder / "blobs.npz", images=images(120).images.numpy(), labels=images(120).labels.numpy())
    options = "--architecture mlp --hidden-sizes 16 --latent-dim 3 --r1 1 --penalty-interval 3 --spectral-norm"
    return f"gan --data {folder}/blobs.npz {options} --epochs 5 --batch-size 10 --evaluate-every 1"


def gpt(folder: Path) -> str:
    """The same of a Transformer, with dropout, a batch in parts, and documents."""
    (folder / "cats").mkdir()
    for name in ("a.txt", "b.txt"):
        (folder / "cats" / name).write_text("the cat sat on the mat.\n" * 10)
    model = "--tokenizer chars --hidden-size 16 --num-layers 1 --num-heads 2 --dropout 0.2 --separate-documents"
    options = "--gradient-accumulation-steps 2 --epochs 5 --batch-size 4 --seq-len 11 --sample-length 20"
    return f"gpt --data {folder}/cats {model} {options}"


class Whole:
    """A run that nothing disturbs: its arguments, its folder, and how long it takes."""

    def __init__(self, zygote: Zygote, options: Callable[[Path], str], folder: Path) -> None:
        more = "--save-every 4 --log-every 3 --no-tensorboard"
        self.arguments = ["train", *options(folder).split(), *more.split()]
        self.folder = folder / "whole"
        start = time.monotonic()
        assert zygote.run(*self.arguments, "--out", str(self.folder)) == 0
        self.seconds = time.monotonic() - start


@pytest.fixture(scope="module")
def whole(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Callable[[Path], str]], Whole]:
    return functools.cache(lambda options: Whole(zygote, options, tmp_path_factory.mktemp("kill")))


def check_same(out: Path, whole: Path) -> None:
    reports = ("samples.txt", "tokenizer.json") if (whole / "samples.txt").exists() else ("samples.png",)
    for name in ("model/model.safetensors", "model/config.json", *reports):
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name
    last = "checkpoints/step-00000050.safetensors"
    ours, theirs = Checkpoint.load(out / last), Checkpoint.load(whole / last)
    assert ours.tensors.keys() == theirs.tensors.keys()
    assert all(ours.tensors[name].equal(theirs.tensors[name]) for name in ours.tensors)
    tables = [read_metrics(folder / "metrics.csv") for folder in (out, whole)]
    for row in (*tables[0], *tables[1]):
        for name in ("seconds", "examples_per_second", "tokens_per_second"):
            row.pop(name, None)
    assert tables[0] == tables[1]
    leftovers = [path for path in out.rglob("*.safetensors") if path.name.startswith(".")]
    assert leftovers == []


@pytest.mark.slow
@pytest.mark.parametrize(("family", "share"), [(vae, 0.2), (vae, 0.7), (rnn, 0.4), (gan, 0.4), (gpt, 0.4)])
def test_killed_again_and_again(
    family: Callable[[Path], str], share: float, zygote: Zygote, whole: Callable[..., Whole]
) -> None:
    undisturbed = whole(family)
    arguments, reference = undisturbed.arguments, undisturbed.folder
    out = reference.with_name(f"killed-{share}")
    patience = share * undisturbed.seconds
    code = zygote.run(*arguments, "--out", str(out), kill_after=patience)
    assert code in (-KILLED, 0)
    for _ in range(30):
        if code == 0:
            break
        if (out / "config.json").exists():
            code = zygote.run(*arguments[:2], "--resume", str(out), kill_after=patience)
        else:  # killed before the run began
            code = zygote.run(*arguments, "--out", str(out), kill_after=patience)
        patience *= 1.3  # enough in the end to come from one checkpoint to the next
    assert code == 0
    check_same(out, reference)


@pytest.mark.parametrize(("family", "number"), [(vae, 1), (vae, 4), (rnn, 8), (gan, 5), (gpt, 5)])
def test_killed_while_writing_a_checkpoint(
    family: Callable[[Path], str], number: int, zygote: Zygote, whole: Callable[..., Whole]
) -> None:
    arguments, reference = whole(family).arguments, whole(family).folder
    out = reference.with_name(f"writing-{number}")
    assert zygote.run(*arguments, "--out", str(out), die=number) == -KILLED
    (leftover,) = (out / "checkpoints").glob(".step-*")
    with pytest.raises(ValueError, match="damaged"):
        Checkpoint.load(leftover)
    assert zygote.run(*arguments[:2], "--resume", str(out)) == 0
    check_same(out, reference)


def test_a_line_cut_short_is_written_again(zygote: Zygote, whole: Callable[..., Whole]) -> None:
    arguments, reference = whole(vae).arguments, whole(vae).folder
    out = reference.with_name("cut")
    assert zygote.run(*arguments, "--out", str(out), die=9) == -KILLED
    with open(out / "metrics.csv", "a") as file:
        file.write("train,3,27,12.5,1")
    assert zygote.run("train", "vae", "--resume", str(out)) == 0
    check_same(out, reference)
