"""What `featnorm fit` is worth on images that its backbone was not trained on: half of Tiny ImageNet's classes.

The first 100 classes are in-distribution. The other 100 are near-OOD, textures and digits far-OOD. What to train
the head on was chosen without them: by the last 20 of the ID classes, held out from the 80 others.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor, nn

from featnorm._utils.layout import fast_layout
from featnorm.calibration import Calibration
from featnorm.detectors import KNN, NAN, Energy, HiddenConfidence, KLUniform, L1Norm
from featnorm.evaluation import compare
from featnorm.features import Features
from featnorm.fitting import backbone_features, cluster, features_behind, fit_head
from featnorm.inputs import ImageSource, SlicedSource, open_source
from featnorm.metrics import auroc
from featnorm.models import DEFAULT_MODEL, LoadedModel, ProjectionHead, create_model, cut_classifier
from featnorm.paper.recipe import scheme_labels
from featnorm.paper.scoring import cached_labels, compared_detectors, percentages
from featnorm.paper.study import Context, SingleRun, Whole
from featnorm.paper.tables import MEASURES, Table, cell, environment, left_out, mean_and_deviation
from featnorm.splitting import for_constants, held_out

ID_CLASSES = 100
#: Number of ID classes that heads are trained on when their targets are compared; the others are held out.
TARGET_CLASSES = 80
SEEDS = 3
CLUSTER_SIZES = (50, 20, 10, 5)
_TPR = 0.95
_TRAIN, _VAL = "tiny_imagenet:train", "tiny_imagenet:val"
_FAR = {"textures": "ood224/textures", "digits": "mnist:test[::4]"}
_CHOICE = (NAN, L1Norm, HiddenConfidence, Energy, KLUniform)


@dataclass(frozen=True)
class _Part:
    """Features (n, D), labels (n,) and digests of some images."""

    values: Tensor
    labels: Tensor
    digests: list[bytes]

    def of(self, classes: range) -> "_Part":
        """Return the images of some classes, with labels from 0."""
        part = self._rows((self.labels >= classes.start) & (self.labels < classes.stop))
        return replace(part, labels=part.labels - classes.start)

    def split(self) -> tuple["_Part", "_Part"]:
        """Return the images to train on, and those held out, as `featnorm.fit` splits them by content."""
        apart = held_out(self.digests)
        return self._rows(~apart), self._rows(apart)

    def _rows(self, chosen: Tensor) -> "_Part":
        digests = [digest for digest, keep in zip(self.digests, chosen.tolist(), strict=True) if keep]
        return _Part(self.values[chosen], self.labels[chosen], digests)


@dataclass(frozen=True)
class _Backbone:
    """The default backbone of `featnorm fit`, and where it runs."""

    loaded: LoadedModel
    model: nn.Module
    context: Context

    def extract(self, source: ImageSource, *view: Any) -> _Part:
        """Return the features of images, or of one of the `_VIEWS` of each."""
        loaded = self.loaded
        if view:
            loaded = replace(loaded, transform=_View(loaded.transform, *view))
        cached = backbone_features(source, loaded, self.model, runtime=self.context.runtime)
        return _Part(cached.values, cached_labels(source, cached), cached.digests)


@dataclass(frozen=True, eq=False)
class _OwnImages(SingleRun[dict[str, ImageSource]]):
    """A study of the default backbone on Tiny ImageNet."""

    page: ClassVar[str] = "own-images"

    def load(self, scale: None, context: Context) -> dict[str, ImageSource]:
        """Open the data sets: ``tiny_imagenet``, ``ood224/textures`` and ``mnist`` of the data root."""
        specs = {"train": _TRAIN, "val": _VAL, **_FAR}
        return {name: open_source(spec, root=context.root) for name, spec in specs.items()}

    def settings(self, job: Whole, scale: None, inputs: Mapping[str, ImageSource]) -> dict[str, Any]:
        return {
            "classes": [ID_CLASSES, TARGET_CLASSES],
            "seeds": SEEDS,
            "cluster_sizes": list(CLUSTER_SIZES),
            "images": {name: f"{source.title}, {len(source)}" for name, source in inputs.items()},
        }


class HeadTargets(_OwnImages):
    """What to train the head on without labels, by ID classes that are held out.

    Its result has ``targets``, by name a list with one entry per seed, AUROC in percent by
    detector; and ``sizes``.
    """

    def run(
        self, job: Whole, scale: None, inputs: Mapping[str, ImageSource], folder: Path, context: Context
    ) -> dict[str, Any]:
        backbone = _backbone(context)[0]
        return _compare_targets(_train_images(backbone, inputs), inputs["train"], backbone)

    def tables(self, content: Mapping[str, Any]) -> dict[str, Table]:
        detectors = list(next(iter(content["targets"].values()))[0])
        rows = [
            [name, *(mean_and_deviation([run[detector] for run in runs]) for detector in detectors)]
            for name, runs in content["targets"].items()
        ]
        title = (
            f"What the head is trained on: AUROC in percent of classes 1 to {TARGET_CLASSES} against "
            f"{TARGET_CLASSES + 1} to {ID_CLASSES}"
        )
        notes = [f"{SEEDS} heads each, mean ± standard deviation; no OOD data", *_facts(content)]
        return {self.name: Table(title, ["Targets", *detectors], rows, notes)}


class OwnImages(_OwnImages):
    """What the head is worth, and what labels are.

    Its result has ``heads``, by what they were trained on ("no head", "labels", "clusters") a list with one entry
    per seed: ``scores`` (AUROC and FPR95 in percent, by detector and OOD set), ``seconds`` and ``accuracy``;
    ``flagged``, by head and seed the share of ID images that are flagged at the threshold of the default detector
    of `featnorm.fit`; and ``sizes``.
    """

    def run(
        self, job: Whole, scale: None, inputs: Mapping[str, ImageSource], folder: Path, context: Context
    ) -> dict[str, Any]:
        backbone, classifier = _backbone(context)
        val = backbone.extract(inputs["val"])
        test, near = val.of(range(ID_CLASSES)), val.of(range(ID_CLASSES, 2 * ID_CLASSES))
        ood = {"other classes": near.values} | {name: backbone.extract(inputs[name]).values for name in _FAR}
        fit, apart = _train_images(backbone, inputs).split()
        heads: dict[str, list[dict[str, Any]]] = {
            "no head": [_evaluate(partial(features_behind, classifier), fit, test, ood, False)]
        }
        flagged: dict[str, list[float]] = {}
        for name in ("labels", "clusters"):
            for seed in range(SEEDS):
                began = time.perf_counter()
                targets = fit.labels if name == "labels" else cluster(fit.values, seed)
                head = fit_head(fit.values, targets, seed=seed, progress=context.progress)
                seconds = time.perf_counter() - began
                entry = _evaluate(partial(features_behind, head), fit, test, ood, name == "labels")
                heads.setdefault(name, []).append({**entry, "seconds": seconds})
                flagged.setdefault(name, []).append(_flagged(head, fit, apart, test.values))
        return {
            "heads": heads,
            "flagged": flagged,
            "sizes": {
                "training": len(fit.values),
                "held out": len(apart.values),
                "ID test": len(test.values),
                **{name: len(values) for name, values in ood.items()},
            },
        }

    def tables(self, content: Mapping[str, Any]) -> dict[str, Table]:
        """See `Study`; one table per head."""
        facts = _facts(content)
        found = {}
        for head, runs in content["heads"].items():
            notes = [*facts, *left_out(runs[0])]
            if head in content["flagged"]:
                seconds = mean_and_deviation([entry["seconds"] for entry in runs])
                flagged = mean_and_deviation([100 * share for share in content["flagged"][head]])
                notes = [
                    f"{len(runs)} heads, mean ± standard deviation; {seconds} s to train one",
                    f"KLUniform() + KNN(k=10), calibrated as by `featnorm fit`, flags {flagged} % of ID images "
                    f"at tpr={_TPR}",
                    *notes,
                ]
            if head == "labels":
                accuracy = mean_and_deviation([100 * entry["accuracy"] for entry in runs])
                notes.insert(0, f"accuracy on ID {accuracy} %")
            rows = []
            for detector, scores in runs[0]["scores"].items():
                pairs = [[entry["scores"][detector][name] for entry in runs] for name in scores]
                means = [
                    [statistics.fmean(values) for values in zip(*run, strict=True)]
                    for run in zip(*pairs, strict=True)
                ]
                rows.append([detector, cell(means), *map(cell, pairs)])
            rows.sort(key=lambda row: -float(row[1].split()[0]))
            called = "without a head" if head == "no head" else f"with a head on {head}"
            sets = list(next(iter(runs[0]["scores"].values())))
            found[head.replace(" ", "-")] = Table(
                f"EfficientNet-Lite0 {called}: {MEASURES}", ["Detector", "Mean", *sets], rows, notes
            )
        return found


def _facts(content: Mapping[str, Any]) -> list[str]:
    sizes = ", ".join(f"{size} {name}" for name, size in content["sizes"].items())
    return [f"images: {sizes}", *environment([content])]


def _backbone(context: Context) -> tuple[_Backbone, nn.Module]:
    """Return the default backbone, and the classifier that is cut off it."""
    loaded = create_model(DEFAULT_MODEL)
    classifier: nn.Module = loaded.model.get_classifier()  # type: ignore[operator]
    model = fast_layout(cut_classifier(loaded.model)[0].to(context.runtime.torch_device).eval())
    return _Backbone(loaded, model, context), classifier


def _train_images(backbone: _Backbone, inputs: Mapping[str, ImageSource]) -> _Part:
    return backbone.extract(_below(inputs["train"], ID_CLASSES))


def _below(source: ImageSource, classes: int) -> ImageSource:
    """Return the images of the first classes."""
    rows = [i for i in range(len(source)) if (source.label(i) or 0) < classes]
    return SlicedSource(source, rows, source.title)


def _evaluate(
    features_of: Callable[..., Features], fit: _Part, test: _Part, ood: Mapping[str, Tensor], of_classes: bool
) -> dict[str, Any]:
    """Compare detectors; those that match labels with logits only if the logits are of the classes."""
    detectors = compared_detectors()
    matching = [repr(d) for d in detectors if {"labels", "logits"} <= {*d.learns}] if not of_classes else []
    evaluation = compare(
        [detector for detector in detectors if repr(detector) not in matching],
        fit=[features_of(fit.values).replace(labels=fit.labels)],
        id_set=("in-distribution", [features_of(test.values).replace(labels=test.labels)]),
        ood_sets={name: [features_of(values)] for name, values in ood.items()},
    )
    excluded = evaluation.excluded | dict.fromkeys(matching, "the logits are not those of the labels")
    accuracy = evaluation.accuracy if of_classes else None
    return {"scores": percentages(evaluation), "accuracy": accuracy, "excluded": excluded}


def _flagged(head: ProjectionHead, fit: _Part, apart: _Part, test: Tensor) -> float:
    """Return the share of new ID images that are flagged at the threshold of `featnorm.fit`'s default detector."""
    every = torch.arange(len(apart.values))
    constants = for_constants(apart.digests, every, every >= 0, _TPR)
    detector = KLUniform() + KNN(k=10)
    detector.fit(features_behind(head, fit.values), features_behind(head, apart.values[constants]))
    calibration = Calibration(detector.score(features_behind(head, apart.values[~constants])), _TPR)
    return float(1 - calibration.is_id(detector.score(features_behind(head, test))).double().mean())


