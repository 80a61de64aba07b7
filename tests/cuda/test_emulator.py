"""The emulated device runs kernels as CUDA would, and finds the faults it is there for."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

import pytest
from support import build

FOUND = {
    "reverse": "right",
    "no barrier": "wrong result",
    "copy": "right",
    "no wait": "wrong result",
    "refill": "right",
    "refill too early": "wrong result",
    "a lane alone": "threads wait for others that do not come",
    "two shuffles": "lanes of a warp at",
    "behind shared": "outside of shared memory",
    "write behind shared": "written behind shared memory",
    "rounds": "right",
    "no grid barrier": "wrong result",
    "cluster": "right",
    "cluster, not begun": "shared memory of a block that has not begun",
    "cluster, not waited for": "wrong result",
    "cluster, ended": "shared memory of a block that has ended",
    "cluster, cut": "expected whole clusters",
    "cluster, of an older device": "no clusters before compute capability 9.0",
    "too many blocks": "more blocks than fit at once",
    "nobody sets the flag": "nobody sets the flag",
    "too much shared memory": "more shared memory than a block may have",
    "product": "right",
    "warpgroup product": "right",
    "warpgroup product, not waited for": "wrong result",
    "warpgroup product, another waited for": "sums are taken for done that no wait was for",
    "warpgroup product, touched": "sums were written to before a wait",
    "warpgroup product, left side rewritten": "left side of a product was written to before a wait",
    "warpgroup product, without a fence": "a product without a fence",
    "warpgroup product, of unfenced copies": "copied without a fence",
    "warpgroup product, overwritten": "copied without a fence",
    "warpgroup product, askew": "wrong result",
    "warpgroup product, of a wrong stride": "wrong result",
    "warpgroup product, of a wrong leading stride": "wrong result",
    "warpgroup product, by a warp alone": "a warp has left its warpgroup alone",
    "warpgroup product, waited for by a warp alone": "a warp alone at warpgroup_wait",
    "warpgroup product, left side not fenced": "a left side that no fence has named",
    "warpgroup product, left side behind the fence": "a left side written to behind the fence",
    "warpgroup product, sums not fenced": "sums that no fence has named",
    "warpgroup product, sums behind the fence": "sums written to behind the fence",
    "product of rows": "right",
    "product of rows, of a wrong stride": "wrong result",
    "product of rows, taken for columns": "wrong result",
    "ring": "right",
    "ring, read too early": "wrong result",
    "ring, written too early": "threads wait for others that do not come",
    "ring, of a wrong parity": "threads wait for others that do not come",
    "ring, too few arrive at": "threads wait for others that do not come",
    "ring, not initialised": "a barrier that was not initialised",
    "turns": "right",
    "no turns": "wrong result",
    "registers": "right",
    "too many registers": "threads wait for others that do not come",
}


@pytest.fixture(scope="module")
def planted(cpp_cache: Path) -> Path:
    if platform.machine().lower() not in ("x86_64", "amd64"):
        pytest.skip("the emulated device switches stacks in the assembly of x86-64")
    flags = ["-std=c++20", "-O1", "-Itests/cuda/emulator", "-DFASTGEN_EMULATED"]
    units = [[*flags, f"tests/cuda/emulator/{name}.cpp"] for name in ("planted", "emulator")]
    return build(cpp_cache, "planted", units, [])


@pytest.mark.parametrize("kernel", FOUND)
def test_what_becomes_of_a_kernel(planted, kernel):
    done = subprocess.run([planted, kernel], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert FOUND[kernel] in done.stdout
