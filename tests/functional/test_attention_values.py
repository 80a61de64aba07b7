"""Values and gradients of attention: those of the written-out formula in float64, and errors beside PyTorch's."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from attention_cases import EXAMPLES, Case, assert_no_worse, boundaries, cases, edges, outputs_and_gradients, taking
from hypothesis import HealthCheck, given, settings
from support import ALL_ISAS, assert_same_bits

from fastgen import random
from fastgen.functional import scaled_dot_product_attention
from fastgen.random import Generator

HALVES = (torch.bfloat16, torch.float16)
needs_pairs = pytest.mark.skipif("avx512_bf16" not in ALL_ISAS, reason="a CPU that does not multiply pairs of bfloat16")


def assert_float64(path: str, case: Case) -> None:
    leaves = case.leaves()
    with taking(path):
        mine = outputs_and_gradients(case.ours, leaves, case.seed)
    theirs = outputs_and_gradients(case.theirs, leaves, case.seed)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=cases())
def test_float64_is_the_formula(path, case):
    assert_float64(path, case)


@pytest.mark.parametrize("case", EXAMPLES, ids=str)
def test_each_option_in_float64(path, case):
    assert_float64(path, case)


# Around the sides of every tile that a kernel may have.
LENGTHS = (1, 2, 5, 6, 7, 12, 15, 16, 17, 31, 33, 47, 48, 63, 64, 65, 96, 127, 128, 129, 200, 257)
WIDTHS = (1, 3, 7, 8, 15, 16, 17, 24, 31, 32, 33, 40, 63, 64, 65, 72, 80, 96, 128, 129, 192, 256)
EDGES = edges(LENGTHS, WIDTHS)


def test_sizes_around_the_tiles(path):
    for case in EDGES:
        assert_float64(path, case)


# ---------------------------------------------------------------------------------------------------
# Errors


LONG = [
    Case(heads=2, key_heads=1, queries=150, keys=150, width=64, value_width=64, causal=True, seed=1),
    Case(queries=40, keys=333, width=80, value_width=48, layout="rows", seed=2),
    Case(queries=130, keys=97, width=16, mask="float-1", slopes="heads", seed=3),
    Case(queries=97, keys=200, width=33, mask="bool-02", dropout=0.2, softcap=5.0, seed=4),
    Case(queries=1, keys=700, heads=6, key_heads=2, width=64, value_width=64, causal=True, lower_right=True, seed=5),
    Case(batch=1, queries=190, keys=190, width=32, lengths=((100, 1, 70, 19),) * 2, window=20, causal=True, seed=6),
]


def assert_errors(path, case, dtype, **options):
    leaves = case.leaves(dtype)
    exact = [x.detach().double().requires_grad_() if x.is_floating_point() else x for x in leaves]
    want = outputs_and_gradients(case.theirs, exact, case.seed)
    with taking(path):
        mine = outputs_and_gradients(case.ours, leaves, case.seed)
    theirs = outputs_and_gradients(case.theirs, leaves, case.seed)
    assert mine[0].dtype == dtype
    assert mine[1].dtype == torch.float32  # PyTorch's, in half types, is rounded: held to its error all the same
    for a, b, w in zip(mine, theirs, want, strict=True):
        assert_no_worse(a, b, w, dtype, **options)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("case", LONG, ids=[f"long{i}" for i in range(len(LONG))])
def test_errors_are_at_most_twice_those_of_torch(path, case, dtype):
    assert_errors(path, case, dtype)


@needs_pairs
@pytest.mark.parametrize("case", LONG + EXAMPLES, ids=str)
def test_errors_of_bfloat16_in_pairs(case):
    assert_errors("avx512_bf16", case, torch.bfloat16)


@needs_pairs
def test_bfloat16_in_pairs_around_the_tiles():
    for case in EDGES:
        assert_errors("avx512_bf16", case, torch.bfloat16)


@needs_pairs
@settings(max_examples=100)
@given(case=cases())
def test_bfloat16_in_pairs_over_all_options(case):
    # PyTorch computes most of these small calls in float32; here weights and their gradients are rounded to bfloat16.
    assert_errors("avx512_bf16", case, torch.bfloat16, units=2)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"is_causal": True}, {"enable_gqa": True}, {"mask": "bool"}, {"mask": "float"}]
)
def test_errors_are_at_most_twice_those_of_torchs_kernel(path, dtype, options):
    """Beside PyTorch's own fused kernel, which computes half types in float32 too."""
    options = dict(options)
    kind = options.pop("mask", None)
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, 75, 32, generator=draw).to(dtype).requires_grad_() for h in (4, 2, 2))
    if "enable_gqa" not in options:
        k, v = (x.detach().repeat_interleave(2, 1).requires_grad_() for x in (k, v))
    mask = None if kind is None else torch.randn(75, 75, generator=draw)
    if mask is not None:
        mask = mask > -1 if kind == "bool" else mask.to(dtype)
    grad = torch.randn(2, 4, 75, 32, generator=draw).to(dtype)

    def run(function, *leaves, mask=mask, grad=grad):
        out = function(*leaves, mask, **options)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad)]

    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    wide_mask = mask.double() if kind == "float" else mask
    want = run(F.scaled_dot_product_attention, *wide, mask=wide_mask, grad=grad.double())
    theirs = run(F.scaled_dot_product_attention, q, k, v)
    with taking(path):
        mine = run(scaled_dot_product_attention, q, k, v)
    for a, b, w in zip(mine, theirs, want, strict=True):
        assert_no_worse(a, b, w, dtype)


