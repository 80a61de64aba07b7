"""The functions inside the kernels on chosen words and numbers: equal bits by every path, accuracy, extremes."""

from __future__ import annotations

import ctypes
import math

import numpy as np
import pytest
import torch
from support import ALL_ISAS, ISAS, assert_same_bits, call

from fastgen.random import Generator
from fastgen.reference import random as reference

BITS, UNIFORM, NORMAL, EXPONENTIAL, BERNOULLI = range(5)
WIDTHS = {
    32: (np.uint32, np.float32, torch.float32),
    64: (np.uint64, np.float64, torch.float64),
}


def pointer(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def padded(values: np.ndarray, step: int = 64) -> np.ndarray:
    """A copy whose length is whole steps; the last value is repeated."""
    return np.ascontiguousarray(np.pad(values, (0, -len(values) % step), mode="edge"))


def interesting_words(width: int, count: int = 200_000) -> np.ndarray:
    """Both ends, neighbourhoods of all powers of two and of the branch points, and random words of all sizes."""
    kind = WIDTHS[width][0]
    near = [2**b + d for b in range(width) for d in range(-40, 41)]
    branch = int((1 - math.sqrt(0.5)) * 2**width)  # where 1 - v is halved
    near += [side + d for side in (branch, 2**width - branch) for d in range(-3000, 3000)]
    near += [i * 2**width // 16 + d for i in range(17) for d in range(-40, 41)]
    rng = np.random.default_rng(1)
    words = rng.integers(0, 2**width, count, dtype=kind, endpoint=False)
    small = words[: count // 2] >> rng.integers(0, width, count // 2, dtype=kind)
    return np.concatenate([np.array([w % 2**width for w in near], kind), words, small, ~small])


def draw(library: ctypes.CDLL, which: int, even: np.ndarray, odd: np.ndarray, a=0.0, b=0.0):
    """Values of (even word, odd word), as the kernels pair them."""
    count, width = len(even), even.itemsize * 8
    even, odd = padded(even), padded(odd)
    y, y_odd = (np.empty(len(even), WIDTHS[width][1]) for _ in range(2))
    function = getattr(library, f"draw{width}")
    function(
        which, pointer(even), pointer(odd), ctypes.c_int64(len(even)), ctypes.c_double(a), ctypes.c_double(b),
        pointer(y), pointer(y_odd),
    )  # fmt: skip
    return y[:count], y_odd[:count]


def as_reference(words: np.ndarray) -> torch.Tensor:
    """Words as reference.py has them: 32-bit ones as they are, 64-bit ones as bit patterns, in int64."""
    return torch.from_numpy(words.astype(np.int64) if words.itemsize == 4 else words.view(np.int64))


@pytest.fixture(params=[32, 64])
def width(request):
    return request.param


def test_kernels_and_reference_agree_on_extreme_words(words_library, isa, width):
    library, (_, _, work) = words_library(isa), WIDTHS[width]
    even = interesting_words(width)
    odd = np.random.default_rng(2).permutation(even)

    e = reference._standard_exponential(as_reference(even), work)
    y, _ = draw(library, EXPONENTIAL, even, odd, a=1.0)
    assert_same_bits(torch.from_numpy(y), e)

    radius = reference._sqrt(e + e)
    cos, sin = reference._cos_sin_turn(as_reference(odd), work)
    y, y_odd = draw(library, NORMAL, even, odd)
    assert_same_bits(torch.from_numpy(y), radius * cos)
    assert_same_bits(torch.from_numpy(y_odd), radius * sin)


def exact_exponential(words: np.ndarray) -> np.ndarray:
    """-log(1 - (word + 1/2) / 2^bits) in extended precision."""
    width = words.itemsize * 8
    small = words < words.dtype.type(2 ** (width - 1))
    v = np.ldexp(np.where(small, words, ~words).astype(np.longdouble) + np.longdouble(0.5), -width)
    return np.where(small, -np.log1p(-v), -np.log(v))


def exact_turn(words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin of 2 pi word / 2^bits in extended precision, from the octant that each word is in."""
    width = words.itemsize * 8
    kind, signed = words.dtype.type, {4: np.int32, 8: np.int64}[words.itemsize]
    quadrant = (words + kind(2 ** (width - 3))) >> kind(width - 2)
    r = (words << kind(2)).view(signed).astype(np.longdouble)
    half_pi = np.longdouble("1.57079632679489661923132169163975144")
    cos, sin = np.cos(np.ldexp(r * half_pi, -width)), np.sin(np.ldexp(r * half_pi, -width))
    swap = quadrant & kind(1) == 1
    c, s = np.where(swap, sin, cos), np.where(swap, cos, sin)
    return np.where((quadrant == 1) | (quadrant == 2), -c, c), np.where(quadrant >= 2, -s, s)


def ulps(value: np.ndarray, exact: np.ndarray) -> np.ndarray:
    return np.abs(value.astype(np.longdouble) - exact) / np.spacing(np.abs(exact).astype(value.dtype))


@pytest.mark.skipif(np.finfo(np.longdouble).nmant < 63, reason="long double is no wider than double here")
def test_accuracy(words_library, isa, width):
    """At most 2 units in the last place for the exponential, 5 for the normals, against extended precision."""
    library = words_library(isa)
    even = interesting_words(width, 1_000_000)
    odd = np.random.default_rng(3).permutation(even)
    e = exact_exponential(even)
    y, _ = draw(library, EXPONENTIAL, even, odd, a=1.0)
    errors = {"exponential": ulps(y, e)}

    radius = np.sqrt(2 * e)
    y, y_odd = draw(library, NORMAL, even, odd)
    for name, value, exact in zip(("even", "odd"), (y, y_odd), exact_turn(odd), strict=True):
        reached = exact != 0
        errors[name] = ulps(value, radius * exact)[reached]
        assert (value[~reached] == 0).all()
    assert {name: float(e.max()) for name, e in errors.items() if e.max() > {"exponential": 2.0}.get(name, 5.0)} == {}
    assert all(e.mean() < 0.6 for e in errors.values())


def test_extended_precision_agrees_with_mpmath():
    """The oracle of the test above, at a few words of both widths."""
    mpmath = pytest.importorskip("mpmath")
    if np.finfo(np.longdouble).nmant < 63:
        pytest.skip("long double is no wider than double here")
    with mpmath.workdps(60):
        for width in (32, 64):
            words = interesting_words(width, 100)[::97]
            cos, sin = exact_turn(words)
            for i, word in enumerate(int(w) for w in words):
                u = (mpmath.mpf(word) + 0.5) / 2**width
                turn = 2 * mpmath.pi * word / 2**width
                for value, exact in (
                    (exact_exponential(words[i : i + 1])[0], -mpmath.log(1 - u)),
                    (cos[i], mpmath.cos(turn)),
                    (sin[i], mpmath.sin(turn)),
                ):
                    assert (
                        abs(mpmath.mpf(str(value)) - exact) <= abs(exact) * mpmath.mpf(2) ** -60 + mpmath.mpf(10) ** -40
                    )


def test_extremes(words_library, isa):
    """The largest and smallest values that any words give."""
    library = words_library(isa)
    for width, largest in ((32, 6.77), (64, 9.49)):
        kind = WIDTHS[width][0]
        even = np.array([0, 2**width - 1, 2 ** (width - 1), 2 ** (width - 1) - 1], kind)
        e, _ = draw(library, EXPONENTIAL, even, even, a=1.0)
        assert e[0] == 2.0 ** -(width + 1)  # -log1p(-2^-33)
        assert e[0] > 0
        assert abs(e[1] - (width + 1) * math.log(2)) < 1e-5
        assert e.argmin() == 0
        assert e.argmax() == 1
        z, _ = draw(library, NORMAL, even, np.zeros(4, kind))
        assert z[0] == math.sqrt(2.0**-width)
        assert abs(z[1] - largest) < 0.01
        assert abs(z[2] - math.sqrt(2 * math.log(2))) < 1e-6
        # The axes are exact: a quarter turn leaves nothing of the other coordinate.
        quarters = np.array([i * 2 ** (width - 2) for i in range(4)], kind)
        z, z_odd = draw(library, NORMAL, np.full(4, 2**width - 1, kind), quarters)
        assert (z / z[0]).tolist() == [1, 0, -1, 0]
        assert (z_odd / z[0]).tolist() == [0, 1, 0, -1]


# Where the stream of seed 0 has rare words, found by search: (element, word).
RARE = [
    (2592375475, 0x80000000), (16014844225, 0x40000000), (5992377491, 0), (1668051985, 0xC0000000),  # angles
    (12922966362, 0), (8098165446, 0xFFFFFFFF), (8191531328, 0x80000000), (4934972786, 0x7FFFFFFF),  # radii
]  # fmt: skip


@pytest.mark.parametrize(("element", "word"), RARE)
def test_rare_words_of_the_stream(path, element, word):
    """Draws that hold the extreme words: zeros keep their sign, nothing overflows, uniforms stay under 1."""
    state = Generator(0, element - element % 4).get_state()
    at = element % 4
    assert int(call("random_bits", path, state, [4], torch.int32)[at]) % 2**32 == word
    for mean, std in ((0.0, 1.0), (0.0, 2.0), (1.5, 1.0)):
        z = call("normal", path, state, [4], torch.float32, mean, std)
        assert torch.isfinite(z).all()
        assert_same_bits(z, call("normal", "reference", state, [4], torch.float32, mean, std))
    assert float(call("exponential", path, state, [4], torch.float32, 1.0)[at]) > 0
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for low, high in ((0.0, 1.0), (-1.0, 0.0), (0.1, 0.3), (2.0, 2.7), (-3.0, 1e4), (1.0, 1.0 + 1e-3)):
            u = call("uniform", path, state, [4], dtype, low, high)
            assert float(u[at]) < high
            assert_same_bits(u, call("uniform", "reference", state, [4], dtype, low, high))
    assert bool(call("bernoulli", path, state, [4], torch.bool, 1.0)[at])
    assert not bool(call("bernoulli", path, state, [4], torch.bool, 0.0)[at])
    assert bool(call("bernoulli", path, state, [4], torch.bool, 0.5)[at]) == (word < 2**31)


def test_uniform_reaches_its_largest_value_and_not_its_end(path):
    """Words of all ones round up to `high` in many intervals: the result is the number below it."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        state = Generator(0, 8098165446).get_state()  # word 0xFFFFFFFF
        for low, high in ((0.0, 1.0), (1.0, 2.0), (-7.0, -1.0), (0.0, 3.0), (-1.0, 0.0), (5.0, 9.3), (0.0, 1e-3)):
            u = call("uniform", path, state, [1], dtype, low, high)
            top = torch.tensor(high, dtype=torch.float64)
            rounded = top.to(dtype)
            below = (
                rounded if rounded.double() < top else torch.nextafter(rounded, torch.tensor(-math.inf, dtype=dtype))
            )
            assert u.double().item() < high
            assert u.double().item() >= below.double().item() - (high - low) * torch.finfo(dtype).eps


# (first, stride, count) of words: every 65 537th, and all whose radii differ. A radius is a function of the nearest
# float32 to the word or, past the middle, to its complement: up to 2^24 each word has its own, from 2^k on every
# 2^(k - 23)th.
SOME_WORDS = [(0, 65_537, 2**16)]
LOWER_HALF = [(0, 1, 2**24), *((2**k, 2 ** (k - 23), 2**23) for k in range(24, 31))]
ALL_RADII = LOWER_HALF + [(2**32 - 1 - first, 2**32 - stride, count) for first, stride, count in LOWER_HALF]


@pytest.mark.parametrize("scans", [SOME_WORDS, ALL_RADII], ids=["some words", "all radii"])
def test_radii(words_library, scans):
    """Finite, inside the bounds, and the same sum of bit patterns by every instruction set."""
    isas = ISAS if scans is SOME_WORDS else [isa for isa in ISAS if isa != "generic"] or ISAS  # it takes a minute
    sums = set()
    for isa in isas:
        library, found, ends = words_library(isa), [], np.empty((len(scans), 4), np.float32)
        for (first, stride, count), place in zip(scans, ends, strict=True):
            scanned = ctypes.c_uint32(first), ctypes.c_uint32(stride), ctypes.c_int64(count), pointer(place)
            found.append(library.scan32(*scanned))
        sums.add(tuple(found))
        assert ends[:, 0].min() == 2.0**-33
        assert 22.87 < ends[:, 1].max() <= 22.88
        assert ends[:, 3].max() < 6.77
    assert len(sums) == 1


# ---------------------------------------------------------------------------------------------------
# exp and its relatives


def arguments(kind: type) -> np.ndarray:
    limit = 760 if kind is np.float64 else 111
    rng = np.random.default_rng(4)
    size = np.exp(rng.uniform(-60, math.log(limit), 200_000)).astype(kind)
    edges = [
        0.0,
        -0.0,
        1e-45,
        1e-30,
        0.34,
        math.log(2),
        88.72283,
        88.72284,
        103.9,
        104.0,
        109.9,
        110.0,
        1e30,
        709.78,
        745.1,
    ]
    near = np.nextafter(np.array(edges, kind), kind(math.inf))
    values = np.concatenate([size, np.array(edges, kind), near, np.linspace(0, limit, 100_000).astype(kind)])
    return np.concatenate([values, -values])


EXACT = {0: np.exp, 1: np.expm1, 2: lambda x: np.expm1(x) - x}


@pytest.mark.parametrize("which", EXACT)
def test_exponential_functions(words_library, width, which):
    """Equal bits by every instruction set; exp within 1.1 units in the last place, subnormal results included; the
    two differences within 4 units of the larger of the result and, past |x| = 0.69, of the terms."""
    _, kind, _ = WIDTHS[width]
    x = padded(arguments(kind))
    results = []
    for isa in ISAS:
        y = np.empty_like(x)
        getattr(words_library(isa), f"elementary{width}")(which, pointer(x), ctypes.c_int64(len(x)), pointer(y))
        results.append(y)
    for y in results[1:]:
        assert_same_bits(torch.from_numpy(y), torch.from_numpy(results[0]))
    if np.finfo(np.longdouble).nmant < 63:
        return
    wide = x.astype(np.longdouble)
    with np.errstate(all="ignore"):
        exact = EXACT[which](wide)
        if which == 2:  # the oracle cancels as well
            series = wide * wide * (0.5 + wide / 6 + wide * wide / 24 + wide**3 / 120 + wide**4 / 720 + wide**5 / 5040)
            exact = np.where(np.abs(wide) < 1e-2, series, exact)
        scale = np.abs(exact)
        if which > 0:
            scale = np.where(np.abs(wide) < 0.69, scale, np.maximum(scale, 1 + (np.abs(wide) if which == 2 else 0)))
        overflow = np.abs(exact) > np.finfo(kind).max
        unit = np.spacing(np.minimum(scale, np.finfo(kind).max).astype(kind))
        error = np.abs(results[0].astype(np.longdouble) - exact) / unit
    assert np.isposinf(results[0][overflow]).all()
    subnormal_square = (which == 2) & (np.abs(x) <= np.sqrt(np.finfo(kind).tiny))
    error = error[~overflow & ~subnormal_square]
    assert float(error.max()) < (1.1 if which == 0 else 4.0)


def test_exponential_functions_of_what_is_not_finite(words_library, isa, width):
    kind = WIDTHS[width][1]
    x = padded(np.array([math.inf, -math.inf, math.nan], kind))
    expected = {0: [math.inf, 0, math.nan], 1: [math.inf, -1, math.nan], 2: [math.nan, math.inf, math.nan]}
    for which, values in expected.items():
        y = np.empty_like(x)
        getattr(words_library(isa), f"elementary{width}")(which, pointer(x), ctypes.c_int64(len(x)), pointer(y))
        np.testing.assert_array_equal(y[:3], np.array(values, kind))


@pytest.mark.parametrize(
    ("which", "exact"), [(3, lambda x: 1 / (1 + np.exp(-x))), (4, np.tanh)], ids=["sigmoid", "tanh"]
)
def test_activations(words_library, isa, width, which, exact):
    """Within 3 units in the last place, exact limits, NaN passes."""
    kind = WIDTHS[width][1]
    limits = np.array([math.inf, -math.inf, math.nan, 0.0, -0.0, 2e4, -2e4], kind)
    x = padded(np.concatenate([limits, arguments(kind)]))
    y = np.empty_like(x)
    getattr(words_library(isa), f"elementary{width}")(which, pointer(x), ctypes.c_int64(len(x)), pointer(y))
    low, middle = (0.0, [0.5, 0.5]) if which == 3 else (-1.0, [0.0, -0.0])
    np.testing.assert_array_equal(y[:7], np.array([1.0, low, math.nan, *middle, 1.0, low], kind))
    assert which == 3 or math.copysign(1, y[4]) == -1
    assert (np.abs(y[~np.isnan(y)]) <= 1).all()
    if np.finfo(np.longdouble).nmant < 63:
        return
    with np.errstate(all="ignore"):
        wanted = exact(x.astype(np.longdouble))
        # exp(-x) is infinite in float32 from 88.7 on, as in PyTorch: there the result is 0, and near it, subnormal.
        unit = np.spacing(np.maximum(np.abs(wanted), 4 * np.finfo(kind).tiny).astype(kind))
        error = np.abs(y.astype(np.longdouble) - wanted) / unit
    normal = np.abs(wanted) >= 4 * np.finfo(kind).tiny
    assert float(np.nanmax(np.where(normal, error, 0))) < 3.0
    assert float(np.nanmax(np.abs(y[~normal]))) <= 4 * np.finfo(kind).tiny


# ---------------------------------------------------------------------------------------------------
# Half types: all 2^16 of them widened; roundings around every one of them.


@pytest.mark.parametrize("isa", ALL_ISAS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("flush", [False, True], ids=["ieee", "flush_denormal"])
def test_conversions(words_library, isa, dtype, flush):
    """As PyTorch converts, whether or not the thread flushes subnormals."""
    half = np.arange(2**16, dtype=np.uint32).astype(np.uint16)
    as_torch = torch.from_numpy(half.view(np.int16)).view(dtype)
    wide = as_torch.float()
    finite = wide[torch.isfinite(wide)].sort().values
    middle = (finite[1:].double() + finite[:-1].double()) / 2
    floats = [wide, middle.float()]
    floats += [torch.nextafter(middle.float(), torch.tensor(side)) for side in (math.inf, -math.inf)]
    numbers = torch.from_numpy(np.random.default_rng(5).integers(0, 2**32, 2**19, dtype=np.uint32).view(np.float32))
    beyond = torch.tensor([65504.0, 65519.996, 65520.0, 65536.0, 3.3961775e38, 3.4e38, 5.9e-8, 2.9e-8, 2.98e-8, 1e-40])
    floats = torch.cat([*floats, numbers, beyond, -beyond])
    expected = floats.to(dtype)

    count = len(floats)
    padded_floats = padded(floats.numpy())
    padded_half = np.resize(half, len(padded_floats))
    widened, narrowed = np.empty_like(padded_floats), np.empty_like(padded_half)
    convert = getattr(words_library(isa), f"convert_{str(dtype).removeprefix('torch.')}")
    if flush and not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush subnormals")
    try:
        convert(
            pointer(padded_half), pointer(padded_floats), ctypes.c_int64(len(padded_floats)), pointer(widened),
            pointer(narrowed),
        )  # fmt: skip
    finally:
        torch.set_flush_denormal(False)
    assert_same_bits(torch.from_numpy(widened[: 2**16]), wide)
    assert_same_bits(torch.from_numpy(narrowed[:count].view(np.int16)).view(dtype), expected)
