from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from toys import images

from fastgen.data import ImageSet
from fastgen.models import VAE, VAEConfig, from_pretrained
from fastgen.random import Generator
from fastgen.train import TrainingResult, VAERecipe, fit, read_metrics, read_run

SMALL = {"architecture": "mlp", "hidden_sizes": (16,), "latent_dim": 3, "input_shape": (1, 8, 8)}


def small(model: VAE | VAEConfig, data: ImageSet, out: Path, **options: Any) -> TrainingResult:
    defaults = {"epochs": 2, "batch_size": 10, "log_every": 3, "tensorboard": False, "progress": "quiet"}
    return fit(model, data, out=out, **{**defaults, **options})


def test_a_run_from_python(tmp_path: Path) -> None:
    out = tmp_path / "run"
    data = images(120)
    model = VAE(**SMALL)
    result = small(model, data, out, epochs=20, learning_rate=0.01, warmup_steps=10)
    assert {path.name for path in result.files} == {
        *("samples.png", "reconstructions.png", "interpolation.png", "loss.png", "metrics.csv", "model")
    }
    assert all(path.exists() for path in result.files)
    # 64 samples in 8 columns of 8x8 pixels, eight times enlarged, with 2 between them.
    for name, columns, rows in (("samples", 8, 8), ("reconstructions", 12, 2), ("interpolation", 12, 8)):
        with Image.open(out / f"{name}.png") as picture:
            assert picture.mode == "L"
            assert picture.size == (66 * columns + 2, 66 * rows + 2), name
    with Image.open(out / "loss.png") as picture:
        assert picture.width > 1000
        assert len(picture.convert("RGB").getcolors(maxcolors=1 << 20) or []) > 20
    assert len(list((out / "samples").iterdir())) == 1 + 20

    # The model has learned, has the best weights, and so has the folder.
    table = read_metrics(out / "metrics.csv")
    bounds = [float(row["negative_elbo"]) for row in table if row["split"] == "test"]
    assert bounds[-1] < 0.75 * bounds[0]
    assert result.metrics["negative_elbo"] == min(bounds)
    assert result.metrics["negative_iwae"] == pytest.approx(min(bounds), abs=1.0)
    saved = from_pretrained(out / "model")
    assert isinstance(saved, VAE)
    assert all(torch.equal(a, b) for a, b in zip(saved.parameters(), model.parameters(), strict=True))
    record = read_run(out)
    assert record["model"]["hidden_sizes"] == [16]
    assert record["data"]["train"] == 108
    assert record["training"]["epochs"] == 20
    assert record["versions"]["torch"] == torch.__version__


def test_the_test_bound_is_that_of_the_model(tmp_path: Path) -> None:
    data = images(90)
    train, test = data.split(30)
    model = VAE(**SMALL)
    result = fit(model, train, test, out=tmp_path / "run", epochs=1, tensorboard=False, progress="quiet")
    x, _ = test.batch(slice(None))
    # Its own noise is another draw: many draws together are the expectation of both.
    with torch.no_grad():
        draws = torch.stack([-model(x, generator=Generator(seed)).elbo.mean() for seed in range(200)])
    assert abs(result.metrics["negative_elbo"] - float(draws.mean())) < 5 * float(draws.std())
    assert result.metrics["negative_elbo"] == pytest.approx(
        result.metrics["reconstruction_loss"] + result.metrics["kl"], rel=1e-12
    )
    bound = -model.importance_weighted_bound(x, num_samples=100, generator=Generator(1)).mean()
    assert result.metrics["negative_iwae"] == pytest.approx(float(bound), abs=0.3)


def test_reported_losses_are_those_of_the_steps(tmp_path: Path) -> None:
    """Recomputes the first step from what the documentation promises: seed, order, noise."""
    from fastgen.random import permutation

    data = images(50)
    config = VAEConfig(**SMALL, beta=0.5)
    small(config, data.split(0.2)[0], tmp_path / "run", test=data.split(0.2)[1], epochs=1, log_every=1, seed=3)
    first = read_metrics(tmp_path / "run" / "metrics.csv")[0]

    torch.manual_seed(3)
    model = VAE(config)
    root = Generator(3)
    order = permutation(40, generator=root.fork(0).fork(0))
    x, _ = data.split(0.2)[0].batch(order[:10])
    with torch.no_grad():
        output = model(x, generator=Generator(root.fork(1).seed))
    assert float(first["loss"]) == pytest.approx(float(output.loss), rel=1e-6)
    assert float(first["kl"]) == pytest.approx(float(output.kl.mean()), rel=1e-5)
    assert float(first["negative_elbo"]) == pytest.approx(-float(output.elbo.mean()), rel=1e-6)
    assert float(first["learning_rate"]) == pytest.approx(2e-3 / 100)


