"""Pictures of images with the boxes that a detector found."""

import numpy as np
import pytest
from PIL import Image

from featnorm.report import boxes
from featnorm.report.boxes import draw_boxes
from featnorm.verdict import BoxVerdict

KNOWN = BoxVerdict((10, 20, 30, 40), "3", 0.9, 1.0, 0.4, True)
FLAGGED = BoxVerdict((25, 5, 60, 45), "7", 0.6, 0.1, 0.01, False)


def count(picture: Image.Image, color: tuple[int, int, int]) -> int:
    return int((np.asarray(picture) == color).all(2).sum())


def test_a_small_image_is_enlarged_and_its_boxes_with_it():
    picture = draw_boxes(Image.new("RGB", (64, 48)), [KNOWN])
    assert picture.size == (640, 480)
    for x, y in ((100, 300), (300, 300), (200, 200), (200, 400)):
        assert picture.getpixel((x, y)) == boxes._ID
    assert picture.getpixel((200, 300)) == (0, 0, 0)
    assert draw_boxes(Image.new("L", (1280, 700)), []).size == (1280, 700)


def test_flagged_boxes_differ_in_color_width_and_words_and_are_drawn_last():
    image = Image.new("RGB", (64, 48))
    both = draw_boxes(image, [FLAGGED, KNOWN])
    # The left edge of the flagged box crosses the upper edge of the other one.
    assert both.getpixel((251, 200)) == boxes._OOD
    assert both.tobytes() == draw_boxes(image, [KNOWN, FLAGGED]).tobytes()
    alone = [draw_boxes(image, [box]) for box in (KNOWN, FLAGGED)]
    assert count(alone[0], boxes._OOD) == count(alone[1], boxes._ID) == 0
    as_known = draw_boxes(image, [FLAGGED._replace(is_id=True)])
    assert count(alone[1], boxes._OOD) > 1.5 * count(as_known, boxes._ID)


def test_words_stay_inside_the_picture():
    box = BoxVerdict((600, 0, 640, 480), "fire engine", 0.9, 0.1, 0.0123, False)
    for one in (box, box._replace(p_value=None, is_id=None)):
        ink = np.argwhere((np.asarray(draw_boxes(Image.new("RGB", (640, 480)), [one])) > 200).all(2))
        assert len(ink) > 50
        assert ink[:, 1].max() < 640 - boxes._PADDING
        assert 0 < ink[:, 0].min() <= ink[:, 0].max() < 2 * boxes._FONT


@pytest.mark.parametrize("corners", [(0, 0, 0, 0), (-5, -5, 900, 900), (30, 30, 10, 10)])
def test_boxes_of_any_corners_are_drawn(corners):
    assert draw_boxes(Image.new("RGB", (64, 48)), [FLAGGED._replace(corners=corners)]).size == (640, 480)
