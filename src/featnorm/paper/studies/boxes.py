"""Detectors on boxes: a Faster R-CNN that finds digits on textures, and what it finds of foreign objects."""

import base64
import io
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from featnorm._utils.extras import import_extra
from featnorm._utils.files import replacing
from featnorm._utils.progress import progress_bar
from featnorm.calibration import Calibration
from featnorm.detectors import parse_detector
from featnorm.detectors.held_out import fit_in_batches
from featnorm.evaluation import standard_detectors
from featnorm.features import Boxes, Features
from featnorm.metrics import evaluate
from featnorm.paper.images import as_pixels
from featnorm.paper.panels import image_grid
from featnorm.paper.scenes import DIGITS, FOREIGN, FOREIGN_OBJECTS, SIDE, Objects, Scenes, SceneStudy, Seeds
from featnorm.paper.study import Context, Seeded
from featnorm.paper.tables import (
    MEASURES,
    Result,
    Table,
    cell,
    environment,
    left_out,
    mean_and_deviation,
    mean_pair,
)
from featnorm.parts import PartCalibration
from featnorm.report.boxes import draw_boxes
from featnorm.tap import FeatureTap
from featnorm.tap.boxes import intersection_over_union
from featnorm.verdict import BoxVerdict

_KNOWN = "digits"
#: Confidence below which the network drops a box, as is usual for detectors in use.
MIN_CONFIDENCE = 0.5
#: Rates are measured for these detectors, on this many draws of calibration scenes of each number.
RATES = ("NAN()", "MSP()", "KNN(k=10)")
CALIBRATED, DRAWS = (19, 50, 200), 300
#: Scenes that are simulated to test the rates on, in each draw.
SIMULATED = 1000
_ADDED = "KNN(k=10) KLUniform+KNN(k=10) KLUniform+Mahalanobis(normalize=True)"
_CELL = SIDE // 2  # a scene has 2 x 2 places, with one object at most in each
_WIDTH, _HIDDEN, _POOL = 64, 256, 7
_BATCH, _RATE, _WARMUP, _DECAY = 8, 1e-3, 0.1, 0.01
_SCORED = 50
_TPR, _LOWEST = 0.95, 0.0
_PICTURE = "KLUniform() + KNN(k=10)"  # whose verdicts are drawn
_PICTURED, _SIDE = 3, 320  # scenes of each kind, and their size in pixels
_WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Scale(Seeds):
    """Number of seeds, of training steps of 8 scenes, of scenes to train and fit on, and of scenes to test on."""

    steps: int
    training: int
    known: int
    foreign: int


