"""How to train: `TrainingConfig`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from fastgen import _validate
from fastgen.random import Generator

__all__ = ["CHANGEABLE", "TrainingConfig"]

SCHEDULES = ("cosine", "constant")
DEVICES = ("auto", "cpu", "cuda")
DTYPES = ("float32", "bfloat16", "float16")
# Fields that may differ when a run is resumed.
CHANGEABLE = (
    *("epochs", "max_steps", "max_seconds", "patience"),
    *("device", "compile", "save_every", "keep_checkpoints", "tensorboard"),
)


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How to train, whatever the model.

    Args:
        epochs: passes over the training data.
        max_steps: stop after so many steps, if that comes first.
        max_seconds: stop after so much training time, over all continuations of a run. The outcome then
            depends on the speed of the machine: such a run cannot be repeated exactly.
        patience: stop after so many evaluations without a better one; None: never.
        batch_size: examples a step, of all processes together, so that a run is the same on any number of
            them (to rounding; not with dropout or free bits, which each process takes over its own part).
            What is left at the end of an epoch is skipped; the next one has another order.
        learning_rate: of Adam, at its highest.
        schedule: "cosine" falls to 0 along half a cosine (Loshchilov & Hutter, "SGDR", 2017); "constant".
        warmup_steps: steps over which the rate rises linearly to `learning_rate`.
        weight_decay: decoupled (Loshchilov & Hutter, "Decoupled weight decay regularization", 2019), of
            matrices and kernels, not of biases and other vectors.
        max_grad_norm: gradients are scaled down to this Euclidean norm; None: never.
        seed: decides the initial weights, the order of the data and all noise, 0 <= seed < 2**64.
        device: "auto" (CUDA if there is any), "cpu" or "cuda".
        dtype: "float32", "bfloat16" or "float16": what products and convolutions compute in (autocast), while weights,
            their updates and what is saved stay float32. float16 scales the loss.
        compile: whether `torch.compile` makes one graph of each module's training step. It needs a C++ compiler, and
            an error stops the run: nothing falls back. Losses are the same to rounding.
        log_every: steps between two rows of training metrics, counted anew in every epoch, which ends with one.
        evaluate_every: epochs between two evaluations, each followed by a sample and a checkpoint.
        evaluate_steps: steps between further evaluations within an epoch, for long ones; None: none.
        save_every: steps between additional checkpoints; None: only after evaluations.
        keep_checkpoints: how many of the latest stay, besides the best.
        tensorboard: whether to write TensorBoard events.

    Raises:
        ValueError: for a field out of range, naming it.
    """

    epochs: int = 30
    max_steps: int | None = None
    max_seconds: float | None = None
    patience: int | None = None
    batch_size: int = 64
    learning_rate: float = 2e-3
    schedule: str = "cosine"
    warmup_steps: int = 100
    weight_decay: float = 0.0
    max_grad_norm: float | None = None
    seed: int = 0
    device: str = "auto"
    dtype: str = "float32"
    compile: bool = False
    log_every: int = 50
    evaluate_every: int = 1
    evaluate_steps: int | None = None
    save_every: int | None = None
    keep_checkpoints: int = 2
    tensorboard: bool = True

    def __post_init__(self) -> None:
        checked: dict[str, Any] = {
            "warmup_steps": _validate.integer("warmup_steps", self.warmup_steps, 0),
            "learning_rate": _validate.number("learning_rate", self.learning_rate, above=0),
            "weight_decay": _validate.number("weight_decay", self.weight_decay, minimum=0),
            "schedule": _validate.choice("schedule", self.schedule, SCHEDULES),
            "device": _validate.choice("device", self.device, DEVICES),
            "dtype": _validate.choice("dtype", self.dtype, DTYPES),
            "compile": _validate.boolean("compile", self.compile),
            "seed": Generator(self.seed).seed,
            "tensorboard": _validate.boolean("tensorboard", self.tensorboard),
        }
        for name in ("epochs", "batch_size", "log_every", "evaluate_every", "keep_checkpoints"):
            checked[name] = _validate.integer(name, getattr(self, name), 1)
        for name in ("max_steps", "patience", "evaluate_steps", "save_every"):
            value = getattr(self, name)
            checked[name] = None if value is None else _validate.integer(name, value, 1)
        for name in ("max_seconds", "max_grad_norm"):
            value = getattr(self, name)
            checked[name] = None if value is None else _validate.number(name, value, above=0)
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def learning_rate_factor(self, step: int, total: int) -> float:
        """What the learning rate of step `step` of `total` is multiplied by, from 0 to 1."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.schedule == "constant":
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * (step - self.warmup_steps) / max(1, total - self.warmup_steps)))
