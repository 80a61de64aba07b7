"""The kernel of matrix products."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import ISAS, assert_threads_change_no_bit, call

# Around the rows of a tile, the vector, the panel, and the depths that are packed and added up at once.
SIZES = (1, 2, 5, 6, 7, 12, 16, 17, 63, 64, 65, 96, 130)
DEPTHS = (0, 1, 15, 16, 64, 127, 128, 129, 300, 1025)


def matrix(rows: int, columns: int, dtype: torch.dtype, order: str) -> torch.Tensor:
    """Of normals; by rows, by columns, as a slice of wider rows, or with neither side dense."""
    if order == "rows":
        return torch.randn(rows, columns, dtype=dtype)
    if order == "columns":
        return torch.randn(columns, rows, dtype=dtype).t()
    if order == "slice":
        return torch.randn(rows, columns + 3, dtype=dtype)[:, 1 : columns + 1]
    return torch.randn(2 * columns, 3 * rows, dtype=dtype).t()[::3, ::2]


ORDERS = ("rows", "columns", "slice", "neither")


@pytest.mark.skipif(not ISAS, reason="the CPU kernels are not built")
@given(
    isa=st.sampled_from(ISAS or ["none"]),
    rows=st.sampled_from((*SIZES, 800)),
    depth=st.sampled_from(DEPTHS),
    columns=st.sampled_from(SIZES),
    dtype=st.sampled_from((torch.float32, torch.float64)),
    orders=st.tuples(st.sampled_from(ORDERS), st.sampled_from(ORDERS)),
    with_bias=st.booleans(),
)
def test_errors_are_at_most_twice_those_of_torch(isa, rows, depth, columns, dtype, orders, with_bias):
    torch.manual_seed(0)
    left, right = matrix(rows, depth, dtype, orders[0]), matrix(depth, columns, dtype, orders[1])
    bias = torch.randn(columns, dtype=dtype) if with_bias else None
    got = call("mm", isa, left, right, bias)
    assert got.is_contiguous()
    assert got.dtype is dtype
    exact = call("mm", "reference", left.double(), right.double(), None if bias is None else bias.double())
    # One result may be exact by luck, and in double there is nothing to compare with: some units in the last place of
    # the sum of all magnitudes are always allowed.
    unit = torch.finfo(dtype).eps * (left.double().abs() @ right.double().abs() + 1).max()
    theirs = call("mm", "reference", left, right, bias).double()
    assert (got.double() - exact).abs().max() <= 2 * (theirs - exact).abs().max() + 4 * unit


@pytest.mark.parametrize("shape", [(0, 3, 4), (3, 0, 4), (3, 4, 0)])
def test_empty(path, shape):
    rows, depth, columns = shape
    bias = torch.arange(columns, dtype=torch.float32)
    got = call("mm", path, torch.ones(rows, depth), torch.ones(depth, columns), bias)
    assert torch.equal(got, bias.expand(rows, columns))
    got = call("mm", path, torch.ones(depth, rows).t(), torch.ones(depth, columns), None)
    assert torch.equal(got, torch.zeros(rows, columns))


def test_bits_do_not_depend_on_the_threads(isa):
    torch.manual_seed(0)
    x, w, g = torch.randn(1000, 300), torch.randn(200, 300), torch.randn(1000, 200)
    assert_threads_change_no_bit(
        lambda: [call("mm", isa, left, right, None) for left, right in ((x, w.t()), (g, w), (g.t(), x))]
    )


def test_opcheck():
    torch.library.opcheck(torch.ops.fastgen.mm.default, (torch.randn(5, 7), torch.randn(9, 7).t(), torch.randn(9)))
    torch.library.opcheck(torch.ops.fastgen.mm.default, (torch.randn(7, 5).t(), torch.randn(7, 9), None))


@pytest.mark.skipif(not ISAS, reason="the CPU kernels are not built")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(2, 3), torch.ones(4, 5), None), "right: expected a matrix with a row for each column of left, 3"),
        ((torch.ones(2, 3), torch.ones(3, 5).double(), None), "right: .* its dtype"),
        ((torch.ones(2, 3).half(), torch.ones(3, 5).half(), None), "left: expected float32 or float64"),
        ((torch.ones(2), torch.ones(3, 5), None), "left: expected a matrix"),
        ((torch.ones(2, 3), torch.ones(3, 5), torch.ones(4)), "bias: expected a vector of 5"),
    ],
)
def test_what_does_not_fit_is_named(arguments, message):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fastgen.mm(*arguments)
