"""The registered ops `torch.ops.fastgen.*` (schemas, shapes), and the differentiable calls around them.

The schemas stand here and nowhere else, so that the package imports and compiles with or without the
binary; `csrc/torch/` adds kernels for the CPU and CUDA dispatch keys, and `reference.py` serves every
device that has none. `seed_offset` is an int64 tensor (2,) on the device of the result; the random
ops also take (S, 2) and then give S streams, stacked.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastgen import reference

_RANDOM = "(Tensor seed_offset, SymInt[] size, ScalarType dtype{}) -> Tensor"
SCHEMAS = {
    "claim": "(Tensor(a!) state, SymInt count) -> Tensor",
    "random_bits": _RANDOM.format(""),
    "uniform": _RANDOM.format(", float low, float high"),
    "normal": _RANDOM.format(", float mean, float std"),
    "exponential": _RANDOM.format(", float rate"),
    "bernoulli": _RANDOM.format(", float p"),
    "reparameterize": "(Tensor mu, Tensor logvar, Tensor? seed_offset, Tensor? eps) -> Tensor",
    "reparameterize_backward": "(Tensor grad_z, Tensor logvar, Tensor? seed_offset, Tensor? eps) -> Tensor",
    "reparameterize_kl": "(Tensor mu, Tensor logvar, Tensor? seed_offset, Tensor? eps) -> (Tensor, Tensor)",
    "reparameterize_kl_backward": "(Tensor? grad_z, Tensor? grad_kl, Tensor mu, Tensor logvar, Tensor? seed_offset, "
    "Tensor? eps) -> (Tensor, Tensor)",
}
RANDOM_OPS = ("random_bits", "uniform", "normal", "exponential", "bernoulli")

_library = torch.library.Library("fastgen", "DEF")
for _name, _schema in SCHEMAS.items():
    _library.define(_name + _schema)
    _library.impl(_name, getattr(reference, _name), "CompositeExplicitAutograd")


# ---------------------------------------------------------------------------------------------------
# Shapes


def _fake_random(seed_offset: Tensor, size: list[int], dtype: torch.dtype, *_: float) -> Tensor:
    return seed_offset.new_empty([*seed_offset.shape[:-1], *size], dtype=dtype)


def _fake_claim(state: Tensor, count: int) -> Tensor:
    return state.new_empty(state.shape)


def _fake_z(mu: Tensor, logvar: Tensor, seed_offset: Tensor | None, eps: Tensor | None) -> Tensor:
    return mu.new_empty(mu.shape)


def _fake_z_kl(mu: Tensor, logvar: Tensor, seed_offset: Tensor | None, eps: Tensor | None) -> tuple[Tensor, Tensor]:
    return mu.new_empty(mu.shape), mu.new_empty(mu.shape[:-1])


def _fake_gradients(
    grad_z: Tensor | None,
    grad_kl: Tensor | None,
    mu: Tensor,
    logvar: Tensor,
    seed_offset: Tensor | None,
    eps: Tensor | None,
) -> tuple[Tensor, Tensor]:
    return mu.new_empty(mu.shape), mu.new_empty(mu.shape)


_fakes: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(RANDOM_OPS, _fake_random),
    "claim": _fake_claim,
    "reparameterize": _fake_z,
    "reparameterize_backward": _fake_z,
    "reparameterize_kl": _fake_z_kl,
    "reparameterize_kl_backward": _fake_gradients,
}
for _name, _fake in _fakes.items():
    torch.library.register_fake(f"fastgen::{_name}", _fake, lib=_library)


# ---------------------------------------------------------------------------------------------------
# vmap of the random ops: one stream a sample, stacked.


def _stacked_streams(op: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, int]]:
    def rule(info: Any, in_dims: tuple[Any, ...], seed_offset: Tensor, *rest: Any) -> tuple[Tensor, int]:
        seeds = seed_offset.movedim(in_dims[0], 0)
        return op(seeds.reshape(-1, 2), *rest).unflatten(0, seeds.shape[:-1]), 0

    return rule


for _name in RANDOM_OPS:
    torch.library.register_vmap(f"fastgen::{_name}", _stacked_streams(getattr(torch.ops.fastgen, _name)), lib=_library)


# ---------------------------------------------------------------------------------------------------
# Gradients. The ops themselves are not differentiable; `differentiable` puts an autograd.Function around
# one. (`torch.library.register_autograd` would do, at 4 us more for each call without a gradient and 8 us
# with: as much as the whole of a small op.)


def differentiable(
    op: Callable[..., Any],
    plain: Callable[..., Any],
    gradient: Callable[..., tuple[Tensor | None, ...]],
    keep: tuple[int, ...],
) -> Callable[..., Any]:
    """`op` with a gradient.

    Args:
        op: takes tensors (or None) only.
        plain: the same in plain PyTorch. Under torch.func and in forward-mode differentiation it runs in place
            of the op, so that vmap, jvp, jacfwd and hessian nest as they like; the noise is the op's.
        gradient: (ctx, *grads) -> gradients of the inputs; undefined gradients come as None.
        keep: which inputs `gradient` finds in ctx.saved_tensors.
    """

    class Op(torch.autograd.Function):
        backward = staticmethod(gradient)

        @staticmethod
        def forward(ctx: Any, *args: Tensor | None) -> Any:
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(*[args[i] for i in keep])
            return op(*args)

    recording = torch.is_grad_enabled

    def call(*args: Tensor | None) -> Any:
        if _transforming() or forward_ad._current_level >= 0:
            return plain(*args)
        if recording():
            for value in args:
                if value is not None and value.requires_grad:
                    return Op.apply(*args)
        return op(*args)

    return call


# Private to torch; without it every call is taken for a transformed one, which is right, only slower.
_transforming = getattr(torch._C, "_are_functorch_transforms_active", lambda: True)


# A backward is itself an op that regenerates the noise; its own gradient is plain PyTorch on the same
# noise, so every higher order follows.


def _noise(like: Tensor, seed_offset: Tensor | None, eps: Tensor | None) -> Tensor:
    return reference.noise_for(like, seed_offset, eps).to(like.dtype)


def _reparameterize_backward(ctx: Any, grad_z: Tensor | None) -> tuple[Tensor | None, ...]:
    logvar, seed_offset, eps = ctx.saved_tensors
    if grad_z is None:
        return None, None, None, None
    grad_logvar = grad_eps = None
    if ctx.needs_input_grad[1]:
        grad_logvar = reparameterize_backward(grad_z, logvar, seed_offset, eps)
    if ctx.needs_input_grad[3]:
        grad_eps = grad_z * torch.exp(0.5 * logvar)
    return grad_z, grad_logvar, None, grad_eps


def _reparameterize_double_backward(ctx: Any, g: Tensor | None) -> tuple[Tensor | None, ...]:
    grad_z, logvar, seed_offset, eps = ctx.saved_tensors
    if g is None:
        return None, None, None, None
    noise = _noise(logvar, seed_offset, eps)
    half_sigma = 0.5 * torch.exp(0.5 * logvar)
    grad_eps = g * grad_z * half_sigma if ctx.needs_input_grad[3] else None
    return g * half_sigma * noise, 0.5 * g * grad_z * half_sigma * noise, None, grad_eps


def _reparameterize_kl_backward(ctx: Any, grad_z: Tensor | None, grad_kl: Tensor | None) -> tuple[Tensor | None, ...]:
    mu, logvar, seed_offset, eps = ctx.saved_tensors
    if grad_z is None and grad_kl is None:
        return None, None, None, None
    grad_mu, grad_logvar = reparameterize_kl_backward(grad_z, grad_kl, mu, logvar, seed_offset, eps)
    grad_eps = None
    if grad_z is not None and ctx.needs_input_grad[3]:
        grad_eps = grad_z * torch.exp(0.5 * logvar)
    return grad_mu, grad_logvar, None, grad_eps


def _reparameterize_kl_double_backward(ctx: Any, a: Tensor | None, b: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients of a . grad_mu + b . grad_logvar with respect to (gz, gk, mu, logvar, eps)."""
    grad_z, grad_kl, mu, logvar, seed_offset, eps = ctx.saved_tensors
    a = torch.zeros_like(mu) if a is None else a
    b = torch.zeros_like(mu) if b is None else b
    to_grad_z = to_grad_kl = to_mu = to_eps = None
    to_logvar = torch.zeros_like(logvar)
    if grad_z is not None:
        half_sigma = 0.5 * torch.exp(0.5 * logvar)
        noise = _noise(mu, seed_offset, eps)
        to_grad_z = a + b * half_sigma * noise
        to_logvar = to_logvar + 0.5 * b * grad_z * half_sigma * noise
        if ctx.needs_input_grad[5]:
            to_eps = b * grad_z * half_sigma
    if grad_kl is not None:
        gk = grad_kl.unsqueeze(-1)
        to_grad_kl = (a * mu + 0.5 * b * torch.expm1(logvar)).sum(-1)
        to_mu = a * gk
        to_logvar = to_logvar + 0.5 * b * gk * torch.exp(logvar)
    return to_grad_z, to_grad_kl, to_mu, to_logvar, None, to_eps


reparameterize = differentiable(
    torch.ops.fastgen.reparameterize.default, reference.reparameterize, _reparameterize_backward, keep=(1, 2, 3)
)
reparameterize_backward = differentiable(
    torch.ops.fastgen.reparameterize_backward.default,
    reference.reparameterize_backward,
    _reparameterize_double_backward,
    keep=(0, 1, 2, 3),
)
reparameterize_kl = differentiable(
    torch.ops.fastgen.reparameterize_kl.default,
    reference.reparameterize_kl,
    _reparameterize_kl_backward,
    keep=(0, 1, 2, 3),
)
reparameterize_kl_backward = differentiable(
    torch.ops.fastgen.reparameterize_kl_backward.default,
    reference.reparameterize_kl_backward,
    _reparameterize_kl_double_backward,
    keep=(0, 1, 2, 3, 4, 5),
)
