"""What scaled_dot_product_attention takes, and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from attention_cases import boundaries, taking
from support import FLOATS

from fastgen import reference
from fastgen.functional import scaled_dot_product_attention
from fastgen.random import Generator

HALVES = (torch.bfloat16, torch.float16)


# ---------------------------------------------------------------------------------------------------
# Shapes


SHAPES = [  # of query, key, value and mask
    ((2, 3, 5, 4), (2, 3, 7, 4), (2, 3, 7, 6), None),
    ((3, 5, 4), (3, 7, 4), (3, 7, 6), None),
    ((5, 4), (7, 4), (7, 6), None),
    ((2, 2, 3, 5, 4), (2, 2, 3, 7, 4), (2, 2, 3, 7, 6), None),
    ((2, 1, 3, 5, 4), (1, 4, 3, 7, 4), (2, 4, 1, 7, 6), None),
    ((3, 5, 4), (2, 3, 7, 4), (7, 6), None),  # fewer dimensions
    ((2, 1, 5, 4), (2, 3, 7, 4), (2, 3, 7, 6), None),  # one head of query for all of key
    ((2, 3, 5, 4), (1, 1, 7, 4), (1, 1, 7, 6), None),
    ((2, 3, 5, 4), (2, 1, 7, 4), (2, 3, 7, 6), None),
    ((2, 3, 5, 4), (2, 3, 7, 4), (2, 3, 7, 6), (5, 7)),
    ((2, 3, 5, 4), (2, 3, 7, 4), (2, 3, 7, 6), (7,)),
    ((2, 3, 5, 4), (2, 3, 7, 4), (2, 3, 7, 6), (2, 1, 1, 7)),
    ((2, 3, 5, 4), (2, 3, 7, 4), (2, 3, 7, 6), (3, 5, 1)),
    ((5, 4), (7, 4), (7, 6), (5, 7)),
    ((3, 5, 4), (3, 7, 4), (3, 7, 6), (3, 1, 7)),
    ((2, 2, 3, 5, 4), (2, 2, 3, 7, 4), (2, 2, 3, 7, 6), (2, 1, 3, 5, 7)),
    ((2, 2, 3, 5, 4), (2, 2, 3, 7, 4), (2, 2, 3, 7, 6), (3, 5, 7)),
    ((0, 3, 5, 4), (0, 3, 7, 4), (0, 3, 7, 6), None),
    ((2, 0, 5, 4), (2, 0, 7, 4), (2, 0, 7, 6), None),
    ((2, 3, 0, 4), (2, 3, 7, 4), (2, 3, 7, 6), None),
]


@pytest.mark.parametrize(("q", "k", "v", "m"), SHAPES)
def test_shapes_are_torchs(path, q, k, v, m):
    q, k, v = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in (q, k, v))
    masks = [None] if m is None else [torch.randn(m, dtype=torch.float64), torch.rand(m) < 0.8]
    for mask in masks:
        # PyTorch refuses a mask of one dimension.
        want = F.scaled_dot_product_attention(q, k, v, mask.expand(5, 7) if m == (7,) else mask)
        with taking(path):
            got, lse = scaled_dot_product_attention(q, k, v, mask, return_lse=True)
        torch.testing.assert_close(got, want.nan_to_num(0.0))  # PyTorch's way for some shapes has NaN in blind rows
        assert lse.shape == want.shape[:-1]
        if mask is None:
            grad = torch.randn_like(want)
            for a, b in zip(
                torch.autograd.grad(got, (q, k, v), grad), torch.autograd.grad(want, (q, k, v), grad), strict=True
            ):
                torch.testing.assert_close(a, b)


def test_without_keys_out_is_zero(path):
    q, k, v = (torch.randn(2, 3, n, 4, requires_grad=True) for n in (5, 0, 0))
    with taking(path):
        out, lse = scaled_dot_product_attention(q, k, v, return_lse=True)
        out.sum().backward()
    assert bool((out == 0).all())
    assert bool((lse == -torch.inf).all())
    assert bool((q.grad == 0).all())


@pytest.mark.parametrize("heads", [(6, 2), (6, 1), (4, 4), (9, 3)])
@pytest.mark.parametrize("rank", [3, 4, 5])
def test_grouped_heads_are_torchs(path, heads, rank):
    batch = {3: (), 4: (2,), 5: (2, 2)}[rank]
    q, k, v = (torch.randn(*batch, h, n, 4) for h, n in zip((heads[0], heads[1], heads[1]), (5, 7, 7), strict=True))
    with taking(path):
        got = scaled_dot_product_attention(q, k, v, enable_gqa=True)
    torch.testing.assert_close(got, F.scaled_dot_product_attention(q, k, v, enable_gqa=True))


def test_keys_and_values_are_not_repeated_for_grouped_heads():
    """One block of memory for all query heads: the op gets key and value as they are."""
    q, k = torch.randn(1, 8, 3, 4), torch.randn(1, 2, 5, 4)
    seen = []
    with taking("reference"):
        from unittest import mock

        from fastgen._ops import attention as ops

        def spy(*args):
            seen.extend(args[1:3])
            return reference.attention(*args)

        with mock.patch.object(ops, "_attention", spy):
            scaled_dot_product_attention(q, k, k, enable_gqa=True)
    assert all(x is k for x in seen)


# ---------------------------------------------------------------------------------------------------
# Options


def test_scale_and_causal_are_torchs(path):
    q, k, v = (torch.randn(2, 3, n, 4) for n in (9, 6, 6))
    for options in ({"scale": 0.1}, {"is_causal": True}, {"is_causal": True, "scale": 2}):
        with taking(path):
            got = scaled_dot_product_attention(q, k, v, **options)
        torch.testing.assert_close(got, F.scaled_dot_product_attention(q, k, v, **options))


def test_lower_right_is_torchs_bias(path):
    from torch.nn.attention.bias import causal_lower_right

    q, k, v = (torch.randn(2, 3, n, 4) for n in (3, 8, 8))
    with taking(path):
        got = scaled_dot_product_attention(q, k, v, is_causal=True, alignment="lower_right")
    torch.testing.assert_close(got, F.scaled_dot_product_attention(q, k, v, causal_lower_right(3, 8)))


def test_decoding_step_by_step_is_one_causal_call(path):
    q, k, v = (torch.randn(1, 2, 12, 8, dtype=torch.float64) for _ in range(3))
    options = {
        "is_causal": True,
        "alignment": "lower_right",
        "window_size": 5,
        "alibi_slopes": torch.tensor([0.1, 0.3]),
    }
    with taking(path):
        whole = scaled_dot_product_attention(q, k, v, **options)
        for begin, end in ((0, 5), (5, 6), (6, 12)):
            part = scaled_dot_product_attention(q[:, :, begin:end], k[:, :, :end], v[:, :, :end], **options)
            torch.testing.assert_close(part, whole[:, :, begin:end])


@pytest.mark.parametrize(
    ("window", "causal", "sees"),
    [
        (2, False, lambda d: abs(d) <= 2),
        (2, True, lambda d: 0 <= d <= 2),
        (0, False, lambda d: d == 0),
        ((3, 1), False, lambda d: -1 <= d <= 3),
        ((None, 1), False, lambda d: d >= -1),
        ((2, None), False, lambda d: d <= 2),
        ((None, None), False, lambda d: True),
        ((2, 4), True, lambda d: 0 <= d <= 2),
        ((0, 0), True, lambda d: d == 0),
        (10**12, False, lambda d: True),
    ],
)
def test_windows(path, window, causal, sees):
    n, m = 9, 12
    q, k, v = (torch.randn(1, 2, length, 4, dtype=torch.float64) for length in (n, m, m))
    mask = torch.tensor([[sees(i - j) for j in range(m)] for i in range(n)])
    with taking(path):
        got = scaled_dot_product_attention(q, k, v, window_size=window, is_causal=causal)
    torch.testing.assert_close(got, F.scaled_dot_product_attention(q, k, v, mask))


def test_causal_and_a_mask_both_hold(path):
    q, k, v = (torch.randn(2, 2, 6, 4) for _ in range(3))
    mask = torch.rand(2, 1, 1, 6) < 0.7
    mask[..., 0] = True
    with taking(path):
        got = scaled_dot_product_attention(q, k, v, mask, is_causal=True)
    both = mask & torch.ones(6, 6, dtype=torch.bool).tril()
    torch.testing.assert_close(got, F.scaled_dot_product_attention(q, k, v, both))


def test_lse_of_the_halves_joins_them(path):
    """Attention to two sets of keys, weighted by their log-sum-exps, is attention to all of them."""
    q, k, v = (torch.randn(2, 2, n, 4, dtype=torch.float64) for n in (5, 8, 8))
    with taking(path):
        whole = scaled_dot_product_attention(q, k, v)
        halves = [
            scaled_dot_product_attention(q, k[:, :, s], v[:, :, s], return_lse=True) for s in (slice(3), slice(3, 8))
        ]
    outs, lses = (torch.stack(x) for x in zip(*halves, strict=True))
    torch.testing.assert_close((outs * lses.softmax(0).unsqueeze(-1)).sum(0), whole)


@pytest.mark.parametrize("kind", [torch.int32, torch.int64], ids=str)
def test_ragged_sequences_are_a_loop(path, kind):
    lengths_q, lengths_k = (4, 0, 7, 1), (5, 3, 7, 0)
    q, k, v = (torch.randn(3, sum(n), 8, dtype=torch.float64) for n in (lengths_q, lengths_k, lengths_k))
    cu_q, cu_k = boundaries(lengths_q, kind), boundaries(lengths_k, kind)
    options = {"is_causal": True, "alignment": "lower_right", "softcap": 3.0}
    with taking(path):
        out, lse = scaled_dot_product_attention(
            q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, return_lse=True, **options
        )
        assert torch.equal(
            scaled_dot_product_attention(q[None], k[None], v[None], cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, **options)[0],
            out,
        )
        for n in range(len(lengths_q)):
            rows, keys = slice(cu_q[n], cu_q[n + 1]), slice(cu_k[n], cu_k[n + 1])
            want = scaled_dot_product_attention(q[:, rows], k[:, keys], v[:, keys], return_lse=True, **options)
            torch.testing.assert_close(out[:, rows], want[0])
            torch.testing.assert_close(lse[:, rows], want[1])


@pytest.mark.parametrize("cross", [False, True])
def test_nested_tensors(path, cross):
    def nested(lengths):
        parts = [torch.randn(n, 2, 4, dtype=torch.float64) for n in lengths]
        return torch.nested.nested_tensor(parts, layout=torch.jagged).requires_grad_()

    a = nested((3, 5, 2))
    b = nested((4, 1, 6)) if cross else a
    with taking(path):
        out = scaled_dot_product_attention(*(x.transpose(1, 2) for x in (a, b, b)), is_causal=True)
        rows = [
            scaled_dot_product_attention(*(y.transpose(0, 1) for y in parts), is_causal=True)
            for parts in zip(a.unbind(), b.unbind(), b.unbind(), strict=True)
        ]
        for got, want in zip(out.unbind(), rows, strict=True):
            torch.testing.assert_close(got, want)
        got = torch.autograd.grad(sum(y.square().sum() for y in out.unbind()), [a, b])
        want = torch.autograd.grad(sum(y.square().sum() for y in rows), [a, b])
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x.values(), y.values())


# ---------------------------------------------------------------------------------------------------
# Dtypes and devices


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_autocast_computes_in_its_dtype(path, dtype):
    q, k, v = (torch.randn(2, 2, 6, 4, requires_grad=True) for _ in range(3))
    mask = torch.randn(6, 6)
    with taking(path):
        with torch.autocast("cpu", dtype=dtype):
            out, lse = scaled_dot_product_attention(q, k.to(dtype), v, mask, return_lse=True)
            assert out.dtype == F.scaled_dot_product_attention(q, k, v).dtype == dtype
            double = [x.double() for x in (q, k, v)]
            assert scaled_dot_product_attention(*double).dtype == torch.float64
            for half in HALVES:
                rounded = scaled_dot_product_attention(q, k, v, mask.to(half))
                assert torch.equal(rounded, scaled_dot_product_attention(q, k, v, mask.to(half).to(dtype)))
        want = scaled_dot_product_attention(*(x.to(dtype) for x in (q, k, v)), mask)
    assert torch.equal(out, want)
    assert lse.dtype == torch.float32
    out.sum().backward()
    assert q.grad.dtype == torch.float32


def test_the_mask_beside_half_types_may_be_float32(path):
    for dtype in HALVES:
        q, k, v = (torch.randn(2, 2, 6, 4).to(dtype) for _ in range(3))
        mask = torch.randn(6, 6, requires_grad=True)
        with taking(path):
            out = scaled_dot_product_attention(q, k, v, mask)
            out.float().sum().backward()
            want = scaled_dot_product_attention(*(x.float() for x in (q, k, v)), mask)
        torch.testing.assert_close(out.float(), want, rtol=2 * torch.finfo(dtype).eps, atol=1e-4)
        assert mask.grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_on_meta(dtype):
    q, k, v = (torch.empty(2, 4, n, 8, device="meta", dtype=dtype, requires_grad=True) for n in (5, 7, 7))
    mask = torch.empty(5, 7, device="meta", dtype=dtype, requires_grad=True)
    out, lse = scaled_dot_product_attention(q, k, v, mask, is_causal=True, return_lse=True)
    assert (out.shape, out.dtype, out.device.type) == ((2, 4, 5, 8), dtype, "meta")
    assert (lse.shape, lse.dtype) == ((2, 4, 5), torch.float64 if dtype == torch.float64 else torch.float32)
    out.sum().backward()
    assert mask.grad.shape == mask.shape


def test_in_inference_mode(path):
    q = torch.randn(2, 2, 6, 4)
    with taking(path):
        want = scaled_dot_product_attention(q, q, q)
        with torch.inference_mode():
            assert torch.equal(scaled_dot_product_attention(q, q, q), want)


# ---------------------------------------------------------------------------------------------------
# What is refused


Q, K = torch.zeros(2, 4, 5, 8), torch.zeros(2, 4, 7, 8)
R = torch.zeros(4, 6, 8)  # ragged
CU = torch.tensor([0, 2, 6])
BAD = [
    ((1.0, K, K), {}, TypeError, "query: expected a tensor, got float"),
    ((Q, K, None), {}, TypeError, "value: expected a tensor, got NoneType"),
    ((Q.int(), K, K), {}, TypeError, "query: expected float32, float64, bfloat16 or float16, got int32"),
    ((Q, K.double(), K), {}, TypeError, "key: expected float32 as query is, got float64"),
    ((Q, K, K.half()), {}, TypeError, "value: expected float32 as query is, got float16"),
    ((Q, K.to("meta"), K), {}, ValueError, "key: expected a tensor on cpu as query is, got one on meta"),
    ((Q[0, 0, 0], K, K), {}, ValueError, r"query: expected at least two dimensions .* got \(8,\)"),
    ((Q, K[..., :3], K), {}, ValueError, "key: expected a width .* equal to query's, got 3 beside 8"),
    ((Q[..., :0], K[..., :0], K), {}, ValueError, "key: expected a width .* above 0 .* got 0 beside 0"),
    ((Q, K, K[..., :0]), {}, ValueError, "value: expected a width .* above 0, got 0"),
    ((Q, K, K[:, :, :3]), {}, ValueError, "value: expected the length of key, 7, .* got 3"),
    ((Q, K[:1, :3], K[:1, :3]), {}, ValueError, "query, key, value: expected .* H = Hkv without enable_gqa, got"),
    ((Q, K[:, :2], K[:, :2]), {}, ValueError, "query, key, value: expected .* H = Hkv without enable_gqa, got"),
    ((Q, K[:, :3], K[:, :3]), {"enable_gqa": True}, ValueError, "query, key, value: expected .* H a multiple of Hkv"),
    ((Q, K[:, :2], K), {"enable_gqa": True}, ValueError, "query, key, value: expected .* H a multiple of Hkv, got"),
    ((Q, K.expand(3, 2, 4, 7, 8), K), {}, None, ""),
    ((Q, K[[0, 0, 0]], K), {}, ValueError, "query, key, value: expected .* leading sizes that broadcast"),
    ((Q, K, K, 1.0), {}, TypeError, "attn_mask: expected a tensor, got float"),
    ((Q, K, K, torch.zeros(5, 7, dtype=torch.int)), {}, TypeError, "attn_mask: expected bool or float32, got int32"),
    ((Q, K, K, torch.zeros(5, 7).double()), {}, TypeError, "attn_mask: expected bool or float32, got float64"),
    (
        (Q, K, K, torch.zeros(7, 5)),
        {},
        ValueError,
        r"attn_mask: expected a shape that broadcasts to \(2, 4, 5, 7\), got",
    ),
    ((Q, K, K, torch.zeros(1, 2, 4, 5, 7)), {}, ValueError, "attn_mask: expected a shape that broadcasts to"),
    ((Q, K, K, torch.zeros(5, 7, device="meta")), {}, ValueError, "attn_mask: expected a tensor on cpu as query is"),
    (
        (Q, K, K),
        {"dropout_p": 1.0},
        ValueError,
        "dropout_p: expected a finite number of at least 0 and below 1, got 1.0",
    ),
    ((Q, K, K), {"dropout_p": -0.1}, ValueError, "dropout_p: expected .* got -0.1"),
    ((Q, K, K), {"dropout_p": 0.1, "generator": 7}, TypeError, "generator: expected a fastgen.random.Generator"),
    ((Q, K, K), {"scale": "1"}, TypeError, "scale: expected a number, got str"),
    ((Q, K, K), {"alibi_slopes": [1.0]}, TypeError, "alibi_slopes: expected a floating tensor, got list"),
    ((Q, K, K), {"alibi_slopes": CU}, TypeError, "alibi_slopes: expected a floating tensor, got int64"),
    ((Q, K, K), {"alibi_slopes": torch.zeros(3)}, ValueError, r"alibi_slopes: expected shape \(4,\) or \(2, 4\), got"),
    ((Q, K, K), {"alibi_slopes": torch.zeros(4, device="meta")}, ValueError, "alibi_slopes: expected a tensor on cpu"),
    ((Q, K, K), {"window_size": -1}, ValueError, "window_size: expected an int of at least 0, got -1"),
    ((Q, K, K), {"window_size": 1.5}, ValueError, "window_size: expected an int of at least 0, got 1.5"),
    ((Q, K, K), {"window_size": (1, -2)}, ValueError, "window_size: expected an int of at least 0, got -2"),
    ((Q, K, K), {"window_size": (1, 2, 3)}, ValueError, "window_size: expected an int or a pair .* got 3 values"),
    ((Q, K, K), {"softcap": 0}, ValueError, "softcap: expected a finite number above 0, got 0"),
    ((Q, K, K), {"alignment": "right"}, ValueError, "alignment: expected one of upper_left, lower_right, got 'right'"),
    ((Q, K, K), {"cu_seqlens_k": CU}, ValueError, "cu_seqlens_q: expected a tensor beside cu_seqlens_k, got None"),
    ((Q, K, K), {"cu_seqlens_q": CU}, ValueError, r"query: expected \(H, L, D\) .* got a batch of 2"),
    ((R, R, R, R[:, :, :6]), {"cu_seqlens_q": CU}, ValueError, "attn_mask: expected None with cu_seqlens_q"),
    ((R, R, R), {"cu_seqlens_q": [0, 6]}, ValueError, "cu_seqlens_q: expected int32 or int64 of shape .* got list"),
    (
        (R, R, R),
        {"cu_seqlens_q": CU.float()},
        ValueError,
        r"cu_seqlens_q: expected int32 or int64 .* got float32 \(3,\)",
    ),
    ((R, R, R), {"cu_seqlens_q": CU[None]}, ValueError, r"cu_seqlens_q: expected int32 or int64 .* got int64 \(1, 3\)"),
    ((R, R, R), {"cu_seqlens_q": CU.to("meta")}, ValueError, "cu_seqlens_q: expected .* on the CPU, got .* on meta"),
    ((R, R, R), {"cu_seqlens_q": CU[:0]}, ValueError, "cu_seqlens_q: expected values from 0 .* got no values"),
    ((R, R, R), {"cu_seqlens_q": CU[:2]}, ValueError, "cu_seqlens_q: expected values from 0 to .* 6, got 0 to 2"),
    ((R, R, R), {"cu_seqlens_q": CU[1:]}, ValueError, "cu_seqlens_q: expected values from 0 to .* 6, got 2 to 6"),
    (
        (R, R, R),
        {"cu_seqlens_q": torch.tensor([0, 4, 3, 6])},
        ValueError,
        r"cu_seqlens_q: expected values that ascend, got \[0, 4, 3, 6\]",
    ),
    ((R, R, R), {"cu_seqlens_q": CU, "cu_seqlens_k": CU[[0, 2]]}, ValueError, "cu_seqlens_k: expected 3 values"),
    ((R, R[:, :5], R[:, :5]), {"cu_seqlens_q": CU}, ValueError, "cu_seqlens_k: expected values from 0 .* key, 5, got"),
]


@pytest.mark.parametrize(("args", "options", "error", "message"), BAD)
def test_errors(args, options, error, message):
    if error is None:
        scaled_dot_product_attention(*args, **options)
        return
    with pytest.raises(error) as caught:
        scaled_dot_product_attention(*args, **options)
    caught.match(f"^{message}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("queries", [1, 3, 20])
def test_what_no_query_sees_is_not_read(path, queries):
    """Places of a cache that are not filled yet, or forgotten."""
    q, k, v = torch.randn(1, 4, queries, 8), torch.randn(1, 2, 700, 8), torch.randn(1, 2, 700, 8)
    options = {"is_causal": True, "window_size": 40, "alignment": "lower_right", "enable_gqa": True}
    with taking(path):
        expected = scaled_dot_product_attention(q, k, v, **options)
        k[:, :, : 600 - queries], v[:, :, : 600 - queries] = 1e9, 1e9
        assert torch.equal(scaled_dot_product_attention(q, k, v, **options), expected)
        if path != "reference":
            k[:, :, :500], v[:, :, :500] = math.nan, math.nan
            assert torch.equal(scaled_dot_product_attention(q, k, v, **options), expected)


@pytest.mark.parametrize("queries", [1, 2])
def test_what_no_query_sees_is_not_read_backward(path, queries):
    q, k, v = (torch.randn(1, 2, n, 8, requires_grad=True) for n in (queries, 16, 16))
    options = {"is_causal": True, "window_size": 4}

    def gradients():
        out = scaled_dot_product_attention(q, k, v, **options)
        return torch.autograd.grad(out, (q, k, v), torch.ones_like(out))

    with taking(path):
        expected = gradients()
        with torch.no_grad():
            k[:, :, queries:], v[:, :, queries:] = 1e9, 1e9
            if path != "reference":
                k[:, :, queries:], v[:, :, queries:] = math.nan, math.nan
        for got, want in zip(gradients(), expected, strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("queries", [2, 20])
def test_lse_of_a_key_that_is_nan(path, queries):
    k = torch.randn(1, 1, 16, 8)
    k[0, 0, 7, 3] = math.nan
    with taking(path):
        _, lse = scaled_dot_product_attention(torch.randn(1, 1, queries, 8), k, k, return_lse=True)
    assert lse.isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("queries", [2, 20])
def test_a_row_of_the_lowest_numbers_is_the_mean(path, queries, dtype):
    q, k = torch.randn(1, 1, queries, 8, dtype=dtype), torch.randn(1, 1, 5, 8, dtype=dtype)
    mask = torch.zeros(queries, 5, dtype=dtype)
    mask[0] = torch.finfo(dtype).min
    with taking(path):
        out = scaled_dot_product_attention(q, k, k, attn_mask=mask)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, k, attn_mask=mask))


@pytest.mark.parametrize("queries", [2, 20])
def test_a_row_under_a_huge_mask_has_no_huge_gradient(path, queries):
    """Its log-sum-exp does not tell its scores apart, but no weight is above 1."""
    q, k = torch.randn(1, 1, queries, 8, requires_grad=True), torch.randn(1, 1, 5, 8, requires_grad=True)
    mask = torch.zeros(queries, 5)
    mask[0] = -1.9e38
    with taking(path):
        out = scaled_dot_product_attention(q, k, k.detach(), attn_mask=mask)
        grads = torch.autograd.grad(out.sum(), (q, k))
    assert max(float(grad.abs().max()) for grad in grads) < 100


def test_many_short_sequences(path):
    """Their number costs no more than their length."""
    x = torch.randn(2, 3000, 4)
    with taking(path if path != "reference" else "generic"):
        out = scaled_dot_product_attention(x, x, x, cu_seqlens_q=torch.arange(3001))
    torch.testing.assert_close(out, x)


def test_errors_of_nested_tensors():
    ragged = torch.nested.nested_tensor([torch.zeros(n, 2, 4) for n in (3, 5)], layout=torch.jagged)
    x = ragged.transpose(1, 2)
    for args in ((x, x, Q), (Q, x, x), (ragged, ragged, ragged)):
        with pytest.raises(ValueError, match=r"^(query|key|value): expected a nested tensor \(B, H, L, D\)"):
            scaled_dot_product_attention(*args)
    strided = torch.nested.nested_tensor([torch.zeros(2, n, 4) for n in (3, 5)])  # PyTorch's default layout
    with pytest.raises(ValueError, match=r"^query: expected a nested tensor \(B, H, L, D\) of layout torch.jagged"):
        scaled_dot_product_attention(strided, strided, strided)
    with pytest.raises(ValueError, match=r"^attn_mask, cu_seqlens_q, cu_seqlens_k: expected None with nested tensors"):
        scaled_dot_product_attention(x, x, x, torch.zeros(5, 5))
    other = torch.nested.nested_tensor([torch.zeros(n, 2, 4) for n in (4, 4)], layout=torch.jagged).transpose(1, 2)
    with pytest.raises(ValueError, match=r"^value: expected the lengths of key"):
        scaled_dot_product_attention(x, x, other)


def test_a_generator_moves_only_with_dropout():
    g = Generator(1)
    scaled_dot_product_attention(Q, K, K, generator=g)
    assert g.offset == 0
