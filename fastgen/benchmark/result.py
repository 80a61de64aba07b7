"""From a case to its figures: check every rival, then time those that are right, in turns."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import torch

from fastgen.benchmark import machine
from fastgen.benchmark.bounds import bounds_of, finish, share
from fastgen.benchmark.case import COMPILED, OURS, Case, WrongResult
from fastgen.benchmark.timing import Spread, interleave, ratio, use_threads
from fastgen.train.memory import kept_memory

__all__ = ["Result", "measure"]


@dataclass(frozen=True)
class Result:
    """The figures of one case.

    Attributes:
        case: its name.
        threads: in use while it ran.
        elements, bytes: of one call; bytes read and written at least.
        flops: of the matrix products of one call; 0 where it has none.
        residence: where the bytes stay between calls (`L1`, `L2`, `L3`, `memory`).
        rounds: samples that stand behind each figure.
        seconds: of one call, by rival and bound.
        speedups: how many times longer a rival (or a bound) takes than ours, by name: above 1, we win. Of a
            bound it is the share of it that we reach.
        failures: rivals that were not timed, and why in one line.
    """

    case: str
    threads: int
    elements: int
    bytes: int
    residence: str
    flops: int = 0
    rounds: int = 0
    seconds: dict[str, Spread] = field(default_factory=dict)
    speedups: dict[str, Spread] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    @property
    def disturbed(self) -> list[str]:
        """What other work was in the way of: ours for our own time, a rival or a bound for the ratio to it.

        A ratio is taken within each round, so it may hold where the times do not.
        """
        spreads = {OURS: self.seconds[OURS]} if OURS in self.seconds else {}
        return [name for name, spread in {**spreads, **self.speedups}.items() if spread.disturbed]


def measure(case: Case, *, threads: int, budget: float = 1.0, min_rounds: int = 7, compile: bool = True) -> Result:
    """Check and time one case.

    Args:
        case: with its own `threads`, if it has any.
        threads: of PyTorch's pool, for a case that leaves it open.
        budget: seconds for the rounds, without the checks, the compilation and the warm-up.
        min_rounds: rounds that are run even past the budget.
        compile: whether `torch.compile` takes part.

    A rival that gives wrong numbers, and a compiler that fails, end up in `Result.failures`.
    """
    threads = case.threads or threads
    functions: dict[str, Callable[[], object]] = {}
    failures: dict[str, str] = {}
    with use_threads(threads), _exact_products(), kept_memory() if case.keeps_memory else contextlib.nullcontext():
        inputs = case.inputs()
        for name, function in case.rivals().items():
            if name == COMPILED and not compile:
                continue
            try:
                case.check(name, function, inputs)
            except WrongResult as error:
                failures[name] = f"wrong result: {error}"
            except torch.OutOfMemoryError as error:
                failures[name] = _first_line(error)
            except Exception as error:
                if name != COMPILED:
                    raise
                failures[name] = _first_line(error)  # most often: no C++ compiler
            else:
                functions[name] = partial(function, *inputs)
        samples: dict[str, list[float]] = {}
        if OURS in functions:
            functions |= bounds_of(case, threads)
            samples = interleave(functions, budget=budget, min_rounds=min_rounds, finish=finish(case.device))
            samples = {name: [share(case, name) * value for value in values] for name, values in samples.items()}
        # Each case compiles for its own shape: what earlier ones left would count against the recompile limit.
        torch.compiler.reset()
    return Result(
        case=case.name,
        threads=threads,
        elements=case.elements,
        bytes=case.bytes,
        flops=case.flops,
        residence=machine.residence(case.bytes, threads, case.device),
        rounds=len(samples.get(OURS, ())),
        seconds={name: Spread.of(values) for name, values in samples.items()},
        speedups={name: ratio(values, samples[OURS]) for name, values in samples.items() if name != OURS},
        failures=failures,
    )


@contextlib.contextmanager
def _exact_products() -> Iterator[None]:
    """float32 stays float32 in cuDNN too, whose default are products of 10 bits; those of matrices are exact anyway."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
