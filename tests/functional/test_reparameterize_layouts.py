"""Shapes, strides and broadcasting of the reparameterisation: the result depends on the values alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import FLOATS, assert_same_bits, call
from torch import Tensor

from fastgen import random
from fastgen.functional import reparameterize, reparameterize_kl
from fastgen.random import Generator

GUARD = 57.0


def in_guarded_memory(data: st.DataObject, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`values` as a view with drawn strides, order of dimensions and offset, inside a buffer of guards.

    Returns (the view, the buffer, a copy of the buffer as it was).
    """
    order = data.draw(st.permutations(range(values.dim())), label="order of dimensions in memory")
    steps = data.draw(st.lists(st.integers(1, 3), min_size=values.dim(), max_size=values.dim()), label="steps")
    offset = data.draw(st.integers(0, 9), label="storage offset")
    strides, extent = [0] * values.dim(), 1
    for d in order:
        strides[d] = extent * steps[d]
        extent = strides[d] * max(1, values.shape[d])
    buffer = torch.full((offset + extent + 20,), GUARD, dtype=values.dtype)
    view = buffer.as_strided(values.shape, strides, offset)
    view.copy_(values)
    return view, buffer, buffer.clone()


def shapes(most: int = 6) -> st.SearchStrategy[list[int]]:
    return st.lists(st.sampled_from([0, 1, 1, 2, 3, 5, 9, 17]), max_size=most).filter(
        lambda s: torch.Size(s).numel() <= 3000
    )


@settings(max_examples=300)
@given(data=st.data(), shape=shapes(), dtype=st.sampled_from(FLOATS))
def test_strided_operands(data, shape, dtype):
    mu, logvar, eps, grad_z = (random.normal(*shape, generator=Generator(k), dtype=dtype) for k in range(4))
    views = [in_guarded_memory(data, x) for x in (mu, logvar, eps, grad_z)]
    (mu_v, logvar_v, eps_v, grad_z_v) = (v[0] for v in views)
    state = Generator(9, 5).get_state()
    checks = []
    for seed_offset, noise, noise_v in ((state, None, None), (None, eps, eps_v)):
        checks += [
            ("reparameterize", (mu, logvar, seed_offset, noise), (mu_v, logvar_v, seed_offset, noise_v)),
            (
                "reparameterize_backward",
                (grad_z, logvar, seed_offset, noise),
                (grad_z_v, logvar_v, seed_offset, noise_v),
            ),
        ]
        if shape:
            grad_kl = random.normal(*shape[:-1], generator=Generator(4), dtype=dtype)
            view, *guards = in_guarded_memory(data, grad_kl)
            views.append((view, *guards))
            checks += [
                ("reparameterize_kl", (mu, logvar, seed_offset, noise), (mu_v, logvar_v, seed_offset, noise_v)),
                (
                    "reparameterize_kl_backward",
                    (grad_z, grad_kl, mu, logvar, seed_offset, noise),
                    (grad_z_v, view, mu_v, logvar_v, seed_offset, noise_v),
                ),
            ]
    for name, plain, strided in checks:
        want, got = getattr(torch.ops.fastgen, name)(*plain), getattr(torch.ops.fastgen, name)(*strided)
        for x, y in zip(got, want, strict=True) if isinstance(want, tuple) else [(got, want)]:
            assert x.is_contiguous()
            assert_same_bits(x, y)
    for _, buffer, before in views:
        assert_same_bits(buffer, before)


