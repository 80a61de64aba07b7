"""The attention ops themselves: PyTorch's own checks, the reference beside the kernels, torch.compile."""

from __future__ import annotations

import pytest
import torch
from attention_cases import Case, boundaries, outputs_and_gradients
from support import FLOATS, call, needs_inductor
from torch._dynamo.testing import CompileCounterWithBackend

from fastgen import reference
from fastgen._ops import attention as attention_ops
from fastgen.functional import scaled_dot_product_attention
from fastgen.random import Generator
from fastgen.reference._work import work_dtype

ALL = 0b11111
KINDS = [
    Case(),
    Case(layout="rows", causal=True, heads=4),
    Case(layout="cut", mask="float-02", slopes="rows", window=(3, 1), softcap=2.0),
    Case(layout="repeated", mask="bool", dropout=0.3, slopes="heads", lower_right=True),
    Case(batch=1, lengths=((3, 0, 2), (2, 4, 1)), causal=True, slopes="heads"),
    Case(queries=0),
    Case(keys=0),
    Case(batch=0, mask="float-0", slopes="rows"),
    Case(batch=0, slopes="heads"),
]


def arguments(case: Case, dtype: torch.dtype) -> tuple:
    """Arguments of `attention`."""
    query, key, value, mask, slopes = case._named(tuple(case.operands(dtype)))
    cu_q, cu_k = (None, None) if case.lengths is None else map(boundaries, case.lengths)
    window = case.window if isinstance(case.window, tuple) else (case.window, case.window)
    left, right = (-1 if side is None else side for side in window)
    seed_offset = torch.tensor([5, 7]) if case.dropout else None
    options = (case.dropout, 0.4, case.softcap or 0.0, left, 0 if case.causal else right, case.lower_right)
    return (query, key, value, mask, slopes, cu_q, cu_k, seed_offset, *options)


def backward_arguments(given: tuple, needs: int = ALL, absent: int | None = None) -> tuple:
    """Arguments of `attention_backward` after `given` of `attention`, with gradients for all outputs but one."""
    out, lse = reference.attention(*given)
    grads = [torch.ones_like(out), torch.ones_like(lse)]
    if absent is not None:
        grads[absent] = None
    if given[3] is not None and given[3].dtype == torch.bool:
        needs &= ~0b1000  # such a mask has no gradient
    return (*grads, *given[:8], out, lse, *given[8:], needs)


def samples() -> list[tuple[str, tuple]]:
    found: list[tuple[str, tuple]] = []
    for dtype in FLOATS:
        for case in KINDS if dtype == torch.float32 else KINDS[2:3]:
            given = arguments(case, dtype)
            found += [("attention", given), ("attention_backward", backward_arguments(given))]
    given = arguments(KINDS[2], torch.float32)
    found += [("attention_backward", backward_arguments(given, needs)) for needs in (1, 2, 4, 8, 16, 0b01101)]
    found += [("attention_backward", backward_arguments(given, absent=i)) for i in (0, 1)]
    return found


@pytest.mark.parametrize("name", attention_ops.SCHEMAS)
def test_opcheck(name):
    """Schema (nothing is written or aliased), fake kernel (shapes, strides, dtypes) and dispatch."""
    op = getattr(torch.ops.fastgen, name).default
    mine = [args for other, args in samples() if other == name]
    for args in mine:
        torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor", "test_autograd_registration"))
    torch.library.opcheck(op, mine[0])  # the slow one, with symbolic sizes


def test_reference_has_the_strides_that_the_fake_kernels_promise():
    for name, args in samples():
        on_meta = [a.to("meta") if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args]
        for i, a in enumerate(args):
            if isinstance(a, torch.Tensor) and a.is_floating_point():
                on_meta[i] = torch.empty_strided(a.shape, a.stride(), dtype=a.dtype, device="meta")
        promised, got = getattr(torch.ops.fastgen, name)(*on_meta), getattr(reference, name)(*args)
        for x, y in zip(got, promised, strict=True):
            assert (x.shape, x.dtype, x.stride()) == (y.shape, y.dtype, y.stride()), name


