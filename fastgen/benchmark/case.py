"""What is timed: a `Case` is one workload with the rivals that can do it and the check of their answers."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from fastgen.random import Generator, normal

__all__ = [
    "COMPILED",
    "CUDNN",
    "EAGER",
    "EFFICIENT",
    "FLASH",
    "OURS",
    "Case",
    "ProductCase",
    "StreamCase",
    "Traffic",
    "WrongResult",
    "compiled",
    "noise",
    "require_close",
    "require_moments",
]

OURS, EAGER, COMPILED = "fastgen", "eager", "torch.compile"
# PyTorch's attention kernels on CUDA, one of which eager takes.
FLASH, CUDNN, EFFICIENT = "flash", "cuDNN", "efficient"

_DTYPE_NAMES = {torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16"}


class WrongResult(ArithmeticError):
    """A rival gave numbers that it should not have given; it is not timed."""


class Traffic(NamedTuple):
    """Arrays of the case's shape and dtype that have to be read from memory and written to it."""

    reads: int
    writes: int


@dataclass(frozen=True, kw_only=True)
class Case(ABC):
    """One workload.

    Attributes:
        shape, dtype: of the tensors.
        threads: of PyTorch's pool; None for as many as the run is given.
        device: "cpu" or "cuda".
    """

    keeps_memory: ClassVar[bool] = False
    """Whether rivals run as in a training of `fastgen.train`, where what a step frees stays in the heap."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    threads: int | None = None
    device: str = "cpu"

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def size(self) -> str:
        """The shape in words: 4M, 64K, 64x20."""
        if len(self.shape) > 1:
            return "x".join(map(str, self.shape))
        count = self.elements
        for unit, letter in ((1 << 20, "M"), (1 << 10, "K")):
            if count >= unit and count % unit == 0:
                return f"{count // unit}{letter}"
        return str(count)

    @property
    def name(self) -> str:
        """Such as `reparameterize/fwd/fp32/4M`; rivals of one name are comparable."""
        parts = [self.workload, _DTYPE_NAMES[self.dtype], self.size]
        if self.threads is not None:
            parts.append(f"{self.threads}-thread")
        return "/".join(parts if self.device == "cpu" else [*parts, self.device])

    @property
    @abstractmethod
    def workload(self) -> str:
        """The op and the pass, such as `reparameterize/fwd`."""

    @property
    @abstractmethod
    def bytes(self) -> int:
        """That have to move between memory and cores in one call."""

    @property
    def flops(self) -> int:
        """Of the matrix products of one call, a multiply-add counted as two; 0 without products."""
        return 0

    def shrunk(self) -> Case:
        """The same on little data, for a smoke test."""
        return replace(self, shape=tuple(min(extent, 512) for extent in self.shape))

    @property
    def random_devices(self) -> list[int]:
        """Whose generators a check has to put back, besides the CPU's: for `torch.random.fork_rng`."""
        return [] if self.device == "cpu" else [torch.cuda.current_device()]

    def normals(self, seed: int) -> Callable[..., Tensor]:
        """A function of a size that draws normal numbers, the same on every device, in the dtype of the case."""
        draw = torch.Generator().manual_seed(seed)
        return lambda *size: torch.randn(size, generator=draw).to(self.device, self.dtype)

    @abstractmethod
    def inputs(self) -> tuple[Tensor, ...]:
        """Fresh arguments of the rivals, the same at every call."""

    @abstractmethod
    def rivals(self) -> dict[str, Callable[..., Any]]:
        """What does the workload, by name, `OURS` first; each takes `inputs()`."""

    @abstractmethod
    def check(self, rival: str, function: Callable[..., Any], inputs: tuple[Tensor, ...]) -> None:
        """Raise `WrongResult` unless `function(*inputs)` gives what the workload asks for."""


class StreamCase(Case):
    """A workload that memory limits: a pass over tensors of one shape."""

    @property
    def bytes(self) -> int:
        return sum(self.traffic) * self.elements * self.dtype.itemsize

    @property
    @abstractmethod
    def traffic(self) -> Traffic:
        """The least memory traffic that the workload allows."""


class ProductCase(Case):
    """A workload that matrix products limit, or, where the batch is small, the weights that they read."""

    @property
    @abstractmethod
    def flops(self) -> int: ...

    @property
    @abstractmethod
    def weights(self) -> tuple[int, int]:
        """(bytes, times): weights that have to be read again and again, one time after the other."""


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.compile` for one shape: static, no graph break, for the threads in use now; without CUDA graphs."""
    # Inductor writes the thread count into its CPU kernels; naming it keeps its disk cache from mixing them up.
    options: dict[str, Any] = {"cpp.threads": torch.get_num_threads()}
    compiled_function: Callable[..., Any] = torch.compile(function, fullgraph=True, dynamic=False, options=options)
    return compiled_function


def passes(function: Callable[..., Tensor], direction: Literal["inference", "training"]) -> Callable[..., Any]:
    """The function as a rival: its result without gradients, or the result and the gradient of each operand from that
    of the result, which is the last argument."""

    def step(*given: Tensor) -> tuple[Tensor, ...]:
        *operands, grad = given
        out = function(*operands)
        return out, *torch.autograd.grad(out, operands, grad)

    return step if direction == "training" else torch.no_grad()(lambda *given: (function(*given),))


def noise(size: tuple[int, ...], device: torch.device, generator: Generator | None) -> Tensor:
    """Standard normal numbers of PyTorch's for a step that is timed, of fastgen's generator for one that is checked."""
    if generator is None:
        return torch.randn(size, device=device)
    return normal(size, generator=generator, device=device)


def require_close(what: str, actual: Tensor, expected: Tensor, *, rtol: float = 0.0, atol: float = 0.0) -> None:
    """Raise `WrongResult` unless |actual - expected| <= atol + rtol |expected| everywhere."""
    if actual.shape != expected.shape:
        raise WrongResult(f"{what}: shape {tuple(actual.shape)} instead of {tuple(expected.shape)}")
    actual, expected = actual.detach().double(), expected.double()
    excess = (actual - expected).abs() - (atol + rtol * expected.abs())
    if not bool((excess <= 0).all()):  # also where a NaN compares
        worst = int(excess.nan_to_num(torch.inf).argmax())
        raise WrongResult(
            f"{what}: {float(actual.flatten()[worst]):.9g} instead of {float(expected.flatten()[worst]):.9g}"
        )


def require_moments(what: str, values: Tensor, mean: float, variance: float, kurtosis: float) -> None:
    """Raise `WrongResult` unless mean and variance lie within six standard errors of what they should be.

    kurtosis: the fourth standardised moment, which tells how much a sample variance scatters. What the
    resolution of the dtype does to the moments is allowed on top.
    """
    sample = values.detach().double()
    count = sample.numel()
    resolution = torch.finfo(values.dtype).eps
    mean_error = math.sqrt(variance / count)
    variance_error = variance * math.sqrt((kurtosis - 1) / count)
    # Written so that a NaN fails.
    for name, got, wanted, error in (
        ("mean", float(sample.mean()), mean, mean_error),
        ("variance", float(sample.var()), variance, variance_error),
    ):
        if not abs(got - wanted) <= 6 * error + resolution:
            raise WrongResult(f"{what}: {name} {got:.6g} instead of {wanted:.6g}, standard error {error:.1g}")
