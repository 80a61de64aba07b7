"""A recipe and images that train in a moment."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastgen.data import ImageSet
from fastgen.random import Generator, normal, uniform
from fastgen.train import Recipe, Step, TrainingConfig


class Regression(Recipe):
    """A network with dropout on noisy inputs, two optimisers that take turns: what a recipe may do."""

    model_type = "regression"
    data_name = "points"
    metrics = ("loss", "penalty")
    criterion = "loss"

    def __init__(self, examples: int = 37, seed: int = 0) -> None:
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            self.body = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Dropout(0.2))
            self.head = nn.Linear(8, 1)
        self.x = normal(examples, 3, generator=Generator(seed))
        self.y = self.x.sum(-1, keepdim=True)
        self.steps: list[tuple[int, list[int]]] = []
        self.poison: int | None = None  # the step whose loss is not a number

    @property
    def num_examples(self) -> int:
        return len(self.x)

    def modules(self) -> dict[str, nn.Module]:
        return {"body": self.body, "head": self.head}

    def optimizers(self, config: TrainingConfig) -> dict[str, torch.optim.Optimizer]:
        return {
            "body": torch.optim.AdamW(self.body.parameters(), lr=config.learning_rate, betas=(0.8, 0.99)),
            "head": torch.optim.SGD(self.head.parameters(), lr=config.learning_rate, momentum=0.9),
        }

    def train_step(self, step: Step) -> dict[str, Tensor]:
        self.steps.append((step.index, step.rows.tolist()))
        x = self.x[step.rows]
        x = x + 0.1 * normal(x.shape, generator=step.generator(3))
        body, head = step.modules["body"], step.modules["head"]
        loss = (head(body(x)) - self.y[step.rows]).square().mean()
        if step.index == self.poison:
            loss = loss * torch.nan
        step.update("body", loss)
        penalty = (head(body(x).detach()) - self.y[step.rows]).abs().mean()
        step.update("head", penalty)
        return {"loss": loss.detach(), "penalty": penalty.detach()}

    def evaluate(self, accelerator: Any, generator: Generator, *, final: bool = False) -> dict[str, float]:
        body = copy.deepcopy(self.body).eval()
        with torch.no_grad():
            return {"loss": float((self.head(body(self.x)) - self.y).square().mean())}

    def describe(self) -> dict[str, Any]:
        return {"model": {"hidden": 8}, "data": {"examples": len(self.x)}}

    def save_pretrained(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        (folder / "weight.txt").write_text(repr(self.head.weight.tolist()))

    def save_sample(self, path: Path) -> None:
        path.parent.mkdir(exist_ok=True)
        path.write_text("sample")

    def save_report(self, folder: Path, rows: list[dict[str, str]]) -> list[Path]:
        path = folder / "report.txt"
        path.write_text(str(len(rows)))
        return [path]

    def weights(self) -> list[Tensor]:
        return [p.detach().clone() for module in self.modules().values() for p in module.parameters()]


class Leaky(Regression):
    """Predicts the running mean of parallel streams with a hidden state that goes on from step to step."""

    model_type = "leaky"
    metrics = ("loss",)
    unit, units_per_example = "values", 4
    sample_suffix = ".txt"

    def __init__(self, examples: int = 40, seed: int = 0) -> None:
        super().__init__(examples * self.units_per_example, seed)
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            self.head = nn.Linear(9, 1)
        self.rows: list[list[int]] = []
        self.hidden: Tensor | None = None

    @property
    def num_examples(self) -> int:
        return len(self.x) // self.units_per_example

    def order(self, batch_size: int, generator: Generator) -> Tensor:
        steps = self.num_examples // batch_size
        return torch.arange(steps * batch_size).view(batch_size, steps).t()

    def carried(self) -> dict[str, Tensor]:
        return {} if self.hidden is None else {"hidden": self.hidden}

    def carry(self, tensors: Mapping[str, Tensor]) -> None:
        self.hidden = tensors["hidden"]

    def optimizers(self, config: TrainingConfig) -> dict[str, torch.optim.Optimizer]:
        return {"sgd": torch.optim.SGD([*self.body.parameters(), *self.head.parameters()], lr=config.learning_rate)}

    def train_step(self, step: Step) -> dict[str, Tensor]:
        self.rows.append(step.rows.tolist())
        hidden = torch.zeros(len(step.rows), 1) if self.hidden is None or 0 in step.rows else self.hidden
        for t in range(self.units_per_example):
            features = torch.cat([step.modules["body"](self.x[step.rows * self.units_per_example + t]), hidden], -1)
            hidden = 0.5 * hidden + 0.5 * step.modules["head"](features)
        loss = (hidden - self.y[step.rows * self.units_per_example]).square().mean()
        step.update("sgd", loss)
        self.hidden = hidden.detach()
        return {"loss": loss.detach()}

    def evaluate(self, accelerator: Any, generator: Generator, *, final: bool = False) -> dict[str, float]:
        return {"loss": float(self.head.weight.detach().abs().sum())}

    def save_sample(self, path: Path) -> str | None:
        super().save_sample(path)
        return f"a sample for {path.name}\nof two lines"


def images(count: int = 60, shape: tuple[int, int, int] = (1, 8, 8), classes: int = 3, seed: int = 0) -> ImageSet:
    """Blobs in one of three places, which a small model learns."""
    channels, height, width = shape
    labels = torch.arange(count) % classes
    centre = 0.2 + 0.6 * labels / max(classes - 1, 1)
    rows = torch.linspace(0, 1, height).view(1, 1, height, 1)
    columns = torch.linspace(0, 1, width).view(1, 1, 1, width)
    distance = (rows - centre.view(-1, 1, 1, 1)).square() + (columns - centre.view(-1, 1, 1, 1)).square()
    noise = uniform(count, channels, height, width, generator=Generator(seed))
    pixels = (torch.exp(-20 * distance) * 220 + 30 * noise).to(torch.uint8)
    return ImageSet(pixels, labels, tuple(f"class {i}" for i in range(classes)), "blobs")
