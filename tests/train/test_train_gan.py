"""Training of GANs: the run folder, the step, the figures, and the watch on real short runs."""

from __future__ import annotations

import copy
import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from toys import images

from fastgen.data import ImageSet, SeriesSet, load_images, load_series
from fastgen.evaluate import RandomFeatures, frechet_distance
from fastgen.functional import discriminator_loss, generator_loss
from fastgen.models import GAN, GANConfig, from_pretrained
from fastgen.random import Generator, permutation
from fastgen.train import GANRecipe, TrainingConfig, TrainingResult, fit, read_metrics, read_run, trainer
from fastgen.train.collapse import Diversity

SMALL: dict[str, Any] = {"architecture": "mlp", "hidden_sizes": (16,), "latent_dim": 3, "input_shape": (1, 8, 8)}


def small(model: GAN | GANConfig, data: ImageSet | SeriesSet, out: Path, **options: Any) -> TrainingResult:
    defaults = {"epochs": 2, "batch_size": 10, "log_every": 3, "tensorboard": False, "progress": "quiet"}
    return fit(model, data, out=out, **{**defaults, **options})


def column(out: Path, name: str, split: str = "train") -> list[float]:
    return [float(row[name]) for row in read_metrics(out / "metrics.csv") if row["split"] == split]


def test_a_run_from_python(tmp_path: Path) -> None:
    out = tmp_path / "run"
    torch.manual_seed(3)  # 15 epochs are few: from some initial weights the distance has not yet fallen
    model = GAN(**SMALL)
    result = small(model, images(300), out, epochs=15, learning_rate=5e-3, log_every=9)
    assert {path.name for path in result.files} == {
        *("samples.png", "interpolation.png", "loss.png", "metrics.csv", "model")
    }
    # 64 samples in 8 columns of 8x8 pixels, eight times enlarged, with 2 between them.
    for name, columns, rows in (("samples", 8, 8), ("interpolation", 12, 8)):
        with Image.open(out / f"{name}.png") as picture:
            assert picture.mode == "L"
            assert picture.size == (66 * columns + 2, 66 * rows + 2), name
    with Image.open(out / "loss.png") as picture:
        assert (picture.width, picture.height) == (1350, 720)
        assert len(picture.convert("RGB").getcolors(maxcolors=1 << 20) or []) > 20
    assert len(list((out / "samples").iterdir())) == 1 + 3

    # Samples come closer to the data, and the best weights are the model's, and the folder's.
    distances = column(out, "frechet_distance", "test")
    assert distances[-1] < 0.8 * distances[0]
    assert result.metrics["frechet_distance"] == min(distances)
    assert 0 < result.metrics["noise_floor"] < min(distances)
    saved = from_pretrained(out / "model")
    assert isinstance(saved, GAN)
    assert saved.generate(5, seed=1).equal(model.generate(5, seed=1))
    record = read_run(out)
    assert record["model"]["hidden_sizes"] == [16]
    assert record["data"]["train"] == 270
    assert record["recipe"]["num_critic_steps"] == 1


def test_pictures_of_a_run_are_of_the_same_noise(tmp_path: Path) -> None:
    model = GAN(**SMALL)
    small(model, images(60), tmp_path / "run", evaluate_every=2)
    untrained, sample = sorted((tmp_path / "run" / "samples").iterdir())
    assert untrained.name == "step-00000000.png"
    assert untrained.read_bytes() != sample.read_bytes()
    assert sample.read_bytes() == (tmp_path / "run" / "samples.png").read_bytes()
    assert model.generate(8, seed=0).equal(model.generate(64, seed=0)[:8])


