"""The registered ops `torch.ops.fastgen.*` and the differentiable calls around them, one file a family."""

from fastgen._ops import activation, attention, generate, linear, random, recurrent, reparameterize
from fastgen._ops.library import SCHEMAS, differentiable, register

INSTEAD_ON_CPU = {"recurrent_layers": "recurrent"}
"""Ops that are for CUDA alone, and those that are called in their place elsewhere."""

__all__ = [
    "INSTEAD_ON_CPU",
    "SCHEMAS",
    "activation",
    "attention",
    "differentiable",
    "generate",
    "linear",
    "random",
    "recurrent",
    "register",
    "reparameterize",
]
