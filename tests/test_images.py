from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fastgen._images import image_grid, save_png, to_uint8


@given(
    count=st.integers(1, 12),
    channels=st.sampled_from([1, 3, 4]),
    height=st.integers(1, 70),
    width=st.integers(1, 70),
    columns=st.none() | st.integers(1, 15),
    padding=st.integers(0, 3),
)
def test_every_image_has_its_place(
    count: int, channels: int, height: int, width: int, columns: int | None, padding: int
) -> None:
    shades = (torch.arange(count * channels).view(count, channels, 1, 1) % 200) / 255
    images = shades.expand(count, channels, height, width).clone()
    images[..., 0, 0] = 1.0  # the upper left corner is marked
    grid = image_grid(images, columns, padding=padding)
    scale = max(1, 64 // max(height, width))
    across = columns or int(np.ceil(np.sqrt(count)))
    down = -(-count // across)
    tile = (height * scale + padding, width * scale + padding)
    assert grid.dtype == torch.uint8
    assert grid.shape == (channels, down * tile[0] + padding, across * tile[1] + padding)
    for index in range(count):
        top, left = padding + index // across * tile[0], padding + index % across * tile[1]
        part = grid[:, top : top + height * scale, left : left + width * scale]
        assert torch.equal(part[:, ::scale, ::scale], to_uint8(images[index]))
        assert bool((part[:, :scale, :scale] == 255).all())
    assert bool((grid[:, :padding] == 255).all())


def test_values_are_clamped_and_rounded() -> None:
    values = torch.tensor([-1.0, 0.0, 0.5 / 255 - 1e-4, 0.5 / 255 + 1e-4, 0.5, 1.0, 2.0])
    assert to_uint8(values).tolist() == [0, 0, 0, 1, 128, 255, 255]


@pytest.mark.parametrize("shape", [(8, 8), (1, 8, 8), (2, 2, 8, 8), (0, 1, 8, 8), (2, 5, 8, 8)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"images: expected \(N, C, H, W\) with C = 1, 3 or 4, got"):
        image_grid(torch.zeros(shape))


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (4, "RGBA")])
def test_png(channels: int, mode: str, tmp_path: Path) -> None:
    picture = torch.randint(0, 256, (channels, 5, 7), dtype=torch.uint8)
    save_png(tmp_path / "deep" / "picture.png", picture)
    with Image.open(tmp_path / "deep" / "picture.png") as image:
        assert image.mode == mode
        read = torch.from_numpy(np.array(image)).view(5, 7, channels).permute(2, 0, 1)
    assert torch.equal(read, picture)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["picture.png"]
