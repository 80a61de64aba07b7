"""Attention by the kernels for compute capability 9.0: on the emulated device and on such a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import replace

import pytest
import torch
from attention_cases import Case, assert_no_worse, on, outputs_and_gradients
from emulated import Emulated, Gpu
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import assert_same_bits

DTYPES = (torch.bfloat16, torch.float16)
PLAIN = Case(queries=130, keys=150, width=64, value_width=64)
EDGES = [
    replace(PLAIN, queries=queries, keys=keys, causal=causal, lower_right=keys % 2 == 0, seed=queries + keys)
    for queries, keys in ((65, 1), (127, 63), (128, 64), (129, 65), (192, 128), (193, 129), (257, 191), (300, 300))
    for causal in (False, True)
]
WIDTHS = [
    replace(PLAIN, width=width, value_width=value_width, causal=True, seed=width + value_width)
    for width, value_width in ((8, 8), (40, 64), (64, 24), (72, 40), (128, 128), (96, 120), (16, 128), (128, 16))
]
OTHERS = [
    replace(PLAIN, heads=6, key_heads=2, batch=1, layout="rows", causal=True),
    replace(PLAIN, heads=3, key_heads=1, queries=200, keys=333, width=128, layout="rows", window=(70, 20)),
    replace(PLAIN, queries=300, keys=280, window=(10, 0)),  # the second half of a tile starts later than the first
    replace(PLAIN, queries=300, keys=100, causal=True, lower_right=True),  # 200 rows see nothing
    replace(PLAIN, queries=70, keys=400, causal=True, lower_right=True),
    replace(PLAIN, layout="repeated"),
    replace(PLAIN, keys=0),
    replace(
        PLAIN, batch=1, queries=377, keys=299, width=32, lengths=((0, 100, 1, 129, 0, 147), (7, 64, 0, 65, 63, 100))
    ),
    replace(PLAIN, batch=1, queries=250, keys=250, lengths=((120, 130),) * 2, window=40, causal=True, width=128),
]


def device(emulated: Emulated, multiprocessors: int = 4, capability: int = 90) -> AbstractContextManager[Gpu]:
    return emulated.of_size(multiprocessors, capability=capability)


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=pytest.mark.cuda)])
def hopper(request: pytest.FixtureRequest) -> Iterator[Gpu]:
    """Each device of compute capability 9.0."""
    if request.param == "emulated":
        with device(request.getfixturevalue("emulated")) as gpu:
            yield gpu
    elif torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0):
        yield Gpu(torch.device("cuda", torch.cuda.current_device()), torch.ops.fastgen)
    else:
        pytest.skip("no device of compute capability 9.0")


def assert_errors(gpu: Gpu, case: Case, dtype: torch.dtype) -> None:
    operands = case.operands(dtype)
    with on(gpu):
        mine = case.ours(*map(gpu.put, operands))
    theirs = case.theirs(*operands)
    exact = case.theirs(*(x.double() for x in operands))
    for a, b, w in zip(mine, theirs, exact, strict=True):
        assert_no_worse(a.cpu(), b, w, dtype, units=2)  # weights are rounded to half types before they meet values


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cases", [EDGES, WIDTHS, OTHERS], ids=["edges", "widths", "others"])
def test_values(hopper, cases, dtype):
    for case in cases:
        assert_errors(hopper, case, dtype)


# Width 64 and less, one length for all sequences: what the kernels of the backward pass take.
NARROW = [case for case in (*EDGES, *WIDTHS, *OTHERS) if max(case.width, case.value_width) <= 64 and not case.lengths]


def assert_gradient_errors(gpu: Gpu, case: Case, dtype: torch.dtype) -> None:
    leaves = case.leaves(dtype)
    with on(gpu):
        mine = outputs_and_gradients(case.ours, [gpu.put(x.detach()).requires_grad_() for x in leaves], 1)
    theirs = outputs_and_gradients(case.theirs, leaves, 1)
    exact = outputs_and_gradients(case.theirs, [x.detach().double().requires_grad_() for x in leaves], 1)
    # The gradients of a query with one key cancel, to 0 by another road.
    size = max(float(x.abs().max()) if x.numel() else 0.0 for x in exact[2:])
    for a, b, w in zip(mine[2:], theirs[2:], exact[2:], strict=True):
        # Weights and gradients of scores are rounded to half types before they meet another matrix.
        assert_no_worse(a.cpu(), b, w, dtype, units=2, size=size)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", NARROW, ids=str)
def test_gradients(hopper, case, dtype):
    assert_gradient_errors(hopper, case, dtype)


def drawn(data: st.DataObject, widths: tuple[int, ...]) -> Case:
    def draw(*values):
        return data.draw(st.sampled_from(values))

    return Case(
        batch=draw(1, 2),
        heads=4,
        key_heads=draw(1, 2, 4),
        queries=data.draw(st.integers(65, 270)),
        keys=data.draw(st.integers(0, 270)),
        width=draw(*widths),
        value_width=draw(*widths),
        window=draw(None, (30, 5), (0, 100), (150, None)),
        causal=draw(True, False),
        lower_right=draw(True, False),
        layout=draw("dense", "rows"),
        seed=data.draw(st.integers(0, 100)),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_all_options_together(hopper, dtype, data):
    assert_errors(hopper, drawn(data, (8, 64, 88, 128)), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_gradients_of_all_options_together(hopper, dtype, data):
    assert_gradient_errors(hopper, drawn(data, (8, 40, 64)), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*EDGES[-2:], *OTHERS[:3], OTHERS[-1]], ids=str)
def test_bits_do_not_depend_on_the_deal(emulated, case, dtype):
    """However few or many blocks share the work."""
    operands = case.operands(dtype)
    results = []
    for multiprocessors in (1, 3, 4, 5):
        with device(emulated, multiprocessors) as gpu, on(gpu):
            before = emulated.warpgroup_products
            results.append(case.ours(*map(gpu.put, operands)))
            assert emulated.warpgroup_products > before
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert_same_bits(a, b)


@pytest.mark.parametrize("case", [EDGES[-1], OTHERS[0], OTHERS[2]], ids=str)
def test_bits_of_gradients_do_not_depend_on_the_deal(emulated, case):
    results = []
    for multiprocessors in (1, 3, 5):
        with device(emulated, multiprocessors) as gpu, on(gpu):
            leaves = [gpu.put(x.detach()).requires_grad_() for x in case.leaves(torch.bfloat16)]
            results.append(outputs_and_gradients(case.ours, leaves, 1))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert_same_bits(a, b)


def products_of_backward(emulated: Emulated, gpu: Gpu, case: Case, needed: str = "qkv") -> int:
    """Products of warpgroups in a backward pass that makes these gradients."""
    leaves = [gpu.put(x.detach()) for x in case.leaves(torch.bfloat16)]
    for name, leaf in zip("qkv", leaves, strict=False):
        leaf.requires_grad_(name in needed)
    with on(gpu):
        out, _ = case.ours(*leaves)
        before = emulated.warpgroup_products
        out.backward(gpu.put(torch.ones_like(out)))
    assert [leaf.grad is not None for leaf in leaves[:3]] == [name in needed for name in "qkv"]
    return emulated.warpgroup_products - before


def test_gradients_that_are_not_wanted_are_not_made(emulated):
    with device(emulated) as gpu:
        of_each = {needed: products_of_backward(emulated, gpu, PLAIN, needed) for needed in ("qkv", "q", "kv", "k")}
    assert of_each["qkv"] == of_each["q"] + of_each["kv"]
    assert of_each["k"] == of_each["kv"] > of_each["q"] > 0


# What no kernel for 9.0 takes.
OPTIONS = [{"mask": "bool"}, {"slopes": "heads"}, {"softcap": 3.0}, {"dropout": 0.1}]


@pytest.mark.parametrize(
    "change",
    [
        *OPTIONS,
        {"width": 72},
        {"value_width": 128},
        {"queries": 64},
        {"keys": 64},
        {"batch": 1, "queries": 150, "lengths": ((70, 80), (75, 75))},
    ],
    ids=str,
)
def test_what_the_other_kernels_of_the_backward_pass_take(emulated, change):
    with device(emulated) as gpu:
        assert products_of_backward(emulated, gpu, replace(PLAIN, **change)) == 0


@pytest.mark.parametrize(
    "change",
    [
        *OPTIONS,
        {"layout": "cut"},
        {"width": 60},
        {"queries": 64},
        {"batch": 1, "heads": 1, "key_heads": 1, "queries": 128},
    ],
    ids=str,
)
def test_what_the_other_kernel_takes(emulated, change):
    """Options, operands that are not aligned, and too few rows."""
    case = replace(PLAIN, **change)
    with device(emulated) as gpu, on(gpu):
        before = emulated.warpgroup_products
        case.ours(*map(gpu.put, case.operands(torch.bfloat16)))
        assert emulated.warpgroup_products == before


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_which_devices_it_is_for(emulated, capability):
    with device(emulated, capability=capability) as gpu, on(gpu):
        before = emulated.warpgroup_products
        PLAIN.ours(*map(gpu.put, PLAIN.operands(torch.float16)))
        assert (emulated.warpgroup_products > before) == (capability == 90)
