"""The picture of an image with the boxes that a detector found in it, and the verdict on each."""

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from featnorm.verdict import BoxVerdict

# Blue and vermilion of Okabe and Ito, which readers who are color blind can tell apart; in print, the width and
# the words of a flagged box differ too.
_ID, _OOD = (0, 114, 178), (213, 94, 0)
_FONT, _PADDING = 14, 2


def draw_boxes(image: Image.Image, boxes: Sequence[BoxVerdict], side: int = 640) -> Image.Image:
    """Draw the boxes of an image: flagged ones as not known, and all with their class and p-value.

    Parameters
    ----------
    image : image in RGB, in whose pixels the corners are.
    boxes : verdicts on its boxes. Flagged boxes are drawn last, over the others.
    side : longer side of the picture in pixels, if the image is smaller.
    """
    scale = max(1.0, side / max(image.size))
    size = (round(scale * image.width), round(scale * image.height))
    picture = image.convert("RGB").resize(size, Image.Resampling.BICUBIC if scale > 1 else Image.Resampling.BOX)
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(_FONT)
    for box in sorted(boxes, key=lambda box: box.is_id is False):
        flagged = box.is_id is False
        color = _OOD if flagged else _ID
        x1, y1, x2, y2 = (scale * corner for corner in box.corners)
        draw.rectangle((x1, y1, max(x1, x2), max(y1, y2)), outline=color, width=4 if flagged else 2)
        words = f"not known ({box.label}?)" if flagged else box.label
        if box.p_value is not None:
            words += f"  p = {box.p_value:.2g}"
        left, top, right, bottom = draw.textbbox((0, 0), words, font)
        width, height = right - left + 2 * _PADDING, bottom - top + 2 * _PADDING
        # Above the box if there is room, and always inside the picture.
        x = max(0, min(x1, picture.width - width))
        y = y1 - height if y1 >= height else y1
        draw.rectangle((x, y, x + width, y + height), fill=color)
        draw.text((x + _PADDING - left, y + _PADDING - top), words, "white", font)
    return picture