@pytest.mark.parametrize("loss", ["non_saturating", "relativistic"])
def test_the_first_step_is_what_the_documentation_promises(loss: str, tmp_path: Path) -> None:
    """Recomputed from the functions: seed, order, noise, the two halves and their gradients."""
    train, test = images(50).split(0.2)
    config = GANConfig(**SMALL, loss=loss, normalization="none")
    small(config, train, tmp_path / "run", test=test, max_steps=1, log_every=1, seed=3, augment="", learning_rate=0.01)
    first = read_metrics(tmp_path / "run" / "metrics.csv")[0]

    torch.manual_seed(3)
    model = GAN(config)
    root = Generator(3)
    real, _ = train.batch(permutation(40, generator=root.fork(0).fork(0))[:10])
    fake = model(model.noise(10, generator=root.fork(1).fork(0)))
    real_logits, fake_logits = model.discriminator(real), model.discriminator(fake.detach())
    expected = discriminator_loss(real_logits, fake_logits, loss)
    expected.backward()
    norm = torch.stack([p.grad.norm() for p in model.discriminator.parameters() if p.grad is not None]).norm()
    assert float(first["discriminator_loss"]) == pytest.approx(expected.item(), rel=1e-6)
    assert float(first["penalty"]) == 0
    assert float(first["score_gap"]) == pytest.approx((real_logits.mean() - fake_logits.mean()).item(), abs=1e-6)
    wins = [float(r > f) for r in real_logits for f in fake_logits]
    assert float(first["accuracy"]) == pytest.approx(sum(wins) / 100)
    assert float(first["discriminator_gradient_norm"]) == pytest.approx(norm.item(), rel=1e-5)

    # The generator then meets the discriminator that has moved, on the same fakes.
    torch.optim.Adam(model.discriminator.parameters(), lr=0.01, betas=(0.5, 0.999)).step()
    expected = generator_loss(
        model.discriminator(fake), loss, model.discriminator(real).detach() if loss == "relativistic" else None
    )
    expected.backward()
    norm = torch.stack([p.grad.norm() for p in model.generator.parameters() if p.grad is not None]).norm()
    # Adam's first step is the sign of the gradient, also of one that is 0 but for a rounding.
    assert float(first["generator_loss"]) == pytest.approx(expected.item(), rel=1e-4)
    assert float(first["generator_gradient_norm"]) == pytest.approx(norm.item(), rel=1e-3)

    torch.optim.Adam(model.generator.parameters(), lr=0.01, betas=(0.5, 0.999)).step()
    model.update_ema(0.999)
    if loss == "relativistic":
        return
    trained = from_pretrained(tmp_path / "run" / "model")
    torch.testing.assert_close(dict(trained.state_dict()), dict(model.state_dict()), rtol=1e-5, atol=1e-6)


def test_figures_are_those_of_the_model(tmp_path: Path) -> None:
    train, test = images(400).split(100)
    model = GAN(**SMALL)
    recipe = GANRecipe(model, train, test, seed=2)
    figures = recipe.figures()
    data = train.batch(permutation(300, generator=Generator(2))[:256])[0]
    with model.inference():
        assert figures["diversity"] == Diversity(data)(model(model.noise(256, seed=2)))
    assert figures["generator_gradient_norm"] == figures["discriminator_gradient_norm"] == 0  # no step yet

    from accelerate import Accelerator

    metrics = recipe.evaluate(Accelerator(cpu=True), Generator(4), final=True)
    held_out = test.batch(slice(None))[0]
    features = RandomFeatures(held_out)
    samples = model.generate(100, generator=Generator(4))
    assert metrics["frechet_distance"] == frechet_distance(features(samples), features(held_out))
    others = train.batch(torch.arange(0, 300, 3))[0]
    assert metrics["noise_floor"] == frechet_distance(features(others), features(held_out))


class Counting(nn.Module):
    """A module that counts its forward passes and the examples in them."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside
        self.calls: list[tuple[int, bool]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append((len(x), torch.is_grad_enabled()))
        output: Tensor = self.inside(x)
        return output


def own(**fields: Any) -> GAN:
    """A GAN of modules that are not fastgen's."""
    generator = nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 64), nn.Sigmoid(), nn.Unflatten(1, (1, 8, 8)))
    discriminator = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 1), nn.Flatten(0))
    config = GANConfig(input_shape=(1, 8, 8), latent_dim=3, **fields)
    return GAN(config, generator=Counting(generator), discriminator=Counting(discriminator))


def test_no_pass_is_wasted(tmp_path: Path) -> None:
    model = own()
    small(model, images(60), tmp_path / "run", max_steps=1, num_critic_steps=3, log_every=100)
    untrained, *generator = model.generator.calls
    assert untrained == (64, False)  # the picture of before training, when `ema` is no average yet
    assert generator[:3] == [(10, False), (10, False), (10, True)]  # the last batch of fakes serves both
    assert generator[3:] == [(54, False)]  # the figures, on all of the data
    assert all(not grad for _, grad in model.ema.calls)
    discriminator = model.discriminator.calls
    assert discriminator == [(10, True)] * 7  # real and fake of each batch, then the generator's


