"""The picture of an image beside the map of its positions."""

import numpy as np
import pytest
import torch

from featnorm.features import Parts
from featnorm.report.maps import draw_map, map_picture
from featnorm.verdict import Verdict


def verdict(p_values, calibrated=True):
    p = torch.tensor(p_values, dtype=torch.float64)
    parts = Parts(torch.zeros(p.numel(), dtype=torch.int64), 1, tuple(p.shape))
    p = p.flatten()
    return Verdict(p * 7, p if calibrated else None, p > 0.05 if calibrated else None, None, parts)


def test_low_p_values_are_dark_and_flagged_positions_outlined():
    drawn = np.asarray(draw_map(verdict([[1.0, 0.1], [0.02, 0.5]]), (80, 80))).astype(int)
    brightness = drawn.sum(2)
    assert brightness[20, 20] > brightness[60, 60] > brightness[20, 60] > brightness[60, 20]
    # A white line within black ones runs along the inside of the flagged quarter, at the border too.
    column = drawn[40:, 20].tolist()
    assert column[0] == [0, 0, 0]
    assert [255, 255, 255] in column[:5]
    assert column[-1] == [0, 0, 0]
    assert [255, 255, 255] not in drawn[:40].reshape(-1, 3).tolist()


@pytest.mark.parametrize("calibrated", [True, False])
@pytest.mark.parametrize("shape", [(3, 30, 20), (1, 4, 90)])
def test_the_image_is_beside_its_map(calibrated, shape):
    pixels = torch.linspace(0, 1, shape[1] * shape[2]).reshape(1, *shape[1:]).repeat(shape[0], 1, 1)
    picture = map_picture(pixels, verdict([[1.0, 0.1, 0.3], [0.9, 0.2, 0.5]], calibrated))
    height, width = (round(384 * size / max(shape[1:])) for size in shape[1:])
    assert picture.width == 2 * width + 12
    assert picture.height > height
    left = picture.crop((0, 0, width, height)).resize((shape[2], shape[1]))
    wanted = pixels.expand(3, -1, -1).movedim(0, 2).numpy()
    assert abs(np.asarray(left) / 255 - wanted).mean() < 0.05


def test_positions_of_one_score_are_drawn():
    map_picture(torch.zeros(3, 8, 8), verdict([[0.5, 0.5], [0.5, 0.5]], calibrated=False))
