"""The sample of fitting images: what is most similar, what a file holds, and what is refused."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from featnorm.hidden.examples import MAX_BYTES, MAX_EXAMPLES, Examples
from featnorm.inputs import IMAGES, ItemError


def pictures(n, size=(200, 100)):
    random = np.random.default_rng(0)
    return [Image.fromarray(random.integers(0, 256, (*size[::-1], 3), np.uint8)) for _ in range(n)]


@pytest.fixture
def examples():
    features = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    return Examples(features, ["b", "a", None, "b", "a", "c"], [IMAGES.preview(p) for p in pictures(6)])


def test_the_nearest_are_those_in_the_same_direction(examples):
    pooled = torch.stack([3 * examples.features[4], 0.1 * examples.features[2] + 0.01 * examples.features[0]])
    first, second = examples.nearest(pooled)
    assert [len(first), first[0].index, first[0].label] == [3, 4, "a"]
    assert first[0].similarity == pytest.approx(1)
    assert (second[0].index, second[0].label) == (2, None)
    cosine = torch.nn.functional.cosine_similarity(pooled[1], examples.features)
    torch.testing.assert_close(
        torch.tensor([one.similarity for one in second]), cosine.sort(descending=True).values[:3]
    )
    assert torch.equal(examples.mean(first), examples.features[[one.index for one in first]].mean(0))
    assert str(first[0]) == "a, similarity 1.00"
    assert len(examples.nearest(pooled, k=9)[0]) == 6


def test_a_thumbnail_is_small_and_the_image_stays(examples):
    (one,) = pictures(1)
    data = IMAGES.preview(one)
    assert one.size == (200, 100)
    assert data.startswith(b"\xff\xd8")
    ((neighbor, *_),) = examples.nearest(examples.features[:1])
    assert neighbor.image().size == (64, 32)
    without = Examples(examples.features, examples.labels)
    assert without.nearest(examples.features[:1])[0][0].image() is None


def test_tensors_make_it_again(examples):
    for one in (examples, Examples(examples.features, examples.labels)):
        again = Examples.from_tensors(one.tensors(), one.classes)
        assert torch.equal(again.features, one.features)
        assert again.labels == one.labels
        assert again.thumbnails == one.thumbnails
    assert examples.classes == ["a", "b", "c"]


def test_a_thumbnail_that_is_damaged_or_large_is_refused_when_it_is_opened(examples):
    big = Image.new("RGB", (65, 64))
    big.save(buffer := io.BytesIO(), "PNG")
    for data, why in ((b"x" * 50, "not an image"), (buffer.getvalue(), "65 x 64 pixels are more than 4,096")):
        ((neighbor, *_),) = Examples(torch.ones(1, 4), [None], [data]).nearest(torch.ones(1, 4))
        with pytest.raises(ItemError, match=why):
            neighbor.image()


@pytest.mark.parametrize(
    "change",
    [
        {"features": torch.ones(6, 4).double()},
        {"features": torch.full((6, 4), float("nan"))},
        {"features": torch.ones(6)},
        {"features": torch.ones(5, 4)},
        {"labels": torch.ones(6)},
        {"labels": torch.full((6,), 3)},
        {"labels": torch.full((6,), -2)},
        {"sizes": torch.zeros(6, dtype=torch.int64)},
        {"sizes": torch.ones(6, dtype=torch.int64)},
        {"thumbnails": torch.zeros(6, dtype=torch.uint8)},
        {"thumbnails": None},
        {"other": torch.ones(1)},
    ],
)
def test_damaged_tensors_are_refused(examples, change):
    tensors = {name: value for name, value in (examples.tensors() | change).items() if value is not None}
    with pytest.raises((ValueError, RuntimeError)):
        Examples.from_tensors(tensors, examples.classes)


def test_its_size_is_bounded():
    with pytest.raises(ValueError, match=f"1 to {MAX_EXAMPLES}"):
        Examples(torch.ones(MAX_EXAMPLES + 1, 2), [None] * (MAX_EXAMPLES + 1))
    with pytest.raises(ValueError, match="bytes in all"):
        Examples(torch.ones(1, 2), [None], [b"x" * (MAX_BYTES + 1)])
    with pytest.raises(TypeError):
        Examples(torch.ones(1, 2), [3])