def test_lazy_penalties(tmp_path: Path) -> None:
    options = {"log_every": 1, "max_steps": 8, "epochs": 4, "learning_rate": 1e-9}  # the weights stay
    for name, more in (("every", {}), ("third", {"penalty_interval": 3})):
        config = GANConfig(**SMALL, normalization="none")
        small(config, images(60), tmp_path / name, r1_gamma=2.0, **options, **more)
    every, third = (column(tmp_path / name, "penalty") for name in ("every", "third"))
    assert all(value > 0 for value in every)
    assert [index for index, value in enumerate(third) if value > 0] == [0, 3, 6]
    assert third[3] == pytest.approx(3 * every[3], rel=1e-4)


def test_wasserstein_has_its_penalty_unless_it_is_refused(tmp_path: Path) -> None:
    config = GANConfig(**SMALL, loss="wasserstein")
    small(config, images(60), tmp_path / "with", max_steps=3, num_critic_steps=2)
    small(config, images(60), tmp_path / "without", max_steps=3, gradient_penalty_weight=0)
    assert read_run(tmp_path / "with")["recipe"]["gradient_penalty_weight"] == 10
    assert column(tmp_path / "with", "penalty")[0] > 0
    assert column(tmp_path / "without", "penalty") == [0]


def test_critic_steps_read_fresh_batches(tmp_path: Path) -> None:
    recipe = GANRecipe(GANConfig(**SMALL), *images(70).split(10), num_critic_steps=3)
    assert recipe.num_examples == 20
    order = recipe.order(5, Generator(1))
    assert order.shape == (4, 3, 5)
    assert sorted(order.flatten().tolist()) == list(range(60))
    result = small(GANConfig(**SMALL), images(70), tmp_path / "run", epochs=1, num_critic_steps=3)
    assert result.step == 2  # 63 images, 21 times three


def test_two_learning_rates_and_betas() -> None:
    recipe = GANRecipe(
        GANConfig(**SMALL), *images().split(10), discriminator_learning_rate=0.5, betas=(0.0, 0.99), seed=1
    )
    optimizers = recipe.optimizers(TrainingConfig(learning_rate=0.25, weight_decay=0.125))
    assert set(optimizers) == {"generator", "discriminator"}
    for name, rate in (("generator", 0.25), ("discriminator", 0.5)):
        groups = optimizers[name].param_groups
        assert [(group["lr"], group["betas"], group["weight_decay"]) for group in groups] == [
            (rate, (0.0, 0.99), 0.125),
            (rate, (0.0, 0.99), 0.0),
        ]
        ours = {id(p) for group in groups for p in group["params"]}
        assert ours == {id(p) for p in getattr(recipe.model, name).parameters()}


@pytest.mark.parametrize(
    ("shape", "fields", "options"),
    [
        ((3, 9, 11), {"architecture": "conv", "channels": (4,), "spectral_norm": True, "loss": "hinge"}, {}),
        ((1, 8, 8), {"architecture": "mlp", "hidden_sizes": (8,), "num_classes": 3}, {"augment": "color,cutout"}),
        ((1, 8, 8), {"architecture": "mlp", "hidden_sizes": (8,), "loss": "minimax"}, {"r1_gamma": 1, "r2_gamma": 1}),
    ],
)
def test_other_images_and_models(
    shape: tuple[int, int, int], fields: dict[str, Any], options: dict[str, Any], tmp_path: Path
) -> None:
    config = GANConfig(input_shape=shape, latent_dim=2, **fields)
    result = small(config, images(40, shape), tmp_path / "run", **options)
    assert result.step == 6
    with Image.open(tmp_path / "run" / "samples.png") as picture:
        assert picture.mode == {1: "L", 3: "RGB"}[shape[0]]


