"""What `featnorm fit` is worth on images that its backbone was not trained on: half of Tiny ImageNet's classes.

The first 100 classes are known. The other 100 are near-OOD, textures and digits far-OOD. What to train the head on
was chosen without them: by the last 20 of the known classes, held out from the 80 others.
"""

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from featnorm._utils.layout import fast_layout
from featnorm.calibration import Calibration
from featnorm.detectors import NAN, Energy, HiddenConfidence, KLUniform, L1Norm
from featnorm.evaluation import compare
from featnorm.fitting import backbone_features, cluster, features_behind, fit_head, held_out
from featnorm.inputs import ImageSource, SlicedSource, open_source
from featnorm.metrics import auroc
from featnorm.models import DEFAULT_MODEL, LoadedModel, ProjectionHead, create_model, cut_classifier
from featnorm.paper.cifar10 import compared_detectors, percentages
from featnorm.paper.recipe import scheme_labels
from featnorm.paper.tables import Table, cell
from featnorm.runtime import Runtime

KNOWN = 100
#: Of the known classes, those that the targets of the head are chosen with.
LEARNED = 80
SEEDS = 3
CLUSTER_SIZES = (50, 20, 10, 5)
_FAR = {"textures": "ood224/textures", "digits": "mnist:test[::4]"}
_CHOICE = (NAN, L1Norm, HiddenConfidence, Energy, KLUniform)


@dataclass(frozen=True)
class _Fold:
    """Features (n, D), labels (n,) and digests of some images."""

    values: Tensor
    labels: Tensor
    digests: list[bytes]

    def of(self, classes: range) -> "_Fold":
        """Return the images of some classes, with labels from 0."""
        part = self._rows((self.labels >= classes.start) & (self.labels < classes.stop))
        return replace(part, labels=part.labels - classes.start)

    def split(self) -> tuple["_Fold", "_Fold"]:
        """Return what is learned from and what is held out, as `featnorm.fit_images` splits."""
        apart = held_out(self.digests)
        return self._rows(~apart), self._rows(apart)

    def _rows(self, chosen: Tensor) -> "_Fold":
        digests = [digest for digest, keep in zip(self.digests, chosen.tolist(), strict=True) if keep]
        return _Fold(self.values[chosen], self.labels[chosen], digests)


def run(
    root: Path | None, *, fabric: Any, environment: Mapping[str, str], progress: bool | None = None
) -> dict[str, Any]:
    """Measure what the head is worth, what labels are, and what to train it on without any.

    Parameters
    ----------
    root : the data root, with ``tiny_imagenet``, ``ood224/textures`` and ``mnist``.
    fabric : a `lightning_fabric.Fabric` of one process.
    environment : facts of versions, machine and date, which are kept with the result.
    progress : show progress bars; None for where there is a terminal.

    Returns
    -------
    ``heads``, by what they were trained on ("no head", "labels", "clusters"): a list of one entry a seed, with
    ``scores`` (AUROC and FPR95 in percent, by detector and OOD set), ``seconds`` and ``accuracy``; ``targets``,
    by name a list of one AUROC in percent a seed, by detector; ``refused``, the share of known images that a
    threshold for 95 % refuses, by head and seed; ``sizes``, ``environment``.

    Raises
    ------
    DataError
        The data cannot be had.
    """
    loaded = create_model(DEFAULT_MODEL)
    classifier: nn.Module = loaded.model.get_classifier()  # type: ignore[operator]
    backbone = fast_layout(cut_classifier(loaded.model)[0].to(fabric.device).eval())

    def fold(spec: str, classes: int | None = None) -> _Fold:
        source = open_source(spec, root=root)
        if classes is not None:
            rows = [i for i in range(len(source)) if (source.label(i) or 0) < classes]
            source = SlicedSource(source, rows, source.title)
        return _ask(source, loaded, backbone, fabric, progress)

    train, val = fold("tiny_imagenet:train", KNOWN), fold("tiny_imagenet:val")
    test, near = val.of(range(KNOWN)), val.of(range(KNOWN, 2 * KNOWN))
    ood = {"other classes": near.values} | {name: fold(spec).values for name, spec in _FAR.items()}
    learned, calibrate = train.split()
    heads: dict[str, list[dict[str, Any]]] = {
        "no head": [_evaluate(lambda values: features_behind(classifier, values), learned, test, ood)]
    }
    refused: dict[str, list[float]] = {}
    for name in ("labels", "clusters"):
        for seed in range(SEEDS):
            began = time.perf_counter()
            targets = learned.labels if name == "labels" else cluster(learned.values, seed)
            head = fit_head(learned.values, targets, seed=seed, progress=progress)
            seconds = time.perf_counter() - began
            entry = _evaluate(lambda values, head=head: features_behind(head, values), learned, test, ood)
            if name == "clusters":
                entry["accuracy"] = None
            heads.setdefault(name, []).append({**entry, "seconds": seconds})
            refused.setdefault(name, []).append(_refused(head, calibrate.values, test.values))
    return {
        "heads": heads,
        "targets": _targets(train, root, loaded, backbone, fabric, progress),
        "refused": refused,
        "sizes": {
            "learned from": len(learned.values),
            "calibrated on": len(calibrate.values),
            "known": len(test.values),
            **{name: len(values) for name, values in ood.items()},
        },
        "environment": dict(environment),
    }


