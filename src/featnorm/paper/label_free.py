"""CIFAR-10 by training frameworks: Table 3 without labels, and Table 11 with CIDER (paper 6.3, C.1, D.6).

The data is that of `featnorm.paper.cifar10`. Each framework trains one network, which is scored by the
detectors that it is for.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from featnorm.detectors import CSI, KNN, NAN, Detector, RotNet
from featnorm.metrics import evaluate
from featnorm.models import cifar_network, cifar_network_with
from featnorm.paper.cifar10 import PAPER_SETS, Images, keep_result, kept_result, train_and_score
from featnorm.paper.networks import CSIHead
from featnorm.paper.probe import spaced
from featnorm.paper.recipe import PRESETS, PaperRecipe
from featnorm.paper.systems import GOAD
from featnorm.paper.systems.frameworks import moco_detectors

#: The OOD sets of each table, as `featnorm.paper.cifar10.PAPER_SETS`.
TABLES = {
    "table3-label-free": PAPER_SETS,
    "table11": {
        "SVHN": "svhn:test",
        "Places365": "places365:val",
        "iSUN": "isun",
        "Texture": "dtd:test",
        "LSUN": "lsun",
    },
}
_FRAMEWORKS = {"table3-label-free": ("MoCo-v2", "RotNet", "GOAD", "CSI"), "table11": ("CIDER",)}


@dataclass(frozen=True)
class Scale:
    """How large the networks are and how long they are trained.

    Parameters
    ----------
    name : "laptop" or "paper".
    width : channels of the first stage of the ResNet-18.
    recipes : by framework.
    goad : the system of one-class classification that has a row in Table 3.
    most
        Training images that a detector which asks the model again in fitting learns from, and that GOAD trains on,
        where each is seen in 72 transformations; None for all.
    """

    name: str
    width: int
    recipes: Mapping[str, PaperRecipe]
    goad: GOAD
    most: int | None


def short(name: str, epochs: int, batch_size: int, lr: float, crop: int, crop_share: float = 0.8) -> PaperRecipe:
    """Return a framework's settings for small machines: few epochs, small views first, SGD with a warm-up."""
    return replace(
        PRESETS[name],
        epochs=epochs,
        batch_size=batch_size,
        optimizer="sgd",
        lr=lr,
        warmup=0.1,
        crop=crop,
        crop_share=crop_share,
    )


SCALES = {
    "laptop": Scale(
        "laptop",
        32,
        {
            "MoCo-v2": short("MoCo-v2", 12, 256, 0.06, 24),
            "RotNet": short("RotNet", 5, 128, 0.1, 24),
            "CSI": short("CSI", 2, 128, 0.1, 20, 0.9),
            "CIDER": short("CIDER", 10, 256, 0.25, 24),
        },
        goad=GOAD(width=1, epochs=2, lr=3e-3),
        most=5000,
    ),
    "paper": Scale("paper", 64, PRESETS, GOAD(), most=None),
}


@dataclass(frozen=True)
class Framework:
    """A way to train, and what it is scored by.

    Parameters
    ----------
    build : returns the network, for pixels in [0, 1], from a width and a seed.
    detectors : returns the detectors, with the settings of their sources.
    labels : whether it trains on labels.
    asks_in_fit : whether its detectors ask the model again to learn, which takes forty passes an image for CSI.
    """

    build: Callable[[int, int], nn.Sequential]
    detectors: Callable[[], list[Detector]]
    labels: bool = False
    asks_in_fit: bool = False


def _of_cider() -> list[Detector]:
    return [NAN(), KNN(k=100), KNN(k=100) / NAN()]


#: MoCo's and CIDER's head is an MLP, whose hidden layer NAN reads; RotNet's a linear layer, as in its source.
FRAMEWORKS = {
    "MoCo-v2": Framework(lambda width, seed: cifar_network(width, None, seed=seed), moco_detectors),
    "RotNet": Framework(
        lambda width, seed: cifar_network_with(lambda features: nn.Linear(features, 4), width, seed=seed),
        lambda: [RotNet()],
    ),
    "CSI": Framework(
        lambda width, seed: cifar_network_with(CSIHead, width, seed=seed), lambda: [CSI()], asks_in_fit=True
    ),
    "CIDER": Framework(lambda width, seed: cifar_network(width, None, seed=seed), _of_cider, labels=True),
}


