"""Pictures of `fastgen generate`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer

from fastgen._files import atomic_path
from fastgen._images import image_grid, save_png, to_uint8
from fastgen.cli.generate.pictures import OUT, data_names
from fastgen.models import GAN, VAE

__all__ = ["draw_images"]

# Endings that do not mean a folder.
_OTHER_FILES = {".bmp", ".gif", ".jpeg", ".jpg", ".npz", ".pt", ".safetensors", ".tif", ".tiff", ".webp"}


def draw_images(model: VAE | GAN, folder: Path, options: Mapping[str, Any]) -> None:
    """Draw as the options of the command say; `folder` is that of the model."""
    n, out, labels = options.get("n", 64), options.get("out", OUT), options.get("labels")
    kind = out.suffix.lower()
    if kind in _OTHER_FILES:
        raise ValueError(f"--out: expected a .png, a .npy or a folder for single .png files, got {out}")
    if kind not in (".png", ".npy") and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out}: expected a .png, a .npy or a new folder to draw into")
    classes = None if labels is None else _labels(labels, data_names(folder, "classes", model.config.num_classes), n)
    varied = {name: options[name] for name in ("temperature", "truncation") if name in options}
    images = model.generate(n, seed=options["seed"], labels=classes, **varied).float()
    if kind == ".npy":
        import numpy

        with atomic_path(out) as temporary:
            numpy.save(temporary, images.clamp(0, 1).numpy(force=True))
    elif kind == ".png":
        save_png(out, image_grid(images, options.get("columns")))
    else:
        for index, image in enumerate(to_uint8(images)):
            save_png(out / f"{index:0{len(str(n - 1))}d}.png", image)
    typer.echo(out)


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
