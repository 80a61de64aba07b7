"""The kernels of generation against the loop and the draw in plain PyTorch: every token and every bit of the states."""

from __future__ import annotations

import pytest
import torch
from generate_cases import INF, NAN, OPTIONS, SCORES, assert_same, model_call, normal, with_scores
from hypothesis import given, settings
from hypothesis import strategies as st
from support import FLOATS, ISAS, assert_same_bits

from fastgen import reference
from fastgen._load import use_cpu_isa
from fastgen.random import Generator
from fastgen.reference.generate import Status
from fastgen.reference.recurrent import Mode

ops = torch.ops.fastgen
pytestmark = pytest.mark.skipif(not ISAS, reason="the CPU kernels are not built")
ATOL = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 2e-2, torch.float16: 2e-3}


# ---------------------------------------------------------------------------------------------------
# pick_tokens


@pytest.mark.parametrize("dtype", FLOATS)
@given(
    rows=st.integers(0, 6),
    vocabulary=st.sampled_from([1, 2, 15, 16, 17, 83, 300]),
    spread=st.sampled_from([0.0, 0.3, 3.0, 40.0]),
    temperature=st.sampled_from([0.0, 0.3, 1.0, 5.0]),
    top_k=st.sampled_from([0, 1, 5, 1000]),
    top_p=st.sampled_from([1.0, 0.9, 0.1, 0.0]),
    min_p=st.sampled_from([0.0, 0.05, 1.0]),
    penalty=st.sampled_from([None, 1.0, 1.3, 0.5]),
    seed=st.integers(0, 99),
)
def test_pick_tokens(dtype, rows, vocabulary, spread, temperature, top_k, top_p, min_p, penalty, seed):
    """Every instruction set picks the token of the formula in Python, equal scores and masked ones included."""
    g = Generator(seed)
    logits = normal(g, rows, vocabulary, std=max(spread, 1e-30)).mul(4).round().div(4).to(dtype)
    logits[:, 1::5] = -torch.inf
    seen = None if penalty is None else normal(g, rows, vocabulary) > 0
    place = torch.stack((torch.arange(rows) - seed, torch.arange(rows) * 2**40), dim=1)
    sampling = temperature, top_k, top_p, min_p, penalty or 1.0
    expected = reference.pick_tokens(logits, seen, place, *sampling)
    for isa in ISAS:
        with use_cpu_isa(isa):
            assert torch.equal(ops.pick_tokens(logits, seen, place, *sampling), expected)
            assert torch.equal(ops.pick_tokens(logits.t().contiguous().t(), seen, place, *sampling), expected)


def test_many_rows_are_picked_in_groups(isa):
    """As rows by themselves; their scratch does not grow with their number."""
    rows, vocabulary = 70, 1 << 17
    logits = normal(Generator(0), rows, vocabulary)
    seen = normal(Generator(1), rows, vocabulary) > 0
    place = torch.stack((torch.arange(rows), 3 * torch.arange(rows)), dim=1)
    sampling = 0.8, 50, 0.9, 0.0, 1.2
    with use_cpu_isa(isa):
        whole = ops.pick_tokens(logits, seen, place, *sampling)
        for r in (0, 31, 32, 33, 69):
            assert ops.pick_tokens(logits[r : r + 1], seen[r : r + 1], place[r : r + 1], *sampling) == whole[r]


def test_nothing_is_picked_where_scores_are_not_finite(isa):
    logits = torch.zeros(4, 9)
    logits[0, 3], logits[1, 8], logits[2] = torch.nan, torch.inf, -torch.inf
    with use_cpu_isa(isa):
        for temperature in (0.0, 1.0):
            picked = ops.pick_tokens(logits, None, torch.zeros(4, 2, dtype=torch.int64), temperature, 0, 1.0, 0.0, 1.0)
            assert picked[:3].tolist() == [-1, -1, -1]
            assert picked[3] >= 0


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("logits", {"logits": torch.zeros(5)}),
        ("logits", {"logits": torch.zeros(2, 0)}),
        ("dtype", {"logits": torch.zeros(2, 5, dtype=torch.int64)}),
        ("seen", {"seen": torch.zeros(2, 4, dtype=torch.bool)}),
        ("seen", {"seen": torch.zeros(2, 5)}),
        ("seed_offset", {"seed_offset": torch.zeros(3, 2, dtype=torch.int64)}),
        ("seed_offset", {"seed_offset": torch.zeros(2, 2)}),
    ],
)
def test_a_draw_that_does_not_fit_raises(name, change):
    operands = {"logits": torch.zeros(2, 5), "seen": None, "seed_offset": torch.zeros(2, 2, dtype=torch.int64)}
    with pytest.raises(RuntimeError, match=name):
        ops.pick_tokens(*(operands | change).values(), 1.0, 0, 1.0, 0.0, 1.0)


