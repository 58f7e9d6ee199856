"""Heads on one frozen backbone: the ablations of the head at laptop scale, and what of its training moves NAN.

The backbone of the network that comes with the package is asked once for every image of the CIFAR-10 benchmark;
heads are then trained on its features alone, on images that are not augmented.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from featnorm._utils.layout import fast_layout
from featnorm.detectors import KNN, MSP, NAN, Detector, Energy, HiddenConfidence, KLUniform, L1Norm, Sparsity
from featnorm.evaluation import compare
from featnorm.fitting import features_behind
from featnorm.models import ProjectionHead, load_model
from featnorm.paper import cifar10
from featnorm.paper.cifar10 import FROZEN, Variant
from featnorm.paper.recipe import PaperRecipe
from featnorm.paper.tables import Table, cell
from featnorm.training import train

NETWORK = "cifar10-resnet18"
#: What is changed -> temperature, width of the hidden layer, recipe. One setting is changed at a time; none is
#: chosen by the OOD sets.
SETTINGS = {
    "20 epochs, T = 0.1, width 512, no weight decay": (0.1, 512, FROZEN),
    **{f"{n} epochs": (0.1, 512, replace(FROZEN, epochs=n)) for n in (5, 100, 300)},
    **{f"T = {t}": (t, 512, FROZEN) for t in (0.05, 0.2, 0.5, 1.0)},
    **{f"weight decay {w:g}": (0.1, 512, replace(FROZEN, weight_decay=w)) for w in (5e-4, 5e-3)},
    **{f"width {d}": (0.1, d, FROZEN) for d in (64, 2048)},
}
_DETECTORS = (NAN, L1Norm, Sparsity, HiddenConfidence, MSP, Energy, KLUniform, KNN)


@dataclass(frozen=True)
class Pooled:
    """What the backbone says of the benchmark's images: features (n, D), with labels (n,) of ID."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    ood: dict[str, Tensor]
    facts: dict[str, str]


@torch.no_grad()
def pooled(images: cifar10.Images) -> Pooled:
    """Ask the backbone for the features of every image."""
    backbone = fast_layout(load_model(NETWORK)[:2])

    def ask(pixels: Tensor) -> Tensor:
        return torch.cat([backbone(fast_layout(batch).float().div(255)) for batch in pixels.split(250)])

    (train_images, train_labels), (test_images, test_labels) = images.train, images.test
    return Pooled(
        (ask(train_images), train_labels),
        (ask(test_images), test_labels),
        {name: ask(pixels) for name, pixels in images.ood.items()},
        images.facts,
    )


def run(
    job: cifar10.Job,
    known: Pooled,
    folder: Path,
    *,
    environment: Mapping[str, str],
    progress: bool | None = None,
) -> dict[str, Any]:
    """Train the head of a job and score with it, where its folder has no result yet.

    Parameters
    ----------
    job : what to train.
    known : see `pooled`.
    folder : of this run, for ``result.json``.
    environment, progress : see `study`.

    Returns
    -------
    The content of ``result.json``, as `featnorm.paper.cifar10.run` has it.

    Raises
    ------
    ValueError
        The folder holds a run of other settings.
    """
    made_with = {
        "scale": "laptop",
        "backbone": NETWORK,
        "variant": asdict(job.variant),
        "recipe": job.recipe.to_dict(),
        "seed": job.seed,
        "images": known.facts,
    }
    result = cifar10.kept_result(folder, made_with)
    if result is None:
        outcome = _fit_and_score(
            known, job.variant, job.recipe, cifar10.quick_detectors(), seed=job.seed, progress=progress
        )
        result = {**made_with, **outcome, "environment": dict(environment)}
        cifar10.keep_result(folder, result)
    return result


def study(
    images: cifar10.Images, *, environment: Mapping[str, str], progress: bool | None = None
) -> dict[str, Any]:
    """Train a head by each of `SETTINGS`, one seed each, and score with it.

    Parameters
    ----------
    images : see `featnorm.paper.cifar10.load_images`.
    environment : facts of versions, machine and date, which are kept with the result.
    progress : show progress bars; None for where there is a terminal.

    Returns
    -------
    ``rows``, one a setting: its recipe, loss and accuracy on the images trained on, ``accuracy`` on the test
    images, ``inactive``, the share of units that are off, by set, and ``scores``, AUROC and FPR95 in percent by
    detector and OOD set; ``images`` and ``environment``.
    """
    known = pooled(images)
    rows = []
    for name, (temperature, width, recipe) in SETTINGS.items():
        chosen = [make() for make in _DETECTORS]
        outcome = _fit_and_score(known, Variant(width), recipe, chosen, temperature=temperature, progress=progress)
        rows.append({"setting": name, "recipe": recipe.to_dict(), **outcome})
    return {"rows": rows, "images": images.facts, "environment": dict(environment)}


def _fit_and_score(
    known: Pooled,
    variant: Variant,
    recipe: PaperRecipe,
    chosen: Sequence[Detector],
    *,
    temperature: float = 0.1,
    seed: int = 0,
    progress: bool | None = None,
) -> dict[str, Any]:
    began = time.perf_counter()
    values, labels = known.train
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = ProjectionHead(
            values.shape[1],
            cifar10.CLASSES,
            hidden=variant.hidden,
            activation=variant.activation,
            temperature=temperature,
        )
    last: dict[str, Any] = {}

    def note(entry: dict[str, Any], _: nn.Module) -> None:
        last.update(entry)

    train(head, values, labels, recipe, seed=seed, progress=progress, on_epoch=note)
    seconds = time.perf_counter() - began
    test = features_behind(head, known.test[0])
    ood = {name: features_behind(head, features) for name, features in known.ood.items()}
    evaluation = compare(
        chosen,
        fit=[features_behind(head, values)] if any(detector.needs_fit for detector in chosen) else None,
        id_set=("cifar10", [test.replace(labels=known.test[1])]),
        ood_sets={name: [features] for name, features in ood.items()},
    )
    return {
        "train_loss": last["loss"],
        "train_accuracy": last["accuracy"],
        "train_seconds": seconds,
        "accuracy": evaluation.accuracy,
        "scores": cifar10.percentages(evaluation),
        "left_out": evaluation.excluded,
        "inactive": {name: cifar10.inactive([features]) for name, features in {"cifar10": test, **ood}.items()},
    }


def tables(result: Mapping[str, Any]) -> dict[str, Table]:
    """Return the table of a result of `study`, by its name, "head-study"."""
    detectors = list(result["rows"][0]["scores"])
    rows = [
        [
            row["setting"],
            f"{row['train_loss']:.3f}",
            f"{row['accuracy']:.1%}",
            f"{1 - row['inactive']['cifar10']:.0%}",
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
