"""The page: templates filled with runs and timings."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from datetime import datetime
from importlib.resources import files

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from fastgen._version import __version__
from fastgen.benchmark.case import EAGER, OURS
from fastgen.report.chart import curve, figure
from fastgen.report.run import FAMILIES, Frame, Metric, Run
from fastgen.report.speed import Speed

__all__ = ["render"]

_MAX_CURVES = 9


def render(runs: Sequence[Run], speed: Speed | None) -> str:
    """The HTML of a report; without `speed` it says nothing of it.

    Everything that comes from a run is escaped. Pictures are data URIs, style and script are in the page.
    """
    environment = Environment(
        loader=PackageLoader("fastgen.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"figure": figure, "duration": duration, "count": count, "uri": uri}
    templates = files("fastgen.report") / "templates"
    return environment.get_template("page.html").render(
        runs=runs,
        speed=speed,
        curves=curves,
        headline=headline,
        settings=lambda run: json.dumps(run.record, indent=2, ensure_ascii=False),
        families=FAMILIES,
        rivals=(("fastgen", OURS), ("PyTorch", EAGER)),
        version=__version__,
        written=f"{datetime.now():%d %B %Y}".lstrip("0"),
        style=Markup((templates / "style.css").read_text(encoding="utf-8")),
        script=Markup((templates / "script.js").read_text(encoding="utf-8")),
    )


def curves(run: Run) -> list[tuple[Metric, Markup]]:
    """Metrics with their panels, without those that repeat another or are 0 all along (a penalty not in use)."""
    found: list[tuple[Metric, Markup]] = []
    for metric in run.metrics:
        if not any(value for _, value in (*metric.train, *metric.test)):
            continue
        repeated = any(metric.train == other.train and (metric.test in ((), other.test)) for other, _ in found)
        if not repeated and (panel := curve(metric)):
            found.append((metric, Markup(panel)))
    return found[:_MAX_CURVES]


def headline(run: Run) -> tuple[Metric, float] | None:
    """The figure to name first, and its value: at the end, or of the latest evaluation."""
    for metric in run.metrics:
        if metric.final is not None:
            return metric, metric.final
        if metric.test:
            return metric, metric.test[-1][1]
    return None


def duration(seconds: float) -> str:
    """Seconds in words: 42 s, 3 min 5 s, 2 h 10 min."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes == 0:
        return f"{rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def count(number: int) -> str:
    """A large number in words: 1.07 million, 24.3 thousand, 831."""
    for unit, size in (("billion", 10**9), ("million", 10**6), ("thousand", 10**3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)


def uri(frame: Frame) -> str:
    assert frame.picture is not None
    return "data:image/png;base64," + base64.b64encode(frame.picture).decode("ascii")
