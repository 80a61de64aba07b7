"""The cases of GELU and SwiGLU."""

from __future__ import annotations

import pytest

from fastgen.benchmark import activation
from fastgen.benchmark.case import COMPILED, OURS, WrongResult


@pytest.mark.parametrize("direction", ["inference", "training"])
@pytest.mark.parametrize("function", ["gelu", "gelu_tanh", "swiglu"])
def test_check_accepts_rivals_and_refuses_a_wrong_answer(function, direction):
    case = activation.ActivationCase(shape=(5, 24), function=function, direction=direction)
    inputs = case.inputs()
    for name, rival in case.rivals().items():
        if name != COMPILED:
            case.check(name, rival, inputs)
    right = case.rivals()[OURS]
    for wrong in range(len(right(*inputs))):
        with pytest.raises(WrongResult, match=("output", "input", "bias")[wrong]):
            case.check(
                OURS,
                lambda *given, wrong=wrong: tuple(x + 0.01 * (i == wrong) for i, x in enumerate(right(*given))),
                inputs,
            )


def test_traffic_counts_what_has_to_move():
    gelu, swiglu = (activation.ActivationCase(shape=(5, 24), function=f) for f in ("gelu", "swiglu"))
    assert gelu.bytes == 5 * 5 * 24 * 4  # x; x, the gradient -> y; the gradient of x
    assert swiglu.bytes == 8 * 5 * 24 * 4


def test_cases_are_there_once():
    names = [case.name for case in activation.cases(full=True)]
    assert len(names) == len(set(names))
    assert {case.name for case in activation.cases(full=False)} <= set(names)
