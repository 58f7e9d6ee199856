"""Pictures of maps: an image beside the p-values of its positions, with the flagged ones outlined."""

import math

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont
from torch import Tensor

from featnorm.report.explanation import image_of
from featnorm.verdict import Verdict

# The longer side of the image and of its map, and the gap between them, in pixels.
_SIDE, _GAP = 384, 12
_FONT = 14
# matplotlib's cividis, from low to high. Its brightness rises evenly, so that it can be read in print, and by
# readers who cannot tell red from green.
_COLORS = np.array(
    [
        (0, 34, 78), (26, 56, 111), (67, 78, 108), (97, 101, 111), (125, 124, 120), (155, 148, 118),
        (188, 174, 108), (222, 201, 88), (254, 232, 56),
    ]
)  # fmt: skip
# p-values below this have the color of the lowest.
_MIN_P = 0.001


def map_picture(pixels: Tensor, verdict: Verdict) -> Image.Image:
    """Draw an image beside the map of its positions, with a legend.

    The map shows p-values on a logarithmic scale, and the flagged positions are outlined; before calibration, it
    shows scores.

    Parameters
    ----------
    pixels : what the model sees, (3, H, W) or (1, H, W) in [0, 1].
    verdict : verdicts on the positions of the image.
    """
    image = image_of(pixels)
    scale = _SIDE / max(image.size)
    size = (max(1, round(scale * image.width)), max(1, round(scale * image.height)))
    drawn = [
        _outlined(image.resize(size, Image.Resampling.BICUBIC), _mask(verdict, size)),
        draw_map(verdict, size),
    ]
    legend = _legend(2 * size[0] + _GAP, verdict)
    picture = Image.new("RGB", (legend.width, size[1] + legend.height), "white")
    for i, one in enumerate(drawn):
        picture.paste(one, (i * (size[0] + _GAP), 0))
    picture.paste(legend, (0, size[1]))
    return picture


def draw_map(verdict: Verdict, size: tuple[int, int]) -> Image.Image:
    """Draw the map of an image's positions alone, in a size in pixels; see `map_picture`."""
    low, high = _ends(verdict)
    values = verdict.score if verdict.p_value is None else verdict.p_value.clamp(_MIN_P).log10()
    assert verdict.parts is not None
    assert verdict.parts.grid is not None
    shares = (values.cpu().numpy().reshape(verdict.parts.grid) - low) / max(high - low, 1e-30)
    drawn = Image.fromarray(_colored(shares)).resize(size, Image.Resampling.NEAREST)
    return _outlined(drawn, _mask(verdict, size))


def _ends(verdict: Verdict) -> tuple[float, float]:
    """Return the values of the lowest and the highest color: logarithms of p-values, or scores."""
    if verdict.p_value is not None:
        return math.log10(_MIN_P), 0.0
    return float(verdict.score.min()), float(verdict.score.max())


def _mask(verdict: Verdict, size: tuple[int, int]) -> Image.Image | None:
    """Return the flagged positions as white pixels; None before calibration."""
    if verdict.is_id is None or verdict.parts is None or verdict.parts.grid is None:
        return None
    flagged = np.asarray(~verdict.is_id.cpu().numpy(), np.uint8).reshape(verdict.parts.grid)
    return Image.fromarray(255 * flagged).resize(size, Image.Resampling.NEAREST)


def _colored(values: npt.NDArray[np.floating]) -> npt.NDArray[np.uint8]:
    """Return the colors (..., 3) of values in [0, 1]."""
    at = np.linspace(0, 1, len(_COLORS))
    channels = [np.interp(values, at, _COLORS[:, i]) for i in range(3)]
    return np.stack(channels, -1).round().astype(np.uint8)


def _outlined(image: Image.Image, mask: Image.Image | None) -> Image.Image:
    """Return an image with a white outline, between black ones, along the inside of a mask."""
    if mask is None:
        return image
    image = image.copy()
    for color, width in (("black", 3), ("white", 5), ("black", 3)):
        # At the border of the picture the outline is closed, because the filter sees black beyond it.
        framed = Image.new("L", (mask.width + 4, mask.height + 4))
        framed.paste(mask, (2, 2))
        inner = framed.filter(ImageFilter.MinFilter(width)).crop((2, 2, mask.width + 2, mask.height + 2))
        image.paste(color, mask=ImageChops.subtract(mask, inner))
        mask = inner
    return image


def _legend(width: int, verdict: Verdict) -> Image.Image:
    font = ImageFont.load_default(_FONT)
    legend = Image.new("RGB", (width, 4 * _FONT), "white")
    draw = ImageDraw.Draw(legend)
    left, bar = width // 2 + _GAP // 2, width - width // 2 - _GAP // 2
    colors = _colored(np.tile(np.linspace(0, 1, bar), (_FONT, 1)))
    legend.paste(Image.fromarray(colors), (left, _FONT // 2))
    low, high = _ends(verdict)
    ticks = {0.0: f"{low:.4g}", 1.0: f"{high:.4g}"}
    if verdict.p_value is not None:
        ticks = {0.0: f"{_MIN_P:g}", 1 / 3: "0.01", 2 / 3: "0.1", 1.0: "1"}
    for at, text in ticks.items():
        anchor = {0.0: "la", 1.0: "ra"}.get(at, "ma")
        draw.text((left + at * (bar - 1), 7 * _FONT // 4), text, "black", font, anchor=anchor)
    name = "score" if verdict.p_value is None else "p-value"
    draw.text((left + bar / 2, 11 * _FONT // 4), name, "black", font, anchor="ma")
    if verdict.is_id is not None:
        box = Image.new("L", (3 * _FONT, 2 * _FONT), 255)
        sample = Image.fromarray(np.full((*box.size[::-1], 3), _COLORS[2], np.uint8))
        legend.paste(_outlined(sample, box), (0, _FONT // 2))
        draw.text((4 * _FONT, 3 * _FONT // 2), "flagged as OOD", "black", font, anchor="lm")
    return legend
