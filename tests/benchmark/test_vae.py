"""The cases of a VAE's training step count right, let right rivals pass and stop wrong ones."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastgen.benchmark.case import COMPILED, EAGER, OURS, WrongResult
from fastgen.benchmark.vae import PlainVAE, VAECase, cases
from fastgen.random import Generator, normal

SMALL = VAECase(shape=(4, 1, 28, 28))


def test_counts() -> None:
    assert SMALL.name == "vae/conv/training/fp32/4x1x28x28"
    assert SMALL.elements == 4
    # Multiply-adds of the forward pass, layer by layer, from what PyTorch's modules are given and give.
    counts: list[int] = []

    def count(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        if isinstance(module, nn.ConvTranspose2d):  # every element that enters meets all weights of its channel
            counts.append(inputs[0].numel() * module.weight[0].numel())
        elif isinstance(module, (nn.Conv2d, nn.Linear)):
            counts.append(output.numel() * module.weight[0].numel())

    plain = PlainVAE()
    for layer in [*plain.encoder, *plain.decoder]:
        layer.register_forward_hook(count)
    plain(*SMALL.inputs())
    assert len(counts) == 8
    assert SMALL.flops == 6 * sum(counts) - 2 * counts[0]
    assert SMALL.weights == (4 * sum(weight.numel() for weight in plain.parameters()), 3)


def test_the_plain_model_is_the_same_model() -> None:
    model = SMALL._model()
    plain = PlainVAE(model)
    (x,) = SMALL.inputs()
    ours = model(x, generator=Generator(3)).loss
    theirs = plain(x, normal(4, 16, generator=Generator(3)))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    ours.backward()
    theirs.backward()
    for mine, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("rival", [OURS, EAGER])  # the third is the second, compiled: a minute
def test_right_rivals_pass(rival: str) -> None:
    rivals = SMALL.rivals()
    assert list(rivals) == [OURS, EAGER, COMPILED]
    for _ in range(2):  # a step leaves the weights as they are
        SMALL.check(rival, rivals[rival], SMALL.inputs())
        rivals[rival](*SMALL.inputs())  # with noise of its own


def test_wrong_rivals_are_stopped() -> None:
    inputs = SMALL.inputs()
    right = SMALL.rivals()[OURS]
    for wrong in (
        lambda x, generator: right(x, generator) * 1.001,
        lambda x, generator: right(x),  # other noise
        lambda x, generator: right(x, generator) * torch.nan,
    ):
        with pytest.raises(WrongResult, match=r"loss .* instead of"):
            SMALL.check(OURS, wrong, inputs)


def test_cases_shrink() -> None:
    assert len(cases(full=False)) < len(cases(full=True))
    for case in cases(full=True):
        small = case.shrunk()
        assert small.elements == 4
        small.check(EAGER, small.rivals()[EAGER], small.inputs())
