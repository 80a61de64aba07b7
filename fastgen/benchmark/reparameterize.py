"""Cases of `fastgen.functional.reparameterize` and `reparameterize_kl`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fastgen import functional, reference
from fastgen import random as fastgen_random
from fastgen.benchmark.case import (
    COMPILED,
    EAGER,
    OURS,
    StreamCase,
    Traffic,
    compiled,
    require_close,
    require_moments,
)

__all__ = ["ReparameterizeCase", "cases", "eager_reparameterize", "eager_reparameterize_kl"]

_SEED = 20_141_220
_PREFIX = 65_536  # elements at each end that are compared with the fp64 formula on the very noise


def eager_reparameterize(mu: Tensor, logvar: Tensor) -> Tensor:
    """As it stands in most VAEs written in PyTorch."""
    return mu + torch.exp(0.5 * logvar) * torch.randn_like(mu)


def eager_reparameterize_kl(mu: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
    """With the divergence of each row, as it stands there too."""
    z = mu + torch.exp(0.5 * logvar) * torch.randn_like(mu)
    kl = -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp(), dim=-1)
    return z, kl


@dataclass(frozen=True, kw_only=True)
class ReparameterizeCase(StreamCase):
    """Sample z; `kl` adds the divergence of each row.

    Attributes:
        kl: whether the divergence is asked for.
        direction: `inference` (no gradient asked for), `fwd` (the graph is recorded) or `fwd+bwd` (and
            walked back, from a dense gradient of z as a decoder gives it).
    """

    kl: bool = False
    direction: Literal["inference", "fwd", "fwd+bwd"] = "fwd"

    @property
    def workload(self) -> str:
        return f"reparameterize{'_kl' if self.kl else ''}/{self.direction}"

    @property
    def traffic(self) -> Traffic:
        # Forward: mu, logvar -> z. Backward: grad_z, mu, logvar -> grad_mu, grad_logvar; without the
        # divergence grad_mu is grad_z itself and mu is not needed. A kl of one number a row is not counted.
        if self.direction != "fwd+bwd":
            return Traffic(reads=2, writes=1)
        return Traffic(reads=5, writes=3) if self.kl else Traffic(reads=4, writes=2)

    def inputs(self) -> tuple[Tensor, ...]:
        """mu, logvar, and for the backward pass the gradients of z and kl."""
        normal = self.normals(_SEED)
        gradient = self.direction != "inference"
        mu, logvar = (normal(*self.shape).requires_grad_(gradient) for _ in range(2))
        if self.direction != "fwd+bwd":
            return mu, logvar
        grad_z = normal(*self.shape)
        return (mu, logvar, grad_z, normal(*self.shape[:-1])) if self.kl else (mu, logvar, grad_z)

    def rivals(self) -> dict[str, Callable[..., Any]]:
        ours = functional.reparameterize_kl if self.kl else functional.reparameterize
        eager = eager_reparameterize_kl if self.kl else eager_reparameterize
        forward: dict[str, Callable[..., Any]] = {OURS: ours, EAGER: eager, COMPILED: compiled(eager)}
        if self.direction == "fwd+bwd":
            return {name: _with_backward(function) for name, function in forward.items()}
        return forward

    def check(self, rival: str, function: Callable[..., Any], inputs: tuple[Tensor, ...]) -> None:
        """The noise that z implies is standard normal and all else follows from it in fp64; ours is the stream's."""
        what = f"{self.name}, {rival}"
        with torch.random.fork_rng(devices=self.random_devices):
            torch.manual_seed(_SEED)
            state = fastgen_random.seed_offset_for(None, self.elements, torch.device(self.device)).cpu()
            torch.manual_seed(_SEED)
            results = function(*inputs)
        results = results if isinstance(results, tuple) else (results,)
        names = [
            "z",
            *(["kl"] if self.kl else []),
            *(["grad_mu", "grad_logvar"] if self.direction == "fwd+bwd" else []),
        ]
        got: dict[str, Tensor] = dict(zip(names, results, strict=True))

        mu, logvar = (x.detach().double() for x in inputs[:2])
        sigma, z = torch.exp(0.5 * logvar), got["z"].detach().double()
        noise = ((z - mu) / sigma).to(self.dtype)
        require_moments(f"{what}, noise", noise, 0.0, 1.0, 3.0)

        expected = {}
        if self.kl:
            expected["kl"] = 0.5 * (mu * mu + torch.expm1(logvar) - logvar).sum(-1)
        if self.direction == "fwd+bwd":
            grad_z = inputs[2].double()
            grad_kl = inputs[3].double().unsqueeze(-1) if self.kl else torch.zeros(())
            expected["grad_mu"] = grad_z + grad_kl * mu
            expected["grad_logvar"] = 0.5 * (grad_z * (z - mu) + grad_kl * torch.expm1(logvar))
        eps = torch.finfo(self.dtype).eps
        for name, value in expected.items():
            require_close(f"{what}, {name}", got[name], value, atol=16 * eps * float(value.abs().max()))

        if rival == OURS:
            work = torch.float64 if self.dtype == torch.float64 else torch.float32
            count = min(_PREFIX, self.elements)
            for first in (0, self.elements - count):
                part = slice(first, first + count)
                drawn = reference.normal(state + torch.tensor([0, first]), [count], work, 0.0, 1.0)
                drawn = drawn.double().to(self.device)
                exact = mu.flatten()[part] + sigma.flatten()[part] * drawn
                # Computed in `work`, rounded once.
                atol = 8 * torch.finfo(work).eps * float(exact.abs().max())
                require_close(f"{what}, z from element {first}", z.flatten()[part], exact, rtol=eps, atol=atol)


