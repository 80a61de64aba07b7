"""What pictures of images and of windows share."""

from __future__ import annotations

from pathlib import Path

from fastgen.train import read_run

__all__ = ["OUT", "data_names"]

OUT = Path("generated.png")
"""Where pictures go unless `--out` says otherwise."""


def data_names(folder: Path, key: str, count: int) -> list[str]:
    """The names in `key` of the data, kept by the run folder around the model in `folder`; none if not `count`.

    A model on its own has none either.
    """
    try:
        names = read_run(folder.absolute().parent)["data"][key]
    except (OSError, ValueError, KeyError):
        return []
    return list(names) if len(names) == count else []
