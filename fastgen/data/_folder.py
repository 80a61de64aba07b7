"""What a folder of data holds."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["visible_files"]


def visible_files(folder: Path) -> tuple[list[Path], int]:
    """All files below `folder` in sorted order, and the number of hidden ones; hidden folders are not entered.

    Raises:
        OSError: for a folder that cannot be read.
    """

    def fail(error: OSError) -> None:
        raise error

    found: list[Path] = []
    hidden = 0
    for parent, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        visible = [name for name in names if not name.startswith(".")]
        found += [Path(parent, name) for name in visible]
        hidden += len(names) - len(visible)
    return sorted(found), hidden
