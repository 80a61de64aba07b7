from __future__ import annotations

import io
from pathlib import Path

import pytest

from fastgen.train.logging import Bar, Lines, MetricsFile, Quiet, make_progress, read_metrics

COLUMNS = ("split", "step", "loss", "kl")


def test_rows_are_on_file_at_once_and_empty_where_there_is_no_value(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    metrics = MetricsFile(path, COLUMNS, 0)
    metrics.write({"split": "train", "step": 5, "loss": 0.1 + 0.2})
    assert read_metrics(path) == [{"split": "train", "step": "5", "loss": repr(0.1 + 0.2), "kl": ""}]
    metrics.write({"split": "test", "step": 5, "loss": 1.0, "kl": 2.0})
    metrics.sync()
    metrics.close()
    assert path.read_text() == f"split,step,loss,kl\ntrain,5,{0.1 + 0.2!r},\ntest,5,1.0,2.0\n"


def test_a_resumed_file_keeps_what_came_before_its_step(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("split,step,loss,kl\ntrain,5,1.0,\ntest,5,2.0,1.0\ntrain,10,3.0,\nfinal,5,2.0,1.0\ntrain,1")
    metrics = MetricsFile(path, COLUMNS, 5)
    metrics.write({"split": "train", "step": 10, "loss": 4.0})
    metrics.close()
    assert path.read_text() == "split,step,loss,kl\ntrain,5,1.0,\ntest,5,2.0,1.0\ntrain,10,4.0,\n"


def test_an_unknown_column_is_a_bug_and_says_so(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "metrics.csv", COLUMNS, 0)
    with pytest.raises(ValueError, match="lr"):
        metrics.write({"split": "train", "step": 5, "lr": 0.1})
    metrics.close()


def test_lines_give_one_line_an_evaluation_with_the_time_left() -> None:
    stream, times = io.StringIO(), iter([100.0, 130.0])
    lines = Lines("tokens", stream, lambda: next(times))
    lines.start(step=100, total=400)
    lines.advance(200)
    lines.report("train", 2, 200, {"loss": 101.234, "kl": 3.0}, 1234.5)
    assert stream.getvalue() == ""
    lines.report("test", 2, 200, {"negative_elbo": 99.5, "kl": 3.25}, None)
    lines.report("final", 2, 200, {"negative_elbo": 99.5}, None)
    lines.stop()
    # 100 steps in 30 s: 200 more take 60 s.
    assert stream.getvalue().splitlines() == [
        "step 200/400  epoch 2  train loss 101.23  1,234 tokens/s  test negative_elbo 99.50  kl 3.250  1:00 left",
        "step 200/400  epoch 2  final negative_elbo 99.50",
    ]


def test_lines_tell_of_a_long_final_evaluation_now_and_then() -> None:
    stream, times = io.StringIO(), iter([100.0, 104.0, 111.0, 112.0, 122.0])
    lines = Lines("examples", stream, lambda: next(times))
    for done in (50, 500, 1050, 1100, 2000):
        lines.evaluate(done, 2000)
    # 1,000 in 11 s: 950 more take 10 s. The last call is the end, of which the figures tell.
    assert stream.getvalue().splitlines() == ["final evaluation  1,050/2,000  0:10 left"]


def test_a_bar_for_the_final_evaluation(capsys: pytest.CaptureFixture[str]) -> None:
    bar = make_progress("bar")
    bar.start(10, 10)
    bar.evaluate(50, 120)
    bar.evaluate(100, 120)
    bar.stop()
    error = capsys.readouterr().err
    assert "final evaluation" in error
    assert "100/120" in error


def test_quiet_is_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    quiet = make_progress("quiet")
    quiet.start(0, 10)
    quiet.report("test", 1, 10, {"loss": 1.0}, None)
    quiet.evaluate(1, 2)
    quiet.message("hello")
    quiet.stop()
    assert capsys.readouterr() == ("", "")


def test_a_bar_counts_steps_and_prints_evaluations(capsys: pytest.CaptureFixture[str]) -> None:
    bar = make_progress("bar")
    bar.start(10, 40)
    bar.advance(20)
    bar.report("train", 1, 20, {"loss": 12.345}, 1000.0)
    bar.report("test", 1, 20, {"loss": 11.5}, None)
    bar.stop()
    error = capsys.readouterr().err
    assert "step 20  epoch 1  test loss 11.50" in error
    assert "20/40" in error
    assert "loss 12.35  1,000 examples/s" in error or "loss 12.34  1,000 examples/s" in error


def test_auto_looks_at_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    assert isinstance(make_progress("auto"), Bar)
    monkeypatch.setattr("sys.stderr.isatty", lambda: False, raising=False)
    assert isinstance(make_progress("auto"), Lines)
    assert isinstance(make_progress("quiet"), Quiet)
