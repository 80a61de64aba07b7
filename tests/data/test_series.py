"""Series: what is read from text and NumPy files, what is refused and how, and the two formulas."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from fastgen.data import SeriesSet, load_series


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("text", "columns"),
    [
        ("a,b\n1,2.5\n-3e2,4\n", ("a", "b")),
        ("\ufeffa; b\r\n1;2.5\r\n\r\n-300; 4\r\n", ("a", "b")),
        ("a\tb\n1\t2.5\n-300\t4", ("a", "b")),
        ("1 2.5\n-300 4\n", ("x0", "x1")),
        ('"a","b, c"\n"1","2.5"\n-300,4\n', ("a", "b, c")),
    ],
)
def test_text(text: str, columns: tuple[str, ...], tmp_path: Path) -> None:
    series = load_series(write(tmp_path / "weather.csv", text))
    assert series.values.tolist() == [[1.0, 2.5], [-300.0, 4.0]]
    assert series.values.dtype == torch.float32
    assert series.columns == columns
    assert series.name == "weather"


def test_one_column(tmp_path: Path) -> None:
    assert load_series(write(tmp_path / "x.txt", "1\n2\n3\n")).values.tolist() == [[1.0], [2.0], [3.0]]
    assert load_series(write(tmp_path / "x.txt", "level\n1\n")).columns == ("level",)


def test_columns_and_time(tmp_path: Path) -> None:
    path = write(tmp_path / "s.csv", "day,a,b\n2020-01-01,1,2\n2020-01-02,3,4\n")
    series = load_series(path, time_column="day")
    assert series.columns == ("a", "b")
    assert series.values.tolist() == [[1.0, 2.0], [3.0, 4.0]]
    assert load_series(path, columns=["b"]).values.tolist() == [[2.0], [4.0]]
    assert load_series(path, columns=["b", "a"]).columns == ("b", "a")
    nameless = write(tmp_path / "n.csv", "2020-01-01,1\n2020-01-02,3\n")
    assert load_series(nameless, time_column="x0").values.tolist() == [[1.0], [3.0]]
    piped = write(tmp_path / "p.csv", "1|2\n3|4\n")
    assert load_series(piped, delimiter="|").values.tolist() == [[1.0, 2.0], [3.0, 4.0]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n3,\n", "line 3, column 'b': expected a number, got nothing"),
        ("a,b\n1,2\n\n3,n/a\n", "line 4, column 'b': expected a number, got 'n/a'"),
        ("a,b\n1,nan\n", "line 2, column 'b': expected a number, got 'nan'"),
        ("a,b\n1,inf\n", "line 2, column 'b': expected a number, got 'inf'"),
        ("2020-01-01,1\n", "line 1, column 'x0': expected a number, got '2020-01-01'"),
        ("2020-01-01,1\n", "line 1 is taken for values, as '1' is no name; time_column x0 leaves it out$"),
        (
            "time,2020,2021\n1,2,3\n",
            "line 1, column 'x0': .*, got 'time'; line 1 is taken for values, as '2020' is no name$",
        ),
        ("day,a\nMon,1\nTue,2\n", "line 2, column 'day': expected a number, got 'Mon'; time_column day leaves it out$"),
        ("a,b\n1,2\nred,4\n", "line 3, column 'a': expected a number, got 'red'$"),
        ("a\nred\n", "line 2, column 'a': expected a number, got 'red'$"),
        ("a,b,\n1,2,\n", "line 2, column 3, which has no name: expected a number, got nothing$"),
        ("a,b\n1,2\n3\n", "line 3: expected 2 columns as in line 1, apart by ',', got 1"),
        ("a\n1,5\n", "line 2: expected 1 column as in line 1, apart by ',', got 2"),
        ("day temperature\n\n1\n", "line 3: expected 2 columns as in line 1, apart by ' ', got 1"),
        ('a,b\n1,2\n3,"4\n5,6\n', "line 3: a quotation mark has no end"),
        ("a;b\n1,5;2\n", "line 2, column 'a': expected a number, got '1,5'; decimals stand behind a point"),
        ("a,b\n1,2\n1,-1e39\n", "line 3, column 'b': expected a number that float32 holds, got '-1e39'"),
        ('a,b\n1,2\n1,"' + "x" * 200_000, "line 3: not a table "),
        ("\na,b\n", "expected rows of numbers, got one line without a number, 'a,b'"),
        (" \n", "expected rows of numbers, got an empty file"),
    ],
)
def test_faults_are_named_with_their_place(text: str, message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "s.csv", text)
    with pytest.raises(ValueError, match=message) as caught:
        load_series(path)
    assert str(path) in str(caught.value)


def test_bad_options(tmp_path: Path) -> None:
    path = write(tmp_path / "s.csv", "a,b,b\n1,2,3\n")
    for options, message in (
        ({"time_column": "c"}, "expected one column 'c', got 0; there are a, b, b"),
        ({"columns": ["b"]}, "expected one column 'b', got 2"),
        ({"columns": []}, "columns: expected at least one"),
        ({"columns": ["a"], "time_column": "a"}, "columns: expected at least one, without the time"),
        ({"delimiter": "::"}, "delimiter: expected one character, got '::'"),
    ):
        with pytest.raises(ValueError, match=message):
            load_series(path, **options)
    with pytest.raises(ValueError, match="expected a column beside 'a', found none"):
        load_series(write(tmp_path / "t.csv", "a\n1\n"), time_column="a")
    with pytest.raises(ValueError, match="time_column: expected None for sine, which is no text file, got 'a'"):
        load_series("sine", time_column="a")
    with pytest.raises(FileNotFoundError, match='absent: no such file, and not "sine" or "mackey-glass"'):
        load_series(tmp_path / "absent")
    with pytest.raises(ValueError, match="expected a file with a series, got a folder"):
        load_series(tmp_path)
    partly = write(tmp_path / "u.csv", "date,2020,2021\n2020-01-01,1,2\n")
    for options, name in (({"time_column": "date"}, "date"), ({"columns": ["2021"]}, "2021")):
        with pytest.raises(
            ValueError, match=f"one column '{name}', got 0; .* line 1 is taken for values, as '2020' is no"
        ):
            load_series(partly, **options)
    for content, message in (
        (b"a\n\xe9\n", r"not UTF-8 text: byte 0xe9 at offset 2 \(line 2\)"),
        ("a\n1\n".encode("utf-16"), "expected UTF-8, got UTF-16"),
    ):
        (tmp_path / "coded.csv").write_bytes(content)
        with pytest.raises(ValueError, match=message):
            load_series(tmp_path / "coded.csv")


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.int16])
def test_numpy(dtype: type, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(4, dtype=dtype))
    np.savez(tmp_path / "b.npz", values=np.arange(6, dtype=dtype).reshape(3, 2))
    assert load_series(tmp_path / "a.npy").values.tolist() == [[0.0], [1.0], [2.0], [3.0]]
    series = load_series(tmp_path / "b.npz")
    assert series.values.tolist() == [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]]
    assert series.columns == ("x0", "x1")


def test_bad_numpy(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    for array, message in (
        (np.array([[1.0, 2.0], [3.0, np.nan]]), "row 1, column 1: expected a number, got nan"),
        (np.zeros((2, 2, 2)), r"expected numbers \(T,\) or \(T, F\)"),
        (np.zeros((0, 2)), "none of them 0"),
        (np.array(["a"]), "expected numbers"),
        (np.array([{}], dtype=object), "not a readable .npy file"),
        (np.array([1e300]), "row 0, column 0: expected a number, got 1e[+]300"),
    ):
        np.save(path, array, allow_pickle=True)
        with pytest.raises(ValueError, match=message), np.errstate(over="ignore"):
            load_series(path)
    np.savez(tmp_path / "b.npz", a=np.zeros(2), b=np.zeros(2))
    with pytest.raises(ValueError, match="expected one array, got a, b"):
        load_series(tmp_path / "b.npz")
    (tmp_path / "c.npz").write_bytes(b"PK no archive")
    with pytest.raises(ValueError, match="not a readable"):
        load_series(tmp_path / "c.npz")


def test_sine() -> None:
    series = load_series("sine")
    noise = series.values[:, 0].double() - torch.sin(2 * math.pi / 25 * torch.arange(2000, dtype=torch.float64))
    assert len(series) == 2000
    assert abs(float(noise.std()) - 0.1) < 0.01
    assert torch.equal(series.values, load_series("sine").values)


def test_mackey_glass_obeys_its_equation() -> None:
    """Between samples a unit of time apart the equation holds to the error of the trapezium rule."""
    x = load_series("mackey-glass").values[:, 0].double()
    slope = 0.2 * x[:-17] / (1 + x[:-17] ** 10) - 0.1 * x[17:]
    change = x[18:] - x[17:-1]
    error = change - (slope[:-1] + slope[1:]) / 2
    assert float(error.abs().max()) < 0.02
    assert 0.2 < float(x.min()) < 0.6
    assert 1.2 < float(x.max()) < 1.5
    assert float(x.std()) > 0.15


def test_parts_and_scale() -> None:
    series = SeriesSet(torch.tensor([[1.0, 7.0], [3.0, 7.0], [100.0, 7.0]]))
    train, test = series.split(1)
    assert (len(train), len(test)) == (2, 1)
    mean, scale = train.scale()
    assert mean.tolist() == [2.0, 7.0]
    assert scale.tolist() == [1.0, 1.0]
    inputs, targets = series.streams(1, 2)[0]
    assert torch.equal(inputs, series.values[None, :2])
    assert torch.equal(targets, series.values[None, 1:])
    assert repr(series) == "series: 3 steps of 2 (x0, x1)"
    with pytest.raises(ValueError, match="test_size: expected at least 2 steps, one for each part, got 1"):
        SeriesSet(torch.ones(1, 2)).split()
    with pytest.raises(ValueError, match="test_size: expected 1 to 2 of the 3 steps, got 3"):
        series.split(3)


def test_a_set_is_checked() -> None:
    for values, message in (
        (torch.zeros(3), r"expected float32 \(T, F\), neither of them 0, got float32 \(3,\)"),
        (torch.zeros(3, 1).double(), "got float64"),
        (torch.tensor([[1.0], [math.inf]]), "values: expected finite numbers, got inf at step 1"),
    ):
        with pytest.raises(ValueError, match=message):
            SeriesSet(values)
    with pytest.raises(ValueError, match="columns: expected 1 names, got 2"):
        SeriesSet(torch.zeros(3, 1), ("a", "b"))
