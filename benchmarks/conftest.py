"""One rival of one case under pytest-benchmark, its answer checked first."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from fastgen.benchmark import Case
from fastgen.benchmark.case import COMPILED
from fastgen.benchmark.timing import use_threads


@pytest.fixture
def time_rival(benchmark) -> Callable[[Case, str], None]:
    """Checks and times `rival` of `case`, in the group of the case's name.

    With `--benchmark-disable` it runs the check and one call on a small tensor, as a smoke test; what takes
    seconds to compile is skipped then.
    """

    def run(case: Case, rival: str) -> None:
        import torch

        if benchmark.disabled:
            if rival == COMPILED:
                pytest.skip("torch.compile takes seconds a case: not with --benchmark-disable")
            case = case.shrunk()
        benchmark.group = case.name
        with use_threads(case.threads or torch.get_num_threads()):
            inputs = case.inputs()
            function = case.rivals()[rival]
            case.check(rival, function, inputs)
            benchmark(function, *inputs)
        torch.compiler.reset()

    return run


def pytest_make_parametrize_id(val: object) -> str | None:
    return val.name if isinstance(val, Case) else None
