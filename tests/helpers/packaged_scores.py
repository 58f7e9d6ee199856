"""Scores of the packaged network on every image of three sets, computed once and kept in a file next to this one.

``python tests/helpers/packaged_scores.py DATA_ROOT`` computes them again, for another network of that name.
"""

import sys
from pathlib import Path

import numpy as np

import featnorm as fn
from featnorm._utils.layout import fast_layout
from featnorm.inputs import SlicedSource, image_tensor, open_source

NAME = "cifar10-resnet18"
SETS = ("cifar10:test", "ood32/textures", "ood32/mnist")
DETECTORS = {repr(d): d for d in (fn.NAN(), fn.L1Norm(), fn.Energy(), fn.MSP(), fn.HiddenConfidence())}
FILE = Path(__file__).with_name(f"{NAME}.npz")


def compute(spec, root, step=1):
    """Return the scores (n, detectors) of every ``step``-th image of a set, and the predicted classes (n,)."""
    tap = fn.FeatureTap(fast_layout(fn.load_model(NAME)))
    source = open_source(spec, root=root)
    pixels = image_tensor(SlicedSource(source, range(0, len(source), step), spec), 32, progress=False)
    features = fn.Features.cat([tap(fast_layout(batch).float() / 255) for batch in pixels.split(500)])
    scores = [detector.score(features).float() for detector in DETECTORS.values()]
    return np.stack(scores, 1), features.tensor("logits").argmax(1).byte().numpy()


def load():
    """Return what `compute` returned for each set."""
    with np.load(FILE) as arrays:
        return {spec: (arrays[f"{spec} scores"], arrays[f"{spec} classes"]) for spec in SETS}


if __name__ == "__main__":
    arrays = {}
    for spec in SETS:
        arrays[f"{spec} scores"], arrays[f"{spec} classes"] = compute(spec, sys.argv[1])
    np.savez_compressed(FILE, **arrays)
