"""Random views of batches of images: functions of tensors."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

#: Minimum area of a random resized crop, as a share of the image, and range of its ratio of width to height.
SCALE = 0.08
_RATIO = (3 / 4, 4 / 3)
#: Number of crops to draw until one fits into the image; then the whole image is used.
_DRAWS = 10
#: Maximum distance of brightness, contrast and saturation from 1 and of the hue from 0 (in turns), and how often.
_STRENGTH = (0.4, 0.4, 0.4, 0.1)
_JITTER = 0.8
_GRAY = 0.2
# Luma coefficients of ITU-R 601, rounded as in torchvision.
_LUMA = (0.2989, 0.587, 0.114)


def _uniform(*shape: int, generator: torch.Generator) -> Tensor:
    # float32, so that the numbers do not depend on torch's default dtype.
    return torch.rand(*shape, generator=generator, dtype=torch.float32)


def augment(images: Tensor, generator: torch.Generator, crop: int | None = None) -> Tensor:
    """Shift each image by up to an eighth of its side, mirrored at the border, and flip half of them.

    Parameters
    ----------
    images : (n, c, h, w) images of any dtype, on any device.
    generator : random generator of the shifts and flips, on the CPU.
    crop : side of a random square crop of each shifted image. Default: whole images.

    Returns
    -------
    A new tensor of the same dtype, (n, c, h, w) or (n, c, crop, crop).

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
    # One gather replaces padding, cropping and flipping; index -1 is mirrored to 1.
    rows = _mirror(torch.arange(rows_out) + top[:, None], height)
    columns = torch.arange(columns_out).expand(n, columns_out)
    columns = torch.where(flip[:, None], columns.flip(1), columns)
    columns = _mirror(columns + left[:, None], width)
    rows, columns = rows.to(images.device), columns.to(images.device)
    return images[
        torch.arange(n, device=images.device)[:, None, None, None],
        torch.arange(channels, device=images.device)[None, :, None, None],
        rows[:, None, :, None],
        columns[:, None, None, :],
    ]


class Distortion(NamedTuple):
    """Parameters of `distort` for each of n images, drawn by `draw`."""

    box: Tensor  # (n, 4) top, left, height and width of the crop, in pixels
    flip: Tensor  # (n,) whether the image is mirrored
    factors: Tensor  # (n, 4) factors of brightness, contrast and saturation, and shift of the hue, in turns
    order: Tensor  # (n, 4) order in which these four are applied
    gray: Tensor  # (n,) whether the image is converted to grayscale

    def of(self, rows: slice) -> "Distortion":
        """Return the parameters of some of the images."""
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
        """Draw the views of SimCLR for CIFAR: crop, flip, color jitter, grayscale.

        A crop of a random share of the area, with a ratio between 3:4 and 4:3, is resized. Half of the images are
        mirrored. For four fifths of them, brightness, contrast and saturation are multiplied by 0.6 to 1.4 and the
        hue is shifted by up to a tenth of a turn, in random order. One fifth are converted to grayscale (Chen et
        al., ICML 2020, B.9; He et al., MoCo's demo on CIFAR-10).

        Parameters
        ----------
        n : number of images.
        side : height and width of the images.
        generator : random generator, on the CPU.
        scale : minimum and maximum area of the crop, as shares of the image.
        flips : whether to mirror half of the images; False if rotations are to be predicted.
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
        gray = _uniform(n, generator=generator) < _GRAY
        return Distortion(torch.stack([top, left, h, w], 1), flip, factors, order, gray)


def distort(images: Tensor, distortion: Distortion, crop: int | None = None) -> Tensor:
    """Return views of images, with the parameters of a `Distortion`.

    Parameters
    ----------
    images : (n, 3, h, w) floating-point images in [0, 1], on any device.
    distortion : parameters of n images, or of one, which then apply to all.
    crop
        Side of the views, in pixels. Default: that of the images. Crops are resized by linear interpolation,
        without an antialiasing filter.

    Returns
    -------
    (n, 3, h, w), or (n, 3, crop, crop).

    Raises
    ------
    ValueError
        The images do not have three channels.
    """
    n, channels, height, width = images.shape
    if channels != 3:
        raise ValueError(f"color jitter needs images of 3 channels, got {channels}")
    box, flip, factors, order, gray = (value.to(images.device).expand(n, *value.shape[1:]) for value in distortion)
    rows_out, columns_out = (height, width) if crop is None else (crop, crop)
    rows = _positions(box[:, 0], box[:, 2], rows_out)
    columns = _positions(box[:, 1], box[:, 3], columns_out)
    columns = torch.where(flip[:, None], columns.flip(1), columns)
    # Convert pixels to the coordinates of grid_sample, which are -1 and 1 at the edges of the image.
    y = ((2 * rows + 1) / height - 1)[:, :, None].expand(n, rows_out, columns_out)
    x = ((2 * columns + 1) / width - 1)[:, None, :].expand(n, rows_out, columns_out)
    grid = torch.stack([x, y], 3).to(images.dtype)
    views = torch.nn.functional.grid_sample(images, grid, padding_mode="border", align_corners=False)
    identity = factors.new_tensor([1.0, 1.0, 1.0, 0.0])
    for position in range(4):
        for which, change in enumerate((_brightness, _contrast, _saturation, _hue)):
            chosen = ((order[:, position] == which) & (factors[:, which] != identity[which])).nonzero().squeeze(1)
            if len(chosen):
                factor = factors[chosen, which][:, None, None, None].to(views.dtype)
                views[chosen] = change(views[chosen], factor)
    return torch.where(gray[:, None, None, None], _luma(views).expand_as(views), views)


def flipped(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return images (n, c, h, w), each mirrored with probability 1/2."""
    flip = (_uniform(len(images), generator=generator) < 0.5).to(images.device)
    return torch.where(flip[:, None, None, None], images.flip(3), images)


