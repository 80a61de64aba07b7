"""Checks let right rivals pass and stop wrong ones; the cases say what they measure."""

import contextlib
import dataclasses
import types

import pytest
import torch
from support import needs_inductor

from fastgen import functional
from fastgen import random as fastgen_random
from fastgen.benchmark import Case, machine, measure, select
from fastgen.benchmark import result as result_module
from fastgen.benchmark.attention import AttentionCase
from fastgen.benchmark.bounds import IN_PLACE, MULTIPLY_ADDS, NEW_MEMORY, READS, bandwidth, passes, share
from fastgen.benchmark.case import COMPILED, EAGER, OURS, Traffic, WrongResult, require_close, require_moments
from fastgen.benchmark.random import DISTRIBUTIONS, RandomCase
from fastgen.benchmark.reparameterize import ReparameterizeCase, eager_reparameterize, eager_reparameterize_kl

DIRECTIONS = ("inference", "fwd", "fwd+bwd")
SMALL = ReparameterizeCase(shape=(256, 64), kl=True, direction="fwd+bwd")


def without_compile(case):
    return {name: function for name, function in case.rivals().items() if name != COMPILED}


# ---------------------------------------------------------------------------------------------------
# What a case says of itself


@pytest.mark.parametrize(
    ("case", "name", "elements", "moved"),
    [
        (RandomCase(distribution="normal", shape=(1 << 24,)), "random/normal/fp32/16M", 1 << 24, 4 << 24),
        (
            RandomCase(distribution="uniform", shape=(1 << 16,), dtype=torch.bfloat16, threads=1),
            "random/uniform/bf16/64K/1-thread",
            1 << 16,
            2 << 16,
        ),
        (ReparameterizeCase(shape=(1 << 22,)), "reparameterize/fwd/fp32/4M", 1 << 22, 12 << 22),
        (SMALL, "reparameterize_kl/fwd+bwd/fp32/256x64", 1 << 14, 32 << 14),
        (ReparameterizeCase(shape=(1000,), direction="fwd+bwd"), "reparameterize/fwd+bwd/fp32/1000", 1000, 24_000),
    ],
)
def test_names_and_bytes(case, name, elements, moved):
    assert (case.name, case.elements, case.bytes) == (name, elements, moved)


@pytest.mark.parametrize("full", [False, True])
def test_every_case_has_its_own_name_and_ours_comes_first(full):
    cases = select(full=full)
    names = [case.name for case in cases]
    assert len(set(names)) == len(names)
    assert all(list(case.shrunk().rivals())[:2] == [OURS, EAGER] for case in cases)


def test_cases_of_a_gpu_have_names_of_their_own_and_right_rivals():
    """As far as a CPU shows it: the same cases, there and small."""
    quick, cases = (select(full=full, device="cuda") for full in (False, True))
    names = [case.name for case in cases]
    assert len(set(names)) == len(names)
    assert all(name.endswith("/cuda") for name in names)
    assert {case.name for case in quick} <= set(names)
    for case in {(case.workload, case.dtype): case for case in cases}.values():
        small = dataclasses.replace(case.shrunk(), device="cpu")
        rivals = small.rivals()
        for name in (OURS, EAGER):
            small.check(name, rivals[name], small.inputs())


