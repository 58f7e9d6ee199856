"""Random views of images, drawn by the batch: functions of tensors."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

#: The least area of a random resized crop, as a share of the image's, and its ratios of width to height.
SCALE = 0.08
_RATIO = (3 / 4, 4 / 3)
#: Crops that are drawn until one fits into the image; the whole image is taken after that.
_DRAWS = 10
#: How far brightness, contrast and saturation are from 1, the hue from 0 in turns, and how often.
_STRENGTH = (0.4, 0.4, 0.4, 0.1)
_JITTER = 0.8
_GREY = 0.2
# Of ITU-R 601, as torchvision rounds them.
_LUMA = (0.2989, 0.587, 0.114)


def _uniform(*shape: int, generator: torch.Generator) -> Tensor:
    # By the seed alone, and not by what torch's default type is.
    return torch.rand(*shape, generator=generator, dtype=torch.float32)


def augment(images: Tensor, generator: torch.Generator, crop: int | None = None) -> Tensor:
    """Move each image by up to an eighth of its side, mirrored at the border, and flip half of them.

    Parameters
    ----------
    images : (n, c, h, w), any type.
    generator : of the moves and flips.
    crop : cut squares of this side out of the moved images, anywhere; None for whole images.

    Returns
    -------
    A new tensor of the same type, (n, c, h, w) or (n, c, crop, crop).

    Raises
    ------
    ValueError
        The crop is larger than the images.
    """
    n, channels, height, width = images.shape
    if crop is not None and not 0 < crop <= min(height, width):
        raise ValueError(f"a crop of {crop} cannot be cut from images of {height} x {width}")
    rows_out, columns_out = (height, width) if crop is None else (crop, crop)
    pad = max(1, height // 8), max(1, width // 8)
    room = height - rows_out, width - columns_out
    top, left = (torch.randint(-p, r + p + 1, (n,), generator=generator) for p, r in zip(pad, room, strict=True))
    flip = _uniform(n, generator=generator) < 0.5
    # Indices do what padding, cropping and flipping would, in one gather; -1 is mirrored to 1.
    rows = _mirror(torch.arange(rows_out) + top[:, None], height)
    columns = torch.arange(columns_out).expand(n, columns_out)
    columns = torch.where(flip[:, None], columns.flip(1), columns)
    columns = _mirror(columns + left[:, None], width)
    return images[
        torch.arange(n)[:, None, None, None],
        torch.arange(channels)[None, :, None, None],
        rows[:, None, :, None],
        columns[:, None, None, :],
    ]


class Distortion(NamedTuple):
    """What is done to each of n images by `distort`, as `draw` draws it."""

    box: Tensor  # (n, 4) top, left, height and width of the crop, in pixels
    flip: Tensor  # (n,) whether it is mirrored
    factors: Tensor  # (n, 4) of brightness, contrast and saturation, and the turn of the hue
    order: Tensor  # (n, 4) in which these four are applied
    grey: Tensor  # (n,) whether the colours are taken out

    def of(self, rows: slice) -> "Distortion":
        """Return what is done to some of the images."""
        return Distortion(*(value[rows] for value in self))

    @staticmethod
    def draw(
        n: int,
        side: tuple[int, int],
        generator: torch.Generator,
        *,
        scale: tuple[float, float] = (SCALE, 1.0),
        flips: bool = True,
    ) -> "Distortion":
        """Draw the views of SimCLR for CIFAR: crop, flip, jitter of the colours, greyscale.

        A crop of a random share of the area and a ratio between 3:4 and 4:3, resized; half of the images mirrored;
        brightness, contrast and saturation by 0.6 to 1.4 and the hue by a tenth of a turn, in any order, for four
        fifths; greyscale for one fifth (Chen et al., ICML 2020, B.9; He et al., MoCo's demo on CIFAR-10).

        Parameters
        ----------
        n : number of images.
        side : their height and width.
        generator : of all that is random, on the CPU.
        scale : the least and the greatest area of the crop, as shares of the image's.
        flips : whether to mirror half of them; rotations are told apart by images that are not mirrored after.
        """
        height, width = side
        uniform = _uniform(n, _DRAWS, 2, generator=generator)
        area = height * width * (scale[0] + (scale[1] - scale[0]) * uniform[..., 0])
        low, high = (math.log(ratio) for ratio in _RATIO)
        ratio = (low + (high - low) * uniform[..., 1]).exp()
        h, w = (area / ratio).sqrt().round(), (area * ratio).sqrt().round()
        fits = (h >= 1) & (h <= height) & (w >= 1) & (w <= width)
        first = fits.int().argmax(1, keepdim=True)
        some = fits.any(1)
        h = torch.where(some, h.gather(1, first)[:, 0], float(height))
        w = torch.where(some, w.gather(1, first)[:, 0], float(width))
        corner = _uniform(n, 2, generator=generator)
        top = (corner[:, 0] * (height - h + 1)).floor().clamp(max=height - 1)
        left = (corner[:, 1] * (width - w + 1)).floor().clamp(max=width - 1)
        flip = _uniform(n, generator=generator) < (0.5 if flips else 0.0)
        strength = torch.tensor(_STRENGTH, dtype=torch.float32)
        moved = strength * (2 * _uniform(n, 4, generator=generator) - 1)
        jittered = _uniform(n, 1, generator=generator) < _JITTER
        factors = torch.where(jittered, moved, 0.0) + moved.new_tensor([1.0, 1.0, 1.0, 0.0])
        order = _uniform(n, 4, generator=generator).argsort(1)
        grey = _uniform(n, generator=generator) < _GREY
        return Distortion(torch.stack([top, left, h, w], 1), flip, factors, order, grey)


def distort(images: Tensor, distortion: Distortion, crop: int | None = None) -> Tensor:
    """Return the views of images that a `Distortion` describes.

    Parameters
    ----------
    images : (n, 3, h, w) floating point between 0 and 1, on any device.
    distortion : of n images, or of one, which is then done to all.
    crop
        The side of the views, in pixels; None for that of the images. Crops are resized to it by linear
        interpolation, without a filter where they are larger.

    Returns
    -------
    (n, 3, h, w), or (n, 3, crop, crop).

    Raises
    ------
    ValueError
        The images are not of three channels.
    """
    n, channels, height, width = images.shape
    if channels != 3:
        raise ValueError(f"colours are changed of images of 3 channels, and these have {channels}")
    box, flip, factors, order, grey = (value.to(images.device).expand(n, *value.shape[1:]) for value in distortion)
    rows_out, columns_out = (height, width) if crop is None else (crop, crop)
    rows = _positions(box[:, 0], box[:, 2], rows_out)
    columns = _positions(box[:, 1], box[:, 3], columns_out)
    columns = torch.where(flip[:, None], columns.flip(1), columns)
    # From pixels to the coordinates of grid_sample, from -1 to 1 over the image's edges.
    y = ((2 * rows + 1) / height - 1)[:, :, None].expand(n, rows_out, columns_out)
    x = ((2 * columns + 1) / width - 1)[:, None, :].expand(n, rows_out, columns_out)
    grid = torch.stack([x, y], 3).to(images.dtype)
    views = torch.nn.functional.grid_sample(images, grid, padding_mode="border", align_corners=False)
    identity = factors.new_tensor([1.0, 1.0, 1.0, 0.0])
    for place in range(4):
        for which, change in enumerate((_brightness, _contrast, _saturation, _hue)):
            chosen = ((order[:, place] == which) & (factors[:, which] != identity[which])).nonzero().squeeze(1)
            if len(chosen):
                factor = factors[chosen, which][:, None, None, None].to(views.dtype)
                views[chosen] = change(views[chosen], factor)
    return torch.where(grey[:, None, None, None], _luma(views).expand_as(views), views)


def flipped(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return images (n, c, h, w) of which half are mirrored, at random."""
    flip = (_uniform(len(images), generator=generator) < 0.5).to(images.device)
    return torch.where(flip[:, None, None, None], images.flip(3), images)


def rotations(images: Tensor) -> list[Tensor]:
    """Return images (n, c, h, w) turned by 0, 90, 180 and 270 degrees.

    Raises
    ------
    ValueError
        They are no squares.
    """
    if images.ndim != 4 or images.shape[2] != images.shape[3]:
        raise ValueError(
            f"only square images (n, c, h, h) are turned, and these are of shape {tuple(images.shape)}"
        )
    return [torch.rot90(images, turns, (2, 3)) for turns in range(4)]


def _mirror(index: Tensor, size: int) -> Tensor:
    index = index.abs()
    return torch.where(index >= size, 2 * (size - 1) - index, index)


def _positions(start: Tensor, length: Tensor, count: int) -> Tensor:
    """Where in the image, in pixels, the centres of a resized crop's pixels lie, (n, count)."""
    inside = (torch.arange(count, device=start.device) + 0.5) * length[:, None] / count - 0.5
    # What lies beyond the crop is no part of it, though the image may go on there.
    return start[:, None] + torch.minimum(inside.clamp_min(0), length[:, None] - 1)


def _luma(images: Tensor) -> Tensor:
    return (images * images.new_tensor(_LUMA)[:, None, None]).sum(1, keepdim=True)


def _brightness(images: Tensor, factor: Tensor) -> Tensor:
    return (images * factor).clamp(0, 1)


def _contrast(images: Tensor, factor: Tensor) -> Tensor:
    mean = _luma(images).mean((2, 3), keepdim=True)
    return torch.lerp(mean, images, factor).clamp(0, 1)


def _saturation(images: Tensor, factor: Tensor) -> Tensor:
    return torch.lerp(_luma(images), images, factor).clamp(0, 1)


def _hue(images: Tensor, turn: Tensor) -> Tensor:
    """Turn the hue of the HSV model; its saturation and value stay."""
    value, least = images.amax(1, keepdim=True), images.amin(1, keepdim=True)
    chroma = value - least
    red, green, blue = images.split(1, 1)
    safe = torch.where(chroma > 0, chroma, torch.ones_like(chroma))
    sixths = torch.where(
        value == red,
        (green - blue) / safe,
        torch.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    k = (images.new_tensor([5.0, 3.0, 1.0])[:, None, None] + sixths + 6 * turn) % 6
    return value - chroma * torch.minimum(k, 4 - k).clamp(0, 1)
