"""Pictures of batches of images."""

from __future__ import annotations

import math
import os

import torch
from torch import Tensor

from fastgen._extras import extra
from fastgen._files import atomic_path

__all__ = ["image_grid", "save_png", "to_uint8"]

_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_TILE = 64  # pixels that the longer side of an image has at least, to be seen


def image_grid(images: Tensor, columns: int | None = None, *, padding: int = 2) -> Tensor:
    """Tile images in rows, on white.

    Args:
        images: (N, C, H, W) floats, shown from 0 (black) to 1 (white) and clamped to that; C = 1, 3 or 4.
        columns: images a row, default about the square root of N.
        padding: pixels between images and around them.

    Returns:
        uint8 (C, height, width). Small images are enlarged by a whole number, without smoothing.

    Raises:
        ValueError: for images of another shape.
    """
    if images.dim() != 4 or images.shape[1] not in _MODES or images.numel() == 0:
        raise ValueError(f"images: expected (N, C, H, W) with C = 1, 3 or 4, got {tuple(images.shape)}")
    pixels = to_uint8(images)
    scale = max(1, _TILE // max(pixels.shape[-2:]))
    pixels = pixels.repeat_interleave(scale, -2).repeat_interleave(scale, -1)
    count, channels, height, width = pixels.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    down, across = height + padding, width + padding
    grid = torch.full((channels, rows * down + padding, columns * across + padding), 255, dtype=torch.uint8)
    for index, image in enumerate(pixels):
        row, column = divmod(index, columns)
        top, left = row * down + padding, column * across + padding
        grid[:, top : top + height, left : left + width] = image
    return grid


def to_uint8(images: Tensor) -> Tensor:
    """Floats, 0 to 1 (clamped), as uint8 on the CPU."""
    return images.detach().float().clamp(0, 1).mul(255).round().to("cpu", torch.uint8)


def save_png(path: str | os.PathLike[str], image: Tensor) -> None:
    """Write a uint8 (C, H, W) picture, C = 1, 3 or 4, atomically."""
    with extra("train"):
        from PIL import Image
    array = image.permute(1, 2, 0).squeeze(-1).contiguous().numpy()
    with atomic_path(path) as temporary:
        Image.fromarray(array, _MODES[image.shape[0]]).save(temporary, format="PNG")
