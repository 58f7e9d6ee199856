"""CIFAR-10 by training frameworks: Table 3 without labels, and Table 11 with CIDER (paper 6.3, C.1, D.6).

The data is that of `featnorm.paper.images`. Each framework trains one network, which is scored by the detectors
that it is for.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from featnorm.detectors import CSI, KNN, NAN, Detector, RotNet
from featnorm.metrics import evaluate
from featnorm.models import cifar_network, cifar_network_with
from featnorm.paper.images import Images, cifar10_images, load_images, note_missing, spaced
from featnorm.paper.networks import CSIHead
from featnorm.paper.numbers import numbers
from featnorm.paper.recipe import PRESETS, PaperRecipe, short
from featnorm.paper.scoring import train_and_score
from featnorm.paper.study import Context, Study
from featnorm.paper.systems import GOAD
from featnorm.paper.systems.frameworks import moco_detectors
from featnorm.paper.tables import MEASURES, Result, Table, compared, facts, left_out


@dataclass(frozen=True)
class Scale:
    """How large the networks are, and how long they are trained.

    Parameters
    ----------
    width : channels of the first stage of the ResNet-18.
    recipes : settings by framework.
    goad : the one-class model that has a row in Table 3.
    fit_images
        Number of training images for a detector that runs the model again when it is fitted, and for GOAD, which
        trains on 72 transformations of each. None: all.
    """

    width: int
    recipes: Mapping[str, PaperRecipe]
    goad: GOAD
    fit_images: int | None


SCALES = {
    "laptop": Scale(
        32,
        {
            "MoCo-v2": short("MoCo-v2", 12, 256, 0.06, 24),
            "RotNet": short("RotNet", 5, 128, 0.1, 24),
            "CSI": short("CSI", 2, 128, 0.1, 20, 0.9),
            "CIDER": short("CIDER", 10, 256, 0.25, 24),
        },
        goad=GOAD(width=1, epochs=2, lr=3e-3),
        fit_images=5000,
    ),
    "paper": Scale(64, PRESETS, GOAD(), fit_images=None),
}


@dataclass(frozen=True)
class Framework:
    """A way to train a network, and the detectors that score it.

    Parameters
    ----------
    build : returns the network, for pixels in [0, 1], from a width and a seed.
    detectors : returns the detectors, with the settings of their sources.
    labels : whether it trains on labels.
    slow_fit : whether its detectors run the model again when they are fitted: forty passes per image for CSI.
    """

    build: Callable[[int, int], nn.Sequential]
    detectors: Callable[[], list[Detector]]
    labels: bool = False
    slow_fit: bool = False


def _cider_detectors() -> list[Detector]:
    return [NAN(), KNN(k=100), KNN(k=100) / NAN()]


#: The head of MoCo and CIDER is an MLP, whose hidden layer NAN reads; that of RotNet is a linear layer, as in its
#: source.
FRAMEWORKS = {
    "MoCo-v2": Framework(lambda width, seed: cifar_network(width, None, seed=seed), moco_detectors),
    "RotNet": Framework(
        lambda width, seed: cifar_network_with(lambda features: nn.Linear(features, 4), width, seed=seed),
        lambda: [RotNet()],
    ),
    "CSI": Framework(
        lambda width, seed: cifar_network_with(CSIHead, width, seed=seed), lambda: [CSI()], slow_fit=True
    ),
    "CIDER": Framework(lambda width, seed: cifar_network(width, None, seed=seed), _cider_detectors, labels=True),
}


@dataclass(frozen=True)
class Job:
    """A network to train, by a framework's recipe; or GOAD."""

    framework: str
    recipe: PaperRecipe | GOAD
    seed: int = 0

    @property
    def folder(self) -> str:
        """Name of its folder."""
        return f"{self.framework.lower()}-{self.recipe.epochs}epochs-seed{self.seed}"


