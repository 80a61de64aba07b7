"""The recurrent cases count right, let right rivals pass and stop wrong ones; their bounds do what they say."""

import dataclasses
import math

import pytest
import torch
from support import FLOATS, needs_inductor

from fastgen import _load
from fastgen.benchmark import Report, measure, select
from fastgen.benchmark.bounds import MULTIPLY_ADDS, READS, bounds_of, probes
from fastgen.benchmark.case import COMPILED, EAGER, OURS, WrongResult
from fastgen.benchmark.recurrent import RecurrentCase, cases

SMALL = (5, 3, 4, 6)
VARIANTS = [
    RecurrentCase(shape=SMALL),
    RecurrentCase(shape=SMALL, direction="inference"),
    RecurrentCase(shape=SMALL, valid=0.7),
    RecurrentCase(shape=SMALL, proj_size=2),
    RecurrentCase(shape=SMALL, layers=2, bidirectional=True, valid=0.7),
    RecurrentCase(shape=SMALL, dtype=torch.float64),
    RecurrentCase(shape=SMALL, dtype=torch.bfloat16),
    RecurrentCase(module="GRU", shape=SMALL),
    RecurrentCase(module="RNN", shape=SMALL),
    RecurrentCase(module="LSTMCell", shape=(3, 4, 6)),
    RecurrentCase(module="LSTMCell", shape=(3, 4, 6), direction="inference"),
]


def timed(case):
    """The rivals that are ready at once."""
    return {name: function for name, function in case.rivals().items() if name != COMPILED}


@pytest.mark.parametrize(
    ("case", "name", "multiply_adds", "weights"),
    [
        (
            RecurrentCase(shape=SMALL, direction="inference"),
            "recurrent/LSTM/inference/fp32/5x3x4x6",
            15 * 24 * (4 + 6),
            (24 * 6 * 4, 5),
        ),
        (
            RecurrentCase(shape=SMALL, proj_size=2, dtype=torch.float64),
            "recurrent/LSTM+proj2/training/fp64/5x3x4x6",
            3 * 15 * (24 * (4 + 2) + 6 * 2),
            ((24 * 2 + 6 * 2) * 8, 10),
        ),
        (
            RecurrentCase(module="GRU", shape=SMALL, layers=2, bidirectional=True, threads=1),
            "recurrent/GRU+2layers+bidirectional/training/fp32/5x3x4x6/1-thread",
            3 * 15 * 2 * 18 * ((4 + 6) + (12 + 6)),
            (18 * 6 * 4, 5 * 4 * 2),
        ),
        (
            RecurrentCase(module="LSTMCell", shape=(3, 4, 6), direction="inference"),
            "recurrent/LSTMCell/inference/fp32/3x4x6",
            3 * 24 * (4 + 6),
            (24 * 10 * 4, 1),
        ),
    ],
)
def test_names_and_counts(case, name, multiply_adds, weights):
    assert (case.name, case.flops, case.weights) == (name, 2 * multiply_adds, weights)


def test_bytes_are_those_of_parameters_input_and_output():
    case = RecurrentCase(shape=SMALL, proj_size=2)
    module = torch.nn.LSTM(4, 6, proj_size=2)
    held = sum(p.numel() for p in module.parameters())
    assert case.bytes == 4 * (held + 15 * (4 + 2))


def test_lengths_hold_the_share_that_is_valid():
    case = RecurrentCase(shape=(64, 32, 128, 256), valid=0.68)
    lengths = case.lengths
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] == 64
    assert lengths[-1] == round(0.36 * 64)
    assert case.elements / (64 * 32) == pytest.approx(0.68, abs=0.005)
    assert RecurrentCase(shape=(64, 32, 128, 256)).elements == 64 * 32


def test_the_issue_table_is_covered_in_both_directions():
    full = cases(full=True)
    assert len({case.name for case in full}) == len(full)
    for case in full:
        other = "training" if case.direction == "inference" else "inference"
        assert dataclasses.replace(case, direction=other) in full
    assert len(cases(full=False)) == 4
    assert set(cases(full=False)) <= set(full)


