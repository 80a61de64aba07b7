"""What several test files of the core share: the paths an op can take, bit patterns, C++ compiled for a test."""

from __future__ import annotations

import fcntl
import hashlib
import os
import runpy
import shutil
import subprocess
import sysconfig
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from fastgen import _load, reference

ROOT = Path(__file__).parents[1]
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
ALL_ISAS = _load.cpu_isas()
# avx512_bf16 has kernels of its own for the recurrent layers of bfloat16 only.
ISAS = [isa for isa in ALL_ISAS if isa != "avx512_bf16"]
# Inductor compiles C++ that includes Python.h.
needs_inductor = pytest.mark.skipif(
    not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists() or not shutil.which("g++"),
    reason="torch.compile needs g++ and Python.h (apt install python3-dev)",
)
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(_INTEGERS[x.element_size()])


def assert_same_bits(a: Tensor, b: Tensor) -> None:
    """Equal shape, dtype and bits; NaNs, whose payload IEEE leaves open, need only stand in the same places."""
    assert a.shape == b.shape
    assert a.dtype == b.dtype
    different = bits(a) != bits(b)
    if a.is_floating_point():
        different &= ~(a.isnan() & b.isnan())
    assert not different.any(), (
        f"{int(different.sum())} of {a.numel()} differ, first at {different.nonzero()[0].tolist()}"
    )


def assert_threads_change_no_bit(compute: Callable[[], Iterable[Tensor]]) -> None:
    """`compute` gives the same bits with 1, 2 and 3 threads, and once more with 1."""
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            results.append(tuple(compute()))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert_same_bits(a, b)


def call(op: str, path: str, *args: Any) -> Any:
    """The op `op` on the CPU by one path: "reference" or an instruction set."""
    if path == "reference":
        return getattr(reference, op)(*args)
    with _load.use_cpu_isa(path):
        return getattr(torch.ops.fastgen, op)(*args)


def setup_script() -> dict[str, Any]:
    """The names that setup.py defines."""
    if not (ROOT / "setup.py").exists():
        pytest.skip("no source tree: setup.py is not here")
    with mock.patch("setuptools.setup"):
        return runpy.run_path(str(ROOT / "setup.py"))


def compiler() -> str:
    name = next((c for c in (os.environ.get("CXX"), "c++", "g++", "clang++") if c and shutil.which(c)), None)
    if name is None:
        pytest.skip("no C++ compiler (CXX, c++, g++, clang++)")
    return name


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, " ".join(command) + "\n" + done.stderr


def build(cache: Path, name: str, units: list[list[str]], link: list[str]) -> Path:
    """Compiles each unit (flags, then a source) and links them to `cache/<hash>/name`.

    The folder is named by everything that goes in, so that a second run or a second worker finds the result.
    """
    cxx = compiler()
    digest = hashlib.sha256(repr((cxx, units, link)).encode())
    for path in sorted(p for folder in ("csrc", "tests/cpp", "tests/cuda") for p in (ROOT / folder).rglob("*")):
        if path.suffix in (".h", ".inl", ".cpp", ".cu"):
            digest.update(path.read_bytes())
    folder = cache / digest.hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    output = folder / name
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not output.exists():
            objects = [str(folder / f"{name}.{i}.o") for i in range(len(units))]
            commands = [[cxx, *unit, "-c", "-o", o] for unit, o in zip(units, objects, strict=True)]
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                list(pool.map(_run, commands))
            _run([cxx, *objects, *link, "-o", f"{output}.partial"])
            os.replace(f"{output}.partial", output)
    return output
