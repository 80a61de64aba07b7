"""The cases of a language model's training step count right, let right rivals pass and stop wrong ones."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from fastgen.benchmark import gpt, rnn
from fastgen.benchmark.case import COMPILED, EAGER, OURS, WrongResult

RNN = rnn.RNNCase(shape=(2, 8, 16, 24), embedding_dim=12)
GPT = gpt.GPTCase(shape=(2, 8, 16, 24), layers=2)
SMALL = pytest.mark.parametrize("small", [RNN, GPT], ids=["rnn", "gpt"])


def test_counts_of_an_rnn() -> None:
    assert RNN.name == "rnn/LSTM+2layers+12embedding/training/fp32/2x8x16x24"
    weights = {name: p.numel() for name, p in RNN._model().named_parameters() if p.dim() == 2}
    del weights["embedding.weight"]
    assert RNN.flops == 6 * 16 * sum(weights.values())
    assert RNN.bytes == 4 * sum(weights.values())
    assert RNN.weights == (4 * (weights["rnn.weight_hh_l0"] + weights["rnn.weight_hh_l1"]), 2 * 8)


def test_counts_of_a_gpt() -> None:
    assert GPT.name == "gpt/2layers+6heads/training/fp32/2x8x16x24"
    weights = sum(p.numel() for name, p in GPT._model().named_parameters() if p.dim() == 2 and "positions" not in name)
    assert GPT.bytes == 4 * weights
    assert GPT.weights == (4 * weights, 3)
    # Of two products of (T, 24) and (24, T) in two layers a causal mask leaves T (T + 1) / 2 places.
    attention = 2 * 2 * 24 * (8 * 9 // 2)
    assert GPT.flops == 3 * 2 * (16 * weights + 2 * attention)


@SMALL
def test_the_plain_model_is_the_same_model(small: Any) -> None:
    model = small._model()
    plain = small._plain(model)
    inputs = small.inputs()
    ours, theirs = model(*inputs).loss, plain(*inputs)
    torch.testing.assert_close(ours, theirs)
    ours.backward()
    theirs.backward()
    if small is RNN:  # of the same names
        assert model.state_dict().keys() == plain.state_dict().keys()
        theirs_by_name = dict(plain.named_parameters())
        pairs = [(mine, theirs_by_name[name]) for name, mine in model.named_parameters()]
    else:  # in the same order
        pairs = list(zip(model.parameters(), plain.parameters(), strict=True))
    for mine, other in pairs:
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rival", [OURS, EAGER])  # torch.compile's is the second, compiled: a minute
@pytest.mark.parametrize("case", [RNN, GPT, replace(GPT, dtype=torch.bfloat16)], ids=["rnn", "gpt", "gpt-bf16"])
def test_right_rivals_pass(rival: str, case: Any) -> None:
    rivals = case.rivals()
    assert list(rivals) == ([OURS, EAGER] if case is RNN else [OURS, EAGER, COMPILED])
    for _ in range(2):  # a step leaves the weights as they are
        case.check(rival, rivals[rival], case.inputs())


@SMALL
def test_wrong_rivals_are_stopped(small: Any) -> None:
    inputs = small.inputs()
    right = small.rivals()[OURS]
    for wrong in (lambda x, y: right(x, y) * 1.001, lambda x, y: right(x, x), lambda x, y: right(x, y) * torch.nan):
        with pytest.raises(WrongResult, match=r"loss .* instead of"):
            small.check(OURS, wrong, inputs)


@pytest.mark.parametrize("module", [rnn, gpt], ids=["rnn", "gpt"])
def test_cases_shrink(module: Any) -> None:
    assert len(module.cases(full=False)) < len(module.cases(full=True))
    for case in module.cases(full=True):
        small = case.shrunk()
        assert small.elements == 16
        small.check(EAGER, small.rivals()[EAGER], small.inputs())
