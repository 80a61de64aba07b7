"""`fastgen evaluate`: figures of a trained model on data that it has not seen."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from fastgen import _files
from fastgen.cli.model import device_of, dtype_of, model_folder, refuse
from fastgen.cli.train.gan import load_split
from fastgen.cli.train.rnn import load_series_split
from fastgen.cli.train.text import tokens_again
from fastgen.cli.train.vae import load_image_split
from fastgen.data import SeriesSet, TokenSet, load_images, load_series, load_text
from fastgen.evaluate import evaluate_series, evaluate_text
from fastgen.models import GAN, GPT, RNN, VAE, from_pretrained
from fastgen.train import GANRecipe, TrainingConfig, VAERecipe, read_run
from fastgen.train.recipe import checksum
from fastgen.train.trainer import evaluate_recipe

__all__ = ["evaluate"]

Figures = dict[str, Any]


def evaluate(
    context: typer.Context,
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder of `fastgen train`, or a model folder.")],
    data: Annotated[
        str | None,
        typer.Option(
            help="What to score instead, all of it: what `fastgen train` takes for --data. Images are brought to the "
            "size that the model takes. Not of a GAN.  [default: what the run held out]",
            show_default=False,
            metavar="PATH|NAME",
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            help="Text and series. Of an RNN the parallel streams at most, each from zeros: 1 is the exact figure. Of "
            "a GPT the windows at a time, which changes memory alone.  [default: 32, 1 for a series]",
            show_default=False,
        ),
    ] = None,
    seq_len: Annotated[
        int | None,
        typer.Option(
            help="Text and series: steps at a time. Of an RNN it changes memory alone, of a GPT from how much it "
            "predicts.  [default: 256; the context of a GPT]",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(help="Of the noise of a VAE or GAN.  [default: that of the run]", show_default=False),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[
        str | None,
        typer.Option(
            help="What to compute in: float32, bfloat16 or float16.  [default: that of the weights]",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="A .json to write the figures to as well; one that is there is replaced.")
    ] = None,
) -> None:
    """Score a trained model on held-out data.

    Text: loss (nats a token), perplexity, bits a character and a byte. A series: loss (nats a step, in the units of
    the data) and the root mean square error of each column, one step ahead. A VAE: the bounds on -log p(x), in nats
    an image. A GAN: the Frechet distance to held-out data, and that between data and data.

    Without --data it is what the run held out, which must be as it was when the run began.

    Examples:

        fastgen evaluate runs/plays

        fastgen evaluate runs/plays --data novel.txt --batch-size 1 --out figures.json

        fastgen evaluate runs/weather --data next-year.csv

        fastgen evaluate runs/digits --seed 1
    """
    given = {name: value for name, value in context.params.items() if value is not None}
    if out is not None and out.suffix.lower() != ".json":
        raise ValueError(f"--out: expected a .json, got {out}")
    target = device_of(device)
    folder = model_folder(run)
    model = from_pretrained(folder, target, dtype_of(dtype))
    around = folder.absolute().parent
    record = read_run(around) if (around / "config.json").is_file() else {}
    if data is None and "source" not in record:
        why = f"{around} was started from Python" if record else f"{folder} is not in the folder of a run"
        raise ValueError(f"--data: expected what to score, as {why} and does not say where its data is, got none")
    if isinstance(model, (GPT, RNN)):
        refuse(given, ("seed",), f"{run} is scored without noise")
        reading: Figures = {name: given[name] for name in ("batch_size", "seq_len") if name in given}
        if isinstance(model, GPT) or model.is_text:
            figures = _text(model, around, record, data, reading)
        else:
            figures = _series(model, around, record, data, reading)
    else:
        refuse(given, ("batch_size", "seq_len"), f"{run} makes no text and continues no series")
        training = record.get("training", {})
        config = TrainingConfig(
            seed=training.get("seed", 0) if seed is None else seed,
            device="cuda" if target.type == "cuda" else "cpu",
        )
        if isinstance(model, VAE):
            figures = _vae(model, around, record, data, config)
        else:
            assert isinstance(model, GAN)
            refuse(given, ("data",), f"{run} is a GAN, which is judged by what its run trained on and held out")
            figures = _gan(model, around, record, config)
    _print(figures)
    if out is not None:
        text = json.dumps({"run": str(run.absolute()), **_finite(figures)}, indent=2, allow_nan=False)
        _files.write_text(out, text + "\n")
        typer.echo(f"wrote {out}")


def _text(model: RNN | GPT, run: Path, record: Mapping[str, Any], data: str | None, reading: Figures) -> Figures:
    tokens: TokenSet
    if data is None:
        train, tokens = tokens_again(run, record["source"], quiet=False)
        _as_it_was(run, record, checksum(train.tokens, tokens.tokens))
    else:
        if model.tokenizer is None:
            raise ValueError("--data: expected none, as the model has no tokenizer to read it with")
        text = load_text(data)
        try:
            tokens = text.encode(model.tokenizer)
        except ValueError as error:
            raise ValueError(f"--data: expected a text that the tokenizer of the model can read, but {error}") from None
    score = evaluate_text(model, tokens, **reading)
    return {
        "data": tokens.name,
        "loss": score.loss,
        "perplexity": score.perplexity,
        "bits_per_character": score.bits_per_character,
        "bits_per_byte": score.bits_per_byte,
        "num_tokens": score.num_tokens,
        "num_characters": tokens.num_characters,
    }


def _series(model: RNN, run: Path, record: Mapping[str, Any], data: str | None, reading: Figures) -> Figures:
    source = record.get("source", {})
    series: SeriesSet
    if data is None:
        train, series = load_series_split(source, quiet=False)
        _as_it_was(run, record, checksum(train.values, series.values))
    elif Path(data).suffix.lower() in (".csv", ".tsv", ".txt"):
        columns = source.get("columns")
        series = load_series(data, columns=columns and columns.split(","), time_column=source.get("time_column"))
    else:
        series = load_series(data)  # it has no names to choose columns by
    if len(series.columns) != model.config.input_size:
        expected = f"{model.config.input_size} columns as the model has"
        raise ValueError(f"--data: expected {expected}, got {len(series.columns)}: {', '.join(series.columns)}")
    score = evaluate_series(model, series, **reading)
    return {
        "data": series.name,
        "loss": score.loss,
        "rmse": dict(zip(series.columns, score.rmse, strict=True)),
        "num_steps": score.num_steps,
    }


def _vae(model: VAE, run: Path, record: Mapping[str, Any], data: str | None, config: TrainingConfig) -> Figures:
    if data is None:
        train, test = load_image_split(record["source"], record["training"]["seed"], quiet=False)
    else:
        channels, *size = model.config.input_shape
        train = test = load_images(data, size=(size[0], size[1]), channels=channels)
    try:
        recipe = VAERecipe(model, train, test, seed=config.seed, **record.get("evaluation", {}))
    except ValueError as error:
        raise ValueError(f"--data: {str(error).removeprefix('train: ')}") from None
    if data is None:
        _as_it_was(run, record, recipe.describe()["data"]["checksum"])
    return {"data": test.name, **evaluate_recipe(recipe, config), "num_images": len(test)}


def _gan(model: GAN, run: Path, record: Mapping[str, Any], config: TrainingConfig) -> Figures:
    train, test = load_split(record["source"], TrainingConfig(seed=record["training"]["seed"]), quiet=False)
    recipe = GANRecipe(model, train, test, seed=config.seed)
    _as_it_was(run, record, recipe.describe()["data"]["checksum"])
    return {"data": test.name, **evaluate_recipe(recipe, config)}


def _as_it_was(run: Path, record: Mapping[str, Any], found: str) -> None:
    """Raise ValueError where the data of the run has changed: the model may have seen what would be scored."""
    if record["data"].get("checksum", found) != found:
        raise ValueError(
            f"--data: expected one, as {record['source']['data']} is no longer what {run} was started with, got none"
        )


def _print(figures: Figures) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, show_header=False)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in figures.items():
        words = name.replace("num_", "").replace("_", " ")
        for column, each in value.items() if isinstance(value, dict) else [("", value)]:
            shown = f"{each:.6g}" if isinstance(each, float) else f"{each:,}" if isinstance(each, int) else each
            table.add_row(escape(f"{words} {column}".rstrip()), escape(shown))
    Console().print(table)


def _finite(value: Any) -> Any:
    """JSON has no infinity, which a perplexity may be: None instead."""
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
