"""Measure the elementary functions of the kernels against 80-bit arithmetic.

Run `python scripts/measure_accuracy.py` (x86, a minute on one core; `--points` for a denser grid). Errors are in
units in the last place (ulp) of the exact result. Every function is reached through the ops that users call, so
what is measured is the active kernel:

* exp, expm1 and exp(x) - 1 - x through the reparameterisation ops, with the other operands at 0 or 1;
* log through the exponential numbers and cos, sin through the normal ones, whose words `fastgen.random.bits`
  gives. The words at both ends of the range are too rare to draw, they go through the reference, which has the
  kernels' bits.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

import fastgen
from fastgen import random
from fastgen.reference import random as reference

Wide = Any  # arrays of np.longdouble

_CHUNK = 1 << 20
_ENDS = 1 << 16  # words at each end of the range
_SEED = 1
_RANGE = {torch.float32: (-87.33, 88.72), torch.float64: (-708.39, 709.78)}  # where exp is finite and not subnormal


def ulps(got: Tensor, exact: Wide) -> float:
    """The largest error of `got`, in units in the last place of `exact`."""
    info = np.finfo(got.numpy().dtype)
    _, exponent = np.frexp(exact)
    unit = np.ldexp(np.longdouble(1), np.maximum(exponent - 1, info.minexp) - info.nmant)
    return float((np.abs(got.numpy().astype(np.longdouble) - exact) / unit).max())


def grid(dtype: torch.dtype, low: float, high: float, points: int) -> Iterator[Tensor]:
    """Numbers from low to high: evenly spaced, and evenly spaced in exponent from 2^-30 up, on both sides of 0."""
    for first in range(0, points, _CHUNK):
        place = torch.arange(first, min(first + _CHUNK, points), dtype=torch.float64) / points
        yield (low + (high - low) * place).to(dtype)
        for end in (low, high):
            if end:
                size = torch.exp2(-30 + (30 + np.log2(abs(end))) * place)
                yield (size if end > 0 else -size).to(dtype)


def words(dtype: torch.dtype, points: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(words, exponential numbers, normal numbers) of one stretch of the stream after the other."""
    integers = torch.int32 if dtype == torch.float32 else torch.int64
    for first in range(0, points, _CHUNK):
        place = random.Generator(_SEED, first)
        yield (
            random.bits(_CHUNK, generator=place.clone(), dtype=integers),
            random.exponential(_CHUNK, generator=place.clone(), dtype=dtype),
            random.normal(_CHUNK, generator=place.clone(), dtype=dtype),
        )


