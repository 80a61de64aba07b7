"""What all recipes share."""

from __future__ import annotations

import zlib

import torch

from fastgen.train.recipe import checksum


def test_checksum_is_of_the_numbers_in_their_order() -> None:
    images, labels = torch.arange(12, dtype=torch.uint8).view(3, 4), torch.tensor([2, 0, 1])
    expected = zlib.crc32(images.numpy().tobytes() + labels.numpy().tobytes())
    assert checksum(images, labels) == checksum(images, None, labels) == f"{expected:08x}"
    assert checksum(images.t().contiguous().t(), labels) == checksum(images, labels)  # whatever the layout
    assert len({checksum(images, labels), checksum(labels, images), checksum(images), checksum(images + 1)}) == 4
    assert checksum() == "00000000"
