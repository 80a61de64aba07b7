"""What is said about the machine agrees with what the system says elsewhere."""

import json
import os
from pathlib import Path

import pytest
import torch

from fastgen.benchmark import machine

MAPS = """\
7f00-7f01 r-xp 00000000 08:01 12 /opt/torch/lib/libgomp-a34b3233.so.1
7f02-7f03 r--p 00000000 08:01 12 /opt/torch/lib/libgomp-a34b3233.so.1
7f04-7f05 r-xp 00000000 08:01 13 /opt/mkl/lib/libiomp5.so
7f06-7f07 r-xp 00000000 08:01 14 /usr/lib/libompi_not_this.so
7f08-7f09 rw-p 00000000 00:00 0
7f0a-7f0b r-xp 00000000 08:01 15 /home/a user/libomp.so.5
"""


@pytest.fixture
def files(monkeypatch):
    """Files of the system, replaced by the given text; all others are missing."""
    texts = {}

    def read_text(path, **_):
        if str(path) not in texts:
            raise FileNotFoundError(path)
        return texts[str(path)]

    monkeypatch.setattr(Path, "read_text", read_text)
    return texts


def test_describe_is_json_and_complete():
    found = machine.describe()
    assert json.loads(json.dumps(found)) == found
    assert found["torch"] == torch.__version__
    assert found["cpu"]
    assert 1 <= found["cores"] <= os.cpu_count()


def test_flags_agree_with_torch():
    capability = torch.backends.cpu.get_cpu_capability()
    if capability not in ("AVX2", "AVX512"):
        pytest.skip(f"no x86 vector unit that torch names: {capability}")
    flags = machine.cpu_flags()
    assert {"avx2", "fma"} <= set(flags)
    assert ("avx512f" in flags) or capability == "AVX2"


def test_cpuinfo(files):
    files["/proc/cpuinfo"] = "processor : 0\nmodel name\t: Best: CPU\nflags\t: sse avx2 fma new\n\nmodel name: other\n"
    assert machine.cpu_model() == "Best: CPU"
    assert machine.cpu_flags() == ["avx2", "fma"]
    files["/proc/cpuinfo"] = "processor : 0\nFeatures : fp asimd sve\n"
    assert machine.cpu_flags() == ["asimd", "sve"]


def test_a_system_that_tells_nothing(files):
    assert machine.cpu_model()
    assert machine.cpu_flags() == []
    assert machine.cache_sizes() == {}
    assert machine.openmp_runtimes() == []
    assert machine.residence(1, 1) == "memory"


def test_openmp_runtimes_are_counted_by_file(files):
    files["/proc/self/maps"] = MAPS
    assert machine.openmp_runtimes() == [
        "/home/a user/libomp.so.5",
        "/opt/mkl/lib/libiomp5.so",
        "/opt/torch/lib/libgomp-a34b3233.so.1",
    ]


def test_residence_counts_a_core_s_own_caches_for_each_thread(monkeypatch):
    monkeypatch.setattr(machine, "cache_sizes", lambda: {"L1": 1000, "L2": 10_000, "L3": 100_000})
    assert [machine.residence(size, 1) for size in (1000, 1001, 10_001, 100_001)] == ["L1", "L2", "L3", "memory"]
    assert [machine.residence(size, 4) for size in (4000, 40_000, 100_000, 100_001)] == ["L1", "L2", "L3", "memory"]
