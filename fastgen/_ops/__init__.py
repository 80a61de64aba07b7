"""The registered ops `torch.ops.fastgen.*` and the differentiable calls around them, one file a family."""

from fastgen._ops import activation, attention, generate, linear, random, recurrent, reparameterize
from fastgen._ops.library import SCHEMAS, differentiable, register

__all__ = [
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
