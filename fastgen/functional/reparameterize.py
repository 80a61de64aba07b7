"""Reparameterised sampling (Kingma & Welling, "Auto-Encoding Variational Bayes", 2014, section 2.4)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgen.random import AnyGenerator, seed_offset_for

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _check(name: str, value: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    if value.dtype not in _DTYPES:
        raise TypeError(
            f"{name}: expected float32, float64, bfloat16 or float16, got {str(value.dtype).removeprefix('torch.')}"
        )


def _prepare(
    mu: Tensor, logvar: Tensor, generator: AnyGenerator, eps: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Checked arguments of one dtype, shape and device, as the ops take them."""
    _check("mu", mu)
    _check("logvar", logvar)
    if mu.device != logvar.device:
        raise ValueError(f"logvar: expected a tensor on {mu.device} as mu is, got one on {logvar.device}")
    if eps is not None:
        _check("eps", eps)
        if generator is not None:
            raise ValueError("generator: expected None where eps gives the noise, got both")
        if eps.device != mu.device:
            raise ValueError(f"eps: expected a tensor on {mu.device} as mu is, got one on {eps.device}")

    dtype = mu.dtype
    if dtype != logvar.dtype:
        dtype = torch.promote_types(dtype, logvar.dtype)
    if dtype in (torch.bfloat16, torch.float16) and torch.is_autocast_enabled(mu.device.type):
        dtype = torch.float32  # as torch's autocast does for exp and for sums
    if dtype != mu.dtype:
        mu = mu.to(dtype)
    if dtype != logvar.dtype:
        logvar = logvar.to(dtype)
    if eps is not None and eps.dtype != dtype:
        eps = eps.to(dtype)

    if mu.shape != logvar.shape or (eps is not None and eps.shape != mu.shape):
        try:
            if eps is None:
                mu, logvar = torch.broadcast_tensors(mu, logvar)
            else:
                mu, logvar, eps = torch.broadcast_tensors(mu, logvar, eps)
        except RuntimeError:
            given = f"mu {tuple(mu.shape)}, logvar {tuple(logvar.shape)}"
            given += "" if eps is None else f", eps {tuple(eps.shape)}"
            raise ValueError(f"logvar, eps: expected shapes that broadcast with mu, got {given}") from None
    if eps is not None:
        return mu, logvar, None, eps
    return mu, logvar, seed_offset_for(generator, mu.numel(), mu.device), None


def reparameterize(
    mu: Tensor, logvar: Tensor, *, generator: AnyGenerator = None, eps: Tensor | None = None
) -> Tensor:
    """Sample z = mu + exp(logvar / 2) * eps with eps ~ N(0, 1), in one pass.

    The noise is drawn inside the kernel and drawn again in the backward pass: only the inputs are kept.

    Args:
        mu, logvar: means and log-variances, any shapes that broadcast, any strides; float32, float64,
            bfloat16 or float16 (computed in float32). Under autocast the half types become float32.
        generator: a `fastgen.random.Generator`, a `torch.Generator`, or None for torch's default one.
            The noise of element i (in row-major order of z) is element i of the generator's stream.
        eps: the noise itself, broadcast with mu and logvar, instead of a generator.

    Returns:
        z, contiguous, of the broadcast shape and the promoted dtype. Differentiable to any order in mu,
        logvar and eps. Non-finite inputs propagate as in the formula.

    Raises:
        TypeError, ValueError: for a dtype, shape, device or generator that does not fit, naming it.
    """
    return torch.ops.fastgen.reparameterize.default(*_prepare(mu, logvar, generator, eps))


def reparameterize_kl(
    mu: Tensor, logvar: Tensor, *, generator: AnyGenerator = None, eps: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Sample as `reparameterize` does, and give KL(N(mu, exp(logvar)) || N(0, 1)) of each row with it.

    KL = sum over the last dimension of (mu^2 + exp(logvar) - 1 - logvar) / 2 (the same paper, appendix B).

    Args:
        mu, logvar, generator, eps: as for `reparameterize`, with at least one dimension.

    Returns:
        (z, kl): z of the broadcast shape, kl of that shape without its last dimension.
    """
    mu, logvar, seed_offset, eps = _prepare(mu, logvar, generator, eps)
    if mu.dim() == 0:
        raise ValueError("mu: expected at least one dimension to sum the divergence over, got a 0-d tensor")
    return torch.ops.fastgen.reparameterize_kl.default(mu, logvar, seed_offset, eps)
