"""The ops of random.py and reparameterize.py under PyTorch's own checks and transforms."""

from __future__ import annotations

import pytest
import torch
from support import FLOATS, call
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

from fastgen import random
from fastgen._load import use_cpu_isa
from fastgen._ops import random as random_ops
from fastgen._ops import reparameterize as reparameterize_ops
from fastgen.functional import reparameterize, reparameterize_kl
from fastgen.random import Generator

ops = torch.ops.fastgen


def operand(seed: int, *shape: int, dtype: torch.dtype = torch.float32, layout: str = "contiguous") -> torch.Tensor:
    x = random.normal(*shape, generator=Generator(seed), dtype=dtype)
    return x if layout == "contiguous" else x.transpose(0, -1).contiguous().transpose(0, -1)


def samples() -> list[tuple[str, tuple]]:
    one = Generator(3, 5).get_state()
    several = torch.stack([one, Generator(4).get_state()])
    out: list[tuple[str, tuple]] = [("claim", (Generator(3, 5).get_state(), 7))]
    for seeds in (one, several):
        for size in ([], [0], [5, 3]):
            out += [("random_bits", (seeds, size, d)) for d in (torch.int32, torch.int64)]
            out += [("bernoulli", (seeds, size, d, 0.4)) for d in (torch.bool, torch.float16)]
            for dtype in FLOATS:
                out += [
                    ("normal", (seeds, size, dtype, 0.0, 1.0)),
                    ("uniform", (seeds, size, dtype, -1.0, 2.0)),
                    ("exponential", (seeds, size, dtype, 2.0)),
                ]
    for dtype in FLOATS:
        for layout in ("contiguous", "transposed"):
            mu, logvar, eps, grad = (operand(k, 3, 2, 5, dtype=dtype, layout=layout) for k in range(4))
            rows = operand(5, 3, 2, dtype=dtype, layout=layout)
            for noise in ((one, None), (None, eps)):
                out += [
                    ("reparameterize", (mu, logvar, *noise)),
                    ("reparameterize", (mu[0, 0, 0], logvar[0, 0, 0], None, eps[0, 0, 0])),
                    ("reparameterize", (mu[:0], logvar[:0], one, None)),
                    ("reparameterize_kl", (mu, logvar, *noise)),
                    ("reparameterize_kl", (mu[..., :0], logvar[..., :0], one, None)),
                    ("reparameterize_backward", (grad, logvar, *noise)),
                    ("reparameterize_kl_backward", (grad, rows, mu, logvar, *noise)),
                    ("reparameterize_kl_backward", (None, rows, mu, logvar, *noise)),
                    ("reparameterize_kl_backward", (grad, None, mu, logvar, *noise)),
                ]
    return out


@pytest.mark.parametrize("name", [*random_ops.SCHEMAS, *reparameterize_ops.SCHEMAS])
def test_opcheck(name):
    """Schema (nothing is written or aliased but what it says), fake kernel (shapes, strides, dtypes) and dispatch."""
    mine = [args for op, args in samples() if op == name]
    assert mine
    for args in mine:
        tests = ("test_schema", "test_faketensor", "test_autograd_registration")
        torch.library.opcheck(getattr(ops, name).default, args, test_utils=tests)
    # The slow one, once for each op; mutable arguments and symbolic sizes included.
    torch.library.opcheck(getattr(ops, name).default, mine[-1])


def test_reference_has_the_strides_that_the_fake_kernels_promise():
    for name, args in samples():
        if name == "claim":
            continue
        got, fake_mode = call(name, "reference", *args), FakeTensorMode()
        fake_args = [fake_mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args]
        with fake_mode:
            expected = getattr(ops, name)(*fake_args)
        for x, y in zip(got, expected, strict=True) if isinstance(got, tuple) else [(got, expected)]:
            assert (x.shape, x.dtype, x.stride()) == (y.shape, y.dtype, y.stride()), name


def test_meta_tensors():
    for name, args in samples():
        if name == "claim":
            continue
        on_meta = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in args]
        got, want = getattr(ops, name)(*on_meta), getattr(ops, name)(*args)
        for x, y in zip(got, want, strict=True) if isinstance(want, tuple) else [(got, want)]:
            assert x.is_meta
            assert (x.shape, x.dtype) == (y.shape, y.dtype)
    mu = torch.zeros(3, 4, device="meta", requires_grad=True)
    z, kl = reparameterize_kl(mu, mu)
    (z.sum() + kl.sum()).backward()
    assert mu.grad.shape == (3, 4)