@dataclass(frozen=True, eq=False)
class BoxStudy(SceneStudy[Scale]):
    """Every detector on the boxes that a network finds, and the rates that calibration promises.

    Its result has one entry per seed: ``accuracy``, of the classes of boxes on digits; ``found``, by kind of
    objects the share that has a box; ``boxes``, their numbers; ``scores``, AUROC and FPR95 in percent, by detector
    and kind of foreign objects, of boxes on these against boxes on digits in scenes without them;
    ``flagged_scenes``, by detector and kind the percentage of scenes with a box on a foreign object that are
    flagged; ``excluded``; ``rates``, see `_rates`; and of the first seed ``simulated``, the same of simulated
    scenes, and ``pictures``.
    """

    scales: ClassVar[Mapping[str, Scale]] = {
        "laptop": Scale(seeds=3, steps=2000, training=3000, known=1000, foreign=600),
        "paper": Scale(seeds=5, steps=20_000, training=20_000, known=4000, foreign=2000),
    }

    def settings(self, job: Seeded, scale: Scale, inputs: tuple[Objects, Objects]) -> dict[str, Any]:
        return super().settings(job, scale, inputs) | {"min_confidence": MIN_CONFIDENCE}

    def run(
        self, job: Seeded, scale: Scale, inputs: tuple[Objects, Objects], folder: Path, context: Context
    ) -> dict[str, Any]:
        objects, others = inputs
        training = objects.draw(scale.training, job.seed)
        network, seconds = _trained(training, scale.steps, job.seed, folder, context)
        tap = FeatureTap(network, per="box")
        # The seeds of the scenes are apart from those of training.
        scenes = {
            words: others.draw(scale.foreign if kind else scale.known, 1000 * (job.seed + 1) + i, kind)
            for i, (kind, words) in enumerate({"": _KNOWN, **FOREIGN_OBJECTS}.items())
        }
        found = {words: Found.of(tap, drawn) for words, drawn in scenes.items()}
        detectors = [detector for detector in standard_detectors() if not detector.needs_model]
        detectors += map(parse_detector, _ADDED.split())
        fit = Found.of(tap, training)
        failed = fit_in_batches(detectors, [fit.features[fit.is_digit]])
        excluded = {repr(detector): str(error) for detector, error in failed.items()}
        scores: dict[str, dict[str, Tensor]] = {}
        for detector in detectors:
            try:
                if repr(detector) not in excluded:
                    scores[repr(detector)] = {
                        words: detector.score(part.features).double() for words, part in found.items()
                    }
            except ValueError as error:
                excluded[repr(detector)] = str(error)
        known = found[_KNOWN]
        right = known.boxes.labels == known.features.tensor("labels")
        result: dict[str, Any] = {
            "train_seconds": seconds,
            "accuracy": float(right[known.is_digit].double().mean()),
            "boxes": {
                words: {
                    "digits": int(part.is_digit.sum()),
                    "foreign": int(part.is_foreign.sum()),
                    "all": len(part),
                }
                for words, part in found.items()
            },
            "found": {_KNOWN: known.share_found(foreign=False)}
            | {words: found[words].share_found(foreign=True) for words in FOREIGN_OBJECTS.values()},
            "scores": {},
            "flagged_scenes": {},
            "excluded": excluded,
            "rates": {name: _rates(known, scores[name][_KNOWN], job.seed) for name in RATES},
        }
        for name, of_sets in scores.items():
            on_digits = of_sets[_KNOWN][known.is_digit]
            calibration = PartCalibration(of_sets[_KNOWN], known.owners, _TPR, lowest=_LOWEST)
            for words in FOREIGN_OBJECTS.values():
                part = found[words]
                metrics = evaluate(on_digits, of_sets[words][part.is_foreign])
                result["scores"].setdefault(name, {})[words] = [100 * metrics.auroc, 100 * metrics.fpr95]
                units = calibration.predict_units(of_sets[words], part.owners, part.count)
                assert units.is_id is not None
                flagged = ~units.is_id[part.owners[part.is_foreign].unique()]
                result["flagged_scenes"].setdefault(name, {})[words] = 100 * float(flagged.double().mean())
        if job.seed == 0:
            result["simulated"] = _simulated_rates()
            calibration = PartCalibration(scores[_PICTURE][_KNOWN], known.owners, _TPR, lowest=_LOWEST)
            result["pictures"] = [
                picture
                for words, part in found.items()
                for picture in _pictured(scenes[words], part, *calibration.predict(scores[_PICTURE][words]))
            ]
        return result

    def tables(self, content: Sequence[Result]) -> dict[str, Table]:
        """See `Study`; "boxes" has the boxes, "boxes-rates" what is flagged in scenes without foreign objects."""
        kinds = list(FOREIGN_OBJECTS.values())
        notes = [f"mean ± standard deviation over {len(content)} seeds", *environment(content)]
        names = [name for name in content[0]["scores"] if all(name in result["scores"] for result in content)]
        names.sort(key=lambda name: -statistics.fmean(mean_pair(result, name)[0] for result in content))
        rows = [
            [
                name,
                *(cell([result["scores"][name][words] for result in content]) for words in kinds),
                *(
                    mean_and_deviation([result["flagged_scenes"][name][words] for result in content])
                    for words in kinds
                ),
            ]
            for name in names
        ]

        def percent(*path: str) -> str:
            values = []
            for result in content:
                value: Any = result
                for key in path:
                    value = value[key]
                values.append(100 * value)
            return f"{mean_and_deviation(values)} %"

        counts = [content[0]["boxes"][words] for words in (_KNOWN, *kinds)]
        of_network = [
            f"{percent('found', _KNOWN)} of the digits have a box, {percent('accuracy')} of these the right class",
            *(f"{percent('found', words)} of the {words} have a box" for words in kinds),
            f"boxes of the first seed: {counts[0]['digits']:,} on digits in scenes without foreign objects, "
            + ", ".join(
                f"{count['foreign']:,} on {words}" for count, words in zip(counts[1:], kinds, strict=True)
            ),
        ]
        rates = [
            [name, f"{entries[0]['calibrated']}", *_rate_cells(entries)]
            for name in RATES
            for entries in zip(*(result["rates"][name] for result in content), strict=True)
        ]
        rates += [
            ["simulated", f"{entry['calibrated']}", *_rate_cells([entry])] for entry in content[0]["simulated"]
        ]
        promised = f"{100 * (1 - _TPR):.0f} % are promised"
        return {
            self.name: Table(
                f"Boxes on foreign objects against boxes on digits, {MEASURES}; and percentage of the scenes with "
                f"such a box that are flagged, where {promised} of the others",
                ["Detector", *kinds, *(f"scenes, {words}" for words in kinds)],
                rows,
                [*of_network, *notes, *left_out(content[0])],
            ),
            f"{self.name}-rates": Table(
                f"Boxes and scenes without foreign objects that are flagged where {promised}",
                [
                    "Detector",
                    "calibration scenes",
                    "flagged boxes",
                    "as if boxes were independent",
                    "flagged scenes",
                ],
                rates,
                [
                    f"mean per scene, and 5th to 95th percentile of {DRAWS} draws of calibration scenes",
                    "simulated: scenes with one box have lower scores than scenes with eight",
                    *notes,
                ],
            ),
        }

    def pictures(self, content: Sequence[Result]) -> dict[str, str]:
        """See `Study`; one figure of scenes with the verdicts on their boxes, one row per kind of objects."""
        drawn = []
        for picture in content[0]["pictures"]:
            scene = Image.open(io.BytesIO(base64.b64decode(picture["scene"])))
            drawn.append(draw_boxes(scene, [BoxVerdict(*box) for box in picture["boxes"]], _SIDE))
        return {self.name: image_grid(drawn, _PICTURED)}