@pytest.mark.parametrize("name", attention_ops.SCHEMAS)
def test_kernels_agree_with_the_reference(isa, name):
    """Shapes, strides, dtypes and values; either backward follows either forward."""
    for op, args in samples():
        if op != name:
            continue
        got, want = call(name, isa, *args), call(name, "reference", *args)
        for a, b in zip(got, want, strict=True):
            assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())
            unit = torch.finfo(args[2].dtype).eps
            torch.testing.assert_close(a, b, rtol=16 * unit, atol=16 * unit)


@pytest.mark.parametrize("case", KINDS[:5], ids=str)
def test_the_backward_formulas_are_the_derivative(case):
    """The reference's written-out backward against autograd through its forward."""
    given = arguments(case, torch.float64)
    leaves = [x if x is None or x.dtype == torch.bool else x.detach().requires_grad_() for x in given[:5]]
    out, lse = reference.attention(*leaves, *given[5:])
    grads = [torch.randn_like(out), torch.where(lse.isfinite(), torch.randn_like(lse), 0.0)]
    present = [x for x in leaves if x is not None and x.requires_grad]
    want = iter(torch.autograd.grad([out, lse], present, grads))
    detached = (out.detach(), lse.detach())
    for x, found in zip(
        leaves,
        reference.attention_backward(*grads, *given[:8], *detached, *given[8:], ALL),
        strict=True,
    ):
        if x is None or not x.requires_grad:
            assert found.shape in ((0,), getattr(x, "shape", (0,)))
        else:
            torch.testing.assert_close(found, next(want))


def change(index: int, function):
    """Arguments of `attention` with one changed."""
    return lambda a: (*a[:index], function(a[index]), *a[index + 1 :])


WRONG = [
    change(0, lambda q: q[0]),
    change(0, lambda q: q.double()),
    change(0, lambda q: q.long()),
    change(0, lambda q: q[..., :3]),
    change(0, lambda q: q[:, :1].repeat(1, 3, 1, 1)),  # 3 heads beside 2
    change(0, lambda q: q[:1]),
    change(1, lambda k: k[:, :, :-1]),
    change(1, lambda k: k[:, :1]),
    change(2, lambda v: v[:1]),
    change(2, lambda v: v[..., :0]),
    change(3, lambda m: m[0]),
    change(3, lambda m: m[..., :-1].repeat(2, 1, 1, 1)),
    change(3, lambda m: m.double()),
    change(4, lambda s: s[:, :1]),
    change(4, lambda s: s.double()),
    change(7, lambda _: None),
    change(7, lambda s: s[:1]),
    change(7, lambda s: s.float()),
    change(8, lambda _: 1.0),
    change(8, lambda _: 0.0),
]


@pytest.mark.parametrize("wrong", WRONG, ids=[str(i) for i in range(len(WRONG))])
def test_the_kernel_refuses_what_it_cannot_read(isa, wrong):
    """The op may be called past fastgen.functional: it reads no memory that is not there."""
    right = arguments(Case(mask="float-02", slopes="rows", dropout=0.5), torch.float32)
    call("attention", isa, *right)
    with pytest.raises(RuntimeError):
        call("attention", isa, *wrong(right))


@pytest.mark.parametrize("cu", [[0, 2], [0, 6], [1, 5], [0, 3, 2, 5], [-1, 5], [], [0, 2**40, 5]], ids=str)
def test_the_kernel_refuses_sequences_that_are_not_there(isa, cu):
    given = arguments(Case(batch=1, queries=5, keys=5), torch.float32)
    for cus in (
        (torch.tensor(cu, dtype=torch.int64), torch.tensor([0, 5])),
        (torch.tensor([0, 5]), torch.tensor(cu, dtype=torch.int64)),
    ):
        with pytest.raises(RuntimeError):
            call("attention", isa, *given[:5], *cus, *given[7:])


# ---------------------------------------------------------------------------------------------------
# torch.compile


@pytest.fixture
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


