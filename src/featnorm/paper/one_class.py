"""One-class classification, the paper's Table 4: CIFAR-10's ten classes, and CIFAR-100's twenty super-classes.

A system is trained on the training images of one class; that class of the test images is in-distribution, and all
others of them are OOD. `Scale.systems` maps names to systems: one more there is one more in the table, with a row
for each of its scores.
"""

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from featnorm.inputs import DataError, open_source
from featnorm.metrics import auroc
from featnorm.paper.cifar10 import SIDE, keep_result, kept_result, labelled
from featnorm.paper.explanations import CLASSES
from featnorm.paper.label_free import short
from featnorm.paper.numbers import numbers
from featnorm.paper.probe import spaced
from featnorm.paper.recipe import PaperRecipe
from featnorm.paper.systems import CSI, GOAD, OCGAN, SVM, AnoGAN, DeepSVDD, Geom, MoCo, System
from featnorm.paper.tables import Table, distinct

TABLES = ("table4",)

#: CIFAR-100's (Krizhevsky, 2009); its classes are numbered in the order of the alphabet.
SUPER_CLASSES = {
    "aquatic mammals": ("beaver", "dolphin", "otter", "seal", "whale"),
    "fish": ("aquarium_fish", "flatfish", "ray", "shark", "trout"),
    "flowers": ("orchid", "poppy", "rose", "sunflower", "tulip"),
    "food containers": ("bottle", "bowl", "can", "cup", "plate"),
    "fruit and vegetables": ("apple", "mushroom", "orange", "pear", "sweet_pepper"),
    "household electrical devices": ("clock", "keyboard", "lamp", "telephone", "television"),
    "household furniture": ("bed", "chair", "couch", "table", "wardrobe"),
    "insects": ("bee", "beetle", "butterfly", "caterpillar", "cockroach"),
    "large carnivores": ("bear", "leopard", "lion", "tiger", "wolf"),
    "large man-made outdoor things": ("bridge", "castle", "house", "road", "skyscraper"),
    "large natural outdoor scenes": ("cloud", "forest", "mountain", "plain", "sea"),
    "large omnivores and herbivores": ("camel", "cattle", "chimpanzee", "elephant", "kangaroo"),
    "medium-sized mammals": ("fox", "porcupine", "possum", "raccoon", "skunk"),
    "non-insect invertebrates": ("crab", "lobster", "snail", "spider", "worm"),
    "people": ("baby", "boy", "girl", "man", "woman"),
    "reptiles": ("crocodile", "dinosaur", "lizard", "snake", "turtle"),
    "small mammals": ("hamster", "mouse", "rabbit", "shrew", "squirrel"),
    "trees": ("maple_tree", "oak_tree", "palm_tree", "pine_tree", "willow_tree"),
    "vehicles 1": ("bicycle", "bus", "motorcycle", "pickup_truck", "train"),
    "vehicles 2": ("lawn_mower", "rocket", "streetcar", "tank", "tractor"),
}
_NAMES = {"CIFAR-10": tuple(CLASSES), "CIFAR-100": tuple(SUPER_CLASSES)}

#: The rows of the paper's table that ours stand beside.
PAPER_ROWS = {
    "OC-SVM on pixels": "OC-SVM",
    "OC-SVM on an autoencoder": "OC-SVM",
    "Geom, softmax sum": "",
    "CSI()": "CSI",
    "Views(NAN())": "NAN",
    "KNN()": "KNN",
    "SSD()": "SSD",
    "KNN() / Views(NAN())": "KNN + NAN",
    "SSD() / Views(NAN())": "SSD + NAN",
}


@dataclass(frozen=True)
class Scale:
    """The systems, and how many images they are trained and tried on.

    Parameters
    ----------
    name : "laptop" or "paper".
    systems : by name.
    known, test : training images and test images of each class, evenly spaced; None for all.
    """

    name: str
    systems: Mapping[str, System[Any]]
    known: int | None = None
    test: int | None = None


