"""What differs from one model family to the next: `Recipe`, and the `Step` that a trainer hands it."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn
from torch.optim import Optimizer

from fastgen.random import Generator

if TYPE_CHECKING:
    from accelerate import Accelerator

    from fastgen.train.config import TrainingConfig

__all__ = ["Recipe", "Step"]


@dataclass(frozen=True)
class Step:
    """One training step of one process.

    Attributes:
        index: steps taken before this one, since the run began.
        rows: (b,) int64, the examples of this process, rows [first_row, first_row + b) of the global batch.
        first_row: place of rows[0] in the global batch.
        batch_size: examples of the global batch.
        modules: the recipe's modules as Accelerate wrapped them; their forward is the data-parallel one.
        noise_seed: names the run's stream of noise.
        update: `update(name, loss)` does one step of the optimiser `name`: backward, clipping, step.
    """

    index: int
    rows: Tensor
    first_row: int
    batch_size: int
    modules: Mapping[str, nn.Module]
    noise_seed: int
    update: Callable[[str, Tensor], None]

    def generator(self, noise_per_sample: int) -> Generator:
        """The noise of these rows, where each row of the global batch takes `noise_per_sample` elements.

        A row gets the same noise however many processes share the batch.
        """
        return Generator(self.noise_seed, (self.index * self.batch_size + self.first_row) * noise_per_sample)


class Recipe(abc.ABC):
    """How one model family is trained: its modules, optimisers, training step, evaluation and pictures.

    A `Trainer` drives it and owns everything else: devices, order of the data, schedule, checkpoints, logs.
    A recipe keeps no state that changes during training outside its modules and optimisers, so that a
    checkpoint of those and the step number continue a run exactly.
    """

    model_type: ClassVar[str]
    """Names the family, as in `config.json`."""
    metrics: ClassVar[tuple[str, ...]]
    """What `train_step` and `evaluate` report; the first one is shown in the progress bar."""
    criterion: ClassVar[str]
    """The evaluated metric that decides which checkpoint is the best: lower is better."""

    @property
    @abc.abstractmethod
    def num_examples(self) -> int:
        """Examples to train on."""

    @abc.abstractmethod
    def modules(self) -> dict[str, nn.Module]:
        """The modules to train, by name. The name is the prefix of their tensors in a checkpoint."""

    @abc.abstractmethod
    def optimizers(self, config: TrainingConfig) -> dict[str, Optimizer]:
        """Optimisers by name, at their full learning rate: the trainer applies the schedule to all of them."""

    @abc.abstractmethod
    def train_step(self, step: Step) -> dict[str, Tensor]:
        """Train on `step.rows`; returns detached scalars, means over the rows, for some or all of `metrics`."""

    @abc.abstractmethod
    def evaluate(self, accelerator: Accelerator, generator: Generator, *, final: bool = False) -> dict[str, float]:
        """Metrics on held-out data, equal on all processes. `final`: with those too dear to take every epoch."""

    @abc.abstractmethod
    def describe(self) -> dict[str, Any]:
        """Everything needed to build this recipe again, as JSON: the `config.json` of a run holds it."""

    @abc.abstractmethod
    def save_pretrained(self, folder: Path) -> None:
        """Write the model for use after training."""

    @abc.abstractmethod
    def save_sample(self, path: Path) -> None:
        """Draw one picture (PNG) from the present weights; the same noise each time."""

    @abc.abstractmethod
    def save_report(self, folder: Path, rows: list[dict[str, str]]) -> list[Path]:
        """Draw the pictures at the end of a run, `rows` being those of metrics.csv; returns what was written."""
