"""The registered ops `torch.ops.fastgen.*`: schemas, shapes, gradients and batching rules.

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

from fastgen import reference

_RANDOM = "(Tensor seed_offset, SymInt[] size, ScalarType dtype{}) -> Tensor"
SCHEMAS = {
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


for _name in RANDOM_OPS:
    torch.library.register_fake(f"fastgen::{_name}", _fake_random, lib=_library)


@torch.library.register_fake("fastgen::reparameterize", lib=_library)
def _(mu: Tensor, logvar: Tensor, seed_offset: Tensor | None, eps: Tensor | None) -> Tensor:
    return mu.new_empty(mu.shape)


@torch.library.register_fake("fastgen::reparameterize_backward", lib=_library)
def _(grad_z: Tensor, logvar: Tensor, seed_offset: Tensor | None, eps: Tensor | None) -> Tensor:
    return logvar.new_empty(logvar.shape)


@torch.library.register_fake("fastgen::reparameterize_kl", lib=_library)
def _(mu: Tensor, logvar: Tensor, seed_offset: Tensor | None, eps: Tensor | None) -> tuple[Tensor, Tensor]:
    return mu.new_empty(mu.shape), mu.new_empty(mu.shape[:-1])


@torch.library.register_fake("fastgen::reparameterize_kl_backward", lib=_library)
def _(
    grad_z: Tensor | None,
    grad_kl: Tensor | None,
    mu: Tensor,
    logvar: Tensor,
    seed_offset: Tensor | None,
    eps: Tensor | None,
) -> tuple[Tensor, Tensor]:
    return mu.new_empty(mu.shape), mu.new_empty(mu.shape)


# ---------------------------------------------------------------------------------------------------
# Gradients. A backward is itself an op that regenerates the noise; its own gradient is plain PyTorch on
# the same noise, so every higher order follows.


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs)


def _noise(ctx: Any, like: Tensor, seed_offset: Tensor | None, eps: Tensor | None) -> Tensor:
    return reference.noise_for(like, seed_offset, eps).to(like.dtype)


def _reparameterize_backward(ctx: Any, grad_z: Tensor | None) -> tuple[Tensor | None, ...]:
    mu, logvar, seed_offset, eps = ctx.saved_tensors
    if grad_z is None:
        return None, None, None, None
    grad_logvar = grad_eps = None
    if ctx.needs_input_grad[1]:
        grad_logvar = torch.ops.fastgen.reparameterize_backward(grad_z, logvar, seed_offset, eps)
    if ctx.needs_input_grad[3]:
        grad_eps = grad_z * torch.exp(0.5 * logvar)
    return grad_z, grad_logvar, None, grad_eps


def _reparameterize_double_backward(ctx: Any, g: Tensor | None) -> tuple[Tensor | None, ...]:
    grad_z, logvar, seed_offset, eps = ctx.saved_tensors
    if g is None:
        return None, None, None, None
    noise = _noise(ctx, logvar, seed_offset, eps)
    half_sigma = 0.5 * torch.exp(0.5 * logvar)
    grad_eps = g * grad_z * half_sigma if ctx.needs_input_grad[3] else None
    return g * half_sigma * noise, 0.5 * g * grad_z * half_sigma * noise, None, grad_eps


def _reparameterize_kl_backward(ctx: Any, grad_z: Tensor | None, grad_kl: Tensor | None) -> tuple[Tensor | None, ...]:
    mu, logvar, seed_offset, eps = ctx.saved_tensors
    if grad_z is None and grad_kl is None:
        return None, None, None, None
    grad_mu, grad_logvar = torch.ops.fastgen.reparameterize_kl_backward(grad_z, grad_kl, mu, logvar, seed_offset, eps)
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
        noise = _noise(ctx, mu, seed_offset, eps)
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


for _name, _backward in {
    "reparameterize": _reparameterize_backward,
    "reparameterize_backward": _reparameterize_double_backward,
    "reparameterize_kl": _reparameterize_kl_backward,
    "reparameterize_kl_backward": _reparameterize_kl_double_backward,
}.items():
    torch.library.register_autograd(f"fastgen::{_name}", _backward, setup_context=_save, lib=_library)


# ---------------------------------------------------------------------------------------------------
# vmap. The random ops stack one stream a sample. The reparameterisation ops draw the noise that the
# samples would have seen alone (one seed: the same noise for all, as `randomness="same"` asks) and run
# once on the folded batch.




def _make_vmap_random(op: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, int]]:
    def rule(info: Any, in_dims: tuple[Any, ...], seed_offset: Tensor, *rest: Any) -> tuple[Tensor, int]:
        seeds = seed_offset.movedim(in_dims[0], 0)
        batch = seeds.shape[:-1]
        return op(seeds.reshape(-1, 2), *rest).unflatten(0, batch), 0

    return rule


for _name in RANDOM_OPS:
    torch.library.register_vmap(f"fastgen::{_name}", _make_vmap_random(getattr(torch.ops.fastgen, _name)), lib=_library)


def _make_vmap_reparameterize(op: Callable[..., Any], tensors: int, noise_like: int) -> Callable[..., Any]:
    """Rule for an op whose first `tensors` arguments carry data, followed by seed_offset and eps."""

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        size = info.batch_size
        data = []
        for value, dim in zip(args, in_dims):
            if value is None:
                data.append(None)
            elif dim is None:
                data.append(value.expand(size, *value.shape))
            else:
                data.append(value.movedim(dim, 0))
        *data, seed_offset, eps = data
        if eps is None and in_dims[tensors] is not None:
            like = data[noise_like]
            work = torch.float64 if like.dtype == torch.float64 else torch.float32
            eps = torch.ops.fastgen.normal(seed_offset, like.shape[1:], work, 0.0, 1.0)
        elif eps is None:
            eps = reference.noise_for(data[noise_like][0], args[tensors], None).expand(data[noise_like].shape)
        out = op(*data, None, eps)
        return out, (0,) * len(out) if isinstance(out, tuple) else 0

    return rule


for _name, _tensors, _like in (
    ("reparameterize", 2, 0),
    ("reparameterize_backward", 2, 1),
    ("reparameterize_kl", 2, 0),
    ("reparameterize_kl_backward", 4, 2),
):
    torch.library.register_vmap(
        f"fastgen::{_name}", _make_vmap_reparameterize(getattr(torch.ops.fastgen, _name), _tensors, _like), lib=_library
    )