#: As their authors train them.
_PAPER: dict[str, System[Any]] = {
    "OC-SVM": SVM(),
    "Deep-SVDD": DeepSVDD(),
    "AnoGAN": AnoGAN(),
    "OCGAN": OCGAN(),
    "Geom": Geom(),
    "GOAD": GOAD(),
    "CSI": CSI(),
    "MoCo-v2": MoCo(),
}
_LAPTOP: dict[str, System[Any]] = {
    "OC-SVM": SVM(autoencoder_epochs=24, autoencoder_drop=18, batch_size=50, lr=1e-3),
    "Deep-SVDD": DeepSVDD(autoencoder_epochs=24, autoencoder_drop=18, epochs=12, drop=8, batch_size=50, lr=1e-3),
    "AnoGAN": AnoGAN(width=16, epochs=60, batch_size=50, search_steps=60, search_lr=0.05),
    "OCGAN": OCGAN(width=16, epochs=40, batch_size=50),
    "Geom": Geom(
        width=1, recipe=PaperRecipe(epochs=2, batch_size=128, optimizer="adamw", lr=3e-3, weight_decay=5e-4)
    ),
    "GOAD": GOAD(width=1, epochs=2, lr=3e-3),
    "CSI": CSI(16, short("CSI", 10, 32, 0.1, 24)),
    # A queue that is small against the four turns of 500 images: MoCo collapses where it holds most of them.
    "MoCo-v2": MoCo(16, replace(short("MoCo-v2", 20, 128, 0.06, 24), queue=512)),
}
SCALES = {"laptop": Scale("laptop", _LAPTOP, known=500, test=50), "paper": Scale("paper", _PAPER)}


@dataclass(frozen=True)
class Task:
    """A system and the class that it is trained on."""

    system: str
    data: str
    label: int

    @property
    def name(self) -> str:
        """The name of the class."""
        return _NAMES[self.data][self.label]

    @property
    def folder(self) -> str:
        """A name for its folder."""
        return f"one-class-{self.system}-{self.data}-{self.name}".replace(" ", "_")


@dataclass
class Images:
    """The images of the benchmark by data set, labelled by the classes of the tasks, and where they came from."""

    train: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)  # (n, 3, 32, 32) uint8, (n,)
    test: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    facts: dict[str, str] = field(default_factory=dict)  # data set -> where from and how many
    missing: dict[str, str] = field(default_factory=dict)  # data set -> why it could not be had


def load_images(root: Path | None, *, progress: bool | None = None) -> Images:
    """Decode CIFAR-10, and CIFAR-100 where it can be had.

    Raises
    ------
    DataError
        CIFAR-10 cannot be had, or an image cannot be read.
    """
    images = Images()
    fine = sorted(name for names in SUPER_CLASSES.values() for name in names)
    coarse = {name: i for i, names in enumerate(SUPER_CLASSES.values()) for name in names}
    for data, name, classes in (("CIFAR-10", "cifar10", len(CLASSES)), ("CIFAR-100", "cifar100", len(fine))):
        # A root that somebody filled is not downloaded to.
        if root is not None and (root / "cifar10").is_dir() and not any(root.glob(f"{name}*")):
            images.missing[data] = (
                f"not under the data root: put {name}/train.parquet and {name}/test.parquet there, labelled by "
                f"its {classes} classes in alphabetical order, or leave --data-root out to download it"
            )
            continue
        try:
            sources = [open_source(f"{name}:{split}", root=root) for split in ("train", "test")]
        except DataError as error:
            if data == "CIFAR-10":
                raise
            images.missing[data] = str(error)
            continue
        for source, part in zip(sources, (images.train, images.test), strict=True):
            pixels, labels = labelled(source, SIDE, classes=classes, progress=progress)
            if data == "CIFAR-100":
                labels = torch.tensor([coarse[fine[label]] for label in labels.tolist()])
            part[data] = pixels, labels
        images.facts[data] = ", ".join(f"{source.title}, {len(source)}" for source in sources)
    return images


def tasks(scale: Scale, images: Images) -> list[Task]:
    """Return what the table is made from: every system on every class of the data sets that are here."""
    return [
        Task(system, data, label)
        for system in scale.systems
        for data in images.train
        for label in range(len(_NAMES[data]))
    ]


