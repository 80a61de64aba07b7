"""Training: `fit` for one call, `Trainer` and a `Recipe` for more control.

Example:
    >>> from fastgen.data import load_images
    >>> from fastgen.models import VAEConfig
    >>> from fastgen.train import fit
    >>> result = fit(VAEConfig(latent_dim=16), load_images("mnist"), out="runs/digits", epochs=10)
    >>> result.metrics["negative_elbo"]  # nats an image, on images held out
    >>> fit(VAEConfig(latent_dim=16), load_images("mnist"), out="runs/digits", epochs=10, resume=True)  # if stopped

A recurrent model takes tokens of a text, or a series (`fastgen.data.load_text`, `load_series`):
    >>> from fastgen.data import load_text
    >>> from fastgen.models import RNNConfig
    >>> from fastgen.tokenizers import train_tokenizer
    >>> text = load_text("shakespeare")
    >>> tokenizer = train_tokenizer("chars", text.text)
    >>> train, test = (part.encode(tokenizer) for part in text.split(0.05))
    >>> fit(RNNConfig(vocab_size=tokenizer.vocab_size), train, test, out="runs/plays", epochs=2, seq_len=64)

So does a GPT, from scratch or from a checkpoint:
    >>> fit(GPTConfig(vocab_size=tokenizer.vocab_size), train, test, out="runs/gpt", epochs=2)
    >>> fit(GPT.from_pretrained("gpt2/"), train, test, out="runs/tuned", lora_rank=8)  # tokens of its own tokenizer

A GAN takes images, or windows of a series; a watch warns where its samples are all alike:
    >>> fit(GANConfig(), load_images("mnist"), out="runs/gan", epochs=30)

The run folder then holds the model (`VAE.from_pretrained("runs/digits/model")`), metrics.csv, pictures and
checkpoints. A program that calls `fit` trains data-parallel when it is started by `torchrun` or
`accelerate launch`.
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any

from fastgen.data import ImageSet, SeriesSet, TokenSet
from fastgen.models import GAN, GPT, RNN, VAE, GANConfig, GPTConfig, RNNConfig, VAEConfig
from fastgen.train.config import TrainingConfig
from fastgen.train.gan import GANRecipe
from fastgen.train.gpt import GPTRecipe
from fastgen.train.logging import ProgressMode, read_metrics
from fastgen.train.recipe import Recipe, Step
from fastgen.train.rnn import RNNRecipe, RNNSeriesRecipe, RNNTextRecipe
from fastgen.train.run_folder import read_run
from fastgen.train.trainer import Interrupted, NonFiniteLossError, Trainer, TrainingResult
from fastgen.train.vae import VAERecipe

__all__ = [
    "GANRecipe",
    "GPTRecipe",
    "Interrupted",
    "NonFiniteLossError",
    "RNNRecipe",
    "RNNSeriesRecipe",
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
    model: VAE | VAEConfig | GAN | GANConfig | RNN | RNNConfig | GPT | GPTConfig,
    data: ImageSet | TokenSet | SeriesSet,
    test: ImageSet | TokenSet | SeriesSet | None = None,
    *,
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    progress: ProgressMode = "auto",
    **options: Any,
) -> TrainingResult:
    """Train a model; afterwards it has the weights of the best checkpoint.

    Args:
        model: a model, or a configuration: then the weights are drawn from `seed`.
        data: what to train on: images for a VAE, images or a series for a GAN, tokens or a series for an RNN, tokens
            for a GPT.
        test: held-out data; default the split that images bring, or a tenth of them, or the last tenth of a
            series. Tokens need it: split the text (`TextSet.split`).
        out: run folder, default `runs/<model>-<data>-<time>`. An existing one is never overwritten.
        resume: continue the run in `out`; all else as it was started, except what `Trainer` lets change.
        progress: "auto", "bar", "lines" or "quiet".
        options: fields of `TrainingConfig`, such as epochs, learning_rate, batch_size, seed, device, and arguments
            of the recipe (`VAERecipe`, `GANRecipe`, `RNNTextRecipe`, `RNNSeriesRecipe`, `GPTRecipe`), such as seq_len.

    Raises:
        TypeError, ValueError, OSError, ImportError: for arguments that do not fit; see `Trainer`.
        Interrupted, NonFiniteLossError: see `Trainer.fit`.
    """
    family = _family(model, data)
    of_config = {field.name for field in dataclasses.fields(TrainingConfig)}
    config = family.training_config(**{name: value for name, value in options.items() if name in of_config})
    of_recipe = {name: value for name, value in options.items() if name not in of_config}
    if test is None:
        if isinstance(data, TokenSet):
            raise ValueError("test: expected held-out tokens (split the text, then encode both parts), got None")
        data, test = data.split(seed=config.seed) if isinstance(data, ImageSet) else data.split()
    recipe = family(model, data, test, seed=config.seed, **of_recipe)
    return Trainer(recipe, config, out=out, resume=resume, progress=progress).fit()


def _family(model: object, data: object) -> Any:
    """The recipe for a model and its data."""
    kinds: dict[tuple[type, ...], dict[type, type[Recipe]]] = {
        (VAE, VAEConfig): {ImageSet: VAERecipe},
        (GAN, GANConfig): {ImageSet: GANRecipe, SeriesSet: GANRecipe},
        (RNN, RNNConfig): {TokenSet: RNNTextRecipe, SeriesSet: RNNSeriesRecipe},
        (GPT, GPTConfig): {TokenSet: GPTRecipe},
    }
    for models, recipes in kinds.items():
        if isinstance(model, models):
            for kind, recipe in recipes.items():
                if isinstance(data, kind):
                    return recipe
            expected = " or ".join(kind.__name__ for kind in recipes)
            raise TypeError(f"data: expected {expected} for {models[0].__name__}, got {type(data).__name__}")
    expected = ", ".join(kind.__name__ for models in kinds for kind in models)
    raise TypeError(f"model: expected one of {expected}, got {type(model).__name__}")
