"""Training of generative adversarial networks."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fastgen import _validate
from fastgen._images import image_grid, save_png
from fastgen.data import ImageSet, SeriesSet
from fastgen.evaluate.distance import RandomFeatures, frechet_distance
from fastgen.functional.adversarial import augmentation_size
from fastgen.models import GAN, GANConfig
from fastgen.random import Generator, permutation
from fastgen.train.collapse import CollapseWatch, Diversity, gradient_norm, pairwise_accuracy
from fastgen.train.plots import save_curves, save_windows
from fastgen.train.recipe import Recipe, Step, adamw, checksum, initialised

if TYPE_CHECKING:
    from accelerate import Accelerator

    from fastgen.train.config import TrainingConfig

__all__ = ["GANRecipe"]

_WATCHED = 256  # samples whose diversity is taken
_JUDGED = 1024  # held-out examples at most, and as many samples, whose distance is taken


class GANRecipe(Recipe):
    """Trains a `GAN` on images, or on windows of a series, judged by a distance of its samples to held-out data.

    A step updates the discriminator on `num_critic_steps` batches, then the generator once, on the fake examples of
    the last of them: the noise of a fake is drawn once and no network is run twice for one update. `ema` follows the
    generator; samples and evaluations are of it. Every draw has a stream of its own, addressed by the row of the
    global batch.

    Metrics: `generator_loss` and `discriminator_loss`, of the model's loss (without the penalties, which
    `penalty` has, averaged over all steps). Of the discriminator's view of the last batch `score_gap`, the mean logit
    of real examples less that of fakes, and `accuracy`, of pairs of both (`pairwise_accuracy`). At each row of training
    metrics `generator_gradient_norm` and `discriminator_gradient_norm`, of the last step, and `diversity`, of 256
    samples of the generator, always of the same noise, as a share of the data's (`Diversity`). In evaluations
    `frechet_distance`, between held-out examples and as many samples of `ema`, in features of a small network of random
    weights (`RandomFeatures`), and at the end `noise_floor`, the same between held-out and training examples: the
    least to hope for. It follows the look of digits over a run, as blur, noise, broken strokes and missing modes all
    raise it, so it decides which checkpoint is the best. It is not the FID, whose features are of a network trained
    on photographs, and depends on the number of held-out examples: no score to compare with those of other data.

    Warnings of a `CollapseWatch` come with the rows of training metrics.

    Several processes share the batches and average their gradients. Batch norm takes its statistics over the part
    of its own process, and a checkpoint has those of the first.

    Args:
        model: a model, or a configuration: then the weights are drawn from `seed`.
        train, test: images of the model's `input_shape`, whose labels are used if the model is conditional; or the
            beginning and the end of a series, for `input_shape` (T, F): examples are all its windows of T steps.
        seed: of the initial weights and of all samples.
        discriminator_learning_rate: default that of the generator, which is the `learning_rate` of the run.
        betas: of both Adam optimisers.
        num_critic_steps: updates of the discriminator a step, each on a batch of its own.
        augment: policy of `fastgen.functional.diff_augment` for all that the discriminator sees; "" for none.
        r1_gamma, r2_gamma: weights of the zero-centred gradient penalties on data and on fakes.
        penalty_interval: updates of the discriminator from one with these two penalties to the next, where they
            count as many times (Karras et al., "Analyzing and improving the image quality of StyleGAN", 2020,
            appendix B, lazy regularisation).
        gradient_penalty_weight: of the gradient penalty of WGAN-GP; default 10 for the loss "wasserstein", else 0.
        ema_decay: of the average over the generator's weights, see `GAN.update_ema`.
        num_pictures: samples in the pictures.

    Raises:
        TypeError, ValueError: for a model and data that do not fit each other, or an argument out of range.
    """

    model_type = "gan"
    metrics: ClassVar[tuple[str, ...]] = (
        *("generator_loss", "discriminator_loss", "penalty", "score_gap", "accuracy"),
        *("generator_gradient_norm", "discriminator_gradient_norm", "diversity"),
        *("frechet_distance", "noise_floor"),
    )
    criterion = "frechet_distance"
    averages_gradients = True
    defaults: ClassVar[Mapping[str, Any]] = {
        "epochs": 60,
        "learning_rate": 1e-3,
        "schedule": "constant",
        "warmup_steps": 0,
        "evaluate_every": 5,
    }

    def __init__(
        self,
        model: GAN | GANConfig,
        train: ImageSet | SeriesSet,
        test: ImageSet | SeriesSet,
        *,
        seed: int = 0,
        discriminator_learning_rate: float | None = None,
        betas: tuple[float, float] = (0.5, 0.999),
        num_critic_steps: int = 1,
        augment: str = "translation",
        r1_gamma: float = 0.0,
        r2_gamma: float = 0.0,
        penalty_interval: int = 1,
        gradient_penalty_weight: float | None = None,
        ema_decay: float = 0.999,
        num_pictures: int = 64,
    ) -> None:
        config = model.config if isinstance(model, GAN) else model
        self._train, self._test = _examples("train", train, config), _examples("test", test, config)
        for name, examples in (("train", self._train), ("test", self._test)):
            if len(examples) < 2:
                raise ValueError(f"{name}: expected at least 2 examples, got {len(examples)}")
        self._num_critic_steps = _validate.integer("num_critic_steps", num_critic_steps, 1)
        if discriminator_learning_rate is not None:
            _validate.number("discriminator_learning_rate", discriminator_learning_rate, above=0)
        if gradient_penalty_weight is None:
            gradient_penalty_weight = 10.0 if config.loss == "wasserstein" else 0.0
        self._penalty_interval = _validate.integer("penalty_interval", penalty_interval, 1)
        self._penalties = {
            "r1_gamma": _validate.number("r1_gamma", r1_gamma, minimum=0),
            "r2_gamma": _validate.number("r2_gamma", r2_gamma, minimum=0),
            "gradient_penalty_weight": _validate.number("gradient_penalty_weight", gradient_penalty_weight, minimum=0),
        }
        self._discriminator_learning_rate = discriminator_learning_rate
        self._betas = _betas(betas)
        self._augment = augment
        # Uniform numbers of a real and a fake example together; the discriminator's half adds the point between them.
        self._augmentation_noise = 2 * augmentation_size(augment, 1 + len(config.input_shape)) if augment else 0
        self._discriminator_noise = self._augmentation_noise + (1 if gradient_penalty_weight else 0)
        self._ema_decay = _validate.number("ema_decay", ema_decay, minimum=0, below=1)
        self._num_pictures = _validate.integer("num_pictures", num_pictures, 1)
        self._seed = seed
        self.data_name = train.name
        self.units_per_example = num_critic_steps
        self.model = model if isinstance(model, GAN) else initialised(lambda: GAN(model), seed)
        self._watch = CollapseWatch()

    @property
    def num_examples(self) -> int:
        """As many as can be read `num_critic_steps` at a time."""
        return len(self._train) // self._num_critic_steps

    def order(self, batch_size: int, generator: Generator) -> Tensor:
        """(steps, num_critic_steps, batch_size)."""
        steps = self.num_examples // batch_size
        rows = permutation(len(self._train), generator=generator)
        shape = (steps, self._num_critic_steps, batch_size)
        return rows[: math.prod(shape)].view(shape)

    def modules(self) -> dict[str, nn.Module]:
        return {"model": self.model}

    def compilable(self) -> tuple[nn.Module, ...]:
        if any(self._penalties.values()):
            raise ValueError("compile: expected none with a gradient penalty: it has no second derivatives")
        return self.model.generator, self.model.discriminator

    def optimizers(self, config: TrainingConfig) -> dict[str, Optimizer]:
        rate = self._discriminator_learning_rate or config.learning_rate
        return {
            "generator": adamw(self.model.generator, config, self._betas),
            "discriminator": adamw(
                self.model.discriminator, dataclasses.replace(config, learning_rate=rate), self._betas
            ),
        }

    def train_step(self, step: Step) -> dict[str, Tensor]:
        model, last = self.model, self._num_critic_steps - 1
        losses, penalties = [], []
        for critic_step, rows in enumerate(step.rows):
            real, labels = self._train.batch(rows, model.device)
            keys = range(3 * critic_step, 3 * critic_step + 3)  # fakes; augmentation for the one, and for the other
            noise = model.noise(len(rows), generator=step.generator(model.noise_per_sample, keys[0]))
            with step.autocast():
                with torch.set_grad_enabled(critic_step == last):
                    fake = model(noise, labels)
                update = step.index * self._num_critic_steps + critic_step
                output = model.discriminator_loss(
                    real,
                    labels,
                    fake=fake,
                    generator=step.generator(self._discriminator_noise, keys[1]),
                    augment=self._augment,
                    **self._penalties_of(update),
                )
            step.update("discriminator", output.loss)
            penalty = torch.zeros_like(output.loss) if output.penalty is None else output.penalty
            losses.append((output.loss - penalty).detach())
            penalties.append(penalty.detach())
        with step.autocast():
            generator_output = model.generator_loss(
                real,
                labels,
                fake=fake,
                generator=step.generator(self._augmentation_noise, keys[2]),
                augment=self._augment,
            )
        step.update("generator", generator_output.loss)
        model.update_ema(self._ema_decay)
        assert output.real_logits is not None
        return {
            "generator_loss": generator_output.loss.detach(),
            "discriminator_loss": torch.stack(losses).mean(),
            "penalty": torch.stack(penalties).mean(),
            "score_gap": (output.real_logits.detach().mean() - output.fake_logits.detach().mean()),
            "accuracy": pairwise_accuracy(output.real_logits, output.fake_logits),
        }

    def _penalties_of(self, update: int) -> dict[str, float]:
        """The weights of the penalties at an update of the discriminator, counted from 0."""
        factor = self._penalty_interval if update % self._penalty_interval == 0 else 0
        lazy = {name: factor * self._penalties[name] for name in ("r1_gamma", "r2_gamma")}
        return {**self._penalties, **lazy}

    # ------------------------------------------------------------------------------------------------
    # Figures

    @functools.cached_property
    def _diversity(self) -> Diversity:
        count = min(_WATCHED, len(self._train))
        rows = permutation(len(self._train), generator=Generator(self._seed))[:count]
        return Diversity(self._train.batch(rows, self.model.device)[0])

    def figures(self) -> dict[str, float]:
        count = self._diversity.size
        with self.model.inference():
            samples = self.model(self.model.noise(count, seed=self._seed), self._classes(count))
        return {
            "generator_gradient_norm": gradient_norm(self.model.generator.parameters()),
            "discriminator_gradient_norm": gradient_norm(self.model.discriminator.parameters()),
            "diversity": self._diversity(samples),
        }

    def remarks(self, row: Mapping[str, float]) -> list[str]:
        return self._watch(row)

    def evaluate(self, accelerator: Accelerator, generator: Generator, *, final: bool = False) -> dict[str, float]:
        # By the first process, as buffers differ between them, for all.
        values = torch.zeros(2 if final else 1, dtype=torch.float64, device=accelerator.device)
        if accelerator.is_main_process:
            features, held_out = self._held_out
            count = len(held_out)
            samples = self.model.generate(count, generator=generator, labels=self._classes(count))
            values[0] = frechet_distance(features(samples), held_out)
            if final:
                values[1] = frechet_distance(features(self._evenly(self._train, count)), held_out)
        total: list[float] = accelerator.reduce(values, "sum").tolist()
        return dict(zip(("frechet_distance", "noise_floor"), total, strict=False))

    @functools.cached_property
    def _held_out(self) -> tuple[RandomFeatures, Tensor]:
        """The features of held-out examples, and what makes them."""
        test = self._evenly(self._test, min(_JUDGED, len(self._test), len(self._train)))
        features = RandomFeatures(test)
        return features, features(test)

    def _evenly(self, examples: _Images | _Windows, count: int) -> Tensor:
        """`count` of the examples, evenly spaced: a set may be sorted by class."""
        return examples.batch(torch.arange(count) * len(examples) // count, self.model.device)[0]

    def _classes(self, count: int) -> Tensor | None:
        """Labels of samples, all classes in turn."""
        classes = self.model.config.num_classes
        return torch.arange(count, device=self.model.device) % classes if classes else None

    # ------------------------------------------------------------------------------------------------
    # Files

    def describe(self) -> dict[str, Any]:
        return {
            "model": self.model.config.to_dict(),
            "data": {
                "name": self.data_name,
                "train": len(self._train),
                "test": len(self._test),
                **self._train.names(),
                "checksum": checksum(*self._train.tensors(), *self._test.tensors()),
            },
            "recipe": {
                "discriminator_learning_rate": self._discriminator_learning_rate,
                "betas": list(self._betas),
                "num_critic_steps": self._num_critic_steps,
                "augment": self._augment,
                **self._penalties,
                "penalty_interval": self._penalty_interval,
                "ema_decay": self._ema_decay,
            },
            "evaluation": {"num_pictures": self._num_pictures},
        }

    def save_pretrained(self, folder: Path) -> None:
        self.model.save_pretrained(folder)

    def save_sample(self, path: Path) -> None:
        classes = self.model.config.num_classes
        columns = classes if 1 < classes <= 16 else None  # a column for each
        self._save_picture(path, self.model.generate(self._num_pictures, seed=self._seed), columns)

    def save_report(self, folder: Path, rows: list[dict[str, str]]) -> list[Path]:
        """samples.png, interpolation.png and loss.png."""
        samples, interpolation, loss = paths = [
            folder / name for name in ("samples.png", "interpolation.png", "loss.png")
        ]
        self.save_sample(samples)
        # From one sample to the next, a row each.
        count, steps = 8, 12
        z, labels = self.model.noise(count, seed=self._seed), self._classes(count)
        after = None if labels is None else labels.roll(-1)
        walk = self.model.interpolate(z, z.roll(-1, 0), steps=steps, labels=labels, labels_b=after)
        self._save_picture(interpolation, walk.flatten(0, 1), steps)
        titles = {
            "generator_loss": "generator's loss",
            "discriminator_loss": "discriminator's loss",
            "score_gap": "score gap",
            "accuracy": "accuracy on pairs",
            "diversity": "diversity (data: 1)",
            "frechet_distance": "Frechet distance",
        }
        save_curves(loss, rows, titles, title=f"GAN on {self.data_name}", units="")
        return paths

    def _save_picture(self, path: Path, samples: Tensor, columns: int | None) -> None:
        if isinstance(self._train, _Images):
            save_png(path, image_grid(samples, columns))
        else:
            save_windows(path, samples.cpu(), self._train.series.columns, columns, f"GAN on {self.data_name}")


@dataclasses.dataclass(frozen=True)
class _Images:
    """Examples that are images."""

    images: ImageSet
    conditional: bool

    def __len__(self) -> int:
        return len(self.images)

    def names(self) -> dict[str, list[str]]:
        return {"classes": list(self.images.classes)}

    def batch(self, rows: Tensor, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """(b, C, H, W) in [0, 1] and, for a conditional model, (b,) labels."""
        pixels, labels = self.images.batch(rows.to(self.images.images.device))
        return pixels.to(device), labels.to(device) if self.conditional and labels is not None else None

    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.images.images, self.images.labels


@dataclasses.dataclass(frozen=True)
class _Windows:
    """Examples that are the windows of a series, from every step that has enough after it."""

    series: SeriesSet
    length: int

    def __len__(self) -> int:
        return len(self.series) - self.length + 1

    def names(self) -> dict[str, list[str]]:
        return {"columns": list(self.series.columns)}

    def batch(self, rows: Tensor, device: torch.device) -> tuple[Tensor, None]:
        """(b, T, F)."""
        values = self.series.values
        places = rows.unsqueeze(1) + torch.arange(self.length)
        return values[places.to(values.device)].to(device), None

    def tensors(self) -> tuple[Tensor | None, ...]:
        return (self.series.values,)


def _examples(name: str, data: ImageSet | SeriesSet, config: GANConfig) -> _Images | _Windows:
    """The data as examples of the model."""
    shape = config.input_shape
    if isinstance(data, ImageSet):
        if data.shape != shape:
            raise ValueError(f"{name}: expected images {shape} as the model takes, got {data.shape}")
        if config.num_classes and data.labels is None:
            raise ValueError(f"{name}: expected labels for a conditional model, got none")
        if config.num_classes and len(data.classes) != config.num_classes:
            raise ValueError(f"{name}: expected {config.num_classes} classes, got {len(data.classes)}")
        return _Images(data, bool(config.num_classes))
    if not isinstance(data, SeriesSet):
        raise TypeError(f"{name}: expected an ImageSet or a SeriesSet, got {type(data).__name__}")
    if len(shape) != 2 or shape[1] != len(data.columns):
        raise ValueError(f"input_shape: expected (T, {len(data.columns)}) as the series has columns, got {shape}")
    if config.num_classes:
        raise ValueError(f"num_classes: expected 0, as windows of a series have no labels, got {config.num_classes}")
    if len(data) < shape[0]:
        raise ValueError(f"{name}: expected at least {shape[0]} steps, a window of the model, got {len(data)}")
    return _Windows(data, shape[0])


def _betas(betas: Any) -> tuple[float, float]:
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(f"betas: expected two numbers, got {betas!r}")
    first, second = (_validate.number("betas", beta, minimum=0, below=1) for beta in betas)
    return first, second
