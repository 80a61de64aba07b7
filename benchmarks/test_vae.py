"""A training step of `fastgen.models.VAE` against the same model in plain PyTorch."""

import pytest

from fastgen.benchmark import vae
from fastgen.benchmark.case import COMPILED, EAGER, OURS


@pytest.mark.parametrize("rival", [OURS, EAGER, COMPILED])
@pytest.mark.parametrize("case", vae.cases(full=True))
def test_vae(case, rival, time_rival):
    time_rival(case, rival)
