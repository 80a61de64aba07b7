"""`fastgen train vae`."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar

import typer

from fastgen.cli.train import options
from fastgen.cli.train.options import option
from fastgen.cli.train.run import Family, Options, integers, run, size, tell
from fastgen.data import ImageSet, load_images
from fastgen.models import VAEConfig
from fastgen.train import TrainingConfig, TrainingResult, VAERecipe

__all__ = ["load_image_split", "train_vae"]

_MODEL = VAEConfig()
_TRAINING = VAERecipe.training_config()


def train_vae(
    context: typer.Context,
    data: Annotated[
        str | None,
        option(
            "Images: a folder (sub-folders are classes), an IDX, .npy or .npz file, or a built-in name: mnist, digits.",
            panel="Data",
            metavar="PATH|NAME",
        ),
    ] = None,
    image_size: options.ImageSize = None,
    image_channels: options.ImageChannels = None,
    test_size: Annotated[
        str | None,
        option(
            "Images to hold out: a count, or a fraction such as 0.1.",
            default="the split of the source, else 0.1",
            panel="Data",
        ),
    ] = None,
    latent_dim: Annotated[
        int | None, option("Numbers that stand for an image: z.", default=_MODEL.latent_dim, panel="Model")
    ] = None,
    architecture: Annotated[
        str | None,
        option("conv, for sides of 8 pixels and more, or mlp, for any.", default=_MODEL.architecture, panel="Model"),
    ] = None,
    hidden_sizes: Annotated[
        str | None,
        option("Widths of the dense layers, such as 512,256.", default="by architecture", panel="Model"),
    ] = None,
    channels: Annotated[
        str | None, option("Widths of the convolutions, such as 32,64.", default="by image size", panel="Model")
    ] = None,
    activation: Annotated[
        str | None, option("elu, gelu, leaky_relu, relu, silu or tanh.", default=_MODEL.activation, panel="Model")
    ] = None,
    dropout: Annotated[
        float | None, option("Of dense hidden layers, from 0 to under 1.", default=_MODEL.dropout, panel="Model")
    ] = None,
    likelihood: Annotated[
        str | None,
        option(
            "bernoulli, for drawings in black and white, or gaussian, for photographs.",
            default=_MODEL.likelihood,
            panel="Model",
        ),
    ] = None,
    beta: Annotated[
        float | None,
        option(
            "Weight of the KL divergence: 1 maximises the bound, more makes z simpler.",
            default=_MODEL.beta,
            panel="Model",
        ),
    ] = None,
    kl_warmup: Annotated[
        int | None,
        option("Steps over which that weight rises from 0.", default=_MODEL.kl_warmup_steps, panel="Model"),
    ] = None,
    free_bits: Annotated[
        float | None,
        option("KL that a latent dimension has at no cost, in nats.", default=_MODEL.free_bits, panel="Model"),
    ] = None,
    conditional: options.Conditional = None,
    epochs: Annotated[int | None, option("Passes over the data.", default=_TRAINING.epochs, panel="Training")] = None,
    max_steps: options.MaxSteps = None,
    max_seconds: options.MaxSeconds = None,
    patience: options.Patience = None,
    batch_size: Annotated[
        int | None,
        option("Examples a step, over all processes.", default=_TRAINING.batch_size, panel="Training"),
    ] = None,
    lr: Annotated[
        float | None, option("Highest learning rate.", default=_TRAINING.learning_rate, panel="Training")
    ] = None,
    schedule: options.Schedule = None,
    warmup_steps: options.WarmupSteps = None,
    weight_decay: options.WeightDecay = None,
    max_grad_norm: Annotated[
        float | None, option("Clip gradients to this norm.", default="no clipping", panel="Training")
    ] = None,
    seed: options.Seed = None,
    device: options.Device = None,
    dtype: options.DType = None,
    compile: options.Compile = None,
    out: options.Out = None,
    resume: options.Resume = None,
    config: options.Config = None,
    print_config: options.PrintConfig = False,
    log_every: options.LogEvery = None,
    evaluate_every: options.EvaluateEvery = None,
    evaluate_steps: options.EvaluateSteps = None,
    save_every: options.SaveEvery = None,
    keep_checkpoints: options.KeepCheckpoints = None,
    importance_samples: Annotated[
        int | None,
        option("Samples an image for the importance-weighted bound at the end.", default=100, panel="Run"),
    ] = None,
    importance_images: Annotated[
        int | None,
        option("Held-out images for that bound: fewer are quicker, all are exact.", default="all", panel="Run"),
    ] = None,
    tensorboard: options.Tensorboard = None,
    quiet: options.Quiet = False,
) -> None:
    """Train a variational autoencoder on images.

    The run folder gets checkpoints, metrics.csv, pictures and, in model/, the weights of the best checkpoint, judged
    by the bound on held-out images. Ctrl-C saves a checkpoint first. The same command and seed give the same run;
    on the CPU also if it was killed and resumed in between.

    Examples:

        fastgen train vae --data mnist

        fastgen train vae --data photos/ --image-size 64 --likelihood gaussian --out runs/photos

        fastgen train vae --data mnist --conditional --latent-dim 10 --epochs 60 --seed 1

        fastgen train vae --resume runs/photos --epochs 100

        torchrun --nproc-per-node 2 -m fastgen train vae --data mnist
    """
    run(_VAE(), context.params)


class _VAE(Family):
    recipe = VAERecipe
    expected_data = "a folder, a file, mnist or digits"
    paths: ClassVar = {"data": ("mnist", "digits")}
    source = ("data", "image_size", "image_channels", "test_size")
    report = ("num_importance_samples", "num_importance_images")

    def new(self, source: Options, model: Options, report: Options, config: TrainingConfig, quiet: bool) -> VAERecipe:
        for name in ("hidden_sizes", "channels"):
            if name in model:
                model[name] = integers(name.replace("_", "-"), model[name])
        conditional = model.pop("conditional", False)
        train, test = load_image_split(source, config.seed, quiet)
        if conditional:
            if not train.classes:
                raise ValueError(f"--conditional: expected data with labels, {train.name} has none")
            model["num_classes"] = len(train.classes)
        return VAERecipe(VAEConfig(input_shape=train.shape, **model), train, test, seed=config.seed, **report)

    def again(self, folder: Path, record: Mapping[str, Any], config: TrainingConfig, quiet: bool) -> VAERecipe:
        model, report = VAEConfig.from_dict(record["model"]), dict(record["evaluation"])
        return VAERecipe(model, *load_image_split(record["source"], config.seed, quiet), seed=config.seed, **report)

    def summary(self, result: TrainingResult) -> str:
        metrics = result.metrics
        return (
            f"test negative ELBO {metrics['negative_elbo']:.2f} nats an image "
            f"(reconstruction {metrics['reconstruction_loss']:.2f} + KL {metrics['kl']:.2f}), "
            f"importance-weighted bound {metrics['negative_iwae']:.2f}, "
            f"weights of step {result.best_step} of {result.step}"
        )

    def next_command(self, result: TrainingResult) -> list[str]:
        return ["generate", str(result.out), "--out", "generated.png"]


def load_image_split(source: Mapping[str, Any], seed: int, quiet: bool) -> tuple[ImageSet, ImageSet]:
    """The train and the test images of the options of the panel "Data"."""
    side, channels, test_size = (source.get(name) for name in ("image_size", "image_channels", "test_size"))
    with _decoding(quiet) as progress:
        try:
            images = load_images(source["data"], size=side, channels=channels, progress=progress)
        except ValueError as error:  # its arguments have other names here
            text = str(error).replace("give size=", "give --image-size")
            text = "--image-" + text if text.startswith(("channels:", "size:")) else text
            raise ValueError(text) from error
    train, test = images.split(None if test_size is None else size("test-size", test_size), seed)
    tell(f"{images}; {len(train):,} to train on, {len(test):,} to test", quiet)
    return train, test


@contextlib.contextmanager
def _decoding(quiet: bool) -> Iterator[Callable[[int, int], None] | None]:
    """A bar while files are read, in a terminal."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("reading images", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