def tables(result: Mapping[str, Any]) -> dict[str, Table]:
    """Return the tables of a result of `run`, by name: one a head, and "targets"."""
    sizes = ", ".join(f"{size} {name}" for name, size in result["sizes"].items())
    facts = [f"images: {sizes}", *(f"{name}: {value}" for name, value in result["environment"].items())]
    found = {}
    for head, runs in result["heads"].items():
        notes = list(facts)
        if head in result["refused"]:
            seconds = _mean([entry["seconds"] for entry in runs])
            refused = _mean([100 * share for share in result["refused"][head]])
            notes = [
                f"{len(runs)} heads, mean ± standard deviation; {seconds} s to train one",
                f"of known images {refused} % are refused at 95 %",
                *facts,
            ]
        if head == "labels":
            notes.insert(0, f"right on {_mean([100 * entry['accuracy'] for entry in runs])} % of known images")
        rows = []
        for detector, scores in runs[0]["scores"].items():
            pairs = [[entry["scores"][detector][name] for entry in runs] for name in scores]
            means = [
                [statistics.fmean(values) for values in zip(*run, strict=True)] for run in zip(*pairs, strict=True)
            ]
            rows.append([detector, cell(means), *map(cell, pairs)])
        rows.sort(key=lambda row: -float(row[1].split()[0]))
        called = "without a head" if head == "no head" else f"with a head on {head}"
        title = f"EfficientNet-Lite0 {called}: AUROC ↑ / FPR95 ↓ in percent"
        sets = list(next(iter(runs[0]["scores"].values())))
        found[head.replace(" ", "-")] = Table(title, ["Detector", "Mean", *sets], rows, notes)
    detectors = list(next(iter(result["targets"].values()))[0])
    rows = [
        [name, *(_mean([run[detector] for run in runs]) for detector in detectors)]
        for name, runs in result["targets"].items()
    ]
    title = (
        f"What the head is trained on: AUROC in percent of classes 1 to {LEARNED} against {LEARNED + 1} to {KNOWN}"
    )
    notes = [f"{SEEDS} heads each, mean ± standard deviation; no OOD data", *facts]
    found["targets"] = Table(title, ["Targets", *detectors], rows, notes)
    return found


def _ask(
    source: ImageSource, loaded: LoadedModel, backbone: nn.Module, fabric: Any, progress: bool | None
) -> _Fold:
    runtime = Runtime(fabric.device.type, fabric.strategy.precision.precision, progress=progress)
    known = backbone_features(source, loaded, backbone, runtime=runtime)
    labels = [-1 if (label := source.label(row)) is None else label for row in known.rows.tolist()]
    return _Fold(known.values, torch.tensor(labels), known.digests)


