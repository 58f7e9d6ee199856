"""What of the head's training moves NAN: its length, temperature, weight decay and width, on one frozen backbone.

The backbone of the network that comes with the package is asked once for every image of the CIFAR-10 benchmark;
heads are then trained on its features alone. One setting is changed at a time; none is chosen by the OOD sets.
"""

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn

from featnorm.detectors import KNN, MSP, NAN, Energy, HiddenConfidence, KLUniform, L1Norm, Sparsity
from featnorm.evaluation import compare
from featnorm.fitting import head_features
from featnorm.pretrained import load_model
from featnorm.protocols import cifar10
from featnorm.protocols.tables import Table, cell
from featnorm.training import ProjectionHead, Recipe, train

NETWORK = "cifar10-resnet18"
BASE = Recipe(epochs=20, batch_size=256, optimiser="sgd", lr=0.06)
#: What is changed -> temperature, width of the hidden layer, recipe.
SETTINGS = {
    "20 epochs, T = 0.1, width 512, no weight decay": (0.1, 512, BASE),
    **{f"{n} epochs": (0.1, 512, replace(BASE, epochs=n)) for n in (5, 100, 300)},
    **{f"T = {t}": (t, 512, BASE) for t in (0.05, 0.2, 0.5, 1.0)},
    **{f"weight decay {w:g}": (0.1, 512, replace(BASE, weight_decay=w)) for w in (5e-4, 5e-3)},
    **{f"width {d}": (0.1, d, BASE) for d in (64, 2048)},
}
_DETECTORS = (NAN, L1Norm, Sparsity, HiddenConfidence, MSP, Energy, KLUniform, KNN)


def run(images: cifar10.Images, *, environment: Mapping[str, str], progress: bool | None = None) -> dict[str, Any]:
    """Train a head by each of `SETTINGS`, one seed each, and score with it.

    Parameters
    ----------
    images : see `featnorm.protocols.cifar10.load_images`.
    environment : facts of versions, machine and date, which are kept with the result.
    progress : show progress bars; None for where there is a terminal.

    Returns
    -------
    ``rows``, one a setting, with the ``loss`` of the last epoch, ``accuracy`` on the test images, ``on``, the
    share of units that are on for these, and ``scores``, AUROC and FPR95 in percent by detector and OOD set;
    ``images`` and ``environment``.
    """
    backbone = load_model(NETWORK)[:2]
    fit, test = _pooled(backbone, images.train[0]), _pooled(backbone, images.test[0])
    ood = {name: _pooled(backbone, pixels) for name, pixels in images.ood.items()}
    rows = []
    for name, (temperature, width, recipe) in SETTINGS.items():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            head = ProjectionHead(fit.shape[1], cifar10.CLASSES, hidden=width, temperature=temperature)
        losses: list[float] = []

        def note(entry: dict[str, Any], _: nn.Module, losses: list[float] = losses) -> None:
            losses.append(entry["loss"])

        train(head, fit, images.train[1], recipe, progress=progress, on_epoch=note)
        known = head_features(head, test)
        evaluation = compare(
            [make() for make in _DETECTORS],
            fit=[head_features(head, fit)],
            id_set=("cifar10", [known.replace(labels=images.test[1])]),
            ood_sets={key: [head_features(head, values)] for key, values in ood.items()},
        )
        rows.append(
            {
                "setting": name,
                "recipe": asdict(recipe),
                "loss": losses[-1],
                "accuracy": evaluation.accuracy,
                "on": float((known.tensor("activation") > 0).float().mean()),
                "scores": cifar10.percentages(evaluation),
            }
        )
    return {"rows": rows, "images": images.facts, "environment": dict(environment)}


def tables(result: Mapping[str, Any]) -> dict[str, Table]:
    """Return the table of a result of `run`, by its name, "head-study"."""
    detectors = list(result["rows"][0]["scores"])
    rows = [
        [
            row["setting"],
            f"{row['loss']:.3f}",
            f"{row['accuracy']:.1%}",
            f"{row['on']:.0%}",
            *(cell([pair]).partition(" / ")[0] for pair in (_mean(row["scores"][name]) for name in detectors)),
        ]
        for row in result["rows"]
    ]
    notes = [
        f"heads alone, one seed each, on the frozen backbone of {NETWORK}, on images that are not augmented; "
        "every row changes one setting of the first",
        *(f"{name}: {value}" for name, value in {**result["images"], **result["environment"]}.items()),
    ]
    headers = ["Head", "training loss", "accuracy", "units on, ID", *detectors]
    title = "What of the head's training moves the scores: AUROC in percent, mean of the OOD sets"
    return {"head-study": Table(title, headers, rows, notes)}


def _mean(pairs: Mapping[str, list[float]]) -> list[float]:
    return [sum(pair[i] for pair in pairs.values()) / len(pairs) for i in range(2)]


@torch.no_grad()
def _pooled(backbone: nn.Module, images: Tensor) -> Tensor:
    """Return the backbone's features of images (n, 3, 32, 32) uint8."""
    return torch.cat([backbone(batch.float().div(255)) for batch in images.split(250)])
