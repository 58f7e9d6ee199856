"""The CIFAR-10 benchmark: Table 3 with labels, and the ablations that need trained models (paper 6.3, C.1, D).

Everything is 32 x 32. A network is trained per variant and seed; one extraction of each set of images then serves
every detector.
"""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from featnorm._utils.files import replacing
from featnorm._utils.layout import fast_layout
from featnorm._utils.sealed import read_sealed, write_sealed
from featnorm.detectors import NAN, Detector, L1Norm, Sparsity, parse_detector
from featnorm.evaluation import Evaluation, compare
from featnorm.features import Features
from featnorm.inputs import DataError, ImageSource, image_tensor, open_source
from featnorm.models import cifar_network
from featnorm.models.heads import Activation
from featnorm.paper.probe import spaced
from featnorm.paper.recipe import PRESETS, PaperRecipe
from featnorm.tap import AutocastTap, FeatureTap
from featnorm.training import train
from featnorm.training.runs import LOG, read_log

SIDE = 32
CLASSES = 10

#: The paper's OOD sets, and by which name each is looked for under a data root or downloaded. CSI's two "fix" sets
#: are in no registry: they must lie under the data root.
PAPER_SETS = {
    "LSUN-fix": "lsun_fix",
    "ImageNet-fix": "imagenet_fix",
    "CIFAR-100": "cifar100:test",
    "SVHN": "svhn:test",
    "Places365": "places365:val",
}
#: Other OOD sets at 32 x 32, which take the paper's place where the data root has this folder.
OWN_FOLDER = "ood32"

_BATCH = 250


@dataclass(frozen=True)
class Scale:
    """How large the networks are and how long they are trained.

    Parameters
    ----------
    name : "laptop" or "paper".
    width : channels of the first stage of the ResNet-18.
    recipe : of the main table, and of Table 6.
    ablation : of the ablations of the head, Table 7 and Figure 7.
    frozen : whether these train heads alone, on a frozen backbone (`featnorm.paper.heads`).
    seeds : runs of the main table; an ablation is one.
    """

    name: str
    width: int
    recipe: PaperRecipe
    ablation: PaperRecipe
    frozen: bool
    seeds: int


# The paper's optimizer and schedule, with a learning rate for few epochs. Its 800 epochs are without weight decay;
# so few as these reach a higher accuracy with it.
_LAPTOP = PaperRecipe(
    epochs=42,
    batch_size=128,
    optimizer="sgd",
    lr=0.1,
    nesterov=True,
    weight_decay=5e-4,
    warmup=0.2,
    augment=True,
    crop=24,
)
#: Of heads on a frozen backbone.
FROZEN = PaperRecipe(epochs=20, batch_size=256, optimizer="sgd", lr=0.06)
SCALES = {
    "laptop": Scale("laptop", 32, _LAPTOP, FROZEN, frozen=True, seeds=3),
    "paper": Scale("paper", 64, PRESETS["C.1"], PRESETS["C.1"], frozen=False, seeds=3),
}


@dataclass(frozen=True)
class Variant:
    """A network of the benchmark.

    Parameters
    ----------
    hidden : width d_L of the head's hidden layer; None for no head, cosine logits of the pooled feature.
    activation : of the hidden layer.
    """

    hidden: int | None = 512
    activation: Activation = "relu"

    @property
    def name(self) -> str:
        """A name for folders."""
        return "headless" if self.hidden is None else f"{self.activation}-{self.hidden}"

    def build(self, width: int, seed: int) -> nn.Sequential:
        """Return the network, for pixels in [0, 1], with the initial weights of a seed."""
        return cifar_network(width, CLASSES, hidden=self.hidden, activation=self.activation, seed=seed)


MAIN = Variant()
#: The heads of each ablation; the other tables are of the main networks, and one without a head.
ABLATIONS = {
    "table7": [MAIN, Variant(activation="leaky_relu"), Variant(activation="gelu")],
    "figure7": [Variant(hidden=2**k) for k in range(5, 13)],
}
TABLES = ("table3", "table5", "table6", "table7", "table8", "table10", "figure7")


