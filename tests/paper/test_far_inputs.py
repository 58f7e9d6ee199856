"""Each framework separates digits from photographs, after seconds of training."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import featnorm as fn
from featnorm import demo
from featnorm.models import cifar_network, cifar_network_with
from featnorm.paper.networks import CSIHead
from featnorm.paper.recipe import PRESETS
from featnorm.training import train

pytestmark = pytest.mark.slow

SIDE = 16


def pictures(values):
    """Gray images (n, 1, 8, 8) in [0, 1] as color images of 16 x 16."""
    large = nn.functional.interpolate(values.expand(-1, 3, -1, -1), (SIDE, SIDE), mode="bilinear")
    return (255 * large).round().to(torch.uint8)


@pytest.fixture(scope="module")
def sets():
    data = demo.load()
    return {
        "train": pictures(data.train[0])[:384],
        "labels": data.train[1][:384],
        "test": pictures(data.test[0])[:150],
        "ood": pictures(data.ood["photographs"])[:150],
    }


def network(name):
    if name == "CSI":
        return cifar_network_with(CSIHead, 8)
    if name == "RotNet":
        return cifar_network_with(lambda features: nn.Linear(features, 4), 8)
    return cifar_network(8, None, hidden=64)


#: Learning rate, epochs, and the detectors.
CASES = {
    "SimCLR": (0.1, 6, [fn.KNN(k=5)]),
    "MoCo-v2": (0.03, 9, [fn.KNN(k=5), fn.SSD()]),
    "RotNet": (0.1, 3, [fn.RotNet()]),
    "CIDER": (0.1, 6, [fn.KNN(k=5), fn.KNN(k=5) / fn.NAN()]),
    "CSI": (0.05, 3, [fn.CSI(augmentations=2)]),
}


@pytest.mark.parametrize("name", CASES)
def test_it_tells_far_inputs_apart(name, sets):
    lr, epochs, detectors = CASES[name]
    recipe = replace(PRESETS[name], epochs=epochs, batch_size=32, optimizer="sgd", lr=lr, scale=0.3, warmup=0.1)
    if name == "MoCo-v2":
        # So short a queue that it seldom holds the same digit, whose keys are no negatives. Views and length of
        # training with which the distances are right whatever the seed: rounding, which differs from processor to
        # processor, does as much.
        recipe = replace(recipe, queue=64, temperature=0.2, batch_size=48, scale=0.8)
    targets = sets["labels"] if name == "CIDER" else None
    losses = []
    model = train(
        network(name), sets["train"], targets, recipe, on_epoch=lambda entry, _: losses.append(entry["loss"])
    )
    assert losses[-1] < losses[1]
    loader = [part.float() / 255 for part in sets["train"].split(128)]
    for detector in detectors:
        scorer = fn.Scorer(model, detector).fit(loader)
        id_scores, ood_scores = (scorer(sets[part].float() / 255).score for part in ("test", "ood"))
        assert fn.auroc(id_scores, ood_scores) > 0.8, detector
