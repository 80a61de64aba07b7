"""Reparameterised sampling (Kingma & Welling, "Auto-Encoding Variational Bayes", 2014, section 2.4)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgen import _validate
from fastgen._dtypes import dtype_name
from fastgen._ops import reparameterize as ops
from fastgen.random import AnyGenerator, fresh_seed_offset, seed_offset_for

_FULL = (torch.float32, torch.float64)
_HALVES = (torch.bfloat16, torch.float16)
_DTYPES = _FULL + _HALVES


def _check(name: str, value: Tensor, mu: Tensor) -> None:
    if _validate.tensor(name, value).dtype not in _DTYPES:
        raise TypeError(f"{name}: expected float32, float64, bfloat16 or float16, got {dtype_name(value.dtype)}")
    if value.device != mu.device:
        raise ValueError(f"{name}: expected a tensor on {mu.device} as mu is, got one on {value.device}")


def _fit(mu: Tensor, logvar: Tensor, eps: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The operands, checked and brought to one dtype and shape."""
    _check("mu", mu, mu)
    _check("logvar", logvar, mu)
    if eps is not None:
        _check("eps", eps, mu)

    dtype = torch.promote_types(mu.dtype, logvar.dtype)
    if dtype in _HALVES and torch.is_autocast_enabled(mu.device.type):
        dtype = torch.float32  # as torch's autocast does for exp and for sums
    mu, logvar = mu.to(dtype), logvar.to(dtype)
    eps = None if eps is None else eps.to(dtype)

    try:
        if eps is None:
            mu, logvar = torch.broadcast_tensors(mu, logvar)
        else:
            mu, logvar, eps = torch.broadcast_tensors(mu, logvar, eps)
    except RuntimeError:
        given = f"mu {tuple(mu.shape)}, logvar {tuple(logvar.shape)}"
        given += "" if eps is None else f", eps {tuple(eps.shape)}"
        raise ValueError(f"logvar, eps: expected shapes that broadcast with mu, got {given}") from None
    return mu, logvar, eps


def _prepare(
    mu: Tensor, logvar: Tensor, generator: AnyGenerator, eps: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The arguments as the ops take them: mu, logvar, seed_offset, eps."""
    # The usual call, two alike tensors of full precision, has nothing to convert. It is spelt out because at
    # a VAE's sizes Python is most of the time.
    try:
        fits = (
            eps is None
            and mu.dtype is logvar.dtype
            and mu.dtype in _FULL
            and mu.shape == logvar.shape
            and mu.device == logvar.device
        )
    except AttributeError:
        fits = False
    if not fits:
        mu, logvar, eps = _fit(mu, logvar, eps)
        if eps is not None:
            if generator is not None:
                raise ValueError("generator: expected None where eps gives the noise, got both")
            return mu, logvar, None, eps
    if generator is None:
        return mu, logvar, fresh_seed_offset(mu.device), None
    return mu, logvar, seed_offset_for(generator, mu.numel(), mu.device), None


def reparameterize(mu: Tensor, logvar: Tensor, *, generator: AnyGenerator = None, eps: Tensor | None = None) -> Tensor:
    """Sample z = mu + exp(logvar / 2) * eps with eps ~ N(0, 1), in one pass.

    The noise is drawn inside the kernel and drawn again in the backward pass: nothing of the noise is kept.

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
    return ops.reparameterize(*_prepare(mu, logvar, generator, eps))


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
    return ops.reparameterize_kl(mu, logvar, seed_offset, eps)
