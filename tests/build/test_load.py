"""Loading: the choice of instruction set, and installations whose library is missing or damaged."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support import ALL_ISAS, ISAS

import fastgen
from fastgen import _load, _ops

PACKAGE = Path(fastgen.__file__).parent
native = pytest.mark.skipif(not ISAS, reason="the CPU kernels are not built")

# Prints the facts and a digest of every op's bits or values.
PROGRAM = """
import json, sys, torch, fastgen
from fastgen import _load, random
from fastgen.functional import reparameterize_kl
from fastgen.random import Generator
g = Generator(2**63 + 9, 3)
out = [random.normal(50, generator=g), random.uniform(50, generator=g), random.exponential(50, generator=g),
       random.normal(50, generator=g, dtype=torch.float64), random.bernoulli(50, generator=g).float()]
mu = torch.linspace(-1, 1, 20).reshape(4, 5).t().requires_grad_()
z, kl = reparameterize_kl(mu, mu, generator=g)
(z.sum() + kl.sum()).backward()
assert z.is_contiguous() and kl.is_contiguous()
bits = [x.view(torch.int32 if x.element_size() == 4 else torch.int64).tolist() for x in out]
info = _load.build_info()
print(json.dumps({"bits": bits, "z": z.tolist(), "kl": kl.tolist(), "grad": mu.grad.tolist(), "info": info}))
"""


def run(folder: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """PROGRAM in a new process, from the package of this session or a copy of it in `folder`."""
    clean = {k: v for k, v in os.environ.items() if k not in ("FASTGEN_CPU_ISA", "PYTHONWARNINGS")}
    where = folder or PACKAGE.parent
    return subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=where,
        env={**clean, "PYTHONPATH": str(where), "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def here() -> dict:
    done = run()
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def same(result: dict, here: dict) -> None:
    assert result["bits"] == here["bits"]
    for name in ("z", "kl", "grad"):
        flat = [x for row in result[name] for x in (row if isinstance(row, list) else [row])]
        expected = [x for row in here[name] for x in (row if isinstance(row, list) else [row])]
        assert flat == pytest.approx(expected, rel=1e-5, abs=1e-6)


@native
@pytest.mark.parametrize("isa", ALL_ISAS)
def test_the_environment_chooses_the_instruction_set(here, isa):
    done = run(FASTGEN_CPU_ISA=isa)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["info"]["isa_active"] == isa
    assert {paths["cpu"] for paths in result["info"]["ops"].values()} == {isa}
    for name in ("bits", "z", "kl", "grad"):
        assert result[name] == here[name]


@native
def test_the_best_is_chosen_without_being_asked(here):
    assert here["info"]["isa_active"] == ALL_ISAS[0]
    assert _load.cpu_isas() == [i for i in ("avx512_bf16", "avx512", "avx2", "generic") if i in ALL_ISAS]


@native
def test_an_unknown_instruction_set_stops_the_import():
    done = run(FASTGEN_CPU_ISA="sse9")
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last == "RuntimeError: FASTGEN_CPU_ISA: expected one of generic, avx2, avx512, avx512_bf16, got 'sse9'"


@native
def test_an_instruction_set_that_this_cpu_lacks(monkeypatch):
    """The library refuses, nothing changes, and the error tells what there is."""

    class OldCpu:
        def __getattr__(self, name):
            return getattr(handle, name)

        def fastgen_isa_select(self, name):
            return 0 if name == b"avx512" else handle.fastgen_isa_select(name)

        def fastgen_isa_usable(self, name):
            return name != b"avx512" and handle.fastgen_isa_usable(name)

    handle, before = _load._cpu.handle, _load.cpu_isa()
    monkeypatch.setattr(_load._cpu, "handle", OldCpu())
    with pytest.raises(RuntimeError) as caught:
        _load.set_cpu_isa("avx512")
    reason = "this CPU cannot run it" if "avx512" in _load._isa_compiled() else "it is not compiled in"
    available = ", ".join(i for i in ALL_ISAS if i != "avx512")
    assert str(caught.value) == f"FASTGEN_CPU_ISA=avx512: {reason}; available here: {available}"
    assert _load.cpu_isa() == before


@native
def test_use_cpu_isa_puts_the_old_one_back():
    before = _load.cpu_isa()
    for isa in ISAS:

        def fail(isa: str = isa) -> None:
            with _load.use_cpu_isa(isa):
                assert _load.cpu_isa() == isa
                raise KeyError

        with pytest.raises(KeyError):
            fail()
        assert _load.cpu_isa() == before
    with pytest.raises(RuntimeError, match="expected one of"), _load.use_cpu_isa("none"):
        pass
    assert _load.cpu_isa() == before


def test_build_info():
    info = fastgen.build_info()
    assert set(info) == {
        "version", "native", "native_error", "isa_compiled", "isa_active", "cuda", "cuda_error", "cuda_archs",
        "torch_built", "compiler", "ops",
    }  # fmt: skip
    json.dumps(info)
    assert info["version"] == fastgen.__version__
    assert set(info["ops"]) == set(_ops.SCHEMAS)
    assert info["native"] == (info["native_error"] is None)
    assert info["cuda"] == (info["cuda_error"] is None)
    if info["native"]:
        assert info["isa_active"] in info["isa_compiled"]
        assert info["torch_built"]
        assert info["compiler"]


@pytest.fixture
def copy(tmp_path) -> Path:
    """A copy of the package without its libraries; the folder above it."""
    shutil.copytree(PACKAGE, tmp_path / "fastgen", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return tmp_path


def test_without_a_library_the_reference_gives_equal_results(here, copy):
    done = run(copy)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # a build without kernels is a choice, not a fault
    result = json.loads(done.stdout)
    info = result["info"]
    assert (info["native"], info["native_error"], info["isa_active"], info["isa_compiled"]) == (
        False,
        "not built",
        None,
        [],
    )
    assert {paths["cpu"] for paths in info["ops"].values()} == {"reference (not built)"}
    same(result, here)

    done = run(copy, FASTGEN_CPU_ISA="avx2")
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last == "RuntimeError: FASTGEN_CPU_ISA=avx2: the CPU kernels are not loaded (not built)"


@native
@pytest.mark.parametrize("damage", ["text", "empty", "head", "half"])
def test_a_damaged_library_warns_and_falls_back(here, copy, damage):
    whole = (PACKAGE / "_C.so").read_bytes()
    content = {"text": b"not a library", "empty": b"", "head": whole[:4096], "half": whole[: len(whole) // 2]}[damage]
    (copy / "fastgen/_C.so").write_bytes(content)
    done = run(copy)
    assert done.returncode == 0, done.stderr
    assert "RuntimeWarning: fastgen: _C.so does not load with torch" in done.stderr
    assert done.stderr.count("RuntimeWarning") == 1
    assert "fastgen doctor" in done.stderr
    result = json.loads(done.stdout)
    assert not result["info"]["native"]
    assert "does not load" in result["info"]["native_error"]
    same(result, here)