def end_words(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(words, exponential numbers) of the first and the last words, by the reference."""
    ends = torch.arange(_ENDS)
    if dtype == torch.float32:
        values = torch.cat([ends, 2**32 - 1 - ends])
        return values.to(torch.int32), reference._standard_exponential(values, dtype)
    values = torch.cat([ends, ~ends])
    return values, reference._standard_exponential(values, dtype)


def exact_exponential(word: Tensor) -> Wide:
    """-log(1 - U), U = (word + 1/2) / 2^bits, from the smaller of U and 1 - U, which 64 bits hold exactly."""
    bits = 8 * word.element_size()
    w = word.numpy()
    small = np.where(w >= 0, w, ~w).astype(np.longdouble)
    v = np.ldexp(small + np.longdouble(0.5), -bits)
    return np.where(w >= 0, -np.log1p(-v), -np.log(v))


def exact_turn(word: Tensor) -> tuple[Wide, Wide]:
    """cos and sin of 2 pi word / 2^bits, the multiple of a quarter turn taken off in integers."""
    bits = 8 * word.element_size()
    w = word.numpy()
    unsigned = w.astype(np.uint64) & np.uint64(2**bits - 1)
    quadrant = ((unsigned + np.uint64(1 << (bits - 3))) >> np.uint64(bits - 2)) & np.uint64(3)
    rest = (w << 2).astype(np.longdouble)
    r = rest * np.ldexp(2 * np.arctan(np.longdouble(1)), -bits)
    c, s = np.cos(r), np.sin(r)
    swap = quadrant % 2 == 1
    cosine, sine = np.where(swap, s, c), np.where(swap, c, s)
    return np.where((quadrant == 1) | (quadrant == 2), -cosine, cosine), np.where(quadrant >= 2, -sine, sine)


def function_errors(dtype: torch.dtype, points: int) -> Iterator[tuple[str, str, float, float | None]]:
    """(function, range, our error, PyTorch's) of what the reparameterisation computes."""
    ops = torch.ops.fastgen

    def exp(x: Tensor) -> Tensor:
        return ops.reparameterize(torch.zeros_like(x), 2 * x, None, torch.ones_like(x))

    def expm1(x: Tensor) -> Tensor:
        one = torch.ones(1, dtype=dtype).expand(x.shape)
        rows = ops.reparameterize_kl_backward(None, one, x[:, None], x[:, None], None, torch.zeros_like(x)[:, None])
        return 2 * rows[1].squeeze(1)

    def exp_minus_1_minus(x: Tensor) -> Tensor:
        column = x[:, None]
        return 2 * ops.reparameterize_kl(torch.zeros_like(column), column, None, torch.zeros_like(column))[1]

    def exact_minus(x: Wide) -> Wide:
        series = x * x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6 * (1 + x / 7)))))
        return np.where(np.abs(x) < 1e-3, series, np.expm1(x) - x)

    Function = Callable[[Tensor], Tensor]
    rows: list[tuple[str, Function, Callable[[Wide], Wide], Function]] = [
        ("exp(x)", exp, np.exp, torch.exp),
        ("exp(x) - 1", expm1, np.expm1, torch.expm1),
        ("exp(x) - 1 - x", exp_minus_1_minus, exact_minus, lambda x: torch.expm1(x) - x),
    ]
    low, high = _RANGE[dtype]
    for name, ours, exact, torchs in rows:
        worst, worst_torch = 0.0, 0.0
        for x in grid(dtype, low, high, points):
            true = exact(x.numpy().astype(np.longdouble))
            worst, worst_torch = max(worst, ulps(ours(x), true)), max(worst_torch, ulps(torchs(x), true))
        yield name, f"{low:g} to {high:g}", worst, worst_torch


def stream_errors(dtype: torch.dtype, points: int) -> Iterator[tuple[str, str, float, float | None]]:
    """(function, range, our error, None) of what the random stream computes."""
    word, exponential = end_words(dtype)
    log = ulps(exponential, exact_exponential(word))
    turn = normal = 0.0
    for word, exponential, z in words(dtype, points):
        log = max(log, ulps(exponential, exact_exponential(word)))
        radius_word, angle_word = word[0::2], word[1::2]
        wide = angle_word.long() if dtype == torch.float64 else angle_word.long() & 0xFFFFFFFF
        exact_radius = np.sqrt(2 * exact_exponential(radius_word))
        for ours, exact, place in zip(
            reference._cos_sin_turn(wide, dtype), exact_turn(angle_word), (0, 1), strict=True
        ):
            turn = max(turn, ulps(ours, exact))
            normal = max(normal, ulps(z[place::2], exact_radius * exact))
    yield "-log(1 - U)", "0 < U < 1", log, None
    yield "cos, sin(2 pi U)", "0 <= U < 1", turn, None
    yield "normal", "both words", normal, None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=1 << 22, help="arguments of each function (default: 2^22)")
    args = parser.parse_args()
    if args.points < _CHUNK:
        parser.error(f"--points: expected at least {_CHUNK}, got {args.points}")
    if np.finfo(np.longdouble).nmant < 63:
        raise SystemExit("np.longdouble has no 64-bit significand here; run this on x86")
    kernels = fastgen.build_info()["isa_active"] or "reference"
    print(f"kernels: {kernels}; torch {torch.__version__}; {args.points} points\n")
    print("| dtype | function | range | worst error (ulp) | PyTorch's |")
    print("|---|---|---|---|---|")
    for dtype in (torch.float32, torch.float64):
        for errors in (function_errors, stream_errors):
            for name, where, ours, torchs in errors(dtype, args.points):
                theirs = "" if torchs is None else f"{torchs:.3g}"
                print(f"| {str(dtype).removeprefix('torch.')} | {name} | {where} | {ours:.2f} | {theirs} |", flush=True)


if __name__ == "__main__":
    main()
