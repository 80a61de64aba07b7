"""Gradients of attention to every order and by every road; what a training step keeps."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest
import torch
from attention_cases import EXAMPLES, Case, taking
from support import FLOATS
from torch.autograd import forward_ad

from fastgen._load import kernel_devices
from fastgen._ops import attention as ops
from fastgen.functional import scaled_dot_product_attention
from fastgen.random import Generator


def differentiable_leaves(case: Case):
    """The leaves that have gradients, and a function of them that gives out and lse, 0 where it is infinite."""
    leaves = case.leaves()

    def function(*given):
        rest = iter(given)
        out, lse = case.ours(*(next(rest) if x.requires_grad else x for x in leaves))
        return out, torch.where(lse.isfinite(), lse, 0.0)

    return function, tuple(x for x in leaves if x.requires_grad)


@pytest.mark.parametrize("case", EXAMPLES, ids=str)
def test_gradcheck(path, case):
    function, leaves = differentiable_leaves(case)
    with taking(path):
        assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("case", EXAMPLES, ids=str)
def test_gradgradcheck(case):
    """By whatever path the first order goes, the second goes through the reference."""
    function, leaves = differentiable_leaves(case)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("which", range(5))
def test_one_gradient_alone(path, which):
    """Each of query, key, value, mask and slopes while the others are constants: what is not wanted is not made."""
    case = Case(mask="float-0", slopes="heads", causal=True, layout="rows")
    together = case.leaves()
    with taking(path):
        out, lse = case.ours(*together)
        want = torch.autograd.grad(out.sum() + lse.sum(), together)[which]
        leaves = [x.detach().requires_grad_(i == which) for i, x in enumerate(together)]
        out, lse = case.ours(*leaves)
        (got,) = torch.autograd.grad(out.sum() + lse.sum(), [leaves[which]])
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("outputs", ["out", "lse"])
def test_the_gradient_of_one_output_alone(path, outputs):
    case = Case(causal=True)
    leaves = case.leaves()
    index = ("out", "lse").index(outputs)
    with taking(path):
        got = torch.autograd.grad(case.ours(*leaves)[index].sum(), leaves, allow_unused=True)
    want = torch.autograd.grad(case.theirs(*leaves)[index].sum(), leaves, allow_unused=True)
    for a, b in zip(got, want, strict=True):
        if b is None:  # lse does not depend on value
            assert a is None or not a.any()
        else:
            torch.testing.assert_close(a, b)


def test_one_tensor_for_all_three(path):
    x = torch.randn(2, 3, 9, 4, dtype=torch.float64, requires_grad=True)
    with taking(path):
        assert torch.autograd.gradcheck(lambda x: scaled_dot_product_attention(x, x, x, is_causal=True), (x,))
    assert torch.autograd.gradgradcheck(lambda x: scaled_dot_product_attention(x, x, x), (x,), fast_mode=True)


def test_gradient_penalty(path):
    """A loss of a gradient, through operands that depend on each other."""
    x = torch.randn(2, 3, 6, 4, dtype=torch.float64)
    w = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)

    def penalty(w, attention):
        query = (x @ w).requires_grad_()
        out = attention(query, query * 2, x)
        (grad,) = torch.autograd.grad(out.square().sum(), query, create_graph=True)
        return grad.square().sum()

    with taking(path):
        (got,) = torch.autograd.grad(penalty(w, lambda q, k, v: scaled_dot_product_attention(q, k, v, softcap=2.0)), w)
    case = Case(heads=3, key_heads=3, queries=6, keys=6, width=4, value_width=4, softcap=2.0)
    (want,) = torch.autograd.grad(penalty(w, lambda q, k, v: case.theirs(q, k, v)[0]), w)
    torch.testing.assert_close(got, want)


# ---------------------------------------------------------------------------------------------------
# torch.func and forward mode


TRANSFORMED = [
    Case(),
    Case(causal=True, heads=4, dropout=0.3),
    Case(mask="float-01", slopes="heads", softcap=2.0),
    Case(batch=1, lengths=((3, 2), (4, 3))),
]


@pytest.mark.parametrize("case", TRANSFORMED, ids=str)
def test_vmap(case):
    """Over all operands, and over one with the others shared; the noise is shared."""
    samples = [Case(**{**vars(case), "seed": s}).operands() for s in range(3)]
    stacked = [torch.stack(x) for x in zip(*samples, strict=True)]
    g = lambda: Generator(5)  # noqa: E731
    got = torch.vmap(lambda *x: case.ours(*x, generator=g() if case.dropout else None))(*stacked)
    want = [case.ours(*x, generator=g() if case.dropout else None) for x in samples]
    for a, b in zip(got, zip(*want, strict=True), strict=True):
        torch.testing.assert_close(a, torch.stack(b))
    first, *rest = stacked
    got = torch.vmap(lambda q: case.ours(q, *(x[0] for x in rest))[0])(first)
    want = torch.stack([case.ours(q, *(x[0] for x in rest))[0] for q in first])
    torch.testing.assert_close(got, want)


def test_vmap_over_each_operand():
    """One after the other of query, key, value, mask and slopes, and by pairs, with the others shared."""
    case = Case(heads=4, causal=True, mask="float-01", slopes="heads", window=(4, 2), softcap=3.0)
    stacked = [
        torch.stack(x) for x in zip(*(Case(**{**vars(case), "seed": s}).operands() for s in range(3)), strict=True)
    ]
    for mapped in itertools.chain.from_iterable(itertools.combinations(range(5), n) for n in (1, 2)):
        in_dims = tuple(0 if i in mapped else None for i in range(5))
        given = [x if i in mapped else x[0] for i, x in enumerate(stacked)]
        got = torch.vmap(case.ours, in_dims=in_dims)(*given)
        want = [case.ours(*(x[s] if i in mapped else x for i, x in enumerate(given))) for s in range(3)]
        for a, b in zip(got, zip(*want, strict=True), strict=True):
            torch.testing.assert_close(a, torch.stack(b))


def test_vmap_over_leading_dimensions_that_are_missing():
    q, k, v = (torch.randn(3, 4, 5) for _ in range(3))
    got = torch.vmap(scaled_dot_product_attention)(q, k, v)
    torch.testing.assert_close(got, scaled_dot_product_attention(q, k, v))


@pytest.mark.parametrize("case", TRANSFORMED, ids=str)
def test_forward_mode(case):
    function, leaves = differentiable_leaves(case)
    assert torch.autograd.gradcheck(
        function, leaves, check_forward_ad=True, check_backward_ad=False, check_batched_grad=False, fast_mode=True
    )
    tangents = [torch.randn_like(x) for x in leaves]
    with forward_ad.dual_level():
        out, _ = function(*(forward_ad.make_dual(x.detach(), t) for x, t in zip(leaves, tangents, strict=True)))
        value, tangent = forward_ad.unpack_dual(out)
    torch.testing.assert_close(value, function(*leaves)[0].detach())
    _, want = torch.func.jvp(lambda *x: function(*x)[0], tuple(x.detach() for x in leaves), tuple(tangents))
    torch.testing.assert_close(tangent, want)


def test_transforms_nest():
    case = Case(queries=2, keys=3, width=2, value_width=2, causal=True)
    q, k, v = case.operands()

    def loss(q, k, v):
        return case.ours(q, k, v)[0].square().sum()

    hessian = torch.func.hessian(loss)(q, k, v)
    want = torch.autograd.functional.hessian(lambda q: loss(q, k, v), q)
    torch.testing.assert_close(hessian, want)
    one = torch.func.vmap(torch.func.grad(loss), in_dims=(0, None, None))(q.unsqueeze(1), k[:1], v[:1])
    case = Case(batch=1, queries=2, keys=3, width=2, value_width=2, causal=True)
    for i in range(2):
        torch.testing.assert_close(one[i], torch.func.grad(loss)(q[i : i + 1], k[:1], v[:1]))


def test_batched_gradients(path):
    """torch.autograd.functional.jacobian(vectorize=True) runs the backward pass under vmap."""
    case = Case(queries=2, keys=3, causal=True)
    q, k, v = case.operands()
    with taking(path):
        got = torch.autograd.functional.jacobian(lambda q: case.ours(q, k, v)[0], q, vectorize=True)
        want = torch.autograd.functional.jacobian(lambda q: case.ours(q, k, v)[0], q)
    torch.testing.assert_close(got, want)


# ---------------------------------------------------------------------------------------------------
# What is kept, and where


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_training_step_keeps_nothing_of_quadratic_size(dtype):
    sizes = []

    def pack(x):
        sizes.append(x.numel())
        return x

    q, k, v = (torch.randn(1, 2, 64, 4, dtype=dtype, requires_grad=True) for _ in range(3))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=0.1, generator=Generator(1))
    assert max(sizes) == q.numel()
    out.sum().backward()
    assert q.grad.dtype == dtype


PEAK = """
import resource, torch
from fastgen.functional import scaled_dot_product_attention

