"""Checkpoints: one safetensors file each, whole or absent.

Tensors are named `<module>.<key>` and `optimizer.<name>.<parameter>.<key>`; everything else (step, best result,
settings of the optimisers) is JSON in the file's metadata. Nothing is pickled.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastgen._extras import extra
from fastgen._files import atomic_path
from fastgen.models._pretrained import own_memory

__all__ = ["Checkpoint", "CheckpointFolder", "all_finite", "load_optimizer", "optimizer_state"]

_FORMAT = "fastgen-checkpoint-1"
_NAME = re.compile(r"step-(\d{8,})\.safetensors")


@dataclass
class Checkpoint:
    """Tensors by name, and a JSON object for the rest."""

    tensors: dict[str, Tensor]
    state: dict[str, Any]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write atomically. Raises OSError where the file cannot be written."""
        with extra("train"):
            from safetensors import SafetensorError
            from safetensors.torch import save_file
        metadata = {"format": _FORMAT, "state": json.dumps(self.state)}
        with atomic_path(path) as temporary:
            try:
                save_file(own_memory(self.tensors), temporary, metadata)
            except SafetensorError as error:
                raise OSError(f"cannot write the checkpoint: {error}") from error  # atomic_path adds the path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Checkpoint:
        """Read a file of `save`, tensors on the CPU.

        Raises:
            FileNotFoundError: no such file.
            ValueError: the file is damaged, or no checkpoint.
        """
        with extra("train"):
            from safetensors import SafetensorError, safe_open
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != _FORMAT:
                    raise ValueError(f"{path}: expected a checkpoint of format {_FORMAT!r}")
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
                return cls(tensors, json.loads(metadata["state"]))
        except SafetensorError as error:
            raise ValueError(f"{path}: damaged checkpoint ({error})") from error

    def part(self, prefix: str) -> dict[str, Tensor]:
        """The tensors named `prefix.*`, without the prefix."""
        start = f"{prefix}."
        return {name[len(start) :]: tensor for name, tensor in self.tensors.items() if name.startswith(start)}


def optimizer_state(name: str, optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state of an optimiser as tensors named `optimizer.<name>.*` and JSON."""
    state_dict = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    values: dict[str, dict[str, Any]] = {}
    for index, state in state_dict["state"].items():
        for key, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{name}.{index}.{key}"] = value
            else:
                values.setdefault(str(index), {})[key] = value
    return tensors, {"param_groups": state_dict["param_groups"], "state": values}


def load_optimizer(name: str, optimizer: Optimizer, checkpoint: Checkpoint) -> None:
    """Put back what `optimizer_state` gave."""
    saved = checkpoint.state["optimizers"][name]
    # JSON knows neither tuples (betas) nor int keys.
    groups = [
        {key: tuple(value) if isinstance(value, list) and key != "params" else value for key, value in group.items()}
        for group in saved["param_groups"]
    ]
    state: dict[int, dict[str, Any]] = {int(index): dict(values) for index, values in saved["state"].items()}
    for key, tensor in checkpoint.part(f"optimizer.{name}").items():
        index, _, field = key.partition(".")
        state.setdefault(int(index), {})[field] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": groups})


class CheckpointFolder:
    """The checkpoints of one run: `step-00000450.safetensors` and so on.

    Args:
        folder: where they lie; made with the first one.
        keep: how many of the latest stay. The best one stays besides.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder = folder
        self.keep = keep

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}.safetensors"

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, ascending."""
        names = (_NAME.fullmatch(path.name) for path in self.folder.glob("step-*.safetensors"))
        return sorted(int(name[1]) for name in names if name)

    def latest(self) -> Path | None:
        steps = self.steps()
        return self.path(steps[-1]) if steps else None

    def save(self, step: int, checkpoint: Checkpoint, best: int | None = None) -> Path:
        """Write the checkpoint of `step`, then drop old ones, but never that of step `best`."""
        path = self.path(step)
        checkpoint.save(path)
        self._drop(old for old in self.steps()[: -self.keep] if old != best)
        return path

    def _drop(self, steps: Iterable[int]) -> None:
        for step in steps:
            self.path(step).unlink(missing_ok=True)


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether every floating-point element is finite."""
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors if tensor.is_floating_point())
