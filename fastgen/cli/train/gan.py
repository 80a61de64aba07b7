"""`fastgen train gan`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar

import typer

from fastgen.cli.train import options
from fastgen.cli.train.options import option
from fastgen.cli.train.rnn import load_series_split
from fastgen.cli.train.run import Family, Options, integers, run
from fastgen.cli.train.vae import load_image_split
from fastgen.data import ImageSet, SeriesSet
from fastgen.models import GANConfig
from fastgen.train import GANRecipe, TrainingConfig, TrainingResult

__all__ = ["load_split", "train_gan"]

_MODEL = GANConfig()
_TRAINING = GANRecipe.training_config()
_FORMULAS = ("sine", "mackey-glass")
_BUILT_IN = ("mnist", "digits", *_FORMULAS)
_WINDOW = 64
# Options of the recipe; the others of the panel "Model" are fields of the configuration.
_RECIPE = (
    *("discriminator_learning_rate", "betas", "num_critic_steps", "augment", "ema_decay"),
    *("r1_gamma", "r2_gamma", "penalty_interval", "gradient_penalty_weight"),
)


def train_gan(
    context: typer.Context,
    data: Annotated[
        str | None,
        option(
            "Images: a folder (sub-folders are classes), an IDX, .npy or .npz file, mnist or digits. Or a series, of "
            "which windows are learnt: a .csv, .tsv or .txt file, with --window a .npy or .npz, sine or mackey-glass.",
            panel="Data",
            metavar="PATH|NAME",
        ),
    ] = None,
    image_size: options.ImageSize = None,
    image_channels: options.ImageChannels = None,
    window: Annotated[
        int | None, option("Steps of a series that make an example.", default=f"{_WINDOW} of a series", panel="Data")
    ] = None,
    columns: Annotated[
        str | None,
        option("Columns of the series, by name, such as high,low.", default="all but the time", panel="Data"),
    ] = None,
    time_column: Annotated[str | None, option("Column of the series to leave out.", panel="Data")] = None,
    test_size: Annotated[
        str | None,
        option(
            "What to hold out: a count, or a fraction such as 0.1; of a series the end.",
            default="the split of the source, else 0.1",
            panel="Data",
        ),
    ] = None,
    latent_dim: Annotated[
        int | None, option("Random numbers that a sample is made of: z.", default=_MODEL.latent_dim, panel="Model")
    ] = None,
    architecture: Annotated[
        str | None,
        option(
            "conv (DCGAN), for sides of 8 pixels or steps and more; mlp, for any; lstm, for a series.",
            default=_MODEL.architecture,
            panel="Model",
        ),
    ] = None,
    hidden_sizes: Annotated[
        str | None,
        option(
            "Widths of the discriminator's dense or LSTM layers, such as 512,256; the generator mirrors them.",
            default="by architecture",
            panel="Model",
        ),
    ] = None,
    channels: Annotated[
        str | None,
        option("Widths of its convolutions, such as 32,64; mirrored too.", default="by image size", panel="Model"),
    ] = None,
    activation: Annotated[
        str | None, option("elu, gelu, leaky_relu, relu, silu or tanh.", default=_MODEL.activation, panel="Model")
    ] = None,
    normalization: Annotated[
        str | None, option("Of the generator: batch, layer or none.", default=_MODEL.normalization, panel="Model")
    ] = None,
    discriminator_normalization: Annotated[
        str | None,
        option(
            "Of the discriminator; batch goes with no gradient penalty.",
            default=_MODEL.discriminator_normalization,
            panel="Model",
        ),
    ] = None,
    spectral_norm: Annotated[
        bool | None,
        option("Divide the discriminator's weights by their largest singular value.", default="no", panel="Model"),
    ] = None,
    loss: Annotated[
        str | None,
        option(
            "minimax, non_saturating, least_squares, hinge, wasserstein (with a gradient penalty) or relativistic.",
            default=_MODEL.loss,
            panel="Model",
        ),
    ] = None,
    conditional: options.Conditional = None,
    epochs: Annotated[int | None, option("Passes over the data.", default=_TRAINING.epochs, panel="Training")] = None,
    max_steps: options.MaxSteps = None,
    max_seconds: options.MaxSeconds = None,
    patience: options.Patience = None,
    batch_size: Annotated[
        int | None,
        option("Examples an update, over all processes.", default=_TRAINING.batch_size, panel="Training"),
    ] = None,
    lr: Annotated[
        float | None, option("Learning rate of the generator.", default=_TRAINING.learning_rate, panel="Training")
    ] = None,
    discriminator_lr: Annotated[
        float | None,
        option("Of the discriminator: lower where it runs away.", default="that of the generator", panel="Training"),
    ] = None,
    betas: Annotated[
        str | None, option("Of both Adam optimisers, such as 0,0.99.", default="0.5,0.999", panel="Training")
    ] = None,
    critic_steps: Annotated[
        int | None,
        option("Updates of the discriminator for one of the generator.", default=1, panel="Training"),
    ] = None,
    augment: Annotated[
        str | None,
        option(
            "DiffAugment, for all that the discriminator sees, so that it does not learn few data by heart: any of "
            "color, translation, cutout, with commas; or none.",
            default="translation",
            panel="Training",
        ),
    ] = None,
    r1: Annotated[
        float | None,
        option("Weight of the gradient penalty on data: steadies the game.", default="0", panel="Training"),
    ] = None,
    r2: Annotated[float | None, option("The same on generated examples.", default="0", panel="Training")] = None,
    penalty_interval: Annotated[
        int | None,
        option("Take these two every so many updates only, as many times as strong.", default=1, panel="Training"),
    ] = None,
    gradient_penalty: Annotated[
        float | None,
        option("Weight of the gradient penalty of WGAN-GP.", default="10 for wasserstein, else 0", panel="Training"),
    ] = None,
    ema_decay: Annotated[
        float | None,
        option(
            "Of the average over the generator's weights that samples are drawn with.", default=0.999, panel="Training"
        ),
    ] = None,
    schedule: Annotated[
        str | None, option("cosine (falls to 0) or constant.", default=_TRAINING.schedule, panel="Training")
    ] = None,
    warmup_steps: Annotated[
        int | None, option("Steps up to the highest rate.", default=_TRAINING.warmup_steps, panel="Training")
    ] = None,
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
    evaluate_every: Annotated[
        int | None, option("Epochs between evaluations.", default=_TRAINING.evaluate_every, panel="Run")
    ] = None,
    evaluate_steps: options.EvaluateSteps = None,
    save_every: options.SaveEvery = None,
    keep_checkpoints: options.KeepCheckpoints = None,
    pictures: Annotated[int | None, option("Samples in the pictures.", default=64, panel="Run")] = None,
    tensorboard: options.Tensorboard = None,
    quiet: options.Quiet = False,
) -> None:
    """Train a generative adversarial network on images, or on windows of a series.

    A generator makes examples of random numbers, a discriminator learns to tell them from the data, and each learns
    from the other. No loss says how well it goes: the pictures in samples/ do, always of the same random numbers, and
    the distance of samples to held-out data (Frechet, lower is better), which decides the best checkpoint.

    It warns when the generator makes the same sample from all numbers (mode collapse), and when the discriminator has
    run away. What may help: --augment, --r1 0.1, --loss relativistic, a lower --discriminator-lr. The columns diversity
    (1: as varied as the data), accuracy and score_gap of metrics.csv show it coming.

    The run folder gets checkpoints, metrics.csv, pictures and, in model/, the best weights. Ctrl-C saves a checkpoint
    first. The same command and seed give the same run; on the CPU also if it was killed and resumed in between.

    Examples:

        fastgen train gan --data mnist

        fastgen train gan --data photos/ --image-size 64 --augment color,translation,cutout --r1 0.1 --out runs/photos

        fastgen train gan --data mnist --conditional --loss hinge --spectral-norm

        fastgen train gan --data mnist --loss relativistic --r1 0.5 --r2 0.5 --betas 0,0.99

        fastgen train gan --data weather.csv --columns high,low --window 48 --architecture lstm --loss wasserstein

        fastgen train gan --resume runs/photos --epochs 200

        torchrun --nproc-per-node 2 -m fastgen train gan --data mnist
    """
    run(_GAN(), context.params)


class _GAN(Family):
    recipe = GANRecipe
    expected_data = "a folder, a file, mnist, digits, sine or mackey-glass"
    paths: ClassVar = {"data": _BUILT_IN}
    source = ("data", "image_size", "image_channels", "window", "columns", "time_column", "test_size")
    report = ("num_pictures",)

    def new(self, source: Options, model: Options, report: Options, config: TrainingConfig, quiet: bool) -> GANRecipe:
        for name in ("hidden_sizes", "channels"):
            if name in model:
                model[name] = integers(name.replace("_", "-"), model[name])
        of_recipe = {name: model.pop(name) for name in _RECIPE if name in model}
        if "betas" in of_recipe:
            of_recipe["betas"] = _numbers("betas", of_recipe["betas"])
        if of_recipe.get("augment") == "none":
            of_recipe["augment"] = ""
        conditional = model.pop("conditional", False)
        train, test = load_split(source, config, quiet)
        if conditional:
            if isinstance(train, SeriesSet) or not train.classes:
                raise ValueError(f"--conditional: expected data with labels, {train.name} has none")
            model["num_classes"] = len(train.classes)
        if isinstance(train, SeriesSet):
            model["data_range"] = _range(train)
            shape: tuple[int, ...] = (source.get("window", _WINDOW), len(train.columns))
        else:
            shape = train.shape
        return GANRecipe(GANConfig(input_shape=shape, **model), train, test, seed=config.seed, **of_recipe, **report)

    def again(self, folder: Path, record: Mapping[str, Any], config: TrainingConfig, quiet: bool) -> GANRecipe:
        model, of_recipe = GANConfig.from_dict(record["model"]), dict(record["recipe"])
        train, test = load_split(record["source"], config, quiet)
        return GANRecipe(model, train, test, seed=config.seed, **of_recipe, **record["evaluation"])

    def summary(self, result: TrainingResult) -> str:
        metrics = result.metrics
        return (
            f"Frechet distance {metrics['frechet_distance']:.4f} to held-out data "
            f"({metrics['noise_floor']:.4f} between data and data), "
            f"weights of step {result.best_step} of {result.step}"
        )

    def next_command(self, result: TrainingResult) -> list[str]:
        return ["generate", str(result.out), "--out", "generated.png"]


def _is_series(source: Mapping[str, Any]) -> bool:
    suffix = Path(source["data"]).suffix.lower()
    return source["data"] in _FORMULAS or "window" in source or suffix in (".csv", ".tsv", ".txt")


def load_split(
    source: Mapping[str, Any], config: TrainingConfig, quiet: bool
) -> tuple[ImageSet, ImageSet] | tuple[SeriesSet, SeriesSet]:
    """What to train on and what to hold out."""
    if not _is_series(source):
        for name in ("columns", "time_column"):
            if name in source:
                raise ValueError(f"{name}: expected none for images, got {source[name]!r}")
        if source["data"] not in _BUILT_IN and not Path(source["data"]).exists():
            raise FileNotFoundError(f"{source['data']}: no such file or folder, and not {', '.join(_BUILT_IN)}")
        return load_image_split(source, config.seed, quiet)
    for name in ("image_size", "image_channels"):
        if name in source:
            raise ValueError(f"{name}: expected none for a series, got {source[name]!r}")
    return load_series_split(source, quiet)


def _range(series: SeriesSet) -> tuple[float, float]:
    """The range of the values, and a tenth of it more, as a generator comes near its limits only."""
    low, high = float(series.values.min()), float(series.values.max())
    margin = 0.05 * (high - low) or 1.0
    return low - margin, high + margin


def _numbers(name: str, text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"--{name}: expected numbers with commas between them, got {text!r}") from None