@dataclass(frozen=True)
class Found:
    """The boxes that a network finds in scenes.

    Parameters
    ----------
    features : features of the n boxes; labels as `targets_of` has them, -1 for a box on no object.
    owners : (n,) scene of each box.
    boxes : the boxes.
    truth : objects of each scene, as `targets_of` returns them.
    """

    features: Features
    owners: Tensor
    boxes: Boxes
    truth: list[dict[str, Tensor]]

    @classmethod
    def of(cls, tap: FeatureTap, scenes: Scenes) -> "Found":
        """Run the network of a tap on scenes."""
        truth = targets_of(scenes.truth)
        starts = range(0, len(truth), _SCORED)
        batches = (
            ([*as_pixels(scenes.pixels[start : start + _SCORED])], truth[start : start + _SCORED])
            for start in starts
        )
        parts = list(tap.stream(batches, progress=False))
        found = [part.parts for part in parts if part.parts is not None]
        owners = torch.cat([one.owners + start for one, start in zip(found, starts, strict=True)])
        boxes = [one.boxes for one in found if one.boxes is not None]
        return cls(Features.cat(parts), owners, Boxes(*map(torch.cat, zip(*boxes, strict=True))), truth)

    def __len__(self) -> int:
        return len(self.owners)

    @property
    def count(self) -> int:
        """Number of scenes."""
        return len(self.truth)

    @property
    def is_digit(self) -> Tensor:
        """Whether each box is on a digit of the ID classes."""
        labels = self.features.tensor("labels")
        return (labels > 0) & (labels != FOREIGN)

    @property
    def is_foreign(self) -> Tensor:
        """Whether each box is on a foreign object."""
        return self.features.tensor("labels") == FOREIGN

    def share_found(self, *, foreign: bool) -> float:
        """Return the share of the foreign objects, or else of the digits, that have a box."""
        hits, total = 0, 0
        for i, target in enumerate(self.truth):
            objects = target["boxes"][(target["labels"] == FOREIGN) == foreign]
            overlaps = intersection_over_union(objects, self.boxes.corners[self.owners == i])
            hits += int((overlaps >= 0.5).any(1).sum())
            total += len(objects)
        return hits / total


def make_detector(seed: int) -> nn.Module:
    """Return a small Faster R-CNN with initial weights; torchvision's classes, on a backbone of six layers."""
    detection, ops = import_extra("torchvision.models.detection"), import_extra("torchvision.ops")
    anchors = import_extra("torchvision.models.detection.anchor_utils").AnchorGenerator
    heads = import_extra("torchvision.models.detection.faster_rcnn")

    def layer(inputs: int, outputs: int, stride: int = 1) -> nn.Module:
        convolution = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone: Any = nn.Sequential(
            layer(3, 16, 2), layer(16, 32, 2), layer(32, _WIDTH), layer(_WIDTH, _WIDTH), layer(_WIDTH, _WIDTH)
        )
        backbone.out_channels = _WIDTH
        model: nn.Module = detection.FasterRCNN(
            backbone,
            min_size=SIDE,
            max_size=SIDE,
            rpn_anchor_generator=anchors(((14, 22),), ((0.5, 1.0),)),
            rpn_pre_nms_top_n_train=200,
            rpn_pre_nms_top_n_test=100,
            rpn_post_nms_top_n_train=60,
            rpn_post_nms_top_n_test=30,
            rpn_batch_size_per_image=64,
            box_roi_pool=ops.MultiScaleRoIAlign(["0"], _POOL, 2),
            box_head=heads.TwoMLPHead(_WIDTH * _POOL**2, _HIDDEN),
            box_predictor=heads.FastRCNNPredictor(_HIDDEN, DIGITS + 1),
            box_batch_size_per_image=32,
            box_score_thresh=MIN_CONFIDENCE,
            box_detections_per_img=20,
        )
    return model


