"""The arithmetic and the order of timing, with a clock that the test turns."""

import gc
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastgen.benchmark.timing import Spread, interleave, ratio, use_threads


class Bench:
    """Functions that take the time they say, by a clock of their own."""

    def __init__(self):
        self.now = 0.0
        self.log = []

    def function(self, name, *seconds):
        """A function whose calls take these times, the last one ever after."""
        times = list(seconds)

        def call():
            self.log.append(name)
            self.now += times.pop(0) if len(times) > 1 else times[0]

        return call

    def interleave(self, functions, **options):
        return interleave(functions, clock=lambda: self.now, **options)


def test_each_round_has_every_rival_once_in_an_order_of_its_own():
    bench = Bench()
    functions = {name: bench.function(name, 1.0) for name in "abc"}
    bench.interleave(functions, budget=0, min_rounds=60, max_rounds=60)
    warm_up, rest = bench.log[:9], bench.log[9:]
    assert warm_up == list("aaabbbccc")
    rounds = ["".join(rest[i : i + 3]) for i in range(0, len(rest), 3)]
    assert all(sorted(order) == list("abc") for order in rounds)
    assert len(set(rounds)) == 6
    # Nobody has one rival before it most of the time.
    after = [before + name for before, name in itertools.pairwise(rest)]
    assert max(after.count(pair) for pair in set(after)) < 40


def test_the_budget_ends_the_rounds_and_the_bounds_win_over_it():
    def rounds(**options):
        bench = Bench()
        return len(bench.interleave({"a": bench.function("a", 1.0)}, **options)["a"])

    assert rounds(budget=10, min_rounds=2) == 10
    assert rounds(budget=0, min_rounds=5) == 5
    assert rounds(budget=100, min_rounds=2, max_rounds=7) == 7


def test_short_functions_are_called_several_times_a_sample():
    bench = Bench()
    samples = bench.interleave({"a": bench.function("a", 0.25)}, budget=0, min_rounds=2, max_rounds=2, min_sample=2.0)
    assert len(bench.log) == 3 + 2 * 8
    assert samples["a"] == [0.25, 0.25]  # a call, not a sample


def test_one_slow_warm_up_call_does_not_shorten_the_samples():
    bench = Bench()
    bench.interleave({"a": bench.function("a", 9.0, 9.0, 0.5)}, budget=0, min_rounds=2, max_rounds=2, min_sample=2.0)
    assert len(bench.log) == 3 + 2 * 4


def test_no_garbage_collection_while_timing_and_its_state_comes_back():
    seen = []
    interleave({"a": lambda: seen.append(gc.isenabled())}, budget=0, min_rounds=2, max_rounds=2, min_sample=0)
    assert seen
    assert not any(seen)
    assert gc.isenabled()

    def fail():
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        interleave({"a": fail}, budget=0)
    assert gc.isenabled()


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="min_rounds: expected an int of at least 2, got 1"):
        interleave({"a": lambda: None}, budget=0, min_rounds=1)
    with pytest.raises(ValueError, match="functions: expected at least one"):
        interleave({}, budget=0)
    with pytest.raises(ValueError, match="threads: expected an int of at least 1, got 0"), use_threads(0):
        pass


def test_spread_of_known_samples():
    spread = Spread.of([5.0, 1.0, 4.0, 2.0, 3.0])
    assert spread == Spread(median=3.0, q1=2.0, q3=4.0)
    assert spread.relative == pytest.approx(2 / 3)


def test_ratios_are_taken_round_by_round():
    ours, theirs = [1.0, 10.0, 2.0], [3.0, 30.0, 8.0]
    assert ratio(theirs, ours) == Spread.of([3.0, 3.0, 4.0])
    # A machine that is ten times slower in one round leaves the ratio alone; the ratio of medians it would not.
    assert ratio(theirs, ours).median != 8.0 / 2.0
    with pytest.raises(ValueError, match="shorter"):
        ratio([1.0, 2.0, 3.0], [1.0, 2.0])


@given(
    st.lists(st.floats(0.1, 10), min_size=2, max_size=20),
    st.lists(st.floats(0.01, 100), min_size=20, max_size=20),
    st.floats(0.1, 10),
)
def test_a_common_slowdown_of_a_round_cancels(ours, mood, factor):
    slowed = [a * m for a, m in zip(ours, mood, strict=False)]
    spread = ratio([factor * a for a in slowed], slowed)
    assert (spread.q1, spread.median, spread.q3) == pytest.approx((factor,) * 3)


def test_threads_come_back_even_after_an_error():
    before = torch.get_num_threads()
    with use_threads(before + 1):
        assert torch.get_num_threads() == before + 1
    with pytest.raises(RuntimeError, match="no"), use_threads(before + 1):
        raise RuntimeError("no")
    assert torch.get_num_threads() == before