@dataclass(frozen=True)
class Job:
    """A network to train for a table, or where the backbone is frozen its head."""

    variant: Variant
    recipe: PaperRecipe
    seed: int
    frozen: bool = False

    @property
    def folder(self) -> str:
        """A name for its folder; tables that need the same network share it."""
        kind = "-frozen" if self.frozen else ""
        return f"{self.variant.name}{kind}-{self.recipe.epochs}epochs-seed{self.seed}"


def jobs(table: str, scale: Scale) -> list[Job]:
    """Return the networks that a table is made from."""
    if table in ABLATIONS:
        return [Job(variant, scale.ablation, 0, scale.frozen) for variant in ABLATIONS[table]]
    if table == "table6":
        return [Job(variant, scale.recipe, 0) for variant in (MAIN, Variant(hidden=None))]
    return [Job(MAIN, scale.recipe, seed) for seed in range(scale.seeds)]


def detectors(variant: Variant = MAIN) -> list[Detector]:
    """Return the detectors of Table 3 and those beside it, each with the settings of its source.

    For the networks of an ablation, those that neither learn nor ask the model again.
    """
    if variant != MAIN:
        return quick_detectors()
    beside = ("ODIN", "Views(NAN)", "KNN / ReAct(NAN)", "SSD / ReAct(NAN)")
    return [*compared_detectors(), *map(parse_detector, beside)]


def compared_detectors() -> list[Detector]:
    """Return the detectors that all tables of small images have, each with the settings of its source."""
    expressions = (
        "NAN L1Norm LpNorm Sparsity HiddenConfidence EmbeddingMagnitude MSP MaxLogit Energy KLUniform "
        "Mahalanobis SSD KNN Residual ViM ReAct(NAN) ReAct(Energy) KNN/NAN SSD/NAN"
    )
    return [parse_detector(expression) for expression in expressions.split()]


def quick_detectors() -> list[Detector]:
    """Return those of the detectors that neither learn nor ask the model again."""
    return [detector for detector in compared_detectors() if not detector.needs_fit]


@dataclass
class Images:
    """The images of the benchmark, decoded, and where they came from."""

    train: tuple[Tensor, Tensor]  # (n, 3, 32, 32) uint8, (n,)
    test: tuple[Tensor, Tensor]
    ood: dict[str, Tensor]
    facts: dict[str, str] = field(default_factory=dict)  # set -> where from and how many
    missing: dict[str, str] = field(default_factory=dict)  # OOD set -> why it could not be had


def load_images(
    root: Path | None, paper_sets: Mapping[str, str] = PAPER_SETS, *, progress: bool | None = None
) -> Images:
    """Decode CIFAR-10 and the OOD sets.

    The OOD sets are the paper's for a table, from the data root or downloaded. Where the data root has a folder
    ``ood32``, they are the parquet files and folders in it, and those of the paper's that are under the root as
    well.

    Raises
    ------
    DataError
        CIFAR-10, or every OOD set, cannot be had; or an image cannot be read.
    """
    train, test = (open_source(f"cifar10:{split}", root=root) for split in ("train", "test"))
    sets, missing = _ood_sources(root, paper_sets)
    if not sets:
        raise DataError("no OOD set can be had: " + "; ".join(f"{name}: {why}" for name, why in missing.items()))
    images = Images(
        labelled(train, SIDE, progress=progress),
        labelled(test, SIDE, progress=progress),
        {name: image_tensor(source, SIDE, progress=progress) for name, source in sets.items()},
        missing=missing,
    )
    images.facts = {
        "training images": f"cifar10:train, {len(train)}",
        "in-distribution": f"cifar10:test, {len(test)}",
        **{f"OOD, {name}": f"{source.title}, {len(source)}" for name, source in sets.items()},
    }
    return images


def labelled(
    source: ImageSource, side: int, *, classes: int = CLASSES, progress: bool | None = None
) -> tuple[Tensor, Tensor]:
    """Decode images to squares of a side, with their labels, one of so many classes each.

    Raises
    ------
    DataError
        An image has no such label, or cannot be read.
    """
    labels = [source.label(i) for i in range(len(source))]
    wrong = next((i for i, label in enumerate(labels) if label is None or label >= classes), None)
    if wrong is not None:
        raise DataError(f"{source.name(wrong)} of {source.title} has no label below {classes}")
    return image_tensor(source, side, progress=progress), torch.tensor(labels)