def run(
    task: Task,
    scale: Scale,
    images: Images,
    folder: Path,
    *,
    fabric: Any,
    environment: Mapping[str, str],
    progress: bool | None = None,
) -> dict[str, Any]:
    """Train a system on one class and score the test images, where its folder has no result yet.

    Parameters
    ----------
    task, scale : what to train.
    images : see `load_images`.
    folder : of this run, for checkpoints and ``result.json``.
    fabric : a `lightning_fabric.Fabric` of one process.
    environment : facts of versions, machine and date, which are kept with the result.
    progress : show progress bars; None for where there is a terminal.

    Returns
    -------
    The content of ``result.json``: what was run, ``auroc`` in percent by name of the score, and how long it took
    since the training began or went on.

    Raises
    ------
    ValueError
        The folder holds a run of other settings, or as `featnorm.paper.systems.System.train`.
    """
    system = scale.systems[task.system]
    pixels, labels = images.train[task.data]
    known = pixels[_of_class(labels, task.label, scale.known)]
    pixels, labels = images.test[task.data]
    inside, outside = (
        pixels[torch.cat([_of_class(labels, label, scale.test) for label in chosen])]
        for chosen in ([task.label], [k for k in range(len(_NAMES[task.data])) if k != task.label])
    )
    made_with = {
        "scale": scale.name,
        "system": task.system,
        "settings": asdict(system),
        "data": task.data,
        "class": task.name,
        "seed": 0,
        "known": len(known),
        "inside": len(inside),
        "outside": len(outside),
        "images": images.facts[task.data],
    }
    result = kept_result(folder, made_with)
    if result is not None:
        return result
    began = time.perf_counter()
    model = system.train(known, folder=folder, fabric=fabric, progress=progress)
    trained = time.perf_counter()
    scores = system.scores(model, torch.cat([inside, outside]), fabric=fabric, progress=progress)
    result = {
        **made_with,
        "auroc": {
            name: 100 * auroc(values[: len(inside)], values[len(inside) :]) for name, values in scores.items()
        },
        "train_seconds": trained - began,
        "score_seconds": time.perf_counter() - trained,
        "environment": dict(environment),
    }
    keep_result(folder, result)
    return result


def _of_class(labels: Tensor, label: int, most: int | None) -> Tensor:
    """Return the rows of a class, evenly spaced where there are more than so many."""
    return spaced((labels == label).nonzero()[:, 0], most)


def summary(results: Sequence[Mapping[str, Any]], planned: Sequence[Task], images: Images) -> dict[str, Any]:
    """Return what `tables` is made from: the results, what of the plan has none yet, and the data sets without."""
    done = {(result["system"], result["data"], result["class"]) for result in results}
    left: dict[str, int] = {}
    for task in planned:
        if (task.system, task.data, task.name) not in done:
            key = f"{task.system} on {task.data}"
            left[key] = left.get(key, 0) + 1
    return {"results": list(results), "left": left, "missing": images.missing}


def tables(content: Mapping[str, Any]) -> dict[str, Table]:
    """Return "table4", the means over the classes, and "table4-classes", of a content that `summary` returned.

    A score whose classes of a data set are not all there has no mean of it.
    """
    results = content["results"]
    paper = numbers("one-class")["table4"]
    found: dict[str, dict[str, dict[str, float]]] = {}
    for result in results:
        for row, value in result["auroc"].items():
            found.setdefault(row, {}).setdefault(result["data"], {})[result["class"]] = value
    rows = []
    for row, sets in found.items():
        theirs = paper["rows"].get(PAPER_ROWS.get(row, row), {})
        cells = [row]
        for data, names in _NAMES.items():
            values = sets.get(data, {})
            whole = len(values) == len(names)
            cells += [f"{statistics.fmean(values.values()):.1f}" if whole else "–", f"{theirs.get(data, '–')}"]
        rows.append(cells)
    shown = {PAPER_ROWS.get(row, row) for row in found}
    for row, theirs in paper["rows"].items():
        if row not in shown:
            rows.append([row, *(cell for data in _NAMES for cell in ("–", f"{theirs.get(data, '–')}"))])
    first = {result["data"]: result for result in reversed(results)}
    seconds: dict[str, list[float]] = {}
    for result in results:
        seconds.setdefault(result["system"], []).append(result["train_seconds"] + result["score_seconds"])
    notes = [
        f"scale {results[0]['scale']}, one seed",
        *(
            f"{data}: {run['images']}; of {run['class']} {run['known']} to train on, and {run['inside']} to test "
            f"against {run['outside']} of the others"
            for data, run in first.items()
        ),
        *(f"without {data}: {why}" for data, why in content["missing"].items()),
        *(f"not run yet: {what}, {count} of its classes" for what, count in content["left"].items()),
        "minutes a class: " + ", ".join(f"{name} {statistics.fmean(t) / 60:.1f}" for name, t in seconds.items()),
        *(f"{fact}: {', '.join(distinct(results, fact))}" for fact in results[0]["environment"]),
    ]
    headers = ["Score", *(f"{data}, {whose}" for data in _NAMES for whose in ("ours", "paper"))]
    made = {"table4": Table("Table 4, one-class classification: mean AUROC ↑ in percent", headers, rows, notes)}
    classes = [
        (data, name) for data, names in _NAMES.items() for name in names if any(data in s for s in found.values())
    ]
    made["table4-classes"] = Table(
        "One-class classification by class: AUROC ↑ in percent",
        ["Class", *found],
        [[name, *(_cell(sets.get(data, {}).get(name)) for sets in found.values())] for data, name in classes],
    )
    return made


def _cell(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"
