"""Reparameterised sampling: the ops and their gradients of every order."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastgen import reference
from fastgen._ops.library import differentiable, register

SCHEMAS = {
    "reparameterize": "(Tensor mu, Tensor logvar, Tensor? seed_offset, Tensor? eps) -> Tensor",
    "reparameterize_backward": "(Tensor grad_z, Tensor logvar, Tensor? seed_offset, Tensor? eps) -> Tensor",
    "reparameterize_kl": "(Tensor mu, Tensor logvar, Tensor? seed_offset, Tensor? eps) -> (Tensor, Tensor)",
    "reparameterize_kl_backward": "(Tensor? grad_z, Tensor? grad_kl, Tensor mu, Tensor logvar, Tensor? seed_offset, "
    "Tensor? eps) -> (Tensor, Tensor)",
}


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


register(
    SCHEMAS,
    reference,
    {
        "reparameterize": _fake_z,
        "reparameterize_backward": _fake_z,
        "reparameterize_kl": _fake_z_kl,
        "reparameterize_kl_backward": _fake_gradients,
    },
)


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
