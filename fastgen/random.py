"""Random numbers from a counter: `Generator` and the draws of it.

Element `i` of a stream is a function of (seed, offset + i) alone (Philox4x32-10), so that

* draws are prefix-stable, `normal(n)[:k] == normal(k)`, and consecutive draws continue each other;
* the numbers depend neither on the thread count, the instruction set, the batch split nor the device;
* skipping ahead costs nothing, and the whole state is two integers that can be saved and restored.

Draws of 32-bit dtypes (float32, bfloat16, float16, bool, int32) and of 64-bit dtypes (float64, int64)
come from two independent streams of the same generator.

Without a `generator=`, the (seed, offset) of a call are drawn from PyTorch's default generator of the
device, so `torch.manual_seed` alone makes a program repeatable.

Under `torch.vmap` a generator of this module gives every sample the same numbers, as an argument that is
not mapped does; torch's default generator follows `randomness=`.
"""

from __future__ import annotations

import contextlib
import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Union

import torch
from torch import Tensor

import fastgen._ops  # noqa: F401  registers torch.ops.fastgen
from fastgen._dtypes import dtype_name
from fastgen.reference.random import philox4x32

__all__ = [
    "Generator",
    "bernoulli",
    "bits",
    "checkpoint_contexts",
    "dropout_mask",
    "exponential",
    "normal",
    "permutation",
    "preserve_state",
    "uniform",
]

_UINT64 = 1 << 64
_INT64_MAX = 2**63 - 1
_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

AnyGenerator = Union["Generator", torch.Generator, None]
Device = torch.device | str | int | None


def _signed(value: int) -> int:
    """The int64 with the bits of an unsigned 64-bit integer."""
    return value - _UINT64 if value >= _UINT64 // 2 else value


