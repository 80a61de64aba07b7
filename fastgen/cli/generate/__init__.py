"""`fastgen generate`: pictures, text or a series, whatever the model makes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fastgen import _validate
from fastgen.cli.generate.images import draw_images
from fastgen.cli.generate.series import continue_series
from fastgen.cli.generate.text import write_text
from fastgen.cli.generate.windows import draw_windows
from fastgen.cli.model import device_of, dtype_of, model_folder, refuse
from fastgen.models import GAN, GPT, RNN, VAE, from_pretrained

__all__ = ["generate"]

# What the options that not all models take are for.
_IMAGES = {"labels", "columns"}
_TEXT = {"prompt", "stream", "top_k", "top_p", "min_p", "repetition_penalty", "stop"}
_SERIES = {"series"}
_STEPS = {"max_new_tokens"}
_GAN = {"truncation"}


def _option(help: str, *, default: object = None, panel: str, metavar: str | None = None) -> Any:
    """An option that is None unless it is given; `default` is what is taken then."""
    if default is not None:
        help += f"  [default: {default}]"
    return typer.Option(help=help, show_default=False, rich_help_panel=panel, metavar=metavar)


def generate(
    context: typer.Context,
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder of `fastgen train`, or a model folder.")],
    n: Annotated[
        int | None, typer.Option("--n", help="How many.  [default: 64 pictures, 1 text or series]", show_default=False)
    ] = None,
    seed: Annotated[
        int,
        typer.Option(
            help="Same seed, same result, whatever the device. Of several the first has this seed, the next one more, "
            "and so on: each text or series is what it would be alone."
        ),
    ] = 0,
    temperature: Annotated[
        float | None,
        typer.Option(
            help="Under 1 more typical, less varied; 0: the likeliest token, the mean of the next step. Not of a GAN, "
            "see --truncation.  [default: 1]",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Pictures: a .png with all of them in a grid, a .npy (float32, (n, C, H, W), 0 to 1), or a new folder "
            "of single PNGs. Text: a file. A series: a .csv, a .npy ((n, steps, columns)), or a .png that shows it.  "
            "[default: generated.png; else the terminal]",
            show_default=False,
        ),
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            help="Tokens of a text, steps of a series to add at most.  [default: 500; 200]", show_default=False
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[
        str | None,
        typer.Option(
            help="What to compute in: float32, bfloat16 or float16.  [default: that of the weights]",
            show_default=False,
        ),
    ] = None,
    prompt: Annotated[
        list[str] | None,
        _option("What to continue; may be given several times.", default="a new line", panel="Text", metavar="TEXT"),
    ] = None,
    stream: Annotated[
        bool | None, typer.Option("--stream", help="Show the text as it comes.", rich_help_panel="Text")
    ] = None,
    top_k: Annotated[int | None, _option("Draw from the k likeliest tokens.", panel="Text")] = None,
    top_p: Annotated[
        float | None,
        _option("Draw from the fewest likeliest tokens with this share of the probability.", panel="Text"),
    ] = None,
    min_p: Annotated[
        float | None,
        _option("Draw from the tokens with at least this share of the likeliest one's probability.", panel="Text"),
    ] = None,
    repetition_penalty: Annotated[
        float | None, _option("Above 1: makes tokens less likely that were there before.", panel="Text")
    ] = None,
    stop: Annotated[
        list[str] | None,
        _option("End where this text comes; may be given several times.", panel="Text", metavar="TEXT"),
    ] = None,
    series: Annotated[
        str | None,
        _option(
            "The series to continue, as `fastgen train rnn --data` takes it.",
            default="the data of the run",
            panel="Series",
            metavar="PATH|NAME",
        ),
    ] = None,
    labels: Annotated[
        str | None,
        _option(
            "Classes to draw, for a conditional model: names of the data's classes or numbers from 0; several "
            "with commas are taken in turn.",
            default="all in turn",
            panel="Pictures",
        ),
    ] = None,
    truncation: Annotated[
        float | None,
        _option(
            "Of a GAN: cut the normal numbers that samples are made of at so many standard deviations; lower, such as "
            "0.7, for more typical and less varied ones.",
            default="not cut",
            panel="Pictures",
        ),
    ] = None,
    columns: Annotated[
        int | None, _option("Pictures a row of the grid.", default="about a square", panel="Pictures")
    ] = None,
) -> None:
    """Draw samples from a trained model: pictures, text that goes on where a prompt ends, or the rest of a series.

    Examples:

        fastgen generate runs/digits --n 64 --seed 1 --out grid.png

        fastgen generate runs/digits --n 10 --labels 3 --out threes.png

        fastgen generate runs/pets --n 20 --labels cat,dog --out pets.png

        fastgen generate runs/digits --n 10000 --out samples.npy

        fastgen generate runs/gan --truncation 0.7 --out typical.png

        fastgen generate runs/plays --prompt "HAMLET:" --stream --temperature 0.8

        fastgen generate runs/plays --prompt "Enter " --n 5 --seed 7 --top-p 0.9 --stop "." --out entries.txt

        fastgen generate runs/plays --prompt "ROMEO:" --prompt "JULIET:" --seed 7

        fastgen generate runs/weather --max-new-tokens 48 --n 20 --out ahead.png
    """
    given = {name: value for name, value in context.params.items() if value not in (None, [], ())}
    if n is not None:
        _validate.integer("n", n, 1)
    if columns is not None:
        _validate.integer("columns", columns, 1)
    folder = model_folder(run)
    model = from_pretrained(folder, device_of(device), dtype_of(dtype))
    if isinstance(model, GAN):
        images = len(model.config.input_shape) == 3
        refuse(given, _TEXT | _SERIES | _STEPS | {"temperature"}, f"{run} is a GAN")
        if images:
            draw_images(model, folder, given)
        else:
            refuse(given, {"labels"}, f"{run} makes windows of a series")
            draw_windows(model, folder, given)
        return
    refuse(given, _GAN, f"{run} is no GAN")
    given.setdefault("temperature", 1.0)
    if isinstance(model, VAE):
        refuse(given, _TEXT | _SERIES | _STEPS, f"{run} makes pictures")
        draw_images(model, folder, given)
        return
    assert isinstance(model, (GPT, RNN))
    if isinstance(model, GPT) or model.is_text:
        refuse(given, _IMAGES | _SERIES, f"{run} makes text")
        write_text(model, given)
    else:
        refuse(given, _IMAGES | _TEXT, f"{run} continues a series")
        continue_series(model, folder, given)
