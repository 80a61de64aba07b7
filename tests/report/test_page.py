"""The HTML of a report, parsed: whole, well formed, without other files, and safe whatever a run holds."""

from __future__ import annotations

import base64
import itertools
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from run_folders import MODELS, make_run, png, timed

from fastgen.benchmark import Result
from fastgen.report import read, render, write_report
from fastgen.report import speed as speed_module
from fastgen.report.chart import curve, figure, ticks
from fastgen.report.page import count, curves, duration
from fastgen.report.run import Metric
from fastgen.report.speed import Speed, Timing, case_of, measure_families

_VOID = {"meta", "link", "img", "br", "input", "hr"}
_SVG_VOID = {"line", "circle", "polyline"}  # of the charts, which close them at once


class Tree(HTMLParser):
    """Checks that tags nest, and keeps (tag, attributes, text so far within it)."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == [], self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(set(names)) == len(names), (tag, names)
        self.tags.append((tag, dict(attrs)))
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in _SVG_VOID, tag
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, tag
        assert self.open.pop() == tag, (self.open, tag, self.getpos())

    def handle_data(self, data: str) -> None:
        if not {"style", "script"} & {*self.open}:
            self.text.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """A run of each family, one of them unfinished and one that has hardly begun."""
    made = [
        make_run(tmp_path / family, family, text="Line of\ntext" if family in ("rnn", "gpt") else None)
        for family in MODELS
    ]
    made.append(make_run(tmp_path / "stopped", finished=False, evaluations=1))
    made.append(make_run(tmp_path / "begun", finished=False, evaluations=0))
    return made


def test_the_page_is_whole(folders: list[Path]) -> None:
    tree = Tree(render([read(folder) for folder in folders], None))
    assert tree.tags[0] == ("html", {"lang": "en"})
    assert len(tree.all("article")) == len(folders)
    ids = [attributes["id"] for _, attributes in tree.tags if "id" in attributes]
    assert len(set(ids)) == len(ids)
    # What is pointed to is there.
    for _, attributes in tree.tags:
        assert attributes.get("aria-labelledby", ids[0]) in ids
        href = attributes.get("href")
        assert href is None or href == "data:," or href.removeprefix("#") in ids
    # The headings of a reader with ears: no level is left out.
    levels = [int(tag[1]) for tag, _ in tree.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))


def test_nothing_is_fetched(folders: list[Path]) -> None:
    html = render([read(folder) for folder in folders], None)
    tree = Tree(html)
    for attribute in ("src", "href", "srcset", "poster", "data", "action"):
        for tag, attributes in tree.tags:
            value = attributes.get(attribute)
            assert value is None or value.startswith(("data:", "#")), (tag, value)
    assert "url(" not in html
    assert "@import" not in html
    assert not re.search(r"\b(fetch|XMLHttpRequest|import)\(", html)
    assert "http" not in re.sub(r"base64,[\w+/=]+", "", html)


def test_pictures_are_in_the_page(folders: list[Path]) -> None:
    images = Tree(render([read(folders[0])], None)).all("img")
    assert len(images) == 5  # four samples and the interpolation
    assert base64.b64decode(str(images[0]["src"]).partition(",")[2]) == png(60, 60, 1)
    assert (images[0]["width"], images[0]["height"]) == ("60", "60")
    assert [image["alt"] for image in images[:2]] == [
        "Samples of the Variational autoencoder on mnist: step 10",
        "Samples of the Variational autoencoder on mnist: step 20",
    ]


def test_what_is_told_of_a_run(folders: list[Path]) -> None:
    words = Tree(render([read(folders[0])], None)).words
    for part in (
        "conv encoder and decoder, 16 latent dimensions, bernoulli likelihood",
        "2.02 thousand weights",
        "2 min 5 s for 40 steps",
        "41.5 nats an image",
        "final only 7.25",
        f"fastgen generate {folders[0]} --n 64 --seed 1 --out vae.png",
        '"latent_dim": 16',
    ):
        assert part in words
    assert "Unfinished" not in words
    assert "plain PyTorch" not in words


def test_what_is_told_of_runs_that_have_not_ended(folders: list[Path]) -> None:
    stopped, begun = (Tree(render([read(folder)], None)) for folder in folders[-2:])
    assert "Unfinished. This is what there is after step 10" in stopped.words
    assert stopped.words.count("Final figures") == 0
    assert "101 nats an image loss" in stopped.words  # of the latest evaluation
    assert "Unfinished. It has written no figures yet." in begun.words
    assert begun.all("svg") == []


def test_whatever_a_run_holds_is_escaped(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script><img src=x onerror=alert(2)>&\"'{{ 7*7 }}"
    data = {"name": evil, "train": 1, "test": 1, "tokenizer": evil}
    run = make_run(tmp_path / "<b>'run'", "gpt", text=evil, data=data, command=["fastgen", evil], machine={"cpu": evil})
    html = render([read(run)], None)
    tree = Tree(html)
    assert len(tree.all("script")) == 1
    assert tree.all("img") == []
    assert tree.all("b") == []
    assert evil in "".join(tree.text)
    assert "49" not in tree.words


@pytest.mark.parametrize(
    ("q1", "q3", "word", "shown"),
    [(1.4, 1.6, "faster", "1.50x as fast"), (0.9, 1.6, "even", "1.50x: even"), (0.5, 0.9, "slower", "as fast: slower")],
)
def test_speed_is_told_honestly(q1: float, q3: float, word: str, shown: str, tmp_path: Path) -> None:
    timing = timed("vae", 0.02, 0.03 if word != "slower" else 0.016, q1, q3)
    speed = Speed((timing, Timing("flow", None)), threads=3)
    tree = Tree(render([read(make_run(tmp_path / "run"))], speed))
    assert shown in tree.words
    assert {"class": f"ratio {word}"} in tree.all("span")
    assert f"Half of 9 rounds lie between {q1:.2f}x and {q3:.2f}x" in tree.words
    assert "20 ms" in tree.words
    assert f"{speed.machine['cpu']}" in tree.words
    assert "3 threads" in tree.words
    assert "Not timed: there is no benchmark of its training step." in tree.words
    widths = [float(re.findall(r"[\d.]+", str(span["style"]))[0]) for span in tree.all("span") if "style" in span]
    assert max(widths) == 70
    assert widths[0] / widths[1] == pytest.approx(timing.share("fastgen") / timing.share("eager"), rel=1e-2)


def test_a_wrong_answer_is_not_timed_but_told(tmp_path: Path) -> None:
    result = Result("vae/x", 1, 1, 1, "L1", failures={"fastgen": "wrong result: loss 1 instead of 2"})
    tree = Tree(render([read(make_run(tmp_path / "run"))], Speed((Timing("vae", result),))))
    assert "Not timed: fastgen: wrong result: loss 1 instead of 2." in tree.words


def test_families_are_timed_by_their_training_step(monkeypatch: pytest.MonkeyPatch) -> None:
    for family in ("vae", "rnn", "gpt"):
        case = case_of(family)
        assert case is not None
        assert case.name.startswith(f"{family}/")
        assert "training/fp32" in case.name
        assert case.elements >= 64
        assert case.flops <= 10**10
    # The default model of two that are short; where none is, the shortest.
    assert case_of("gan").name.startswith("gan/conv")
    monkeypatch.setattr(speed_module, "_FLOPS", 1)
    assert case_of("gan").name.startswith("gan/mlp")
    monkeypatch.undo()
    assert case_of("flow") is None
    assert case_of("random") is None  # a family of cases without a training step
    monkeypatch.setattr(speed_module, "_SECONDS", 0.0)
    monkeypatch.setattr(speed_module, "_ROUNDS", 2)
    monkeypatch.setattr(speed_module, "case_of", lambda family: None if family == "x" else case_of(family).shrunk())
    said: list[str] = []
    speed = measure_families(["vae", "x"], said.append)
    assert said == ["timing vae/conv/training/fp32/4x1x28x28"]
    first, second = speed.timings
    assert first.ratio is not None
    assert first.ratio.median > 0
    assert first.failure == ""
    assert second.ratio is None


def test_write_report(folders: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "new" / "report.html"
    assert [run.folder for run in write_report(folders, out, speed=False)] == [str(folder) for folder in folders]
    first = out.read_text(encoding="utf-8")
    write_report(folders[:1], out, speed=False)
    assert len(out.read_text(encoding="utf-8")) < len(first)
    assert [path.name for path in out.parent.iterdir()] == ["report.html"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"runs": []}, "runs: expected at least one run folder, got none"),
        ({"out": "report.pdf"}, "out: expected a file that ends in .html, got 'report.pdf'"),
        ({"runs": ["run", "./run"]}, "runs: ./run is given twice"),
        ({"runs": ["run", "nothing"]}, "nothing: no such run folder"),
    ],
)
def test_bad_arguments(change: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_run(Path("run"))
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(message)):
        write_report(**{"runs": ["run"], "out": "report.html", "speed": False, **change})
    assert not Path("report.html").exists()


# --- Curves ------------------------------------------------------------------------------------------------


def metric(train: list[tuple[int, float]], test: list[tuple[int, float]]) -> Metric:
    return Metric("loss", "loss", "nats", tuple(train), tuple(test), None)


def test_a_curve_lies_where_its_values_are() -> None:
    tree = Tree(curve(metric([(20, 4.0), (50, 2.0), (100, 1.0)], [(50, 2.5), (100, 1.5)])))
    (outer, inner) = tree.all("svg")
    assert outer["role"] == "img"
    assert outer["aria-label"] == (
        "loss in nats over the steps: in training from 4 at step 20 to 1 at step 100; "
        "held out from 2.5 at step 50 to 1.5 at step 100"
    )
    left, top, width, height = (float(x) for x in str(inner["viewbox"]).split())
    train, test = (
        [tuple(map(float, point.split(","))) for point in str(line["points"]).split()] for line in tree.all("polyline")
    )
    assert [x for x, _ in train] == pytest.approx([left + width * share for share in (0.2, 0.5, 1)], abs=0.1)
    # Heights are linear in the values: (4 - 2) against (2 - 1).
    assert (train[1][1] - train[0][1]) / (train[2][1] - train[1][1]) == pytest.approx(2, abs=0.02)
    assert train[1][1] > test[0][1]  # 2.5 is above 2.0
    assert all(top <= y <= top + height for _, y in [*train, *test])
    assert len(tree.all("circle")) == 2


def test_curves_of_many_points_are_means() -> None:
    tree = Tree(curve(metric([(step, step % 2) for step in range(1, 2001)], [])))
    (line,) = tree.all("polyline")
    heights = {point.split(",")[1] for point in str(line["points"]).split()}
    assert len(str(line["points"]).split()) <= 300
    assert len(heights) <= 3  # the means of seven, one way or the other, and of the last five


@pytest.mark.parametrize("points", [[], [(5, 1.0)]])
def test_no_curve_of_a_point(points: list[tuple[int, float]]) -> None:
    assert curve(metric(points, [])) == ""


@pytest.mark.parametrize("value", [0.0, -3.5, 1e-9, 1e12])
def test_a_constant_has_a_curve(value: float) -> None:
    (line,) = Tree(curve(metric([(1, value), (2, value)], []))).all("polyline")
    assert "nan" not in str(line["points"])


def test_curves_that_repeat_another_are_left_out(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    table = (folder / "metrics.csv").read_text().splitlines()
    again = [f"{line},{line.split(',')[3]}" for line in table]
    (folder / "metrics.csv").write_text(
        "\n".join([again[0].replace(",loss", ",loss", 1)[: -len("loss")] + "twin", *again[1:]]) + "\n"
    )
    assert [metric.name for metric, _ in curves(read(folder))] == ["loss", "kl"]


def test_a_figure_that_is_not_in_use_has_no_curve(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    table = (folder / "metrics.csv").read_text().splitlines()
    rows = [
        ",".join([*line.split(",")[:4], "0.0" if line[:5] == "train" else "", *line.split(",")[5:]])
        for line in table[1:]
    ]
    (folder / "metrics.csv").write_text("\n".join([table[0], *rows]) + "\n")
    assert [metric.name for metric, _ in curves(read(folder))] == ["loss"]


def test_ticks_are_round() -> None:
    assert ticks(0, 2400, 5) == [0, 500, 1000, 1500, 2000]
    assert ticks(1.43, 2.07, 5) == pytest.approx([1.6, 1.8, 2.0])
    assert ticks(-4.2, -0.5, 5) == [-4, -3, -2, -1]
    for low, high in ((0, 1e-7), (1e6, 1e6 + 1), (-1e9, 1e9)):
        assert 2 <= len(ticks(low, high, 5)) <= 6


def test_numbers_in_words() -> None:
    assert [figure(x) for x in (0, 1234.5, -3.88649, 0.0107123, 97.351, 1e6)] == [
        *("0", "1,234", "-3.886", "0.01071", "97.35", "1,000,000")
    ]
    assert [count(n) for n in (0, 831, 17_312, 1_690_000, 2_100_000_000)] == [
        *("0", "831", "17.3 thousand", "1.69 million", "2.1 billion")
    ]
    assert [duration(s) for s in (0, 59.4, 60, 185, 7_800)] == ["0 s", "59 s", "1 min 0 s", "3 min 5 s", "2 h 10 min"]
