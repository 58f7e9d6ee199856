"""The ImageNet-1k benchmark: Tables 1, 2, 6, 9 and 12, from one pass of the backbone over each set of images.

At scale "paper" its networks are those of the paper, from the authors' checkpoints. At scale "laptop" it is the
same path on what comes with featnorm: EfficientNet-Lite0 as it is, and with a head on its frozen backbone.
"""

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from featnorm._utils.extras import vision_module
from featnorm._utils.layout import fast_layout
from featnorm.detectors import (
    KNN,
    MSP,
    NAN,
    SSD,
    Detector,
    EmbeddingMagnitude,
    Energy,
    KLUniform,
    L1Norm,
    Mahalanobis,
    MaxLogit,
    Residual,
    Sparsity,
    ViM,
)
from featnorm.detectors.statistics import FloatHistogram, single_unit_rows
from featnorm.evaluation import compare
from featnorm.features import Features
from featnorm.fitting import backbone_features, cluster, features_behind, fit_head
from featnorm.inputs import CachedFeatures, ImageSource
from featnorm.models import DEFAULT_MODEL, LoadedModel, create_model, cut_classifier
from featnorm.paper.checkpoints import load_contrastive
from featnorm.paper.cifar10 import keep_result, kept_result, percentages
from featnorm.paper.imagenet_data import LINEAR, WEIGHTS, MissingError, Shrunk, missing_weights, open_data
from featnorm.runtime import Runtime

Reader = Callable[[Tensor], Features]
"""From pooled features (n, D) to all that a network says of the inputs."""

HEADED = "efficientnet-lite0 with a head"
AS_IT_IS = "efficientnet-lite0"
_ROWS = 4096


@dataclass(frozen=True)
class Scale:
    """What a scale runs.

    Parameters
    ----------
    name : "laptop" or "paper".
    k : of the nearest neighbors in the whole bank; in a part of it that part of k, as in the source.
    seeds : heads trained where the network needs one.
    """

    name: str
    k: int
    seeds: int


SCALES = {"laptop": Scale("laptop", 50, 3), "paper": Scale("paper", 1000, 1)}
#: The parts of the training images that make a bank.
SHARES = (1.0, 0.1, 0.01)


@dataclass(frozen=True)
class Job:
    """A network and the images that it is asked about.

    Parameters
    ----------
    network : one of `WEIGHTS`, or EfficientNet-Lite0 with a head or without.
    data : one of `featnorm.paper.imagenet_data.DATA`.
    seed : of the head, where one is trained.
    """

    network: str
    data: str
    seed: int = 0

    @property
    def block(self) -> str:
        """What tables call it: the same for all its seeds."""
        return f"{self.network}, {self.data}"

    @property
    def folder(self) -> str:
        """A name for its folder; tables that need the same scores share it."""
        return f"{self.block} seed{self.seed}".replace(", ", "-").replace(" ", "-")


#: The networks of each table; the first four test on four OOD sets, the last on seven.
TABLES = {
    "table1": ("supcon", "moco"),
    "table2": ("supcon",),
    "table6-imagenet": ("resnet50", "supcon"),
    "table9": ("vit",),
    "table12": ("supcon",),
}
_LAPTOP = {
    "table1": (AS_IT_IS, HEADED),
    "table2": (HEADED,),
    "table6-imagenet": (AS_IT_IS, HEADED),
    "table9": (HEADED,),
    "table12": (HEADED,),
}


def jobs(table: str, scale: Scale) -> list[Job]:
    """Return the networks and data that a table is made from."""
    if scale.name == "paper":
        data = "seven OOD sets" if table == "table12" else "four OOD sets"
        return [Job(network, data) for network in TABLES[table]]
    return [
        Job(network, data, seed)
        for data in ("imagenet1k_sample", "tiny_imagenet")
        for network in _LAPTOP[table]
        for seed in range(scale.seeds if network == HEADED else 1)
    ]


def require(table: str, scale: Scale, root: Path | None, weights: Path | None) -> None:
    """See that everything is there that a table needs.

    Parameters
    ----------
    root : the data root, or None where none is set.
    weights : the folder of checkpoints, or None where none is set.

    Raises
    ------
    MissingError
        Something is not there; all of it is named, with how to get it.
    """
    needed = jobs(table, scale)
    lines: list[str] = []
    for network in dict.fromkeys(job.network for job in needed):
        lines += missing_weights(network, weights)
    for name in dict.fromkeys(job.data for job in needed):
        lines += open_data(name, root)[1]
    if lines:
        raise MissingError(list(dict.fromkeys(lines)))