def step(length):
    q, k, v = (torch.randn(1, 1, length, 8, requires_grad=True) for _ in range(3))
    scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=0.1).sum().backward()

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KB

step(256)
before = peak()
step(8192)
print(peak() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ru_maxrss is in KB on Linux")
@pytest.mark.skipif(not kernel_devices("attention"), reason="the reference holds all scores")
def test_a_long_training_step_needs_nothing_of_quadratic_size():
    """Scores of 8192 queries and keys are 256 MB in float32; what PyTorch does with dropout holds several of them."""
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 64 * 1024


def test_without_gradient_nothing_is_kept():
    q = torch.randn(1, 2, 6, 4, requires_grad=True)
    with torch.no_grad():
        assert scaled_dot_product_attention(q, q, q).grad_fn is None
    assert scaled_dot_product_attention(q.detach(), q.detach(), q.detach()).grad_fn is None


@pytest.mark.parametrize("layout", ["dense", "rows", "cut", "repeated"])
def test_gradients_are_dense_in_the_memory_order_of_the_operands(path, layout):
    case = Case(layout=layout, heads=4, key_heads=2)
    operands = case.operands()
    with taking(path):
        out, lse = case.ours(*operands)
        grads = ops._attention_backward(
            *(torch.ones_like(out), None, *operands, None, None, None, None, None, out, lse),
            *(0.0, 0.5, 0.0, -1, -1, False, 0b111),
        )
    for x, follows in zip((out, *grads[:3]), (operands[0], *operands), strict=True):
        rows = follows.stride(2) > follows.stride(1)
        assert (x.transpose(1, 2) if rows else x).is_contiguous()
    assert lse.is_contiguous()


def test_operands_are_left_alone(path):
    case = Case(mask="float-2", slopes="heads", layout="cut")
    leaves = case.leaves()
    before = [x.detach().clone() for x in leaves]
    with taking(path):
        out, _ = case.ours(*leaves)
        out.sum().backward()
    for x, y in zip(leaves, before, strict=True):
        assert torch.equal(x, y)


def test_checkpointing(path):
    """The recomputation draws the dropout of the forward pass, by torch's own default generator."""
    case = Case()
    results = []
    for checkpointed in (False, True):
        q, k, v = case.leaves()
        torch.manual_seed(3)

        def function(q, k, v):
            return scaled_dot_product_attention(q, k, v, dropout_p=0.5)

        with taking(path):
            if checkpointed:
                out = torch.utils.checkpoint.checkpoint(function, q, k, v, use_reentrant=False)
            else:
                out = function(q, k, v)
            out.sum().backward()
        results.append((out.detach(), q.grad, k.grad, v.grad))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
