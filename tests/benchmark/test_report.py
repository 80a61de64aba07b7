"""A loss reads as a loss in the table, the words, the JSON and the picture."""

import dataclasses
import io
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console

from fastgen.benchmark import Report, Result, Spread
from fastgen.benchmark.bounds import IN_PLACE, NEW_MEMORY
from fastgen.benchmark.case import COMPILED, EAGER, FLASH, OURS
from fastgen.benchmark.report import duration, verdict

BUILD = {
    "version": "1.2.3",
    "native": True,
    "native_error": None,
    "isa_compiled": ["generic", "avx2"],
    "isa_active": "avx2",
    "cuda": False,
    "cuda_archs": [],
    "torch_built": "2.10.0",
    "ops": {},
}
MACHINE = {"cpu": "Test CPU", "cores": 4, "load": 0.1, "torch": "2.13.0"}


def around(value):
    return Spread(value, 0.9 * value, 1.1 * value)


def row(case, *, eager=None, compiled=None, ours=1e-3, **fields):
    speedups = {name: around(value) for name, value in ((EAGER, eager), (COMPILED, compiled)) if value}
    seconds = {OURS: around(ours)} | {name: around(ours * spread.median) for name, spread in speedups.items()}
    defaults = {"threads": 2, "elements": 1 << 22, "bytes": 12 << 22, "residence": "memory", "rounds": 9}
    return Result(case=case, seconds=seconds, speedups=speedups, **(defaults | fields))


def bounded(result, in_place, new_memory):
    bounds = {IN_PLACE: in_place, NEW_MEMORY: new_memory}
    seconds = {name: around(share * result.seconds[OURS].median) for name, share in bounds.items()}
    shares = {name: around(share) for name, share in bounds.items()}
    return dataclasses.replace(result, seconds=result.seconds | seconds, speedups=result.speedups | shares)


WIN = bounded(row("reparameterize/fwd/fp32/4M", eager=20.0, compiled=3.0), 0.8, 0.95)
LOSS = row("random/uniform/fp32/64K", eager=0.5)
EVEN = row("random/normal/fp32/64K", eager=1.02)
NO_COMPILER = row("reparameterize/fwd/fp32/64x20", eager=2.0, failures={COMPILED: "RuntimeError: no [C++] compiler"})
WRONG = row("random/exponential/fp32/64K", failures={OURS: "wrong result: mean 3 instead of 1"})
WRONG = dataclasses.replace(WRONG, seconds={}, rounds=0)


def report(*results, **fields):
    defaults = {
        "threads": 2,
        "bandwidth": {IN_PLACE: 21.4e9, NEW_MEMORY: 3.25e9},
        "machine": MACHINE,
        "build": BUILD,
        "created": "2026-11-22T00:00:00+00:00",
    }
    return Report(results=results, **(defaults | fields))


def printed(renderables, *, colour=False):
    console = Console(file=io.StringIO(), width=200, force_terminal=colour, color_system="standard" if colour else None)
    for renderable in renderables:
        console.print(renderable, highlight=False, soft_wrap=isinstance(renderable, str))
    return console.file.getvalue()


def line(text, name):
    (found,) = (line for line in text.splitlines() if name in line)
    return found


def test_verdict_needs_three_rounds_in_four():
    assert verdict(Spread(1.2, 1.01, 1.5)) == "faster"
    assert verdict(Spread(1.2, 0.99, 1.5)) == "even"
    assert verdict(Spread(0.9, 0.8, 1.0)) == "even"
    assert verdict(Spread(0.9, 0.8, 0.99)) == "slower"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (2.5e-9, "2.5 ns"),
        (1.234e-5, "12.3 us"),
        (4.5678e-3, "4.57 ms"),
        (0.9996, "1 s"),
        (0.999, "999 ms"),
        (75.0, "75 s"),
    ],
)
def test_duration(seconds, text):
    assert duration(seconds) == text


