"""The four models train on a GPU, go on there after a stop, and generate what the same weights give on the CPU."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from toys import images

from fastgen import models
from fastgen.cli import main
from fastgen.train import read_metrics

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
DEVICE = "cuda"

OPTIONS = {
    "vae": "--architecture mlp --hidden-sizes 16 --latent-dim 3 --conditional --batch-size 10",
    "gan": "--architecture mlp --hidden-sizes 16 --latent-dim 3 --loss wasserstein --conditional --batch-size 10",
    "rnn": "--hidden-size 16 --num-layers 2 --dropout 0.2 --batch-size 4 --seq-len 11 --sample-length 20",
    "gpt": "--tokenizer chars --hidden-size 16 --num-layers 1 --num-heads 2 --dropout 0.2 --batch-size 4 --seq-len 11",
}
CLASSES = {"vae": models.VAE, "gan": models.GAN, "rnn": models.RNN, "gpt": models.GPT}


def arguments(family: str, folder: Path) -> list[str]:
    if family in ("vae", "gan"):
        data = folder / "blobs.npz"
        np.savez(data, images=images(120).images.numpy(), labels=images(120).labels.numpy())
    else:
        data = folder / "cats.txt"
        data.write_text("the cat sat on the mat.\n" * 20)
    common = f"--evaluate-every 1 --save-every 6 --no-tensorboard --quiet --device {DEVICE} --out {folder / 'run'}"
    return ["train", family, "--data", str(data), *OPTIONS[family].split(), *common.split()]


def run_on(device: str, model: torch.nn.Module, family: str, **options: object) -> object:
    model = model.to(device)
    if family in ("vae", "gan"):
        return model.generate(5, seed=3, labels=torch.arange(5) % 2, **options)
    return model.generate("the", seed=3, max_new_tokens=20, **options)


@pytest.mark.parametrize("family", OPTIONS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_family(family, dtype, tmp_path):
    train = arguments(family, tmp_path)
    assert main([*train, "--dtype", dtype, "--epochs", "2"]) == 0
    run = tmp_path / "run"
    assert main(["train", family, "--resume", str(run), "--epochs", "4", "--quiet"]) == 0
    assert json.loads((run / "config.json").read_text())["training"]["device"] == DEVICE
    rows = [row for row in read_metrics(run / "metrics.csv") if row["split"] == "train"]
    assert np.isfinite([float(row["loss"]) for row in rows if row.get("loss")]).all()

    model = CLASSES[family].from_pretrained(run / "model").eval()
    on_gpu, again, on_cpu = (run_on(device, model, family) for device in (DEVICE, DEVICE, "cpu"))
    if isinstance(on_cpu, torch.Tensor):
        assert on_gpu.device.type == DEVICE
        assert torch.equal(on_gpu, again)  # the same latents, and one machine
        torch.testing.assert_close(on_gpu.cpu(), on_cpu, rtol=1e-3, atol=1e-4)
    else:
        assert on_gpu == again
        assert len(on_gpu) == len(on_cpu)


@pytest.mark.parametrize("family", OPTIONS)
def test_the_command_line_generates_there(family, tmp_path, capsys):
    assert main([*arguments(family, tmp_path), "--epochs", "1"]) == 0
    capsys.readouterr()
    out = ["--n", "4", "--out", str(tmp_path / "made.png")] if family in ("vae", "gan") else ["--max-new-tokens", "9"]
    assert main(["generate", str(tmp_path / "run"), "--seed", "1", "--device", DEVICE, *out]) == 0
    assert (tmp_path / "made.png").exists() or len(capsys.readouterr().out) > 9