def _ood_sources(
    root: Path | None, paper_sets: Mapping[str, str]
) -> tuple[dict[str, ImageSource], dict[str, str]]:
    own: dict[str, str] = {}
    if root is not None and (root / OWN_FOLDER).is_dir():
        places = sorted(place for place in (root / OWN_FOLDER).iterdir() if place.name[0] != ".")
        own = {place.stem: str(place) for place in places if place.is_dir() or place.suffix == ".parquet"}
    sets: dict[str, ImageSource] = {}
    missing: dict[str, str] = {}
    for name, spec in {**paper_sets, **own}.items():
        folder = spec.partition(":")[0]
        if own and name not in own and not any((root or Path()).glob(f"{folder}*")):
            missing[name] = f"not under the data root, whose {OWN_FOLDER} takes its place"
            continue
        try:
            sets[name] = open_source(spec, root=root)
        except DataError as error:
            missing[name] = str(error)
    return sets, missing


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
    images : see `load_images`.
    folder : of this run; it holds ``checkpoint.pt``, ``log.jsonl``, ``model.safetensors`` and ``result.json``.
    fabric : a launched `lightning_fabric.Fabric`, of one process.
    environment : facts of versions, machine and date, which are kept with the result.
    progress : show progress bars; None for where there is a terminal.

    Returns
    -------
    The content of ``result.json``: what was run, its training log's last line, and what `score` returns.

    Raises
    ------
    ValueError
        The folder holds a run of other settings.
    """
    made_with = {
        "scale": scale.name,
        "variant": asdict(job.variant),
        "width": scale.width,
        "recipe": job.recipe.to_dict(),
        "seed": job.seed,
        "images": images.facts,
    }
    result = kept_result(folder, made_with)
    if result is not None:
        return result
    model = job.variant.build(scale.width, job.seed)
    outcome = train_and_score(
        model, images, detectors(job.variant), job.recipe, job.seed, folder, fabric=fabric, progress=progress
    )
    result = {**made_with, **outcome, "environment": dict(environment)}
    keep_result(folder, result)
    return result


def train_and_score(
    model: nn.Module,
    images: Images,
    chosen: Sequence[Detector],
    recipe: PaperRecipe,
    seed: int,
    folder: Path,
    *,
    fabric: Any,
    labels: bool = True,
    most: int | None = None,
    same_precision: bool = False,
    progress: bool | None = None,
) -> dict[str, Any]:
    """Train a network, or go on where its training was left, keep its weights, and score everything with it.

    Parameters
    ----------
    model : with its initial weights.
    images, chosen, labels, most, same_precision : see `score`; without labels it is trained without them too.
    recipe, seed : of the training.
    folder, fabric, progress : see `run`.

    Returns
    -------
    The training log's last loss and accuracy, its seconds, and what `score` returns.
    """
    inputs, targets = images.train
    train(
        model,
        inputs,
        targets if labels else None,
        recipe,
        folder=folder,
        fabric=fabric,
        seed=seed,
        progress=progress,
    )
    with replacing(folder / "model.safetensors") as temporary:
        save_file({name: value.cpu().contiguous() for name, value in model.state_dict().items()}, temporary)
    log = read_log(folder / LOG)
    return {
        "train_loss": log[-1]["loss"],
        "train_accuracy": log[-1]["accuracy"],
        "train_seconds": sum(entry["seconds"] for entry in log),
        **score(
            model,
            images,
            chosen,
            fabric=fabric,
            labels=labels,
            most=most,
            same_precision=same_precision,
            progress=progress,
        ),
    }


def kept_result(folder: Path, made_with: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the result that a folder holds, or None.

    Raises
    ------
    ValueError
        It is of other settings, or damaged.
    """
    file = folder / "result.json"
    if not file.exists():
        return None
    result = read_sealed(file)
    other = [key for key, value in made_with.items() if result.get(key) != value]
    if other:
        raise ValueError(f"{file} is of other {' and '.join(other)}: choose another folder with --out")
    return result


