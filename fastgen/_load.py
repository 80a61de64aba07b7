"""Loads the op libraries and tells which path each op takes.

Without a library, or on a device that has no kernels, the ops run as `fastgen.reference` states them: equal
results, only slower. `build_info()` says so, and why.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import struct
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from fastgen import _ops
from fastgen._version import __version__

_FOLDER = Path(__file__).parent
_ISA_NAMES = ("generic", "avx2", "avx512", "avx512_bf16")


class _Library:
    """One shared library of ops: loaded, or the reason why not."""

    def __init__(self, name: str, skip: str | None = None) -> None:
        self.handle: ctypes.CDLL | None = None
        self.error = skip
        path = _FOLDER / name
        if not path.exists():
            self.error = "not built"
        if self.error is not None:
            return
        try:
            if _is_cut_off(path):
                raise OSError("the file is cut off")
            torch.ops.load_library(str(path))
            self.handle = ctypes.CDLL(str(path))
        except (OSError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            self.error = f"built for torch {_facts().get('torch_built', '?')}, does not load: {reason}"
            warnings.warn(
                f"fastgen: {path.name} does not load with torch {torch.__version__} ({reason}); the slower "
                "reference path is used. Reinstall fastgen, or run `fastgen doctor`.",
                RuntimeWarning,
                stacklevel=2,
            )

    def __bool__(self) -> bool:
        return self.handle is not None


def _is_cut_off(path: Path) -> bool:
    """Whether an ELF file ends before its section table, which stands last: to load it would kill the process."""
    with path.open("rb") as file:
        header = file.read(64)
    if len(header) < 64 or header[:6] != b"\x7fELF\x02\x01":  # not 64-bit little-endian: the loader will tell
        return False
    (table,) = struct.unpack_from("<Q", header, 40)
    entry_size, entries = struct.unpack_from("<HH", header, 58)
    return bool(table + entry_size * entries > path.stat().st_size)


def _facts() -> dict[str, Any]:
    path = _FOLDER / "build_info.json"
    return json.loads(path.read_text()) if path.exists() else {}


def _why_not_cuda() -> str | None:
    if not torch.version.cuda:
        return "this torch has no CUDA"
    if os.environ.get("FASTGEN_CUDA_EXPERIMENTAL", "0") in ("", "0"):
        return "its kernels have not yet passed their tests on a GPU; FASTGEN_CUDA_EXPERIMENTAL=1 uses them"
    # A device without code for it would fail at its first launch. Code runs on later minor versions of its
    # major one, PTX on everything later.
    built = _facts().get("cuda_archs", [])
    for index in range(torch.cuda.device_count()):
        have = torch.cuda.get_device_capability(index)
        for name in built:
            major, minor = (int(n) for n in name.removesuffix("+PTX").rstrip("af").split("."))
            if (have[0] == major and have[1] >= minor) or (name.endswith("+PTX") and have >= (major, minor)):
                break
        else:
            return f"GPU {index} is {have[0]}.{have[1]}, the kernels are built for {', '.join(built)}"
    return None


_cpu = _Library("_C.so")
_cuda = _Library("_C_cuda.so", _why_not_cuda())

if _cpu.handle is not None:
    try:
        for _name in ("fastgen_isa_active", "fastgen_isa_name", "fastgen_cpu_vendor"):
            getattr(_cpu.handle, _name).restype = ctypes.c_char_p
    except AttributeError:
        raise ImportError(
            f"{_FOLDER / '_C.so'} is older than the Python files beside it: build fastgen again"
        ) from None


def cpu_library() -> ctypes.CDLL | None:
    """The loaded `_C.so`, for the functions that are no ops."""
    return _cpu.handle


def _isa_compiled() -> list[str]:
    names: list[str] = []
    while _cpu.handle is not None and (name := _cpu.handle.fastgen_isa_name(len(names))) is not None:
        names.append(name.decode())
    return names


# As the library says; kept here, as torch.compile cannot look into a foreign function.
_active: str | None = _cpu.handle.fastgen_isa_active().decode() if _cpu.handle is not None else None


def cpu_isa() -> str | None:
    """The instruction set of the active CPU kernels; None without the library."""
    return _active


def cpu_vendor() -> str | None:
    """What the CPU says of itself, such as "GenuineIntel"; None without the library."""
    return _cpu.handle.fastgen_cpu_vendor().decode() if _cpu.handle is not None else None


def set_cpu_isa(name: str) -> None:
    """Choose the CPU kernels: "generic", "avx2", "avx512" or "avx512_bf16".

    Random numbers and reparameterisation are the same with each; recurrent layers differ in rounding.

    Raises:
        RuntimeError: if this build or this CPU does not have it.
    """
    if name not in _ISA_NAMES:
        raise RuntimeError(f"FASTGEN_CPU_ISA: expected one of {', '.join(_ISA_NAMES)}, got {name!r}")
    if _cpu.handle is None:
        raise RuntimeError(f"FASTGEN_CPU_ISA={name}: the CPU kernels are not loaded ({_cpu.error})")
    if not _cpu.handle.fastgen_isa_select(name.encode()):
        reason = "this CPU cannot run it" if name in _isa_compiled() else "it is not compiled in"
        raise RuntimeError(f"FASTGEN_CPU_ISA={name}: {reason}; available here: {', '.join(cpu_isas())}")
    global _active
    _active = name


def cpu_isas() -> list[str]:
    """The instruction sets that are compiled in and that this CPU can run, best first."""
    handle = _cpu.handle
    return [n for n in _isa_compiled() if handle is not None and handle.fastgen_isa_usable(n.encode())]


@contextlib.contextmanager
def use_cpu_isa(name: str) -> Iterator[None]:
    """`set_cpu_isa` for a block."""
    before = cpu_isa()
    set_cpu_isa(name)
    try:
        yield
    finally:
        assert before is not None
        set_cpu_isa(before)


if os.environ.get("FASTGEN_CPU_ISA"):
    set_cpu_isa(os.environ["FASTGEN_CPU_ISA"])


def _has_kernel(op: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"fastgen::{op}", key)


def kernel_devices(op: str) -> frozenset[str]:
    """The device types, of "cpu" and "cuda", on which `op` has a kernel."""
    return frozenset(key.lower() for key in ("CPU", "CUDA") if _has_kernel(op, key))


def build_info() -> dict[str, Any]:
    """What this installation holds and uses.

    Returns a dict: version; native (the CPU library is loaded); native_error (why not, else None);
    isa_compiled, isa_active; cuda (the CUDA library is loaded); cuda_error; cuda_archs (built, such as
    "9.0"); torch_built and compiler (what the libraries were built with); ops, which maps each op to the
    path it takes on "cpu" and "cuda": an instruction set, "cuda", or "reference (reason)"; of an op for CUDA alone
    that of the op in its place.
    """
    facts = _facts()

    def path(name: str, key: str) -> str:
        if key == "CPU":
            name = _ops.INSTEAD_ON_CPU.get(name, name)
        library, kernels = (_cpu, cpu_isa()) if key == "CPU" else (_cuda, "cuda")
        if not library:
            return f"reference ({library.error})"
        if not _has_kernel(name, key):
            return "reference (no kernel for this op)"
        return str(kernels)

    return {
        "version": __version__,
        "native": bool(_cpu),
        "native_error": _cpu.error,
        "isa_compiled": _isa_compiled(),
        "isa_active": cpu_isa(),
        "cuda": bool(_cuda),
        "cuda_error": _cuda.error,
        "cuda_archs": facts.get("cuda_archs", []),
        "torch_built": facts.get("torch_built"),
        "compiler": facts.get("compiler"),
        "ops": {name: {"cpu": path(name, "CPU"), "cuda": path(name, "CUDA")} for name in _ops.SCHEMAS},
    }
