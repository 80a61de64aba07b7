"""The checks of arguments that models, training and data share."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from fastgen import _validate


def test_what_stands_for_an_int_becomes_one() -> None:
    value = _validate.integer("n", np.int64(3), 1)
    assert (value, type(value)) == (3, int)
    assert _validate.integers("sizes", [2, np.int8(3)], 1) == (2, 3)
    assert _validate.integers("sizes", (), 1, allow_empty=True) == ()
    assert _validate.number("p", 1, minimum=0) == 1.0


@pytest.mark.parametrize("value", [0, -1, 1.0, "1", None, True, torch.tensor(1)])
def test_an_int_out_of_range_or_none_at_all_is_named(value: object) -> None:
    with pytest.raises(ValueError, match=r"^n: expected an int of at least 1, got "):
        _validate.integer("n", value, 1)


@pytest.mark.parametrize("value", [(), "12", 5, [1, 0], [1, "2"]])
def test_bad_sequences_of_ints_are_named(value: object) -> None:
    with pytest.raises(ValueError, match=r"^sizes: expected a sequence of ints of at least 1, got "):
        _validate.integers("sizes", value, 1)


@pytest.mark.parametrize(
    ("limits", "value", "message"),
    [
        ({"above": 0}, 0, "p: expected a finite number above 0, got 0"),
        ({"minimum": 0, "below": 1}, 1.0, "p: expected a finite number of at least 0 and below 1, got 1.0"),
        ({}, math.nan, "p: expected a finite number, got nan"),
        ({}, True, "p: expected a finite number, got True"),
    ],
)
def test_numbers_keep_to_their_limits(limits: dict[str, float], value: object, message: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        _validate.number("p", value, **limits)
    assert str(caught.value) == message


def test_booleans_and_choices() -> None:
    assert _validate.boolean("flag", True) is True
    assert _validate.choice("cell", "gru", ("lstm", "gru")) == "gru"
    with pytest.raises(ValueError, match="flag: expected True or False, got 1"):
        _validate.boolean("flag", 1)
    with pytest.raises(ValueError, match="cell: expected one of lstm, gru, got 'rnn'"):
        _validate.choice("cell", "rnn", ("lstm", "gru"))


def test_tensors_and_their_dtypes() -> None:
    x = torch.zeros(2, dtype=torch.bfloat16)
    assert _validate.tensor("x", x) is _validate.floats("x", x) is x
    for check in (_validate.tensor, _validate.floats):
        with pytest.raises(TypeError, match=r"^x: expected a tensor, got list$"):
            check("x", [0.0])
    with pytest.raises(TypeError, match=r"^x: expected floating-point values, got int64$"):
        _validate.floats("x", torch.zeros(2, dtype=torch.int64))


def test_they_need_no_layer_above() -> None:
    program = "import sys, fastgen._validate; print([n for n in sys.modules if n.startswith('fastgen.models')])"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "[]"