@dataclass(frozen=True, eq=False)
class FrameworkStudy(Study[Scale, Images, Job]):
    """A table with the paper's rows, and others that were measured, each from the network that it is for.

    Parameters
    ----------
    frameworks : names of the frameworks.
    paper_sets : the paper's OOD sets, see `featnorm.paper.images.PAPER_SETS`. None: those of the main benchmark.
    """

    frameworks: Sequence[str]
    paper_sets: Mapping[str, str] | None = None

    page: ClassVar[str] = "label-free"
    scales: ClassVar[Mapping[str, Scale]] = SCALES

    def load(self, scale: Scale, context: Context) -> Images:
        if self.paper_sets is None:
            return context.once(cifar10_images)
        images = load_images(context.root, self.paper_sets, progress=context.progress)
        note_missing(images.missing, context)
        return images

    def jobs(self, scale: Scale, inputs: Images) -> list[Job]:
        return [Job(name, scale.goad if name == "GOAD" else scale.recipes[name]) for name in self.frameworks]

    def settings(self, job: Job, scale: Scale, inputs: Images) -> dict[str, Any]:
        if isinstance(job.recipe, GOAD):
            settings = {"width": job.recipe.width, "recipe": asdict(job.recipe)}
        else:
            settings = {"width": scale.width, "recipe": job.recipe.to_dict()}
        return {
            "framework": job.framework,
            **settings,
            "seed": job.seed,
            "images": inputs.facts,
            "fit_images": _fit_images(job, scale),
        }

    def run(self, job: Job, scale: Scale, inputs: Images, folder: Path, context: Context) -> dict[str, Any]:
        fit_images = _fit_images(job, scale)
        if isinstance(job.recipe, GOAD):
            return _run_goad(job.recipe, inputs, fit_images, job.seed, folder, context)
        framework = FRAMEWORKS[job.framework]
        return train_and_score(
            framework.build(scale.width, job.seed),
            inputs,
            framework.detectors(),
            job.recipe,
            job.seed,
            folder,
            context,
            labels=framework.labels,
            fit_images=fit_images,
            same_precision=True,
        )

    def tables(self, content: Sequence[Result]) -> dict[str, Table]:
        paper = numbers("cifar10")[self.name]
        measured = {detector: result for result in content for detector in result["scores"]}
        first = content[0]
        sets = [fact.removeprefix("OOD, ") for fact in first["images"] if fact.startswith("OOD, ")]
        rows = []
        for detector in dict.fromkeys((*paper["rows"], *measured)):
            runs = [measured[detector]] if detector in measured else []
            cells = compared(runs, detector, paper["rows"].get(detector, {}), sets)
            rows.append([detector, runs[0]["framework"] if runs else "–", *cells])
        notes = [
            f"scale {first['scale']}: ResNet-18 of width {first['width']}, one network per framework, "
            f"seed {first['seed']}",
            *(f"{result['framework']}: {_training(result)}" for result in content),
            f"the paper's: {paper['where'].partition(', ')[2]}; its number for a set is in brackets",
            *facts(content),
        ]
        notes += [note for result in content for note in left_out(result)]
        headers = ["Detector", "trained by", "Mean, ours", "Average, paper", *sets]
        return {self.name: Table(f"{self.title}: {MEASURES}", headers, rows, notes)}


def _fit_images(job: Job, scale: Scale) -> int | None:
    return scale.fit_images if isinstance(job.recipe, GOAD) or FRAMEWORKS[job.framework].slow_fit else None


def _run_goad(
    goad: GOAD, images: Images, fit_images: int | None, seed: int, folder: Path, context: Context
) -> dict[str, Any]:
    """Train GOAD on all classes as if they were one, and score every set."""
    began = time.perf_counter()
    model = goad.train(spaced(images.train[0], fit_images), folder=folder, runtime=context.runtime, seed=seed)
    trained = time.perf_counter()

    def scores(pixels: torch.Tensor) -> torch.Tensor:
        return goad.scores(model, pixels, runtime=context.runtime)["GOAD"]

    id_scores = scores(images.test[0])
    found = {name: evaluate(id_scores, scores(pixels)) for name, pixels in images.ood.items()}
    return {
        "scores": {
            "GOAD()": {name: [100 * measures.auroc, 100 * measures.fpr95] for name, measures in found.items()}
        },
        "excluded": {},
        "train_seconds": trained - began,
        "score_seconds": time.perf_counter() - trained,
    }


def _training(result: Result) -> str:
    """Return in words how a framework's network was trained, and its detectors fitted."""
    recipe = result["recipe"]
    batches = f"batch {recipe['batch_size']}, learning rate {recipe['lr']}"
    if result["framework"] == "GOAD":
        text = (
            f"a WideResNet of depth {recipe['depth']} and width {recipe['width']}, {recipe['epochs']} epochs of "
            f"Adam on 72 transformations of each image, {batches}"
        )
    else:
        text = f"{recipe['epochs']} epochs of {recipe['optimizer'].upper()}, {batches}, weight decay "
        text += f"{recipe['weight_decay']}"
    if recipe.get("crop") is not None:
        text += f", views of {recipe['crop']} pixels for the first {recipe['crop_share']:.0%}"
    text += f"; training took {result['train_seconds'] / 60:.0f} minutes, scoring "
    text += f"{result['score_seconds'] / 60:.0f}"
    verb = "trained on" if result["framework"] == "GOAD" else "fitted to"
    return text + ("" if result["fit_images"] is None else f"; {verb} {result['fit_images']} training images")


FrameworkStudy(
    "table3-label-free",
    "Table 3, without supervised labels of ID",
    ("MoCo-v2", "RotNet", "GOAD", "CSI"),
    duration="3 h",
)
FrameworkStudy(
    "table11",
    "Table 11, CIDER",
    ("CIDER",),
    {
        "SVHN": "svhn:test",
        "Places365": "places365:val",
        "iSUN": "isun",
        "Texture": "dtd:test",
        "LSUN": "lsun",
    },
    duration="1 h",
)
