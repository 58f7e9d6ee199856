"""Pictures of four colours, in noise, to fit a detector on."""

from pathlib import Path

import numpy as np
from PIL import Image


def paint(file: Path, hue: int, random: np.random.Generator) -> None:
    """Write a picture of one of four colours, in noise."""
    pixels = random.integers(0, 60, (32, 32, 3))
    pixels[:, :, :] += np.array([[180, 0, 0], [0, 180, 0], [0, 0, 180], [150, 150, 0]])[hue]
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.astype(np.uint8)).save(file)
