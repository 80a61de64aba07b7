"""Builds the two op libraries of fastgen; everything else stands in pyproject.toml.

`fastgen/_C.so` holds the CPU kernels and `fastgen/_C_cuda.so` the CUDA ones. Both are plain shared
libraries without a Python module inside, on the stable ABI of LibTorch: one build serves every Python and
every torch from 2.10 on. Only torch's headers and `libtorch_cpu.so` are needed, torch is never imported.

Environment:
    FASTGEN_NO_EXT=1              no compilation: the pure-Python package, equal results, slower
    FASTGEN_BUILD_CUDA=auto|0|1   CUDA kernels if nvcc is found | never | or fail (default auto)
    TORCH_CUDA_ARCH_LIST          architectures, as PyTorch reads it (default "8.0;9.0;10.0+PTX")
    FASTGEN_CXXFLAGS              more flags for every C++ source (sanitizers, debugging)
    FASTGEN_NVCCFLAGS             more flags for every CUDA source (-lineinfo, -Xptxas -v)
    CXX, CUDA_HOME, MAX_JOBS      as usual
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent.resolve()
TARGET = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # LibTorch 2.10
X86 = platform.machine().lower() in ("x86_64", "amd64")

# No contraction into fused multiply-adds: the random stream promises the same bits everywhere.
# -O3 takes a third longer to compile and makes nothing faster: what has to be unrolled says so.
KERNEL_FLAGS = ["-O2", "-ffp-contract=off", "-fno-math-errno"]
# GCC 12 mistakes the "undefined" vectors of its own AVX-512 header for uninitialised variables.
AVX512_FLAGS = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-Wno-uninitialized", "-Wno-maybe-uninitialized"]
SOURCE_FLAGS = {
    "csrc/cpu/isa.cpp": ["-O2"],
    "csrc/cpu/kernels_generic.cpp": KERNEL_FLAGS,
    "csrc/cpu/kernels_avx2.cpp": [*KERNEL_FLAGS, "-mavx2", "-mfma", "-mf16c"],
    "csrc/cpu/kernels_avx512.cpp": [*KERNEL_FLAGS, *AVX512_FLAGS],
    "csrc/cpu/kernels_avx512_bf16.cpp": [*KERNEL_FLAGS, *AVX512_FLAGS, "-mavx512bf16"],
}
CPU_SOURCES = [s for s in SOURCE_FLAGS if X86 or "avx" not in s]
TORCH_SOURCES = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc/torch").glob("*.cpp"))
# The CUDA sources that promise the same bits as the CPU.
WITHOUT_CONTRACTION = ("csrc/cuda/random.cu", "csrc/cuda/reparameterize.cu", "csrc/cuda/generate.cu")
# Those with instructions that compute capability 9.0 alone has, and no other device, older or newer.
FOR_SM90A = ("csrc/cuda/attention_sm90.cu", "csrc/cuda/attention_backward_sm90.cu")
CUDA_SOURCES = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc/cuda").glob("*.cu"))


def stop(message: str) -> None:
    sys.exit(f"\nfastgen: {message}\n")


def torch_package() -> Path:
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        stop(
            "building needs torch >= 2.10 (its headers). Install it first and use "
            "`pip install --no-build-isolation .`, or set FASTGEN_NO_EXT=1 for the pure-Python package."
        )
    return Path(spec.submodule_search_locations[0])


def torch_version(package: Path) -> str:
    match = re.search(r"__version__ = ['\"]([^'\"]+)", (package / "version.py").read_text())
    version = match.group(1) if match else "unknown"
    if match and tuple(int(n) for n in version.split(".")[:2]) < (2, 10):
        stop(f"building needs torch >= 2.10, found {version}.")
    return version


def compiler() -> str:
    for name in filter(None, (os.environ.get("CXX"), "c++", "g++", "clang++")):
        if shutil.which(name.split()[0]):
            return name
    stop(
        "no C++ compiler found (CXX, c++, g++, clang++). Install one (`apt install g++`), "
        "or set FASTGEN_NO_EXT=1 for the pure-Python package."
    )


def nvcc() -> str | None:
    """Path of nvcc where CUDA kernels are to be built, else None."""
    wish = os.environ.get("FASTGEN_BUILD_CUDA", "auto")
    if wish not in ("auto", "0", "1"):
        stop(f"FASTGEN_BUILD_CUDA: expected auto, 0 or 1, got {wish!r}.")
    if wish == "0":
        return None
    home = os.environ.get("CUDA_HOME")
    found = shutil.which("nvcc", path=f"{home}/bin") if home else shutil.which("nvcc")
    if found is None and wish == "1":
        place = f"in CUDA_HOME={home}" if home else "on PATH (CUDA_HOME is not set)"
        stop(f"FASTGEN_BUILD_CUDA=1 asks for the CUDA kernels, but there is no nvcc {place}.")
    return found


def cuda_architectures(nvcc_path: str) -> tuple[list[str], list[str]]:
    """(names such as "9.0+PTX", -gencode flags) of what this nvcc can build."""
    listed = subprocess.run([nvcc_path, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    able = {int(n) for n in re.findall(r"compute_(\d+)\b", listed)}
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST")
    names = re.split(r"[;\s]+", (asked or "8.0;9.0;10.0+PTX").strip())
    kept, flags = [], []
    for name in names:
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", name)
        if match is None:
            stop(f"TORCH_CUDA_ARCH_LIST: expected entries like 8.0 or 9.0+PTX, got {name!r}.")
        number = int(match[1] + match[2])
        if number not in able:
            if asked:
                stop(f"TORCH_CUDA_ARCH_LIST: this nvcc cannot build {name} (it can: {sorted(able)}).")
            continue
        code = f"{number}{match[3]}"
        kept.append(name)
        flags += ["-gencode", f"arch=compute_{code},code=sm_{code}"]
        if match[4]:
            flags += ["-gencode", f"arch=compute_{code},code=compute_{code}"]
    if not kept:
        stop(f"this nvcc builds none of {', '.join(names)}; set TORCH_CUDA_ARCH_LIST.")
    return kept, flags


def remove_stale(folder: Path, extensions: list[Extension] | None) -> None:
    """Deletes libraries of an earlier build that this one does not make: they would be packed, or loaded."""
    built = {f"{ext.name.rpartition('.')[2]}.so" for ext in extensions or []}
    for name in {"_C.so", "_C_cuda.so"} - built:
        (folder / name).unlink(missing_ok=True)
    if not built:
        (folder / "build_info.json").unlink(missing_ok=True)


class BuildPython(build_py):
    def run(self) -> None:
        folder = ROOT / "fastgen" if self.editable_mode else Path(self.build_lib) / "fastgen"
        remove_stale(folder, self.distribution.ext_modules)
        super().run()


class BuildLibraries(build_ext):
    """Compiles each source with its own flags, several at once, and skips what is up to date."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".so"

    def run(self) -> None:
        remove_stale(ROOT / "fastgen" if self.inplace else Path(self.build_lib) / "fastgen", self.extensions)
        if self.extensions:
            self.torch_folder = torch_package()
            self.version = torch_version(self.torch_folder)
            self.cxx = compiler().split()
        super().run()
        if self.extensions:
            self.write_build_info()

    def write_build_info(self) -> None:
        folder = ROOT / "fastgen" if self.inplace else Path(self.build_lib) / "fastgen"
        folder.mkdir(parents=True, exist_ok=True)
        line = subprocess.run([self.cxx[-1], "--version"], capture_output=True, text=True).stdout.splitlines()
        path = nvcc()
        facts = {
            "torch_built": self.version,
            "compiler": line[0] if line else self.cxx[-1],
            "cuda_archs": cuda_architectures(path)[0] if path else [],
        }
        (folder / "build_info.json").write_text(json.dumps(facts, indent=2) + "\n")

    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name))
        output.parent.mkdir(parents=True, exist_ok=True)
        work = Path(self.build_temp)
        commands = {}
        for source in ext.sources:
            target = (work / source).with_suffix(".o")
            target.parent.mkdir(parents=True, exist_ok=True)
            commands[target] = [*self.compile_command(source), "-c", source, "-o", str(target)]
        newest_header = max(p.stat().st_mtime for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".inl"))
        # Slowest first: the plain-array kernels take the compiler longest.
        stale = sorted(
            (t for t, c in commands.items() if self.is_stale(t, c, newest_header)),
            key=lambda t: ("generic" not in t.name, t.suffix),
        )
        jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
        with ThreadPoolExecutor(max(1, jobs)) as pool:
            list(pool.map(lambda target: self.compile(commands[target], target), stale))
        self.execute_command(
            [*self.link_command(ext), *map(str, commands), "-o", str(output), *self.torch_libraries(ext)]
        )

    def is_stale(self, target: Path, command: list[str], newest_header: float) -> bool:
        """Whether the object is missing, older than a source or header, or made by another command."""
        made_by = target.with_suffix(".cmd")
        if not target.exists() or not made_by.exists() or made_by.read_text() != " ".join(command):
            return True
        source = ROOT / command[command.index("-c") + 1]
        return target.stat().st_mtime < max(newest_header, source.stat().st_mtime)

    def compile(self, command: list[str], target: Path) -> None:
        target.with_suffix(".cmd").unlink(missing_ok=True)
        self.execute_command(command)
        target.with_suffix(".cmd").write_text(" ".join(command))

    def compile_command(self, source: str) -> list[str]:
        extra = os.environ.get("FASTGEN_CXXFLAGS", "").split()
        common = ["-std=c++20", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unused-parameter"]
        headers = str(self.torch_folder / "include")
        if source.endswith(".cu"):
            path = nvcc()
            names, gencode = cuda_architectures(path)
            sm90a = source in FOR_SM90A and any(name.startswith("9.0") for name in names)
            if sm90a:
                gencode = ["-gencode", "arch=compute_90a,code=sm_90a"]
            contract = "false" if source in WITHOUT_CONTRACTION else "true"
            device = ["-std=c++20", "-O3", f"-fmad={contract}", "-Xcompiler", ",".join([*common[1:3], "-Wall"])]
            defines = [TARGET, "-DUSE_CUDA", f'-DFASTGEN_TORCH_BUILT="{self.version}"']  # objects follow torch
            defines += ["-DFASTGEN_SM90A"] if sm90a else []
            wished = os.environ.get("FASTGEN_NVCCFLAGS", "").split()
            return [path, *device, "-ccbin", self.cxx[-1], *gencode, *defines, "-isystem", headers, *wished]
        if source in SOURCE_FLAGS:
            flags = SOURCE_FLAGS[source]
        else:
            flags = ["-O2", TARGET, f'-DFASTGEN_TORCH_BUILT="{self.version}"', "-isystem", headers]
        return [*self.cxx, *common, *flags, *(["-DFASTGEN_X86"] if X86 else []), *extra]

    def link_command(self, ext: Extension) -> list[str]:
        if ext.name.endswith("_cuda"):
            # nvcc knows where its runtime is. Linked statically, it leaves the driver as the only dependency.
            return [nvcc(), "-shared", "-cudart", "static", "-ccbin", self.cxx[-1], "-Xlinker", "-s"]
        extra = os.environ.get("FASTGEN_CXXFLAGS", "").split()
        return [*self.cxx, "-shared", "-Wl,--as-needed", *(extra or ["-Wl,-s"])]

    def torch_libraries(self, ext: Extension) -> list[str]:
        folder = self.torch_folder / "lib"
        libraries = [f"-L{folder}", "-ltorch_cpu"]
        if ext.name.endswith("_cuda"):
            if not (folder / "libtorch_cuda.so").exists():
                libraries.append(f"-L{self.stand_in_for('libtorch_cuda.so')}")
            libraries += ["-Xlinker", "--no-as-needed", "-ltorch_cuda"]
        return libraries

    def stand_in_for(self, name: str) -> Path:
        """Folder of an empty library called `name`, for linking where torch is a CPU build.

        The library must name its dependency, or the loader does not look for torch's stream function there.
        """
        folder = Path(self.build_temp) / "stand-in"
        folder.mkdir(parents=True, exist_ok=True)
        self.execute_command(
            [*self.cxx, "-shared", f"-Wl,-soname,{name}", "-x", "c++", "/dev/null", "-o", str(folder / name)]
        )
        return folder.resolve()

    def execute_command(self, command: list[str]) -> None:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode or done.stderr.strip():
            print(" ".join(command), done.stdout, done.stderr, sep="\n", file=sys.stderr)
        if done.returncode:
            stop(f"the compiler failed on {command[-3] if '-c' in command else 'the link'} (see above).")

    def get_outputs(self) -> list[str]:
        outputs = super().get_outputs()
        return [*outputs, str(Path(self.build_lib) / "fastgen/build_info.json")] if self.extensions else outputs


class AnyPythonWheel(bdist_wheel):
    """The libraries know no Python: one wheel a platform."""

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, platform_tag = super().get_tag()
        return ("py3", "none", platform_tag) if self.distribution.has_ext_modules() else (python, abi, platform_tag)


extensions = []
if os.environ.get("FASTGEN_NO_EXT", "0") in ("", "0"):
    extensions.append(Extension("fastgen._C", CPU_SOURCES + TORCH_SOURCES))
    if CUDA_SOURCES and nvcc():
        extensions.append(Extension("fastgen._C_cuda", CUDA_SOURCES))

setup(
    ext_modules=extensions,
    cmdclass={"build_ext": BuildLibraries, "build_py": BuildPython, "bdist_wheel": AnyPythonWheel},
)
