"""How long a network must be trained without labels until its norm detects (paper 6.4, as its Figure 9a).

The paper follows NAN over training by cross entropy. Here a MoCo-v2 network is trained on one class of CIFAR-10,
as those of Table 4 but on all images of the class, and scores the test images before its training and on its way.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from featnorm.detectors import KNN, NAN, SSD, L1Norm, Sparsity
from featnorm.metrics import auroc
from featnorm.paper.images import CLASSES
from featnorm.paper.numbers import numbers
from featnorm.paper.panels import Line, Panel, panel_figure
from featnorm.paper.recipe import short
from featnorm.paper.studies.one_class import PAPER_ROWS, Images, one_class_images
from featnorm.paper.study import Context, Study
from featnorm.paper.systems import MoCo
from featnorm.paper.tables import Result, Table, environment
from featnorm.runtime import Runtime
from featnorm.training import train
from featnorm.training.runs import log, read_log

_DATA = "CIFAR-10"
_HISTORY = "history.jsonl"


@dataclass(frozen=True)
class Scale:
    """What is trained, on which classes, and when it is scored.

    Parameters
    ----------
    model : the network and its training.
    classes : classes of CIFAR-10.
    epochs : epochs after which the network is scored; 0 is before its training.
    """

    model: MoCo
    classes: tuple[str, ...]
    epochs: tuple[int, ...]


SCALES = {
    "laptop": Scale(
        MoCo(16, short("MoCo-v2", 100, 256, 0.06, 24)),
        CLASSES[:2],
        (0, 1, 3, 6, 12, 25, 40, 55, 70, 80, 90, 100),
    ),
    "paper": Scale(MoCo(), CLASSES, (0, 1, 3, 6, 12, 25, 50, 75, 100, 125, 150, 175, 200)),
}


@dataclass(frozen=True)
class Job:
    """A class to train on."""

    name: str

    @property
    def folder(self) -> str:
        """Name of its folder."""
        return f"moco-length-{self.name}"

    def split(self, images: Images) -> tuple[Tensor, Tensor, Tensor]:
        """Return the training images of the class, all test images, and which of them are of the class."""
        label = CLASSES.index(self.name)
        pixels, labels = images.train[_DATA]
        test, test_labels = images.test[_DATA]
        return pixels[labels == label], test, test_labels == label


@dataclass(frozen=True, eq=False)
class MoCoLength(Study[Scale, Images, Job]):
    """Scores of a MoCo-v2 network over its training, for several classes.

    A result has ``history``: by epoch the loss of the training, and by score the AUROC in percent and the means
    over the class and over the others.
    """

    page: ClassVar[str] = "one-class"
    scales: ClassVar[Mapping[str, Scale]] = SCALES

    def load(self, scale: Scale, context: Context) -> Images:
        return context.once(one_class_images)

    def jobs(self, scale: Scale, inputs: Images) -> list[Job]:
        return [Job(name) for name in scale.classes]

    def settings(self, job: Job, scale: Scale, inputs: Images) -> dict[str, Any]:
        train_images, _, is_id = job.split(inputs)
        return {
            "settings": asdict(scale.model),
            "class": job.name,
            "epochs": list(scale.epochs),
            "seed": 0,
            "train_images": len(train_images),
            "id_images": int(is_id.sum()),
            "ood_images": int((~is_id).sum()),
            "images": inputs.facts[_DATA],
        }

    def run(self, job: Job, scale: Scale, inputs: Images, folder: Path, context: Context) -> dict[str, Any]:
        model = scale.model
        train_images, test, is_id = job.split(inputs)
        file = folder / _HISTORY

        def record(entry: Mapping[str, Any], network: nn.Module) -> None:
            if entry["epoch"] in scale.epochs:
                scores = _measure(model, network, train_images, test, is_id, context.runtime)
                log(file, {"epoch": entry["epoch"], "loss": entry["loss"], "scores": scores})

        network = model.network(0)
        if not file.exists():
            record({"epoch": 0, "loss": None}, network)
        train(
            network,
            model.inputs(train_images),
            None,
            model.recipe,
            folder=folder,
            runtime=context.runtime,
            on_epoch=record,
        )
        return {"history": read_log(file)}

    def tables(self, content: Sequence[Result]) -> dict[str, Table]:
        """See `Study`; means over the classes by epoch, and each class by itself."""
        paper = numbers("one-class")["table4"]["rows"]
        names = list(content[0]["history"][0]["scores"])
        epochs = zip(*(result["history"] for result in content), strict=True)
        means = [_row(f"{entries[0]['epoch']}", entries) for entries in epochs]
        theirs = (paper.get(PAPER_ROWS.get(name, name), {}).get(_DATA, "–") for name in names)
        by_class = [_row(f"{r['class']}, {entry['epoch']}", [entry]) for r in content for entry in r["history"]]
        return {
            self.name: Table(
                f"{self.title}, over its training: mean AUROC ↑ in percent",
                ["Epoch", "loss", *names],
                [*means, ["the paper's, of ten classes", "–", *map(str, theirs)]],
                _notes(content),
            ),
            f"{self.name}-classes": Table(
                f"{self.title}, by class: AUROC ↑ in percent", ["Class, epoch", "loss", *names], by_class
            ),
        }

    def pictures(self, content: Sequence[Result]) -> dict[str, str]:
        """See `Study`; AUROC by epoch, one panel per class."""
        drawn = [NAN(), L1Norm(), Sparsity(), KNN(content[0]["settings"]["k"]), SSD()]
        panels = []
        for result in content:
            history = result["history"]
            epochs = [entry["epoch"] for entry in history]
            lines = [
                Line(name, [entry["scores"][name]["auroc"] for entry in history], epochs, style)
                for style, name in enumerate(map(repr, drawn))
            ]
            panels.append(Panel(result["class"], "epoch of four rotations", "AUROC, %", lines))
        return {self.name: panel_figure([panels])}


def _measure(
    model: MoCo, network: nn.Module, train_images: Tensor, test: Tensor, is_id: Tensor, runtime: Runtime
) -> dict[str, dict[str, float]]:
    """Return AUROC and means of the paper's scores, and of NAN's two parts, for a network in training."""
    fitted = model.fit(network, train_images, [*model.detectors(), L1Norm(), Sparsity()], runtime)
    return {
        name: {
            "auroc": 100 * auroc(values[is_id], values[~is_id]),
            "id_mean": float(values[is_id].double().mean()),
            "ood_mean": float(values[~is_id].double().mean()),
        }
        for name, values in model.scores(fitted, test, runtime=runtime).items()
    }


def _row(first: str, entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a row of means over several entries."""
    losses = [entry["loss"] for entry in entries]
    loss = "–" if None in losses else f"{statistics.fmean(losses):.2f}"
    means = [
        statistics.fmean(entry["scores"][name]["auroc"] for entry in entries) for name in entries[0]["scores"]
    ]
    return [first, loss, *(f"{value:.1f}" for value in means)]