inductor = pytest.param("inductor", marks=[pytest.mark.slow, needs_inductor])
SIZES = {"width": 12, "value_width": 13}
COMPILED = [
    Case(causal=True, heads=4, **SIZES),
    Case(mask="float-01", slopes="heads", window=4, dropout=0.4, softcap=2.5, layout="rows", **SIZES),
]


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("backend", ["aot_eager", inductor])
@pytest.mark.parametrize("case", COMPILED, ids=str)
def test_compiled_with_any_sizes(case, backend):
    """No graph break, one graph for all lengths and batches; values and gradients are those of eager mode."""
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(lambda g, *x: case.ours(*x, generator=g), fullgraph=True, backend=counter, dynamic=True)
    g, h, frames = Generator(5, 2), Generator(5, 2), 0
    for batch, queries, keys in ((5, 9, 11), (6, 20, 14)):  # none the size of something else, which Dynamo would join
        sized = Case(**{**vars(case), "batch": batch, "queries": queries, "keys": keys})
        leaves = sized.leaves()
        got = outputs_and_gradients(lambda *x: compiled(g, *x), leaves, 0)
        want = outputs_and_gradients(lambda *x: case.ours(*x, generator=h), leaves, 0)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)
        assert g.offset == h.offset
        frames = frames or counter.frame_count
    assert counter.frame_count == frames
    with torch.no_grad():
        torch.testing.assert_close(compiled(Generator(1), *leaves)[0], case.ours(*leaves, generator=Generator(1))[0])


@pytest.mark.usefixtures("fresh")
def test_compiled_ragged_sequences():
    def function(q, k, v, cu):
        return scaled_dot_product_attention(q, k, v, is_causal=True, cu_seqlens_q=cu)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    for lengths in ((3, 4), (5, 1, 6), (2, 9)):
        q, k, v = (torch.randn(2, sum(lengths), 4, requires_grad=True) for _ in range(3))
        cu = boundaries(lengths)
        got, want = compiled(q, k, v, cu), function(q, k, v, cu)
        torch.testing.assert_close(got, want)
        for a, b in zip(
            torch.autograd.grad(got.sum(), (q, k, v)), torch.autograd.grad(want.sum(), (q, k, v)), strict=True
        ):
            torch.testing.assert_close(a, b)


@pytest.mark.usefixtures("fresh")
def test_compiled_with_one_tensor_for_all_three_and_in_training_layout():
    """The shape of a transformer block: one projection, heads split as views."""
    weight = torch.randn(24, 8, requires_grad=True)

    def block(x):
        q, k, v = (x @ weight.T).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4).unbind(0)
        return scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2)

    def shared(x):
        x = x.unsqueeze(1)
        return scaled_dot_product_attention(x, x, x)

    for function in (block, shared):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        x = torch.randn(2, 5, 8, requires_grad=True)
        got, want = compiled(x), function(x)
        torch.testing.assert_close(got, want)
        (a,), (b,) = (torch.autograd.grad(y.square().sum(), x) for y in (got, want))
        torch.testing.assert_close(a, b)


@pytest.mark.usefixtures("fresh")
def test_compiled_under_autocast_and_transforms():
    def function(q):
        return scaled_dot_product_attention(q, q, q, is_causal=True)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    q = torch.randn(2, 2, 5, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = compiled(q)
        torch.testing.assert_close(got, function(q))
    assert got.dtype == torch.bfloat16
    mapped = torch.compile(torch.vmap(function), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(mapped(q), function(q))


def test_export():
    class Model(torch.nn.Module):
        def forward(self, q, k, v):
            return scaled_dot_product_attention(q, k, v, is_causal=True, window_size=3)

    q, k, v = (torch.randn(2, 2, 6, 4) for _ in range(3))
    length = torch.export.Dim("L")
    shapes = {name: {2: length} for name in "qkv"}
    exported = torch.export.export(Model(), (q, k, v), dynamic_shapes=shapes).module()
    for n in (6, 4):
        part = [x[:, :, :n] for x in (q, k, v)]
        torch.testing.assert_close(exported(*part), Model()(*part))


def test_lse_is_in_the_work_dtype():
    for dtype in FLOATS:
        _, lse = torch.ops.fastgen.attention(*arguments(KINDS[0], dtype))
        assert lse.dtype == work_dtype(dtype)
