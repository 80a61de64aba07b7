"""What the commands that take a trained model have in common: where it is, what they compute on and in."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from fastgen import _validate
from fastgen.train import read_run
from fastgen.train.config import DEVICES, DTYPES

__all__ = ["device_of", "dtype_of", "model_folder", "refuse"]


def refuse(given: Mapping[str, Any], options: Collection[str], reason: str) -> None:
    """Raise ValueError where one of the options was given, which the model does not take."""
    for name in given:
        if name in options:
            raise ValueError(f"--{name.replace('_', '-')}: expected none, as {reason}")


def model_folder(run: Path) -> Path:
    """The model of a run folder, or the folder itself if it is that of a model."""
    if (run / "model" / "config.json").is_file():
        if (run / "config.json").is_file():
            read_run(run)  # damaged, or of a newer fastgen
        return run / "model"
    if (run / "config.json").is_file() and not (run / "model.safetensors").is_file():
        if (run / "metrics.csv").is_file():
            raise FileNotFoundError(f"{run}: no model yet, the run has not come to its first evaluation")
    elif run.is_dir() and not (run / "config.json").is_file():
        raise FileNotFoundError(f"{run}: neither a run folder nor a model folder, it has no config.json")
    return run


def dtype_of(name: str | None) -> torch.dtype | None:
    """That of the option --dtype; None: that of the weights."""
    return None if name is None else getattr(torch, _validate.choice("dtype", name, DTYPES))


def device_of(name: str) -> torch.device:
    """That of the option --device."""
    _validate.choice("device", name, DEVICES)
    if name == "cuda":
        _validate.cuda_is_there("--device", "auto or cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")
