"""Tokens that CUDA kernels draw, and the loop that draws many.

The draw is compared bit for bit with the reference. The loop is compared bit for bit, states included, with the loop in
Python over the ops of a step on the same device, and by its tokens with the loop on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import pytest
import torch
from emulated import EMULATED, Gpu
from generate_cases import INF, NAN, OPTIONS, SCORES, Call, assert_same, model_call, normal, with_scores
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import FLOATS, assert_same_bits

from fastgen import reference
from fastgen.random import Generator
from fastgen.reference.generate import Status
from fastgen.reference.recurrent import Mode

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
some = settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])


def places(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.stack((torch.arange(rows) - seed, torch.arange(rows) * 2**40 + seed), dim=1)


def pick(gpu: Gpu, logits, seen, place, *sampling):
    operands = (None if t is None else gpu.put(t) for t in (logits, seen, place))
    return gpu.ops.pick_tokens(*operands, *sampling).cpu()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(0, 4),
    vocabulary=st.sampled_from([1, 2, 31, 32, 33, 127, 128, 129, 300, 1025]),
    spread=st.sampled_from([0.0, 0.3, 3.0, 40.0]),
    temperature=st.sampled_from([0.0, 0.3, 1.0, 5.0]),
    top_k=st.sampled_from([0, 1, 5, 100, 1000]),
    top_p=st.sampled_from([1.0, 0.9, 0.1, 1e-9, 0.0]),
    min_p=st.sampled_from([0.0, 1e-15, 0.05, 1.0]),
    penalty=st.sampled_from([None, 1.0, 1.3, 0.5]),
    seed=st.integers(0, 99),
)
def test_pick_tokens(gpu, dtype, rows, vocabulary, spread, temperature, top_k, top_p, min_p, penalty, seed):
    """Equal scores and masked ones included."""
    g = Generator(seed)
    logits = normal(g, rows, vocabulary, std=max(spread, 1e-30)).mul(4).round().div(4).to(dtype)
    logits[:, 1::5] = -torch.inf
    seen = None if penalty is None else normal(g, rows, vocabulary) > 0
    sampling = temperature, top_k, top_p, min_p, penalty or 1.0
    expected = reference.pick_tokens(logits, seen, places(rows, seed), *sampling)
    assert torch.equal(pick(gpu, logits, seen, places(rows, seed), *sampling), expected)
    assert torch.equal(pick(gpu, logits.t().contiguous().t(), seen, places(rows, seed), *sampling), expected)


@pytest.mark.parametrize("vocabulary", [4096, 4097, 10_000, 50_257])
@pytest.mark.parametrize(
    "sampling",
    [
        (0.0, 0, 1.0, 0.0, 1.2),
        (1.0, 0, 1.0, 0.0, 1.0),
        (0.7, 50, 1.0, 0.0, 1.0),
        (1.0, 0, 0.9, 0.0, 1.3),
        (1.0, 5000, 0.97, 0.0001, 1.0),
    ],
    ids=str,
)
def test_a_row_of_several_slices(gpu, vocabulary, sampling):
    g = Generator(vocabulary)
    seen = normal(g, 2, vocabulary) > 1
    for logits in (normal(g, 2, vocabulary, std=3.0), normal(g, 2, vocabulary).round(), torch.zeros(2, vocabulary)):
        expected = reference.pick_tokens(logits, seen, places(2), *sampling)
        assert torch.equal(pick(gpu, logits, seen, places(2), *sampling), expected)


@pytest.mark.parametrize("vocabulary", [9, 5000])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nothing_is_picked_where_scores_are_not_finite(gpu, vocabulary, temperature):
    logits = torch.zeros(4, vocabulary)
    logits[0, 3], logits[1, -1], logits[2] = torch.nan, torch.inf, -torch.inf
    picked = pick(gpu, logits, None, places(4), temperature, 0, 1.0, 0.0, 1.0)
    assert picked[:3].tolist() == [-1, -1, -1]
    assert picked[3] >= 0


def test_frequencies(gpu):
    """Tokens come as often as their probability says (chi squared, 99.99 %)."""
    p = torch.tensor([0.5, 0.25, 0.125, 0.0625, 0.0625])
    drawn = pick(gpu, p.log().expand(2000, 5), None, places(2000), 1.0, 0, 1.0, 0.0, 1.0)
    counts = torch.bincount(drawn, minlength=5)
    assert ((counts - 2000 * p) ** 2 / (2000 * p)).sum() < 23.5


# ---------------------------------------------------------------------------------------------------
# rnn_generate


def run(gpu: Gpu, call: Call, function: Callable[..., None] | None = None) -> Call:
    """The call on the device, its results on the CPU."""
    return call.to(gpu.put).run(function or gpu.ops.rnn_generate).to(torch.Tensor.cpu)


def in_python(gpu: Gpu, call: Call) -> Call:
    """By the loop in Python over the ops of a step, on the same device."""
    with mock.patch.object(torch.ops, "fastgen", gpu.ops):
        return run(gpu, call, reference.rnn_generate)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", Mode)
@some
@given(
    n=st.sampled_from([1, 2, 3, 7, 16, 17, 33]),
    layers=st.integers(1, 3),
    hidden=st.sampled_from([1, 7, 16, 19, 40]),
    bias=st.booleans(),
    projected=st.booleans(),
    steps=st.integers(1, 15),
    seed=st.integers(0, 999),
    options=OPTIONS,
)
def test_equals_the_loop_in_python(gpu, mode, dtype, n, layers, hidden, bias, projected, steps, seed, options):
    call = model_call(
        mode, n, layers, hidden, bias=bias, projected=projected, dtype=dtype, steps=steps, seed=seed, **options
    )
    assert_same(run(gpu, call), in_python(gpu, call))


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("mode", Mode)
def test_the_tokens_are_those_of_the_cpu(gpu, mode, temperature):
    """Scores differ by rounding alone, and none of these stands so near to another, or a draw to a border."""
    call = model_call(mode, 9, temperature=temperature, top_k=9, top_p=0.95, repetition_penalty=1.2, stop=(5,))
    ours, theirs = run(gpu, call), call.copy().run(reference.rnn_generate)
    for name in ("tokens", "position", "status"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name))
    torch.testing.assert_close(ours.h, theirs.h, rtol=1e-4, atol=1e-5)


def test_layer_norm_and_zoneout(gpu):
    call = model_call(Mode.LSTM, 5, hidden=16)
    g = Generator(8)
    norm = [normal(g, n, std=0.2) + m for n, m in ((64, 1), (64, 1), (16, 1), (16, 0))]
    weights = [*call.weights[:4], *norm, *call.weights[4:], *norm]
    options = 1e-5, 0.1, 0.05
    call = call.copy(weights=weights)
    ours = run(gpu, call, lambda *a: gpu.ops.rnn_generate(*a, *options))
    with mock.patch.object(torch.ops, "fastgen", gpu.ops):
        theirs = run(gpu, call, lambda *a: reference.rnn_generate(*a, *options))
    assert_same(ours, theirs)
    assert not torch.equal(ours.h, run(gpu, call).h)


@pytest.mark.parametrize("vocabulary", [300, 5000])
def test_a_row_does_not_depend_on_its_batch(gpu, vocabulary):
    call = model_call(Mode.GRU, 21, vocabulary=vocabulary, top_p=0.9, repetition_penalty=1.2, room=6)
    whole = run(gpu, call)
    for rows in ([0], [20], [7, 3], list(range(20, -1, -1))):
        assert_same(run(gpu, call.rows(rows)), whole.rows(rows))


@pytest.mark.parametrize("stop", [(), (1, 4, 20)], ids=str)
def test_rows_that_end_at_different_times(gpu, stop):
    """Far more tokens than the host waits for before it asks: it learns who is still there, and when nobody is."""
    call = model_call(n=35, layers=1, room=70, stop=stop, steps=100, temperature=2.0)
    call.end -= torch.arange(35) * 2
    ours = run(gpu, call)
    assert_same(ours, in_python(gpu, call))
    assert (ours.status != Status.RUNNING).all()


def test_the_loop_ends_when_no_row_runs(emulated):
    """It is told of it some tokens later."""
    call = model_call(n=4, layers=1, room=3, steps=1000)
    call = call.copy(tokens=torch.cat((call.tokens, call.tokens.new_full((4, 1000), -1)), 1))
    before = emulated.launches
    ended = run(EMULATED, call)
    assert (ended.status == Status.FULL).all()
    assert emulated.launches - before < 200
    before = emulated.launches
    assert_same(run(EMULATED, ended), ended)
    assert emulated.launches - before < 50


def test_chunks_equal_the_whole(gpu):
    call = model_call(n=5, top_p=0.9, repetition_penalty=1.1, stop=(2,))
    whole = run(gpu, call)
    for chunk in (1, 2, 5):
        parts = call.copy(steps=chunk)
        for _ in range(50 // chunk):
            parts = run(gpu, parts)
        assert_same(parts.copy(steps=call.steps), whole)


@pytest.mark.parametrize("name", SCORES)
@some
@given(seed=st.integers(0, 9999), options=OPTIONS)
def test_draws_equal_the_reference(gpu, name, seed, options):
    call = with_scores(torch.tensor(SCORES[name]), 5, seed=seed, **options)
    assert_same(run(gpu, call), in_python(gpu, call))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [[0.0, NAN, 1.0], [0.0, INF], [-INF, -INF, -INF], [NAN]])
def test_scores_without_a_maximum(gpu, bad, temperature):
    """The row says so and keeps its tokens, and another row's NaN stays there."""
    call = with_scores(torch.tensor(bad), 2, temperature=temperature)
    after = run(gpu, call)
    assert after.status.tolist() == [Status.NOT_FINITE] * 2
    assert_same_bits(after.tokens, call.tokens)
    mixed = model_call(n=3, temperature=temperature)
    mixed.h[0, 1] = NAN
    after = run(gpu, mixed)
    assert after.status.tolist() == [Status.FULL, Status.NOT_FINITE, Status.FULL]
    assert_same(after.rows([0, 2]), run(gpu, mixed.rows([0, 2])))