def _uint64(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if not 0 <= value < _UINT64:
        raise ValueError(f"{name}: expected 0 <= {name} < 2**64, got {value}")
    return value


# A generator moves by a read and a write, and torch's ops release the GIL. One lock for all generators: it is held for
# a microsecond, and a lock in each would have to be left out of copies and pickles.
_moving = threading.RLock()
if hasattr(os, "register_at_fork"):  # a forked worker must not find it held by a thread that stayed behind
    os.register_at_fork(before=_moving.acquire, after_in_parent=_moving.release, after_in_child=_moving.release)


def _one_thread_at_a_time() -> contextlib.AbstractContextManager[Any]:
    # torch.compile knows no locks: there the op `claim` alone stands between threads.
    return contextlib.nullcontext() if torch.compiler.is_compiling() else _moving


class Generator:
    """A stream of random numbers, addressed by (seed, offset).

    Threads may share a generator: no element is given out twice. (Draws inside a function compiled by
    `torch.compile` are outside this promise.)

    Args:
        seed: names the stream, 0 <= seed < 2**64.
        offset: number of elements already drawn, 0 <= offset < 2**64.
        device: where the state lives. The numbers are the same everywhere; a state on the device of
            the draws saves a copy, and lets a CUDA graph draw fresh numbers at each replay.

    Example:
        >>> g = Generator(7)
        >>> a, b = normal(3, generator=g), normal(5, generator=g)
        >>> torch.equal(torch.cat([a, b]), normal(8, generator=Generator(7)))
        True
    """

    def __init__(self, seed: int, offset: int = 0, *, device: Device = "cpu") -> None:
        words = [_signed(_uint64("seed", seed)), _signed(_uint64("offset", offset))]
        with torch.inference_mode(False):  # a generator made there must move outside, too
            self._state = torch.tensor(words, dtype=torch.int64, device=device)

    @property
    def device(self) -> torch.device:
        return self._state.device

    @property
    def seed(self) -> int:
        return int(self._state[0]) % _UINT64

    @property
    def offset(self) -> int:
        return int(self._state[1]) % _UINT64

    def manual_seed(self, seed: int) -> Generator:
        """Restart at offset 0 of the stream named `seed`; returns self, as torch's generator does."""
        state = torch.tensor([_signed(_uint64("seed", seed)), 0], device="cpu")
        with _one_thread_at_a_time():
            self._state.copy_(state)
        return self

    def get_state(self) -> Tensor:
        """(2,) int64: the bit patterns of seed and offset."""
        with _one_thread_at_a_time():
            return self._state.clone()

    def set_state(self, state: Tensor) -> Generator:
        """Restore what `get_state` gave."""
        if not isinstance(state, Tensor) or state.dtype != torch.int64 or state.shape != (2,):
            got = f"{state.dtype} {tuple(state.shape)}" if isinstance(state, Tensor) else type(state).__name__
            raise ValueError(f"state: expected an int64 tensor of shape (2,) from get_state(), got {got}")
        with _one_thread_at_a_time():
            self._state.copy_(state)
        return self

    def clone(self) -> Generator:
        """A generator at the same place of the same stream, that moves on its own."""
        return Generator(0, device=self.device).set_state(self.get_state())

    def skip(self, count: int) -> Generator:
        """Move `count` elements ahead (or back, if negative) in O(1); returns self."""
        with _one_thread_at_a_time():
            self._state[1] += _signed(count % _UINT64)
        return self

    def fork(self, key: int) -> Generator:
        """An independent stream, a function of (seed, key): one for each worker, epoch or sample.

        Does not move this generator and does not depend on its offset.
        """
        key = _uint64("key", key)
        # One block at a counter that no draw uses (width word 2): a keyed hash of `key`.
        seed = self.seed
        words = philox4x32((key & 0xFFFFFFFF, key >> 32, 0, 2), (seed & 0xFFFFFFFF, seed >> 32))
        return Generator(words[0] | words[1] << 32, device=self.device)

    def reserve(self, count: int, device: Device = None) -> Tensor:
        """Take the next `count` elements: their (2,) int64 `seed_offset`, as the ops want it."""
        with _one_thread_at_a_time():
            taken = torch.ops.fastgen.claim.default(self._state, count)
        return taken if device is None else taken.to(device)

    def __repr__(self) -> str:
        return f"Generator(seed={self.seed}, offset={self.offset}, device='{self.device}')"


def fresh_seed_offset(device: torch.device) -> Tensor:
    """(2,) int64 from torch's default generator of the device, which gives 63 random bits a word."""
    return torch.randint(_INT64_MAX, (2,), device=device)


def seed_offset_for(generator: AnyGenerator, count: int, device: torch.device) -> Tensor:
    """(2,) int64 on `device`: where the `count` numbers of a call come from."""
    if generator is None:
        return fresh_seed_offset(device)
    if isinstance(generator, Generator):
        return generator.reserve(count, device)
    if not isinstance(generator, torch.Generator):
        raise TypeError(
            f"generator: expected a fastgen.random.Generator, a torch.Generator or None, got {type(generator).__name__}"
        )
    return torch.randint(_INT64_MAX, (2,), generator=generator, device=generator.device).to(device)


@contextlib.contextmanager
def preserve_state(generator: Generator, state: Tensor | None = None) -> Iterator[None]:
    """Run a block from `state` (default: the present one) and put the generator back afterwards."""
    before = generator.get_state()
    if state is not None:
        generator.set_state(state)
    try:
        yield
    finally:
        generator.set_state(before)


def checkpoint_contexts(generator: Generator) -> Callable[[], tuple[contextlib.AbstractContextManager[None], ...]]:
    """`context_fn` for `torch.utils.checkpoint` when the checkpointed function draws from `generator`.

    PyTorch restores its own default generators in the recomputation, but knows no other. With
    `checkpoint(fn, x, use_reentrant=False, context_fn=checkpoint_contexts(g))` the recomputation draws
    the numbers of the forward pass and leaves `g` where it was. (`use_reentrant=True` takes no contexts and
    cannot replay `g`.)
    """

    def contexts() -> tuple[contextlib.AbstractContextManager[None], ...]:
        return contextlib.nullcontext(), preserve_state(generator, generator.get_state())

    return contexts


def _resolve(
    size: tuple[int | Sequence[int], ...], generator: AnyGenerator, device: Device
) -> tuple[Tensor, list[int]]:
    given: Any = size[0] if len(size) == 1 and isinstance(size[0], Sequence) else size
    shape: list[int] = list(given)
    for extent in shape:
        if not isinstance(extent, (int, torch.SymInt)) or isinstance(extent, bool):
            raise TypeError(f"size: expected ints, got {type(extent).__name__}")
        if extent < 0:
            raise ValueError(f"size: expected extents of at least 0, got {tuple(shape)}")
    # torch.get_default_device() would break the graph of torch.compile.
    target = torch.empty(0).device if device is None else torch.device(device)
    return seed_offset_for(generator, math.prod(shape), target), shape


def _dtype(
    dtype: torch.dtype | None, allowed: tuple[torch.dtype, ...], default: torch.dtype | None = None
) -> torch.dtype:
    dtype = dtype or default or torch.get_default_dtype()
    if dtype not in allowed:
        names = ", ".join(dtype_name(d) for d in allowed)
        raise TypeError(f"dtype: expected one of {names}, got {dtype_name(dtype)}")
    return dtype


def _probability(name: str, p: float) -> float:
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"{name}: expected a probability from 0 to 1, got {p}")
    return float(p)


def normal(
    *size: int | Sequence[int],
    mean: float = 0.0,
    std: float = 1.0,
    generator: AnyGenerator = None,
    dtype: torch.dtype | None = None,
    device: Device = None,
) -> Tensor:
    """Normal numbers (Box-Muller). Tails reach 6.8 standard deviations in 32-bit draws, 9.5 in float64.

    Args:
        size: the shape, as ints or one sequence.
        mean, std: location and scale, std >= 0.
        generator: a `fastgen.random.Generator`, a `torch.Generator`, or None for torch's default one.
        dtype: float32, float64, bfloat16 or float16 (default: torch's default dtype). The half types are
            the float32 numbers, rounded.
        device: default torch's default device.

    Raises:
        TypeError, ValueError: for a size, dtype, std or generator out of range, naming it.
    """
    dtype = _dtype(dtype, _FLOATS)
    if not std >= 0:
        raise ValueError(f"std: expected a number of at least 0, got {std}")
    seed_offset, shape = _resolve(size, generator, device)
    return torch.ops.fastgen.normal(seed_offset, shape, dtype, float(mean), float(std))


