"""fastgen: generative models in PyTorch on hand-built CPU and CUDA kernels."""

from fastgen import functional, random
from fastgen._accelerate import accelerate
from fastgen._load import build_info
from fastgen._version import __version__

__all__ = ["__version__", "accelerate", "build_info", "functional", "random"]