class PooledReAct(Detector):
    """ReAct at the feature that the head reads: it is clipped, and the network's head reads the clipped one.

    That is where the paper clips: in its Table 12 ``1/l0`` changes with ReAct, and a unit of the hidden layer that
    is clipped stays on. What the detector learns, it learns from unclipped features (Sun et al., NeurIPS 2021).

    Parameters
    ----------
    detector : any.
    read : what makes all features of the pooled ones.
    percentile : where to clip, of all numbers of the training features.
    """

    def __init__(self, detector: Detector, read: Reader, percentile: float = 90) -> None:
        super().__init__()
        self.detector = detector
        self.read = read
        self.percentile = percentile
        self.reads = ("pooled",)
        self.learns = tuple(dict.fromkeys((*detector.learns, "pooled")))
        self.role = detector.role
        self.numbers = FloatHistogram()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.detector!r})"

    def _check_fit(self, features: Features) -> None:
        super()._check_fit(features)
        self.detector._check_fit(features)

    def _partial_fit(self, features: Features) -> None:
        self.detector._partial_fit(features)
        self.numbers.update(features.tensor("pooled"))

    def _finalize(self) -> float:
        return self.numbers.percentile(self.percentile)

    def _score(self, features: Features) -> Tensor:
        return self.detector.score(self.read(features.tensor("pooled").clamp(max=self._fitted_state())))


def run(
    job: Job,
    scale: Scale,
    root: Path | None,
    weights: Path | None,
    folder: Path,
    *,
    cache: Path,
    fabric: Any,
    environment: Mapping[str, str],
    progress: bool | None = None,
) -> dict[str, Any]:
    """Ask a network about every image once, and score them by every detector of the tables.

    Features stay in their file: the training set is read from it batch by batch, and so are the banks of the
    nearest neighbors.

    Parameters
    ----------
    job, scale : what to run.
    root, weights : the data root and the folder of checkpoints.
    folder : of this run, for ``result.json``.
    cache : the folder of the `featnorm.inputs.FeatureCache`; for ImageNet-1k, 8 kB an image and ResNet.
    fabric : a `lightning_fabric.Fabric` of one process.
    environment : facts of versions, machine and date, which are kept with the result.
    progress : show progress bars; None for where there is a terminal.

    Returns
    -------
    The content of ``result.json``: ``scores``, AUROC and FPR95 in percent by detector and OOD set;
    ``microseconds`` an input, by detector; ``left_out``, detectors that cannot work here and why; ``accuracy`` in
    [0, 1] or None; ``shares``, of the training images in the bank by detector; ``seconds`` of each step and
    ``computed``, the images that the backbone was asked for.

    Raises
    ------
    MissingError
        Data or weights are missing; see `require`.
    ModelError
        A checkpoint cannot be read or does not fit.
    ValueError
        The folder holds a run of other settings.
    """
    data, lacking = open_data(job.data, root)
    lacking += missing_weights(job.network, weights)
    if data is None or lacking:
        raise MissingError(lacking)
    made_with = {
        "scale": scale.name,
        "network": job.network,
        "data": job.data,
        "seed": job.seed,
        "k": scale.k,
        "images": data.facts,
    }
    result = kept_result(folder, made_with)
    if result is not None:
        return result
    network = _load(job.network, weights)
    backbone = fast_layout(network.backbone.model.to(fabric.device))
    loaded = network.backbone
    if data.side is not None:
        loaded = replace(loaded, transform=Shrunk(loaded.transform, data.side))
    began = time.perf_counter()

    runtime = Runtime(fabric.device.type, fabric.strategy.precision.precision, progress=progress)

    def ask(source: ImageSource) -> CachedFeatures:
        return backbone_features(source, loaded, backbone, cache=cache, runtime=runtime)

    train, test = ask(data.train), ask(data.test)
    ood = {name: ask(source) for name, source in data.ood.items()}
    asked = time.perf_counter()
    labels = _labels(data.train, train)
    read = network.read
    logit_of: Tensor | None = data.classes
    if read is None:
        # With one image a class there is no class to learn: clusters of the features stand in for them.
        several = len(labels.unique()) < len(labels)
        targets = labels if several else cluster(train.values, job.seed)
        head = fit_head(train.values, targets, seed=job.seed, progress=progress)
        read = partial(features_behind, head)
        logit_of = torch.arange(len(data.classes)) if several else None
    headed = time.perf_counter()
    right: Tensor | None = None
    if logit_of is not None:
        known = _labels(data.test, test)
        right = torch.where(known < 0, -1, logit_of[known.clamp(min=0)])
    with tempfile.TemporaryDirectory(dir=folder) as banks:
        fitted, left_out, shares = _fitted(read, train, labels, scale, Path(banks))
        evaluation = compare(
            fitted,
            fit=None,
            id_set=("in-distribution", _stream(read, test, right)),
            ood_sets={name: _stream(read, values) for name, values in ood.items()},
        )
    sets = {"training images": train, "in-distribution": test, **ood}
    result = {
        **made_with,
        "accuracy": evaluation.accuracy,
        "scores": percentages(evaluation),
        "microseconds": {outcome.detector: outcome.microseconds for outcome in evaluation.results},
        "left_out": {**left_out, **evaluation.excluded},
        "shares": shares,
        "unread": {name: len(known.corrupt) for name, known in sets.items() if known.corrupt},
        "computed": sum(known.computed for known in sets.values()),
        "seconds": {
            "features": asked - began,
            "head": headed - asked if network.read is None else None,
            "detectors": time.perf_counter() - headed,
        },
        "environment": dict(environment),
    }
    keep_result(folder, result)
    return result


