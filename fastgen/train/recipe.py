"""What differs from one model family to the next: `Recipe`, and the `Step` that a trainer hands it."""

from __future__ import annotations

import abc
import zlib
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from fastgen.random import Generator, permutation
from fastgen.train.config import TrainingConfig

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["Recipe", "Step", "adamw", "checksum", "initialised"]

_Model = TypeVar("_Model", bound=nn.Module)


@dataclass(frozen=True)
class Step:
    """One training step of one process.

    Attributes:
        index: steps taken before this one, since the run began.
        rows: (..., b) int64, the examples of this process, rows [first_row, first_row + b) of the global batch,
            as the recipe's `order` has them.
        first_row: place of rows[0] in the global batch.
        batch_size: examples of the global batch.
        modules: the recipe's modules as Accelerate wrapped them; their forward is the data-parallel one.
        noise_seed: names the run's stream of noise.
        update: `update(name, loss)` does one step of the optimiser `name`: backward, clipping, step. Of several
            losses, one after the other, the gradients add up before the step.
        autocast: a context of the run's mixed precision, for recipes that do not call the forward of `modules`,
            which brings its own.
    """

    index: int
    rows: Tensor
    first_row: int
    batch_size: int
    modules: Mapping[str, nn.Module]
    noise_seed: int
    update: Callable[[str, Tensor | Iterable[Tensor]], None]
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext

    def generator(self, noise_per_sample: int, key: int | None = None) -> Generator:
        """The noise of these rows, where each row of the global batch takes `noise_per_sample` elements.

        A row gets the same noise however many processes share the batch. Different keys give independent streams,
        for steps that draw several times.
        """
        seed = self.noise_seed if key is None else Generator(self.noise_seed).fork(key).seed
        return Generator(seed, (self.index * self.batch_size + self.first_row) * noise_per_sample)


