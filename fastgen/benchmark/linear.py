"""Cases of `fastgen.functional.linear` against PyTorch's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen.benchmark.case import EAGER, OURS, ProductCase, passes, require_close
from fastgen.functional import linear

__all__ = ["LinearCase", "cases"]

_SEED = 1_967


@dataclass(frozen=True, kw_only=True)
class LinearCase(ProductCase):
    """One layer with a bias.

    Shape: (rows, inputs, outputs).

    Attributes:
        direction: `inference` or `training` (forward, and backward from a dense gradient of the output).
    """

    direction: Literal["inference", "training"] = "training"

    @property
    def workload(self) -> str:
        """Such as `linear/training`."""
        return f"linear/{self.direction}"

    @property
    def elements(self) -> int:
        return self.shape[0]

    @property
    def flops(self) -> int:
        rows, inputs, outputs = self.shape
        return 2 * rows * inputs * outputs * (3 if self.direction == "training" else 1)

    @property
    def weights(self) -> tuple[int, int]:
        return self.shape[1] * self.shape[2] * self.dtype.itemsize, 1

    @property
    def bytes(self) -> int:
        """Of input, output and weight, and of their gradients."""
        rows, inputs, outputs = self.shape
        size = self.weights[0] + rows * (inputs + outputs) * self.dtype.itemsize
        return size * (2 if self.direction == "training" else 1)

    def shrunk(self) -> LinearCase:
        rows, inputs, outputs = self.shape
        return replace(self, shape=(min(rows, 40), min(inputs, 70), min(outputs, 30)))

    def inputs(self) -> tuple[Tensor, ...]:
        """input, weight, bias, and in training the gradient of the output."""
        rows, inputs, outputs = self.shape
        draw = torch.Generator().manual_seed(_SEED)
        shapes = [(rows, inputs), (outputs, inputs), (outputs,)]
        training = self.direction == "training"
        given = [torch.randn(shape, generator=draw).to(self.dtype).requires_grad_(training) for shape in shapes]
        if training:
            given.append(torch.randn(rows, outputs, generator=draw).to(self.dtype))
        return tuple(given)

    def rivals(self) -> dict[str, Callable[..., Any]]:
        return {OURS: passes(linear, self.direction), EAGER: passes(F.linear, self.direction)}

    def check(self, rival: str, function: Callable[..., Any], inputs: tuple[Tensor, ...]) -> None:
        wide = [x.detach().double().requires_grad_(x.requires_grad) for x in inputs]
        expected = passes(F.linear, self.direction)(*wide)
        for name, result, exact in zip(
            ("output", "input", "weight", "bias"), function(*inputs), expected, strict=False
        ):
            atol = 32 * torch.finfo(self.dtype).eps * float(exact.detach().abs().max())
            require_close(f"{self.name}, {rival}, {name}", result, exact.detach(), atol=atol)


def cases(*, full: bool) -> list[LinearCase]:
    """The layers of a small GPT, of GPT-2 and of a VAE, the last two also for a few rows and in half types."""
    chosen = [LinearCase(shape=(3072, 384, 1536)), LinearCase(shape=(16, 3136, 256))]
    if full:
        shapes = [
            (3072, 384, 1152),
            (3072, 1536, 384),
            (256, 768, 3072),
            (256, 768, 50257),
            (128, 784, 512),
            (32, 256, 256),
            (16, 3136, 256),
            (8, 768, 3072),
            (1, 768, 3072),
        ]
        every = [LinearCase(shape=shape) for shape in ((3072, 384, 1536), *shapes)]
        both = [replace(case, direction=direction) for case in every for direction in ("inference", "training")]
        few, many = (LinearCase(shape=(rows, 768, 3072), direction="inference") for rows in (4, 256))
        both += [
            replace(few, dtype=torch.bfloat16),
            replace(few, dtype=torch.float16),
            replace(many, dtype=torch.float16),
        ]
        chosen += [case for case in both if case not in chosen]
    return chosen