@pytest.mark.parametrize(
    ("shape", "fields"),
    [
        ((3, 9, 11), {"architecture": "conv", "channels": (4,), "likelihood": "gaussian"}),
        ((4, 8, 8), {"architecture": "mlp", "num_classes": 3, "free_bits": 0.1}),
    ],
)
def test_other_images_and_models(shape: tuple[int, int, int], fields: dict[str, Any], tmp_path: Path) -> None:
    config = VAEConfig(input_shape=shape, hidden_sizes=(8,), latent_dim=2, **fields)
    result = small(config, images(40, shape), tmp_path / "run")
    assert result.step == 6
    with Image.open(tmp_path / "run" / "samples.png") as picture:
        assert picture.mode == {3: "RGB", 4: "RGBA"}[shape[0]]


def test_resume_from_python(tmp_path: Path) -> None:
    data = images(60)
    config = VAEConfig(**SMALL)
    small(config, data, tmp_path / "once", epochs=3, schedule="constant")
    small(config, data, tmp_path / "twice", epochs=1, schedule="constant")
    small(config, data, tmp_path / "twice", epochs=3, schedule="constant", resume=True)
    once, twice = ((tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("once", "twice"))
    assert once == twice
    with pytest.raises(ValueError, match=r"data: expected checksum .*, as .* was started with"):
        small(config, images(60, seed=1), tmp_path / "twice", epochs=4, schedule="constant", resume=True)


def test_evaluation_does_not_depend_on_how_it_is_batched(monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate import Accelerator

    recipe = VAERecipe(VAEConfig(**SMALL), *images().split(30), num_importance_samples=7)
    whole = recipe.evaluate(Accelerator(cpu=True), Generator(1), final=True)
    monkeypatch.setattr("fastgen.train.vae._EVALUATED_AT_ONCE", 64 * 4)
    parts = recipe.evaluate(Accelerator(cpu=True), Generator(1), final=True)
    assert parts == pytest.approx(whole, rel=1e-6)


def test_the_importance_weighted_bound_of_a_part_of_the_images() -> None:
    from accelerate import Accelerator

    def bound(count: int | None) -> float:
        recipe = VAERecipe(config, train, test, num_importance_samples=7, num_importance_images=count)
        return recipe.evaluate(Accelerator(cpu=True), Generator(1), final=True)["negative_iwae"]

    config, (train, test) = VAEConfig(**SMALL), images(150).split(120)
    model = VAERecipe(config, train, test).model
    pixels, _ = test.batch(torch.arange(0, 120, 2))  # every second one: evenly spaced
    expected = -model.importance_weighted_bound(pixels, num_samples=7, generator=Generator(1)).double().mean()
    assert bound(60) == pytest.approx(float(expected), rel=1e-6)
    assert bound(120) == bound(500) == bound(None) != bound(60)


def test_the_final_evaluation_tells_how_far_it_is() -> None:
    from accelerate import Accelerator

    recipe = VAERecipe(VAEConfig(**SMALL), *images(150).split(120), num_importance_samples=2)
    seen: list[tuple[int, int]] = []
    recipe.progress = lambda done, total: seen.append((done, total))
    recipe.evaluate(Accelerator(cpu=True), Generator(1))
    assert seen == []
    recipe.evaluate(Accelerator(cpu=True), Generator(1), final=True)
    assert seen == [(50, 120), (100, 120), (120, 120)]


def test_weight_decay_spares_vectors() -> None:
    from fastgen.train import TrainingConfig

    recipe = VAERecipe(VAEConfig(**SMALL, likelihood="gaussian"), *images().split(10))
    optimizer = recipe.optimizers(TrainingConfig(weight_decay=0.3))["adamw"]
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert len(decays) == len(list(recipe.model.parameters()))
    assert all(decays[id(p)] == (0.3 if p.dim() > 1 else 0.0) for p in recipe.model.parameters())


@pytest.mark.parametrize(
    ("fields", "change", "message"),
    [
        ({"input_shape": (1, 9, 9)}, {}, r"train: expected images \(1, 9, 9\) as the model takes, got \(1, 8, 8\)"),
        ({"num_classes": 4}, {}, "train: expected 4 classes, got 3"),
        ({"num_classes": 3}, {"labels": None}, "train: expected labels for a conditional model, got none"),
    ],
)
def test_models_that_do_not_fit_the_data(
    fields: dict[str, Any], change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        small(VAEConfig(**{**SMALL, **fields}), dataclasses.replace(images(), **change), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_wrong_arguments(tmp_path: Path) -> None:
    with pytest.raises(
        TypeError,
        match="model: expected one of VAE, VAEConfig, GAN, GANConfig, RNN, RNNConfig, GPT, GPTConfig, got Linear",
    ):
        fit(torch.nn.Linear(2, 2), images())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="data: expected ImageSet for VAE, got str"):
        fit(VAEConfig(**SMALL), "mnist")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="epocs"):
        fit(VAEConfig(**SMALL), images(), epocs=3)
    with pytest.raises(ValueError, match="num_importance_samples: expected an int of at least 1, got 0"):
        VAERecipe(VAEConfig(**SMALL), *images().split(10), num_importance_samples=0)
    with pytest.raises(ValueError, match="progress: expected 'auto', 'bar', 'lines' or 'quiet', got 'loud'"):
        small(VAEConfig(**SMALL), images(), tmp_path / "run", progress="loud")