@settings(max_examples=200)
@given(data=st.data(), shape=shapes(5), dtype=st.sampled_from(FLOATS))
def test_broadcasting(data, shape, dtype):
    """Any dimension of any operand may be missing or 1: as if each had been expanded and copied."""

    def smaller(name: str, seed: int) -> Tensor:
        ones = data.draw(st.lists(st.booleans(), min_size=len(shape), max_size=len(shape)), label=name)
        left_out = data.draw(st.integers(0, len(shape)), label=f"{name}: leading dimensions left out")
        extents = [1 if one else n for one, n in zip(ones, shape, strict=True)][left_out:]
        return random.normal(*extents, generator=Generator(seed), dtype=dtype)

    mu, logvar, eps = smaller("mu", 0), smaller("logvar", 1), smaller("eps", 2)
    out = torch.broadcast_shapes(mu.shape, logvar.shape, eps.shape)
    copies = [x.expand(out).contiguous() for x in (mu, logvar, eps)]
    assert_same_bits(reparameterize(mu, logvar, eps=eps), reparameterize(*copies[:2], eps=copies[2]))
    if out:
        for x, y in zip(
            reparameterize_kl(mu, logvar, eps=eps), reparameterize_kl(*copies[:2], eps=copies[2]), strict=True
        ):
            assert_same_bits(x, y)
    out = torch.broadcast_shapes(mu.shape, logvar.shape)
    drawn = reparameterize(mu, logvar, generator=Generator(3))
    assert drawn.shape == out
    copies = [x.expand(out).contiguous() for x in (mu, logvar)]
    assert_same_bits(drawn, reparameterize(*copies, generator=Generator(3)))


@pytest.mark.parametrize("dims", [9, 12, 20, 40])
def test_more_irregular_dimensions_than_the_kernels_take(path, dims):
    """No two dimensions merge: the operands are copied, once."""
    shape = [2] * 11 if dims == 12 else [2 if d % 4 == 0 or dims == 9 else 1 for d in range(dims)]
    strides = [3**k % 8191 for k in range(len(shape))]
    storage = random.normal(sum(strides) + 1, generator=Generator(1))
    mu, logvar = storage.as_strided(shape, strides), storage.as_strided(shape, strides[::-1])
    grad_kl = storage.as_strided(shape[:-1], strides[1:])
    state = Generator(2).get_state()
    for name, args in (
        ("reparameterize", (mu, logvar)),
        ("reparameterize_kl", (mu, logvar)),
        ("reparameterize_kl_backward", (mu, grad_kl, mu, logvar)),
        ("reparameterize_backward", (mu, logvar)),
    ):
        got = call(name, path, *args, state, None)
        want = call(name, path, *(x.contiguous() for x in args), state, None)
        for x, y in zip(got, want, strict=True) if isinstance(want, tuple) else [(got, want)]:
            assert x.is_contiguous()
            assert_same_bits(x, y)


def test_empty_and_scalar(path):
    state = Generator(1).get_state()
    for shape in ((0,), (3, 0), (0, 3), (2, 0, 5)):
        x = torch.ones(shape)
        assert call("reparameterize", path, x, x, state, None).shape == shape
        z, kl = call("reparameterize_kl", path, x, x, state, None)
        assert z.shape == shape
        assert_same_bits(kl, torch.zeros(shape[:-1]))
        grads = call("reparameterize_kl_backward", path, x, kl, x, x, state, None)
        assert [g.shape for g in grads] == [shape, shape]
    one = torch.tensor(1.5)
    z = call("reparameterize", path, one, torch.tensor(0.0), None, torch.tensor(2.0))
    assert z.shape == ()
    assert float(z) == 3.5


def test_views_with_a_negative_or_conjugate_bit():
    x = torch.complex(torch.randn(5, 3), torch.randn(5, 3))
    imaginary = x.conj().imag
    assert imaginary.is_neg()
    eps = torch.ones(5, 3)
    assert_same_bits(reparameterize(imaginary, -imaginary, eps=eps), reparameterize(-x.imag, x.imag.clone(), eps=eps))


def test_inputs_are_left_alone():
    mu, logvar, eps = (torch.randn(33, 7) for _ in range(3))
    copies = [x.clone() for x in (mu, logvar, eps)]
    reparameterize_kl(mu, logvar, eps=eps)
    for x, y in zip((mu, logvar, eps), copies, strict=True):
        assert_same_bits(x, y)