@pytest.mark.parametrize("architecture", ["lstm", "conv"])
def test_windows_of_a_series(architecture: str, tmp_path: Path) -> None:
    sizes = {"hidden_sizes": (8,)} if architecture == "lstm" else {"channels": (4,)}
    config = GANConfig(
        architecture=architecture, input_shape=(12, 1), latent_dim=3, data_range=(-2, 2), loss="wasserstein", **sizes
    )
    result = small(config, load_series("sine").split(0.1)[0], tmp_path / "run", max_steps=4, test=None)
    assert result.step == 4
    with Image.open(tmp_path / "run" / "samples.png") as picture:
        assert len(picture.convert("RGB").getcolors(maxcolors=1 << 20) or []) > 20
    record = read_run(tmp_path / "run")["data"]
    assert record["train"] == 1620 - 12 + 1
    recipe = GANRecipe(config, *load_series("sine").split(0.1))
    windows, labels = recipe._train.batch(torch.tensor([0, 5]), torch.device("cpu"))
    assert windows[1].equal(load_series("sine").values[5:17])
    assert labels is None


def test_resume_from_python(tmp_path: Path) -> None:
    data = images(60)
    config = GANConfig(**SMALL, loss="relativistic")
    options = {"r1_gamma": 0.1, "penalty_interval": 4, "evaluate_every": 1}
    small(config, data, tmp_path / "once", epochs=3, **options)
    small(config, data, tmp_path / "twice", epochs=1, **options)
    small(config, data, tmp_path / "twice", epochs=3, resume=True, **options)
    once, twice = ((tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("once", "twice"))
    assert once == twice
    with pytest.raises(ValueError, match=r"r1_gamma: expected 0.1, as .* was started with, got 0.2"):
        small(config, data, tmp_path / "twice", epochs=4, resume=True, **{**options, "r1_gamma": 0.2})
    with pytest.raises(ValueError, match=r"data: expected checksum .*, as .* was started with"):
        small(config, images(60, seed=1), tmp_path / "twice", epochs=4, resume=True, **options)


def test_bfloat16_autocast(tmp_path: Path) -> None:
    model = own()
    twin = copy.deepcopy(model)
    small(model, images(60), tmp_path / "run", dtype="bfloat16", max_steps=4, r1_gamma=0.1, log_every=1)
    small(twin, images(60), tmp_path / "plain", max_steps=4, r1_gamma=0.1, log_every=1)
    halved, plain = (column(tmp_path / name, "discriminator_loss") for name in ("run", "plain"))
    assert halved != plain
    assert halved == pytest.approx(plain, rel=0.02)


def test_clipping_takes_the_scale_off_one_optimiser(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the scaler of float16, which a CPU has too: a limit that is never reached changes nothing."""
    make = trainer._accelerator

    def with_scaler(config: TrainingConfig) -> Any:
        accelerator = make(config)
        accelerator.scaler, accelerator.native_amp = torch.amp.GradScaler("cpu", init_scale=1024.0), True
        return accelerator

    monkeypatch.setattr(trainer, "_accelerator", with_scaler)
    options: dict[str, Any] = {"dtype": "float16", "device": "cpu", "max_steps": 4, "log_every": 1}
    for name, limit in (("free", None), ("clipped", 1e6)):
        small(GANConfig(**SMALL), images(60), tmp_path / name, max_grad_norm=limit, **options)
    for figure in ("generator_gradient_norm", "discriminator_gradient_norm", "discriminator_loss"):
        assert column(tmp_path / "free", figure) == column(tmp_path / "clipped", figure), figure


SERIES = SeriesSet(torch.zeros(40, 2))


@pytest.mark.parametrize(
    ("fields", "data", "options", "message"),
    [
        ({"input_shape": (1, 9, 9)}, images(), {}, r"train: expected images \(1, 9, 9\) as the model takes, got"),
        ({"num_classes": 4}, images(), {}, "train: expected 4 classes, got 3"),
        (
            {"num_classes": 3},
            dataclasses.replace(images(), labels=None),
            {},
            "train: expected labels for a conditional model, got none",
        ),
        ({}, SERIES, {}, r"input_shape: expected \(T, 2\) as the series has columns, got \(1, 8, 8\)"),
        ({"input_shape": (50, 2)}, SERIES, {}, "train: expected at least 50 steps, a window of the model, got 36"),
        ({"input_shape": (3, 2), "num_classes": 2}, SERIES, {}, "num_classes: expected 0, as windows"),
        ({}, images(), {"betas": 0.5}, "betas: expected two numbers, got 0.5"),
        ({}, images(), {"betas": (0.5, 1.0)}, "betas: expected a finite number of at least 0 and below 1, got 1.0"),
        ({}, images(), {"num_critic_steps": 0}, "num_critic_steps: expected an int of at least 1, got 0"),
        ({}, images(), {"augment": "rotation"}, "policy: expected one of color, translation, cutout, got 'rotation'"),
        ({}, images(), {"r1_gamma": -1}, "r1_gamma: expected a finite number of at least 0, got -1"),
        ({}, images(), {"penalty_interval": 0}, "penalty_interval: expected an int of at least 1, got 0"),
        ({}, images(), {"ema_decay": 1}, "ema_decay: expected a finite number of at least 0 and below 1, got 1"),
        ({}, images(), {"discriminator_learning_rate": 0}, "discriminator_learning_rate: expected a finite number"),
    ],
)
def test_what_does_not_fit(
    fields: dict[str, Any], data: ImageSet | SeriesSet, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        small(GANConfig(**{**SMALL, **fields}), data, tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()
    with pytest.raises(TypeError, match="data: expected ImageSet or SeriesSet for GAN, got str"):
        fit(GANConfig(**SMALL), "mnist")  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------------
# The watch, on real runs


class Modes(nn.Module):
    """A generator that learns a few pictures, and draws one of them whatever the noise, with a little noise on it."""

    def __init__(self, count: int, noise: float) -> None:
        super().__init__()
        self.pictures = nn.Parameter(torch.randn(count, 1, 8, 8))
        self.noise = noise

    def forward(self, z: Tensor) -> Tensor:
        which = (z[:, 0] * 1e4).long().remainder(len(self.pictures))
        pixels = z[:, :64].view(-1, 1, 8, 8) * self.noise
        return torch.sigmoid(self.pictures[which]) + pixels


def warned(model: GAN | GANConfig, out: Path, capsys: pytest.CaptureFixture[str], **options: Any) -> list[str]:
    """The first words of the warnings of a run of 1,250 steps on the 8x8 digits."""
    defaults = {"max_steps": 1250, "epochs": 1000, "batch_size": 32, "evaluate_every": 1000, "augment": ""}
    fit(model, load_images("digits"), out=out, tensorboard=False, progress="lines", **{**defaults, **options})
    return re.findall(r"^warning: (the \w+ has \w+)", capsys.readouterr().err, re.MULTILINE)


@pytest.mark.parametrize(("count", "noise"), [(1, 0.0), (1, 0.03), (2, 0.0)], ids=["constant", "one mode", "two modes"])
def test_a_generator_of_few_modes_is_a_collapse(
    count: int, noise: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    discriminator = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.LeakyReLU(0.2), nn.Linear(32, 1), nn.Flatten(0))
    config = GANConfig(input_shape=(1, 8, 8), latent_dim=64, data_range=None)
    model = GAN(config, generator=Modes(count, noise), discriminator=discriminator)
    warnings = warned(model, tmp_path / "run", capsys, discriminator_learning_rate=1e-4, learning_rate=2e-3)
    assert warnings.count("the generator has collapsed") == 1
    assert column(tmp_path / "run", "diversity")[-1] < 0.1


@pytest.mark.parametrize("loss", ["non_saturating", pytest.param("hinge", marks=pytest.mark.slow)])
def test_a_discriminator_that_wins_has_run_away(loss: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = GANConfig(input_shape=(1, 8, 8), architecture="mlp", hidden_sizes=(32,), latent_dim=8, loss=loss)
    options = {"learning_rate": 2e-5, "discriminator_learning_rate": 4e-3}
    warnings = warned(config, tmp_path / "run", capsys, **options)
    assert warnings.count("the discriminator has run") == 1


@pytest.mark.parametrize(
    ("loss", "options"),
    [
        ("non_saturating", {}),
        pytest.param("hinge", {"seed": 1}, marks=pytest.mark.slow),
        ("relativistic", {"r1_gamma": 0.1, "r2_gamma": 0.1, "seed": 2}),
        pytest.param("wasserstein", {"seed": 3}, marks=pytest.mark.slow),
        pytest.param("least_squares", {"seed": 4, "augment": "translation"}, marks=pytest.mark.slow),
    ],
)
def test_a_healthy_run_is_left_in_peace(
    loss: str, options: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {"hidden_sizes": (64, 64), "latent_dim": 16}
    config = GANConfig(input_shape=(1, 8, 8), architecture="mlp", loss=loss, **sizes)
    assert warned(config, tmp_path / "run", capsys, learning_rate=5e-4, **options) == []
    assert column(tmp_path / "run", "diversity")[-1] > 0.2
