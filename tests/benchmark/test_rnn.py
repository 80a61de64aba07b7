"""The cases of an RNN's training step count right, let right rivals pass and stop wrong ones."""

from __future__ import annotations

import pytest
import torch

from fastgen.benchmark.case import EAGER, OURS, WrongResult
from fastgen.benchmark.rnn import PlainRNN, RNNCase, cases

SMALL = RNNCase(shape=(2, 8, 16, 24), embedding_dim=12)


def test_counts() -> None:
    assert SMALL.name == "rnn/LSTM+2layers+12embedding/training/fp32/2x8x16x24"
    weights = {name: p.numel() for name, p in SMALL._model().named_parameters() if p.dim() == 2}
    del weights["embedding.weight"]
    assert SMALL.flops == 6 * 16 * sum(weights.values())
    assert SMALL.bytes == 4 * sum(weights.values())
    assert SMALL.weights == (4 * (weights["rnn.weight_hh_l0"] + weights["rnn.weight_hh_l1"]), 2 * 8)


def test_the_plain_model_is_the_same_model() -> None:
    model = SMALL._model()
    plain = PlainRNN(model)
    inputs = SMALL.inputs()
    ours, theirs = model(*inputs).loss, plain(*inputs)
    torch.testing.assert_close(ours, theirs)
    ours.backward()
    theirs.backward()
    theirs_by_name = dict(plain.named_parameters())
    for name, mine in model.named_parameters():
        torch.testing.assert_close(mine.grad, theirs_by_name[name].grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rival", [OURS, EAGER])
def test_right_rivals_pass(rival: str) -> None:
    rivals = SMALL.rivals()
    assert list(rivals) == [OURS, EAGER]
    for _ in range(2):  # a step leaves the weights as they are
        SMALL.check(rival, rivals[rival], SMALL.inputs())


def test_wrong_rivals_are_stopped() -> None:
    inputs = SMALL.inputs()
    right = SMALL.rivals()[OURS]
    for wrong in (lambda x, y: right(x, y) * 1.001, lambda x, y: right(x, x), lambda x, y: right(x, y) * torch.nan):
        with pytest.raises(WrongResult, match=r"loss .* instead of"):
            SMALL.check(OURS, wrong, inputs)


def test_cases_shrink() -> None:
    assert len(cases(full=False)) < len(cases(full=True))
    for case in cases(full=True):
        small = case.shrunk()
        assert small.elements == 16
        small.check(EAGER, small.rivals()[EAGER], small.inputs())
