"""`fastgen.functional.gelu` and `swiglu` against PyTorch's functions."""

import pytest

from fastgen.benchmark import activation
from fastgen.benchmark.case import COMPILED, EAGER, OURS

RIVALS = [(case, rival) for case in activation.cases(full=True) for rival in (OURS, EAGER, COMPILED)]


@pytest.mark.parametrize(("case", "rival"), RIVALS)
def test_activation(case, rival, time_rival):
    time_rival(case, rival)
