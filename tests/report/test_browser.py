"""The report in a real browser: nothing fails, every picture shows, nothing overflows, the slider works."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import PROGRAM, Page, browser
from run_folders import MODELS, make_run, timed

from fastgen.report import read, render
from fastgen.report.speed import Speed, Timing

pytestmark = pytest.mark.skipif(PROGRAM is None, reason="needs chromium (apt install chromium)")


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    with browser() as tab:
        yield tab


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of all families, with long words where words can be long."""
    folder = tmp_path_factory.mktemp("report")
    long = "x" * 300
    runs = [
        make_run(
            folder / family, family, evaluations=6, text=f"Alas {long}\n" * 9 if family in ("rnn", "gpt") else None
        )
        for family in MODELS
    ]
    data = {"name": long, "train": 10**9, "test": 10**8}
    runs.append(make_run(folder / long[:200], data=data, evaluations=1, finished=False, command=["fastgen", long]))
    speed = Speed((timed("vae", 0.02, 0.03, 1.4, 1.6), timed("gpt", 0.03, 0.02, 0.5, 0.7), Timing("rnn", None)))
    path = folder / "report.html"
    path.write_text(render([read(run) for run in runs], speed), encoding="utf-8")
    return path


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 768, 1280])
def test_the_page_shows(width: int, dark: bool, page: Page, report: Path) -> None:
    page.open(report, width, dark=dark)
    assert page.complaints == []
    assert {request.partition(":")[0] for request in page.requests} == {"file", "data"}
    assert page.evaluate("document.images.length") > 10
    assert page.evaluate("[...document.images].every((image) => image.complete && image.naturalWidth > 0)")
    assert page.evaluate("document.documentElement.scrollWidth") == width
    # Nothing that is not meant to be scrolled sticks out of the window.
    outside = """[...document.querySelectorAll("main *")]
        .filter((element) => !element.closest(".frames:not(.live *), .scroll, svg"))
        .filter((element) => element.getBoundingClientRect().right > innerWidth + 1)
        .map((element) => element.outerHTML)"""
    assert page.evaluate(outside) == []
    assert page.evaluate("[...document.querySelectorAll('svg.chart')].every((svg) => svg.clientHeight > 100)")
    background, ink = (
        [int(x) for x in page.evaluate(f"getComputedStyle(document.body).{name}")[4:-1].split(",")]
        for name in ("backgroundColor", "color")
    )
    assert (sum(background) < sum(ink)) == dark


def test_the_slider(page: Page, report: Path) -> None:
    page.open(report, 1280)
    shown = "[...document.querySelector('.film').querySelectorAll('figure')].map((f) => getComputedStyle(f).visibility)"
    place = "document.querySelector('.film output').value"
    assert page.evaluate(shown) == ["hidden"] * 5 + ["visible"]
    assert page.evaluate(place) == "step 60"
    page.evaluate("document.querySelector('.film input').focus()")
    page.press("ArrowLeft")
    assert page.evaluate(shown) == ["hidden"] * 4 + ["visible", "hidden"]
    assert page.evaluate(place) == "step 50"
    page.press("Home")
    assert page.evaluate(shown) == ["visible"] + ["hidden"] * 5
    assert page.evaluate("document.querySelector('.film input').getAttribute('aria-valuetext')") == "step 10"
    hidden = "[...document.querySelector('.film').querySelectorAll('[aria-hidden=true]')].length"
    assert page.evaluate(hidden) == 5
    # A run with one sample needs none.
    assert page.evaluate("[...document.querySelectorAll('.film')].at(-1).querySelector('input')") is None
    assert page.complaints == []


def test_play_goes_to_the_end_and_stops(page: Page, report: Path) -> None:
    page.open(report, 1280)
    button, place = "document.querySelector('.film button')", "document.querySelector('.film output').value"
    page.evaluate(f"{button}.click()")
    assert page.evaluate(place) == "step 10"
    assert page.evaluate(f"{button}.textContent") == "Pause"
    page.wait(f"{button}.textContent === 'Play'")
    assert page.evaluate(place) == "step 60"
    page.evaluate(f"{button}.click()")
    page.evaluate(f"{button}.click()")
    assert page.evaluate(f"{button}.textContent") == "Play"
    assert page.complaints == []


def test_without_scripts_all_samples_are_there(page: Page, report: Path) -> None:
    page.open(report, 390, scripts=False)
    shown = """[...document.querySelectorAll(".film figure")].filter((figure) =>
        getComputedStyle(figure).visibility === "visible" && figure.clientHeight > 0).length"""
    assert page.evaluate(shown) == 4 * 6 + 1
    assert page.evaluate("document.querySelectorAll('.controls').length") == 0
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    assert page.complaints == []


def test_on_paper_the_first_and_the_last_sample_stay(page: Page, report: Path) -> None:
    page.open(report, 1280)
    page.media("print")
    captions = """[...document.querySelector(".film").querySelectorAll("figure")]
        .filter((figure) => figure.clientHeight > 0).map((figure) => figure.querySelector("figcaption").textContent)"""
    assert page.evaluate(captions) == ["step 10", "step 60"]
    assert page.evaluate("getComputedStyle(document.querySelector('.controls')).display") == "none"
