"""The machine that a figure was taken on, as far as it explains the figure."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path
from typing import Any

import torch

__all__ = [
    "available_cores",
    "cache_sizes",
    "cpu_flags",
    "cpu_model",
    "describe",
    "gpu",
    "openmp_runtimes",
    "residence",
]

# The extensions that a kernel of this package or a library under PyTorch chooses its path by.
_FLAGS = (
    *("avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16", "avx512_fp16"),
    *("avx512_vnni", "amx_tile", "amx_bf16", "amx_int8", "asimd", "sve", "sve2", "bf16"),
)
_OPENMP = re.compile(r"/(?:lib)?(?:gomp|iomp5|omp)(?:-[0-9a-f]+)?\.(?:so|dylib)[^/]*$")


def _cpuinfo() -> dict[str, str]:
    """The first processor of /proc/cpuinfo; empty where there is none."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    fields = (line.split(":", 1) for line in text.split("\n\n")[0].splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in fields}


def cpu_model() -> str:
    """The processor's name as it gives it itself, or its architecture."""
    return _cpuinfo().get("model name") or platform.processor() or platform.machine()


def cpu_flags() -> list[str]:
    """The instruction set extensions that matter here, of those that the processor reports."""
    info = _cpuinfo()
    reported = set(info.get("flags", info.get("Features", "")).split())
    return [flag for flag in _FLAGS if flag in reported]


def available_cores() -> int:
    """Logical cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cache_sizes() -> dict[str, int]:
    """Bytes of one L1 data, L2 and L3 cache as seen from the first core; empty where nobody tells."""
    sizes = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            kind, level, size = ((index / field).read_text().strip() for field in ("type", "level", "size"))
        except OSError:
            continue
        if kind != "Instruction":
            sizes[f"L{level}"] = int(size[:-1]) * {"K": 1 << 10, "M": 1 << 20}[size[-1]]
    return sizes


def residence(working_set: int, threads: int, device: str = "cpu") -> str:
    """Where `working_set` bytes stay between two calls: `L1`, `L2`, `L3` or `memory`.

    L1 and L2 belong to a core, so each thread brings its own; L3 is counted once. A GPU has one L2.
    """
    if device != "cpu":
        return "L2" if working_set <= torch.cuda.get_device_properties(device).L2_cache_size else "memory"
    for level, size in cache_sizes().items():
        if working_set <= size * (1 if level == "L3" else threads):
            return level
    return "memory"


def openmp_runtimes() -> list[str]:
    """Files of the OpenMP runtimes in this process; two of them fight over the cores."""
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    paths = {line.split(maxsplit=5)[5] for line in lines if len(line.split(maxsplit=5)) == 6}
    return sorted(path for path in paths if _OPENMP.search(path))


def gpu(device: str) -> dict[str, Any]:
    """What goes into a report about a CUDA device."""
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "arch": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory": properties.total_memory,
        "L2": properties.L2_cache_size,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


def describe(device: str = "cpu") -> dict[str, Any]:
    """What goes into a report: processor, cores, caches, system, versions and what else is running; and the GPU.

    load: processes that wanted a core over the last minute, on average; None where nobody tells.
    """
    return {
        "cpu": cpu_model(),
        "flags": cpu_flags(),
        "cores": available_cores(),
        "caches": cache_sizes(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "gpu": None if device == "cpu" else gpu(device),
    }
