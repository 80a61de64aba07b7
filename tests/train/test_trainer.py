from __future__ import annotations

import csv
import dataclasses
import math
import os
import re
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from toys import Leaky, Regression

from fastgen.random import Generator, normal
from fastgen.train import Interrupted, NonFiniteLossError, Step, Trainer, TrainingConfig, read_metrics, read_run

TIMES = ("seconds", "examples_per_second", "values_per_second")


def train(recipe: Regression, out: Path, resume: bool = False, **options: Any) -> Trainer:
    defaults = {"epochs": 3, "batch_size": 5, "log_every": 2, "warmup_steps": 3, "tensorboard": False, "device": "cpu"}
    config = TrainingConfig(**{**defaults, **options})
    return Trainer(recipe, config, out=out, resume=resume, progress="quiet")


def rows(out: Path) -> list[dict[str, str]]:
    """metrics.csv without the times."""
    return [{k: v for k, v in row.items() if k not in TIMES} for row in read_metrics(out / "metrics.csv")]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("epochs", 0, "epochs: expected an int of at least 1, got 0"),
        ("batch_size", 2.5, "batch_size: expected an int of at least 1, got 2.5"),
        ("learning_rate", 0, "learning_rate: expected a finite number above 0, got 0"),
        ("learning_rate", math.nan, "learning_rate: expected a finite number above 0, got nan"),
        ("schedule", "linear", "schedule: expected one of cosine, constant, got 'linear'"),
        ("warmup_steps", -1, "warmup_steps: expected an int of at least 0, got -1"),
        ("weight_decay", -1.0, "weight_decay: expected a finite number of at least 0, got -1.0"),
        ("max_grad_norm", 0.0, "max_grad_norm: expected a finite number above 0, got 0.0"),
        ("max_seconds", -3, "max_seconds: expected a finite number above 0, got -3"),
        ("max_steps", 0, "max_steps: expected an int of at least 1, got 0"),
        ("device", "tpu", "device: expected one of auto, cpu, cuda, got 'tpu'"),
        ("dtype", "fp8", "dtype: expected one of float32, bfloat16, float16, got 'fp8'"),
        ("seed", -1, "seed: expected 0 <= seed < 2**64, got -1"),
        ("keep_checkpoints", 0, "keep_checkpoints: expected an int of at least 1, got 0"),
    ],
)
def test_config_names_the_bad_field(field: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match="^" + message.replace("*", r"\*") + "$"):
        TrainingConfig(**{field: value})  # type: ignore[arg-type]