def _compare_targets(train: _Part, source: ImageSource, backbone: _Backbone) -> dict[str, Any]:
    """Compare what a head may be trained on, by the ID classes that are held out."""
    fit, test = train.of(range(TARGET_CLASSES)).split()
    held_out_classes = train.of(range(TARGET_CLASSES, ID_CLASSES)).split()[1]
    images = torch.arange(len(fit.values))
    wanted = set(fit.digests)
    rows = [
        i for i in range(len(source)) if (source.label(i) or 0) < TARGET_CLASSES and source.digest(i) in wanted
    ]
    chosen = SlicedSource(source, rows, source.title)
    views = torch.cat([fit.values, *(backbone.extract(chosen, *view).values for view in _VIEWS)])
    kinds: dict[str, Any] = {"labels": lambda seed: (fit.values, fit.labels)}
    for size in CLUSTER_SIZES:
        kinds[f"clusters of {size} images"] = lambda seed, size=size: (
            fit.values,
            cluster(fit.values, seed, size=size),
        )
    kinds["instances"] = lambda seed: (fit.values, images)
    kinds[f"instances, {len(_VIEWS) + 1} views each"] = lambda seed: (views, images.repeat(len(_VIEWS) + 1))
    kinds["random bits"] = lambda seed: (fit.values, scheme_labels("R", images, seed)[0])
    kinds["one class"] = lambda seed: (fit.values, torch.zeros_like(images))
    found: dict[str, list[dict[str, float]]] = {}
    for name, make in kinds.items():
        for seed in range(SEEDS):
            head = fit_head(*make(seed), seed=seed, progress=backbone.context.progress)
            inside, outside = features_behind(head, test.values), features_behind(head, held_out_classes.values)
            found.setdefault(name, []).append(
                {repr(d): 100 * auroc(d.score(inside), d.score(outside)) for d in (kind() for kind in _CHOICE)}
            )
    parts = {"training": fit.values, "ID test": test.values, "held-out classes": held_out_classes.values}
    return {"targets": found, "sizes": {name: len(values) for name, values in parts.items()}}


@dataclass(frozen=True)
class _View:
    """A transform of a part of an image: its corners as shares of the sides, and whether it is mirrored."""

    transform: Any
    corners: tuple[float, float, float, float]  # left, top, right, bottom
    mirrored: bool

    def __call__(self, image: Image.Image) -> Tensor:
        left, top, right, bottom = (round(a * b) for a, b in zip(self.corners, 2 * image.size, strict=True))
        part = image.crop((left, top, right, bottom))
        return self.transform(part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if self.mirrored else part)


# Fixed, not random as in training, so that their features can be cached.
_VIEWS = (
    ((0, 0, 1, 1), True),
    ((0, 0, 0.8, 0.8), False),
    ((0.2, 0.2, 1, 1), True),
    ((0.1, 0.1, 0.9, 0.9), False),
)


OwnImages("own-images", "What `featnorm fit` is worth on images of your own")
HeadTargets("head-targets", "What to train a head on, by held-out classes")