def _with_backward(forward: Callable[..., Any]) -> Callable[..., tuple[Tensor, ...]]:
    def call(mu: Tensor, logvar: Tensor, *gradients: Tensor) -> tuple[Tensor, ...]:
        outputs = forward(mu, logvar)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return *outputs, *torch.autograd.grad(outputs, (mu, logvar), gradients)

    return call


def cases(*, full: bool) -> list[ReparameterizeCase]:
    """The cases of `fastgen bench`: a few that tell most, or all of them."""
    large, wide, rows, small = (1 << 22,), (65_536, 64), (32_768, 128), (64, 20)
    chosen = [
        ReparameterizeCase(shape=large),
        ReparameterizeCase(shape=large, dtype=torch.bfloat16),
        ReparameterizeCase(shape=large, direction="inference"),
        ReparameterizeCase(shape=small),
        ReparameterizeCase(shape=wide, kl=True, direction="fwd+bwd"),
        ReparameterizeCase(shape=wide, kl=True, direction="fwd+bwd", threads=1),
        ReparameterizeCase(shape=small, kl=True, direction="fwd+bwd"),
    ]
    if full:
        chosen += [
            ReparameterizeCase(shape=large, threads=1),
            ReparameterizeCase(shape=large, direction="inference", threads=1),
            ReparameterizeCase(shape=large, dtype=torch.bfloat16, direction="inference"),
            ReparameterizeCase(shape=small, direction="inference"),
            ReparameterizeCase(shape=wide, kl=True, direction="inference"),
            ReparameterizeCase(shape=small, kl=True, direction="inference"),
            ReparameterizeCase(shape=rows, kl=True, direction="fwd+bwd"),
            ReparameterizeCase(shape=rows, kl=True, direction="fwd+bwd", threads=1),
        ]
    return chosen


def cuda_cases(*, full: bool) -> list[ReparameterizeCase]:
    """The cases of `fastgen bench --device cuda`: many elements, long and short rows, and a model's few."""
    large, rows, small = (1 << 26,), (1 << 19, 128), (64, 20)
    chosen = [
        ReparameterizeCase(shape=large),
        ReparameterizeCase(shape=large, dtype=torch.bfloat16),
        ReparameterizeCase(shape=rows, kl=True, direction="fwd+bwd"),
        ReparameterizeCase(shape=small, kl=True, direction="fwd+bwd"),
    ]
    if full:
        chosen += [
            ReparameterizeCase(shape=large, direction="fwd+bwd"),
            ReparameterizeCase(shape=rows, kl=True, direction="inference"),
            ReparameterizeCase(shape=(64, 1 << 20), kl=True, direction="inference"),
            ReparameterizeCase(shape=rows, kl=True, direction="fwd+bwd", dtype=torch.bfloat16),
            ReparameterizeCase(shape=small, direction="inference"),
        ]
    return chosen