def test_claim(path):
    for offset, count in ((0, 0), (5, 9), (2**64 - 3, 10), (2**63 - 1, 1)):
        state = Generator(2**64 - 1, offset).get_state()
        taken = call("claim", path, state, count)
        assert [int(w) % 2**64 for w in taken] == [2**64 - 1, offset]
        assert [int(w) % 2**64 for w in state] == [2**64 - 1, (offset + count) % 2**64]
        assert taken.data_ptr() != state.data_ptr()


WRONG = [
    lambda so, x: ops.random_bits(so, [4], torch.float32),
    lambda so, x: ops.random_bits(so, [4], torch.bool),
    lambda so, x: ops.uniform(so, [4], torch.bool, 0.0, 1.0),
    lambda so, x: ops.normal(so, [4], torch.int8, 0.0, 1.0),
    lambda so, x: ops.normal(so, [4], torch.int64, 0.0, 1.0),
    lambda so, x: ops.exponential(so, [4], torch.complex64, 1.0),
    lambda so, x: ops.bernoulli(so, [4], torch.int32, 0.5),
    lambda so, x: ops.normal(so.int(), [4], torch.float32, 0.0, 1.0),
    lambda so, x: ops.normal(so[:1], [4], torch.float32, 0.0, 1.0),
    lambda so, x: ops.normal(so.expand(2, 2, 2), [4], torch.float32, 0.0, 1.0),
    lambda so, x: ops.normal(so, [-1], torch.float32, 0.0, 1.0),
    lambda so, x: ops.claim(so.expand(2, 2).contiguous(), 1),
    lambda so, x: ops.reparameterize(x.int(), x.int(), so, None),
    lambda so, x: ops.reparameterize(x.bool(), x.bool(), so, None),
    lambda so, x: ops.reparameterize(x, x[:1], so, None),
    lambda so, x: ops.reparameterize(x, x.double(), so, None),
    lambda so, x: ops.reparameterize(x, x, None, None),
    lambda so, x: ops.reparameterize(x, x, so, x),
    lambda so, x: ops.reparameterize(x, x, None, x[:1]),
    lambda so, x: ops.reparameterize(x, x, so.expand(3, 2), None),
    lambda so, x: ops.reparameterize_kl(x[0, 0], x[0, 0], so, None),
    lambda so, x: ops.reparameterize_backward(x[:1], x, so, None),
    lambda so, x: ops.reparameterize_backward(x.bool(), x.bool(), so, None),
    lambda so, x: ops.reparameterize_kl_backward(None, None, x, x, so, None),
    lambda so, x: ops.reparameterize_kl_backward(x, x, x, x, so, None),
    lambda so, x: ops.reparameterize_kl_backward(x, x[:1, 0], x, x, so, None),
    lambda so, x: ops.reparameterize_kl_backward(x, x[:, 0].double(), x, x, so, None),
]


@pytest.mark.parametrize("wrong", WRONG)
def test_an_op_called_past_its_python_function_still_checks(isa, wrong):
    """Whatever arrives, a kernel neither reads nor writes out of bounds: it raises."""
    with use_cpu_isa(isa), pytest.raises(RuntimeError):
        wrong(Generator(1).get_state(), torch.zeros(3, 4))


# ---------------------------------------------------------------------------------------------------
# vmap and torch.func


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("function", [reparameterize, lambda *a, **k: reparameterize_kl(*a, **k)[1]], ids=["z", "kl"])
def test_vmap(dtype, function):
    mu, logvar, eps = (random.normal(6, 4, generator=Generator(k), dtype=dtype) for k in range(3))
    given = torch.vmap(lambda m, v, e: function(m, v, eps=e))(mu, logvar, eps)
    torch.testing.assert_close(given, function(mu, logvar, eps=eps))
    mixed = torch.vmap(lambda m, e: function(m, logvar, eps=e), in_dims=(1, None))(torch.stack([mu, mu * 2], 1), eps)
    torch.testing.assert_close(mixed, torch.stack([function(mu, logvar, eps=eps), function(mu * 2, logvar, eps=eps)]))

    # One generator: every sample sees the noise that it would have seen alone.
    same = torch.vmap(lambda m, v: function(m, v, generator=Generator(7)), randomness="same")(mu, logvar)
    alone = torch.stack([function(m, v, generator=Generator(7)) for m, v in zip(mu, logvar, strict=True)])
    torch.testing.assert_close(same, alone)


