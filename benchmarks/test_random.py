"""`fastgen.random` against PyTorch."""

import pytest

from fastgen.benchmark import random


@pytest.mark.parametrize(
    ("case", "rival"), [(case, rival) for case in random.cases(full=True) for rival in case.rivals()]
)
def test_random(case, rival, time_rival):
    time_rival(case, rival)
