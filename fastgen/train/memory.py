"""Memory that a training run gives back to the system only at its end."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Iterator
from typing import Any

__all__ = ["kept_memory"]

# Of malloc.h; values of glibc's mallopt.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4
_MIB = 1 << 20


@contextlib.contextmanager
def kept_memory() -> Iterator[None]:
    """Let glibc keep what is freed inside the block, for the next allocation; elsewhere this does nothing.

    A step frees all of its activations and gradients, hundreds of megabytes. By default glibc hands them back to the
    kernel (large blocks are mappings of their own, and a free end of the heap is trimmed), which then has to find
    and zero each page anew in the next step: up to a third of the time of a step. Here they stay in the heap.

    Afterwards the free memory is given back, and the limits are those that glibc itself raises its defaults to.
    """
    libc = _glibc()
    if libc is None:
        yield
        return
    libc.mallopt(_M_MMAP_MAX, 0)  # all blocks in the heap
    libc.mallopt(_M_TRIM_THRESHOLD, -1)  # never give back its end
    try:
        yield
    finally:
        libc.mallopt(_M_MMAP_MAX, 65536)
        libc.mallopt(_M_MMAP_THRESHOLD, 32 * _MIB)
        libc.mallopt(_M_TRIM_THRESHOLD, 64 * _MIB)
        libc.malloc_trim(0)


def _glibc() -> Any:
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "gnu_get_libc_version") else None