@given(st.floats(1e-9, 1e2))
def test_duration_keeps_three_digits(seconds):
    value, unit = duration(seconds).split()
    assert float(value) * {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0}[unit] == pytest.approx(seconds, rel=0.0051)


def test_one_table_a_family():
    tables = report(WIN, LOSS, EVEN, NO_COMPILER).tables()
    assert [(table.title, table.row_count) for table in tables] == [("reparameterize", 2), ("random", 2)]


def test_a_win_in_the_table():
    cells = line(printed(report(WIN).tables()), "fwd/fp32/4M").split("│")
    assert [cell.strip() for cell in cells[1:-1]] == [
        *("fwd/fp32/4M", "1 ms", "10%", "4.19", "20 ms", "3 ms", "20.00x faster", "3.00x faster"),
        *("800 us (memory)", "80%, 95%"),
    ]


def test_a_loss_is_worded_and_red():
    text = printed(report(LOSS).tables())
    assert "0.50x slower" in line(text, "uniform/fp32/64K")
    assert "\x1b[1;31m0.50x slower" in printed(report(LOSS).tables(), colour=True)
    assert "\x1b[32m20.00x faster" in printed(report(WIN).tables(), colour=True)
    assert "1.02x even" in line(printed(report(EVEN).tables()), "normal/fp32/64K")


def test_what_other_work_disturbed_is_marked(tmp_path):
    # Times that swing by themselves, and a ratio that does: eager's, though it is a win in every round.
    swinging = dataclasses.replace(WIN, seconds=WIN.seconds | {OURS: Spread(1e-3, 0.8e-3, 1.4e-3)})
    doubtful = dataclasses.replace(WIN, case="random/x", speedups=WIN.speedups | {EAGER: Spread(20.0, 8.0, 30.0)})
    spoilt = dataclasses.replace(LOSS, speedups={EAGER: Spread(0.5, 0.3, 0.9)})
    assert [result.disturbed for result in (WIN, swinging, doubtful, spoilt)] == [[], [OURS], [EAGER], [EAGER]]
    text = printed([*report(swinging, doubtful, spoilt).tables(), *report(swinging, doubtful, spoilt).footer()])
    cells = [cell.strip() for cell in line(text, "fwd/fp32/4M ").split("│")[1:-1]]
    assert (cells[2], cells[6]) == ("30%?", "20.00x faster")
    cells = [cell.strip() for cell in line(text, "│ x ").split("│")[1:-1]]
    assert (cells[2], cells[6], cells[7]) == ("10%", "20.00x faster?", "3.00x faster")
    assert "?: disturbed by other work" in text
    assert "reparameterize/fwd/fp32/4M, random/x, random/uniform/fp32/64K" in text
    # A loss stays one.
    assert "Slower in 1 of 5 comparisons" in text
    assert "0.50x slower?" in text

    data, _ = report(WIN, doubtful).write(tmp_path)
    assert [row["disturbed"] for row in json.loads(data.read_text())["results"]] == [[], [EAGER]]
    assert "disturbed" not in printed(report(WIN).footer())


def test_losses_are_summed_up_below():
    with_loss = report(WIN, LOSS, EVEN)
    assert with_loss.lost() == ["random/uniform/fp32/64K (eager)"]
    assert "Slower in 1 of 4 comparisons: random/uniform/fp32/64K (eager)" in printed(with_loss.footer())
    assert "Slower in none of 3 comparisons." in printed(report(WIN, EVEN).footer())


def test_failures_stand_in_their_row_and_below():
    both = report(NO_COMPILER, WRONG)
    text = printed([*both.tables(), *both.footer()])
    assert "failed" in line(text, "fwd/fp32/64x20 ")
    assert "random/exponential/fp32/64K, fastgen: wrong result: mean 3 instead of 1" in text
    assert "reparameterize/fwd/fp32/64x20, torch.compile: RuntimeError: no [C++] compiler" in text
    assert line(text, "│ exponential").split("│")[2].strip() == "wrong"
    assert both.wrong() == ["random/exponential/fp32/64K"]
    assert report(NO_COMPILER).wrong() == []