@pytest.mark.parametrize("function", [reparameterize, lambda m, v: reparameterize_kl(m, v)[0]], ids=["z", "kl"])
def test_vmap_randomness(function):
    zero = torch.zeros(5, 64)
    torch.manual_seed(0)
    same = torch.vmap(function, randomness="same")(zero, zero)
    assert (same == same[0]).all()
    different = torch.vmap(function, randomness="different")(zero, zero)
    assert all(not torch.equal(different[i], different[j]) for i in range(5) for j in range(i))
    with pytest.raises(RuntimeError, match="randomness"):
        torch.vmap(function)(zero, zero)
    drawn = torch.vmap(lambda x: x + random.normal(64), randomness="different")(zero)
    assert not torch.equal(drawn[0], drawn[1])


def test_forward_mode():
    """Tangents, Hessians (forward over reverse) and dual tensors against the formula in plain PyTorch."""
    mu, logvar, t = (random.normal(4, 3, generator=Generator(k), dtype=torch.float64) for k in range(3))
    eps = random.normal(4, 3, generator=Generator(3), dtype=torch.float64)

    def ours(m, v):
        z, kl = reparameterize_kl(m, v, generator=Generator(3))
        return (z**2).sum() + kl.sum()

    def plain(m, v):
        kl = 0.5 * (m**2 + v.exp() - 1 - v).sum()
        return ((m + torch.exp(0.5 * v) * eps) ** 2).sum() + kl

    want = torch.func.jvp(plain, (mu, logvar), (t, t))
    torch.testing.assert_close(torch.func.jvp(ours, (mu, logvar), (t, t)), want)
    torch.testing.assert_close(torch.func.hessian(ours, 1)(mu, logvar), torch.func.hessian(plain, 1)(mu, logvar))
    with forward_ad.dual_level():
        value = ours(forward_ad.make_dual(mu, t), forward_ad.make_dual(logvar, t))
        torch.testing.assert_close(forward_ad.unpack_dual(value).tangent, want[1])


def test_z_alone_does_not_hold_mu():
    mu, logvar = torch.zeros(4, requires_grad=True), torch.zeros(4, requires_grad=True)
    moved = mu * 1
    z = reparameterize(moved, logvar)
    moved.add_(1)
    z.sum().backward()
    assert torch.equal(mu.grad, torch.ones(4))


def test_vmap_compiles():
    zero = torch.zeros(5, 16)
    compiled = torch.compile(torch.vmap(reparameterize, randomness="different"), fullgraph=True, backend="aot_eager")
    assert compiled(zero, zero).unique(dim=0).shape == (5, 16)


def test_nested_vmap():
    zero = torch.zeros(3, 2, 16)
    torch.manual_seed(0)
    z = torch.vmap(torch.vmap(reparameterize, randomness="different"), randomness="different")(zero, zero)
    assert z.flatten(0, 1).unique(dim=0).shape[0] == 6


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_per_sample_gradients(dtype):
    mu, logvar = (random.normal(5, 3, generator=Generator(k), dtype=dtype) for k in range(2))
    for randomness in ("same", "different"):

        def loss(m, v):
            z, kl = reparameterize_kl(m, v, generator=Generator(3))
            return (z**2).sum() + kl

        got = torch.vmap(torch.func.grad(loss, argnums=(0, 1)), randomness=randomness)(mu, logvar)
        want = [torch.func.grad(loss, argnums=(0, 1))(m, v) for m, v in zip(mu, logvar, strict=True)]
        for x, y in zip(got, zip(*want, strict=True), strict=True):
            torch.testing.assert_close(x, torch.stack(y))


def test_gradient_of_vmap_and_second_derivatives():
    mu, logvar = (random.normal(4, 3, generator=Generator(k), dtype=torch.float64) for k in range(2))

    def total(v):
        return torch.vmap(lambda m, w: (reparameterize(m, w, generator=Generator(3)) ** 2).sum(), randomness="same")(
            mu, v
        ).sum()

    def plain(v):
        noise = random.normal(3, generator=Generator(3), dtype=torch.float64)
        return ((mu + (v / 2).exp() * noise) ** 2).sum()

    torch.testing.assert_close(torch.func.grad(total)(logvar), torch.func.grad(plain)(logvar))
    got = torch.func.jacrev(torch.func.grad(total))(logvar)
    torch.testing.assert_close(got, torch.func.jacrev(torch.func.grad(plain))(logvar))
