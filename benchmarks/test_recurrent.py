"""`fastgen.nn.LSTM`, `GRU`, `RNN` and `LSTMCell` against PyTorch's."""

import pytest

from fastgen.benchmark import recurrent
from fastgen.benchmark.case import COMPILED, EAGER, OURS

# Not `case.rivals()`, which would make every module when the tests are collected.
RIVALS = [
    (case, rival)
    for case in recurrent.cases(full=True)
    for rival in (OURS, EAGER, COMPILED)
    if rival != COMPILED or case.module == "LSTMCell"
]


@pytest.mark.parametrize(("case", "rival"), RIVALS)
def test_recurrent(case, rival, time_rival):
    time_rival(case, rival)
