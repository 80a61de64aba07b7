"""Reparameterised sampling. Exactly one of `seed_offset` and `eps` is given. Results are contiguous."""

from __future__ import annotations

import torch
from torch import Tensor


def noise_for(like: Tensor, seed_offset: Tensor | None, eps: Tensor | None) -> Tensor:
    """The standard normals of a call, in the dtype the algebra runs in: fp64, or fp32 for the rest."""
    work = torch.float64 if like.dtype == torch.float64 else torch.float32
    if eps is not None:
        return eps.to(work)
    return torch.ops.fastgen.normal(seed_offset, like.shape, work, 0.0, 1.0)


def reparameterize(mu: Tensor, logvar: Tensor, seed_offset: Tensor | None, eps: Tensor | None) -> Tensor:
    noise = noise_for(mu, seed_offset, eps)
    sigma = torch.exp(0.5 * logvar.to(noise.dtype))
    return (mu.to(noise.dtype) + sigma * noise).to(mu.dtype).contiguous()


def kl_divergence(mu: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mu, exp(logvar)) || N(0, 1)) summed over the last dimension (Kingma & Welling, 2014, app. B)."""
    work = torch.float64 if mu.dtype == torch.float64 else torch.float32
    mu_w, logvar_w = mu.to(work), logvar.to(work)
    return (0.5 * (mu_w * mu_w + (torch.expm1(logvar_w) - logvar_w)).sum(-1)).to(mu.dtype).contiguous()


def reparameterize_kl(
    mu: Tensor, logvar: Tensor, seed_offset: Tensor | None, eps: Tensor | None
) -> tuple[Tensor, Tensor]:
    return reparameterize(mu, logvar, seed_offset, eps), kl_divergence(mu, logvar)


def reparameterize_backward(grad_z: Tensor, logvar: Tensor, seed_offset: Tensor | None, eps: Tensor | None) -> Tensor:
    """dL/dlogvar of `reparameterize`; dL/dmu is grad_z itself."""
    noise = noise_for(logvar, seed_offset, eps)
    sigma = torch.exp(0.5 * logvar.to(noise.dtype))
    return (0.5 * (grad_z.to(noise.dtype) * (sigma * noise))).to(logvar.dtype).contiguous()


def reparameterize_kl_backward(
    grad_z: Tensor | None,
    grad_kl: Tensor | None,
    mu: Tensor,
    logvar: Tensor,
    seed_offset: Tensor | None,
    eps: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(dL/dmu, dL/dlogvar) = (gz + gk mu, (gz sigma eps + gk (sigma^2 - 1)) / 2)."""
    work = torch.float64 if mu.dtype == torch.float64 else torch.float32
    mu_w, logvar_w = mu.to(work), logvar.to(work)
    grad_mu, grad_logvar = torch.zeros_like(mu_w), torch.zeros_like(mu_w)
    if grad_z is not None:
        noise = noise_for(mu, seed_offset, eps)
        gz = grad_z.to(work)
        grad_mu = grad_mu + gz
        grad_logvar = grad_logvar + 0.5 * (gz * (torch.exp(0.5 * logvar_w) * noise))
    if grad_kl is not None:
        gk = grad_kl.to(work).unsqueeze(-1)
        grad_mu = grad_mu + gk * mu_w
        grad_logvar = grad_logvar + 0.5 * (gk * torch.expm1(logvar_w))
    return grad_mu.to(mu.dtype).contiguous(), grad_logvar.to(mu.dtype).contiguous()
