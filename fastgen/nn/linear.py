"""The linear layer."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgen import functional
from fastgen.nn import _script

__all__ = ["Linear"]


class Linear(torch.nn.Linear):
    """`torch.nn.Linear` on `fastgen.functional.linear`: PyTorch's own product where that is as fast."""

    __prepare_scriptable__ = _script.refuse

    def forward(self, input: Tensor) -> Tensor:
        return functional.linear(input, self.weight, self.bias)
