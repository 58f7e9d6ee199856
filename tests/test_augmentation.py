"""Random views: each equals torchvision's view of the single image, and the parameters are drawn correctly."""

import math

import numpy as np
import pytest
import torch
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms import functional as reference

from featnorm.augmentation import Distortion, augment, distort, flipped, jigsaw, rotations


def images(n=24, side=32, seed=0):
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(seed))


def generator(seed=1):
    return torch.Generator().manual_seed(seed)


def test_augmentation_is_a_mirrored_crop_and_a_flip():
    images = torch.randint(0, 256, (40, 3, 16, 24), dtype=torch.uint8)
    moved = augment(images, torch.Generator().manual_seed(4)).numpy()
    padded = np.pad(images.numpy(), ((0, 0), (0, 0), (2, 2), (3, 3)), mode="reflect")
    flips = tops = 0
    for i in range(40):
        places = [
            (top, left, flip)
            for top in range(5)
            for left in range(7)
            for flip in (False, True)
            if np.array_equal(moved[i], _cut(padded[i], top, left, flip))
        ]
        assert len(places) == 1
        tops += places[0][0]
        flips += places[0][2]
    assert 8 < flips < 32
    assert 40 < tops < 120


def _cut(padded, top, left, flip):
    cut = padded[:, top : top + 16, left : left + 24]
    return cut[:, :, ::-1] if flip else cut


def test_a_crop_is_cut_from_the_moved_image():
    images = torch.randint(0, 256, (60, 3, 16, 16), dtype=torch.uint8)
    crops = augment(images, torch.Generator().manual_seed(5), 12).numpy()
    assert crops.shape == (60, 3, 12, 12)
    padded = np.pad(images.numpy(), ((0, 0), (0, 0), (2, 2), (2, 2)), mode="reflect")
    corners = set()
    for i in range(60):
        places = [
            (top, left)
            for top in range(9)
            for left in range(9)
            for step in (1, -1)
            if np.array_equal(crops[i], padded[i][:, top : top + 12, left : left + 12][:, :, ::step])
        ]
        assert len(places) == 1
        corners.update(places)
    assert {top for top, _ in corners} == set(range(9))


def one_by_one(image, drawn, i, side):
    """Return the view computed by torchvision's functions."""
    top, left, height, width = (int(v) for v in drawn.box[i])
    view = reference.resized_crop(image, top, left, height, width, [side, side], antialias=False)
    if drawn.flip[i]:
        view = reference.hflip(view)
    changes = (
        reference.adjust_brightness,
        reference.adjust_contrast,
        reference.adjust_saturation,
        reference.adjust_hue,
    )
    for which in drawn.order[i]:
        view = changes[which](view, float(drawn.factors[i, which]))
    return reference.rgb_to_grayscale(view, 3) if drawn.gray[i] else view


@pytest.mark.parametrize("side", [32, 20])
def test_a_view_is_what_torchvision_makes_of_the_image(side):
    pixels = images()
    drawn = Distortion.draw(24, (32, 32), generator())
    assert drawn.gray.any()
    assert drawn.flip.any()
    assert (drawn.factors == torch.tensor([1.0, 1.0, 1.0, 0.0])).all(1).any()
    assert len({tuple(order) for order in drawn.order.tolist()}) > 5
    expected = torch.stack([one_by_one(image, drawn, i, side) for i, image in enumerate(pixels)])
    torch.testing.assert_close(distort(pixels, drawn, side), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.2, 1.0), (0.54, 0.54)])
def test_crops_are_drawn_as_torchvision_draws_them(scale):
    n = 4000
    box = Distortion.draw(n, (32, 32), generator(), scale=scale).box
    assert (box[:, :2] >= 0).all()
    assert (box[:, :2] + box[:, 2:] <= 32).all()
    torch.manual_seed(0)
    theirs = [RandomResizedCrop.get_params(images(1)[0], scale, (3 / 4, 4 / 3)) for _ in range(n)]
    theirs = torch.tensor(theirs).float()
    for ours, other in ((box, theirs), (box[:, 2] * box[:, 3], theirs[:, 2] * theirs[:, 3])):
        spread = other.std(0) / math.sqrt(n) * 5 + 1e-3
        assert ((ours.mean(0) - other.mean(0)).abs() <= 2 * spread).all()
        torch.testing.assert_close(ours.std(0), other.std(0), rtol=0.08, atol=0.05)


