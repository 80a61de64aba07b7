"""`fastgen.functional.linear` against PyTorch's."""

import pytest

from fastgen.benchmark import linear
from fastgen.benchmark.case import EAGER, OURS

RIVALS = [(case, rival) for case in linear.cases(full=True) for rival in (OURS, EAGER)]


@pytest.mark.parametrize(("case", "rival"), RIVALS)
def test_linear(case, rival, time_rival):
    time_rival(case, rival)
