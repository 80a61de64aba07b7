"""`fastgen.functional.scaled_dot_product_attention` against PyTorch's."""

import pytest

from fastgen.benchmark import attention
from fastgen.benchmark.case import EAGER, OURS

RIVALS = [(case, rival) for case in attention.cases(full=True) for rival in (OURS, EAGER)]


@pytest.mark.parametrize(("case", "rival"), RIVALS)
def test_attention(case, rival, time_rival):
    time_rival(case, rival)