def test_the_settings_are_those_of_the_source():
    drawn = Distortion.draw(20_000, (32, 32), generator())
    jittered = (drawn.factors != torch.tensor([1.0, 1.0, 1.0, 0.0])).any(1)
    assert float(jittered.float().mean()) == pytest.approx(0.8, abs=0.015)
    assert float(drawn.gray.float().mean()) == pytest.approx(0.2, abs=0.015)
    assert float(drawn.flip.float().mean()) == pytest.approx(0.5, abs=0.015)
    assert drawn.factors.amin(0).tolist() == pytest.approx([0.6, 0.6, 0.6, -0.1], abs=1e-3)
    assert drawn.factors.amax(0).tolist() == pytest.approx([1.4, 1.4, 1.4, 0.1], abs=1e-3)
    assert not Distortion.draw(100, (32, 32), generator(), flips=False).flip.any()


def test_the_generator_alone_decides_and_parts_are_parts():
    pixels = images(10)
    drawn = Distortion.draw(10, (32, 32), generator())
    again = Distortion.draw(10, (32, 32), generator())
    assert all(torch.equal(a, b) for a, b in zip(drawn, again, strict=True))
    whole, before = distort(pixels, drawn), pixels.clone()
    torch.testing.assert_close(whole[3:7], distort(pixels[3:7], drawn.of(slice(3, 7))), rtol=0, atol=0)
    assert torch.equal(pixels, before)
    one = drawn.of(slice(2, 3))
    torch.testing.assert_close(distort(pixels, one)[2], whole[2], rtol=0, atol=1e-6)


def test_a_whole_image_that_is_not_changed_is_itself():
    drawn = Distortion(
        torch.tensor([[0.0, 0.0, 32.0, 32.0]]),
        torch.tensor([False]),
        torch.tensor([[1.0, 1.0, 1.0, 0.0]]),
        torch.arange(4)[None],
        torch.tensor([False]),
    )
    torch.testing.assert_close(distort(images(), drawn), images(), rtol=0, atol=1e-5)


def test_flips_and_turns():
    pixels = images(200, side=4)
    seen = flipped(pixels, generator())
    same = (seen == pixels).flatten(1).all(1)
    assert torch.equal(seen[~same], pixels[~same].flip(3))
    assert 70 < int(same.sum()) < 130
    turned = rotations(pixels)
    assert torch.equal(turned[0], pixels)
    assert torch.equal(turned[1], reference.rotate(pixels, 90))
    assert torch.equal(turned[2], pixels.flip(2, 3))
    assert torch.equal(torch.rot90(turned[3], 1, (2, 3)), pixels)


def test_what_is_wrong_is_named():
    drawn = Distortion.draw(2, (8, 8), generator())
    with pytest.raises(ValueError, match="of 3 channels, got 1"):
        distort(torch.rand(2, 1, 8, 8), drawn)
    with pytest.raises(ValueError, match=r"rotations need square images .* shape \(2, 3, 8, 6\)"):
        rotations(torch.rand(2, 3, 8, 6))


@pytest.mark.parametrize(("height", "width"), [(12, 9), (32, 32), (3, 10)])
def test_a_jigsaw_is_the_patches_of_an_image_in_another_order(height, width):
    pixels = torch.arange(2 * 8 * height * width, dtype=torch.float32).reshape(8, 2, height, width)
    shuffled = jigsaw(pixels, generator())
    h, w = height // 3, width // 3
    top, left = (height % 3) // 2, (width % 3) // 2
    places = [(top + h * i, left + w * j) for i in range(3) for j in range(3)]
    orders = set()
    for before, after in zip(pixels, shuffled, strict=True):
        patches = [before[:, y : y + h, x : x + w] for y, x in places]
        moved = [after[:, y : y + h, x : x + w] for y, x in places]
        order = tuple(next(i for i, p in enumerate(patches) if torch.equal(p, m)) for m in moved)
        assert sorted(order) == list(range(9))
        orders.add(order)
        rest = torch.ones(height, width, dtype=torch.bool)
        rest[top : top + 3 * h, left : left + 3 * w] = False
        assert torch.equal(before[:, rest], after[:, rest])
    assert len(orders) == 8
    with pytest.raises(ValueError, match="at least 3 x 3 pixels"):
        jigsaw(torch.rand(1, 3, 2, 5), generator())
