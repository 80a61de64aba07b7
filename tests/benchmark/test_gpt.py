"""The cases of a GPT's training step count right, let right rivals pass and stop wrong ones."""

from __future__ import annotations

import pytest
import torch

from fastgen.benchmark.case import COMPILED, EAGER, OURS, WrongResult
from fastgen.benchmark.gpt import GPTCase, PlainGPT, cases

SMALL = GPTCase(shape=(2, 8, 16, 24), layers=2)


def test_counts() -> None:
    assert SMALL.name == "gpt/2layers+6heads/training/fp32/2x8x16x24"
    weights = sum(
        p.numel() for name, p in SMALL._model().named_parameters() if p.dim() == 2 and "positions" not in name
    )
    assert SMALL.weights == (4 * weights, 3)
    # Of two products of (T, 24) and (24, T) in two layers a causal mask leaves T (T + 1) / 2 places.
    attention = 2 * 2 * 24 * (8 * 9 // 2)
    assert SMALL.flops == 3 * 2 * (16 * weights + 2 * attention)


def test_the_plain_model_is_the_same_model() -> None:
    model = SMALL._model()
    plain = PlainGPT(model)
    inputs = SMALL.inputs()
    ours, theirs = model(*inputs).loss, plain(*inputs)
    torch.testing.assert_close(ours, theirs)
    ours.backward()
    theirs.backward()
    for mine, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rival", [OURS, EAGER])  # the third is the second, compiled: a minute
def test_right_rivals_pass(rival: str, dtype: torch.dtype) -> None:
    case = GPTCase(shape=SMALL.shape, layers=2, dtype=dtype)
    rivals = case.rivals()
    assert list(rivals) == [OURS, EAGER, COMPILED]
    for _ in range(2):  # a step leaves the weights as they are
        case.check(rival, rivals[rival], case.inputs())


def test_wrong_rivals_are_stopped() -> None:
    inputs = SMALL.inputs()
    right = SMALL.rivals()[OURS]
    for wrong in (lambda x, y: right(x, y) * 1.001, lambda x, y: right(x, x), lambda x, y: right(x, y) * torch.nan):
        with pytest.raises(WrongResult, match=r"loss .* instead of"):
            SMALL.check(OURS, wrong, inputs)


def test_cases_shrink() -> None:
    assert len(cases(full=False)) < len(cases(full=True))
    for case in cases(full=True):
        small = case.shrunk()
        assert small.elements <= 16
        small.check(EAGER, small.rivals()[EAGER], small.inputs())
