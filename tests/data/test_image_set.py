"""ImageSet: the fields it accepts, batches, and splits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgen.data import ImageSet


def image_set(labels: list[int] | None, count: int | None = None) -> ImageSet:
    """Images whose first two pixels spell their number."""
    count = len(labels) if labels is not None else count
    images = torch.zeros(count, 1, 2, 2, dtype=torch.uint8)
    images[:, 0, 0, 0], images[:, 0, 0, 1] = torch.arange(count) // 256, torch.arange(count) % 256
    if labels is None:
        return ImageSet(images, name="plain")
    return ImageSet(images, torch.tensor(labels), tuple(map(str, range(max(labels) + 1))), "labelled")


def numbers(images: ImageSet) -> list[int]:
    return (images.images[:, 0, 0, 0].int() * 256 + images.images[:, 0, 0, 1].int()).tolist()


@settings(max_examples=60, deadline=None)
@given(
    labels=st.lists(st.integers(0, 5), min_size=2, max_size=200), fraction=st.floats(0.01, 0.99), seed=st.integers(0, 9)
)
def test_split_is_a_partition_that_keeps_the_proportions(labels, fraction, seed):
    whole = image_set(labels)
    train, test = whole.split(fraction, seed)
    assert len(test) == min(max(round(fraction * len(labels)), 1), len(labels) - 1)
    assert sorted(numbers(train) + numbers(test)) == list(range(len(labels)))
    for part in (train, test):
        assert part.labels.tolist() == [labels[i] for i in numbers(part)]
        assert part.test is None
    for label in set(labels):
        share = labels.count(label) * len(test) / len(labels)
        assert abs(test.labels.tolist().count(label) - share) < 1


@given(count=st.integers(2, 300), data=st.data())
@settings(max_examples=30, deadline=None)
def test_split_without_labels(count, data):
    held_out = data.draw(st.integers(1, count - 1))
    train, test = image_set(None, count).split(held_out)
    assert (len(train), len(test)) == (count - held_out, held_out)
    assert sorted(numbers(train) + numbers(test)) == list(range(count))
    assert train.labels is None
    assert test.labels is None


def test_split_depends_on_the_seed_alone():
    whole = image_set([0, 1, 2, 3] * 100)
    torch.manual_seed(0)
    first = numbers(whole.split(50, seed=3)[1])
    torch.manual_seed(1)
    assert numbers(whole.split(50, seed=3)[1]) == first
    assert numbers(whole.split(50, seed=4)[1]) != first


def test_split_is_fair_and_shuffled():
    """Every image is held out equally often, and a rare class stands at every place equally often."""
    whole, runs = image_set([0] * 10 + [1] * 70), 1000
    held_out, places, head = torch.zeros(80), torch.zeros(8), 0
    for seed in range(runs):
        train, test = whole.split(8, seed)
        held_out[numbers(test)] += 1
        places += test.labels == 0
        head += int((train.labels[:9] == 0).sum())
    # Within 5 standard deviations of the binomial counts.
    assert (held_out - runs / 10).abs().max() < 5 * (runs * 0.1 * 0.9) ** 0.5
    assert (places - runs / 8).abs().max() < 5 * (runs * 7 / 64) ** 0.5
    assert abs(head - 9 * runs / 8) < 5 * (9 * runs * 7 / 64) ** 0.5


def test_split_takes_the_split_of_the_source_unless_asked_otherwise():
    whole, own = image_set([0, 1] * 10), image_set([1, 0] * 3)
    both = ImageSet(whole.images, whole.labels, whole.classes, test=own)
    train, test = both.split()
    assert test is own
    assert train.test is None
    assert numbers(train) == list(range(20))
    train, test = both.split(4)
    assert (len(train), len(test)) == (16, 4)


def test_split_default_is_a_tenth():
    train, test = image_set([0, 1] * 50).split()
    assert (len(train), len(test)) == (90, 10)


@pytest.mark.parametrize("test_size", [0, -1, 10, 11, 0.0, 1.0, 1.5, float("nan")])
def test_split_refuses_an_empty_part(test_size):
    with pytest.raises(ValueError, match=r"^test_size: expected .*, got"):
        image_set([0, 1] * 5).split(test_size)


@pytest.mark.parametrize("test_size", [True, "0.1"])
def test_split_refuses_other_types(test_size):
    with pytest.raises(TypeError, match=r"^test_size: expected an int, a float or None, got (bool|str)$"):
        image_set([0, 1]).split(test_size)


def test_split_of_one_image():
    with pytest.raises(ValueError, match="test_size"):
        image_set([0]).split()


@pytest.mark.parametrize("indices", [[2, 0], torch.tensor([2, 0]), slice(2, None, 1)])
def test_batch(indices):
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).reshape(3, 1, 1, 1).expand(3, 3, 4, 5).contiguous()
    whole = ImageSet(images, torch.tensor([0, 1, 1]), ("a", "b"))
    x, y = whole.batch(indices)
    expected = torch.tensor([0.0, 0.2, 1.0])[indices]
    assert x.dtype == torch.float32
    assert x.shape == (len(expected), 3, 4, 5)
    torch.testing.assert_close(x[:, 0, 0, 0], expected, rtol=0, atol=1e-7)
    assert y.tolist() == torch.tensor([0, 1, 1])[indices].tolist()
    assert images.unique().tolist() == [0, 51, 255]  # untouched
    assert ImageSet(images).batch(indices)[1] is None


def test_to_moves_the_test_split_too():
    whole = image_set(None, 2)
    moved = ImageSet(whole.images, test=whole).to("meta")
    assert {moved.images.device.type, moved.test.images.device.type} == {"meta"}


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_split_and_batch_on_a_gpu():
    whole = image_set([0, 1, 2] * 10)
    for here, there in zip(whole.split(6), whole.to("cuda").split(6), strict=True):
        assert there.labels.device.type == "cuda"
        assert numbers(here) == numbers(there)
        x, y = there.batch(torch.arange(3, device="cuda"))
        assert torch.equal(x.cpu(), here.batch([0, 1, 2])[0])
        assert torch.equal(y.cpu(), here.labels[:3])


def test_repr_is_one_line():
    part = image_set([0, 1, 1])
    whole = ImageSet(part.images.repeat(500, 1, 1, 1), None, (), "sky", None, 1)
    assert repr(whole) == "sky: 1,500 images of 1x2x2, 1 other file skipped"
    both = ImageSet(part.images, part.labels, part.classes, "x", test=part)
    assert repr(both) == "x: 3 images of 1x2x2, 2 classes (0, 1), 3 test images"
    many = ImageSet(part.images, part.labels, tuple(map(str, range(1000))))
    assert repr(many) == "images: 3 images of 1x2x2, 1,000 classes (0, 1, 2, 3, 4, 5, 6, 7, ..., 999)"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"images": torch.zeros(2, 1, 2, 2)}, "images: expected a uint8 tensor .*got float32 .2, 1, 2, 2."),
        ({"images": torch.zeros(2, 2, 2, dtype=torch.uint8)}, "images: .*got uint8 .2, 2, 2."),
        ({"images": torch.zeros(0, 1, 2, 2, dtype=torch.uint8)}, "images: .*not empty"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, r"labels: expected an int64 tensor of shape \(2,\)"),
        ({"labels": torch.zeros(2)}, "labels: .*got float32"),
        ({"labels": torch.tensor([0, 2])}, "labels: expected 0 to 1, got 0 to 2"),
        ({"labels": torch.tensor([-1, 0])}, "labels: expected 0 to 1, got -1 to 0"),
        ({"test": ImageSet(torch.zeros(1, 1, 3, 3, dtype=torch.uint8))}, "test: expected the shape"),
    ],
)
def test_fields_that_do_not_fit(fields, message):
    good = {"images": torch.zeros(2, 1, 2, 2, dtype=torch.uint8), "labels": torch.tensor([0, 1]), "classes": ("a", "b")}
    with pytest.raises(ValueError, match=message):
        ImageSet(**{**good, **fields})
