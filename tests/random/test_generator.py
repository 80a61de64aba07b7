"""`fastgen.random.Generator`, the helpers around it, and where a call without one takes its numbers."""

from __future__ import annotations

import copy
import itertools
import pickle
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support import assert_same_bits

from fastgen import random
from fastgen.random import Generator

EDGES = [0, 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1]


@pytest.mark.parametrize("seed", EDGES)
@pytest.mark.parametrize("offset", EDGES)
def test_seed_and_offset_are_64_unsigned_bits(seed, offset):
    g = Generator(seed, offset)
    assert (g.seed, g.offset) == (seed, offset)
    assert repr(g) == f"Generator(seed={seed}, offset={offset}, device='cpu')"
    state = g.get_state()
    assert state.dtype == torch.int64
    assert state.shape == (2,)
    assert [int(w) % 2**64 for w in state] == [seed, offset]


@pytest.mark.parametrize("name", ["seed", "offset"])
@pytest.mark.parametrize("value", [-1, 2**64, 2**70])
def test_integers_out_of_range(name, value):
    with pytest.raises(ValueError, match=rf"^{name}: expected 0 <= {name} < 2\*\*64, got {value}$"):
        Generator(**{"seed": 0, name: value})


@pytest.mark.parametrize("value", [1.0, "1", None, True, torch.tensor(1)])
def test_what_is_not_an_int(value):
    message = rf"expected an int, got {type(value).__name__}$"
    with pytest.raises(TypeError, match="^seed: " + message):
        Generator(value)
    with pytest.raises(TypeError, match="^offset: " + message):
        Generator(0, value)
    with pytest.raises(TypeError, match="^seed: " + message):
        Generator(0).manual_seed(value)
    with pytest.raises(TypeError, match="^key: " + message):
        Generator(0).fork(value)


def test_manual_seed_restarts():
    g = Generator(1)
    random.normal(100, generator=g)
    assert g.manual_seed(2**64 - 5) is g
    assert (g.seed, g.offset) == (2**64 - 5, 0)


def test_state_is_a_copy_that_restores():
    g = Generator(1, 17)
    state = g.get_state()
    first = random.normal(50, generator=g)
    assert [int(w) for w in state] == [1, 17]
    assert g.set_state(state) is g
    assert_same_bits(random.normal(50, generator=g), first)
    assert [int(w) for w in state] == [1, 17]  # set_state copied too

    other = Generator(99).set_state(state)
    assert_same_bits(random.normal(50, generator=other), first)


@pytest.mark.parametrize(
    ("state", "got"),
    [
        (torch.zeros(2), r"torch.float32 \(2,\)"),
        (torch.zeros(3, dtype=torch.int64), r"torch.int64 \(3,\)"),
        (torch.zeros((), dtype=torch.int64), r"torch.int64 \(\)"),
        ([1, 2], "list"),
        (torch.Generator().get_state(), r"torch.uint8 \(\d+,\)"),
    ],
)
def test_set_state_errors(state, got):
    g = Generator(1, 2)
    with pytest.raises(
        ValueError, match=rf"^state: expected an int64 tensor of shape \(2,\) from get_state\(\), got {got}$"
    ):
        g.set_state(state)
    assert (g.seed, g.offset) == (1, 2)


def test_clone_deepcopy_and_pickle_move_on_their_own():
    g = Generator(2**63 + 1, 5)
    for copied in (g.clone(), copy.deepcopy(g), copy.copy(g).clone(), pickle.loads(pickle.dumps(g))):
        assert (copied.seed, copied.offset) == (2**63 + 1, 5)
        random.normal(3, generator=copied)
        assert (copied.offset, g.offset) == (8, 5)


def test_forks_are_streams_of_their_own():
    g = Generator(3, 1000)
    forks = [g.fork(key) for key in [*range(200), 2**32, 2**64 - 1]]
    seeds = {f.seed for f in forks}
    assert len(seeds) == len(forks)
    assert g.seed not in seeds
    assert g.offset == 1000
    assert all(f.offset == 0 for f in forks)
    assert Generator(3).fork(7).seed == g.fork(7).seed  # a function of (seed, key) alone
    assert Generator(4).fork(7).seed != g.fork(7).seed
    assert Generator(3 + 2**32).fork(7).seed != g.fork(7).seed
    bits = torch.tensor([[f.seed >> b & 1 for b in range(64)] for f in forks], dtype=torch.float64)
    assert ((bits.mean(0) - 0.5).abs() < 0.2).all()  # every bit of the seeds takes part