def test_the_bounds_of_a_gpu(monkeypatch):
    properties = types.SimpleNamespace(
        name="Test GPU", major=9, minor=0, multi_processor_count=132, total_memory=1 << 36, L2_cache_size=50 << 20
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert machine.residence(50 << 20, 2, "cuda") == "L2"
    assert machine.residence((50 << 20) + 1, 2, "cuda") == "memory"
    assert machine.gpu("cuda")["name"] == "Test GPU"
    assert machine.gpu("cuda")["arch"] == "9.0"
    case = AttentionCase(kind="full", shape=(1, 1, 8192, 8192, 8192), direction="inference", device="cuda")
    assert share(case, MULTIPLY_ADDS) == 2.0  # two products of the size of the one that is timed
    assert share(case, READS) == 1.0
    assert share(dataclasses.replace(case, device="cpu"), MULTIPLY_ADDS) == 1.0


def test_select_filters_by_name():
    assert {case.workload.split("/")[0] for case in select(full=True, filter="reparam")} == {
        "reparameterize",
        "reparameterize_kl",
    }
    quick, full = ({case.name for case in select(full=full)} for full in (False, True))
    assert quick < full
    assert any(name.endswith("1-thread") for name in quick)
    assert not any(case.threads == 1 for case in select(full=True, threads=1))
    with pytest.raises(ValueError, match=r"filter: expected a part .* got 'diffusion'"):
        select(full=True, filter="diffusion")


# ---------------------------------------------------------------------------------------------------
# The checks


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_random_rivals_pass_their_check(distribution, dtype):
    case = RandomCase(distribution=distribution, shape=(10_007,), dtype=dtype)
    for name, function in case.rivals().items():
        case.check(name, function, ())


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_random_checks_find_a_wrong_moment_and_a_wrong_stream(distribution):
    case = RandomCase(distribution=distribution, shape=(10_007,))
    ours = case.rivals()[OURS]
    for wrong in (lambda: 1.1 * ours(), lambda: ours() + 0.1, lambda: ours().fill_(torch.nan)):
        with pytest.raises(WrongResult, match=rf"random/{distribution}/fp32/10007, eager: (mean|variance)"):
            case.check(EAGER, wrong, ())

    def wrong_at_the_end():
        values = ours()
        return torch.cat([values[:5911], values[5911:].roll(1)])

    with pytest.raises(WrongResult, match="stream from element 5911"):
        case.check(OURS, wrong_at_the_end, ())


@pytest.mark.parametrize("kl", [False, True])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_reparameterize_rivals_pass_their_check(direction, kl, dtype):
    case = ReparameterizeCase(shape=(251, 33), direction=direction, kl=kl, dtype=dtype)
    inputs = case.inputs()
    assert inputs[0].requires_grad == (direction != "inference")
    for name, function in without_compile(case).items():
        case.check(name, function, inputs)


def test_reparameterize_in_bfloat16_passes_its_check():
    case = ReparameterizeCase(shape=(8192,), dtype=torch.bfloat16)
    for name, function in without_compile(case).items():
        case.check(name, function, case.inputs())


def test_reparameterize_checks_find_every_wrong_output():
    inputs = SMALL.inputs()
    right = SMALL.rivals()[EAGER]
    for place, name in enumerate(("noise", "kl", "grad_mu", "grad_logvar")):

        def wrong(*args, place=place):
            outputs = list(right(*args))
            outputs[place] = outputs[place] * 1.01 + 0.2
            return tuple(outputs)

        with pytest.raises(WrongResult, match=f"eager, {name}: "):
            SMALL.check(EAGER, wrong, inputs)


def test_ours_has_to_draw_the_noise_of_the_stream():
    case = ReparameterizeCase(shape=(4096,))
    other = fastgen_random.Generator(1)
    with pytest.raises(WrongResult, match="fastgen, z from element 0"):
        case.check(OURS, lambda mu, logvar: functional.reparameterize(mu, logvar, generator=other), case.inputs())
    case.check(EAGER, lambda mu, logvar: functional.reparameterize(mu, logvar, generator=other), case.inputs())


def test_checks_leave_the_default_generator_alone():
    torch.manual_seed(3)
    expected = torch.randn(4)
    torch.manual_seed(3)
    case = RandomCase(distribution="normal", shape=(1000,))
    case.check(EAGER, case.rivals()[EAGER], ())
    assert torch.equal(torch.randn(4), expected)


def test_the_eager_formulas_are_those_of_the_library():
    mu, logvar = (torch.randn(7, 5, dtype=torch.float64) for _ in range(2))
    torch.manual_seed(0)
    eps = torch.randn_like(mu)
    z, kl = functional.reparameterize_kl(mu, logvar, eps=eps)
    torch.manual_seed(0)
    torch.testing.assert_close(eager_reparameterize(mu, logvar), z)
    torch.manual_seed(0)
    torch.testing.assert_close(eager_reparameterize_kl(mu, logvar), (z, kl))


def test_require_close_names_the_worst_number():
    good = torch.tensor([1.0, 2.0, 3.0])
    require_close("x", good, good + 1e-7, atol=1e-6)
    with pytest.raises(WrongResult, match=r"x: 2\.5 instead of 2"):
        require_close("x", torch.tensor([1.0, 2.5, 3.1]), good, rtol=0.01)
    with pytest.raises(WrongResult, match="x: nan instead of 2"):
        require_close("x", torch.tensor([1.0, torch.nan, 3.0]), good, rtol=0.01)
    with pytest.raises(WrongResult, match=r"shape \(2,\) instead of \(3,\)"):
        require_close("x", good[:2], good)


def test_require_moments_takes_what_six_standard_errors_allow():
    values = torch.tensor([-1.0, 1.0]).repeat(500)  # mean 0, variance 1000 / 999, kurtosis 1
    require_moments("x", values, 0.0, 1.001, 1.0001)
    require_moments("x", values, 0.18, 1.001, 1.0001)
    with pytest.raises(WrongResult, match=r"x: mean 0 instead of 0\.2, standard error 0\.03"):
        require_moments("x", values, 0.2, 1.001, 1.0001)


# ---------------------------------------------------------------------------------------------------
# Bounds


@pytest.mark.parametrize("new_memory", [False, True])
@pytest.mark.parametrize("traffic", [Traffic(0, 1), Traffic(1, 1), Traffic(2, 1), Traffic(4, 2), Traffic(5, 3)])
def test_a_pass_reads_and_writes_what_the_traffic_says(traffic, new_memory):
    written = passes(traffic, 64, new_memory=new_memory)()
    assert [tensor.shape for tensor in written] == [(16,)] * traffic.writes
    # Sources hold ones: a sum of two is 2, a copy or a fill 1.
    total = sum(float(tensor[0]) for tensor in written)
    assert total == (traffic.reads or 1)


def test_passes_in_place_write_the_same_memory_again_and_the_others_do_not():
    for new_memory in (False, True):
        once = passes(Traffic(1, 1), 4096, new_memory=new_memory)
        first, second = once(), once()
        assert (first[0].data_ptr() == second[0].data_ptr()) is not new_memory


def test_a_pass_cannot_read_more_than_two_arrays_a_write():
    with pytest.raises(ValueError, match=r"traffic: expected at most two reads a write, got Traffic\(reads=3"):
        passes(Traffic(3, 1), 64, new_memory=False)


def test_bandwidth_is_positive_for_both_kinds():
    found = bandwidth(1, array=1 << 20, budget=0)
    assert set(found) == {IN_PLACE, NEW_MEMORY}
    assert all(value > 1e6 for value in found.values())


# ---------------------------------------------------------------------------------------------------
# measure


def test_measure_times_all_that_passes():
    case = RandomCase(distribution="uniform", shape=(1 << 16,), threads=1)
    result = measure(case, threads=2, budget=0, min_rounds=3)
    assert result.rounds == 3
    assert result.threads == 1
    assert set(result.seconds) == {OURS, EAGER, IN_PLACE, NEW_MEMORY}
    assert set(result.speedups) == {EAGER, IN_PLACE, NEW_MEMORY}
    assert all(0 < spread.q1 <= spread.median <= spread.q3 for spread in result.seconds.values())
    assert result.failures == {}


def test_calls_that_cost_more_than_their_bytes_have_no_bound():
    result = measure(ReparameterizeCase(shape=(64, 20)), threads=1, budget=0, compile=False)
    assert result.residence == "L1"
    assert set(result.seconds) == {OURS, EAGER}


class Rigged(RandomCase):
    """A case whose rivals are given."""

    functions: dict

    def rivals(self):
        return self.functions


def rigged(**functions):
    case = Rigged(distribution="normal", shape=(4096,))
    honest = RandomCase.rivals(case)
    names = {"ours": OURS, "eager": EAGER, "compiled": COMPILED}
    object.__setattr__(case, "functions", honest | {names[key]: value for key, value in functions.items()})
    return case


def fail():
    raise RuntimeError("no C++ compiler\nwith a long traceback")


def test_a_failing_compiler_ends_in_the_row():
    result = measure(rigged(compiled=fail), threads=1, budget=0)
    assert result.failures == {COMPILED: "RuntimeError: no C++ compiler"}
    assert EAGER in result.speedups


def test_a_wrong_rival_is_not_timed():
    result = measure(rigged(eager=lambda: torch.zeros(4096)), threads=1, budget=0)
    assert result.failures[EAGER].startswith("wrong result: random/normal/fp32/4K, eager: variance 0 instead of 1")
    assert EAGER not in result.seconds


def test_nothing_is_timed_if_ours_is_wrong():
    result = measure(rigged(ours=lambda: torch.zeros(4096)), threads=1, budget=0)
    assert OURS in result.failures
    assert (result.seconds, result.speedups, result.rounds) == ({}, {}, 0)


def test_an_error_of_ours_is_not_swallowed():
    with pytest.raises(RuntimeError, match="no C\\+\\+ compiler"):
        measure(rigged(ours=fail), threads=1, budget=0)


def test_torch_compile_is_left_out_on_request(monkeypatch):
    called = []
    monkeypatch.setattr(result_module.torch.compiler, "reset", lambda: called.append("reset"))
    result = measure(rigged(compiled=fail), threads=1, budget=0, compile=False)
    assert COMPILED not in result.failures
    assert called == ["reset"]


@pytest.mark.slow
@needs_inductor
def test_torch_compile_takes_part():
    result = measure(dataclasses.replace(SMALL, shape=(64, 20)), threads=1, budget=0)
    assert result.failures == {}
    assert COMPILED in result.speedups


def test_cases_are_values():
    case = RandomCase(distribution="normal", shape=(8,))
    assert isinstance(case, Case)
    assert case == RandomCase(distribution="normal", shape=(8,))
    with pytest.raises(dataclasses.FrozenInstanceError):
        case.shape = (9,)


def test_training_steps_are_timed_with_memory_kept(monkeypatch):
    states = []

    @contextlib.contextmanager
    def kept():
        states.append("kept")
        yield
        states.append("given back")

    monkeypatch.setattr(result_module, "kept_memory", kept)
    measure(SMALL, threads=1, budget=0, min_rounds=2, compile=False)
    assert states == []
    case = next(case for case in select(full=False, filter="training") if case.keeps_memory)
    result = measure(case.shrunk(), threads=1, budget=0, min_rounds=2, compile=False)
    assert states == ["kept", "given back"]
    assert result.speedups.keys() >= {EAGER}
