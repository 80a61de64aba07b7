"""Functions of fastgen; the same kernels stand behind `fastgen.nn` and `fastgen.models`."""

from fastgen.functional.reparameterize import reparameterize, reparameterize_kl

__all__ = ["reparameterize", "reparameterize_kl"]