# ---------------------------------------------------------------------------------------------------
# Extremes


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_large_scores_do_not_overflow(path, dtype):
    """Scores far beyond the range of exp, apart by more than that: the largest takes all."""
    q = torch.full((1, 1, 3, 8), 90.0, dtype=dtype)
    k = torch.linspace(-1, 1, 20).to(dtype).reshape(1, 1, 20, 1).expand(1, 1, 20, 8)
    v = torch.arange(20.0).to(dtype).reshape(1, 1, 20, 1)
    with taking(path):
        out, lse = scaled_dot_product_attention(q, k, v, scale=1.0, return_lse=True)
    assert out.flatten().tolist() == [19.0] * 3
    torch.testing.assert_close(lse, torch.full_like(lse, 720.0))


def test_rows_that_see_nothing(path):
    """Zeros and -inf, and gradients of zero even if the gradient of lse is not finite."""
    mask = torch.zeros(1, 1, 4, 6, dtype=torch.bool)
    mask[..., 1, 2] = True
    for given_mask in (mask, torch.where(mask, 0.0, -math.inf).double()):
        q, k, v = (torch.randn(2, 3, n, 5, dtype=torch.float64, requires_grad=True) for n in (4, 6, 6))
        with taking(path):
            out, lse = scaled_dot_product_attention(q, k, v, given_mask, return_lse=True)
            to_lse = torch.where(lse.isfinite(), 1.0, math.inf)
            grads = torch.autograd.grad([out, lse], [q, k, v], [torch.ones_like(out), to_lse])
        blind = [0, 2, 3]
        assert bool((out[:, :, blind] == 0).all())
        assert bool((lse[:, :, blind] == -math.inf).all())
        torch.testing.assert_close(out[:, :, 1], v[:, :, 2])
        assert bool((grads[0][:, :, blind] == 0).all())
        for grad in grads[1:]:
            assert bool((grad[:, :, [0, 1, 3, 4, 5]] == 0).all())
        assert all(bool(grad.isfinite().all()) for grad in grads)


def test_a_nan_stays_in_its_rows(path):
    q, k, v = (torch.randn(2, 2, 20, 16) for _ in range(3))
    q[0, 1, 3, 2] = math.nan
    with taking(path):
        out = scaled_dot_product_attention(q, k, v, is_causal=True)
    bad = torch.zeros(2, 2, 20, dtype=torch.bool)
    bad[0, 1, 3] = True
    assert torch.equal(out.isnan().all(-1), bad)
    assert torch.equal(out.isnan().any(-1), bad)


# ---------------------------------------------------------------------------------------------------
# Bits


BITS = [
    Case(queries=150, keys=150, width=64, value_width=64, causal=True),
    Case(heads=9, key_heads=3, queries=1, keys=1500, width=64, value_width=64),
    Case(queries=70, keys=300, mask="float-01", slopes="heads", dropout=0.1, softcap=3.0, heads=4, key_heads=2),
    Case(batch=1, queries=190, keys=190, lengths=((100, 1, 70, 19),) * 2, width=32, value_width=32),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", BITS, ids=[f"bits{i}" for i in range(len(BITS))])
def test_thread_counts_have_the_same_bits(isa, case, dtype, threads):
    found = []
    for count in (1, 2, 3):
        threads(count)
        with taking(isa):
            found.append(outputs_and_gradients(case.ours, case.leaves(dtype), 0))
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert_same_bits(a, b)


# ---------------------------------------------------------------------------------------------------
# Dropout


@pytest.mark.parametrize("p", [0.1, 0.5, 0.999])
def test_dropout_is_the_mask_of_the_stream(path, p):
    """With values that are the unit vectors, out is the matrix of weights."""
    batch, heads, length = 2, 3, 37
    q, k = (torch.randn(batch, heads, length, 8, dtype=torch.float64) for _ in range(2))
    v = torch.eye(length, dtype=torch.float64).expand(batch, heads, -1, -1)
    g = Generator(11, 5)
    with taking(path):
        plain = scaled_dot_product_attention(q, k, v)
        out = scaled_dot_product_attention(q, k, v, dropout_p=p, generator=g)
    assert g.offset == 5 + batch * heads * length * length
    keep = random.dropout_mask(batch, heads, length, length, p=p, generator=Generator(11, 5))
    torch.testing.assert_close(out, plain * keep / (1 - p))


def test_dropout_of_ragged_sequences_is_that_of_one_dense_call(path):
    lengths = (5, 9, 1)
    total = sum(lengths)
    q, k = (torch.randn(2, total, 8, dtype=torch.float64) for _ in range(2))
    v = torch.eye(total, dtype=torch.float64).expand(2, -1, -1)
    g = Generator(4)
    with taking(path):
        out = scaled_dot_product_attention(q, k, v, None, 0.4, cu_seqlens_q=boundaries(lengths), generator=g)
    assert g.offset == 2 * total * total
    kept = random.dropout_mask(2, total, total, p=0.4, generator=Generator(4))
    together = torch.block_diag(*(torch.ones(n, n) for n in lengths)).bool()
    assert torch.equal(out != 0, kept & together)


def test_torch_manual_seed_repeats_dropout():
    x = torch.randn(2, 2, 9, 4)
    torch.manual_seed(1)
    first, second = (scaled_dot_product_attention(x, x, x, dropout_p=0.5) for _ in range(2))
    torch.manual_seed(1)
    assert_same_bits(scaled_dot_product_attention(x, x, x, dropout_p=0.5), first)
    assert not torch.equal(first, second)
    source = torch.Generator().manual_seed(2)
    a = scaled_dot_product_attention(x, x, x, dropout_p=0.5, generator=source)
    again = torch.Generator().manual_seed(2)
    assert_same_bits(scaled_dot_product_attention(x, x, x, dropout_p=0.5, generator=again), a)
