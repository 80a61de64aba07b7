"""A training step of `fastgen.models.GAN` against the same networks in plain PyTorch."""

import pytest

from fastgen.benchmark import gan
from fastgen.benchmark.case import COMPILED, EAGER, OURS


@pytest.mark.parametrize("rival", [OURS, EAGER, COMPILED])
@pytest.mark.parametrize("case", gan.cases(full=True))
def test_gan(case, rival, time_rival):
    time_rival(case, rival)
