"""How long a network must be trained without labels until its norm detects (paper 6.4, as its Figure 9a).

The paper follows NAN over training by cross entropy. Here a MoCo-v2 network of one class of CIFAR-10, as those
of Table 4 but of all images of the class, is asked about the test images before its training and on its way.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from featnorm.detectors import KNN, NAN, SSD, L1Norm, Sparsity
from featnorm.metrics import auroc
from featnorm.paper.cifar10 import keep_result, kept_result
from featnorm.paper.explanations import CLASSES
from featnorm.paper.label_free import short
from featnorm.paper.numbers import numbers
from featnorm.paper.one_class import PAPER_ROWS, Images
from featnorm.paper.panels import Line, Panel, panel_figure
from featnorm.paper.systems import MoCo
from featnorm.paper.tables import Table, distinct
from featnorm.training import train
from featnorm.training.runs import log, read_log

NAME = "moco-length"
_DATA = "CIFAR-10"
_LOOKS = "looks.jsonl"


@dataclass(frozen=True)
class Scale:
    """What is trained, on which classes, and when it is asked.

    Parameters
    ----------
    name : "laptop" or "paper".
    system : the network and its training.
    classes : of CIFAR-10.
    epochs : after which of its epochs the network is asked; 0 is before its training.
    """

    name: str
    system: MoCo
    classes: tuple[str, ...]
    epochs: tuple[int, ...]


SCALES = {
    "laptop": Scale(
        "laptop",
        MoCo(16, short("MoCo-v2", 100, 256, 0.06, 24)),
        CLASSES[:2],
        (0, 1, 3, 6, 12, 25, 40, 55, 70, 80, 90, 100),
    ),
    "paper": Scale("paper", MoCo(), CLASSES, (0, 1, 3, 6, 12, 25, 50, 75, 100, 125, 150, 175, 200)),
}


def run(
    name: str,
    scale: Scale,
    images: Images,
    folder: Path,
    *,
    fabric: Any,
    environment: Mapping[str, str],
    progress: bool | None = None,
) -> dict[str, Any]:
    """Train a network on a class, or go on where its training was left, and ask it on the way.

    Parameters
    ----------
    name : of the class.
    scale : what to train, and when to ask it.
    images : see `featnorm.paper.one_class.load_images`.
    folder, fabric, environment, progress : see `featnorm.paper.one_class.run`.

    Returns
    -------
    The content of ``result.json``: what was run, and ``looks``, by epoch the training's loss and by score the
    AUROC in percent and the mean over the class and over the others.

    Raises
    ------
    ValueError
        The folder holds a run of other settings, or as `featnorm.training.train`.
    """
    system, label = scale.system, CLASSES.index(name)
    pixels, labels = images.train[_DATA]
    known = pixels[labels == label]
    pixels, labels = images.test[_DATA]
    made_with = {
        "scale": scale.name,
        "settings": asdict(system),
        "class": name,
        "epochs": list(scale.epochs),
        "seed": 0,
        "known": len(known),
        "inside": int((labels == label).sum()),
        "outside": int((labels != label).sum()),
        "images": images.facts[_DATA],
    }
    result = kept_result(folder, made_with)
    if result is not None:
        return result
    looks = folder / _LOOKS

    def look(entry: Mapping[str, Any], network: nn.Module) -> None:
        if entry["epoch"] in scale.epochs:
            found = _ask(system, network, known, pixels, labels == label, fabric)
            log(looks, {"epoch": entry["epoch"], "loss": entry["loss"], "scores": found})

    network = system.network(0)
    if not looks.exists():
        look({"epoch": 0, "loss": None}, network)
    train(
        network,
        system.inputs(known),
        None,
        system.recipe,
        folder=folder,
        fabric=fabric,
        progress=progress,
        on_epoch=look,
    )
    result = {
        **made_with,
        "looks": read_log(looks),
        "environment": dict(environment),
    }
    keep_result(folder, result)
    return result


def _ask(
    system: MoCo, network: nn.Module, known: Tensor, pixels: Tensor, inside: Tensor, fabric: Any
) -> dict[str, dict[str, float]]:
    """Return AUROC and means of the paper's scores, and of NAN's two parts, of a network trained thus far."""
    model = system.fit(network, known, [*system.detectors(), L1Norm(), Sparsity()], fabric=fabric)
    return {
        name: {
            "auroc": 100 * auroc(values[inside], values[~inside]),
            "inside": float(values[inside].double().mean()),
            "outside": float(values[~inside].double().mean()),
        }
        for name, values in system.scores(model, pixels, fabric=fabric).items()
    }


def picture(results: Sequence[Mapping[str, Any]]) -> str:
    """Return AUROC by epoch as SVG text, a panel a class."""
    drawn = [NAN(), L1Norm(), Sparsity(), KNN(results[0]["settings"]["k"]), SSD()]
    panels = []
    for result in results:
        looks = result["looks"]
        epochs = [look["epoch"] for look in looks]
        lines = [
            Line(name, [look["scores"][name]["auroc"] for look in looks], epochs, style)
            for style, name in enumerate(map(repr, drawn))
        ]
        panels.append(Panel(result["class"], "epoch of four turns", "AUROC, %", lines))
    return panel_figure([panels])


def tables(results: Sequence[Mapping[str, Any]]) -> dict[str, Table]:
    """Return "moco-length", means over the classes by epoch, and "moco-length-classes", each class by itself."""
    paper = numbers("one-class")["table4"]["rows"]
    names = list(results[0]["looks"][0]["scores"])
    means = [_row(f"{looks[0]['epoch']}", looks) for looks in zip(*(r["looks"] for r in results), strict=True)]
    theirs = (paper.get(PAPER_ROWS.get(name, name), {}).get(_DATA, "–") for name in names)
    by_class = [_row(f"{r['class']}, {look['epoch']}", [look]) for r in results for look in r["looks"]]
    return {
        NAME: Table(
            "MoCo-v2 on one class of CIFAR-10, over its training: mean AUROC ↑ in percent",
            ["Epoch", "loss", *names],
            [*means, ["the paper's, of ten classes", "–", *map(str, theirs)]],
            _notes(results),
        ),
        f"{NAME}-classes": Table(
            "MoCo-v2 on one class of CIFAR-10, by class: AUROC ↑ in percent",
            ["Class, epoch", "loss", *names],
            by_class,
        ),
    }


def _row(first: str, looks: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a row of the means over several looks."""
    losses = [look["loss"] for look in looks]
    loss = "–" if None in losses else f"{statistics.fmean(losses):.2f}"
    means = [statistics.fmean(look["scores"][name]["auroc"] for look in looks) for name in looks[0]["scores"]]
    return [first, loss, *(f"{value:.1f}" for value in means)]


def _notes(results: Sequence[Mapping[str, Any]]) -> list[str]:
    first = results[0]
    recipe = first["settings"]["recipe"]
    crop = recipe["crop"]
    small = f", views of {crop} pixels for the first {recipe['crop_share']:.0%}" if crop else ""
    known, inside = (" and ".join(f"{result[key]}" for result in results) for key in ("known", "inside"))
    last = [result["looks"][-1]["scores"] for result in results]
    norms = "; ".join(
        f"{result['class']} {scores['L1Norm()']['inside']:.3g} and {scores['L1Norm()']['outside']:.3g}"
        for result, scores in zip(results, last, strict=True)
    )
    return [
        f"scale {first['scale']}: ResNet-18 of width {first['settings']['width']}, one network a class, seed 0; "
        f"mean over {', '.join(result['class'] for result in results)}",
        f"{recipe['epochs']} epochs of SGD on {known} images in four turns each, batch "
        f"{recipe['batch_size']}, learning rate {recipe['lr']}, weight decay {recipe['weight_decay']}{small}",
        f"{first['images']}: {inside} of the class against the others",
        f"l1-norm of the class and of the others at the end: {norms}",
        *(f"{fact}: {', '.join(distinct(results, fact))}" for fact in first["environment"]),
    ]
