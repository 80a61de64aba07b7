"""The CUDA kernels on the emulated device (tests/cuda/emulator), as the ops of `torch.ops.fastgen_emulated`.

Their sources, compiled as C++, take tensors of the CPU: what they compute, where they read and write, and whether
barriers are missing can be tested without a GPU. What a GPU's compiler and memory make of them cannot.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import mmap
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from support import build, setup_script

from fastgen._load import cpu_isas
from fastgen._ops import SCHEMAS

_LIBRARY = torch.library.Library("fastgen_emulated", "DEF")


@functools.cache
def _load(cache: Path) -> ctypes.CDLL:
    script = setup_script()
    torch_folder = Path(torch.__file__).parent
    flags = ["-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-DFASTGEN_EMULATED"]
    flags += [script["TARGET"], "-Itests/cuda/emulator", "-isystem", str(torch_folder / "include")]
    # Multiply-adds are fused where nvcc fuses them, as far as the CPU can.
    fused = ["-mfma", "-ffp-contract=fast"] if "avx2" in cpu_isas() else []
    units = [
        [*flags, *([] if source in script["WITHOUT_CONTRACTION"] else fused), "-x", "c++", source]
        for source in (*script["CUDA_SOURCES"], "tests/cuda/emulator/emulator.cpp")
    ]
    link = ["-shared", f"-L{torch_folder / 'lib'}", "-ltorch_cpu"]
    for name, schema in SCHEMAS.items():
        _LIBRARY.define(name + schema)
    path = build(cache, "emulated.so", units, link)
    torch.ops.load_library(str(path))
    library = ctypes.CDLL(str(path))
    library.fastgen_emulated_launches.restype = ctypes.c_int64
    library.fastgen_emulated_products.restype = ctypes.c_int64
    library.fastgen_emulated_clustered.restype = ctypes.c_int64
    library.fastgen_emulated_device.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int)
    return library


class Emulated:
    """The emulated device."""

    def __init__(self, cache: Path) -> None:
        self._library = _load(cache)

    @property
    def launches(self) -> int:
        """Kernels that have been launched so far."""
        return self._library.fastgen_emulated_launches()

    @property
    def warpgroup_products(self) -> int:
        """Products that warps of a warpgroup have made so far."""
        return self._library.fastgen_emulated_products()

    @property
    def clustered(self) -> int:
        """Kernels that have been launched in clusters so far."""
        return self._library.fastgen_emulated_clustered()

    def _resize(self, multiprocessors: int = 4, shared_limit: int = 227 * 1024, capability: int = 80) -> None:
        self._library.fastgen_emulated_device(multiprocessors, shared_limit, capability)

    @contextlib.contextmanager
    def of_size(self, *size: int, **named_size: int) -> Iterator[Gpu]:
        """The device while kernels are told of other multiprocessors, bytes of shared memory a block may have, and
        compute capability (90 for 9.0), as `_resize` takes them."""
        self._resize(*size, **named_size)
        try:
            yield EMULATED
        finally:
            self._resize()


@dataclass(frozen=True)
class Gpu:
    """Where the CUDA kernels run: the device of their tensors, and the namespace of their ops."""

    device: torch.device
    ops: Any

    def put(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor on the device, with the same strides."""
        return guarded(tensor) if self.ops is torch.ops.fastgen_emulated else tensor.to(self.device)


EMULATED = Gpu(torch.device("cpu"), torch.ops.fastgen_emulated)

_PROTECT = ctypes.CDLL(None, use_errno=True).mprotect
_PROTECT.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def guarded(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of the tensor and its whole storage, at most 15 bytes before a page that ends whoever touches it."""
    storage = tensor.untyped_storage()
    used = -(-storage.nbytes() // 16) * 16
    room = (used // mmap.PAGESIZE + 1) * mmap.PAGESIZE
    memory = mmap.mmap(-1, room + mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    if _PROTECT(start + room, mmap.PAGESIZE, 0):
        raise OSError(ctypes.get_errno(), "mprotect")
    # The tensor keeps the memory alive.
    copy = torch.frombuffer(memory, dtype=torch.uint8, count=max(used, 1), offset=room - max(used, 1))
    copy[: storage.nbytes()] = torch.empty(0, dtype=torch.uint8).set_(storage)
    placed = torch.empty(0, dtype=tensor.dtype)
    placed.set_(copy.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())
    return placed.requires_grad_(tensor.requires_grad)


def load(cache: Path) -> Emulated:
    """The emulated device, its library compiled where `cache` does not have it; skips the test where it cannot be."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        pytest.skip("the emulated device switches stacks in the assembly of x86-64")
    return Emulated(cache)