class Recipe(abc.ABC):
    """How one model family is trained: its modules, optimisers, training step, evaluation and pictures.

    A `Trainer` drives it and owns everything else: devices, order of the data, schedule, checkpoints, logs.
    A recipe keeps no state that changes during training outside its modules, its optimisers and what it
    declares in `carried`, so that a checkpoint of those and the step number continue a run exactly.
    """

    model_type: ClassVar[str]
    """Names the family, as in `config.json`."""
    metrics: ClassVar[tuple[str, ...]]
    """What `train_step` and `evaluate` report; the first one is shown in the progress bar."""
    criterion: ClassVar[str]
    """The evaluated metric that decides which checkpoint is the best: lower is better."""
    defaults: ClassVar[Mapping[str, Any]] = {}
    """Fields of `TrainingConfig` for which the family has defaults of its own; see `training_config`."""

    data_name: str = "data"
    """What the data is called in the name of the run folder."""
    unit: str = "examples"
    """What the speed of training is counted in."""
    units_per_example: int = 1
    averages_gradients: ClassVar[bool] = False
    """Whether the trainer leaves the modules as they are and averages gradients itself, after each backward pass.

    `DistributedDataParallel`, which it uses otherwise, wants one forward pass of the whole module before each backward
    pass. Steps that are made in another way (two networks in turn, gradients of gradients) say True here: then each
    process calls the module itself, under `Step.autocast`.
    """
    progress: Callable[[int, int], None] = staticmethod(lambda done, total: None)
    """Called in a final evaluation that takes long, with what is done of how much; a trainer shows it."""
    sample_suffix: str = ".png"
    """The ending of the files that `save_sample` writes."""

    @classmethod
    def training_config(cls, **fields: Any) -> TrainingConfig:
        """A `TrainingConfig` of these fields, with the family's defaults for the others."""
        return TrainingConfig(**{**cls.defaults, **fields})

    @property
    @abc.abstractmethod
    def num_examples(self) -> int:
        """Examples to train on."""

    def order(self, batch_size: int, generator: Generator) -> Tensor:
        """(num_examples // batch_size, ..., batch_size) int64: the rows of each step of an epoch.

        Here: all examples in a new order, without what is left over. The generator is that of the epoch,
        the same on all processes. A step that reads several batches has them side by side: what is counted as an
        example of `num_examples` is then as many.
        """
        rows = permutation(self.num_examples, generator=generator)
        return rows[: self.num_examples // batch_size * batch_size].view(-1, batch_size)

    def carried(self) -> dict[str, Tensor]:
        """What the next step takes over from this one, tensors (b, ...) with a row for each of this process's.

        Here: nothing, as examples stand for themselves. A checkpoint holds the rows of all processes.
        """
        return {}

    def carry(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `carried` gave; not called where it gave nothing."""
        raise NotImplementedError(f"{type(self).__name__} has carried state, but no method carry")

    @abc.abstractmethod
    def modules(self) -> dict[str, nn.Module]:
        """The modules to train, by name. The name is the prefix of their tensors in a checkpoint."""

    def compilable(self) -> tuple[nn.Module, ...]:
        """The modules whose forward passes become graphs with `TrainingConfig.compile`. Here: those of `modules`.

        Raises:
            ValueError: naming `compile`, where torch.compile cannot take the step.
        """
        return tuple(self.modules().values())

    @abc.abstractmethod
    def optimizers(self, config: TrainingConfig) -> dict[str, Optimizer]:
        """Optimisers by name, at their full learning rate: the trainer applies the schedule to all of them."""

    @abc.abstractmethod
    def train_step(self, step: Step) -> dict[str, Tensor]:
        """Train on `step.rows`; returns detached scalars, means over the rows, for some or all of `metrics`."""

    def figures(self) -> dict[str, float]:
        """More of `metrics` for a row of training metrics, of the model as the last step left it. Here: none.

        Taken by one process, every `log_every` steps.
        """
        return {}

    def remarks(self, row: Mapping[str, float]) -> list[str]:
        """What to tell the user in view of a row of training metrics: `step`, means of `train_step`, `figures`.

        Called with each row of the run in its turn, also, when it is resumed, with those of before; of one process.
        """
        return []

    @abc.abstractmethod
    def evaluate(self, accelerator: Accelerator, generator: Generator, *, final: bool = False) -> dict[str, float]:
        """Metrics on held-out data, equal on all processes. `final`: with those too dear to take every epoch."""

    @abc.abstractmethod
    def describe(self) -> dict[str, Any]:
        """Everything needed to build this recipe again, as JSON: the `config.json` of a run holds it."""

    def begin(self, folder: Path) -> None:
        """Write into the folder of a new run what its config.json has no room for. Here: nothing."""
        return None

    @abc.abstractmethod
    def save_pretrained(self, folder: Path) -> None:
        """Write the model for use after training."""

    @abc.abstractmethod
    def save_sample(self, path: Path) -> str | None:
        """Write one sample from the present weights, of the same noise each time; what of it to print, if any."""

    @abc.abstractmethod
    def save_report(self, folder: Path, rows: list[dict[str, str]]) -> list[Path]:
        """Write samples and pictures at the end; `rows` are those of metrics.csv. Returns what was written."""


def initialised(make: Callable[[], _Model], seed: int) -> _Model:
    """What `make` makes with torch's default generator at `seed`; the generator is put back afterwards."""
    with torch.random.fork_rng([]):
        torch.default_generator.manual_seed(seed)
        return make()


def adamw(model: nn.Module, config: TrainingConfig, betas: tuple[float, float] = (0.9, 0.999)) -> AdamW:
    """AdamW over the trainable parameters; weight decay spares biases and other vectors."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return AdamW([group for group in groups if group["params"]], lr=config.learning_rate, betas=betas, fused=True)


def checksum(*tensors: Tensor | None) -> str:
    """CRC-32 of the numbers of all tensors that there are, one after the other, as 8 hexadecimal digits.

    `Recipe.describe` has that of the data, so that a run is not continued on other data.
    """
    value = 0
    for tensor in tensors:
        if tensor is not None:
            value = zlib.crc32(tensor.contiguous().numpy(force=True).data, value)
    return f"{value:08x}"
