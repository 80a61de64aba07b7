"""The torch-free kernels under AddressSanitizer and UndefinedBehaviorSanitizer (tests/cpp/kernels_test.cpp)."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from support import ALL_ISAS, ROOT, build, compiler, setup_script

# Unoptimised code keeps every access, and compiles fastest. Null and alignment checks would double the time; ASan
# stops at null as well.
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize=null,alignment,vptr", "-fno-sanitize-recover=all"]


@pytest.fixture(scope="module")
def driver(cpp_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    script = setup_script()
    probe = tmp_path_factory.mktemp("probe")
    (probe / "empty.cpp").write_text("int main() { return 0; }\n")
    command = [compiler(), *SANITIZE, str(probe / "empty.cpp"), "-o", str(probe / "empty")]
    built = subprocess.run(command, capture_output=True, text=True)
    if built.returncode or subprocess.run([probe / "empty"], capture_output=True).returncode:
        pytest.skip("this compiler has no sanitizer runtime")

    common = ["-std=c++20", "-O0", "-g1", *SANITIZE, *(["-DFASTGEN_X86"] if script["X86"] else [])]
    sources = sorted(script["CPU_SOURCES"], key=lambda s: "generic" not in s)  # slowest first
    units = [[*common, *(f for f in script["SOURCE_FLAGS"][s] if not f.startswith("-O")), s] for s in sources]
    return build(cpp_cache, "kernels_test", [*units, [*common, "tests/cpp/kernels_test.cpp"]], SANITIZE)


@pytest.mark.parametrize("isa", ALL_ISAS)
def test_kernels(driver, isa):
    options = {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
    done = subprocess.run([driver, isa], capture_output=True, text=True, cwd=ROOT, env={**os.environ, **options})
    assert done.returncode == 0, done.stderr[-4000:]
    count, word = done.stdout.split()
    assert word == "comparisons"
    assert int(count) > 5_000
