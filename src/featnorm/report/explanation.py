"""Pictures that explain a verdict, for the page of scores and the service: heat maps and similar images."""

from collections.abc import Callable
from contextlib import suppress

import numpy as np
import numpy.typing as npt
from PIL import Image
from torch import Tensor

from featnorm.hidden.examples import Neighbor
from featnorm.inputs import ItemError
from featnorm.report.html import THUMBNAIL, Picture, thumbnail

Gray = npt.NDArray[np.float32]

# Colors of a heat map where the image lowers the score and where it raises it, and the largest opacity.
_LOWERS, _RAISES, _OPACITY = (235, 95, 10), (30, 120, 235), 0.8


def heat_map(heat: Tensor, model_input: Gray) -> Image.Image:
    """Lay a heat map over what the model sees, with the strongest heat at full opacity.

    Parameters
    ----------
    heat : heat (h, w), see `featnorm.tap.heat.heat_maps`.
    model_input : gray values in [0, 1], (height, width), see `grayscale`.
    """
    gray = Image.fromarray(np.uint8(255 * model_input))
    gray = gray.resize((THUMBNAIL, round(THUMBNAIL * gray.height / gray.width)), Image.Resampling.BICUBIC)
    scaled = Image.fromarray(heat.numpy() / max(float(heat.abs().max()), 1e-30))
    strength = np.asarray(scaled.resize(gray.size, Image.Resampling.BICUBIC)).clip(-1, 1)[..., None]
    color = np.where(strength < 0, _LOWERS, _RAISES)
    opacity = _OPACITY * np.abs(strength)
    pixels = (1 - opacity) * np.asarray(gray)[..., None] + opacity * color
    return Image.fromarray(pixels.round().astype(np.uint8))


def grayscale(inputs: Tensor, preprocess: Callable[[Image.Image], Tensor]) -> Gray:
    """Return preprocessed images (n, c, h, w) as gray values in [0, 1], (n, h, w)."""
    return visible(inputs, preprocess).mean(1).float().numpy()


def image_of(pixels: Tensor) -> Image.Image:
    """Return pixels (3, H, W) or (1, H, W) in [0, 1] as an image in RGB."""
    values = np.asarray(255 * pixels.expand(3, -1, -1).movedim(0, 2).clamp(0, 1).cpu())
    return Image.fromarray(values.round().astype(np.uint8))


def visible(inputs: Tensor, preprocess: Callable[[Image.Image], Tensor]) -> Tensor:
    """Return preprocessed images (n, c, h, w) as pixels in [0, 1]."""
    # Between these two, a normalization maps the values of pixels.
    black, white = (preprocess(Image.new("RGB", (256, 256), color)) for color in ("black", "white"))
    low, high = (image.mean((1, 2), keepdim=True) for image in (black, white))
    if not bool((high > low).all()):
        low, high = inputs.amin(), inputs.amax()
    return ((inputs - low) / (high - low).clamp(min=1e-6)).clamp(0, 1)


def neighbor_picture(neighbor: Neighbor, id_: str) -> Picture | None:
    """Return the thumbnail of a similar image; None if there is none, or it is damaged."""
    with suppress(ItemError):
        image = neighbor.image()
        return None if image is None else thumbnail(image, id_)
    return None
