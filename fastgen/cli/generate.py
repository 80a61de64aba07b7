"""`fastgen generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from fastgen._files import atomic_path
from fastgen._images import image_grid, save_png, to_uint8
from fastgen.models import VAE, from_pretrained
from fastgen.train import read_run

__all__ = ["generate"]

# Endings that do not mean a folder.
_OTHER_FILES = {".bmp", ".gif", ".jpeg", ".jpg", ".npz", ".pt", ".safetensors", ".tif", ".tiff", ".webp"}


def generate(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder of `fastgen train`, or a model folder.")],
    n: Annotated[int, typer.Option("--n", help="How many.")] = 64,
    seed: Annotated[int, typer.Option(help="Same seed, same pictures, whatever the device.")] = 0,
    out: Annotated[
        Path,
        typer.Option(
            help="A .png: one picture with all of them in a grid. A .npy: float32 (n, C, H, W) from 0 to 1. "
            "Anything else: a new folder of single PNGs."
        ),
    ] = Path("generated.png"),
    labels: Annotated[
        str | None,
        typer.Option(
            help="Classes to draw, for a conditional model: names of the data's classes or numbers from 0; several "
            "with commas are taken in turn.  [default: all in turn]",
            show_default=False,
        ),
    ] = None,
    temperature: Annotated[
        float, typer.Option(help="Standard deviation of the latents: under 1 more typical, less varied.")
    ] = 1.0,
    columns: Annotated[
        int | None, typer.Option(help="Images a row of the grid.  [default: about a square]", show_default=False)
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Draw samples from a trained model.

    Examples:

        fastgen generate runs/digits --n 64 --seed 1 --out grid.png

        fastgen generate runs/digits --n 10 --labels 3 --out threes.png

        fastgen generate runs/pets --n 20 --labels cat,dog --out pets.png

        fastgen generate runs/digits --n 10000 --out samples.npy
    """
    if columns is not None and columns < 1:
        raise ValueError(f"--columns: expected an int of at least 1, got {columns}")
    kind = out.suffix.lower()
    if kind in _OTHER_FILES:
        raise ValueError(f"--out: expected a .png, a .npy or a folder for single .png files, got {out}")
    if kind not in (".png", ".npy") and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out}: expected a .png, a .npy or a new folder to draw into")
    folder = _model_folder(run)
    model = from_pretrained(folder, device=_device(device))
    assert isinstance(model, VAE)  # the one family there is
    given = None if labels is None else _labels(labels, _class_names(folder, model.config.num_classes), n)
    images = model.generate(n, seed=seed, labels=given, temperature=temperature).float()
    if kind == ".npy":
        import numpy

        with atomic_path(out) as temporary:
            numpy.save(temporary, images.clamp(0, 1).numpy(force=True))
    elif kind == ".png":
        save_png(out, image_grid(images, columns))
    else:
        for index, image in enumerate(to_uint8(images)):
            save_png(out / f"{index:0{len(str(n - 1))}d}.png", image)
    typer.echo(out)


def _model_folder(run: Path) -> Path:
    """The model of a run folder, or the folder itself if it is that of a model."""
    if (run / "model" / "config.json").is_file():
        return run / "model"
    if (run / "config.json").is_file() and not (run / "model.safetensors").is_file():
        if (run / "metrics.csv").is_file():
            raise FileNotFoundError(f"{run}: no model yet, the run has not come to its first evaluation")
    elif run.is_dir() and not (run / "config.json").is_file():
        raise FileNotFoundError(f"{run}: neither a run folder nor a model folder, it has no config.json")
    return run


def _device(name: str) -> torch.device:
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"--device: expected auto, cpu or cuda, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device: expected auto or cpu, as PyTorch finds no CUDA device, got 'cuda'")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def _class_names(folder: Path, count: int) -> list[str]:
    """The names of the model's classes, which the run folder around it keeps; none for a model on its own."""
    try:
        names = read_run(folder.absolute().parent)["data"]["classes"]
    except (OSError, ValueError, KeyError):
        return []
    return list(names) if len(names) == count else []


def _labels(text: str, names: list[str], n: int) -> list[int]:
    """The n labels of the option: names first, so that a class called 1 is not mistaken for the second one."""
    given = []
    # A name may have a comma itself.
    for part in [text] if text in names else text.split(","):
        if part.strip() in names:
            given.append(names.index(part.strip()))
        elif part.strip().isdecimal() and not (names and all(name.isdecimal() for name in names)):
            given.append(int(part))
        else:
            shown = ", ".join(names if len(names) <= 20 else [*names[:18], "...", names[-1]])
            known = f"classes of {shown}" if names else "numbers of classes"
            raise ValueError(f"--labels: expected {known}, with commas between them, got {text!r}")
    return [given[index % len(given)] for index in range(n)]