def test_rows_that_do_not_run_are_left_alone(gpu):
    call = model_call(n=4)
    call.status[:] = torch.tensor([Status.FULL, Status.RUNNING, Status.STOPPED, Status.NOT_FINITE])
    call.h.normal_()
    after = run(gpu, call)
    assert_same(after.rows([0, 2, 3]), call.rows([0, 2, 3]))
    assert after.status[1] == Status.FULL
    assert_same(run(gpu, after), after)


@pytest.mark.parametrize(
    ("name", "value"),
    [("position", -1), ("position", 12), ("given", 0), ("given", 10), ("end", 14), ("end", 1), ("tokens", 23)],
)
def test_a_row_that_does_not_fit_is_left_alone(gpu, name, value):
    """No error can be raised without waiting for the device: the row says so, and the others go on."""
    call = model_call(n=3)
    getattr(call, name)[1] = value
    after = run(gpu, call)
    assert after.status.tolist() == [Status.FULL, Status.INVALID, Status.FULL]
    assert_same(after.copy(status=call.status).rows([1]), call.rows([1]))
    assert_same(after.rows([0, 2]), run(gpu, call.rows([0, 2])))


def test_a_token_that_does_not_exist_in_the_midst_of_a_prompt(gpu):
    call = model_call(n=3)
    call.tokens[2, 3] = 23
    after = run(gpu, call)
    assert after.status.tolist() == [Status.FULL, Status.FULL, Status.INVALID]
    assert after.position[2] == 3


def test_empty(gpu):
    call = model_call(n=2)
    assert_same(run(gpu, call.rows([])), call.rows([]))
    assert_same(run(gpu, call.copy(steps=0)), call)


def test_double_precision_goes_to_the_reference(emulated):
    call = model_call(n=2, dtype=torch.float64)
    before = emulated.launches
    assert_same(run(EMULATED, call), call.copy().run(reference.rnn_generate))
    assert emulated.launches == before


@pytest.mark.parametrize(
    "changes",
    [
        {"tokens": torch.zeros(3, 13)},
        {"position": torch.zeros(2, dtype=torch.int64)},
        {"h": torch.zeros(2, 3, 18)},
        {"c": None},
        {"weights": []},
        {"output_weight": torch.zeros(22, 19)},
        {"seed_offset": torch.zeros(3, 3, dtype=torch.int64)},
    ],
    ids=lambda c: "-".join(c),
)
def test_what_does_not_fit_raises(gpu, changes):
    with pytest.raises(RuntimeError, match="expected"):
        run(gpu, model_call().copy(**changes))
