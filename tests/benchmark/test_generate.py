"""The cases of generation count right, let right rivals pass and stop wrong ones."""

from __future__ import annotations

import pytest
import torch

from fastgen.benchmark.case import EAGER, OURS, WrongResult
from fastgen.benchmark.generate import GenerateCase, cases

SMALL = (3, 40, 11, 8)


def test_counts() -> None:
    case = GenerateCase(shape=SMALL)
    assert case.name == "generate/LSTM+2layers/sampled/fp32/3x40x11x8"
    each = 2 * (32 * (8 + 8)) + 11 * 8
    assert case.flops == 2 * 3 * 40 * each
    assert case.weights == (4 * each, 40)
    assert GenerateCase(shape=SMALL, layers=1, temperature=0.0).workload == "generate/LSTM+1layers/greedy"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("layers", [1, 2])
def test_right_rivals_pass(layers: int, temperature: float) -> None:
    case = GenerateCase(shape=SMALL, layers=layers, temperature=temperature)
    torch.manual_seed(0)
    rivals = case.rivals()
    assert list(rivals) == [OURS, EAGER]
    for name, function in rivals.items():
        case.check(name, function, case.inputs())


def test_wrong_rivals_are_stopped() -> None:
    sampled, greedy = (GenerateCase(shape=SMALL, temperature=temperature) for temperature in (1.0, 0.0))
    inputs = sampled.inputs()
    too_likely, too_random = greedy.rivals()[OURS], lambda x: torch.cat((x, torch.randint(11, (3, 40))), 1)
    for function in (too_likely, too_random):
        with pytest.raises(WrongResult, match="surprise off the entropy"):
            sampled.check(OURS, function, inputs)
    with pytest.raises(WrongResult, match="less likely than the likeliest"):
        greedy.check(OURS, sampled.rivals()[OURS], inputs)
    with pytest.raises(WrongResult, match="or not behind the prompt"):
        sampled.check(OURS, lambda x: sampled.rivals()[OURS](x)[:, 1:], inputs)
    with pytest.raises(WrongResult, match="a token outside 0 to 10"):
        sampled.check(OURS, lambda x: torch.cat((x, torch.full((3, 40), 11)), 1), inputs)


def test_cases_shrink() -> None:
    assert len(cases(full=False)) < len(cases(full=True))
    for case in cases(full=True):
        small = case.shrunk()
        assert max(small.shape) <= 16
        assert small.workload == case.workload
