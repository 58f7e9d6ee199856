"""One-class classification, the paper's Table 4: CIFAR-10's ten classes, and CIFAR-100's twenty super-classes.

A model is trained on the training images of one class; that class of the test images is in-distribution, and all
others are OOD. `Scale.models` maps names to models: one more there is one more in the table, with a row for each
of its scores.
"""

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from featnorm.inputs import DataError, open_source
from featnorm.metrics import auroc
from featnorm.paper.images import CLASSES, SIDE, labeled, note_missing, spaced
from featnorm.paper.numbers import numbers
from featnorm.paper.recipe import PaperRecipe, short
from featnorm.paper.study import Context, Study
from featnorm.paper.systems import CSI, GOAD, OCGAN, SVM, AnoGAN, DeepSVDD, Geom, MoCo, OneClassModel
from featnorm.paper.tables import Result, Table, environment

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
    """The models, and how many images they are trained and tested on.

    Parameters
    ----------
    models : models by name.
    train_images, test_images : number of training and test images of each class, evenly spaced. None: all.
    """

    models: Mapping[str, OneClassModel[Any]]
    train_images: int | None = None
    test_images: int | None = None


#: As their authors train them.
_PAPER: dict[str, OneClassModel[Any]] = {
    "OC-SVM": SVM(),
    "Deep-SVDD": DeepSVDD(),
    "AnoGAN": AnoGAN(),
    "OCGAN": OCGAN(),
    "Geom": Geom(),
    "GOAD": GOAD(),
    "CSI": CSI(),
    "MoCo-v2": MoCo(),
}
_LAPTOP: dict[str, OneClassModel[Any]] = {
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
SCALES = {"laptop": Scale(_LAPTOP, train_images=500, test_images=50), "paper": Scale(_PAPER)}


@dataclass(frozen=True)
class Job:
    """A model, and the class that it is trained on."""

    model: str
    data: str
    label: int

    @property
    def name(self) -> str:
        """Name of the class."""
        return _NAMES[self.data][self.label]

    @property
    def folder(self) -> str:
        """Name of its folder."""
        return f"one-class-{self.model}-{self.data}-{self.name}".replace(" ", "_")


@dataclass
class Images:
    """The images of the benchmark by data set, labeled by the classes of the jobs, and where they came from."""

    train: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)  # (n, 3, 32, 32) uint8, (n,)
    test: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    facts: dict[str, str] = field(default_factory=dict)  # data set -> where it is from, and number of images
    missing: dict[str, str] = field(default_factory=dict)  # data set -> why it is missing


def one_class_images(context: Context) -> Images:
    """Decode the data sets, see `load_images`; note which is missing."""
    images = load_images(context.root, progress=context.progress)
    note_missing(images.missing, context)
    return images


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
                f"not in the data root: put {name}/train.parquet and {name}/test.parquet there, labeled by "
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
            pixels, labels = labeled(source, SIDE, classes=classes, progress=progress)
            if data == "CIFAR-100":
                labels = torch.tensor([coarse[fine[label]] for label in labels.tolist()])
            part[data] = pixels, labels
        images.facts[data] = ", ".join(f"{source.title}, {len(source)}" for source in sources)
    return images


