"""A training step of `fastgen.models.RNN` against the same model in plain PyTorch."""

import pytest

from fastgen.benchmark import rnn
from fastgen.benchmark.case import EAGER, OURS


@pytest.mark.parametrize("rival", [OURS, EAGER])
@pytest.mark.parametrize("case", rnn.cases(full=True))
def test_rnn(case, rival, time_rival):
    time_rival(case, rival)