def test_preserve_state():
    g = Generator(1)
    saved = g.get_state()
    random.normal(5, generator=g)
    with random.preserve_state(g):
        random.normal(7, generator=g)
        assert g.offset == 12
    assert g.offset == 5

    def fail() -> None:
        with random.preserve_state(g, saved):
            assert g.offset == 0
            random.normal(2, generator=g)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert g.offset == 5


def test_a_torch_generator_gives_a_place_in_the_stream():
    a = random.normal(10, generator=torch.Generator().manual_seed(4))
    source = torch.Generator().manual_seed(4)
    assert_same_bits(random.normal(10, generator=source), a)
    assert not torch.equal(random.normal(10, generator=source), a)  # it moved on


def test_without_a_generator_torch_manual_seed_decides():
    def draws() -> list[torch.Tensor]:
        return [random.normal(4), random.uniform(3), random.bits(2), random.bernoulli(9), random.permutation(6)]

    torch.manual_seed(5)
    first, second = draws(), draws()
    torch.manual_seed(5)
    for x, y in zip(first, draws(), strict=True):
        assert_same_bits(x, y)
    assert not torch.equal(first[0], second[0])
    with torch.random.fork_rng():
        draws()
    assert not torch.equal(draws()[0], first[0])


def test_meta_device():
    g = Generator(1)
    z = random.normal(3, 4, device="meta", generator=g)
    assert z.device.type == "meta"
    assert z.shape == (3, 4)
    assert g.offset == 12
    assert random.normal(3, device="meta").device.type == "meta"
    with torch.device("meta"):
        assert random.uniform(2).device.type == "meta"
    assert Generator(1, device="meta").device.type == "meta"


def test_default_dtype_and_size_forms():
    g = Generator(1)
    for size in ((2, 3), ((2, 3),), ([2, 3],), (torch.Size([2, 3]),)):
        assert random.normal(*size, generator=g).shape == (2, 3)
    assert random.normal(generator=g).shape == ()
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        assert random.normal(2).dtype == random.uniform(2).dtype == random.exponential(2).dtype == torch.float64
        assert random.bernoulli(2).dtype == torch.bool
        assert random.bits(2).dtype == torch.int32
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("n", [0, 1, 2, 3, 1000])
def test_permutation(n):
    order = random.permutation(n, generator=Generator(1))
    assert order.dtype == torch.int64
    assert torch.equal(order.sort().values, torch.arange(n))
    assert torch.equal(order, random.permutation(n, generator=Generator(1)))


def test_permutations_are_equally_likely():
    counts: dict[tuple[int, ...], int] = {}
    g = Generator(6)
    for _ in range(6000):
        key = tuple(random.permutation(3, generator=g).tolist())
        counts[key] = counts.get(key, 0) + 1
    assert len(counts) == 6
    assert all(abs(c - 1000) < 5 * (1000 * 5 / 6) ** 0.5 for c in counts.values())


# ---------------------------------------------------------------------------------------------------
# Errors: one line that names the argument, what it got and what it takes; the generator does not move.

