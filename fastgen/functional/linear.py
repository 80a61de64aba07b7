"""Linear layers."""

from __future__ import annotations

from torch import Tensor

from fastgen._ops import linear as ops

__all__ = ["linear"]


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`: input @ weight.T + bias, faster where PyTorch leaves half of the CPU unused.

    On x86 processors with AVX-512 that are not Intel's, products that are large enough (from 2^18 multiply-adds on,
    where gradients are recorded from 2^20) run on fastgen's kernels: float32 and float64, and without gradients also
    float16 and up to 8 rows of bfloat16. `fastgen.build_info()` tells. Anywhere else this is PyTorch's function.

    Args:
        input: (..., K).
        weight: (N, K).
        bias: (N,) or None.

    Returns:
        (..., N). The kernels' results have the same bits for any number of threads, forward and backward.

    Raises:
        RuntimeError: PyTorch's, for shapes or dtypes that do not fit.
    """
    return ops.linear(input, weight, bias)
