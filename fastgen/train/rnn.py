"""Training of recurrent models by truncated back-propagation through time."""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fastgen import _validate
from fastgen.data import SeriesSet, Streams, TokenSet
from fastgen.evaluate.sequences import read_streams
from fastgen.models import RNN, RNNConfig, RNNOutput, detach_state
from fastgen.random import Generator, bits
from fastgen.train.config import TrainingConfig
from fastgen.train.plots import save_continuation, save_curves
from fastgen.train.recipe import Recipe, Step, adamw, checksum, initialised
from fastgen.train.text import TextTask

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["RNNRecipe", "RNNSeriesRecipe", "RNNTextRecipe"]

# Held-out data is read in so many streams at most, whatever the processes, so that the figures do not depend on them;
# and in streams of so many steps at least, as each starts from a state of zeros.
_STREAMS, _STREAM_LENGTH = 32, 1000
_READ = 1000  # steps of a series that are read before one is continued


class RNNRecipe(Recipe):
    """Trains an `RNN` with AdamW on windows of parallel streams, judged by its loss on a held-out sequence.

    The sequence is cut into as many contiguous streams as a batch has rows. A step takes the next window of
    every stream and starts from the state, without its history, that the step before it ended with (Williams
    & Peng, "An efficient gradient-based algorithm for on-line training of recurrent network trajectories",
    1990). Each epoch starts from zeros, a little further into the sequence than the last, by a random part of
    what the windows leave over, so that they fall elsewhere.

    Several processes take their shares of the streams and do what one does with all of them.

    Args:
        model: a model, or a configuration: then the weights are drawn from `seed`.
        train, test: sequences to train on and to judge by.
        seq_len: steps of a window, through which gradients flow.
        seed: of the initial weights and of the samples.

    Raises:
        ValueError: for a model and data that do not fit each other, or a sequence shorter than a window.
    """

    model_type = "rnn"
    criterion = "loss"
    _num_sums: ClassVar[int]
    defaults: ClassVar[Mapping[str, Any]] = {
        "epochs": 10,
        "batch_size": 32,
        "max_grad_norm": 1.0,
        "evaluate_steps": 1000,
    }

    def __init__(self, model: RNN | RNNConfig, train: Any, test: Any, *, seq_len: int = 128, seed: int = 0) -> None:
        self.seq_len = self.units_per_example = _validate.integer("seq_len", seq_len, 1)
        self._train, self._test = self._sequence(train), self._sequence(test)
        if len(self._train) <= seq_len:
            raise ValueError(
                f"seq_len: expected less than the {len(self._train):,} {self.unit} to train on, got {seq_len}"
            )
        if len(self._test) < 2:
            raise ValueError(f"test: expected at least 2 {self.unit}, got {len(self._test)}")
        self.data_name = train.name
        self._seed = seed
        self._state: tuple[Tensor, ...] | None = None  # of this process's streams, (num_layers, b, hidden_size) each
        self.model = model if isinstance(model, RNN) else self._new_model(model, train)

    def _new_model(self, config: RNNConfig, train: Any) -> RNN:
        return initialised(lambda: RNN(config), self._seed)

    @abc.abstractmethod
    def _sequence(self, data: Any) -> Tensor:
        """(N, ...): what the windows are cut from."""

    @abc.abstractmethod
    def _sums(self, output: RNNOutput, targets: Tensor) -> Tensor:
        """(_num_sums,) float64: what is summed over the targets, the loss in nats first."""

    @abc.abstractmethod
    def _figures(self, means: list[float]) -> dict[str, float]:
        """What `evaluate` reports, from these sums divided by the number of targets."""

    @property
    def num_examples(self) -> int:
        """Windows, each with a target for its last step."""
        return (len(self._train) - 1) // self.seq_len

    def order(self, batch_size: int, generator: Generator) -> Tensor:
        """(windows of a stream, batch_size): where in the sequence the window of each row begins."""
        windows = self.num_examples // batch_size
        left_over = len(self._train) - 1 - windows * batch_size * self.seq_len
        first = int(bits(1, generator=generator, dtype=torch.int64)) % (left_over + 1)
        streams = torch.arange(batch_size) * (windows * self.seq_len)
        return first + streams + torch.arange(windows).unsqueeze(1) * self.seq_len

    def carried(self) -> dict[str, Tensor]:
        if self._state is None:
            return {}
        return {name: part.transpose(0, 1).contiguous() for name, part in zip("hc", self._state, strict=False)}

    def carry(self, tensors: Mapping[str, Tensor]) -> None:
        self._state = tuple(tensors[name].transpose(0, 1).contiguous() for name in "hc" if name in tensors)

    def modules(self) -> dict[str, nn.Module]:
        return {"model": self.model}

    def optimizers(self, config: TrainingConfig) -> dict[str, Optimizer]:
        return {"adamw": adamw(self.model, config)}

    def train_step(self, step: Step) -> dict[str, Tensor]:
        if step.index % (self.num_examples // step.batch_size) == 0:  # an epoch begins
            self._state = None
        window = self._train[step.rows.unsqueeze(1) + torch.arange(self.seq_len + 1)]
        inputs, targets = self._on_device(window[:, :-1]), self._on_device(window[:, 1:])
        state = self._state if self._state is None or len(self._state) == 2 else self._state[0]
        output = step.modules["model"](inputs, targets, state)
        step.update("adamw", output.loss)
        state = detach_state(output.state)
        self._state = state if isinstance(state, tuple) else (state,)
        return {"loss": output.loss.detach()}

    def _on_device(self, steps: Tensor) -> Tensor:
        return (steps if steps.is_floating_point() else steps.long()).to(self.model.device)

    def evaluate(self, accelerator: Accelerator, generator: Generator, *, final: bool = False) -> dict[str, float]:
        """Figures of the held-out sequence, which is read once from its beginning in parallel streams."""
        count = min(_STREAMS, max(1, (len(self._test) - 1) // _STREAM_LENGTH))
        processes, process = accelerator.num_processes, accelerator.process_index
        first, end = process * count // processes, (process + 1) * count // processes
        streams = Streams(self._test, count, self.seq_len, first, end - first)
        sums = torch.zeros(self._num_sums, dtype=torch.float64, device=accelerator.device)
        for output, targets in read_streams(self.model, streams):
            sums += self._sums(output, targets)
        total: Tensor = accelerator.reduce(sums, "sum")
        return self._figures((total / (streams.stream_len * count)).tolist())

    def save_pretrained(self, folder: Path) -> None:
        self.model.save_pretrained(folder)


class RNNTextRecipe(TextTask, RNNRecipe):
    """Trains an `RNN` on text; see `RNNRecipe`.

    Metrics: `loss`, in nats a token; `perplexity`, its exponential; `bits_per_character`, which can be
    compared between tokenizers.

    Args:
        model: as for `RNNRecipe`. A model without a tokenizer gets that of the data.
        train, test: tokens of one tokenizer.
        prompt: what the samples begin with, which are not shown with it; default a new line.
        sample_length: tokens of a sample.
        seq_len, seed: as for `RNNRecipe`.
    """

    title = "RNN"
    unit = "tokens"
    _num_sums = 1

    def __init__(
        self,
        model: RNN | RNNConfig,
        train: TokenSet,
        test: TokenSet,
        *,
        seq_len: int = 128,
        seed: int = 0,
        prompt: str | None = None,
        sample_length: int = 500,
    ) -> None:
        self._set_text(model, train, test, prompt, sample_length)
        super().__init__(model, train, test, seq_len=seq_len, seed=seed)
        self.model.tokenizer = self.tokenizer

    def _sequence(self, data: TokenSet) -> Tensor:
        return data.tokens

    def _sums(self, output: RNNOutput, targets: Tensor) -> Tensor:
        assert output.loss is not None
        return output.loss.double().view(1) * targets.numel()

    def _figures(self, means: list[float]) -> dict[str, float]:
        return self._text_figures(means[0])

    def describe(self) -> dict[str, Any]:
        return self._describe_text(self._train, self._test, seq_len=self.seq_len)


class RNNSeriesRecipe(RNNRecipe):
    """Trains an `RNN` on a series of numbers; see `RNNRecipe`.

    Metrics: `loss`, the negative log-density of a step in nats, of either sign as densities are; `rmse`, the
    root mean square error of the predicted mean one step ahead, over all columns, in the units of the data.

    Args:
        model: a model, or a configuration: then the model standardises by the mean and deviation of `train`.
        train, test: the beginning and the end of a series.
        sample_length: steps of the continuation that is drawn beside the truth: of `train` into `test`.
        seq_len, seed: as for `RNNRecipe`.
    """

    metrics: ClassVar[tuple[str, ...]] = ("loss", "rmse")
    defaults: ClassVar[Mapping[str, Any]] = {
        "epochs": 100,
        "batch_size": 8,
        "learning_rate": 5e-3,
        "warmup_steps": 20,
        "max_grad_norm": 1.0,
        "evaluate_every": 10,
    }
    unit = "steps"
    _num_sums = 2

    def __init__(
        self,
        model: RNN | RNNConfig,
        train: SeriesSet,
        test: SeriesSet,
        *,
        seq_len: int = 50,
        seed: int = 0,
        sample_length: int = 200,
    ) -> None:
        for name, series in (("train", train), ("test", test)):
            if not isinstance(series, SeriesSet):
                raise TypeError(f"{name}: expected a SeriesSet, got {type(series).__name__}")
        config = model.config if isinstance(model, RNN) else model
        self._columns = train.columns
        if config.input_size != len(train.columns):
            raise ValueError(f"input_size: expected {len(train.columns)} as the series has, got {config.input_size}")
        if test.columns != train.columns:
            raise ValueError(f"test: expected the columns {train.columns}, got {test.columns}")
        self._sample_length = _validate.integer("sample_length", sample_length, 1)
        super().__init__(model, train, test, seq_len=seq_len, seed=seed)

    def _sequence(self, data: SeriesSet) -> Tensor:
        return data.values

    def _new_model(self, config: RNNConfig, train: SeriesSet) -> RNN:
        model = super()._new_model(config, train)
        model.set_scale(*train.scale())
        return model

    def _sums(self, output: RNNOutput, targets: Tensor) -> Tensor:
        assert output.loss is not None
        assert output.distribution is not None
        errors = (output.distribution.mean - targets).double().square().mean(-1)
        return torch.stack((output.loss.double() * errors.numel(), errors.sum()))

    def _figures(self, means: list[float]) -> dict[str, float]:
        loss, square = means
        return {"loss": loss, "rmse": math.sqrt(square)}

    def describe(self) -> dict[str, Any]:
        return {
            "model": self.model.config.to_dict(),
            "data": {
                "name": self.data_name,
                "train": len(self._train),
                "test": len(self._test),
                "columns": list(self._columns),
                "seq_len": self.seq_len,
                "checksum": checksum(self._train, self._test),
            },
            "evaluation": {"sample_length": self._sample_length},
        }

    def save_sample(self, path: Path) -> None:
        """The way on from the end of `train`: the mean and five draws, beside the truth."""
        steps = min(self._sample_length, len(self._test))
        before = self._train[-2 * steps :]
        prompt = self._train[-_READ:].to(self.model.device)
        mean = self.model.generate(prompt, max_new_tokens=steps, temperature=0)[len(prompt) :]
        draws = self.model.generate(prompt, max_new_tokens=steps, n=5, seed=self._seed)[:, len(prompt) :]
        truth = torch.cat((before, self._test[:steps]))
        title = f"RNN on {self.data_name}"
        save_continuation(path, truth, len(before), mean.cpu(), draws.cpu(), self._columns, title)

    def save_report(self, folder: Path, rows: list[dict[str, str]]) -> list[Path]:
        """continuation.png and loss.png."""
        continuation, loss = folder / "continuation.png", folder / "loss.png"
        self.save_sample(continuation)
        titles = {"loss": "loss (nats a step)", "rmse": "root mean square error"}
        save_curves(loss, rows, titles, title=f"RNN on {self.data_name}", units="")
        return [continuation, loss]
