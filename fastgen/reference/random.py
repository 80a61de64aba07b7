"""The random stream: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).

The numbers are made of integer operations and of single IEEE additions, multiplications, divisions and
square roots in a fixed order, so they have the same bits here, in every CPU kernel and on a GPU.
`csrc/common/` holds the same algorithm; its coefficients come from `scripts/fit_polynomials.py`.

The key is the seed; the counter is (block, 0, width) with a 64-bit block number. Element `e` of the
stream is word `e % 4` of block `e // 4` for 32-bit draws (width 0: fp32, bf16, fp16, bool) and the
64-bit word `e % 2` of block `e // 2` for 64-bit draws (width 1: fp64, int64), `e = offset + index`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

_MASK32 = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)

# Polynomial tails, lowest power first; see scripts/fit_polynomials.py for what each multiplies.
_LOG32 = (
    -0.49999997,
    0.333333313,
    -0.250007808,
    0.200012341,
    -0.166266456,
    0.142048553,
    -0.13127555,
    0.127226725,
    -0.0767364129,
)
_SIN32: tuple[float, ...] = (-0.166666642, 0.00833274797, -0.000195878907)
_COS32: tuple[float, ...] = (0.0416666642, -0.00138883025, 2.45479423e-05)
_ATANH64 = (
    0.6666666666666666,
    0.4000000000000088,
    0.28571428570803614,
    0.22222222391713917,
    0.18181795640132906,
    0.15386239702814658,
    0.13268773138656886,
    0.13086626147840102,
)
_SIN64: tuple[float, ...] = (
    -0.16666666666666666,
    0.008333333333330948,
    -0.00019841269836758574,
    2.755731610255244e-06,
    -2.5051131845003624e-08,
    1.5918129294866608e-10,
)
_COS64: tuple[float, ...] = (
    0.041666666666666664,
    -0.0013888888888887398,
    2.480158729876569e-05,
    -2.7557317271729793e-07,
    2.08761462684032e-09,
    -1.1382632425521717e-11,
)

# ln 2 = high + low; the high part is short enough that k * high is exact for every exponent k.
_LN2_HIGH, _LN2_LOW = 6.93147180369123816490e-01, 1.90821492927058770002e-10
_SQRT_HALF_BITS = {torch.float32: 0x3F3504F3, torch.float64: 0x3FE6A09E667F3BCD}
_ONE_MINUS_SQRT_HALF = 0.29289323


# ---------------------------------------------------------------------------------------------------
# Philox4x32-10


Word = TypeVar("Word", int, Tensor)


def philox4x32(counter: tuple[Word, Word, Word, Word], key: tuple[Word, Word]) -> tuple[Word, Word, Word, Word]:
    """Ten rounds on 32-bit words, as ints or as int64 tensors."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]  # wraps modulo 2^64: the bits are right
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK32) ^ c1 ^ k0,
            p1 & _MASK32,
            ((p0 >> 32) & _MASK32) ^ c3 ^ k1,
            p0 & _MASK32,
        )
        k0, k1 = (k0 + _WEYL[0]) & _MASK32, (k1 + _WEYL[1]) & _MASK32
    return c0, c1, c2, c3


def _blocks(seed_offset: Tensor, count: int, per_block: int) -> tuple[Tensor, Tensor]:
    """Blocks that cover elements offset .. offset + count, and the first element's place in them.

    seed_offset: (..., 2) int64. Returns words (..., blocks, 4) and lead (..., 1) in [0, per_block).
    """
    seed, offset = seed_offset[..., 0:1], seed_offset[..., 1:2]
    shift = per_block.bit_length() - 1
    lead = offset & (per_block - 1)
    first = (offset >> shift) & ((1 << (64 - shift)) - 1)
    last_block = (count + 2 * per_block - 2) >> shift  # enough for any lead
    block = first + torch.arange(last_block, device=seed_offset.device)
    block = block & ((1 << (64 - shift)) - 1)
    zero = torch.zeros_like(block)
    width = zero + (1 if per_block == 2 else 0)
    counter = (block & _MASK32, (block >> 32) & _MASK32, zero, width)
    key = (seed & _MASK32, (seed >> 32) & _MASK32)
    return torch.stack(philox4x32(counter, key), dim=-1), lead


