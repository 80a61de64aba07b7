"""Windows over parallel streams of one long sequence, for truncated back-propagation through time.

A sequence of N steps is cut into B contiguous streams of S = (N - 1) // B steps. Window w of the batch is
the steps [w T, (w + 1) T) of every stream, so the state that a model has at the end of one window is the
one to start the next with (Williams & Peng, "An efficient gradient-based algorithm for on-line training of
recurrent network trajectories", 1990). The targets are the inputs one step on; the last step of a stream
has the first of the next stream as its target.

    stream 0:  | window 0 | window 1 | window 2 |
    stream 1:  | window 0 | window 1 | window 2 |
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastgen import _validate

__all__ = ["Streams"]


@dataclass(frozen=True, eq=False)
class Streams:
    """The windows, (inputs, targets) each, a function of its index alone: `streams[w]` is a place to resume from.

    Attributes:
        sequence: (N, ...), the whole sequence. Integers come out as int64, whatever they are kept in.
        batch_size: B, streams in parallel.
        seq_len: T, steps of a window. The last window of a pass is shorter if T does not divide S.
        first, count: the streams that come out, [first, first + count) of the B; see `shard`.

    Raises:
        ValueError: for a sequence with less than one step and its target for each stream.
    """

    sequence: Tensor
    batch_size: int
    seq_len: int
    first: int = 0
    count: int = -1

    def __post_init__(self) -> None:
        _validate.integer("batch_size", self.batch_size, 1)
        _validate.integer("seq_len", self.seq_len, 1)
        if self.count == -1:
            object.__setattr__(self, "count", self.batch_size)
        if self.stream_len < 1:
            raise ValueError(
                f"batch_size: expected at most {max(len(self.sequence) - 1, 0):,} for a sequence of "
                f"{len(self.sequence):,} steps (each stream needs a step and its target), got {self.batch_size:,}"
            )

    @property
    def stream_len(self) -> int:
        """S, the steps of a stream."""
        return (len(self.sequence) - 1) // self.batch_size

    @property
    def num_steps(self) -> int:
        """Targets of one pass over the streams that come out."""
        return self.stream_len * self.count

    def shard(self, index: int, num_shards: int) -> Streams:
        """The part of process `index` of `num_shards`: its share of the streams, the same windows.

        Raises:
            ValueError: if the streams cannot be shared out evenly.
        """
        if self.count % num_shards:
            raise ValueError(f"batch_size: expected a multiple of the {num_shards} processes, got {self.count}")
        count = self.count // num_shards
        return replace(self, first=self.first + index * count, count=count)

    def __len__(self) -> int:
        """Windows of one pass."""
        return -(-self.stream_len // self.seq_len)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Window `index`: inputs and targets, (count, T, ...) each; int64 for tokens."""
        index = range(len(self))[index]
        start = index * self.seq_len
        length = min(self.seq_len, self.stream_len - start)
        firsts = (self.first + torch.arange(self.count)) * self.stream_len + start
        steps = self.sequence[firsts.unsqueeze(1) + torch.arange(length + 1)]
        if not steps.is_floating_point():
            steps = steps.long()
        return steps[:, :-1], steps[:, 1:]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return (self[index] for index in range(len(self)))
