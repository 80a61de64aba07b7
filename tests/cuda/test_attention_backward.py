"""The backward pass of attention by the CUDA kernels, after their forward pass: gradients beside float64's.

On the emulated device wherever the tests run, and on a GPU where one is.
"""

from __future__ import annotations

import math

import pytest
import torch
from attention_cases import CUDA_EDGES, EXAMPLES, Case, assert_no_worse, cases, on, outputs_and_gradients
from emulated import EMULATED
from hypothesis import HealthCheck, given, settings
from support import assert_same_bits

from fastgen import reference
from fastgen.functional import scaled_dot_product_attention

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LONG = [
    Case(batch=1, heads=4, key_heads=2, queries=150, keys=170, width=64, value_width=64, causal=True, seed=1),
    Case(batch=1, queries=40, keys=333, width=80, value_width=48, layout="rows", dropout=0.3, seed=2),
    Case(queries=270, keys=97, width=16, mask="float-1", slopes="heads", seed=3),
    Case(queries=97, keys=200, width=33, mask="bool-02", dropout=0.2, softcap=5.0, slopes="rows", seed=4),
    Case(
        batch=1,
        queries=190,
        keys=190,
        width=32,
        lengths=((100, 1, 70, 19),) * 2,
        window=20,
        causal=True,
        slopes="heads",
        seed=5,
    ),
    Case(batch=1, queries=150, keys=150, width=64, value_width=64, window=(30, 5), layout="repeated", seed=6),
    Case(batch=1, heads=3, key_heads=1, queries=140, keys=70, width=128, value_width=128, dropout=0.1, seed=7),
]


def leaves_of(case, dtype):
    """The operands; masks are constants, as their gradients are not the kernels'."""
    leaves = case.leaves(dtype)
    return [x.requires_grad_(x.is_floating_point() and not (case.mask and i == 3)) for i, x in enumerate(leaves)]


def put(gpu, leaves):
    return [gpu.put(x.detach()).requires_grad_(x.requires_grad) for x in leaves]


def assert_errors(gpu, case, dtype):
    leaves = leaves_of(case, dtype)
    with on(gpu):
        mine = outputs_and_gradients(case.ours, put(gpu, leaves), 1)
    theirs = outputs_and_gradients(case.theirs, leaves, 1)
    doubles = [x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x for x in leaves]
    exact = outputs_and_gradients(case.theirs, doubles, 1)
    # The gradients of a query with one key cancel, to 0 by another road.
    size = max(float(x.abs().max()) if x.numel() else 0.0 for x in exact[2:5])
    for a, b, w in zip(mine[2:], theirs[2:], exact[2:], strict=True):
        assert a.device == gpu.device
        # Weights and gradients of scores are rounded to half types before they meet another matrix, and so is out,
        # from which the gradient of the slopes comes, though it is in float32.
        assert_no_worse(a.cpu().to(dtype), b.to(dtype), w, dtype, units=2, size=size)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", EXAMPLES, ids=str)
