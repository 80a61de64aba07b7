"""The cases of the linear layer."""

from __future__ import annotations

import pytest

from fastgen.benchmark import linear
from fastgen.benchmark.case import OURS, WrongResult


def test_flops_count_three_products_in_training():
    case = linear.LinearCase(shape=(3, 5, 7))
    assert case.name.startswith("linear/training")
    assert case.flops == 3 * 2 * 3 * 5 * 7
    assert linear.LinearCase(shape=(3, 5, 7), direction="inference").flops == 2 * 3 * 5 * 7


@pytest.mark.parametrize("direction", ["inference", "training"])
def test_check_accepts_all_rivals_and_refuses_a_wrong_answer(direction):
    case = linear.LinearCase(shape=(200, 96, 160), direction=direction)
    inputs = case.inputs()
    for name, rival in case.rivals().items():
        case.check(name, rival, inputs)
    right = case.rivals()[OURS]
    with pytest.raises(WrongResult, match="output"):
        case.check(OURS, lambda *given: tuple(x + 0.01 for x in right(*given)), inputs)


def test_cases_are_there_once():
    names = [case.name for case in linear.cases(full=True)]
    assert len(names) == len(set(names))
    assert {case.name for case in linear.cases(full=False)} <= set(names)
