"""Training of the variational autoencoder."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fastgen import _validate
from fastgen._images import image_grid, save_png
from fastgen.data import ImageSet
from fastgen.models import VAE, VAEConfig
from fastgen.random import Generator
from fastgen.train.plots import save_curves
from fastgen.train.recipe import Recipe, Step, adamw, checksum, initialised

if TYPE_CHECKING:
    from accelerate import Accelerator

    from fastgen.train.config import TrainingConfig

__all__ = ["VAERecipe"]

_EVALUATED_AT_ONCE = 1 << 21  # pixels, which bounds the memory of large images


class VAERecipe(Recipe):
    """Trains a `VAE` on images with AdamW, judged by its bound on held-out ones.

    Metrics, all in nats an example: `loss` (what is minimised: with the warm-up, beta and free bits),
    `negative_elbo` = `reconstruction_loss` + `kl`, and at the end `negative_iwae`, the importance-weighted
    bound of -log p(x) (Burda et al., 2016), which is tighter.

    Args:
        model: a model, or a configuration: then the weights are drawn from `seed`.
        train: images to train on. Their labels are used if the model is conditional.
        test: held-out images.
        seed: of the initial weights and of the sample pictures.
        num_importance_samples: samples an image for `negative_iwae`.
        num_importance_images: for how many of the held-out images, evenly spaced, `negative_iwae` is taken;
            None: all. It decodes samples times images, which a large set makes slow.
        num_pictures: images in the sample grids.

    Raises:
        ValueError: for a model and data that do not fit each other.
    """

    model_type = "vae"
    metrics: ClassVar[tuple[str, ...]] = ("loss", "negative_elbo", "reconstruction_loss", "kl", "negative_iwae")
    criterion = "negative_elbo"

    def __init__(
        self,
        model: VAE | VAEConfig,
        train: ImageSet,
        test: ImageSet,
        *,
        seed: int = 0,
        num_importance_samples: int = 100,
        num_importance_images: int | None = None,
        num_pictures: int = 64,
    ) -> None:
        config = model.config if isinstance(model, VAE) else model
        for name, images in (("train", train), ("test", test)):
            if images.shape != config.input_shape:
                raise ValueError(f"{name}: expected images {config.input_shape} as the model takes, got {images.shape}")
            if config.num_classes and images.labels is None:
                raise ValueError(f"{name}: expected labels for a conditional model, got none")
            if config.num_classes and len(images.classes) != config.num_classes:
                raise ValueError(f"{name}: expected {config.num_classes} classes, got {len(images.classes)}")
        self._num_importance_samples = _validate.integer("num_importance_samples", num_importance_samples, 1)
        if num_importance_images is not None:
            _validate.integer("num_importance_images", num_importance_images, 1)
        self._num_importance_images = num_importance_images
        self._num_pictures = _validate.integer("num_pictures", num_pictures, 1)
        self._train, self._test, self._seed = train, test, seed
        self.data_name = train.name
        self.model = model if isinstance(model, VAE) else initialised(lambda: VAE(model), seed)

    @property
    def num_examples(self) -> int:
        return len(self._train)

    def modules(self) -> dict[str, nn.Module]:
        return {"model": self.model}

    def optimizers(self, config: TrainingConfig) -> dict[str, Optimizer]:
        return {"adamw": adamw(self.model, config)}

    def train_step(self, step: Step) -> dict[str, Tensor]:
        images, labels = self._batch(self._train, step.rows, self.model.device)
        generator = step.generator(self.model.noise_per_sample)
        output = step.modules["model"](images, labels, step=step.index, generator=generator)
        step.update("adamw", output.loss)
        reconstruction_loss, kl = output.reconstruction_loss.detach().mean(), output.kl.detach().mean()
        return {
            "loss": output.loss.detach(),
            "negative_elbo": reconstruction_loss + kl,
            "reconstruction_loss": reconstruction_loss,
            "kl": kl,
        }

    def evaluate(self, accelerator: Accelerator, generator: Generator, *, final: bool = False) -> dict[str, float]:
        device = accelerator.device
        batch_size = min(500, max(1, _EVALUATED_AT_ONCE // math.prod(self._test.shape)))
        sums = torch.zeros(2, dtype=torch.float64, device=device)
        # Each process takes every num_processes-th batch; the noise depends on the row, not on who has it.
        first, stride = accelerator.process_index * batch_size, accelerator.num_processes * batch_size
        with self.model.inference():
            for start in range(first, len(self._test), stride):
                rows = torch.arange(start, min(start + batch_size, len(self._test)))
                images, labels = self._batch(self._test, rows, device)
                noise = generator.clone().skip(start * self.model.noise_per_sample)
                output = self.model(images, labels, generator=noise)
                sums[0] += output.reconstruction_loss.double().sum()
                sums[1] += output.kl.double().sum()
        reconstruction_loss, kl = (accelerator.reduce(sums, "sum") / len(self._test)).tolist()
        metrics = {
            "negative_elbo": reconstruction_loss + kl,
            "reconstruction_loss": reconstruction_loss,
            "kl": kl,
        }
        return {**metrics, "negative_iwae": self._negative_iwae(accelerator, generator)} if final else metrics

    def _negative_iwae(self, accelerator: Accelerator, generator: Generator) -> float:
        count = min(self._num_importance_images or len(self._test), len(self._test))
        rows = torch.arange(count) * len(self._test) // count  # evenly spaced: a set may be sorted by class
        samples = self._num_importance_samples
        batch_size = min(50, max(1, _EVALUATED_AT_ONCE // math.prod(self._test.shape)))
        first, stride = accelerator.process_index * batch_size, accelerator.num_processes * batch_size
        total = torch.zeros((), dtype=torch.float64, device=accelerator.device)
        for start in range(first, count, stride):
            images, labels = self._batch(self._test, rows[start : start + batch_size], accelerator.device)
            noise = generator.clone().skip(start * self.model.noise_per_sample * samples)
            bound = self.model.importance_weighted_bound(images, labels, num_samples=samples, generator=noise)
            total -= bound.double().sum()
            self.progress(min(start + stride, count), count)
        return float(accelerator.reduce(total, "sum")) / count

    def describe(self) -> dict[str, Any]:
        train, test = self._train, self._test
        return {
            "model": self.model.config.to_dict(),
            "data": {
                "name": train.name,
                "train": len(train),
                "test": len(test),
                "classes": list(train.classes),
                "checksum": checksum(train.images, train.labels, test.images, test.labels),
            },
            "evaluation": {
                "num_importance_samples": self._num_importance_samples,
                "num_importance_images": self._num_importance_images,
                "num_pictures": self._num_pictures,
            },
        }

    def save_pretrained(self, folder: Path) -> None:
        self.model.save_pretrained(folder)

    def save_sample(self, path: Path) -> None:
        save_png(path, image_grid(self.model.generate(self._num_pictures, seed=self._seed)))

    def save_report(self, folder: Path, rows: list[dict[str, str]]) -> list[Path]:
        """samples.png, reconstructions.png, interpolation.png and loss.png."""
        names = ("samples.png", "reconstructions.png", "interpolation.png", "loss.png")
        samples, reconstructions, interpolation, loss = paths = [folder / name for name in names]
        self.save_sample(samples)
        device = self.model.device

        columns = min(16, len(self._test))
        images, labels = self._batch(self._test, torch.arange(columns), device)
        save_png(reconstructions, image_grid(torch.cat([images, self.model.reconstruct(images, labels)]), columns))

        # From one test image to the next, a row each.
        last = torch.arange(min(8, len(self._test)))
        a, labels_a = self._batch(self._test, last, device)
        b, labels_b = self._batch(self._test, (last + 1) % len(self._test), device)
        steps = 12
        walk = self.model.interpolate(a, b, steps=steps, labels=labels_a, labels_b=labels_b)
        save_png(interpolation, image_grid(walk.flatten(0, 1), columns=steps))

        titles = {"negative_elbo": "negative ELBO", "reconstruction_loss": "reconstruction loss", "kl": "KL divergence"}
        save_curves(loss, rows, titles, title=f"VAE on {self._train.name}")
        return paths

    def _batch(self, images: ImageSet, rows: Tensor, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """Images and the labels that the model wants, on `device`."""
        pixels, labels = images.batch(rows.to(images.images.device))
        if labels is None or not self.model.config.num_classes:
            return pixels.to(device), None
        return pixels.to(device), labels.to(device)
