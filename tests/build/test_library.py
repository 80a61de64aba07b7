"""What the built library and its sources may hold: the layers of csrc/ and the stable ABI."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from support import ROOT, build, compiler, setup_script

import fastgen

LIBRARIES = sorted(Path(fastgen.__file__).parent.glob("_C*.so"))
CSRC = ROOT / "csrc"


def symbols(path: Path, *flags: str) -> list[tuple[str, str]]:
    """(type, demangled name) of each symbol that `nm` lists."""
    if shutil.which("nm") is None:
        pytest.skip("no nm (binutils)")
    listed = subprocess.run(["nm", "-C", *flags, str(path)], capture_output=True, text=True, check=True).stdout
    return [(m[1], m[2]) for line in listed.splitlines() if (m := re.match(r"^[0-9a-f ]*\s([a-zA-Z]) (.*)$", line))]


@pytest.fixture(params=LIBRARIES or [None], ids=lambda p: p.name if p else "none")
def library(request) -> Path:
    if request.param is None:
        pytest.skip("the libraries are not built")
    return request.param


def test_only_the_stable_abi_is_used(library):
    """One binary for every torch >= 2.10: no C++ symbol of torch, only the C functions that it promises."""
    undefined = [name for _, name in symbols(library, "-D", "-u")]
    assert any(name.startswith(("aoti_torch_", "torch_")) for name in undefined)
    assert [n for n in undefined if re.search(r"\b(at|c10|torch|caffe2)::", n)] == []


def test_it_is_no_python_module(library):
    names = [name for _, name in symbols(library, "-D")]
    assert [n for n in names if re.match(r"_?(PyInit|Py[A-Z])", n)] == []


def test_only_the_named_functions_are_exported(library):
    exported = {name for kind, name in symbols(library, "-D", "--defined-only") if kind in "TDBR"}
    assert {n for n in exported if not n.startswith("fastgen_")} <= {"_init", "_fini", "__bss_start", "_edata", "_end"}
    if library.name == "_C.so":
        assert {"fastgen_isa_active", "fastgen_isa_name", "fastgen_isa_usable", "fastgen_isa_select"} <= exported


def includes(path: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), re.MULTILINE)


def sources(folder: str) -> list[Path]:
    if not CSRC.exists():
        pytest.skip("no source tree")
    found = [p for p in (CSRC / folder).rglob("*") if p.suffix in (".h", ".inl", ".cpp", ".cu", ".cuh")]
    assert found
    return found


@pytest.mark.parametrize("folder", ["cpu", "common"])
def test_kernels_know_no_torch(folder):
    for path in sources(folder):
        assert [i for i in includes(path) if re.match(r"(torch|ATen|c10|aten)", i)] == [], path.name
        # Nor what would allocate, throw or start threads.
        text = re.sub(r"//.*", "", path.read_text())
        assert re.findall(r"\b(malloc|new|throw|std::thread|std::vector|omp)\b", text) == [], path.name


@pytest.mark.parametrize("folder", ["torch", "cuda"])
def test_bindings_include_the_stable_headers_only(folder):
    allowed = ("torch/csrc/stable/", "torch/headeronly/", "torch/csrc/inductor/aoti_torch/c/")
    for path in sources(folder):
        of_torch = [i for i in includes(path) if re.match(r"(torch|ATen|c10|pybind11|Python\.h)", i)]
        assert [i for i in of_torch if not i.startswith(allowed)] == [], path.name


@pytest.mark.parametrize("isa", ["avx2", "avx512", "avx512_bf16"])
def test_no_weak_symbols_in_the_vector_objects(cpp_cache, isa):
    """The linker keeps one of several weak bodies, maybe this one, and then runs it on a CPU that cannot."""
    script = setup_script()
    source = f"csrc/cpu/kernels_{isa}.cpp"
    if source not in script["CPU_SOURCES"]:
        pytest.skip("not an x86 build")
    flags = ["-O1" if f == "-O2" else f for f in script["SOURCE_FLAGS"][source]]
    unit = ["-std=c++20", "-fPIC", "-fvisibility=hidden", "-DFASTGEN_X86", *flags, source]
    path = build(cpp_cache, f"kernels_{isa}.so", [unit], ["-shared"])
    found = symbols(path.with_name(f"{path.name}.0.o"))
    assert [n for kind, n in found if kind in "WVu" and not n.startswith("DW.ref.")] == []
    assert any("Kernels" in name for _, name in found)


def test_only_the_vector_files_get_vector_flags():
    """Every -m flag stands with its own file, nothing is tuned to the machine that builds, nothing may contract."""
    script = setup_script()
    for source, flags in script["SOURCE_FLAGS"].items():
        machine = [f for f in flags if f.startswith("-m")]
        assert bool(machine) == ("avx" in source), source
        assert not {"-march=native", "-mtune=native", "-ffast-math", "-Ofast"} & set(flags)
        if "kernels_" in source:
            assert "-ffp-contract=off" in flags
    assert not any("avx" in s for s in script["TORCH_SOURCES"])


def test_the_generic_kernels_use_baseline_instructions(cpp_cache):
    """Compiled with setup.py's flags, the code for any CPU and its dispatch touch no register past SSE2."""
    script = setup_script()
    if not script["X86"] or shutil.which("objdump") is None:
        pytest.skip("not x86, or no objdump")
    unit = ["-std=c++20", "-fPIC", "-fvisibility=hidden", "-DFASTGEN_X86", "-O1", "csrc/cpu/isa.cpp"]
    path = build(cpp_cache, "isa.o.so", [unit], ["-shared", "-Wl,--unresolved-symbols=ignore-all"])
    listing = subprocess.run(["objdump", "-d", str(path)], capture_output=True, text=True, check=True).stdout
    assert "cpuid" in listing
    assert "xgetbv" in listing
    assert not re.search(r"%[yz]mm", listing)


def test_a_build_without_a_compiler_says_what_to_do(tmp_path):
    """One line that names the remedy, for each way a build can be asked for what is not there."""
    script = setup_script()
    assert compiler()
    for name in ("compiler", "nvcc"):
        assert callable(script[name])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", str(tmp_path))
        patch.delenv("CXX", raising=False)
        patch.delenv("CUDA_HOME", raising=False)
        with pytest.raises(SystemExit, match=r"no C\+\+ compiler found.*FASTGEN_NO_EXT=1"):
            script["compiler"]()
        patch.setenv("FASTGEN_BUILD_CUDA", "1")
        with pytest.raises(SystemExit, match="no nvcc on PATH"):
            script["nvcc"]()
        patch.setenv("FASTGEN_BUILD_CUDA", "maybe")
        with pytest.raises(SystemExit, match="FASTGEN_BUILD_CUDA: expected auto, 0 or 1, got 'maybe'"):
            script["nvcc"]()
        patch.setenv("FASTGEN_BUILD_CUDA", "auto")
        assert script["nvcc"]() is None
