"""Philox4x32-10 against the vectors that Random123 publishes (its file kat_vectors)."""

import ctypes

import numpy as np
import pytest
import torch
from support import call

from fastgen import random, reference

# counter, key, result; word by word, lowest first.
KNOWN = [
    ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN)
def test_reference(counter, key, result):
    words = reference.philox4x32(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))
    assert [int(w) for w in words] == result


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN)
def test_every_lane_of_the_kernels(words_library, isa, counter, key, result):
    library = words_library(isa)
    blocks = library.blocks()
    # One lane has the known counter, in turn; the others another one, with something in the high halves.
    for lane in range(blocks):
        counters = np.full((4, blocks), 0x5DEECE66D5DEECE6, np.uint64)
        counters[:, lane] = counter
        out = np.empty_like(counters)
        seed = key[0] | key[1] << 32
        library.philox(ctypes.c_void_p(counters.ctypes.data), ctypes.c_uint64(seed), ctypes.c_void_p(out.ctypes.data))
        assert (out[:, lane] & 0xFFFFFFFF).tolist() == result
        others = np.delete(out, lane, axis=1) & 0xFFFFFFFF
        assert (others == others[:, :1]).all()
        assert blocks == 1 or (others[:, 0] != result).any()


def test_words_of_the_stream():
    """The first known vector is the first block of seed 0: draws reach it, and so do 64-bit draws with width 1."""
    words = random.bits(4, generator=random.Generator(0))
    assert [int(w) & 0xFFFFFFFF for w in words] == KNOWN[0][2]

    block = [
        int(w) for w in reference.philox4x32(tuple(map(torch.tensor, (5, 0, 0, 1))), (torch.tensor(7), torch.tensor(0)))
    ]
    words = random.bits(2, generator=random.Generator(7, offset=10), dtype=torch.int64)
    assert [int(w) % 2**64 for w in words] == [block[0] | block[1] << 32, block[2] | block[3] << 32]


def test_counter_and_key_layout(path):
    """Block number in the two low counter words, width in the top one, seed in the key, low words first."""
    seed, block = 0x0123456789ABCDEF, 0x2FEDCBA987654321
    words = [int(w) for w in reference.philox4x32(
        tuple(map(torch.tensor, (block & 0xFFFFFFFF, block >> 32, 0, 0))),
        tuple(map(torch.tensor, (seed & 0xFFFFFFFF, seed >> 32))),
    )]  # fmt: skip
    offset = (4 * block + 1) % 2**64
    state = random.Generator(seed, offset).get_state()
    drawn = call("random_bits", path, state, [3], torch.int32)
    assert [int(w) & 0xFFFFFFFF for w in drawn] == words[1:]