def test_the_filter_does_not_mind_capitals():
    assert {case.name for case in select(full=True, filter="lstmcell")} == {
        "recurrent/LSTMCell/inference/fp32/1x256x256",
        "recurrent/LSTMCell/training/fp32/1x256x256",
    }


@pytest.mark.parametrize("case", VARIANTS, ids=lambda case: case.name)
def test_rivals_pass_their_check(case):
    inputs = case.inputs()
    for rival, function in timed(case).items():
        case.check(rival, function, inputs)


@pytest.mark.parametrize("case", [VARIANTS[0], VARIANTS[4], VARIANTS[9]], ids=lambda case: case.name)
def test_checks_find_every_wrong_result(case):
    inputs = case.inputs()
    ours = case.rivals()[OURS]
    names = list(case._named(ours(*inputs)))
    assert names[:2] == ["output", "grad_input"]
    assert len(names) > 5
    for place, name in enumerate(names):

        def wrong(*args, place=place):
            results = list(ours(*args))
            results[place] = results[place] + 1e-3 * results[place].abs().max()
            return tuple(results)

        for rival in (OURS, EAGER):
            with pytest.raises(WrongResult, match=rf"{rival}, {name}: off by "):
                case.check(rival, wrong, inputs)

    def cut(*args):
        output, *rest = ours(*args)
        return output[:-1], *rest

    with pytest.raises(WrongResult, match=r"output: torch\.float32"):
        case.check(OURS, cut, inputs)
    with pytest.raises(WrongResult, match="off by nan"):
        case.check(OURS, lambda *args: tuple(t * math.nan for t in ours(*args)), inputs)


def test_rivals_have_the_same_weights_and_leave_the_generator_alone():
    torch.manual_seed(3)
    expected = torch.randn(4)
    torch.manual_seed(3)
    case = RecurrentCase(shape=SMALL)
    modules = [case._module(package) for package in (torch.nn, __import__("fastgen.nn").nn)]
    assert all(torch.equal(a, b) for a, b in zip(*(m.parameters() for m in modules), strict=True))
    assert torch.equal(torch.randn(4), expected)


@pytest.mark.slow
@needs_inductor
def test_torch_compile_takes_part_in_the_cell():
    case = RecurrentCase(module="LSTMCell", shape=(2, 4, 6))
    result = measure(case, threads=1, budget=0)
    assert result.failures == {}
    assert COMPILED in result.speedups


# ---------------------------------------------------------------------------------------------------
# Bounds


def test_probes_read_all_that_they_are_asked_to(isa):
    with _load.use_cpu_isa(isa):
        read = probes(torch.float32, 100, (4 * 1024, 7))[READS]
        assert read() == 7 * 1024 + 1  # ones, and one more for the reference to them
        for dtype in FLOATS:
            assert math.isfinite(probes(dtype, 10_000, (64, 1))[MULTIPLY_ADDS]())


def test_without_the_library_there_is_no_bound(monkeypatch):
    monkeypatch.setattr("fastgen.benchmark.bounds.cpu_library", lambda: None)
    assert bounds_of(RecurrentCase(shape=SMALL), 1) == {}


@pytest.mark.skipif(_load.cpu_library() is None, reason="the CPU kernels are not built")
def test_measure_and_the_table(capsys):
    from rich.console import Console

    case = RecurrentCase(shape=SMALL)
    result = measure(case, threads=1, budget=0, min_rounds=3)
    assert set(result.seconds) == {OURS, EAGER, MULTIPLY_ADDS, READS}
    assert result.flops == case.flops
    report = Report(results=[result], threads=1, bandwidth={"bound": 1e9, "bound (new memory)": 1e9})
    Console(width=250).print(*report.tables())
    printed = capsys.readouterr().out
    assert "GFLOP/s" in printed
    longer = max((MULTIPLY_ADDS, READS), key=lambda name: result.seconds[name].median)
    assert f"({longer})" in printed
    assert f"{result.speedups[longer].median:.0%}" in printed
