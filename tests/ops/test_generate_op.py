"""The kernels of generation against the loop and the draw in plain PyTorch: every token and every bit of the states."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import FLOATS, ISAS, assert_same_bits
from torch import Tensor

from fastgen import random, reference
from fastgen._load import use_cpu_isa
from fastgen.random import Generator
from fastgen.reference.generate import Status
from fastgen.reference.recurrent import Mode

ops = torch.ops.fastgen
pytestmark = pytest.mark.skipif(not ISAS, reason="the CPU kernels are not built")
ATOL = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 2e-2, torch.float16: 2e-3}
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


def normal(g: Generator, *shape: int, std: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    return random.normal(*shape, std=std, generator=g).to(dtype)


# ---------------------------------------------------------------------------------------------------
# linear_rows


@pytest.mark.parametrize("dtype", FLOATS)
@given(rows=st.integers(1, 20), inputs=st.integers(0, 70), outputs=st.integers(1, 40), bias=st.booleans())
def test_linear_rows(dtype, rows, inputs, outputs, bias):
    g = Generator(rows * 71 + inputs)
    x, w = normal(g, rows, inputs, dtype=dtype), normal(g, outputs, inputs, std=0.2, dtype=dtype)
    b = normal(g, outputs, dtype=dtype) if bias else None
    exact = torch.nn.functional.linear(x.double(), w.double(), None if b is None else b.double())
    theirs = (torch.nn.functional.linear(x, w, b).double() - exact).abs().max().item()
    for isa in ISAS:
        with use_cpu_isa(isa):
            y = ops.linear_rows(x, w, b)
        assert (y.shape, y.dtype) == (exact.shape, dtype)
        assert (y.double() - exact).abs().max().item() <= 2 * theirs + ATOL[dtype]


@pytest.mark.parametrize("dtype", FLOATS)
def test_rows_of_a_product_do_not_depend_on_each_other(isa, dtype, threads):
    g = Generator(0)
    x, w, b = normal(g, 33, 301, dtype=dtype), normal(g, 77, 301, dtype=dtype), normal(g, 77, dtype=dtype)
    with use_cpu_isa(isa):
        whole = ops.linear_rows(x, w, b)
        for n in range(1, 34):
            assert_same_bits(ops.linear_rows(x[33 - n :], w, b), whole[33 - n :])
        for count in (1, 2, 3):
            threads(count)
            assert_same_bits(ops.linear_rows(x, w, b), whole)
        twisted = [t.t().contiguous().t() for t in (x, w)]
        assert_same_bits(ops.linear_rows(*twisted, torch.stack([b, b], 1)[:, 1]), whole)
        assert ops.linear_rows(x[:0], w, b).shape == (0, 77)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x, w, b: (x[0], w, b),
        lambda x, w, b: (x, w[0], b),
        lambda x, w, b: (x, w[:, :3], b),
        lambda x, w, b: (x, w.double(), b),
        lambda x, w, b: (x, w, b[:3]),
        lambda x, w, b: (x, w, b[None]),
        lambda x, w, b: (x, w, b.double()),
        lambda x, w, b: (x.int(), w.int(), b.int()),
    ],
)
def test_a_product_that_does_not_fit_raises(isa, wrong):
    with use_cpu_isa(isa), pytest.raises(RuntimeError, match="expected"):
        ops.linear_rows(*wrong(torch.zeros(2, 4), torch.zeros(5, 4), torch.zeros(5)))


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


@dataclasses.dataclass
class Call:
    """The arguments of `rnn_generate`, by name."""

    mode: Mode
    tokens: Tensor
    position: Tensor
    given: Tensor
    end: Tensor
    status: Tensor
    h: Tensor
    c: Tensor | None
    seen: Tensor | None
    embedding: Tensor
    weights: list[Tensor]
    projection: Tensor | None
    output_weight: Tensor
    output_bias: Tensor | None
    seed_offset: Tensor
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    stop: Tensor
    steps: int

    def arguments(self) -> list:
        return [getattr(self, f.name) for f in dataclasses.fields(self)]

    def copy(self, **changes) -> Call:
        values = dict(zip((f.name for f in dataclasses.fields(self)), self.arguments(), strict=True)) | changes
        return Call(**{k: v.clone() if isinstance(v, Tensor) else v for k, v in values.items()})

    def rows(self, which: Sequence[int]) -> Call:
        """The same for some rows alone."""
        by_row = ("tokens", "position", "given", "end", "status", "seen", "seed_offset")
        picked = {k: None if (v := getattr(self, k)) is None else v[which] for k in by_row}
        return self.copy(h=self.h[:, which], c=None if self.c is None else self.c[:, which], **picked)

    def run(self, function=None) -> Call:
        (function or ops.rnn_generate)(*self.arguments())
        return self

    def state(self) -> dict[str, Tensor | None]:
        return {k: getattr(self, k) for k in ("tokens", "position", "status", "h", "c", "seen")}


def assert_same(a: Call, b: Call) -> None:
    for name, value in a.state().items():
        other = b.state()[name]
        if value is None:
            assert other is None
        else:
            assert_same_bits(value, other)


def model_call(
    mode: Mode = Mode.LSTM,
    n: int = 3,
    layers: int = 2,
    hidden: int = 19,
    embedding: int = 7,
    vocabulary: int = 23,
    *,
    bias: bool = True,
    projected: bool = False,
    dtype: torch.dtype = torch.float32,
    room: int = 8,
    steps: int = 50,
    seed: int = 0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    stop: Sequence[int] = (),
) -> Call:
    """A random model whose logits spread, and prompts of different lengths."""
    g = Generator(seed)
    given_ = torch.tensor([1 + 2 * r % 5 for r in range(n)])
    tokens = torch.full((n, 5 + room), -1)
    for r, length in enumerate(given_.tolist()):
        tokens[r, :length] = random.bits(length, generator=g, dtype=torch.int32).long() % vocabulary
    width = 5 if projected else hidden
    weights = []
    for layer in range(layers):
        inputs = hidden if layer else embedding
        weights += [normal(g, mode.gates * hidden, k, std=2 * k**-0.5, dtype=dtype) for k in (inputs, hidden)]
        weights += [normal(g, mode.gates * hidden, dtype=dtype) for _ in range(2 * bias)]
    seen = torch.zeros(n, vocabulary, dtype=torch.bool)
    for r in range(n):
        seen[r, tokens[r, : given_[r]]] = True
    return Call(
        mode,
        tokens,
        torch.zeros(n, dtype=torch.int64),
        given_,
        given_ + torch.tensor([max(room - r % 3, 1) for r in range(n)]),
        torch.zeros(n, dtype=torch.int64),
        torch.zeros(layers, n, hidden, dtype=dtype),
        torch.zeros(layers, n, hidden, dtype=dtype) if mode == Mode.LSTM else None,
        seen if repetition_penalty != 1 else None,
        normal(g, vocabulary, embedding, dtype=dtype),
        weights,
        normal(g, width, hidden, dtype=dtype) if projected else None,
        normal(g, vocabulary, width, std=3 * width**-0.5, dtype=dtype),
        normal(g, vocabulary, dtype=dtype) if bias else None,
        torch.tensor([[seed + r, (1 << 62) + 3 * r] for r in range(n)]),
        temperature,
        top_k,
        top_p,
        min_p,
        repetition_penalty,
        torch.tensor(list(stop), dtype=torch.int64),
        steps,
    )


OPTIONS = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.3, 1.0, 2.5]),
        "top_k": st.sampled_from([0, 1, 3, 22, 100]),
        "top_p": st.sampled_from([1.0, 0.9, 0.3, 1e-9]),
        "min_p": st.sampled_from([0.0, 0.05, 1.0]),
        "repetition_penalty": st.sampled_from([1.0, 1.3, 0.5]),
        "stop": st.sampled_from([(), (3,), (1, 4, 20)]),
    }
)


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


def with_scores(logits: Tensor, n: int = 1, **options) -> Call:
    """A model that has these scores whatever it reads."""
    call = model_call(Mode.RNN_RELU, n, 1, 1, 1, len(logits), dtype=logits.dtype, room=1, **options)
    for weight in call.weights:
        weight.zero_()
    return call.copy(output_bias=logits, output_weight=torch.zeros(len(logits), 1, dtype=logits.dtype))


INF, NAN = float("inf"), float("nan")
SCORES = {
    "one": [0.5],
    "equal": [1.0] * 40,
    "two groups": [2.0] * 5 + [1.0] * 30 + [2.0] * 5,
    "never": [-INF, 0.0, -INF, 1.0, -INF, -INF, 0.5],
    "wide": [float(x) for x in range(-60, 61, 3)],
    "tiny": [0.0, -27.7, -27.8, -28.0, -28.1, -5e-324, -0.0],
    "large": [1e38, 1e38, -1e38, 3e38],
}


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