def _window(values: Tensor, lead: Tensor, count: int) -> Tensor:
    """values (..., n) -> values[..., lead : lead + count]."""
    index = lead + torch.arange(count, device=values.device)
    return torch.gather(values, -1, index)


def _words(seed_offset: Tensor, count: int, bits: int) -> Tensor:
    """(..., count) int64: words in [0, 2^32), or the bit patterns of 64-bit words."""
    words, lead = _blocks(seed_offset, count, 4 if bits == 32 else 2)
    if bits == 64:
        words = words[..., 0::2] | (words[..., 1::2] << 32)
    return _window(words.flatten(-2), lead, count)


def _bits_of(dtype: torch.dtype) -> int:
    return 64 if dtype in (torch.float64, torch.int64) else 32


def _finish(values: Tensor, seed_offset: Tensor, size: list[int], dtype: torch.dtype) -> Tensor:
    return values.to(dtype).reshape([*seed_offset.shape[:-1], *size])


# ---------------------------------------------------------------------------------------------------
# Distributions. `seed_offset` (2,) gives one stream of shape `size`; (S, 2) gives S of them, stacked.


def claim(state: Tensor, count: int) -> Tensor:
    """The present (seed, offset) of a generator, which moves `count` elements on.

    One op and not two, so that a compiler cannot read the state again, moved, in a backward pass.
    """
    taken = state.clone()
    state[1] += count
    return taken


def random_bits(seed_offset: Tensor, size: list[int], dtype: torch.dtype) -> Tensor:
    words = _words(seed_offset, math.prod(size), _bits_of(dtype))
    if dtype == torch.int32:
        words = torch.where(words >= 2**31, words - 2**32, words)
    return _finish(words, seed_offset, size, dtype)


_UNIFORM_BITS = {torch.float64: 53, torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}


def uniform(seed_offset: Tensor, size: list[int], dtype: torch.dtype, low: float, high: float) -> Tensor:
    width, kept = _bits_of(dtype), _UNIFORM_BITS[dtype]
    words = _words(seed_offset, math.prod(size), width)
    work = torch.float64 if width == 64 else torch.float32
    u = ((words >> (width - kept)) & ((1 << kept) - 1)).to(work) * 2.0**-kept
    values = (low + u * (high - low)).to(dtype)
    return _finish(torch.clamp(values, max=below(high, dtype)), seed_offset, size, dtype)


def below(high: float, dtype: torch.dtype) -> float:
    """The largest number of `dtype` under `high`."""
    top = torch.tensor(high, dtype=torch.float64)
    rounded = top.to(dtype)
    if rounded.to(torch.float64) < top:
        return float(rounded)
    return float(torch.nextafter(rounded, torch.tensor(-math.inf, dtype=dtype)))


def bernoulli(seed_offset: Tensor, size: list[int], dtype: torch.dtype, p: float) -> Tensor:
    words = _words(seed_offset, math.prod(size), 32)
    return _finish(words < round(p * 2.0**32), seed_offset, size, dtype)


def _horner(coefficients: Sequence[float], x: Tensor) -> Tensor:
    value = torch.full_like(x, coefficients[-1])
    for c in reversed(coefficients[:-1]):
        value = value * x + c
    return value


