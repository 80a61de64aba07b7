"""`fastgen train`."""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from fastgen.data import ImageSet, load_images
from fastgen.models import VAEConfig
from fastgen.train import Interrupted, Trainer, TrainingConfig, TrainingResult, VAERecipe, read_run
from fastgen.train.config import CHANGEABLE
from fastgen.train.run_folder import check_new_folder

__all__ = ["train"]

train = typer.Typer(no_args_is_help=True, help="Train a model.")

_TRAINING = TrainingConfig()
_MODEL = VAEConfig()
_BUILT_IN = ("mnist", "digits")

# Options that are named otherwise than the fields they set.
_OPTIONS = {"learning_rate": "lr", "kl_warmup_steps": "kl_warmup"}


def _option(help: str, *, default: object = None, panel: str, metavar: str | None = None) -> Any:
    """An option that is None unless it is given; `default` is what the library then takes."""
    if default is not None:
        help += f"  [default: {default}]"
    return typer.Option(help=help, show_default=False, rich_help_panel=panel, metavar=metavar)


@train.command("vae")
def vae(
    data: Annotated[
        str | None,
        _option(
            "Images: a folder (sub-folders are classes), an IDX, .npy or .npz file, or a built-in name: mnist, digits.",
            panel="Data",
            metavar="PATH|NAME",
        ),
    ] = None,
    image_size: Annotated[
        int | None, _option("Resize to so many pixels a side.", default="as they are", panel="Data")
    ] = None,
    image_channels: Annotated[int | None, _option("1 grey, 3 colour.", default="as they are", panel="Data")] = None,
    test_size: Annotated[
        str | None,
        _option(
            "Images to hold out: a count, or a fraction such as 0.1.",
            default="the split of the source, else 0.1",
            panel="Data",
        ),
    ] = None,
    latent_dim: Annotated[int | None, _option("Dimensions of z.", default=_MODEL.latent_dim, panel="Model")] = None,
    architecture: Annotated[
        str | None,
        _option("mlp, or conv for sides of 8 pixels and more.", default=_MODEL.architecture, panel="Model"),
    ] = None,
    hidden_sizes: Annotated[
        str | None,
        _option("Widths of the dense layers, such as 512,256.", default="by architecture", panel="Model"),
    ] = None,
    channels: Annotated[
        str | None, _option("Widths of the convolutions, such as 32,64.", default="by image size", panel="Model")
    ] = None,
    activation: Annotated[
        str | None, _option("elu, gelu, leaky_relu, relu, silu or tanh.", default=_MODEL.activation, panel="Model")
    ] = None,
    dropout: Annotated[
        float | None, _option("Of dense hidden layers, from 0 to under 1.", default=_MODEL.dropout, panel="Model")
    ] = None,
    likelihood: Annotated[
        str | None, _option("bernoulli or gaussian.", default=_MODEL.likelihood, panel="Model")
    ] = None,
    beta: Annotated[
        float | None, _option("Weight of the KL divergence; 1 is the bound.", default=_MODEL.beta, panel="Model")
    ] = None,
    kl_warmup: Annotated[
        int | None,
        _option("Steps over which that weight rises from 0.", default=_MODEL.kl_warmup_steps, panel="Model"),
    ] = None,
    free_bits: Annotated[
        float | None,
        _option("KL that a latent dimension has at no cost, in nats.", default=_MODEL.free_bits, panel="Model"),
    ] = None,
    conditional: Annotated[
        bool | None, typer.Option("--conditional", help="Tell the model the labels.", rich_help_panel="Model")
    ] = None,
    epochs: Annotated[int | None, _option("Passes over the data.", default=_TRAINING.epochs, panel="Training")] = None,
    max_steps: Annotated[int | None, _option("Stop after so many steps.", panel="Training")] = None,
    max_seconds: Annotated[
        float | None,
        _option("Stop after so many seconds. Such a run cannot be repeated exactly.", panel="Training"),
    ] = None,
    batch_size: Annotated[
        int | None,
        _option("Examples a step, over all processes.", default=_TRAINING.batch_size, panel="Training"),
    ] = None,
    lr: Annotated[
        float | None, _option("Highest learning rate.", default=_TRAINING.learning_rate, panel="Training")
    ] = None,
    schedule: Annotated[
        str | None, _option("cosine (falls to 0) or constant.", default=_TRAINING.schedule, panel="Training")
    ] = None,
    warmup_steps: Annotated[
        int | None, _option("Steps up to the highest rate.", default=_TRAINING.warmup_steps, panel="Training")
    ] = None,
    weight_decay: Annotated[
        float | None, _option("Of AdamW, decoupled.", default=_TRAINING.weight_decay, panel="Training")
    ] = None,
    max_grad_norm: Annotated[
        float | None, _option("Clip gradients to this norm.", default="no clipping", panel="Training")
    ] = None,
    seed: Annotated[
        int | None,
        _option("Of weights, split, order and noise.", default=_TRAINING.seed, panel="Training"),
    ] = None,
    device: Annotated[str | None, _option("auto, cpu or cuda.", default=_TRAINING.device, panel="Training")] = None,
    mixed_precision: Annotated[
        str | None, _option("no, bf16 or fp16.", default=_TRAINING.mixed_precision, panel="Training")
    ] = None,
    out: Annotated[
        Path | None,
        _option("New folder for the run.", default="runs/vae-DATA-TIME", panel="Run"),
    ] = None,
    resume: Annotated[
        Path | None,
        _option("Continue the run in this folder, with its own data and settings.", panel="Run", metavar="RUN"),
    ] = None,
    log_every: Annotated[
        int | None, _option("Steps between rows of metrics.", default=_TRAINING.log_every, panel="Run")
    ] = None,
    evaluate_every: Annotated[
        int | None, _option("Epochs between evaluations.", default=_TRAINING.evaluate_every, panel="Run")
    ] = None,
    save_every: Annotated[
        int | None, _option("Steps between checkpoints.", default="after evaluations", panel="Run")
    ] = None,
    keep_checkpoints: Annotated[
        int | None, _option("Latest checkpoints to keep.", default=_TRAINING.keep_checkpoints, panel="Run")
    ] = None,
    importance_samples: Annotated[
        int | None,
        _option("Samples an image for the bound at the end.", default=100, panel="Run"),
    ] = None,
    tensorboard: Annotated[
        bool | None,
        typer.Option("--tensorboard/--no-tensorboard", help="Write events.  [default: yes]", rich_help_panel="Run"),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print errors alone.", rich_help_panel="Run")] = False,
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

        torchrun --nproc-per-node 2 -m fastgen.cli train vae --data mnist
    """
    source = _given(data=data, image_size=image_size, image_channels=image_channels, test_size=test_size)
    model = _given(
        latent_dim=latent_dim,
        architecture=architecture,
        hidden_sizes=hidden_sizes and _integers("hidden-sizes", hidden_sizes),
        channels=channels and _integers("channels", channels),
        activation=activation,
        dropout=dropout,
        likelihood=likelihood,
        beta=beta,
        kl_warmup_steps=kl_warmup,
        free_bits=free_bits,
        conditional=conditional,
    )
    training = _given(
        epochs=epochs,
        max_steps=max_steps,
        max_seconds=max_seconds,
        batch_size=batch_size,
        learning_rate=lr,
        schedule=schedule,
        warmup_steps=warmup_steps,
        weight_decay=weight_decay,
        max_grad_norm=max_grad_norm,
        seed=seed,
        device=device,
        mixed_precision=mixed_precision,
        log_every=log_every,
        evaluate_every=evaluate_every,
        save_every=save_every,
        keep_checkpoints=keep_checkpoints,
        tensorboard=tensorboard,
    )
    report = _given(num_importance_samples=importance_samples)
    if resume is None:
        if data is None:
            raise ValueError("--data: expected a folder, a file, mnist or digits; or --resume RUN")
        if out is not None:
            check_new_folder(out)  # before the data is read, which may take minutes
        source["data"] = _absolute(data)
        trainer = _new_vae(source, model, training, report, out, quiet)
    else:
        for name in (*source, *model, *report, *_given(out=out), *(training.keys() - set(CHANGEABLE))):
            option = _OPTIONS.get(name, name).replace("_", "-")
            raise ValueError(f"--resume: goes on with the run as it was started, but --{option} was given too")
        trainer = _resumed_vae(resume, training, quiet)
    try:
        result = trainer.fit()
    except Interrupted as stopped:
        command = shlex.join(["fastgen", "train", "vae", "--resume", str(stopped.out)])
        if trainer.accelerator.is_main_process:
            typer.echo(f"{stopped}; to go on: {command}", err=True)
        raise typer.Exit(128 + stopped.signal) from None
    if trainer.accelerator.is_main_process and not quiet:
        _print_summary(result)


def _new_vae(
    source: dict[str, Any],
    model: dict[str, Any],
    training: dict[str, Any],
    report: dict[str, Any],
    out: Path | None,
    quiet: bool,
) -> Trainer:
    config = TrainingConfig(**training)
    train, test = _load(source, config.seed, quiet)
    if model.pop("conditional", False):
        if not train.classes:
            raise ValueError(f"--conditional: expected data with labels, {train.name} has none")
        model["num_classes"] = len(train.classes)
    recipe = VAERecipe(VAEConfig(input_shape=train.shape, **model), train, test, seed=config.seed, **report)
    record = {"source": source, "command": ["fastgen", *sys.argv[1:]]}
    return Trainer(recipe, config, out=out, name=train.name, record=record, progress="quiet" if quiet else "auto")


def _resumed_vae(run: Path, training: dict[str, Any], quiet: bool) -> Trainer:
    record = read_run(run)
    if "source" not in record:
        raise ValueError(f"{run}: was started from Python; continue it there, with fit(..., out=..., resume=True)")
    try:
        config = TrainingConfig(**{**record["training"], **training})
        model, report = VAEConfig.from_dict(record["model"]), dict(record["evaluation"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{run}: its config.json is not of this version of fastgen ({error})") from None
    recipe = VAERecipe(model, *_load(record["source"], config.seed, quiet), seed=config.seed, **report)
    return Trainer(recipe, config, out=run, resume=True, progress="quiet" if quiet else "auto")


def _load(source: Mapping[str, Any], seed: int, quiet: bool) -> tuple[ImageSet, ImageSet]:
    """The train and the test images of the options of the panel "Data"."""
    size, channels, test_size = (source.get(name) for name in ("image_size", "image_channels", "test_size"))
    with _decoding(quiet) as progress:
        try:
            images = load_images(source["data"], size=size, channels=channels, progress=progress)
        except ValueError as error:  # its arguments have other names here
            text = str(error).replace("give size=", "give --image-size")
            text = "--image-" + text if text.startswith(("channels:", "size:")) else text
            raise ValueError(text) from error
    train, test = images.split(None if test_size is None else _count_or_fraction(test_size), seed)
    if not quiet and os.environ.get("RANK", "0") == "0":
        typer.echo(f"{images}; {len(train):,} to train on, {len(test):,} to test", err=True)
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


def _print_summary(result: TrainingResult) -> None:
    metrics = result.metrics
    typer.echo(
        f"test negative ELBO {metrics['negative_elbo']:.2f} nats an image "
        f"(reconstruction {metrics['reconstruction_loss']:.2f} + KL {metrics['kl']:.2f}), "
        f"importance-weighted bound {metrics['negative_iwae']:.2f}, weights of step {result.best_step} of {result.step}"
    )
    for path in result.files:
        typer.echo(f"  {path}")
    typer.echo(f"next: {shlex.join(['fastgen', 'generate', str(result.out), '--out', 'generated.png'])}")


def _given(**options: Any) -> dict[str, Any]:
    """The options that were given."""
    return {name: value for name, value in options.items() if value is not None}


def _absolute(data: str) -> str:
    """A path that holds from any folder; a built-in name as it is."""
    return data if data in _BUILT_IN else str(Path(data).absolute())


def _integers(name: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"--{name}: expected ints with commas between them, got {text!r}") from None


def _count_or_fraction(text: str) -> int | float:
    for convert in (int, float):
        with contextlib.suppress(ValueError):
            return convert(text)
    raise ValueError(f"--test-size: expected a count or a fraction, got {text!r}")