def jigsaw(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return images (n, c, h, w) whose 3 x 3 patches are in random order, drawn for each image.

    There are as many patches as in the code of Yu et al., CVPR 2023 (``utils/dataset.py`` of
    gist-ailab/block-selection-for-OOD-detection). If a side is not a multiple of three, the one or two pixels that
    remain, split between both ends, stay; there, they lie at the right and at the bottom and become 0.

    Raises
    ------
    ValueError
        The images have fewer than 3 x 3 pixels.
    """
    n, channels, *sides = images.shape
    if len(sides) != 2 or min(sides) < 3:
        raise ValueError(f"jigsaws need images (n, c, h, w) of at least 3 x 3 pixels, got {tuple(images.shape)}")
    h, w = (side // 3 for side in sides)
    top, left = ((side % 3) // 2 for side in sides)
    inner = (..., slice(top, top + 3 * h), slice(left, left + 3 * w))
    patches = images[inner].reshape(n, channels, 3, h, 3, w).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
    order = _uniform(n, 9, generator=generator).argsort(1).to(images.device)
    patches = patches[torch.arange(n, device=images.device)[:, None], order].unflatten(1, (3, 3))
    shuffled = images.clone()
    shuffled[inner] = patches.permute(0, 3, 1, 4, 2, 5).reshape(n, channels, 3 * h, 3 * w)
    return shuffled


def rotations(images: Tensor) -> list[Tensor]:
    """Return images (n, c, h, w) rotated by 0, 90, 180 and 270 degrees.

    Raises
    ------
    ValueError
        The images are not square.
    """
    if images.ndim != 4 or images.shape[2] != images.shape[3]:
        raise ValueError(f"rotations need square images (n, c, h, h), got shape {tuple(images.shape)}")
    return [torch.rot90(images, quarters, (2, 3)) for quarters in range(4)]


def _mirror(index: Tensor, size: int) -> Tensor:
    index = index.abs()
    return torch.where(index >= size, 2 * (size - 1) - index, index)


def _positions(start: Tensor, length: Tensor, count: int) -> Tensor:
    """Return the positions (n, count), in pixels of the image, of the centers of a resized crop's pixels."""
    inside = (torch.arange(count, device=start.device) + 0.5) * length[:, None] / count - 0.5
    # Positions outside the crop are clamped to it, even if the image continues there.
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
    """Shift the hue of the HSV model, keeping saturation and value."""
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