def targets_of(truth: Tensor) -> list[dict[str, Tensor]]:
    """Return the objects of scenes by their truth (n, 64, 64): ``boxes`` (k, 4) and ``labels`` (k,) of each scene.

    Labels are those of the truth: a digit plus one, or `FOREIGN`.
    """
    targets = []
    for scene in truth:
        boxes, labels = [], []
        for y, x in product(range(0, SIDE, _CELL), repeat=2):
            cell = scene[y : y + _CELL, x : x + _CELL]
            rows, columns = cell.nonzero(as_tuple=True)
            if len(rows):
                boxes.append([x + columns.min(), y + rows.min(), x + columns.max() + 1, y + rows.max() + 1])
                labels.append(int(cell.max()))
        corners = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
        targets.append({"boxes": corners, "labels": torch.tensor(labels, dtype=torch.int64)})
    return targets


def train_detector(
    model: nn.Module, scenes: Scenes, steps: int, seed: int, *, progress: bool | None = None
) -> None:
    """Train a detector on scenes without foreign objects.

    Parameters
    ----------
    model : the detector, which is then in evaluation mode.
    scenes : training scenes.
    steps : number of steps of AdamW, whose learning rate rises and falls along a cosine.
    seed : seed of the order of the scenes, and of the proposals to train on.
    progress : whether to show a progress bar. Default: on a terminal; elsewhere a line every 30 seconds.
    """
    targets = targets_of(scenes.truth)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), _RATE, weight_decay=_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _RATE, total_steps=steps, pct_start=_WARMUP)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # torchvision's detectors draw the proposals to train on from torch's generator
        for _ in progress_bar(range(steps), unit="step", progress=progress):
            rows = torch.randint(len(targets), (_BATCH,)).tolist()
            losses = model([*as_pixels(scenes.pixels[rows])], [targets[row] for row in rows])
            optimizer.zero_grad()
            torch.stack([*losses.values()]).sum().backward()
            optimizer.step()
            schedule.step()
    model.eval()


def _trained(scenes: Scenes, steps: int, seed: int, folder: Path, context: Context) -> tuple[nn.Module, float]:
    """Train a detector, and return it with the seconds that it took; read it if an earlier run has trained it."""
    file, made_with = folder / _WEIGHTS, json.dumps({"seed": seed, "steps": steps, "scenes": len(scenes.pixels)})
    model = make_detector(seed)
    if file.exists():
        with safe_open(file, "pt") as opened:
            about = opened.metadata()
        if about["settings"] == made_with:
            model.load_state_dict(load_file(file))
            return model.eval(), float(about["seconds"])
    began = time.perf_counter()
    train_detector(model, scenes, steps, seed, progress=context.progress)
    seconds = time.perf_counter() - began
    with replacing(file) as temporary:
        save_file(model.state_dict(), temporary, {"settings": made_with, "seconds": f"{seconds:.1f}"})
    return model, seconds


def _rates(known: Found, scores: Tensor, seed: int) -> list[dict[str, Any]]:
    """Return what is flagged in scenes without foreign objects, see `_shares`; the other scenes are new ones."""
    generator = torch.Generator().manual_seed(seed)
    by_scene = [*scores.split(torch.bincount(known.owners, minlength=known.count).tolist())]
    by_scene = [part for part in by_scene if len(part)]

    def draw(count: int) -> tuple[list[Tensor], list[Tensor]]:
        order = torch.randperm(len(by_scene), generator=generator).tolist()
        return [by_scene[i] for i in order[:count]], [by_scene[i] for i in order[count:]]

    return [_shares(count, draw) for count in CALIBRATED]


