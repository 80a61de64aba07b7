"""The registered ops `torch.ops.fastgen.*` and the differentiable calls around them, one file a family."""

from fastgen._ops import generate, random, recurrent, reparameterize
from fastgen._ops.library import SCHEMAS, differentiable, register

__all__ = ["SCHEMAS", "differentiable", "generate", "random", "recurrent", "register", "reparameterize"]
