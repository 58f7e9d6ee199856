"""Random views of images, drawn by the batch: functions of tensors."""

import torch
from torch import Tensor


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
    flip = torch.rand(n, generator=generator) < 0.5
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


def _mirror(index: Tensor, size: int) -> Tensor:
    index = index.abs()
    return torch.where(index >= size, 2 * (size - 1) - index, index)
