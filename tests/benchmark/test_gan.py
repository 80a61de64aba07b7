"""The cases of a GAN's training step count right, let right rivals pass and stop wrong ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastgen.benchmark.case import COMPILED, EAGER, OURS, WrongResult
from fastgen.benchmark.gan import GANCase, PlainGAN, cases
from fastgen.random import Generator, normal

CONV, MLP = (GANCase(shape=(4, 1, 28, 28), architecture=architecture) for architecture in ("conv", "mlp"))


def multiply_adds(network: nn.Module, x: Tensor) -> list[int]:
    """Of each layer, from what PyTorch's modules are given and give."""
    counts: list[int] = []

    def count(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if isinstance(module, nn.ConvTranspose2d):  # every element that enters meets all weights of its channel
            counts.append(inputs[0].numel() * module.weight[0].numel())
        elif isinstance(module, (nn.Conv2d, nn.Linear)):
            counts.append(output.numel() * module.weight[0].numel())

    for layer in network:  # type: ignore[attr-defined]
        layer.register_forward_hook(count)
    network(x)
    return counts


@pytest.mark.parametrize("case", [CONV, MLP], ids=["conv", "mlp"])
def test_counts(case: GANCase) -> None:
    assert case.name == f"gan/{case.architecture}/training/fp32/4x1x28x28"
    assert case.elements == 4
    plain = PlainGAN(case._model())
    g, d = multiply_adds(plain.generator, torch.zeros(4, 64)), multiply_adds(plain.discriminator, *case.inputs())
    assert len(g) == len(d) == 3
    generator = 3 * sum(g) - g[0]  # its noise needs no gradient
    updates = 2 * (3 * sum(d) - d[0])  # on data and on fakes, which need none either
    judged = 2 * sum(d)  # forward and back to the pixels, no weights
    assert case.flops == 2 * (generator + updates + judged)
    assert case.weights == (4 * sum(weight.numel() for weight in plain.parameters()), 3)


@pytest.mark.parametrize("case", [CONV, MLP], ids=["conv", "mlp"])
def test_the_plain_model_is_the_same_model(case: GANCase) -> None:
    model = case._model()
    plain = PlainGAN(model)
    (real,) = case.inputs()
    fake = model(model.noise(4, generator=Generator(3)))
    theirs = plain.generator(normal(4, 64, generator=Generator(3)))
    torch.testing.assert_close(fake, theirs, rtol=1e-5, atol=1e-6)
    for mine, other, network in (
        (model.discriminator_loss(real, fake=fake).loss, plain.discriminator_loss(real, theirs.detach()), "d"),
        (model.generator_loss(real, fake=fake).loss, plain.generator_loss(theirs), "g"),
    ):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=0)
        mine.backward()
        other.backward()
        name = {"d": "discriminator", "g": "generator"}[network]
        ours, others = ([w.grad.norm() for w in getattr(owner, name).parameters()] for owner in (model, plain))
        assert sorted(map(float, ours)) == pytest.approx(sorted(map(float, others)), rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("rival", [OURS, EAGER])  # the third is the second, compiled: a minute
@pytest.mark.parametrize("case", [CONV, MLP], ids=["conv", "mlp"])
def test_right_rivals_pass(case: GANCase, rival: str) -> None:
    rivals = case.rivals()
    assert list(rivals) == [OURS, EAGER, COMPILED]
    for _ in range(2):  # a step leaves the weights as they are
        case.check(rival, rivals[rival], case.inputs())
        rivals[rival](*case.inputs())  # with noise of its own


def test_wrong_rivals_are_stopped() -> None:
    inputs = CONV.inputs()
    right = CONV.rivals()[OURS]
    CONV.check("right", right, inputs)
    for factor in (torch.tensor([1.0001, 1]), torch.tensor([1, 0.9999]), torch.tensor([torch.nan, 1])):
        with pytest.raises(WrongResult, match=r"^gan/conv/training/fp32/4x1x28x28, wrong: losses "):
            CONV.check("wrong", lambda *a, f=factor, **k: right(*a, **k) * f, inputs)


def test_cases() -> None:
    assert [case.name for case in cases(full=False)] == ["gan/conv/training/fp32/64x1x28x28"]
    assert [case.architecture for case in cases(full=True)] == ["conv", "mlp"]
    assert CONV.shrunk().shape == (4, 1, 28, 28)
