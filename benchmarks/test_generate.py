"""`fastgen.models.RNN.generate` against a loop in Python over `torch.nn.LSTM`."""

import pytest

from fastgen.benchmark import generate
from fastgen.benchmark.case import EAGER, OURS


@pytest.mark.parametrize("rival", [OURS, EAGER])
@pytest.mark.parametrize("case", generate.cases(full=True))
def test_generate(case, rival, time_rival):
    time_rival(case, rival)
