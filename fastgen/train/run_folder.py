"""The folder of a run: where it may begin, what its config.json says, whether it may go on."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from fastgen._version import __version__
from fastgen.train.config import CHANGEABLE

__all__ = ["RUN_FORMAT", "check_new_folder", "check_same_run", "new_folder", "read_run", "remove_leftovers"]

RUN_FORMAT = 1
"""The layout of a run folder, in its config.json. Run folders of older formats are read as if they had this one."""

# Before there was a number: the dtype of autocast by Accelerate's names.
_OLD_DTYPES = {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}
# The temporary names of fastgen._files.
_LEFTOVER = re.compile(r"\..+-\w{8}\.(safetensors|json|csv|png|txt)")


def read_run(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The config.json of a run folder.

    Raises:
        FileNotFoundError: no such folder, or not that of a run.
        ValueError: config.json is damaged, or of a newer fastgen.
    """
    path = Path(folder) / "config.json"
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"{folder}: no such run folder")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{folder}: not a run folder, it has no config.json") from None
    except ValueError as error:
        raise ValueError(f"{path}: damaged ({error})") from None
    if not isinstance(record, dict) or "training" not in record:
        raise ValueError(f"{folder}: not a run folder, its config.json is that of a model")
    found = record.get("format", 0)
    if not isinstance(found, int) or found > RUN_FORMAT:
        versions = record.get("versions")
        version = versions.get("fastgen", "?") if isinstance(versions, dict) else "?"
        raise ValueError(
            f"{path}: expected a run folder of format {RUN_FORMAT} or older, as this is fastgen {__version__}, "
            f"got format {found!r} of fastgen {version}"
        )
    training = record["training"]
    if found < 1 and isinstance(training, dict) and "mixed_precision" in training:
        precision = training.pop("mixed_precision")
        training["dtype"] = _OLD_DTYPES.get(precision, precision)
    return record


def remove_leftovers(folder: Path) -> None:
    """Remove what a process left that was killed while it wrote."""
    for path in folder.rglob(".*"):
        if _LEFTOVER.fullmatch(path.name):
            path.unlink(missing_ok=True)


def new_folder(out: str | os.PathLike[str] | None, name: str) -> Path:
    """Make the folder of a new run: `out`, or one in runs/ called after `name` and the time.

    Raises:
        OSError: `out` is a file, or holds something; nothing is ever overwritten.
    """
    if out is None:
        folder = Path("runs") / f"{name}-{datetime.now():%Y%m%d-%H%M%S}"
        folder.mkdir(parents=True)  # two runs of one second: the second one fails here
        return folder
    check_new_folder(out)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def check_new_folder(out: str | os.PathLike[str]) -> None:
    """Raise OSError where a run cannot begin in `out`: it is a file, or holds something."""
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder}: expected a folder for the run, got a file")
    # Hidden files are what is left of a process killed in its first moments.
    if folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir()):
        if (folder / "config.json").exists():
            if not any((folder / "checkpoints").glob("*.safetensors")):
                raise FileExistsError(
                    f"{folder}: holds a run that saved no checkpoint; delete it, or choose another folder"
                )
            raise FileExistsError(
                f"{folder}: holds a run already; continue it with --resume {folder} (resume=True in Python), "
                f"or choose another folder"
            )
        raise FileExistsError(f"{folder}: not empty; choose a new folder for the run")


def check_same_run(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise ValueError where a run would go on with other data, another model or other settings."""
    for section in ("model_type", "model", "data", "recipe", "training"):
        old, new = before.get(section), now.get(section)
        if old == new:
            continue
        if not isinstance(old, dict) or not isinstance(new, dict):
            raise ValueError(f"{section}: expected {old!r}, as {folder} was started with, got {new!r}")
        for key in sorted(old.keys() | new.keys()):
            if old.get(key) == new.get(key) or (section == "training" and key in CHANGEABLE):
                continue
            what = f"data: expected {key}" if section == "data" else f"{key}: expected"
            raise ValueError(f"{what} {old.get(key)!r}, as {folder} was started with, got {new.get(key)!r}")