def keep_result(folder: Path, result: Mapping[str, Any]) -> None:
    """Write a result into a folder, for `kept_result`."""
    write_sealed(folder / "result.json", result)


def score(
    model: nn.Module,
    images: Images,
    chosen: Sequence[Detector],
    *,
    fabric: Any,
    labels: bool = True,
    most: int | None = None,
    same_precision: bool = False,
    progress: bool | None = None,
) -> dict[str, Any]:
    """Score every set of images by every detector, from one extraction of each set.

    Parameters
    ----------
    model : maps images (n, 3, 32, 32) in [0, 1] to logits, or to embeddings.
    chosen : the detectors; where none of them learns, the training images are not read.
    labels : whether to use the labels; without, the accuracy is None.
    most : training images that the detectors learn from, evenly spaced over all; None for all.
    same_precision
        Whether the model is asked in the precision of its training, for detectors that ask it again about many
        changed inputs; else in full precision: a score's last digits are not the processor's.
    images, fabric, progress : see `run`.

    Returns
    -------
    ``accuracy`` in [0, 1]; ``scores`` and ``pooled``, by detector and OOD set AUROC and FPR95 in percent;
    ``left_out``, detectors that cannot work here and why; ``inactive``, the share of the hidden layer's units that
    are off, by set; ``score_seconds``.
    """
    began = time.perf_counter()
    model = fast_layout(fabric.to_device(model))
    tap = AutocastTap(model, fabric) if same_precision else FeatureTap(model)

    def stream(pixels: Tensor, targets: Tensor | None) -> Iterator[Features]:
        yield from tap.stream(_Batches(pixels, targets if labels else None), progress=progress)

    test = list(stream(*images.test))
    ood = {name: list(stream(pixels, None)) for name, pixels in images.ood.items()}
    learns = any(detector.needs_fit for detector in chosen)
    fit = stream(*(spaced(values, most) for values in images.train)) if learns else None
    evaluation = compare(chosen, fit=fit, id_set=("cifar10", test), ood_sets=ood)
    pooled = compare(
        [NAN(), L1Norm(), Sparsity()],
        fit=None,
        id_set=("cifar10", _of_pooled(test)),
        ood_sets={name: _of_pooled(batches) for name, batches in ood.items()},
    )
    return {
        "accuracy": evaluation.accuracy,
        "scores": percentages(evaluation),
        "pooled": percentages(pooled),
        "left_out": evaluation.excluded,
        "inactive": {name: inactive(batches) for name, batches in {"cifar10": test, **ood}.items()},
        "score_seconds": time.perf_counter() - began,
    }


@dataclass(frozen=True)
class _Batches:
    """Images (n, 3, h, w) uint8 as batches of pixels in [0, 1], with labels or without."""

    pixels: Tensor
    labels: Tensor | None

    def __len__(self) -> int:
        return -(-len(self.pixels) // _BATCH)

    def __iter__(self) -> Iterator[Any]:
        for start in range(0, len(self.pixels), _BATCH):
            rows = slice(start, start + _BATCH)
            inputs = fast_layout(self.pixels[rows]).float().div_(255)
            yield inputs if self.labels is None else (inputs, self.labels[rows])


def _of_pooled(batches: Iterable[Features]) -> list[Features]:
    return [Features(activation=features.tensor("pooled")) for features in batches]


def inactive(batches: Iterable[Features]) -> float:
    """Return the share of the hidden layer's units that are off."""
    off = [(features.tensor("activation") <= 0).double().mean(1) for features in batches]
    return float(torch.cat(off).mean())


def percentages(evaluation: Evaluation) -> dict[str, dict[str, list[float]]]:
    """Return AUROC and FPR95 in percent, by detector and OOD set."""
    return {
        outcome.detector: {
            name: [100 * measures.auroc, 100 * measures.fpr95] for name, measures in outcome.metrics.items()
        }
        for outcome in evaluation.results
    }
