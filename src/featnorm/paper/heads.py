"""Heads on one frozen backbone, that of the packaged network.

The backbone runs once on every image of the CIFAR-10 benchmark, not augmented; heads are trained on its features.
"""

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from featnorm._utils.layout import fast_layout
from featnorm.detectors import Detector
from featnorm.evaluation import compare
from featnorm.fitting import features_behind
from featnorm.models import ProjectionHead, load_model
from featnorm.models.heads import Activation
from featnorm.paper.images import CLASSES, Images, as_pixels, cifar10_images
from featnorm.paper.recipe import PaperRecipe
from featnorm.paper.scoring import inactive, percentages
from featnorm.paper.study import Context
from featnorm.runtime import Runtime
from featnorm.training import train

NETWORK = "cifar10-resnet18"
#: Default recipe of the heads.
FROZEN = PaperRecipe(epochs=20, batch_size=256, optimizer="sgd", lr=0.06)


@torch.no_grad()
def pooled_features(context: Context) -> Images:
    """Return the backbone's features (n, D) in place of the benchmark's images."""
    images = context.once(cifar10_images)
    backbone = fast_layout(load_model(NETWORK)[:2])

    def features(pixels: Tensor) -> Tensor:
        return torch.cat([backbone(as_pixels(batch)) for batch in pixels.split(250)])

    train, test = ((features(pixels), labels) for pixels, labels in (images.train, images.test))
    return Images(train, test, {name: features(pixels) for name, pixels in images.ood.items()}, images.facts)


def fit_and_score(
    pooled: Images,
    recipe: PaperRecipe,
    detectors: Sequence[Detector],
    *,
    hidden: int | None = 512,
    activation: Activation = "relu",
    temperature: float = 0.1,
    seed: int = 0,
    progress: bool | None = None,
) -> dict[str, Any]:
    """Train a head, and score every set of features with it.

    Parameters
    ----------
    pooled : see `pooled_features`.
    recipe, seed : settings of the training.
    detectors : the detectors.
    hidden, activation, temperature : see `featnorm.models.ProjectionHead`.
    progress : whether to show a progress bar. Default: yes.

    Returns
    -------
    Last loss and accuracy of the training, its seconds, and of what `featnorm.paper.scoring.score` returns
    ``accuracy``, ``scores``, ``excluded`` and ``inactive``.
    """
    began = time.perf_counter()
    features, labels = pooled.train
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = ProjectionHead(
            features.shape[1], len(CLASSES), hidden=hidden, activation=activation, temperature=temperature
        )
    entries: list[dict[str, Any]] = []
    train(
        head,
        features,
        labels,
        recipe,
        runtime=Runtime(progress=progress),
        seed=seed,
        on_epoch=lambda entry, _: entries.append(entry),
    )
    seconds = time.perf_counter() - began
    test = features_behind(head, pooled.test[0])
    ood = {name: features_behind(head, values) for name, values in pooled.ood.items()}
    evaluation = compare(
        detectors,
        fit=[features_behind(head, features)] if any(detector.needs_fit for detector in detectors) else None,
        id_set=("cifar10", [test.replace(labels=pooled.test[1])]),
        ood_sets={name: [values] for name, values in ood.items()},
    )
    return {
        "train_loss": entries[-1]["loss"],
        "train_accuracy": entries[-1]["accuracy"],
        "train_seconds": seconds,
        "accuracy": evaluation.accuracy,
        "scores": percentages(evaluation),
        "excluded": evaluation.excluded,
        "inactive": {name: inactive([values]) for name, values in {"cifar10": test, **ood}.items()},
    }
