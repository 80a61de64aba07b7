"""The trainer: one loop for every model family."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import shutil
import signal
import sys
import sysconfig
import textwrap
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import IntEnum
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fastgen import _validate
from fastgen._extras import extra, require
from fastgen._files import write_text
from fastgen._version import __version__
from fastgen.random import Generator
from fastgen.train.checkpoint import Checkpoint, CheckpointFolder, all_finite, load_optimizer, optimizer_state
from fastgen.train.config import TrainingConfig
from fastgen.train.logging import EventLog, MetricsFile, ProgressMode, make_progress, read_metrics
from fastgen.train.memory import kept_memory
from fastgen.train.recipe import Recipe, Step
from fastgen.train.run_folder import RUN_FORMAT, check_same_run, new_folder, read_run, remove_leftovers

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["Interrupted", "NonFiniteLossError", "Trainer", "TrainingResult", "evaluate_recipe"]

_CHANGING = ("format", "training", "evaluation", "options")  # entries of config.json that a resumed run writes anew
_MIXED_PRECISION = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}  # Accelerate's names


class _Stream(IntEnum):
    """What the streams forked from the seed of a run are for."""

    ORDER = 0
    NOISE = 1
    TORCH = 2
    EVALUATION = 3


class _Stop(IntEnum):
    """Why to leave the loop before its end; the greater one wins among processes."""

    NO = 0
    TIME_IS_UP = 1
    SIGNAL = 2


class NonFiniteLossError(ArithmeticError):
    """Training produced an infinity or NaN."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM ended a run after its checkpoint was saved.

    Attributes:
        out: the run folder.
        step: steps done.
        signal: the signal's number.
    """

    def __init__(self, message: str, out: Path, step: int, number: int) -> None:
        super().__init__(message)
        self.out, self.step, self.signal = out, step, number


@dataclass(frozen=True)
class TrainingResult:
    """What a run left.

    Attributes:
        out: the run folder.
        step: steps done.
        best_step: the step whose checkpoint is the best, and whose weights the model now has.
        metrics: final evaluation of these weights.
        files: what a reader may want to open.
    """

    out: Path
    step: int
    best_step: int
    metrics: dict[str, float]
    files: tuple[Path, ...]


class Trainer:
    """Trains the model of a recipe and keeps a run folder.

    The folder holds config.json, metrics.csv, checkpoints/, samples/ (pictures or texts, of before the first step and
    of each evaluation), events/ (TensorBoard), model/ (the best weights so far, for `from_pretrained`) and, at the end,
    the recipe's report.

    Under `torchrun` or `accelerate launch` the processes share each batch, gradients are averaged, and
    rank 0 alone writes.

    A run is a function of (recipe, data, config): the order of an epoch, the noise of a step and the state
    of torch's own generators at a step depend on the seed and the step alone. So a checkpoint needs no
    random state but the step, and on the CPU a run that was killed at any moment and resumed ends with the
    same bits as one that was not. Torch's generators are put back at the end.

    Args:
        recipe: what to train.
        config: how.
        out: run folder, default `runs/<model>-<data>-<time>`. An existing one is never overwritten.
        resume: continue the run in `out` from its latest checkpoint. Model, data and config must be those
            it was started with, but how long it goes on and the device may change.
        record: more entries for config.json, such as where the data came from.
        progress: "auto" (a bar in a terminal, else lines), "bar", "lines" or "quiet".

    Raises:
        ValueError: for settings that do not fit the data or the processes.
        FileExistsError: `out` is not empty.
        ImportError: a package of the extra `train` is missing.
    """

    def __init__(
        self,
        recipe: Recipe,
        config: TrainingConfig | None = None,
        *,
        out: str | os.PathLike[str] | None = None,
        resume: bool = False,
        record: Mapping[str, Any] | None = None,
        progress: ProgressMode = "auto",
    ) -> None:
        self.recipe = recipe
        self.config = config = config or TrainingConfig()
        if resume and out is None:
            raise ValueError("out: expected the folder of the run to resume, got None")
        packages = ("accelerate", "matplotlib", "PIL", "rich", "safetensors")
        require("train", *packages, *(("tensorboard",) if config.tensorboard else ()))
        self.accelerator = _accelerator(config)
        self._compilable: tuple[nn.Module, ...] = ()
        if config.compile:
            _check_compiler(self.accelerator.device)
            self._compilable = recipe.compilable()
        self._main = self.accelerator.is_main_process
        self._progress = make_progress(progress if self._main else "quiet", recipe.unit)
        recipe.progress = self._progress.evaluate

        self.batch_size = _divisible_batch(config.batch_size, recipe.num_examples, self.accelerator.num_processes)
        self.steps_per_epoch = recipe.num_examples // self.batch_size
        self.total_steps = config.epochs * self.steps_per_epoch
        if config.max_steps is not None:
            if self.total_steps < config.max_steps:
                ends = f"{config.epochs} epochs end the run at step {self.total_steps}"
                self._progress.message(f"{ends}, before max_steps {config.max_steps}")
            self.total_steps = min(self.total_steps, config.max_steps)

        self._modules = recipe.modules()
        optimizers = recipe.optimizers(config)
        for optimizer in optimizers.values():
            for group in optimizer.param_groups:
                group["initial_lr"] = group["lr"]  # torch's name for the rate before any schedule
        prepare = self.accelerator.prepare
        wrap = self._placed if recipe.averages_gradients else prepare
        self._wrapped: dict[str, nn.Module] = {name: wrap(module) for name, module in self._modules.items()}
        self._optimizers: dict[str, Optimizer] = optimizers
        if self.accelerator.scaler is not None:  # else the wrapper would only cost 0.2 ms a step
            self._optimizers = {name: prepare(optimizer) for name, optimizer in optimizers.items()}

        root = Generator(config.seed)
        self._order_stream = root.fork(_Stream.ORDER)
        self._noise_stream = root.fork(_Stream.NOISE)
        self._evaluation_stream = root.fork(_Stream.EVALUATION)
        self._torch_seed = root.fork(_Stream.TORCH).seed

        self._step = 0
        self._best: _Best | None = None
        self._worse = 0  # evaluations since the best one
        self._names: list[str] = []
        self._window: list[Tensor] = []  # of each step since the last row of metrics.csv, the metrics _names
        self._seconds_before = 0.0  # spent by earlier processes of this run
        self._signal = 0
        self.out = self._open_folder(out, resume, record or {})
        self._checkpoints = CheckpointFolder(self.out / "checkpoints", config.keep_checkpoints)
        if resume:
            self._load_latest()

    def fit(self) -> TrainingResult:
        """Train to the end, evaluate the best checkpoint, write the report.

        Raises:
            Interrupted: after Ctrl-C or SIGTERM, when the checkpoint is saved: at the end of the step, with
                several processes at their next log point. A second Ctrl-C does not wait.
            NonFiniteLossError: the loss or a weight became infinite or NaN; earlier checkpoints stay.
            OSError: a file could not be written; earlier checkpoints stay.
        """
        with kept_memory(), self._torch_generators(), self._plain_forward_afterwards(), self._compiled(), self._logs():
            with self._signals():
                self._train()
            try:
                return self._finish()
            except KeyboardInterrupt:
                raise self._interrupted(signal.SIGINT) from None

    # ------------------------------------------------------------------------------------------------
    # The loop

    def _train(self) -> None:
        config = self.config
        for module in self._wrapped.values():
            module.train()
        self._started = time.monotonic()
        self._restart_clock()
        self._progress.start(self._step, self.total_steps)
        if self._step == 0:
            self._sample(show=False)
        over = config.max_seconds is not None and self._seconds_before >= config.max_seconds
        order, order_epoch = torch.empty(0), -1
        while self._step < self.total_steps and not over and not self._out_of_patience():
            epoch, batch = divmod(self._step, self.steps_per_epoch)
            if epoch != order_epoch:
                order = self.recipe.order(self.batch_size, self._order_stream.fork(epoch))
                order_epoch = epoch
            self._train_step(order[batch])
            self._progress.advance(self._step)

            stop = self._stop()
            over = stop is _Stop.TIME_IS_UP or self._step == self.total_steps
            evaluation = over or self._evaluation_is_due()
            if evaluation or self._step % self.steps_per_epoch % config.log_every == 0:  # also at the end of an epoch
                self._log()
            if evaluation:
                self._evaluate()
                self._save()
                self._sample()
            elif stop is _Stop.SIGNAL or (config.save_every and self._step % config.save_every == 0):
                self._save()
            if stop is _Stop.SIGNAL:
                raise self._interrupted(self._signal)
        if self._best is None:  # resumed, only to end before the first evaluation
            self._evaluate()
            self._save()
        if self._stop(at_end=True) is _Stop.SIGNAL:  # during the last evaluation
            raise self._interrupted(self._signal)

    def _evaluation_is_due(self) -> bool:
        epochs, steps = divmod(self._step, self.steps_per_epoch)
        if steps == 0:
            return epochs % self.config.evaluate_every == 0
        return self.config.evaluate_steps is not None and steps % self.config.evaluate_steps == 0

    def _out_of_patience(self) -> bool:
        return self.config.patience is not None and self._worse >= self.config.patience

    def _train_step(self, batch: Tensor) -> None:
        """One step on the rows `batch` of all processes together."""
        processes, process = self.accelerator.num_processes, self.accelerator.process_index
        # Dropout and whatever else a model draws from torch's generators depends on the step alone.
        self._seed_torch(self._step * processes + process)
        factor = self.config.learning_rate_factor(self._step, self.total_steps)
        for optimizer in self._optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * factor
        share = self._share()
        step = Step(
            index=self._step,
            rows=batch[..., share],
            first_row=share.start,
            batch_size=self.batch_size,
            modules=self._wrapped,
            noise_seed=self._noise_stream.seed,
            update=self._update,
            autocast=self.accelerator.autocast,
        )
        metrics = self._run_compiled(step) if self.config.compile else self.recipe.train_step(step)
        self._names = list(metrics)
        self._window.append(torch.stack(list(metrics.values())))
        self._step += 1

    def _run_compiled(self, step: Step) -> dict[str, Tensor]:
        with torch.compiler.set_stance("default"):
            try:
                return self.recipe.train_step(step)
            except torch._dynamo.exc.TorchDynamoException as error:
                raise ValueError(f"compile: expected False, as torch.compile fails here: {error}") from error

    @contextlib.contextmanager
    def _compiled(self) -> Iterator[None]:
        """Make graphs of what training steps call, if the run asks for it; evaluations and samples go without."""
        if not self.config.compile:
            yield
            return
        # Graphs of earlier runs would count towards the limit of recompilations of the forward that they share.
        torch.compiler.reset()
        before = [(module, vars(module).get("forward")) for module in self._compilable]
        for module, _ in before:
            # One graph or an error; random numbers are those that torch draws without it.
            options: dict[str, Any] = {"fullgraph": True, "options": {"fallback_random": True}}
            vars(module)["forward"] = torch.compile(module.forward, **options)
        try:
            with torch.compiler.set_stance("force_eager"):
                yield
        finally:
            for module, forward in before:
                if forward is None:
                    del module.forward
                else:  # that of mixed precision
                    vars(module)["forward"] = forward

    def _share(self) -> slice:
        """Which rows of the global batch are this process's."""
        rows = self.batch_size // self.accelerator.num_processes
        first = self.accelerator.process_index * rows
        return slice(first, first + rows)

    def _update(self, name: str, loss: Tensor | Iterable[Tensor]) -> None:
        optimizer = self._optimizers[name]
        optimizer.zero_grad()
        for part in (loss,) if isinstance(loss, Tensor) else loss:
            self.accelerator.backward(part)
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        if self.recipe.averages_gradients and self.accelerator.num_processes > 1:
            self._average_gradients(parameters)
        if self.config.max_grad_norm is not None:
            # Not by the accelerator, which would take the scale off the gradients of all optimisers.
            self.accelerator.unscale_gradients(optimizer)
            torch.nn.utils.clip_grad_norm_(parameters, self.config.max_grad_norm)
        optimizer.step()

    def _average_gradients(self, parameters: list[nn.Parameter]) -> None:
        """Mean over the processes, in one message."""
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        mean: Tensor = self.accelerator.reduce(torch.cat([gradient.flatten() for gradient in gradients]), "mean")
        sizes = [gradient.numel() for gradient in gradients]
        for gradient, part in zip(gradients, mean.split(sizes), strict=True):
            gradient.copy_(part.view_as(gradient))

    def _stop(self, at_end: bool = False) -> _Stop:
        """Whether to leave the loop, the same answer on all processes."""
        stop = _Stop.NO
        if self.config.max_seconds is not None and self._seconds() >= self.config.max_seconds:
            stop = _Stop.TIME_IS_UP
        if self._signal:
            stop = _Stop.SIGNAL
        if self.accelerator.num_processes == 1:
            return stop
        if self._step % self.steps_per_epoch % self.config.log_every and not at_end:  # asking the others costs a wait
            return _Stop.NO
        asked = self.accelerator.gather(torch.tensor([int(stop)], device=self.accelerator.device))
        return _Stop(int(asked.max()))

    def _seconds(self) -> float:
        return self._seconds_before + time.monotonic() - self._started

    def _restart_clock(self) -> None:
        self._clock, self._clock_step = time.monotonic(), self._step

    # ------------------------------------------------------------------------------------------------
    # Metrics, pictures, checkpoints

    def _log(self) -> None:
        """Write the mean of the metrics since the last time; the device is waited for only here."""
        window = self._averaged_window()
        self._window = []
        units = (self._step - self._clock_step) * self.batch_size * self.recipe.units_per_example
        rate = units / max(time.monotonic() - self._clock, 1e-9)
        metrics = dict(zip(self._names, window.double().mean(0).tolist(), strict=True))
        if self._main:
            metrics.update(self.recipe.figures())
        self._record("train", self._step, metrics, rate)
        if self._main:
            for remark in self.recipe.remarks({"step": self._step, **metrics}):
                self._progress.message(remark)
        self._restart_clock()

    def _averaged_window(self) -> Tensor:
        """(steps, metrics) since the last row of metrics.csv, averaged over the processes; checked."""
        window: Tensor = self.accelerator.reduce(torch.stack(self._window), "mean").cpu()
        bad = (~torch.isfinite(window)).nonzero()
        if len(bad):
            row, column = bad[0].tolist()
            step = self._step - len(window) + row + 1
            raise self._not_finite(f"{self._names[column]} became {float(window[row, column])} at step {step}")
        return window

    def _evaluate(self) -> None:
        metrics = self.recipe.evaluate(self.accelerator, self._evaluation_stream.clone())
        for name, value in metrics.items():
            if not math.isfinite(value):
                raise self._not_finite(f"{name} on the test data is {value} after step {self._step}")
        self._record("test", self._step, metrics)
        value = metrics[self.recipe.criterion]
        self._worse += 1
        if self._best is None or value < self._best["value"]:
            self._best, self._worse = {"step": self._step, "value": value}, 0
        if self._out_of_patience():
            self._progress.message(
                f"no better {self.recipe.criterion} in {_evaluations(self._worse)}: the run ends here"
            )
        for module in self._wrapped.values():
            module.train()
        self._restart_clock()

    def _record(self, split: str, step: int, metrics: Mapping[str, float], rate: float | None = None) -> None:
        """Figures of the model after `step` steps, for metrics.csv, TensorBoard and the user."""
        if not self._main:
            return
        epoch = math.ceil(step / self.steps_per_epoch)  # that of the last step, from 1
        self._progress.report(split, epoch, step, metrics, rate)
        values = dict(metrics)
        if rate is not None:
            values["learning_rate"] = next(iter(self._optimizers.values())).param_groups[0]["lr"]
            values[f"{self.recipe.unit}_per_second"] = round(rate, 1)
        if self._events is not None:
            self._events.write(split, step, values)
        place: dict[str, str | int] = {"split": split, "epoch": epoch, "step": step}
        self._metrics.write({**place, **values, "seconds": round(self._seconds(), 3)})

    def _save(self) -> None:
        """Save a checkpoint, or raise if the weights are no good, so that the last good one stays."""
        tensors = {
            f"{prefix}.{name}": tensor
            for prefix, module in self._modules.items()
            for name, tensor in module.state_dict().items()
        }
        if not all_finite(tensors.values()):
            raise self._not_finite(f"a weight became infinite or NaN by step {self._step}")
        for name, rows in self.recipe.carried().items():
            tensors[f"carried.{name}"] = self.accelerator.gather(rows)
        if self._window:
            self._window = list(self._averaged_window())
            tensors["metrics.window"] = torch.stack(self._window)
        if not self._main:
            return
        state: dict[str, Any] = {
            "step": self._step,
            "best": self._best,
            "worse": self._worse,
            "seconds": self._seconds(),
            "window": self._names,
            "optimizers": {},
        }
        for name, optimizer in self._optimizers.items():
            more, state["optimizers"][name] = optimizer_state(name, optimizer)
            tensors.update(more)
        if self.accelerator.scaler is not None:
            state["scaler"] = self.accelerator.scaler.state_dict()
        # A row that a checkpoint counts as written must outlive it.
        self._metrics.sync()
        self._checkpoints.save(self._step, Checkpoint(tensors, state), self._best and self._best["step"])
        if self._best and self._best["step"] == self._step:
            self.recipe.save_pretrained(self.out / "model")
        self._restart_clock()

    def _sample(self, *, show: bool = True) -> None:
        if self._main:
            name = f"step-{self._step:08d}{self.recipe.sample_suffix}"
            shown = self.recipe.save_sample(self.out / "samples" / name)
            if show and shown is not None:
                self._progress.message(textwrap.indent(shown, "  | ", lambda line: True))
        self._restart_clock()

    def _load_latest(self) -> None:
        if self._main:
            remove_leftovers(self.out)
        path = self._checkpoints.latest()
        if path is None:  # killed before the first one: the seed gives the beginning again
            return
        checkpoint = Checkpoint.load(path)
        self._load_modules(path, checkpoint)
        for name, optimizer in self._optimizers.items():
            load_optimizer(name, optimizer, checkpoint)
        if self.accelerator.scaler is not None and "scaler" in checkpoint.state:
            self.accelerator.scaler.load_state_dict(checkpoint.state["scaler"])
        state = checkpoint.state
        self._step, self._best, self._names = state["step"], state["best"], state["window"]
        self._worse = state.get("worse", 0)  # older checkpoints have none
        self._seconds_before = state["seconds"]
        if "metrics.window" in checkpoint.tensors:
            self._window = list(checkpoint.tensors["metrics.window"].to(self.accelerator.device))
        if carried := checkpoint.part("carried"):
            share = self._share()
            self.recipe.carry({name: rows[share].to(self.accelerator.device) for name, rows in carried.items()})
        self._progress.message(f"resumed {self.out} at step {self._step} of {self.total_steps}")

    def _load_modules(self, path: Path, checkpoint: Checkpoint) -> None:
        for prefix, module in self._modules.items():
            try:
                module.load_state_dict(checkpoint.part(prefix))
            except RuntimeError as error:
                raise ValueError(f"{path}: its weights are not those of this model ({error})") from None

    # ------------------------------------------------------------------------------------------------
    # Beginning and end

    def _placed(self, module: nn.Module) -> nn.Module:
        """The module itself on the device of this process, with the weights of the first one."""
        with extra("train"):
            from accelerate.utils import broadcast
        module.to(self.accelerator.device)
        if self.accelerator.num_processes > 1:
            for tensor in module.state_dict().values():
                tensor.copy_(broadcast(tensor.clone()))
        return module

    def _open_folder(self, out: str | os.PathLike[str] | None, resume: bool, record: Mapping[str, Any]) -> Path:
        """The run folder, with its config.json; the same on all processes."""
        with extra("train"):
            from accelerate.utils import broadcast_object_list

        from fastgen.benchmark.machine import cpu_model  # whose package imports ours

        folder, device = None, self.accelerator.device
        if self._main:
            description = {
                "format": RUN_FORMAT,
                "model_type": self.recipe.model_type,
                **self.recipe.describe(),
                "training": dataclasses.asdict(self.config),
                "processes": self.accelerator.num_processes,
                "machine": {"cpu": cpu_model(), "threads": torch.get_num_threads(), "device": str(device)},
                "versions": {"fastgen": __version__, "torch": torch.__version__, "python": sys.version.split()[0]},
                **record,
            }
            # As a reader of the file will see it: tuples are lists.
            description = json.loads(json.dumps(description))
            if resume:
                assert out is not None
                folder = Path(out)
                before = read_run(folder)
                check_same_run(folder, before, description)
                now = {name: description[name] for name in _CHANGING if name in description}
                description = {**before, **now}
            else:
                folder = new_folder(out, f"{self.recipe.model_type}-{self.recipe.data_name}")
                self.recipe.begin(folder)
                description["created"] = datetime.now().astimezone().isoformat(timespec="seconds")
            write_text(folder / "config.json", json.dumps(description, indent=2) + "\n")
        shared = [folder]
        broadcast_object_list(shared)
        assert shared[0] is not None
        return shared[0]

    def _finish(self) -> TrainingResult:
        assert self._best is not None  # the loop ends with an evaluation
        self.accelerator.wait_for_everyone()  # rank 0 may still be writing the last one
        path = self._checkpoints.path(self._best["step"])
        self._load_modules(path, Checkpoint.load(path))
        self._progress.message(f"final evaluation, of the weights of step {self._best['step']}")
        metrics = self.recipe.evaluate(self.accelerator, self._evaluation_stream.clone(), final=True)
        self._record("final", self._best["step"], metrics)
        files: list[Path] = []
        if self._main:
            self._metrics.sync()
            self.recipe.save_pretrained(self.out / "model")
            files = [*self.recipe.save_report(self.out, read_metrics(self._metrics.path)), self._metrics.path]
            files.append(self.out / "model")
        self.accelerator.wait_for_everyone()
        return TrainingResult(self.out, self._step, self._best["step"], metrics, tuple(files))

    @contextlib.contextmanager
    def _logs(self) -> Iterator[None]:
        self._events: EventLog | None = None
        if not self._main:
            yield
            return
        speed = f"{self.recipe.unit}_per_second"
        columns = ("split", "epoch", "step", *self.recipe.metrics, "learning_rate", speed, "seconds")
        self._metrics = MetricsFile(self.out / "metrics.csv", columns, self._step)
        for row in read_metrics(self._metrics.path):
            if row["split"] == "train":
                self.recipe.remarks({name: float(row[name]) for name in ("step", *self.recipe.metrics) if row[name]})
        if self.config.tensorboard:
            self._events = EventLog(self.out / "events", self._step)
        with contextlib.ExitStack() as last:  # all of them, whichever fails
            if self._events is not None:
                last.callback(self._events.close)
            last.callback(self._metrics.close)
            last.callback(self._progress.stop)
            yield

    @contextlib.contextmanager
    def _plain_forward_afterwards(self) -> Iterator[None]:
        """Take away the autocast that Accelerate hangs on forward: after training the user has the model."""
        try:
            yield
        finally:
            for module in self._modules.values():
                if hasattr(module, "_original_forward"):
                    del module.forward, module._original_forward

    @contextlib.contextmanager
    def _torch_generators(self) -> Iterator[None]:
        """Put torch's generators back afterwards: training seeds them, a notebook goes on using them."""
        cuda = self.accelerator.device.type == "cuda"
        with torch.random.fork_rng([torch.cuda.current_device()] if cuda else []):
            yield

    def _seed_torch(self, key: int) -> None:
        # Not torch.manual_seed, which looks through all device types: 70 us a step.
        seed = (self._torch_seed + key) % 2**63
        torch.default_generator.manual_seed(seed)
        if self.accelerator.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Note Ctrl-C and SIGTERM for the end of the step; a second one acts at once."""
        if threading.current_thread() is not threading.main_thread():
            yield  # Python allows handlers in the main thread only
            return

        def note(number: int, frame: FrameType | None) -> None:
            if self._signal:
                raise KeyboardInterrupt
            self._signal = number

        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _interrupted(self, number: int) -> Interrupted:
        message = f"stopped after step {self._step} of {self.total_steps}, the checkpoint is in {self.out}"
        return Interrupted(message, self.out, self._step, number or signal.SIGINT)

    def _not_finite(self, what: str) -> NonFiniteLossError:
        latest = self._checkpoints.latest()
        kept = f"the last good checkpoint is {latest}" if latest else "no checkpoint had been saved"
        advice = f"try a lower learning_rate ({self.config.learning_rate:g} now) or max_grad_norm"
        if self.config.dtype != "float32":
            advice += f", or float32 rather than {self.config.dtype}"
        return NonFiniteLossError(f"{what}; {kept}; {advice}")


class _Best(TypedDict):
    step: int
    value: float


def _accelerator(config: TrainingConfig) -> Accelerator:
    with extra("train"):
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState
    if config.device == "cuda":
        _validate.cuda_is_there("device", "'auto' or 'cpu'")
    # Accelerate keeps the settings of its first use for the whole process; each run has its own.
    AcceleratorState._reset_state(reset_partial_state=True)
    cpu = config.device == "cpu" or not torch.cuda.is_available()
    return Accelerator(cpu=cpu, mixed_precision=_MIXED_PRECISION[config.dtype])


def evaluate_recipe(recipe: Recipe, config: TrainingConfig) -> dict[str, float]:
    """What the final evaluation of a run with this seed gives for the present weights of the recipe's model.

    The model is on the device of `config` already.
    """
    stream = Generator(config.seed).fork(_Stream.EVALUATION)
    return recipe.evaluate(_accelerator(config), stream, final=True)


def _check_compiler(device: torch.device) -> None:
    """Raise ValueError where torch.compile is known to fail, before the run begins."""
    if device.type == "cpu":
        compiler, header = os.environ.get("CXX", "g++"), Path(sysconfig.get_paths()["include"]) / "Python.h"
        if shutil.which(compiler) is None:
            raise ValueError(f"compile: expected the C++ compiler {compiler} (apt install g++, or set CXX), found none")
        if not header.is_file():
            raise ValueError(f"compile: expected {header} (apt install python3-dev), found none")


def _evaluations(count: int) -> str:
    return "an evaluation" if count == 1 else f"{count} evaluations"


def _divisible_batch(batch_size: int, examples: int, processes: int) -> int:
    """The batch size in use: not more than there are examples, the same number on each process."""
    if batch_size % processes:
        raise ValueError(f"batch_size: expected a multiple of the {processes} processes, got {batch_size}")
    if examples < processes:
        raise ValueError(f"data: expected at least an example for each of {processes} processes, got {examples}")
    return min(batch_size, examples // processes * processes)