def test_learning_rate_rises_linearly_then_falls_along_a_cosine() -> None:
    config = TrainingConfig(warmup_steps=4)
    assert [config.learning_rate_factor(step, 12) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert config.learning_rate_factor(8, 12) == pytest.approx(0.5)
    assert config.learning_rate_factor(11, 12) == pytest.approx(0.5 * (1 + math.cos(math.pi * 7 / 8)))
    constant = TrainingConfig(warmup_steps=4, schedule="constant")
    assert [constant.learning_rate_factor(step, 12) for step in (3, 11)] == [1.0, 1.0]


def test_every_epoch_is_a_fresh_order_in_whole_batches(tmp_path: Path) -> None:
    regression = Regression()
    trainer = train(regression, tmp_path / "run", batch_size=5, epochs=2)
    assert (trainer.steps_per_epoch, trainer.total_steps) == (7, 14)  # 37 examples, 2 left over
    result = trainer.fit()
    assert result.step == 14
    assert [index for index, _ in regression.steps] == list(range(14))
    first, second = (
        [row for _, batch in part for row in batch] for part in (regression.steps[:7], regression.steps[7:])
    )
    for order in (first, second):
        assert len(set(order)) == 35
        assert set(order) <= set(range(37))
    assert first != second
    assert first != sorted(first)


def test_it_learns_and_writes_what_it_says(tmp_path: Path) -> None:
    out = tmp_path / "run"
    regression = Regression()
    result = train(regression, out, epochs=30, learning_rate=0.02, log_every=3, keep_checkpoints=2).fit()
    table = rows(out)
    test_losses = {int(row["step"]): float(row["loss"]) for row in table if row["split"] == "test"}
    assert list(test_losses) == [7 * epoch for epoch in range(1, 31)]
    assert test_losses[210] < 0.2 * test_losses[7]
    assert [int(row["step"]) for row in table if row["split"] == "train"][:4] == [3, 6, 7, 10]

    best = min(test_losses, key=test_losses.__getitem__)
    assert result.best_step == best
    assert result.metrics["loss"] == test_losses[best]
    assert [row["step"] for row in table if row["split"] == "final"] == [str(best)]
    kept = {int(path.stem.split("-")[1]) for path in (out / "checkpoints").iterdir()}
    assert kept == {best, 203, 210}
    assert len(list((out / "samples").iterdir())) == 1 + 30
    assert all(path.exists() for path in result.files)
    # The model is left with the best weights, and model/ has the same.
    assert (out / "model" / "weight.txt").read_text() == repr(regression.head.weight.tolist())
    assert regression.evaluate(None, None)["loss"] == test_losses[best]  # type: ignore[arg-type]


def test_train_rows_are_means_over_their_steps(tmp_path: Path) -> None:
    each, three = tmp_path / "each", tmp_path / "three"
    train(Regression(), each, epochs=1, log_every=1).fit()
    train(Regression(), three, epochs=1, log_every=3).fit()
    losses = [float(row["loss"]) for row in rows(each) if row["split"] == "train"]
    means = [float(row["loss"]) for row in rows(three) if row["split"] == "train"]
    assert len(losses) == 7
    assert means == pytest.approx([sum(losses[:3]) / 3, sum(losses[3:6]) / 3, losses[6]], rel=1e-12)


def test_the_same_seed_gives_the_same_bits_and_another_seed_other_ones(tmp_path: Path) -> None:
    runs = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        torch.manual_seed(len(runs))  # must not matter
        recipe = Regression()
        train(recipe, tmp_path / name, seed=seed).fit()
        runs.append(recipe.weights())
    assert all(torch.equal(a, b) for a, b in zip(runs[0], runs[1], strict=True))
    assert not all(torch.equal(a, c) for a, c in zip(runs[0], runs[2], strict=True))
    assert rows(tmp_path / "a") == rows(tmp_path / "b")


def test_torchs_generators_are_put_back(tmp_path: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    train(Regression(), tmp_path / "run", epochs=1).fit()
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(("when", "save_every"), [(1, None), (4, 3), (7, None), (10, 3), (13, None), (21, 3)])
def test_ctrl_c_and_resume_give_the_same_bits(when: int, save_every: int | None, tmp_path: Path) -> None:
    whole = Regression()
    train(whole, tmp_path / "whole", save_every=save_every).fit()

    class Stopped(Regression):
        def train_step(self, step: Step) -> dict[str, torch.Tensor]:
            if step.index == when - 1:
                signal.raise_signal(signal.SIGINT)
            return super().train_step(step)

    out = tmp_path / "stopped"
    with pytest.raises(Interrupted) as stopped:
        train(Stopped(), out, save_every=save_every).fit()
    assert (stopped.value.step, stopped.value.signal, stopped.value.out) == (when, signal.SIGINT, out)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

    resumed = Regression(seed=3)  # other weights: all must come from the checkpoint
    resumed.x, resumed.y = whole.x, whole.y
    trainer = train(resumed, out, resume=True, save_every=save_every)
    trainer.fit()
    assert [index for index, _ in resumed.steps] == list(range(when, 21))
    assert all(torch.equal(a, b) for a, b in zip(whole.weights(), resumed.weights(), strict=True))
    assert rows(out) == rows(tmp_path / "whole")


@pytest.mark.parametrize("when", [1, 5, 8, 9])
def test_carried_state_goes_on_after_a_stop(when: int, tmp_path: Path) -> None:
    """Eight steps an epoch; the state starts anew with each."""
    whole = Leaky()
    train(whole, tmp_path / "whole", epochs=2, learning_rate=0.05).fit()
    assert whole.rows[:3] == [[0, 8, 16, 24, 32], [1, 9, 17, 25, 33], [2, 10, 18, 26, 34]]
    assert whole.rows[8:] == whole.rows[:8]

    class Stopped(Leaky):
        def train_step(self, step: Step) -> dict[str, torch.Tensor]:
            if step.index == when - 1:
                signal.raise_signal(signal.SIGINT)
            return super().train_step(step)

    with pytest.raises(Interrupted):
        train(Stopped(), tmp_path / "run", epochs=2, learning_rate=0.05).fit()
    resumed = Leaky(seed=3)  # other weights: all must come from the checkpoint
    resumed.x, resumed.y = whole.x, whole.y
    train(resumed, tmp_path / "run", epochs=2, learning_rate=0.05, resume=True).fit()
    assert resumed.rows == whole.rows[when:]
    assert resumed.hidden is not None
    assert torch.equal(resumed.carried()["hidden"], whole.carried()["hidden"])
    assert all(torch.equal(a, b) for a, b in zip(whole.weights(), resumed.weights(), strict=True))
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")


def test_samples_that_are_text_are_shown_and_speed_has_its_unit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = Trainer(
        Leaky(), TrainingConfig(epochs=1, batch_size=5, device="cpu"), out=tmp_path / "run", progress="lines"
    )
    trainer.fit()
    lines = capsys.readouterr().err.splitlines()
    place = lines.index("  | a sample for step-00000008.txt")
    assert lines[place + 1] == "  | of two lines"
    assert any(" values/s " in line for line in lines)
    # That of before training is kept, and not shown.
    names = sorted(path.name for path in (tmp_path / "run" / "samples").iterdir())
    assert names == ["step-00000000.txt", "step-00000008.txt"]
    assert not any("step-00000000" in line for line in lines)
    assert float(read_metrics(tmp_path / "run" / "metrics.csv")[0]["values_per_second"]) > 0


def test_long_epochs_may_be_evaluated_in_between(tmp_path: Path) -> None:
    train(Regression(), tmp_path / "run", epochs=2, evaluate_steps=4).fit()
    table = rows(tmp_path / "run")
    assert [row["step"] for row in table if row["split"] == "test"] == ["4", "7", "11", "14"]
    assert [row["step"] for row in table if row["split"] == "train"] == ["2", "4", "6", "7", *("9", "11", "13", "14")]


def test_a_run_ends_when_it_gets_no_better(tmp_path: Path) -> None:
    class Worse(Regression):
        losses = iter([3.0, 2.0, 2.5, 2.0, 2.75, 1.0, 2.0, 2.0])

        def evaluate(self, accelerator: Any, generator: Any, *, final: bool = False) -> dict[str, float]:
            return {"loss": 2.0 if final else next(self.losses)}

    result = train(Worse(), tmp_path / "run", epochs=9, patience=3).fit()
    assert (result.step, result.best_step) == (5 * 7, 2 * 7)
    # Its patience is over; with more of it the run goes on, and the count with it.
    assert train(Worse(), tmp_path / "run", epochs=9, patience=3, resume=True).fit().step == 5 * 7
    result = train(Worse(), tmp_path / "run", epochs=8, patience=4, resume=True).fit()
    assert (result.step, result.best_step) == (8 * 7, 6 * 7)


def test_a_resumed_run_may_end_where_it_stopped(tmp_path: Path) -> None:
    class Stopped(Regression):
        def train_step(self, step: Step) -> dict[str, torch.Tensor]:
            if step.index == 3:
                signal.raise_signal(signal.SIGINT)
            return super().train_step(step)

    with pytest.raises(Interrupted):
        train(Stopped(), tmp_path / "run").fit()
    recipe = Regression()
    result = train(recipe, tmp_path / "run", resume=True, max_steps=2).fit()
    assert recipe.steps == []
    assert (result.step, result.best_step) == (4, 4)
    assert [row["split"] for row in rows(tmp_path / "run")] == ["train", "train", "test", "final"]


def test_a_second_ctrl_c_does_not_wait(tmp_path: Path) -> None:
    class Impatient(Regression):
        def train_step(self, step: Step) -> dict[str, torch.Tensor]:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            raise AssertionError("went on")

    with pytest.raises(KeyboardInterrupt) as error:
        train(Impatient(), tmp_path / "run").fit()
    assert not isinstance(error.value, Interrupted)


def test_sigterm_saves_as_ctrl_c_does(tmp_path: Path) -> None:
    class Preempted(Regression):
        def train_step(self, step: Step) -> dict[str, torch.Tensor]:
            if step.index == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().train_step(step)

    with pytest.raises(Interrupted) as stopped:
        train(Preempted(), tmp_path / "run").fit()
    assert stopped.value.signal == signal.SIGTERM
    assert (tmp_path / "run" / "checkpoints" / "step-00000002.safetensors").exists()


def test_ctrl_c_in_the_final_evaluation_can_be_resumed(tmp_path: Path) -> None:
    class Stopped(Regression):
        def evaluate(self, accelerator: Any, generator: Any, *, final: bool = False) -> dict[str, float]:
            if final:
                raise KeyboardInterrupt
            return super().evaluate(accelerator, generator)

    with pytest.raises(Interrupted, match="stopped after step 21 of 21"):
        train(Stopped(), tmp_path / "run").fit()
    recipe = Regression()
    train(recipe, tmp_path / "run", resume=True).fit()
    assert recipe.steps == []
    assert [row["split"] for row in rows(tmp_path / "run")][-1] == "final"


def test_a_finished_run_may_go_on_for_more_epochs(tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(Regression(), out, epochs=2).fit()
    recipe = Regression()
    assert train(recipe, out, epochs=3, resume=True).fit().step == 21
    assert [index for index, _ in recipe.steps] == list(range(14, 21))
    table = rows(out)
    assert [row["split"] for row in table].count("final") == 1
    assert [row["step"] for row in table if row["split"] == "test"] == ["7", "14", "21"]
    assert read_run(out)["training"]["epochs"] == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 6}, "batch_size: expected 5, as .* was started with, got 6"),
        ({"seed": 4}, "seed: expected 0, as .* was started with, got 4"),
        ({"learning_rate": 0.5}, "learning_rate: expected 0.002"),
    ],
)
def test_a_run_does_not_go_on_with_other_settings(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    train(Regression(), tmp_path / "run", epochs=1).fit()
    before = (tmp_path / "run" / "config.json").read_bytes()
    with pytest.raises(ValueError, match=message):
        train(Regression(), tmp_path / "run", resume=True, **options)
    with pytest.raises(ValueError, match=r"data: expected examples 37, as .* was started with, got 38"):
        train(Regression(examples=38), tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "config.json").read_bytes() == before


def test_folders_are_never_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    train(Regression(), tmp_path / "empty", epochs=1).fit()
    with pytest.raises(FileExistsError, match="empty: holds a run already; continue it with --resume"):
        train(Regression(), tmp_path / "empty")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    with pytest.raises(FileExistsError, match="full: not empty"):
        train(Regression(), tmp_path / "full")
    with pytest.raises(NotADirectoryError, match=r"thesis\.tex: expected a folder"):
        train(Regression(), tmp_path / "full" / "thesis.tex")
    with pytest.raises(ValueError, match="out: expected the folder of the run to resume, got None"):
        Trainer(Regression(), resume=True)
    with pytest.raises(FileNotFoundError, match="absent: no such run folder"):
        train(Regression(), tmp_path / "absent", resume=True)
    with pytest.raises(FileNotFoundError, match="full: not a run folder"):
        train(Regression(), tmp_path / "full", resume=True)
    monkeypatch.chdir(tmp_path)
    folder = Trainer(Regression(), TrainingConfig(device="cpu"), progress="quiet").out
    assert folder.parent == Path("runs")
    assert folder.name.startswith("regression-points-20")


def test_a_damaged_config_or_checkpoint_is_named(tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(Regression(), out, epochs=1).fit()
    checkpoint = out / "checkpoints" / "step-00000007.safetensors"
    checkpoint.write_bytes(checkpoint.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"step-00000007\.safetensors: damaged checkpoint"):
        train(Regression(), out, epochs=1, resume=True)
    (out / "config.json").write_text('{"training": ')
    with pytest.raises(ValueError, match=r"config\.json: damaged"):
        train(Regression(), out, epochs=1, resume=True)


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    recipe = Regression()
    recipe.poison = 16
    with pytest.raises(NonFiniteLossError, match=r"loss became nan at step 17; .*step-00000014.* try a lower"):
        train(recipe, tmp_path / "run", log_every=7).fit()
    assert max(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == "step-00000014.safetensors"
    good = Regression()
    assert train(good, tmp_path / "run", log_every=7, resume=True).fit().step == 21


def test_weights_that_overflowed_in_the_last_step_are_not_saved(tmp_path: Path) -> None:
    class Overflow(Regression):
        def train_step(self, step: Step) -> dict[str, torch.Tensor]:
            metrics = super().train_step(step)
            if step.index == 4:
                with torch.no_grad():
                    self.head.bias.fill_(torch.inf)
            return metrics

    with pytest.raises(NonFiniteLossError, match="a weight became infinite or NaN by step 5"):
        train(Overflow(), tmp_path / "run", save_every=1).fit()
    assert max(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == "step-00000004.safetensors"


def test_max_steps_and_max_seconds_end_a_run_properly(tmp_path: Path) -> None:
    recipe = Regression()
    assert train(recipe, tmp_path / "steps", max_steps=9).fit().step == 9
    assert [row["step"] for row in rows(tmp_path / "steps") if row["split"] == "test"] == ["7", "9"]

    class Slow(Regression):
        def train_step(self, step: Step) -> dict[str, torch.Tensor]:
            time.sleep(0.02)
            return super().train_step(step)

    result = train(Slow(), tmp_path / "seconds", epochs=1000, max_seconds=0.2).fit()
    assert 1 <= result.step <= 10
    assert rows(tmp_path / "seconds")[-1]["split"] == "final"


def test_gradients_are_clipped(tmp_path: Path) -> None:
    class Spy(Regression):
        norms: list[float]

        def train_step(self, step: Step) -> dict[str, torch.Tensor]:
            metrics = super().train_step(step)
            gradients = [p.grad.flatten() for p in self.head.parameters() if p.grad is not None]
            self.norms.append(float(torch.cat(gradients).norm()))
            return metrics

    free, clipped = Spy(), Spy()
    free.norms, clipped.norms = [], []
    train(free, tmp_path / "free", epochs=1).fit()
    train(clipped, tmp_path / "clipped", epochs=1, max_grad_norm=0.01).fit()
    assert min(free.norms) > 0.02
    assert clipped.norms == pytest.approx([0.01] * 7, rel=1e-3)


def test_batches_are_not_larger_than_the_data(tmp_path: Path) -> None:
    recipe = Regression(examples=4)
    trainer = train(recipe, tmp_path / "run", batch_size=64, epochs=1)
    assert (trainer.batch_size, trainer.total_steps) == (4, 1)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_autocast_goes_on_after_a_stop_and_leaves_the_model_as_it_was(dtype: str, tmp_path: Path) -> None:
    whole, recipe = Regression(), Regression()
    train(whole, tmp_path / "whole", epochs=2, dtype=dtype, schedule="constant").fit()
    train(Regression(), tmp_path / "run", epochs=1, dtype=dtype, schedule="constant").fit()
    train(recipe, tmp_path / "run", epochs=2, dtype=dtype, schedule="constant", resume=True).fit()
    assert all(torch.equal(a, b) for a, b in zip(whole.weights(), recipe.weights(), strict=True))
    for module in recipe.modules().values():
        assert "forward" not in vars(module)  # nothing of autocast's wrapper is left
        assert all(p.dtype == torch.float32 for p in module.parameters())


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_devices_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="device: expected 'auto' or 'cpu', as PyTorch finds no CUDA device"):
        train(Regression(), tmp_path / "run", device="cuda")
    assert not (tmp_path / "run").exists()


def test_events_are_those_of_the_table(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "run"
    train(Regression(), out, epochs=2, tensorboard=True).fit()
    events = EventAccumulator(str(out / "events")).Reload()
    with open(out / "metrics.csv", newline="") as file:
        expected = [(int(r["step"]), float(r["loss"])) for r in csv.DictReader(file) if r["split"] == "test"]
    got = [(event.step, event.value) for event in events.Scalars("test/loss")]
    assert [step for step, _ in got] == [step for step, _ in expected]
    assert [value for _, value in got] == pytest.approx([value for _, value in expected], rel=1e-6)


class Observed(Regression):
    """Takes a figure at log points and remarks on every second row."""

    metrics = ("loss", "penalty", "bias")

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[dict[str, float]] = []

    def figures(self) -> dict[str, float]:
        return {"bias": float(self.head.bias.detach())}

    def remarks(self, row: Mapping[str, float]) -> list[str]:
        self.heard.append(dict(row))
        return [f"row {len(self.heard)}"] if len(self.heard) % 2 == 0 else []


def test_figures_and_remarks_of_each_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(name: str, resume: bool = False, **options: Any) -> Observed:
        recipe = Observed()
        config = TrainingConfig(batch_size=5, log_every=2, tensorboard=False, device="cpu", epochs=2, **options)
        Trainer(recipe, config, out=tmp_path / name, resume=resume, progress="lines").fit()
        return recipe

    whole = run("whole")
    assert [row["step"] for row in whole.heard] == [2, 4, 6, 7, 9, 11, 13, 14]
    assert re.findall(r"^row \d", capsys.readouterr().err, re.MULTILINE) == ["row 2", "row 4", "row 6", "row 8"]
    table = [row for row in read_metrics(tmp_path / "whole" / "metrics.csv") if row["split"] == "train"]
    assert [float(row["bias"]) for row in table] == [row["bias"] for row in whole.heard]
    assert len({row["bias"] for row in whole.heard}) == 8

    # A resumed run hears of the rows before, and repeats no remark.
    run("parts", max_steps=7, schedule="constant", warmup_steps=0)
    capsys.readouterr()
    again = run("parts", resume=True, schedule="constant", warmup_steps=0)
    assert [row["step"] for row in again.heard] == [row["step"] for row in whole.heard]
    assert re.findall(r"^row \d", capsys.readouterr().err, re.MULTILINE) == ["row 6", "row 8"]


class TwoBatches(Regression):
    """Reads two batches a step."""

    def __init__(self) -> None:
        super().__init__(40)
        self.shapes: list[tuple[int, ...]] = []

    @property
    def num_examples(self) -> int:
        return len(self.x) // 2

    def order(self, batch_size: int, generator: Generator) -> Tensor:
        return torch.arange(40).view(-1, 2, batch_size)

    def train_step(self, step: Step) -> dict[str, Tensor]:
        self.shapes.append(tuple(step.rows.shape))
        return super().train_step(dataclasses.replace(step, rows=step.rows[1]))


def test_a_step_may_read_several_batches(tmp_path: Path) -> None:
    recipe = TwoBatches()
    assert train(recipe, tmp_path / "run", epochs=1).fit().step == 4
    assert recipe.shapes == [(2, 5)] * 4
    assert [rows for _, rows in recipe.steps] == [list(range(first, first + 5)) for first in (5, 15, 25, 35)]


def test_streams_of_a_step() -> None:
    def step(first_row: int, rows: int) -> Step:
        return Step(3, torch.arange(rows), first_row, 4, {}, 17, lambda name, loss: None)

    whole = normal(4, 5, generator=step(0, 4).generator(5, key=2))
    assert normal(2, 5, generator=step(2, 2).generator(5, key=2)).equal(whole[2:])
    assert step(0, 4).generator(5).seed == 17
    assert len({step(0, 4).generator(5, key=key).seed for key in (None, 0, 1)}) == 3
