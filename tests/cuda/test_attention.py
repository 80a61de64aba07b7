"""The forward pass of attention by the CUDA kernels: values beside float64's, how work is dealt out, what is refused.

On the emulated device wherever the tests run, and on a GPU where one is.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from attention_cases import CUDA_EDGES, EXAMPLES, Case, assert_no_worse, cases, on
from emulated import EMULATED
from hypothesis import HealthCheck, given, settings
from support import assert_same_bits

from fastgen import reference
from fastgen.functional import scaled_dot_product_attention

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LONG = [
    Case(batch=1, heads=8, key_heads=2, queries=130, keys=150, width=64, value_width=64, causal=True, seed=1),
    Case(queries=40, keys=333, width=80, value_width=48, layout="rows", seed=2),
    Case(queries=130, keys=97, width=16, mask="float-1", slopes="heads", seed=3),
    Case(queries=97, keys=200, width=33, mask="bool-02", dropout=0.2, softcap=5.0, seed=4),
    Case(batch=1, queries=190, keys=190, width=32, lengths=((100, 1, 70, 19),) * 2, window=20, causal=True, seed=5),
    Case(batch=1, queries=150, keys=150, width=64, value_width=64, window=(30, 5), layout="repeated", seed=6),
]
DECODE = [  # few queries against many keys
    Case(queries=1, keys=700, heads=6, key_heads=2, width=64, value_width=64, causal=True, lower_right=True, seed=1),
    Case(queries=3, keys=515, heads=4, key_heads=1, width=128, value_width=96, causal=True, lower_right=True, seed=2),
    Case(queries=2, keys=600, heads=4, key_heads=2, width=20, mask="bool-1", slopes="rows", dropout=0.3, seed=3),
    Case(
        batch=1, heads=4, key_heads=2, queries=4, keys=903, width=64, lengths=((1, 2, 0, 1), (700, 3, 200, 0)), seed=4
    ),
    Case(queries=5, keys=800, width=16, window=(300, 0), lower_right=True, softcap=2.0, seed=5),
]


def put(gpu, operands):
    return [gpu.put(x) for x in operands]


def assert_errors(gpu, case, dtype):
    operands = case.operands(dtype)
    with on(gpu):
        mine = case.ours(*put(gpu, operands))
    theirs = case.theirs(*operands)
    exact = case.theirs(*[x.double() if x.is_floating_point() else x for x in operands])
    assert mine[0].dtype == dtype
    assert mine[1].dtype == torch.float32
    for a, b, w in zip(mine, theirs, exact, strict=True):
        assert a.device == gpu.device
        assert_no_worse(a.cpu(), b, w, dtype, units=2)  # weights are rounded to half types before they meet values


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", EXAMPLES, ids=str)
def test_each_option(gpu, case, dtype):
    assert_errors(gpu, case, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cases", [CUDA_EDGES, LONG, DECODE], ids=["edges", "long", "decode"])
def test_sizes(gpu, cases, dtype):
    for case in cases:
        assert_errors(gpu, case, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask", ["", "bool-01"])
def test_a_full_device(gpu, dtype, mask):
    """Enough heads for tiles of 128 rows."""
    emulated = gpu.device.type == "cpu"
    multiprocessors = 4 if emulated else torch.cuda.get_device_properties(gpu.device).multi_processor_count
    for width in (64, 128):
        case = Case(batch=multiprocessors // 2, heads=4, key_heads=2, queries=97, keys=140, width=width, mask=mask)
        assert_errors(gpu, replace(case, value_width=width - 8, causal=True, lower_right=True, seed=width), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=cases())
def test_all_options_together(gpu, dtype, case):
    assert_errors(gpu, case, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [-0.7, 0.0])
def test_scales_that_are_not_positive(gpu, dtype, scale):
    operands = Case(queries=20, keys=70, width=16).operands(dtype)
    with on(gpu):
        mine = scaled_dot_product_attention(*put(gpu, operands), is_causal=True, scale=scale, return_lse=True)
    exact, theirs = (
        reference.attention(*(x.to(to) for x in operands), *[None] * 5, 0.0, scale, 0.0, -1, 0, False)
        for to in (torch.float64, dtype)
    )
    for a, b, w in zip(mine, theirs, exact, strict=True):
        assert_no_worse(a.cpu(), b, w, dtype, units=2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_scores_and_masks_of_the_lowest_number(gpu, dtype):
    """Scores beyond the range of exp: the largest takes all. Rows of the lowest number alone: the mean of all."""
    q = torch.full((1, 1, 3, 8), 90.0, dtype=dtype)
    k = torch.linspace(-1, 1, 20).to(dtype).reshape(1, 1, 20, 1).expand(1, 1, 20, 8)
    v = torch.arange(20.0).to(dtype).reshape(1, 1, 20, 1)
    mask = torch.full((1, 1, 3, 20), torch.finfo(dtype).min).to(dtype)
    with on(gpu):
        out, lse = scaled_dot_product_attention(*put(gpu, (q, k, v)), scale=1.0, return_lse=True)
        mean = scaled_dot_product_attention(*put(gpu, (0 * q, k, v, mask)))
    assert out.flatten().tolist() == [19.0] * 3
    torch.testing.assert_close(lse.cpu(), torch.full_like(lse.cpu(), 720.0))
    assert mean.flatten().tolist() == [9.5] * 3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_see_nothing(gpu, dtype):
    mask = torch.zeros(1, 1, 4, 70, dtype=torch.bool)
    mask[..., 1, 2] = True
    for given_mask in (mask, torch.where(mask, 0.0, -math.inf).to(dtype)):
        q, k, v = (torch.randn(2, 3, n, 5, dtype=dtype) for n in (4, 70, 70))
        with on(gpu):
            out, lse = scaled_dot_product_attention(*put(gpu, (q, k, v, given_mask)), return_lse=True)
        blind = [0, 2, 3]
        assert bool((out[:, :, blind] == 0).all())
        assert bool((lse[:, :, blind] == -math.inf).all())
        torch.testing.assert_close(out[:, :, 1].cpu(), v[:, :, 2], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_sequences(gpu, dtype):
    """More starts than the parameters of one launch can hold."""
    lengths = tuple(i % 3 for i in range(200))
    case = Case(
        batch=1, queries=sum(lengths), keys=sum(lengths), width=8, lengths=(lengths, lengths[::-1]), causal=True
    )
    assert_errors(gpu, case, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_memory_order_and_bits(gpu, dtype):
    """out lies in memory as query does; the same call has the same bits."""
    case = Case(queries=70, keys=90, width=24, layout="rows", dropout=0.5, slopes="heads")
    operands = put(gpu, case.operands(dtype))
    with on(gpu):
        first, second = case.ours(*operands), case.ours(*operands)
    assert first[0].transpose(1, 2).is_contiguous()
    for a, b in zip(first, second, strict=True):
        assert_same_bits(a.cpu(), b.cpu())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("multiprocessors", [1, 3, 132])
def test_any_number_of_splits(emulated, dtype, multiprocessors):
    """However few or many blocks a device takes at once, the keys of a decode call are split right."""
    with emulated.of_size(multiprocessors) as gpu:
        for case in DECODE:
            before = emulated.launches
            assert_errors(gpu, case, dtype)
            joins = emulated.launches - before - 1 - (case.lengths is not None)
            assert joins == 1 if multiprocessors > 1 else joins in (0, 1)


@pytest.mark.parametrize(
    "case",
    [Case(), Case(width=129, causal=True), Case(value_width=130, mask="bool")],
    ids=["float64", "width", "value"],
)
def test_what_the_kernels_do_not_take(emulated, case):
    """It goes to the reference."""
    dtype = torch.float64 if case == Case() else torch.bfloat16
    operands = case.operands(dtype)
    before = emulated.launches
    with on(EMULATED):
        mine = case.ours(*operands)
    assert emulated.launches == before
    mask = operands[3] if case.mask else None
    right = 0 if case.causal else -1
    want = reference.attention(*operands[:3], mask, *[None] * 4, 0.0, case.width**-0.5, 0.0, -1, right, False)
    for a, b in zip(mine, want, strict=True):
        assert_same_bits(a, b)
