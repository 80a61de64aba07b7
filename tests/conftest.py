"""Settings and fixtures of every test."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import emulated as emulation
import hypothesis
import pytest
import torch
from support import ISAS, build, setup_script

import fastgen

# The same examples every time, and no deadline: the machines that run the tests are shared.
hypothesis.settings.register_profile("fastgen", deadline=None, derandomize=True, print_blob=True, database=None)
hypothesis.settings.load_profile("fastgen")

# The workers of pytest-xdist share the cores, and so do the programs that they start. Threads of several pools on one
# core wait for each other at the end of every loop, which makes the trainings several times slower. Tests whose
# subject is threads ask for them.
if (workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT")) and "OMP_NUM_THREADS" not in os.environ:
    torch.set_num_threads(max(1, torch.get_num_threads() // int(workers)))
    os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())


def pytest_collection_modifyitems(items: list[pytest.Function]) -> None:
    """Files with slow tests, or with C++ to compile, come first: at the end no worker waits long for another."""
    first = {item.path for item in items if item.get_closest_marker("slow") or "cpp_cache" in item.fixturenames}
    items.sort(key=lambda item: item.path not in first)


@pytest.fixture(params=ISAS or [pytest.param(None, marks=pytest.mark.skip("the CPU kernels are not built"))])
def isa(request: pytest.FixtureRequest) -> str:
    """Each instruction set of this build that this CPU can run."""
    return request.param


@pytest.fixture(params=["reference", *ISAS])
def path(request: pytest.FixtureRequest) -> str:
    """Each way an op can run on this CPU."""
    return request.param


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets the number of threads for the length of a test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def cpp_cache(request: pytest.FixtureRequest) -> Path:
    return Path(request.config.cache.mkdir("cpp"))


@pytest.fixture(scope="session")
def emulated(cpp_cache: Path) -> emulation.Emulated:
    """The CUDA kernels on the emulated device."""
    return emulation.load(cpp_cache)


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=pytest.mark.cuda)])
def gpu(request: pytest.FixtureRequest) -> emulation.Gpu:
    """Each device that has the CUDA kernels: the emulated one and, where it is, a GPU."""
    if request.param == "emulated":
        request.getfixturevalue("emulated")
        return emulation.EMULATED
    if not (fastgen.build_info()["cuda"] and torch.cuda.is_available()):
        pytest.skip(f"no CUDA kernels: {fastgen.build_info()['cuda_error'] or 'no device'}")
    return emulation.Gpu(torch.device("cuda", torch.cuda.current_device()), torch.ops.fastgen)


@pytest.fixture(scope="session")
def words_library(cpp_cache: Path) -> Callable[[str], ctypes.CDLL]:
    """isa -> the functions of tests/cpp/words.cpp, compiled with that instruction set's flags of setup.py."""
    flags = setup_script()["SOURCE_FLAGS"]

    def load(isa: str) -> ctypes.CDLL:
        kernel_flags = flags[f"csrc/cpu/kernels_{isa}.cpp"]
        common = ["-std=c++20", "-fPIC", "-fvisibility=hidden", f'-DFASTGEN_VEC="../../csrc/cpu/vec_{isa}.h"']
        unit = [*common, *kernel_flags, "tests/cpp/words.cpp"]
        library = ctypes.CDLL(str(build(cpp_cache, f"words_{isa}.so", [unit], ["-shared"])))
        library.scan32.restype = ctypes.c_uint64
        return library

    return load
