from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from toys import images

from fastgen.cli import main
from fastgen.train import GANRecipe, read_metrics
from fastgen.train.checkpoint import Checkpoint

ARGUMENTS = [
    *("--architecture", "mlp", "--hidden-sizes", "16", "--latent-dim", "3", "--free-bits", "0", "--seed", "5"),
    *("--batch-size", "20", "--log-every", "2", "--epochs", "4", "--importance-samples", "5", "--device", "cpu"),
    "--quiet",
]


@pytest.mark.slow
def test_two_processes_do_what_one_does_with_the_whole_batch(tmp_path: Path) -> None:
    data = images(110)
    np.savez(tmp_path / "blobs.npz", images=data.images.numpy())
    one, two = tmp_path / "one", tmp_path / "two"
    train = ["train", "vae", "--data", str(tmp_path / "blobs.npz"), *ARGUMENTS]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "fastgen.cli", *train, "--out", str(two)]
    ended = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert ended.returncode == 0, ended.stderr
    assert main([*train, "--out", str(one)]) == 0

    tables = [read_metrics(folder / "metrics.csv") for folder in (one, two)]
    assert len(tables[0]) == len(tables[1]) == 4 * 2 + 4 + 1  # one writer, no row twice
    for ours, theirs in zip(*tables, strict=True):
        assert (ours["split"], ours["step"]) == (theirs["split"], theirs["step"])
        for name in ("loss", "negative_elbo", "reconstruction_loss", "kl", "negative_iwae", "learning_rate"):
            assert bool(ours[name]) == bool(theirs[name])
            if ours[name]:
                assert float(ours[name]) == pytest.approx(float(theirs[name]), rel=2e-6, abs=1e-6), (name, ours["step"])
    last = "checkpoints/step-00000016.safetensors"
    ours, theirs = Checkpoint.load(one / last), Checkpoint.load(two / last)
    for name, tensor in ours.part("model").items():
        torch.testing.assert_close(theirs.part("model")[name], tensor, rtol=1e-4, atol=1e-6)
    assert len(list((two / "events").iterdir())) == 1
    assert {path.name for path in two.iterdir()} == {path.name for path in one.iterdir()}

    # One process can take over what two began, from the state at the same step.
    taken = tmp_path / "taken"
    shutil.copytree(two, taken)
    for path in (taken / "checkpoints").glob("step-00000016*"):
        path.unlink()
    assert main(["train", "vae", "--resume", str(taken), "--quiet"]) == 0
    assert len(read_metrics(taken / "metrics.csv")) == len(tables[0])


@pytest.mark.slow
def test_two_processes_share_the_streams(tmp_path: Path) -> None:
    (tmp_path / "cats.txt").write_text("the cat sat on the mat.\n" * 40)
    model = "--hidden-size 16 --num-layers 1 --batch-size 4 --seq-len 20 --epochs 2 --log-every 1"
    train = ["train", "rnn", "--data", str(tmp_path / "cats.txt"), *model.split(), "--device", "cpu", "--quiet"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "fastgen.cli", *train, "--out", str(tmp_path / "two")]
    ended = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert ended.returncode == 0, ended.stderr
    assert main([*train, "--out", str(tmp_path / "one")]) == 0

    tables = [read_metrics(tmp_path / name / "metrics.csv") for name in ("one", "two")]
    assert len(tables[0]) == len(tables[1]) == 2 * 11 + 2 + 1
    for ours, theirs in zip(*tables, strict=True):
        assert (ours["split"], ours["step"]) == (theirs["split"], theirs["step"])
        assert float(ours["loss"]) == pytest.approx(float(theirs["loss"]), rel=1e-5), ours["step"]
    last = "checkpoints/step-00000022.safetensors"
    one, two = Checkpoint.load(tmp_path / "one" / last), Checkpoint.load(tmp_path / "two" / last)
    for name in ("carried.h", "carried.c"):  # of all streams, in the same order
        assert one.tensors[name].shape == (4, 1, 16)
        torch.testing.assert_close(two.tensors[name], one.tensors[name], rtol=1e-3, atol=1e-5)

    # One process can take over what two began.
    assert main(["train", "rnn", "--resume", str(tmp_path / "two"), "--epochs", "3", "--quiet"]) == 0
    assert len(read_metrics(tmp_path / "two" / "metrics.csv")) == 3 * 11 + 3 + 1


@pytest.mark.slow
def test_two_processes_train_a_gan(tmp_path: Path) -> None:
    """Two networks in turn, a gradient of a gradient, augmentation, two batches a step. No batch norm, whose statistics
    are those of a process."""
    np.savez(tmp_path / "blobs.npz", images=images(110).images.numpy())
    model = "--architecture mlp --hidden-sizes 16 --latent-dim 3 --normalization none --loss wasserstein --r1 0.1"
    more = "--critic-steps 2 --augment color,translation --batch-size 8 --epochs 4 --log-every 1 --seed 5 --lr 1e-3"
    train = ["train", "gan", "--data", str(tmp_path / "blobs.npz"), *model.split(), *more.split()]
    train += ["--device", "cpu", "--quiet"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "fastgen.cli", *train, "--out", str(tmp_path / "two")]
    ended = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert ended.returncode == 0, ended.stderr
    assert main([*train, "--out", str(tmp_path / "one")]) == 0

    tables = [read_metrics(tmp_path / name / "metrics.csv") for name in ("one", "two")]
    steps = 4 * (99 // 2 // 8)
    assert len(tables[0]) == len(tables[1]) == steps + 1 + 1  # rows, the evaluation at the end, the final one
    for ours, theirs in zip(*tables, strict=True):
        assert (ours["split"], ours["step"]) == (theirs["split"], theirs["step"])
        for name in GANRecipe.metrics:
            assert bool(ours[name]) == bool(theirs[name])
            if name == "accuracy":  # of pairs within a process
                continue
            if ours[name]:
                assert float(ours[name]) == pytest.approx(float(theirs[name]), rel=1e-3, abs=1e-5), (name, ours["step"])
    last = f"checkpoints/step-{steps:08d}.safetensors"
    one, two = Checkpoint.load(tmp_path / "one" / last), Checkpoint.load(tmp_path / "two" / last)
    for name, tensor in one.part("model").items():
        torch.testing.assert_close(two.part("model")[name], tensor, rtol=1e-2, atol=1e-4)

    # One process can take over what two began.
    assert main(["train", "gan", "--resume", str(tmp_path / "two"), "--epochs", "5", "--quiet"]) == 0


def test_a_batch_that_cannot_be_shared() -> None:
    from fastgen.train.trainer import _divisible_batch

    assert _divisible_batch(20, 110, 2) == 20
    assert _divisible_batch(20, 7, 2) == 6
    with pytest.raises(ValueError, match="batch_size: expected a multiple of the 2 processes, got 5"):
        _divisible_batch(5, 110, 2)
    with pytest.raises(ValueError, match="data: expected at least an example for each of 4 processes, got 3"):
        _divisible_batch(4, 3, 4)