def _notes(results: Sequence[Result]) -> list[str]:
    first = results[0]
    recipe = first["settings"]["recipe"]
    crop = recipe["crop"]
    small = f", views of {crop} pixels for the first {recipe['crop_share']:.0%}" if crop else ""
    train_images, id_images = (
        " and ".join(f"{result[key]}" for result in results) for key in ("train_images", "id_images")
    )
    last = [result["history"][-1]["scores"] for result in results]
    norms = "; ".join(
        f"{result['class']} {scores['L1Norm()']['id_mean']:.3g} and {scores['L1Norm()']['ood_mean']:.3g}"
        for result, scores in zip(results, last, strict=True)
    )
    return [
        f"scale {first['scale']}: ResNet-18 of width {first['settings']['width']}, one network per class, seed 0; "
        f"mean over {', '.join(result['class'] for result in results)}",
        f"{recipe['epochs']} epochs of SGD on {train_images} images in four rotations each, batch "
        f"{recipe['batch_size']}, learning rate {recipe['lr']}, weight decay {recipe['weight_decay']}{small}",
        f"{first['images']}: {id_images} of the class against the others",
        f"l1-norm of the class and of the others at the end: {norms}",
        *environment(results),
    ]


MoCoLength("moco-length", "MoCo-v2 on one class of CIFAR-10", duration="70 min")