def test_each_option(gpu, case, dtype):
    assert_errors(gpu, case, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cases", [CUDA_EDGES, LONG], ids=["edges", "long"])
def test_sizes(gpu, cases, dtype):
    for case in cases:
        assert_errors(gpu, case, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=cases())
def test_all_options_together(gpu, dtype, case):
    assert_errors(gpu, case, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_sequences(gpu, dtype):
    """More starts than the parameters of one launch can hold, and sequences without queries or keys."""
    lengths = tuple(i % 3 for i in range(200))
    case = Case(
        batch=1,
        queries=sum(lengths),
        keys=sum(lengths),
        width=8,
        lengths=(lengths, lengths[::-1]),
        causal=True,
        slopes="heads",
    )
    assert_errors(gpu, case, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_memory_order_and_bits(gpu, dtype):
    """Gradients lie in memory as their operands do; the same call has the same bits."""
    case = Case(heads=4, queries=70, keys=90, width=24, layout="rows", dropout=0.5, slopes="heads", causal=True)
    with on(gpu):
        first, second = (outputs_and_gradients(case.ours, put(gpu, leaves_of(case, dtype)), 1) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert_same_bits(a.cpu(), b.cpu())
    for gradient in first[2:5]:
        assert gradient.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("which", range(4))
def test_one_gradient_alone(gpu, dtype, which):
    """Of query, key, value and slopes, while the others are constants: the bits that it has among all."""
    case = Case(queries=20, keys=40, slopes="rows", causal=True)
    leaves = put(gpu, leaves_of(case, dtype))
    with on(gpu):
        together = outputs_and_gradients(case.ours, leaves, 1)[2:]
        alone = [x.detach().requires_grad_(i == which) for i, x in enumerate(leaves)]
        got = outputs_and_gradients(case.ours, alone, 1)[2]
    assert_same_bits(got.cpu(), together[which].cpu())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("output", [0, 1], ids=["out", "lse"])
def test_the_gradient_of_one_output_alone(gpu, dtype, output):
    case = Case(queries=20, keys=70, width=16, value_width=16, causal=True, slopes="heads")
    results = []
    for function, to, kind in (
        (case.ours, gpu.put, dtype),
        (case.theirs, torch.Tensor.cpu, dtype),
        (case.theirs, torch.Tensor.cpu, torch.float64),
    ):
        leaves = [
            x.detach().to(kind if i < 3 else torch.promote_types(kind, torch.float32))
            for i, x in enumerate(leaves_of(case, dtype))
        ]
        leaves = [to(x).requires_grad_() for x in leaves]
        with on(gpu):
            y = function(*leaves)[output]
        weights = torch.linspace(-1, 2, y.numel(), dtype=torch.float64).reshape(y.shape).to(y)
        gradients = torch.autograd.grad(y, leaves, weights, allow_unused=True)
        results.append([torch.zeros_like(x) if g is None else g for x, g in zip(leaves, gradients, strict=True)])
    for a, b, w in zip(*results, strict=True):
        assert_no_worse(a.cpu().to(dtype), b.to(dtype), w, dtype, units=2)
    if output == 1:
        assert bool((results[0][2] == 0).all())  # values do not reach lse


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_see_nothing(gpu, dtype):
    """They have no gradient, and give none, even where that of their lse is not finite."""
    q, k, v = (gpu.put(torch.randn(1, 2, n, 16, dtype=dtype)).requires_grad_() for n in (5, 40, 40))
    seen = torch.ones(1, 1, 5, 40, dtype=torch.bool)
    seen[..., 1:3, :] = False
    with on(gpu):
        out, lse = scaled_dot_product_attention(q, k, v, gpu.put(seen), return_lse=True)
        grad_lse = torch.where(lse.isinf(), math.nan, torch.ones_like(lse))
        got = torch.autograd.grad([out, lse], [q, k, v], [torch.ones_like(out), grad_lse])
        rows = [0, 3, 4]
        out, lse = scaled_dot_product_attention(q[:, :, rows], k, v, return_lse=True)
        want = torch.autograd.grad([out, lse], [q, k, v], [torch.ones_like(out), torch.ones_like(lse)])
    assert bool((got[0][:, :, 1:3] == 0).all())
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_a_mask_of_the_lowest_number_hides(gpu, dtype):
    """Without a gradient of their own they spoil none: padding in the models of Hugging Face looks like this."""
    q, k, v = (gpu.put(torch.randn(1, 2, n, 16, dtype=dtype)).requires_grad_() for n in (5, 40, 40))
    rows = [0, 3, 4]
    large = (-6.0e4, -5.0e4) if dtype == torch.float16 else (-3.0e38, -2.3e38, -2.0e38, -1.9e38, -1.8e38, -1.1e38)
    for lowest in (torch.finfo(dtype).min, *large):
        mask = torch.zeros(1, 1, 5, 40, dtype=dtype)
        mask[..., 1:3, :] = lowest
        with on(gpu):
            out = scaled_dot_product_attention(q, k, v, gpu.put(mask))
            got = torch.autograd.grad(out[:, :, rows].sum(), [q, k, v])
            want = torch.autograd.grad(scaled_dot_product_attention(q[:, :, rows], k, v).sum(), [q, k, v])
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_gradient_of_any_strides(gpu, dtype):
    """Such as that of a sum: one number for all."""
    leaves = put(gpu, leaves_of(Case(queries=9, keys=30, width=64, value_width=64), dtype))
    with on(gpu):
        out = scaled_dot_product_attention(*leaves)
        same = torch.autograd.grad(out.sum(), leaves, retain_graph=True)
        want = torch.autograd.grad(out, leaves, torch.ones_like(out), retain_graph=True)
        wide = torch.randn(2, 2, 64, 18).to(out)[..., ::2].transpose(2, 3)
        cut = torch.autograd.grad(out, leaves, wide, retain_graph=True)
        dense = torch.autograd.grad(out, leaves, wide.contiguous())
    for a, b in zip((*same, *cut), (*want, *dense), strict=True):
        assert_same_bits(a.cpu(), b.cpu())


@pytest.mark.parametrize("needs", [0b10111, 0b10010, 0b00101, 0])
@pytest.mark.parametrize("layout", ["dense", "rows", "cut", "repeated"])
def test_results_have_the_shapes_strides_and_dtypes_of_the_reference(gpu, layout, needs):
    case = Case(heads=4, queries=9, keys=12, width=8, value_width=6, slopes="rows", mask="bool-0", layout=layout)
    operands = case.operands(torch.bfloat16)
    given = (*operands[:4], operands[4], None, None, None)
    options = (0.0, 0.4, 0.0, -1, 0, False)
    out, lse = reference.attention(*given, *options)
    arguments = (torch.ones_like(out), None, *given, out, lse)
    want = reference.attention_backward(*arguments, *options, needs)
    got = gpu.ops.attention_backward(*(None if x is None else gpu.put(x) for x in arguments), *options, needs)
    for a, b in zip(got, want, strict=True):
        assert (a.device, a.shape, a.dtype, a.stride()) == (gpu.device, b.shape, b.dtype, b.stride())
        torch.testing.assert_close(a.cpu(), b, rtol=0.05, atol=0.05)


TAKEN = Case(queries=20, keys=30, width=70)


@pytest.mark.parametrize(
    ("case", "dtype", "shared_limit"),
    [
        (TAKEN, torch.float64, 227 * 1024),
        (Case(width=129), torch.bfloat16, 227 * 1024),
        (Case(mask="float"), torch.float32, 227 * 1024),
        (TAKEN, torch.float32, 99 * 1024),
    ],
    ids=["float64", "width", "mask", "shared"],
)
def test_what_the_kernels_do_not_take(emulated, case, dtype, shared_limit):
    """It goes to the reference, and is right."""
    leaves = case.leaves(dtype)
    with on(EMULATED):
        out, _ = case.ours(*leaves)
        with emulated.of_size(shared_limit=shared_limit):
            before = emulated.launches
            got = torch.autograd.grad(out.sum(), leaves)
            assert emulated.launches == before
    want = torch.autograd.grad(case.theirs(*leaves)[0].sum(), leaves)
    tolerance = 16 * torch.finfo(dtype).eps
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_launches(emulated):
    """Half types of width 128 run with the shared memory of any device; what is not wanted has no launch."""
    with emulated.of_size(shared_limit=99 * 1024) as gpu:
        for wanted, launches in (((0, 1, 2), 3), ((0,), 2), ((1,), 2), ((2,), 2)):
            leaves = [x.detach().requires_grad_(i in wanted) for i, x in enumerate(TAKEN.leaves(torch.bfloat16))]
            with on(gpu):
                out, _ = TAKEN.ours(*leaves)
                before = emulated.launches
                out.sum().backward()
            assert emulated.launches - before == launches
