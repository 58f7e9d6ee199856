"""Fabricated images, and the reproduction on them."""

from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from featnorm.__main__ import COMMANDS
from featnorm.cli.app import run_command
from featnorm.paper import scoring
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


def assert_resumes_after_training(table, folder, root, monkeypatch):
    """Interrupt a table between the training of a network and its scores; the rerun does not train it again.

    ``folder`` is the network's, ``out / scale / name``.
    """
    out = folder.parents[1]

    def die(*_args, **_options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(scoring, "score", die)
        with pytest.raises(KeyboardInterrupt):
            reproduce(table, root, out)
    kept = (folder / "checkpoint.pt").read_bytes()
    assert reproduce(table, root, out).exit_code == 0
    assert (folder / "checkpoint.pt").read_bytes() == kept
