"""`fastgen.functional.reparameterize` against PyTorch."""

import pytest

from fastgen.benchmark import reparameterize


@pytest.mark.parametrize(
    ("case", "rival"), [(case, rival) for case in reparameterize.cases(full=True) for rival in case.rivals()]
)
def test_reparameterize(case, rival, time_rival):
    time_rival(case, rival)
