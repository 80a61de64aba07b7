"""What the stream promises: the same bits by every path, in any split, from any place, on any number of threads."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from support import FLOATS, ISAS, assert_same_bits, call

from fastgen import random
from fastgen.benchmark.timing import use_threads
from fastgen.random import Generator

DRAWS = [
    *(("random_bits", d, ()) for d in (torch.int32, torch.int64)),
    *(("uniform", d, args) for d in FLOATS for args in ((0.0, 1.0), (-2.5, 7.1))),
    *(("normal", d, args) for d in FLOATS for args in ((0.0, 1.0), (3.0, 0.25))),
    *(("exponential", d, (args,)) for d in FLOATS for args in (1.0, 0.3)),
    *(("bernoulli", d, (0.3,)) for d in (torch.bool, *FLOATS)),
]
draws = pytest.mark.parametrize(
    ("op", "dtype", "args"), DRAWS, ids=lambda v: str(v).removeprefix("torch.").replace(" ", "")
)

PLACES = [0, 1, 2, 3, 5, 2**32 - 3, 2**34 - 5, 2**34 + 1, 2**63 - 7, 2**63, 2**64 - 1, 2**64 - 9]


def state_of(seed: int, offset: int) -> torch.Tensor:
    return Generator(seed, offset % 2**64).get_state()


@draws
def test_every_path_has_the_same_bits(op, dtype, args):
    for offset in PLACES:
        state = state_of(0xFEDCBA9876543210, offset)
        want = call(op, "reference", state, [2, 531], dtype, *args)
        for isa in ISAS:
            assert_same_bits(call(op, isa, state, [2, 531], dtype, *args), want)


@draws
@given(count=st.integers(0, 140), offset=st.integers(0, 2**64 - 1), seed=st.integers(0, 2**64 - 1))
@example(count=67, offset=2**64 - 35, seed=0)
@example(count=1, offset=3, seed=2**63)
def test_every_path_has_the_same_bits_around_the_vector_width(op, dtype, args, count, offset, seed):
    state = state_of(seed, offset)
    want = call(op, "reference", state, [count], dtype, *args)
    for isa in ISAS:
        assert_same_bits(call(op, isa, state, [count], dtype, *args), want)


@draws
def test_any_number_of_threads_gives_the_same_bits(isa, op, dtype, args, threads):
    state = state_of(11, 1)
    threads(1)
    want = call(op, isa, state, [200_003], dtype, *args)
    for count in (2, 3, 8):
        threads(count)
        assert torch.get_num_threads() == count
        assert_same_bits(call(op, isa, state, [200_003], dtype, *args), want)


@draws
@given(data=st.data())
def test_consecutive_draws_continue_each_other(op, dtype, args, data):
    """Prefix stability and splits: any cut of a stream gives the stream, wherever it starts, past its end too."""
    offset = data.draw(st.sampled_from(PLACES) | st.integers(0, 2**64 - 1), label="offset")
    counts = data.draw(st.lists(st.integers(0, 70), min_size=1, max_size=5), label="counts")
    seed = data.draw(st.integers(0, 2**64 - 1), label="seed")
    whole = getattr(torch.ops.fastgen, op)(state_of(seed, offset), [sum(counts)], dtype, *args)
    done = 0
    for count in counts:
        piece = getattr(torch.ops.fastgen, op)(state_of(seed, offset + done), [count], dtype, *args)
        assert_same_bits(piece, whole[done : done + count])
        done += count


@draws
def test_several_streams_in_one_call(path, op, dtype, args):
    states = torch.stack([state_of(1, 0), state_of(2, 3), state_of(1, 2**63), state_of(9, 2**64 - 2)])
    for layout in (states, states.t().contiguous().t(), states.repeat_interleave(2, dim=0)[::2]):
        together = call(op, path, layout, [7, 3], dtype, *args)
        assert together.shape == (4, 7, 3)
        for state, stream in zip(states, together, strict=True):
            assert_same_bits(stream, call(op, path, state, [7, 3], dtype, *args))
    assert call(op, path, states[:0], [7, 3], dtype, *args).shape == (0, 7, 3)


@pytest.mark.parametrize("shape", [(), (0,), (0, 5), (1,), (3, 0, 2), (1, 1, 1), (2, 3, 4, 5)])
def test_shapes(path, shape):
    for op, dtype, args in DRAWS:
        out = call(op, path, state_of(5, 6), list(shape), dtype, *args)
        assert out.shape == shape
        assert out.dtype == dtype
        assert out.is_contiguous()


def test_the_generator_moves_by_what_it_gives():
    g = Generator(3)
    pieces = [random.normal(n, generator=g) for n in (1, 2, 5, 0, 31, 1000)]
    assert g.offset == 1039
    assert_same_bits(torch.cat(pieces), random.normal(1039, generator=Generator(3)))
    random.uniform(3, 4, generator=g)
    assert g.offset == 1051


@pytest.mark.parametrize("distance", [0, 1, 5, 2**31, 2**32 + 3, 2**63, 2**64 - 1])
def test_skip_is_a_draw_that_is_thrown_away(distance):
    g = Generator(8, offset=40).skip(distance)
    assert g.offset == (40 + distance) % 2**64
    want = random.normal(9, generator=Generator(8, (40 + distance) % 2**64))
    assert_same_bits(random.normal(9, generator=g), want)
    g.skip(-9).skip(-distance)
    assert g.offset == 40


def test_the_offset_wraps_in_a_draw():
    g = Generator(8, offset=2**64 - 3)
    drawn = random.bits(8, generator=g)
    assert g.offset == 5
    assert_same_bits(drawn[3:], random.bits(5, generator=Generator(8)))


def test_the_half_types_are_the_float32_numbers_rounded():
    full = random.normal(5000, generator=Generator(1))
    for dtype in (torch.bfloat16, torch.float16):
        assert_same_bits(random.normal(5000, generator=Generator(1), dtype=dtype), full.to(dtype))
        assert_same_bits(
            random.exponential(5000, generator=Generator(1), dtype=dtype),
            random.exponential(5000, generator=Generator(1)).to(dtype),
        )
        for p in (0.0, 0.37, 1.0):
            flags = random.bernoulli(500, p=p, generator=Generator(1))
            assert_same_bits(random.bernoulli(500, p=p, generator=Generator(1), dtype=dtype), flags.to(dtype))


def test_32_and_64_bit_draws_are_different_streams():
    a = random.normal(10_000, generator=Generator(1), dtype=torch.float64)
    b = random.normal(10_000, generator=Generator(1)).double()
    assert abs(float(torch.corrcoef(torch.stack([a, b]))[0, 1])) < 0.05


def test_a_draw_leaves_its_state_alone(isa):
    state = state_of(4, 4)
    for op, dtype, args in DRAWS:
        call(op, isa, state, [100], dtype, *args)
    assert torch.equal(state, state_of(4, 4))


@pytest.mark.parametrize("isa_of_the_draw", ISAS)
def test_draws_of_several_megabytes(isa_of_the_draw):
    """Large results take another way to memory (huge pages): same bits."""
    state = state_of(21, 2)
    want = [
        call("normal", "generic", state_of(21, 2 + first), [4096], torch.float32, 0.0, 1.0) for first in (0, 3_000_000)
    ]
    with use_threads(2):
        drawn = call("normal", isa_of_the_draw, state, [3_100_000], torch.float32, 0.0, 1.0)
    assert_same_bits(drawn[:4096], want[0])
    assert_same_bits(drawn[3_000_000:3_004_096], want[1])