def test_header_names_the_machine_and_the_path():
    assert report(WIN).header() == [
        "Test CPU, 4 cores, 2 threads",
        "fastgen 1.2.3, kernels: avx2; torch 2.13.0",
        "copy (read + write): 21.4 GB/s in place, 3.25 GB/s into new memory",
    ]
    busy = report(machine=MACHINE | {"load": 2.5}).header()[0]
    assert busy.endswith("2 threads; busy with other work (load 2.5), expect swings")
    assert report(machine=MACHINE | {"load": None}).header() == report(WIN).header()
    assert "none, the plain PyTorch reference runs" in report(build=BUILD | {"native": False}).header()[1]


def test_a_gpu_and_its_rivals_are_named():
    gpu = {"name": "Test GPU", "multiprocessors": 132, "cuda": "13.0"}
    row = dataclasses.replace(
        WIN,
        case="attention/x",
        speedups=WIN.speedups | {FLASH: around(0.8)},
        seconds=WIN.seconds | {FLASH: around(8e-4)},
    )
    on_gpu = report(row, machine=MACHINE | {"gpu": gpu}, build=BUILD | {"cuda": True, "cuda_archs": ["9.0+PTX"]})
    assert on_gpu.header()[0].endswith("; Test GPU, 132 multiprocessors, CUDA 13.0")
    assert "kernels: cuda 9.0+PTX;" in on_gpu.header()[1]
    text = printed(on_gpu.tables())
    assert f"vs {FLASH}" in text
    assert "0.80x slower" in text
    assert f"vs {FLASH}" not in printed(report(WIN).tables())
    assert on_gpu.lost() == [f"attention/x ({FLASH})"]


def test_json_holds_every_figure(tmp_path):
    data, _ = report(WIN, LOSS, NO_COMPILER, WRONG, settings={"full": False}).write(tmp_path)
    content = json.loads(data.read_text())
    assert content["schema"] == 1
    assert set(content) == {"schema", "results", "threads", "bandwidth", "settings", "machine", "build", "created"}
    assert content["build"] == BUILD
    assert content["machine"] == MACHINE
    assert content["settings"] == {"full": False}
    first = content["results"][0]
    assert set(first) == {field.name for field in dataclasses.fields(Result)} | {"disturbed"}
    assert first["speedups"][EAGER] == {"median": 20.0, "q1": 18.0, "q3": 22.0}
    assert first["seconds"][OURS]["median"] == 1e-3
    assert content["results"][2]["failures"] == NO_COMPILER.failures


def test_a_number_that_json_lacks_is_refused_and_leaves_no_file(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        report(row("random/normal/fp32/64K", eager=float("inf"))).write(tmp_path)
    assert list(tmp_path.iterdir()) == []


def red_pixels(path):
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    return int((np.abs(pixels - np.array([0xCC, 0x33, 0x11])).sum(-1) < 12).sum())


def test_picture_is_written_and_shows_a_loss_in_red(tmp_path):
    report(WIN, EVEN).plot(tmp_path / "win.png")
    report(WIN, EVEN, LOSS).plot(tmp_path / "loss.png")
    with Image.open(tmp_path / "loss.png") as picture:
        assert picture.format == "PNG"
        assert picture.width > 1000
    # Both have the red patch of the legend; only a loss has a bar and its words.
    assert red_pixels(tmp_path / "loss.png") > 3 * red_pixels(tmp_path / "win.png") > 0


def test_written_files_and_no_others(tmp_path):
    paths = report(WIN).write(tmp_path / "new" / "folder")
    assert [path.name for path in paths] == ["bench.json", "bench.png"]
    assert sorted(path.name for path in paths[0].parent.iterdir()) == ["bench.json", "bench.png"]


def test_a_report_without_comparisons_can_be_written(tmp_path):
    report(WRONG).write(tmp_path)
    assert (tmp_path / "bench.png").stat().st_size > 1000
