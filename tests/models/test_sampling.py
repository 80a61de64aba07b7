"""How a token is drawn, against naive definitions of each filter and against the statistics of the draw."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fastgen.random import Generator, uniform
from fastgen.reference.generate import pick_tokens, probability_units

OFF = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
options = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.3, 1.0, 1.7]),
        "top_k": st.integers(0, 12),
        "top_p": st.sampled_from([0.1, 0.5, 0.9, 1.0]),
        "min_p": st.sampled_from([0.0, 0.05, 0.5, 1.0]),
        "repetition_penalty": st.sampled_from([0.5, 1.0, 1.3]),
    }
)


def pick(logits: Tensor, seen: Tensor | None = None, seed: int = 0, first: int = 0, **changed: float) -> Tensor:
    rows = torch.arange(len(logits))
    return pick_tokens(logits, seen, torch.stack((rows * 0 + seed, rows + first), 1), *{**OFF, **changed}.values())


def probabilities(
    logits: list[float],
    seen: list[bool],
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    repetition_penalty: float,
) -> list[float]:
    """The distribution of one row in plain Python, filter after filter, each on what the one before left."""

    def softmax(scores: list[float]) -> list[float]:
        exps = [math.exp(x - max(scores)) for x in scores]
        return [e / sum(exps) for e in exps]

    scores = [
        (x * repetition_penalty if x < 0 else x / repetition_penalty) if s else x
        for x, s in zip(logits, seen, strict=True)
    ]
    scores = [x / temperature for x in scores]
    if 0 < top_k < len(scores):
        least = sorted(scores, reverse=True)[top_k - 1]
        scores = [x if x >= least else -math.inf for x in scores]
    if top_p < 1:
        p = softmax(scores)
        kept, mass = set(), 0.0
        for i in sorted(range(len(p)), key=lambda i: -p[i]):
            if mass < top_p:
                kept.add(i)
            mass += p[i]
        scores = [x if i in kept else -math.inf for i, x in enumerate(scores)]
    p = softmax(scores)
    scores = [x if q >= min_p * max(p) else -math.inf for x, q in zip(scores, p, strict=True)]
    return softmax(scores)


@given(st.lists(st.floats(-6, 6, width=32), min_size=1, max_size=12, unique=True), st.data(), options)
def test_the_draw_inverts_the_cumulated_probabilities(logits: list[float], data: st.DataObject, chosen: dict) -> None:
    seen = data.draw(st.lists(st.booleans(), min_size=len(logits), max_size=len(logits)))
    p = probabilities(logits, seen, **chosen)
    n = 64
    drawn = pick(torch.tensor([logits] * n), torch.tensor([seen] * n), seed=5, first=100, **chosen)
    u = uniform(n, generator=Generator(5, 100), dtype=torch.float64)
    cumulated = torch.tensor(p, dtype=torch.float64).cumsum(0)
    for token, x in zip(drawn.tolist(), u.tolist(), strict=True):
        # A number within 1e-9 of a boundary may fall on either side of it.
        assert cumulated[token] > x - 1e-9
        assert token == 0 or cumulated[token - 1] <= x + 1e-9
        assert p[token] > 0


@given(st.floats(-45, 0))
def test_probability_units_are_exact_to_the_unit(x: float) -> None:
    got = int(probability_units(torch.tensor([x], dtype=torch.float64)))
    want = math.exp(x) * 2.0**40
    assert abs(got - want) <= 1 + 4e-16 * want


def test_the_ends_of_probability_units() -> None:
    x = torch.tensor([0.0, -0.0, -28.0, -27.7, -math.inf], dtype=torch.float64)
    assert probability_units(x).tolist() == [2**40, 2**40, 0, 1, 0]


def test_frequencies_are_those_of_softmax() -> None:
    logits = torch.tensor([0.5, -1.0, 2.0, 0.0, -4.0])
    n = 200_000
    counts = torch.bincount(pick(logits.expand(n, 5), seed=9), minlength=5)
    p = torch.softmax(logits.double(), 0)
    chi_square = float(((counts - n * p).square() / (n * p)).sum())
    assert chi_square < 18.5  # the 99.9 % point of 4 degrees of freedom


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_greedy_is_the_first_of_the_largest(dtype: torch.dtype) -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 3.0], [-math.inf, -5.0, -4.0, -4.0]], dtype=dtype)
    assert pick(logits, temperature=0.0, top_k=1, top_p=0.1).tolist() == [1, 2]
    seen = torch.tensor([[False, True, False, True], [False, False, True, True]])
    assert pick(logits, seen, temperature=0.0, repetition_penalty=2.0).tolist() == [2, 1]


def test_equal_scores() -> None:
    """Top-k keeps what equals the k-th, top-p the lower ones of equals, and no more than it needs."""
    n = 400
    flat = torch.zeros(n, 8)
    assert set(pick(flat).tolist()) == set(range(8))
    assert set(pick(flat, top_k=2).tolist()) == set(range(8))
    assert set(pick(flat, top_p=0.5).tolist()) == {0, 1, 2, 3}
    assert set(pick(flat, top_p=1e-9).tolist()) == {0}
    assert set(pick(flat, min_p=1.0).tolist()) == set(range(8))


def test_a_row_is_its_own() -> None:
    logits = torch.randn(9, 50, generator=torch.Generator().manual_seed(0))
    chosen = {"temperature": 0.8, "top_k": 30, "top_p": 0.9}
    rows = torch.arange(9)
    together = pick_tokens(logits, None, torch.stack((rows + 40, rows * 3), 1), *{**OFF, **chosen}.values())
    alone = [pick(logits[i : i + 1], seed=40 + i, first=3 * i, **chosen) for i in range(9)]
    assert torch.equal(together, torch.cat(alone))


def test_the_element_wraps_at_64_bits() -> None:
    logits = torch.zeros(1, 1000)
    last = torch.tensor([[7, -1]])  # element 2^64 - 1
    u = float(uniform(1, generator=Generator(7, 2**64 - 1), dtype=torch.float64))
    assert int(pick_tokens(logits, None, last, *OFF.values())) == int(u * 1000)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_scores_that_are_not_finite_give_no_token(bad: float, temperature: float) -> None:
    logits = torch.zeros(3, 4)
    logits[1, 2] = bad
    logits[2] = -math.inf
    first, *failed = pick(logits, temperature=temperature).tolist()
    assert first >= 0
    assert failed == [-1, -1]


def test_a_token_that_is_out_is_never_drawn() -> None:
    logits = torch.zeros(2000, 3)
    logits[:, 0] = -math.inf
    logits[:, 2] = -29.0  # under 2^-40 of the most likely
    assert set(pick(logits).tolist()) == {1}