def _evaluate(features_of: Any, learned: _Fold, test: _Fold, ood: Mapping[str, Tensor]) -> dict[str, Any]:
    evaluation = compare(
        compared_detectors(),
        fit=[features_of(learned.values).replace(labels=learned.labels)],
        id_set=("known", [features_of(test.values).replace(labels=test.labels)]),
        ood_sets={name: [features_of(values)] for name, values in ood.items()},
    )
    return {"scores": percentages(evaluation), "accuracy": evaluation.accuracy, "left_out": evaluation.excluded}


def _refused(head: ProjectionHead, calibrate: Tensor, test: Tensor) -> float:
    """Return the share of new known images that the default detector's threshold refuses."""
    detector = KLUniform()
    calibration = Calibration(detector.score(features_behind(head, calibrate)))
    return float(1 - calibration.is_id(detector.score(features_behind(head, test))).double().mean())


def _targets(
    train: _Fold, root: Path | None, loaded: LoadedModel, backbone: nn.Module, fabric: Any, progress: bool | None
) -> dict[str, list[dict[str, float]]]:
    """Compare what a head may be trained on, by the known classes that are left out."""
    learned, known = train.of(range(LEARNED)).split()
    foreign = train.of(range(LEARNED, KNOWN)).split()[1]
    n = len(learned.values)
    images = torch.arange(n)

    def views() -> tuple[Tensor, Tensor]:
        source = open_source("tiny_imagenet:train", root=root)
        wanted = set(learned.digests)
        rows = [i for i in range(len(source)) if (source.label(i) or 0) < LEARNED and source.digest(i) in wanted]
        chosen = SlicedSource(source, rows, source.title)
        every = [learned.values]
        for view in _VIEWS:
            seen = replace(loaded, transform=_Viewed(loaded.transform, view))
            every.append(_ask(chosen, seen, backbone, fabric, progress).values)
        return torch.cat(every), images.repeat(len(every))

    every_view = views()
    kinds: dict[str, Any] = {"labels": lambda seed: (learned.values, learned.labels)}
    for size in CLUSTER_SIZES:
        kinds[f"clusters of {size} images"] = lambda seed, size=size: (
            learned.values,
            cluster(learned.values, seed, size=size),
        )
    kinds["instances"] = lambda seed: (learned.values, images)
    kinds[f"instances, {len(_VIEWS) + 1} views each"] = lambda seed: every_view
    kinds["random bits"] = lambda seed: (learned.values, scheme_labels("R", images, seed)[0])
    kinds["one class"] = lambda seed: (learned.values, torch.zeros_like(images))
    found: dict[str, list[dict[str, float]]] = {}
    for name, make in kinds.items():
        for seed in range(SEEDS):
            head = fit_head(*make(seed), seed=seed, progress=progress)
            mine, other = features_behind(head, known.values), features_behind(head, foreign.values)
            found.setdefault(name, []).append(
                {repr(d): 100 * auroc(d.score(mine), d.score(other)) for d in (kind() for kind in _CHOICE)}
            )
    return found


@dataclass(frozen=True)
class _View:
    """A part of an image, by its corners as shares of the sides; mirrored or not."""

    left: float
    top: float
    right: float
    bottom: float
    mirrored: bool


# Fixed, where training at random would draw them: so that their features can be kept.
_VIEWS = (
    _View(0, 0, 1, 1, True),
    _View(0, 0, 0.8, 0.8, False),
    _View(0.2, 0.2, 1, 1, True),
    _View(0.1, 0.1, 0.9, 0.9, False),
)


@dataclass(frozen=True)
class _Viewed:
    """A transform of a view of an image."""

    transform: Any
    view: _View

    def __call__(self, image: Image.Image) -> Tensor:
        width, height = image.size
        v = self.view
        box = (round(v.left * width), round(v.top * height), round(v.right * width), round(v.bottom * height))
        part = image.crop(box)
        return self.transform(part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if v.mirrored else part)


def _mean(values: Sequence[float]) -> str:
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.1f}{deviation}"