@dataclass(frozen=True)
class _Network:
    """A backbone with its transform, and what reads its pooled feature; None where a head is to be trained."""

    backbone: LoadedModel
    read: Reader | None


def _load(name: str, weights: Path | None) -> _Network:
    if name in (AS_IT_IS, HEADED):
        whole = create_model(DEFAULT_MODEL)
        classifier: nn.Module = whole.model.get_classifier()  # type: ignore[operator]
        read = partial(features_behind, classifier) if name == AS_IT_IS else None
        return _Network(_cut(whole), read)
    assert weights is not None
    file = weights / WEIGHTS[name].file
    if name == "vit":
        return _Network(_cut(create_model("torchvision:vit_b_16", weights=file)), None)
    # That of torchvision's default, its second set of weights, is another.
    transform = vision_module("torchvision.models").ResNet50_Weights.IMAGENET1K_V1.transforms()
    if name == "resnet50":
        whole = replace(create_model("torchvision:resnet50", weights=file), transform=transform)
        last: nn.Module = whole.model.fc  # type: ignore[assignment]
        return _Network(_cut(whole), partial(features_behind, last))
    linear = weights / LINEAR if name == "supcon" and (weights / LINEAR).is_file() else None
    network = load_contrastive(file, name, classifier=linear)
    return _Network(LoadedModel(network.backbone, transform, (3, 224, 224), f"{name}:resnet50"), network.features)


def _cut(whole: LoadedModel) -> LoadedModel:
    return replace(whole, model=cut_classifier(whole.model)[0])


def _labels(source: ImageSource, known: CachedFeatures) -> Tensor:
    return torch.tensor([-1 if (label := source.label(row)) is None else label for row in known.rows.tolist()])


def _stream(read: Reader, known: CachedFeatures, labels: Tensor | None = None) -> Iterator[Features]:
    start = 0
    for values in known.batches(_ROWS):
        features = read(values)
        yield features if labels is None else features.replace(labels=labels[start : start + len(values)])
        start += len(values)


def _fitted(
    read: Reader, train: CachedFeatures, labels: Tensor, scale: Scale, folder: Path
) -> tuple[list[Detector], dict[str, str], dict[str, float]]:
    """Fit the detectors on one pass, and give each bank a file in the folder.

    Returns
    -------
    The detectors; those that cannot learn here, and why; the share of the training images in each bank.
    """
    banks = {share: KNN(max(1, round(scale.k * share))) for share in SHARES}
    shares = {repr(knn): share for share, knn in banks.items()}
    whole = banks[1.0]
    learning: list[Detector] = [Mahalanobis(), SSD(), Residual(), ViM()]
    norms: list[Detector] = [NAN(), L1Norm(), Sparsity(), EmbeddingMagnitude()]
    clipped = [PooledReAct(inner, read) for inner in (NAN(), L1Norm(), Sparsity(), Residual())]
    learning += clipped
    left_out: dict[str, str] = {}
    for features in _stream(read, train, labels):
        for detector in list(learning):
            try:
                detector.partial_fit(features)
            except ValueError as error:
                left_out[repr(detector)] = str(error).removeprefix(repr(detector)).removeprefix(":").strip()
                learning.remove(detector)
    for share, knn in banks.items():
        count = max(1, round(share * len(train.stored_rows)))
        if count < knn.k:
            left_out[repr(knn)] = f"there are only {count} training images in its bank"
            continue
        knn.use_bank(_bank(train, count, folder / f"{knn.k}.f32"))
    fitted = [MSP(), MaxLogit(), Energy(), KLUniform(), *norms, *learning, *banks.values()]
    distances: list[Detector] = [whole, *(d for d in learning if isinstance(d, SSD))]
    fitted += [distance / norm for distance in distances for norm in (norms[0], clipped[0])]
    return [detector for detector in fitted if detector.is_fitted], left_out, shares


def _bank(train: CachedFeatures, count: int, file: Path) -> Tensor:
    """Write some of the training features, at unit length, to a file, and map it; fewer are a part of more."""
    order = torch.randperm(len(train.stored_rows), generator=torch.Generator().manual_seed(0))
    chosen = torch.zeros(len(order), dtype=torch.bool)
    chosen[order[:count]] = True
    with file.open("wb") as opened:
        for values, wanted in zip(train.batches(_ROWS), chosen.split(_ROWS), strict=True):
            opened.write(single_unit_rows(values[wanted]).numpy().tobytes())
    width = train.stored.shape[1]
    return torch.from_file(str(file), size=count * width).reshape(count, width)