def _simulated_rates() -> list[dict[str, Any]]:
    """Return the same of simulated scenes, of which half have one box with a lower score, and half have eight."""
    generator = torch.Generator().manual_seed(0)

    def draw(count: int) -> tuple[list[Tensor], list[Tensor]]:
        total = count + SIMULATED
        is_full = torch.rand(total, generator=generator) < 0.5
        means = torch.where(is_full, 2.0, 0.0)
        sizes = torch.where(is_full, 8, 1)
        scores = means.repeat_interleave(sizes) + torch.randn(int(sizes.sum()), generator=generator)
        parts = [*scores.double().split(sizes.tolist())]
        return parts[:count], parts[count:]

    return [_shares(count, draw) for count in CALIBRATED]


def _shares(count: int, draw: Callable[[int], tuple[list[Tensor], list[Tensor]]]) -> dict[str, Any]:
    """Return the share of boxes that are flagged per new scene, over draws.

    Parameters
    ----------
    count : number of calibration scenes.
    draw : returns the scores of the boxes of each of ``count`` scenes, and of each of the new scenes.

    Returns
    -------
    Mean, 5th and 95th percentile over `DRAWS` of ``flagged``, by a `PartCalibration`, and ``independent``, by a
    `Calibration` on all boxes; and ``scenes``, the mean share of flagged scenes.
    """
    shares: dict[str, list[float]] = {"flagged": [], "independent": [], "scenes": []}
    for _ in range(DRAWS):
        chosen, new = draw(count)
        owners = torch.arange(count).repeat_interleave(torch.tensor([*map(len, chosen)]))
        scores = torch.cat(chosen)
        by_scene, pooled = PartCalibration(scores, owners, _TPR, lowest=_LOWEST), Calibration(scores, _TPR)
        sizes = torch.tensor([*map(len, new)])
        of_new = torch.arange(len(new)).repeat_interleave(sizes)
        new_scores = torch.cat(new)
        for name, made in (("flagged", by_scene), ("independent", pooled)):
            flagged = (new_scores < made.threshold).double()
            per_scene = torch.zeros(len(new), dtype=torch.float64).index_add(0, of_new, flagged) / sizes
            shares[name].append(float(per_scene.mean()))
        units = by_scene.predict_units(new_scores, of_new, len(new))
        assert units.is_id is not None
        shares["scenes"].append(float((~units.is_id).double().mean()))
    entry: dict[str, Any] = {"calibrated": count, "scenes": statistics.fmean(shares["scenes"])}
    for name in ("flagged", "independent"):
        values = torch.tensor(shares[name], dtype=torch.float64)
        entry[name] = [float(values.mean()), *values.quantile(values.new_tensor([0.05, 0.95])).tolist()]
    return entry


def _rate_cells(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the cells of one number of calibration scenes, means over the seeds."""
    cells = []
    for name in ("flagged", "independent"):
        mean, low, high = (100 * statistics.fmean(entry[name][i] for entry in entries) for i in range(3))
        cells.append(f"{mean:.2f} % ({low:.1f} to {high:.1f})")
    return [*cells, f"{100 * statistics.fmean(entry['scenes'] for entry in entries):.2f} %"]


def _pictured(scenes: Scenes, found: Found, p_values: Tensor, is_id: Tensor) -> list[dict[str, Any]]:
    """Return three scenes with the verdicts on their boxes, as JSON.

    They are the first two in which a box on a foreign object is flagged, and the first in which one is not; of
    scenes without foreign objects, the first three.
    """
    flagged, missed = (
        found.owners[found.is_foreign & (is_id == value)].unique().tolist() for value in (False, True)
    )
    chosen = [*flagged[: _PICTURED - 1], *missed]
    chosen += [i for i in range(found.count) if i not in chosen]
    pictures = []
    for i in chosen[:_PICTURED]:
        buffer = io.BytesIO()
        Image.fromarray(scenes.pixels[i].movedim(0, 2).numpy()).save(buffer, "PNG")
        boxes = [
            [
                [float(f"{corner:.4g}") for corner in found.boxes.corners[row].tolist()],
                f"{int(found.boxes.labels[row]) - 1}",
                float(f"{float(found.boxes.confidence[row]):.3g}"),
                0.0,
                float(f"{float(p_values[row]):.3g}"),
                bool(is_id[row]),
            ]
            for row in (found.owners == i).nonzero()[:, 0].tolist()
        ]
        pictures.append({"scene": base64.b64encode(buffer.getvalue()).decode(), "boxes": boxes})
    return pictures


BoxStudy("boxes", "Detectors on the boxes of an object detector", duration="30 min")