def _standard_exponential(words: Tensor, work: torch.dtype) -> Tensor:
    """-log(1 - U), U = (word + 1/2) / 2^bits, accurate in both tails.

    With w = min(word, ~word) the small side of U or 1 - U is v = (w + 1/2) / 2^bits <= 1/2, which
    keeps its leading bits in floating point: -log1p(-v) if U is small, -log(v) if it is large.
    """
    bits = 64 if work == torch.float64 else 32
    small = (words >= 0) if bits == 64 else (words < 2**31)
    w = torch.where(small, words, ~words if bits == 64 else words ^ _MASK32)
    v = w.to(work) * 2.0**-bits + 2.0 ** -(bits + 1)

    # log v: v = m 2^e with m in [sqrt(1/2), sqrt(2)), f = m - 1. log(1 - v): f = -v near 0, and
    # past 1 - sqrt(1/2), 1 - v = (1 + f) / 2 with f = 1 - 2 v. Each f is exact; k = -e.
    as_int, mantissa = (torch.int64, 52) if bits == 64 else (torch.int32, 23)
    base = _SQRT_HALF_BITS[work]
    shifted = v.view(as_int) - base
    m = ((shifted & ((1 << mantissa) - 1)) + base).view(work)
    near = v < _ONE_MINUS_SQRT_HALF
    f = torch.where(small, torch.where(near, -v, 1 - 2 * v), m - 1)
    k = torch.where(small, (~near).to(work), -(shifted >> mantissa).to(work))

    if bits == 32:
        return k * math.log(2) - (f + f * f * _horner(_LOG32, f))
    s = f / (2 + f)
    z = s * s
    half_square = 0.5 * (f * f)
    y = s * (half_square + z * _horner(_ATANH64, z)) - k * _LN2_LOW
    return k * _LN2_HIGH - (f - (half_square - y))


def _cos_sin_turn(words: Tensor, work: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of 2 pi word / 2^bits; the quadrant comes off exactly, in integers."""
    bits, sine, cosine = (64, _SIN64, _COS64) if work == torch.float64 else (32, _SIN32, _COS32)
    quadrant, rest = ((words + 2 ** (bits - 3)) >> (bits - 2)) & 3, words << 2
    if bits == 32:
        rest = rest & _MASK32
        rest = torch.where(rest >= 2**31, rest - 2**32, rest)
    r = rest.to(work) * (math.pi / 2 * 2.0**-bits)
    y = r * r
    s = r * _horner((1.0, *sine), y)
    c = _horner((1.0, -0.5, *cosine), y)
    swap = (quadrant & 1).bool()
    cos, sin = torch.where(swap, s, c), torch.where(swap, c, s)
    return torch.where(((quadrant + 1) & 2).bool(), -cos, cos), torch.where((quadrant & 2).bool(), -sin, sin)


def _sqrt(x: Tensor) -> Tensor:
    """The correctly rounded root of positive numbers; `torch.sqrt` may be one unit off (vector library)."""
    if x.dtype == torch.float32:
        return torch.sqrt(x.double()).float()  # 53 bits are enough for one more rounding to be harmless
    # One Newton step on the exact residual x - y^2, y^2 = product + rest (Dekker).
    y = torch.sqrt(x)
    scaled = 134217729.0 * y
    head = scaled - (scaled - y)
    tail = y - head
    product = y * y
    rest = ((head * head - product) + 2 * head * tail) + tail * tail
    return y + ((x - product) - rest) / (2 * y)


def exponential(seed_offset: Tensor, size: list[int], dtype: torch.dtype, rate: float) -> Tensor:
    work = torch.float64 if dtype == torch.float64 else torch.float32
    words = _words(seed_offset, math.prod(size), _bits_of(dtype))
    return _finish(_standard_exponential(words, work) * (1.0 / rate), seed_offset, size, dtype)


def normal(seed_offset: Tensor, size: list[int], dtype: torch.dtype, mean: float, std: float) -> Tensor:
    """Box-Muller on the pairs of words (2j, 2j + 1): the first gives the radius, the second the angle."""
    work = torch.float64 if dtype == torch.float64 else torch.float32
    count = math.prod(size)
    words, lead = _blocks(seed_offset, count, 2 if work == torch.float64 else 4)
    if work == torch.float64:
        words = words[..., 0::2] | (words[..., 1::2] << 32)
    e = _standard_exponential(words[..., 0::2], work)
    radius = _sqrt(e + e)
    cos, sin = _cos_sin_turn(words[..., 1::2], work)
    z = torch.stack((radius * cos, radius * sin), dim=-1).flatten(-3)
    z = _window(z, lead, count)
    if (mean, std) != (0.0, 1.0):  # 0 + z would lose the sign of a zero
        z = mean + std * z
    return _finish(z, seed_offset, size, dtype)
