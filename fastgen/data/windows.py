"""Windows of a sequence of tokens, each read by itself: what a Transformer is trained on.

>>> windows = Windows(tokens, seq_len=256)
>>> inputs, targets, _ = windows.batch(torch.tensor([0, 256]))  # int64, (2, 256) each
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from fastgen import _validate

__all__ = ["Windows"]


@dataclass(frozen=True, eq=False)
class Windows:
    """Windows of a sequence, and the tokens that come next in each.

    Args:
        tokens: (N,) ints, N at least 2.
        seq_len: T, tokens of a window.
        starts: where documents begin, ascending from 0, if they shall not see each other; None: they do. Then a
            batch is packed into one row, and the first token of a document is no target: nothing before it tells.

    Raises:
        ValueError: for a sequence of less than two tokens, or a `seq_len` under 1.
    """

    tokens: Tensor
    seq_len: int
    starts: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        _validate.integer("seq_len", self.seq_len, 1)
        if len(self.tokens) < 2:
            raise ValueError(f"tokens: expected at least 2, the second to be predicted, got {len(self.tokens)}")

    def __len__(self) -> int:
        """Windows of one pass from the beginning, the last one perhaps shorter."""
        return -(-(len(self.tokens) - 1) // self.seq_len)

    @functools.cached_property
    def _is_start(self) -> Tensor:
        is_start = torch.zeros(len(self.tokens), dtype=torch.bool)
        is_start[list(self.starts or ())] = True
        return is_start

    def batch(self, firsts: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Inputs and targets of the windows that begin at tokens `firsts` (b,), and where documents begin in them.

        Windows that would reach beyond the end of the sequence are shorter, all as the last of them.

        Returns:
            (b, T), (b, T) and None; or with `starts` (1, b T), (1, b T), with targets of -100 where they do not
            count, and cu_seqlens (documents + 1,). All int64.
        """
        length = min(self.seq_len, len(self.tokens) - 1 - int(firsts.max()))
        places = firsts.unsqueeze(1) + torch.arange(length)
        inputs, targets = self.tokens[places].long(), self.tokens[places + 1].long()
        if self.starts is None:
            return inputs, targets, None
        targets = targets.masked_fill(self._is_start[places + 1], -100)
        begins = self._is_start[places]
        begins[:, 0] = True
        cu_seqlens = torch.cat((begins.flatten().nonzero().squeeze(1), torch.tensor([begins.numel()])))
        return inputs.view(1, -1), targets.view(1, -1), cu_seqlens