@dataclass(frozen=True, eq=False)
class OneClassStudy(Study[Scale, Images, Job]):
    """Every model on every class of the data sets.

    A result has ``auroc`` in percent by name of the score, and the seconds of training, since it began or was
    resumed, and scoring.
    """

    page: ClassVar[str] = "one-class"
    scales: ClassVar[Mapping[str, Scale]] = SCALES
    # The runs take an hour or more, in which the results so far can be read.
    grows: ClassVar[bool] = True

    def load(self, scale: Scale, context: Context) -> Images:
        return context.once(one_class_images)

    def jobs(self, scale: Scale, inputs: Images) -> list[Job]:
        return [
            Job(model, data, label)
            for model in scale.models
            for data in inputs.train
            for label in range(len(_NAMES[data]))
        ]

    def settings(self, job: Job, scale: Scale, inputs: Images) -> dict[str, Any]:
        train_images, id_images, ood_images = _select(job, scale, inputs)
        return {
            "model": job.model,
            "settings": asdict(scale.models[job.model]),
            "data": job.data,
            "class": job.name,
            "seed": 0,
            "train_images": len(train_images),
            "id_images": len(id_images),
            "ood_images": len(ood_images),
            "images": inputs.facts[job.data],
        }

    def run(self, job: Job, scale: Scale, inputs: Images, folder: Path, context: Context) -> dict[str, Any]:
        train_images, id_images, ood_images = _select(job, scale, inputs)
        model = scale.models[job.model]
        began = time.perf_counter()
        trained_model = model.train(train_images, folder=folder, runtime=context.runtime)
        trained = time.perf_counter()
        scores = model.scores(trained_model, torch.cat([id_images, ood_images]), runtime=context.runtime)
        n = len(id_images)
        return {
            "auroc": {name: 100 * auroc(values[:n], values[n:]) for name, values in scores.items()},
            "train_seconds": trained - began,
            "score_seconds": time.perf_counter() - trained,
        }

    def collect(self, results: Sequence[Result], jobs: Sequence[Job], inputs: Images) -> dict[str, Any]:
        """Return the results, the number of jobs that have none yet, and the missing data sets."""
        done = {(result["model"], result["data"], result["class"]) for result in results}
        left: dict[str, int] = {}
        for job in jobs:
            if (job.model, job.data, job.name) not in done:
                key = f"{job.model} on {job.data}"
                left[key] = left.get(key, 0) + 1
        return {"results": list(results), "left": left, "missing": inputs.missing}

    def tables(self, content: Mapping[str, Any]) -> dict[str, Table]:
        """See `Study`; means over the classes, and each class by itself.

        A score that lacks classes of a data set has no mean over it.
        """
        scores: dict[str, dict[str, dict[str, float]]] = {}
        for result in content["results"]:
            for row, value in result["auroc"].items():
                scores.setdefault(row, {}).setdefault(result["data"], {})[result["class"]] = value
        paper = numbers("one-class")["table4"]["rows"]
        rows = []
        for row, sets in scores.items():
            theirs = paper.get(PAPER_ROWS.get(row, row), {})
            cells = [row]
            for data, names in _NAMES.items():
                values = sets.get(data, {})
                complete = len(values) == len(names)
                cells += [
                    f"{statistics.fmean(values.values()):.1f}" if complete else "–",
                    f"{theirs.get(data, '–')}",
                ]
            rows.append(cells)
        shown = {PAPER_ROWS.get(row, row) for row in scores}
        for row, theirs in paper.items():
            if row not in shown:
                rows.append([row, *(cell for data in _NAMES for cell in ("–", f"{theirs.get(data, '–')}"))])
        headers = ["Score", *(f"{data}, {whose}" for data in _NAMES for whose in ("ours", "paper"))]
        present = {result["data"] for result in content["results"]}
        classes = [
            [name, *(_cell(sets.get(data, {}).get(name)) for sets in scores.values())]
            for data, names in _NAMES.items()
            if data in present
            for name in names
        ]
        return {
            self.name: Table(f"{self.title}: mean AUROC ↑ in percent", headers, rows, _notes(content)),
            f"{self.name}-classes": Table(
                "One-class classification by class: AUROC ↑ in percent", ["Class", *scores], classes
            ),
        }


def _select(job: Job, scale: Scale, images: Images) -> tuple[Tensor, Tensor, Tensor]:
    """Return the training images of a job's class, the test images of the class, and those of the others."""
    pixels, labels = images.train[job.data]
    train_images = pixels[_of_class(labels, job.label, scale.train_images)]
    pixels, labels = images.test[job.data]
    others = [label for label in range(len(_NAMES[job.data])) if label != job.label]
    id_images, ood_images = (
        pixels[torch.cat([_of_class(labels, label, scale.test_images) for label in chosen])]
        for chosen in ([job.label], others)
    )
    return train_images, id_images, ood_images


def _of_class(labels: Tensor, label: int, count: int | None) -> Tensor:
    """Return the indices of the images of a class, at most ``count`` of them, evenly spaced."""
    return spaced((labels == label).nonzero()[:, 0], count)


def _notes(content: Mapping[str, Any]) -> list[str]:
    results = content["results"]
    first = {result["data"]: result for result in reversed(results)}
    seconds: dict[str, list[float]] = {}
    for result in results:
        seconds.setdefault(result["model"], []).append(result["train_seconds"] + result["score_seconds"])
    return [
        f"scale {results[0]['scale']}, one seed",
        *(
            f"{data}: {run['images']}; of {run['class']} {run['train_images']} to train on, {run['id_images']} "
            f"to test against {run['ood_images']} of the others"
            for data, run in first.items()
        ),
        *(f"without {data}: {why}" for data, why in content["missing"].items()),
        *(f"not run yet: {what}, {count} of its classes" for what, count in content["left"].items()),
        "minutes per class: " + ", ".join(f"{name} {statistics.fmean(t) / 60:.1f}" for name, t in seconds.items()),
        *environment(results),
    ]


def _cell(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


OneClassStudy("table4", "Table 4, one-class classification", duration="70 min")