def uniform(
    *size: int | Sequence[int],
    low: float = 0.0,
    high: float = 1.0,
    generator: AnyGenerator = None,
    dtype: torch.dtype | None = None,
    device: Device = None,
) -> Tensor:
    """Uniform numbers in [low, high), never below `low` nor `high` itself in any dtype.

    A `low` that the dtype does not have is rounded up to the next number that it has. The resolution is that of the
    dtype's significand: 2^-53, 2^-24, 2^-11 (float16), 2^-8 (bfloat16) of the width. Arguments as for `normal`;
    low < high, with a number of the dtype between them.
    """
    dtype = _dtype(dtype, _FLOATS)
    limit = torch.finfo(dtype).max
    if not (-limit <= low < high <= limit and high - low <= limit):
        name = dtype_name(dtype)
        raise ValueError(
            f"low, high: expected low < high, each and their distance finite in {name}, got {low} and {high}"
        )
    first = _round_up(float(low), dtype)
    if not first < high:
        name = dtype_name(dtype)
        raise ValueError(f"low, high: expected a number of {name} in [low, high), got {low} and {high}")
    seed_offset, shape = _resolve(size, generator, device)
    return torch.ops.fastgen.uniform(seed_offset, shape, dtype, first, float(high))


# Bits of the significand, and the exponent (of math.frexp) of the least normal number.
_PRECISION = {torch.float32: (24, -125), torch.bfloat16: (8, -125), torch.float16: (11, -13)}


def _round_up(value: float, dtype: torch.dtype) -> float:
    """The least number of `dtype` that is not below `value`: what is added to it then never rounds to below it."""
    if dtype == torch.float64 or value == 0.0:
        return value
    bits, least = _PRECISION[dtype]
    unit = max(math.frexp(value)[1], least) - bits
    return math.ldexp(math.ceil(math.ldexp(value, -unit)), unit)


def exponential(
    *size: int | Sequence[int],
    rate: float = 1.0,
    generator: AnyGenerator = None,
    dtype: torch.dtype | None = None,
    device: Device = None,
) -> Tensor:
    """Exponential numbers of the given rate (mean 1 / rate), always above 0 in float32 and float64.

    Arguments as for `normal`; rate > 0.
    """
    dtype = _dtype(dtype, _FLOATS)
    if not 0 < rate < math.inf:
        raise ValueError(f"rate: expected a finite number above 0, got {rate}")
    seed_offset, shape = _resolve(size, generator, device)
    return torch.ops.fastgen.exponential(seed_offset, shape, dtype, float(rate))


def bernoulli(
    *size: int | Sequence[int],
    p: float = 0.5,
    generator: AnyGenerator = None,
    dtype: torch.dtype | None = None,
    device: Device = None,
) -> Tensor:
    """True (1) with probability `p`, to a resolution of 2^-32.

    dtype: bool (default), float32, float64, bfloat16 or float16, all from the 32-bit stream. Other
    arguments as for `normal`.
    """
    dtype = _dtype(dtype, (torch.bool, *_FLOATS), torch.bool)
    p = _probability("p", p)
    seed_offset, shape = _resolve(size, generator, device)
    return torch.ops.fastgen.bernoulli(seed_offset, shape, dtype, p)


def dropout_mask(
    *size: int | Sequence[int],
    p: float = 0.5,
    generator: AnyGenerator = None,
    dtype: torch.dtype | None = None,
    device: Device = None,
) -> Tensor:
    """Which elements survive a dropout of probability `p`: True (1) with probability 1 - p."""
    return bernoulli(*size, p=1.0 - _probability("p", p), generator=generator, dtype=dtype, device=device)


def bits(
    *size: int | Sequence[int],
    generator: AnyGenerator = None,
    dtype: torch.dtype | None = None,
    device: Device = None,
) -> Tensor:
    """The raw words of the stream: int32 (default), or int64 from the 64-bit stream."""
    dtype = _dtype(dtype, (torch.int32, torch.int64), torch.int32)
    seed_offset, shape = _resolve(size, generator, device)
    return torch.ops.fastgen.random_bits(seed_offset, shape, dtype)


def permutation(n: int, *, generator: AnyGenerator = None, device: Device = None) -> Tensor:
    """(n,) int64: a random order of 0 .. n - 1, by sorting n words of the 64-bit stream."""
    if not isinstance(n, (int, torch.SymInt)) or isinstance(n, bool):
        raise TypeError(f"n: expected an int, got {type(n).__name__}")
    if n < 0:
        raise ValueError(f"n: expected an int of at least 0, got {n}")
    return torch.argsort(bits(n, generator=generator, dtype=torch.int64, device=device), stable=True)