@dataclass(frozen=True)
class Job:
    """A network to train for a table: by a framework's recipe, or GOAD as a system of its own."""

    framework: str
    recipe: PaperRecipe | GOAD
    seed: int = 0

    @property
    def folder(self) -> str:
        """A name for its folder."""
        return f"{self.framework.lower()}-{self.recipe.epochs}epochs-seed{self.seed}"


def jobs(table: str, scale: Scale) -> list[Job]:
    """Return the networks that a table is made from."""
    return [Job(name, scale.goad if name == "GOAD" else scale.recipes[name]) for name in _FRAMEWORKS[table]]


def run(
    job: Job,
    scale: Scale,
    images: Images,
    folder: Path,
    *,
    fabric: Any,
    environment: Mapping[str, str],
    progress: bool | None = None,
) -> dict[str, Any]:
    """Train a network, or go on where its training was left, and score everything with it.

    Parameters
    ----------
    job, scale : what to train.
    images, folder, fabric, environment, progress : see `featnorm.paper.cifar10.run`.

    Returns
    -------
    The content of ``result.json``: what was run, and of what `featnorm.paper.cifar10.train_and_score` returns
    at least ``scores``, ``left_out`` and the seconds.

    Raises
    ------
    ValueError
        The folder holds a run of other settings.
    """
    most = scale.most
    if isinstance(job.recipe, GOAD):
        settings = {"width": job.recipe.width, "recipe": asdict(job.recipe)}
    else:
        settings = {"width": scale.width, "recipe": job.recipe.to_dict()}
        most = most if FRAMEWORKS[job.framework].asks_in_fit else None
    made_with = {
        "scale": scale.name,
        "framework": job.framework,
        **settings,
        "seed": job.seed,
        "images": images.facts,
        "most": most,
    }
    result = kept_result(folder, made_with)
    if result is None:
        outcome = _train_and_score(job, scale.width, images, most, folder, fabric, progress)
        result = {**made_with, **outcome, "environment": dict(environment)}
        keep_result(folder, result)
    return result


def _train_and_score(
    job: Job, width: int, images: Images, most: int | None, folder: Path, fabric: Any, progress: bool | None
) -> dict[str, Any]:
    if isinstance(job.recipe, GOAD):
        return _run_goad(job.recipe, images, most, job.seed, folder, fabric, progress)
    framework = FRAMEWORKS[job.framework]
    return train_and_score(
        framework.build(width, job.seed),
        images,
        framework.detectors(),
        job.recipe,
        job.seed,
        folder,
        fabric=fabric,
        labels=framework.labels,
        most=most,
        same_precision=True,
        progress=progress,
    )


def _run_goad(
    system: GOAD, images: Images, most: int | None, seed: int, folder: Path, fabric: Any, progress: bool | None
) -> dict[str, Any]:
    """Train GOAD on all classes as if they were one, and score every set."""
    began = time.perf_counter()
    known = spaced(images.train[0], most)
    model = system.train(known, folder=folder, fabric=fabric, seed=seed, progress=progress)
    trained = time.perf_counter()

    def scores(pixels: torch.Tensor) -> torch.Tensor:
        return system.scores(model, pixels, fabric=fabric, progress=progress)["GOAD"]

    inside = scores(images.test[0])
    found = {name: evaluate(inside, scores(pixels)) for name, pixels in images.ood.items()}
    return {
        "scores": {
            "GOAD()": {name: [100 * measures.auroc, 100 * measures.fpr95] for name, measures in found.items()}
        },
        "left_out": {},
        "train_seconds": trained - began,
        "score_seconds": time.perf_counter() - trained,
    }