def test_pick_tokens_is_a_proper_op():
    place = torch.zeros(3, 2, dtype=torch.int64)
    torch.library.opcheck(ops.pick_tokens.default, (torch.randn(3, 7), None, place, 1.0, 3, 0.9, 0.0, 1.0))


# ---------------------------------------------------------------------------------------------------
# rnn_generate


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("mode", Mode)
@settings(max_examples=25)
@given(
    n=st.integers(1, 33),
    layers=st.integers(1, 3),
    hidden=st.integers(1, 40),
    bias=st.booleans(),
    projected=st.booleans(),
    steps=st.integers(1, 15),
    seed=st.integers(0, 999),
    options=OPTIONS,
)
def test_equals_the_loop_in_python(mode, dtype, n, layers, hidden, bias, projected, steps, seed, options):
    start = model_call(
        mode, n, layers, hidden, bias=bias, projected=projected, dtype=dtype, steps=steps, seed=seed, **options
    )
    with use_cpu_isa(ISAS[seed % len(ISAS)]):
        assert_same(start.copy().run(), start.copy().run(reference.rnn_generate))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("mode", Mode)
def test_a_row_does_not_depend_on_its_batch(isa, mode, temperature):
    start = model_call(mode, 33, temperature=temperature, repetition_penalty=1.2, stop=(5,))
    with use_cpu_isa(isa):
        whole = start.copy().run()
        for rows in ([0], [32], [7, 3], list(range(5, 22)), list(range(32, -1, -1))):
            assert_same(start.rows(rows).run(), whole.rows(rows))
    assert set(whole.status.tolist()) <= {Status.STOPPED, Status.FULL}
    assert (whole.position + 1 > whole.given).all()


def test_chunks_equal_the_whole(isa):
    start = model_call(n=5, top_p=0.9, repetition_penalty=1.1, stop=(2,))
    with use_cpu_isa(isa):
        whole = start.copy().run()
        for chunk in (1, 2, 5):
            parts = start.copy(steps=chunk)
            for _ in range(50 // chunk):
                parts.run()
            assert_same(parts, whole)


def test_a_continuation_equals_the_whole(isa):
    """Where a text is cut into prompt and continuation does not show."""
    start = model_call(n=4, room=8)
    with use_cpu_isa(isa):
        whole = start.copy().run()
        again = start.copy(tokens=whole.tokens, given=whole.given + 3).run()
    assert_same(again, whole)


@pytest.mark.parametrize("mode", Mode)
def test_threads(isa, mode, threads):
    """Products, and a vocabulary, that are worth several threads."""
    start = model_call(mode, 6, 2, 150, 70, 3000, top_p=0.9, room=4)
    with use_cpu_isa(isa):
        threads(1)
        want = start.copy().run()
        for count in (2, 3):
            threads(count)
            assert_same(start.copy().run(), want)


@pytest.mark.parametrize("name", SCORES)
@settings(max_examples=40)
@given(seed=st.integers(0, 9999), options=OPTIONS)
def test_draws_equal_the_reference(name, seed, options):
    call = with_scores(torch.tensor(SCORES[name], dtype=torch.float64), 9, seed=seed, **options)
    with use_cpu_isa(ISAS[seed % len(ISAS)]):
        assert_same(call.copy().run(), call.copy().run(reference.rnn_generate))


def test_a_large_vocabulary(isa):
    g = Generator(2)
    for options in ({}, {"top_k": 50}, {"top_p": 0.7}, {"top_k": 1000, "top_p": 0.95, "min_p": 0.01}):
        call = with_scores(normal(g, 50_257, std=3.0, dtype=torch.float64), 4, **options)
        with use_cpu_isa(isa):
            assert_same(call.copy().run(), call.copy().run(reference.rnn_generate))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [[0.0, NAN, 1.0], [0.0, INF], [-INF, -INF, -INF], [NAN]])
