"""The attention cases count right, let right rivals pass and stop wrong ones."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fastgen.benchmark import measure, select
from fastgen.benchmark.attention import AttentionCase, cases
from fastgen.benchmark.case import EAGER, OURS, WrongResult

SMALL = (2, 4, 12, 12, 8)
KINDS = ("causal", "full", "dropout", "alibi", "window", "bias", "ragged")
VARIANTS = [
    *(AttentionCase(kind=kind, shape=SMALL, direction=d) for kind in KINDS for d in ("inference", "training")),
    AttentionCase(kind="causal", shape=SMALL, dtype=torch.bfloat16),
    AttentionCase(kind="decode", shape=(1, 6, 1, 40, 8), key_heads=2, direction="inference"),
    AttentionCase(kind="decode", shape=(2, 6, 3, 40, 8), key_heads=2),
]
VARIANTS = [dataclasses.replace(case, shape=(1, *SMALL[1:])) if case.kind == "ragged" else case for case in VARIANTS]


@pytest.mark.parametrize("case", VARIANTS, ids=lambda case: case.name)
def test_right_rivals_pass_and_wrong_ones_do_not(case):
    inputs = case.inputs()
    assert set(case.rivals()) == {OURS, EAGER}
    for name, function in case.rivals().items():
        case.check(name, function, inputs)
        with pytest.raises(WrongResult, match="off by"):
            case.check(name, lambda *given, f=function: tuple(x + 0.5 * x.abs().max() for x in f(*given)), inputs)
        with pytest.raises(WrongResult):
            case.check(name, lambda *given, f=function: tuple(x[..., :-1] for x in f(*given)), inputs)


@pytest.mark.parametrize(
    ("case", "name", "pairs", "products"),
    [
        (AttentionCase(shape=SMALL), "attention/causal/training/fp32/2x4x12x12x8", 78, 7),
        (
            AttentionCase(kind="full", shape=SMALL, direction="inference"),
            "attention/full/inference/fp32/2x4x12x12x8",
            144,
            2,
        ),
        (
            AttentionCase(kind="window", shape=(1, 1, 300, 300, 8), dtype=torch.bfloat16),
            "attention/window/training/bf16/1x1x300x300x8",
            sum(min(i + 1, 257) for i in range(300)),
            7,
        ),
        (
            AttentionCase(kind="decode", shape=(1, 6, 2, 40, 8), key_heads=2, direction="inference"),
            "attention/decode+2kv/inference/fp32/1x6x2x40x8",
            39 + 40,
            2,
        ),
        (
            AttentionCase(kind="ragged", shape=(1, 2, 100, 100, 8)),
            "attention/ragged/training/fp32/1x2x100x100x8",
            1520,
            7,
        ),
    ],
)
def test_counts(case, name, pairs, products):
    assert case.name == name
    assert case.pairs == pairs
    assert case.flops == 2 * products * case.shape[0] * case.shape[1] * pairs * case.shape[-1]


def test_the_seen_pairs_are_those_of_the_mask():
    """A gradient of 1 for each weight, by values that are unit vectors, counts what is not zero."""
    for kind in ("causal", "full", "alibi", "window", "decode"):
        case = AttentionCase(kind=kind, shape=(1, 1, 5 if kind == "decode" else 300, 300, 300), direction="inference")
        query, key, _ = case.inputs()
        ((weights,), (theirs,)) = (f(query, key, torch.eye(300).expand(1, 1, 300, 300)) for f in case.rivals().values())
        assert int((weights != 0).sum()) == int((theirs != 0).sum()) == case.pairs


def test_every_case_runs_when_shrunk():
    for case in cases(full=True):
        result = measure(case.shrunk(), threads=1, budget=0.0, min_rounds=2)
        assert not result.failures, result.failures
        assert {OURS, EAGER} <= set(result.seconds)


def test_they_are_selected_by_name():
    names = [case.name for case in select(full=True, filter="attention")]
    assert len(names) == len(set(names)) == len(cases(full=True))
    assert {case.workload for case in select(full=False, filter="attention")} >= {"attention/causal/training"}
