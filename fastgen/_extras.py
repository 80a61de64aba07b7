"""One clear line where a package of an extra is missing."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator

__all__ = ["extra", "require"]


def _missing(package: str, name: str) -> ImportError:
    return ImportError(f"{package} is not installed: pip install 'fastgen-torch[{name}]'")


@contextlib.contextmanager
def extra(name: str) -> Iterator[None]:
    """Imports inside the block need the extra `name`: a missing package says so, with the pip line.

    Example:
        >>> with extra("train"):
        ...     from accelerate import Accelerator
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "fastgen"):
            raise
        raise _missing(package, name) from error


def require(name: str, *packages: str) -> None:
    """Raise ImportError if one of the `packages` of the extra `name` is missing, without importing them."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise _missing(package, name)
