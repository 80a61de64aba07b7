"""`fastgen doctor`: finds what is broken, and says what is well."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

import fastgen
from fastgen import reference
from fastgen._ops import SCHEMAS
from fastgen.benchmark import machine
from fastgen.cli import doctor as module
from fastgen.cli.doctor import EXTRAS, diagnose, doctor, runs_on, self_test

app = typer.Typer()
app.command()(doctor)

BUILD = {
    "version": "1.2.3",
    "native": True,
    "native_error": None,
    "isa_compiled": ["generic", "avx2"],
    "isa_active": "avx2",
    "cuda": True,
    "cuda_error": None,
    "cuda_archs": ["8.0", "9.0+PTX"],
    "torch_built": "2.10.0",
    "ops": {"normal": {"cpu": "avx2", "cuda": "8.0, 9.0+PTX"}},
}


@pytest.fixture
def build(monkeypatch):
    """`build_info()`, to be changed by the test."""
    info = dict(BUILD)
    monkeypatch.setattr(fastgen, "build_info", lambda: info)
    monkeypatch.setattr(machine, "openmp_runtimes", list)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return info


@pytest.fixture
def device(monkeypatch, build):
    """Pretends that there is one CUDA device of the given arch, whose self-test passes."""

    def pretend(arch):
        real = module.self_test
        monkeypatch.setattr(module, "_cuda_devices", lambda: [{"name": "Test GPU", "arch": arch}])
        monkeypatch.setattr(module, "self_test", lambda where: real("cpu") if where == "cpu" else iter(()))

    return pretend


def run(*arguments):
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, list(arguments))


def check(diagnosis, name):
    (found,) = (check for check in diagnosis["checks"] if check["name"] == name)
    return found["status"], found["detail"]


def test_this_installation_is_well():
    result = run("--json")
    assert result.exit_code == 0, result.output
    diagnosis = json.loads(result.stdout)
    assert diagnosis["ok"] is True
    assert diagnosis["build"] == json.loads(json.dumps(fastgen.build_info()))
    assert set(diagnosis["build"]["ops"]) >= set(SCHEMAS)
    assert diagnosis["system"]["torch"] == torch.__version__
    assert set(diagnosis["extras"]) == set(EXTRAS)


def test_every_op_is_tested():
    names = {check.name.removeprefix("cpu: ") for check in self_test("cpu")}
    assert names == {*SCHEMAS, "known answers"}
    assert all(check.status == "PASS" for check in self_test("cpu"))


@pytest.mark.parametrize("op", [*SCHEMAS])
def test_a_wrong_op_fails(monkeypatch, op):
    right = getattr(torch.ops.fastgen, op)

    def wrong(*args):
        result = right(*args)
        first = (result[0] if isinstance(result, tuple) else result).clone()
        first.flatten()[-1] += 1
        return (first, *result[1:]) if isinstance(result, tuple) else first

    monkeypatch.setattr(torch.ops.fastgen, op, wrong)
    statuses = {check.name: check.status for check in self_test("cpu")}
    assert statuses[f"cpu: {op}"] == "FAIL"
    failed = {name.removeprefix("cpu: ") for name, status in statuses.items() if status == "FAIL"} - {op}
    # Without kernels the others draw their noise from the op `normal`; the loop of generation is made of ops.
    drawn_from = {
        "random_bits": {"known answers"},
        "normal": {"known answers", *module._REPARAMETERIZE_TENSORS},
        "bernoulli": {*module._ATTENTION_OPS},
        "linear_rows": {"rnn_generate"},
        "recurrent_step": {"rnn_generate"},
        "pick_tokens": {"rnn_generate"},
    }
    assert failed <= drawn_from.get(op, set())


def test_a_changed_stream_fails_though_op_and_reference_agree(monkeypatch):
    monkeypatch.setattr(reference.random, "_WEYL", (1, 2))
    monkeypatch.setattr(torch.ops.fastgen, "random_bits", reference.random_bits)
    known = next(self_test("cpu"))
    assert known.status == "FAIL"
    assert "words of seed 0 are" in known.detail


def test_an_op_that_raises_is_reported(monkeypatch, build):
    def broken(*_):
        raise RuntimeError("illegal instruction")

    monkeypatch.setattr(torch.ops.fastgen, "uniform", broken)
    result = run()
    assert result.exit_code == 1
    assert "cpu: uniform: RuntimeError: illegal instruction" in result.output
    assert "1 of " in result.output
    assert "checks failed" in result.output


def test_the_path_of_each_op_is_printed(build):
    build["ops"] = {"normal": {"cpu": "avx2", "cuda": "no CUDA kernels"}}
    result = run()
    assert result.exit_code == 0, result.output
    assert ["normal", "avx2", "no", "CUDA", "kernels"] in [line.split() for line in result.output.splitlines()]
    assert "built for generic, avx2; avx2 runs" in result.output


def test_no_kernels_is_a_warning(build):
    build.update(native=False, native_error="not built", isa_active=None, cuda=False, cuda_archs=[])
    status, detail = check(diagnose(), "kernels")
    assert status == "WARN"
    assert detail.endswith("(not built)")
    result = run()
    assert result.exit_code == 0
    assert "All is well, 1 to read above." in result.output


def test_kernels_that_do_not_load_fail_with_the_reason(build):
    build.update(native=False, native_error="built for torch 2.10.0, does not load: undefined symbol [x]")
    result = run()
    assert result.exit_code == 1
    assert "FAIL  kernels: none, every op" in result.output
    assert "undefined symbol [x]" in result.output


def test_an_op_without_its_kernel_is_a_warning(build):
    build["ops"] = {"normal": {"cpu": "reference (no kernel)", "cuda": "-"}, "uniform": {"cpu": "avx2", "cuda": "-"}}
    assert check(diagnose(), "ops") == ("WARN", "no kernel, much slower: normal")


def test_two_openmp_runtimes_are_a_warning(monkeypatch, build):
    monkeypatch.setattr(machine, "openmp_runtimes", lambda: ["/a/libgomp.so.1", "/b/libiomp5.so"])
    status, detail = check(diagnose(), "OpenMP")
    assert status == "WARN"
    assert "/a/libgomp.so.1, /b/libiomp5.so" in detail


def test_more_threads_than_cores_are_a_warning(monkeypatch, build):
    monkeypatch.setattr(machine, "available_cores", lambda: 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    assert check(diagnose(), "threads") == ("WARN", "8 threads on 1 cores: set OMP_NUM_THREADS=1")


def test_a_device_without_code_for_it_fails(device, build):
    device("7.5")
    status, detail = check(diagnose(), "cuda:0")
    assert status == "FAIL"
    assert detail == "Test GPU (7.5): kernels were built for 8.0, 9.0+PTX; build again with TORCH_CUDA_ARCH_LIST=7.5"
    assert run().exit_code == 1


def test_a_device_with_code_for_it_passes(device, build):
    device("8.6")
    assert check(diagnose(), "cuda:0") == ("PASS", "Test GPU (8.6)")


def test_a_device_without_kernels_is_a_warning(device, build):
    device("8.6")
    build.update(cuda=False, cuda_archs=[], cuda_error="not built")
    assert check(diagnose(), "cuda:0")[0] == "WARN"
    assert run().exit_code == 0
    build["cuda_error"] = "does not load: no libcudart"
    status, detail = check(diagnose(), "cuda:0")
    assert status == "FAIL"
    assert "no libcudart" in detail


@pytest.mark.parametrize(
    ("built", "device", "runs"),
    [
        ("8.0", "8.0", True),
        ("8.0", "8.6", True),
        ("8.6", "8.0", False),
        ("8.0", "9.0", False),
        ("9.0+PTX", "12.0", True),
        ("9.0+PTX", "8.6", False),
        ("sm_80", "8.9", True),
        ("sm_90a", "9.0", True),
        ("sm_90a", "9.1", False),
        ("compute_90", "10.0", True),
        ("sm_100", "10.0", True),
        ("12.0", "12.1", True),
    ],
)
def test_runs_on(built, device, runs):
    assert runs_on(built, device) is runs


def test_runs_on_refuses_what_is_no_arch():
    with pytest.raises(ValueError, match=r"built: expected an arch .* got 'hopper'"):
        runs_on("hopper", "9.0")


def test_missing_extras_come_with_the_pip_line(monkeypatch, build):
    monkeypatch.setattr(
        module, "_extras", lambda: {"models": {"safetensors": "0.8"}, "train": {"rich": "1", "typer": None}}
    )
    text = run().output
    assert "missing: typer  pip install 'fastgen-torch[train]'" in text
    assert "safetensors 0.8" in text
    assert "fastgen-torch[models]" not in text


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib came with Python 3.11")
def test_the_extras_are_those_of_the_package():
    import tomllib

    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    for extra, packages in EXTRAS.items():
        named = [re.split("[<>=;]", name)[0].strip() for name in project["optional-dependencies"][extra]]
        assert list(packages) == [name for name in named if not name.startswith("fastgen-torch")]


def test_help_teaches():
    text = CliRunner(env={"COLUMNS": "200", "TERM": "dumb"}).invoke(app, ["--help"]).output
    assert "--json" in text
    assert "FAIL" in text
