"""Fabricated images, and the reproduction on them."""

from types import SimpleNamespace

import numpy as np
from PIL import Image

from featnorm.__main__ import COMMANDS
from featnorm.cli.app import run_command
from featnorm.paper.study import Context
from featnorm.runtime import Runtime


def write_images(folder, count, seed, size=32, shift=0):
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    for i in range(count):
        pixels = rng.integers(0, 100, (size, size, 3)) + shift
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i:03}.png")


def context(precision="32-true", *, root=None, weights=None, out=None):
    """Where studies run, without progress bars."""
    runtime = Runtime(precision=precision, progress=False)
    return Context("laptop", root, weights, out, runtime, {"date": "today"})


def reproduce(name, root, out, *options):
    """Run ``featnorm reproduce`` with errors as they are raised."""
    command = ["reproduce", name, "--data-root", str(root), "--out", str(out), "--device", "cpu"]
    exit_code = 0
    try:
        run_command([*command, *map(str, options)], COMMANDS)
    except SystemExit as end:
        exit_code = end.code
    return SimpleNamespace(exit_code=exit_code)