def test_scores_without_a_maximum(isa, bad, temperature):
    """The row says so and keeps its tokens."""
    call = with_scores(torch.tensor(bad), 2, temperature=temperature)
    with use_cpu_isa(isa):
        after = call.copy().run()
    assert after.status.tolist() == [Status.NOT_FINITE] * 2
    assert_same_bits(after.tokens, call.tokens)
    # Another row's NaN stays there.
    mixed = model_call(n=3, temperature=temperature)
    mixed.h[0, 1] = NAN
    with use_cpu_isa(isa):
        after, alone = mixed.copy().run(), mixed.rows([0, 2]).run()
    assert after.status.tolist() == [Status.FULL, Status.NOT_FINITE, Status.FULL]
    assert_same(after.rows([0, 2]), alone)


def test_rows_that_do_not_run_are_left_alone(isa):
    call = model_call(n=4)
    call.status[:] = torch.tensor([Status.FULL, Status.RUNNING, Status.STOPPED, Status.NOT_FINITE])
    call.h.normal_()
    with use_cpu_isa(isa):
        after = call.copy().run()
    assert_same(after.rows([0, 2, 3]), call.rows([0, 2, 3]))
    assert after.status[1] == Status.FULL
    with use_cpu_isa(isa):
        assert_same(after.copy().run(), after)


def test_frequencies(isa):
    """Tokens come as often as their probability says (chi squared, 99.99 %)."""
    p = torch.tensor([0.5, 0.25, 0.125, 0.0625, 0.0625])
    call = with_scores(p.log(), 4000)
    with use_cpu_isa(isa):
        drawn = call.run().tokens.gather(1, call.given[:, None]).flatten()
    counts = torch.bincount(drawn, minlength=5)
    assert ((counts - 4000 * p) ** 2 / (4000 * p)).sum() < 23.5


@pytest.mark.parametrize(
    "changes",
    [
        {"mode": 4},
        {"tokens": torch.zeros(3, 13)},
        {"tokens": torch.full((3, 13), 23)},
        {"tokens": torch.full((3, 13), -1)},
        {"tokens": torch.zeros(13, 3, dtype=torch.int64).t()},
        {"position": torch.zeros(2, dtype=torch.int64)},
        {"position": torch.full((3,), -1)},
        {"position": torch.full((3,), 12)},
        {"given": torch.zeros(3, dtype=torch.int64)},
        {"given": torch.full((3,), 14)},
        {"tokens": torch.zeros(3, 13, dtype=torch.int64), "given": torch.full((3,), 13), "end": torch.full((3,), 13)},
        {"end": torch.full((3,), 14)},
        {"end": torch.ones(3, dtype=torch.int64)},
        {"status": torch.zeros(3, dtype=torch.int32)},
        {"h": torch.zeros(2, 3, 18)},
        {"h": torch.zeros(2, 2, 19)},
        {"h": torch.zeros(0, 3, 19)},
        {"h": torch.zeros(2, 3, 19, dtype=torch.float64)},
        {"c": None},
        {"c": torch.zeros(1, 3, 19)},
        {"seen": torch.zeros(3, 22, dtype=torch.bool)},
        {"embedding": torch.zeros(22, 7)},
        {"embedding": torch.zeros(23, 8)},
        {"embedding": torch.zeros(23)},
        {"weights": []},
        {"weights": [torch.zeros(76, 7), torch.zeros(76, 19)]},
        {"weights": [torch.zeros(76, 7), torch.zeros(76, 19)] * 2},
        {"weights": [torch.zeros(75, 7), torch.zeros(76, 19), torch.zeros(76, 19), torch.zeros(76, 19)]},
        {"projection": torch.zeros(5, 18)},
        {"projection": torch.zeros(5, 19)},
        {"output_weight": torch.zeros(22, 19)},
        {"output_weight": torch.zeros(23, 18)},
        {"output_bias": torch.zeros(22)},
        {"seed_offset": torch.zeros(3, 3, dtype=torch.int64)},
        {"stop": torch.zeros(1)},
    ],
    ids=lambda c: "-".join(c),
)
def test_what_does_not_fit_raises(isa, changes):
    call = model_call().copy(**changes)
    with use_cpu_isa(isa), pytest.raises(RuntimeError, match="expected"):
        call.run()
