"""Cases of `fastgen.functional.gelu` and `swiglu` against PyTorch's functions."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen import functional
from fastgen.benchmark.case import COMPILED, EAGER, OURS, StreamCase, Traffic, compiled, passes, require_close

__all__ = ["ActivationCase", "cases"]

_SEED = 1_606


def _eager_gelu(input: Tensor, bias: Tensor, *, approximate: str) -> Tensor:
    return F.gelu(input + bias, approximate=approximate)


def _eager_swiglu(input: Tensor) -> Tensor:
    gate, up = input.chunk(2, -1)
    return F.silu(gate) * up


@dataclass(frozen=True, kw_only=True)
class ActivationCase(StreamCase):
    """What stands between the two products of a feed-forward layer.

    Shape: of the result.

    Attributes:
        function: `gelu` and `gelu_tanh` add a bias, `swiglu` takes twice the width.
        direction: `inference`, or `training` (forward, and backward from a dense gradient).
    """

    function: Literal["gelu", "gelu_tanh", "swiglu"] = "gelu_tanh"
    direction: Literal["inference", "training"] = "training"

    @property
    def workload(self) -> str:
        """Such as `gelu/training`."""
        return f"{self.function}/{self.direction}"

    @property
    def traffic(self) -> Traffic:
        """A gradient reads the input again, and the gradient of the result; that of a bias is not counted."""
        inputs = 2 if self.function == "swiglu" else 1
        if self.direction == "inference":
            return Traffic(reads=inputs, writes=1)
        return Traffic(reads=2 * inputs + 1, writes=1 + inputs)

    def inputs(self) -> tuple[Tensor, ...]:
        """input, the bias of a GELU, and in training the gradient of the result."""
        normal, training = self.normals(_SEED), self.direction == "training"
        *rows, width = self.shape
        shapes = [(*rows, 2 * width)] if self.function == "swiglu" else [self.shape, (width,)]
        given = [normal(*shape).requires_grad_(training) for shape in shapes]
        return (*given, normal(*self.shape)) if training else tuple(given)

    def _functions(self) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
        """Ours, and PyTorch's as people write it."""
        if self.function == "swiglu":
            return functional.swiglu, _eager_swiglu
        approximate = "tanh" if self.function == "gelu_tanh" else "none"
        ours, eager = (functools.partial(f, approximate=approximate) for f in (functional.gelu, _eager_gelu))
        return ours, eager

    def rivals(self) -> dict[str, Callable[..., Any]]:
        ours, eager = self._functions()
        forward = {OURS: ours, EAGER: eager, COMPILED: compiled(eager)}
        return {name: passes(function, self.direction) for name, function in forward.items()}

    def check(self, rival: str, function: Callable[..., Any], inputs: tuple[Tensor, ...]) -> None:
        wide = [x.detach().double().requires_grad_(x.requires_grad) for x in inputs]
        expected = passes(self._functions()[1], self.direction)(*wide)
        names = ("output", "input", "bias")
        for name, result, exact in zip(names, function(*inputs), expected, strict=False):
            atol = 16 * torch.finfo(self.dtype).eps * float(exact.detach().abs().max())
            require_close(f"{self.name}, {rival}, {name}", result, exact.detach(), atol=atol)


def cases(*, full: bool) -> list[ActivationCase]:
    """The hidden layers of GPT-2 124M for 256 tokens and of a small GPT for 3072, and of a small Llama."""
    chosen = [ActivationCase(shape=(3072, 1536))]
    if full:
        every = [
            *(ActivationCase(shape=shape) for shape in ((3072, 1536), (256, 3072))),
            ActivationCase(shape=(3072, 1536), dtype=torch.bfloat16),
            ActivationCase(shape=(3072, 1536), function="gelu"),
            ActivationCase(shape=(3072, 1024), function="swiglu"),
        ]
        both = [replace(case, direction=direction) for case in every for direction in ("inference", "training")]
        chosen += [case for case in both if case not in chosen]
    return chosen
