"""A training step of `fastgen.models.GPT` against the same model in plain PyTorch."""

import pytest

from fastgen.benchmark import gpt
from fastgen.benchmark.case import COMPILED, EAGER, OURS


@pytest.mark.parametrize("rival", [OURS, EAGER, COMPILED])
@pytest.mark.parametrize("case", gpt.cases(full=True))
def test_gpt(case, rival, time_rival):
    time_rival(case, rival)
