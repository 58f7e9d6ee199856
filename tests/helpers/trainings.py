"""Small images with classes, and networks for them."""

import os
import signal
from dataclasses import replace

import torch
from torch import nn

from featnorm.models import CifarResNet18, ProjectionHead, cifar_network, cifar_network_with
from featnorm.paper.networks import MLP, CSIHead
from featnorm.paper.recipe import PRESETS, PaperRecipe
from featnorm.training import Recipe, train

RECIPE = Recipe(epochs=4, batch_size=16, optimizer="sgd", lr=0.05, augment=True)
PAPER_RECIPE = PaperRecipe(**RECIPE.to_dict())


def data(n=96, classes=3, side=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(n) % classes
    images = torch.randint(0, 100, (n, 3, side, side), generator=generator, dtype=torch.uint8)
    for c in range(classes):
        images[targets == c, c] += 120
    return images, targets


def network(seed=0, classes=3):
    torch.manual_seed(seed)
    return nn.Sequential(CifarResNet18(4), ProjectionHead(32, classes, embedding=16))


def framework(recipe, seed=0):
    """A small network of the kind that the recipe's objective reads."""
    if recipe.objective == "csi":
        return cifar_network_with(lambda features: CSIHead(features, embedding=16), 4, seed=seed)
    if recipe.objective == "rotnet":
        return cifar_network_with(lambda features: nn.Linear(features, 4), 4, seed=seed)
    return cifar_network(4, None, hidden=32, embedding=16, seed=seed)


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


# Every preset for an epoch, and supcon; the losses on embeddings run over the inputs of both processes.
CASES = {
    name: replace(recipe, epochs=1, batch_size=16, augment=recipe.objective != "cross_entropy")
    for name, recipe in PRESETS.items()
} | {
    "supcon": PaperRecipe(epochs=2, batch_size=16, optimizer="sgd", lr=0.05, augment=True, objective="supcon"),
}


def plain(recipe):
    """A network without batch normalization, so that two processes compute the same as one."""
    torch.manual_seed(0)
    if recipe.objective == "csi":
        return nn.Sequential(nn.Flatten(), CSIHead(192, hidden=16, embedding=8))
    body = MLP(192, 4 if recipe.objective == "rotnet" else 3, hidden=16, embedding=8)
    if recipe.objective not in ("cross_entropy", "rotnet"):
        body.classifier = nn.Identity()
    return body


def train_until_killed(folder):
    """Train in a process that is killed at the end of the third epoch."""

    def kill(entry, _):
        if entry["epoch"] == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    train(network(), *data(), RECIPE, folder=folder, on_epoch=kill)