BAD = [
    (lambda g: random.normal(-1, generator=g), ValueError, r"size: expected extents of at least 0, got \(-1,\)"),
    (lambda g: random.normal(2, -3, generator=g), ValueError, r"size: expected extents of at least 0, got \(2, -3\)"),
    (lambda g: random.normal(2.5, generator=g), TypeError, r"size: expected ints, got float"),
    (lambda g: random.normal(2, 1.5, generator=g), TypeError, r"size: expected ints, got float"),
    (lambda g: random.normal("ab", generator=g), TypeError, r"size: expected ints, got str"),
    (lambda g: random.normal(None, generator=g), TypeError, r"size: expected ints, got NoneType"),
    (lambda g: random.normal(True, generator=g), TypeError, r"size: expected ints, got bool"),
    (lambda g: random.permutation(-1, generator=g), ValueError, r"n: expected an int of at least 0, got -1"),
    (lambda g: random.permutation((2, 3), generator=g), TypeError, r"n: expected an int, got tuple"),
    (lambda g: random.normal(2, std=-1, generator=g), ValueError, r"std: expected a number of at least 0, got -1"),
    (
        lambda g: random.normal(2, std=float("nan"), generator=g),
        ValueError,
        r"std: expected a number of at least 0, got nan",
    ),
    (
        lambda g: random.exponential(2, rate=0, generator=g),
        ValueError,
        r"rate: expected a finite number above 0, got 0",
    ),
    (lambda g: random.exponential(2, rate=float("inf"), generator=g), ValueError, r"rate: .* got inf"),
    (lambda g: random.uniform(2, low=1, high=1, generator=g), ValueError, r"low, high: .* got 1 and 1"),
    (lambda g: random.uniform(2, low=0, high=float("inf"), generator=g), ValueError, r"low, high: .* got 0 and inf"),
    (
        lambda g: random.uniform(2, low=0, high=1e39, generator=g),
        ValueError,
        r"low, high: .*float32.* got 0 and 1e\+39",
    ),
    (
        lambda g: random.uniform(2, low=-3e38, high=3e38, generator=g),
        ValueError,
        r"low, high: .*float32.* got -3e\+38 and",
    ),
    (lambda g: random.uniform(2, high=1e5, dtype=torch.float16, generator=g), ValueError, r"low, high: .*float16"),
    (lambda g: random.bernoulli(2, p=1.5, generator=g), ValueError, r"p: expected a probability from 0 to 1, got 1.5"),
    (lambda g: random.bernoulli(2, p=float("nan"), generator=g), ValueError, r"p: .* got nan"),
    (lambda g: random.dropout_mask(2, p=-0.1, generator=g), ValueError, r"p: .* got -0.1"),
    (
        lambda g: random.normal(2, dtype=torch.int32, generator=g),
        TypeError,
        r"dtype: expected one of float32, .* got int32",
    ),
    (
        lambda g: random.uniform(2, dtype=torch.bool, generator=g),
        TypeError,
        r"dtype: expected one of float32, .* got bool",
    ),
    (lambda g: random.exponential(2, dtype=torch.complex64, generator=g), TypeError, r"dtype: .* got complex64"),
    (
        lambda g: random.bits(2, dtype=torch.float32, generator=g),
        TypeError,
        r"dtype: expected one of int32, int64, got float32",
    ),
    (
        lambda g: random.bernoulli(2, dtype=torch.int64, generator=g),
        TypeError,
        r"dtype: expected one of bool, .* got int64",
    ),
    (lambda g: random.normal(2, generator=5), TypeError, r"generator: expected a fastgen.random.Generator, .* got int"),
]


@pytest.mark.parametrize(("draw", "error", "message"), BAD)
def test_errors(draw, error, message):
    g = Generator(1, 7)
    with pytest.raises(error) as caught:
        draw(g)
    assert "\n" not in str(caught.value)
    caught.match(f"^{message}")
    assert g.offset == 7


def test_threads_that_share_a_generator_get_different_elements(monkeypatch):
    def slow(state, count):  # between its read and its write every other thread has its turn
        taken = state.clone()
        time.sleep(0.001)
        state[1] = taken[1] + count
        return taken

    def work(index):
        for _ in range(10):
            taken[index].append(int(g.reserve(3)[1]))
            g.skip(2)

    monkeypatch.setattr(torch.ops.fastgen.claim, "default", slow)
    g, taken = Generator(5), [[] for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert g.offset == 4 * 10 * (3 + 2)
    offsets = sorted(itertools.chain(*taken))
    assert len(offsets) == 40
    assert all(after - before >= 3 for before, after in itertools.pairwise(offsets))


def test_a_forked_process_can_draw_though_another_thread_was_drawing():
    program = """
import os, threading, time
from fastgen import random
held = threading.Event()
def hold():
    with random._moving:
        held.set()
        time.sleep(0.3)
threading.Thread(target=hold).start()
held.wait(10)
if (child := os.fork()) == 0:
    os._exit(0 if random.Generator(1).reserve(3)[1] == 0 else 1)
for _ in range(300):
    done, status = os.waitpid(child, os.WNOHANG)
    if done:
        raise SystemExit(os.waitstatus_to_exitcode(status))
    time.sleep(0.1)
os.kill(child, 9)
raise SystemExit("the child hangs")
"""
    ended = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")
