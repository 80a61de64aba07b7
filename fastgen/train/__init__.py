"""Training: `fit` for one call, `Trainer` and a `Recipe` for more control.

Example:
    >>> from fastgen.data import load_images
    >>> from fastgen.models import VAEConfig
    >>> from fastgen.train import fit
    >>> result = fit(VAEConfig(latent_dim=16), load_images("mnist"), out="runs/digits", epochs=10)
    >>> result.metrics["negative_elbo"]  # nats an image, on images held out
    >>> fit(VAEConfig(latent_dim=16), load_images("mnist"), out="runs/digits", epochs=10, resume=True)  # if stopped

The run folder then holds the model (`VAE.from_pretrained("runs/digits/model")`), metrics.csv, pictures and
checkpoints. A program that calls `fit` trains data-parallel when it is started by `torchrun` or
`accelerate launch`.
"""

from __future__ import annotations

import os
from typing import Any

from fastgen.data import ImageSet
from fastgen.models import VAE, VAEConfig
from fastgen.train.config import TrainingConfig
from fastgen.train.logging import ProgressMode, read_metrics
from fastgen.train.recipe import Recipe, Step
from fastgen.train.rnn import RNNRecipe, RNNTextRecipe
from fastgen.train.run_folder import read_run
from fastgen.train.trainer import Interrupted, NonFiniteLossError, Trainer, TrainingResult
from fastgen.train.vae import VAERecipe

__all__ = [
    "Interrupted",
    "NonFiniteLossError",
    "RNNRecipe",
    "RNNTextRecipe",
    "Recipe",
    "Step",
    "Trainer",
    "TrainingConfig",
    "TrainingResult",
    "VAERecipe",
    "fit",
    "read_metrics",
    "read_run",
]


def fit(
    model: VAE | VAEConfig,
    data: ImageSet,
    test: ImageSet | None = None,
    *,
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    progress: ProgressMode = "auto",
    **options: Any,
) -> TrainingResult:
    """Train a model; afterwards it has the weights of the best checkpoint.

    Args:
        model: a model, or a configuration: then the weights are drawn from `seed`.
        data: what to train on.
        test: held-out data; default the split that `data` brings, or a tenth of it (`ImageSet.split`).
        out: run folder, default `runs/<model>-<data>-<time>`. An existing one is never overwritten.
        resume: continue the run in `out`; all else as it was started, except what `Trainer` lets change.
        progress: "auto", "bar", "lines" or "quiet".
        options: fields of `TrainingConfig`, such as epochs, learning_rate, batch_size, seed, device.

    Raises:
        TypeError, ValueError, OSError, ImportError: for arguments that do not fit; see `Trainer`.
        Interrupted, NonFiniteLossError: see `Trainer.fit`.
    """
    if not isinstance(model, (VAE, VAEConfig)):
        raise TypeError(f"model: expected a VAE or a VAEConfig, got {type(model).__name__}")
    config = VAERecipe.training_config(**options)
    train, held_out = data.split(seed=config.seed) if test is None else (data, test)
    recipe = VAERecipe(model, train, held_out, seed=config.seed)
    return Trainer(recipe, config, out=out, resume=resume, progress=progress).fit()
