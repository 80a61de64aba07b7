"""What `torch.jit.script` is told: TorchScript knows neither the ops of fastgen nor how they are chosen."""

from __future__ import annotations

from typing import NoReturn

import torch

__all__ = ["refuse"]


def refuse(module: torch.nn.Module) -> NoReturn:
    """The `__prepare_scriptable__` of a module: `torch.jit.script` calls it first, that of all within a module too."""
    name = type(module).__name__
    raise NotImplementedError(
        f"torch.jit.script: expected torch.nn.{name}, got fastgen.nn.{name}; use torch.jit.trace, or load the state "
        "dict into a model of torch.nn"
    )
