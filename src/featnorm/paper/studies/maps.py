"""Detectors at the positions of maps: a network that segments digits, and scenes with foreign objects."""

import base64
import io
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor, nn

from featnorm.calibration import Calibration
from featnorm.detectors import Detector, parse_detector
from featnorm.detectors.held_out import fit_in_batches
from featnorm.features import Features, Parts
from featnorm.metrics import auroc, evaluate
from featnorm.paper.images import as_pixels
from featnorm.paper.panels import image_grid
from featnorm.paper.scenes import DIGITS, FOREIGN, FOREIGN_OBJECTS, SIDE, Objects, Scenes, SceneStudy, Seeds
from featnorm.paper.study import Context, Seeded
from featnorm.paper.tables import Result, Table, cell, environment, left_out, mean_and_deviation
from featnorm.parts import PartCalibration, sampled_parts, unit_scores
from featnorm.report.maps import map_picture
from featnorm.tap import FeatureTap
from featnorm.training import Recipe, train
from featnorm.training.runs import LOG, read_log
from featnorm.verdict import Verdict

RECIPE = Recipe(epochs=12, batch_size=16, optimizer="adamw", lr=3e-3, weight_decay=0.01, warmup=0.05)
#: Rates are measured for these detectors, on this many draws of calibration scenes of each number.
RATES = ("NAN()", "KLUniform()")
CALIBRATED, DRAWS = (19, 100), 100
LOWEST = 0.05
# A bank of all positions would take hours: detectors with a bank get a sample.
DETECTORS = (
    "NAN L1Norm Sparsity HiddenConfidence LpNorm ReAct(NAN()) MSP MaxLogit Energy KLUniform GEN KLMatching SHE "
    "ReAct(Energy()) RAS(Energy()) SCALE(Energy()) ASH(Energy()) KNN(k=10,size=2000) KNN(k=10,size=2000)/NAN "
    "NNGuide SSD SSD/NAN Mahalanobis Mahalanobis(normalize=True) Mahalanobis(relative=True) Residual ViM "
    "ViM(normalize=True) NECO NCI FDBD ORA KLUniform+KNN(k=10,size=2000) TemperatureScaling(MSP())"
)
_BATCH = 50
_TPR = 0.95
# Scenes of each kind of foreign object in the figure, and the default detector of `featnorm fit` for positions.
_PICTURED, _PICTURED_DETECTOR = 2, "KLUniform()"


@dataclass(frozen=True)
class Scale(Seeds):
    """Number of seeds, of scenes for training and for fitting detectors, and of scenes to test on."""

    training: int
    fit: int
    known: int
    foreign: int


class MapNetwork(nn.Module):
    """A small U-Net whose classifier reads a rectified layer at half the resolution of its inputs.

    It maps pixels (n, 3, h, w) in [0, 1] to logits (n, classes, h, w).
    """

    def __init__(self, classes: int, width: int = 64) -> None:
        super().__init__()
        self.stem = _block(3, 16, stride=2)
        self.down = _block(16, 32, stride=2)
        self.bottom = nn.Sequential(_block(32, 96, stride=2), _block(96, 96))
        self.middle = _block(96 + 32, 48)
        self.up = _block(48 + 16, width)
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the logits, interpolated to the size of the pixels."""
        high = self.stem(pixels - 0.5)
        middle = self.down(high)
        low = self.bottom(middle)
        middle = self.middle(torch.cat([middle, nn.functional.interpolate(low, scale_factor=2.0)], 1))
        high = self.up(torch.cat([high, nn.functional.interpolate(middle, scale_factor=2.0)], 1))
        return nn.functional.interpolate(self.head(high), pixels.shape[2:], mode="bilinear", align_corners=False)


def _block(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


def train_network(
    objects: Objects, scenes: int, seed: int, folder: Path, context: Context
) -> tuple[MapNetwork, Scenes]:
    """Train a network, or resume its training; return it with its training scenes."""
    drawn = objects.draw(scenes, seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = MapNetwork(DIGITS + 1)
    train(network, drawn.pixels, drawn.truth, RECIPE, folder=folder, runtime=context.runtime, seed=seed)
    return network, drawn


@dataclass(frozen=True, eq=False)
class MapStudy(SceneStudy[Scale]):
    """Every detector per position, the verdicts on whole scenes, and the rates that calibration promises.

    Its result has one entry per seed: ``accuracy`` of all positions and of those of digits; ``positions``, by
    detector and kind of foreign object AUROC, FPR95 and AUPR in percent of positions of foreign objects against
    all others of the same scenes; ``against_digits``, AUROC in percent of the former against positions of known
    digits alone; ``scene_auroc``, AUROC in percent of whole scenes; ``share``, of the positions that are foreign;
    ``excluded``; ``rates``, see `_rates`; and of the first seed ``pictures``.
    """

    scales: ClassVar[Mapping[str, Scale]] = {
        "laptop": Scale(seeds=3, training=3000, fit=500, known=500, foreign=100),
        "paper": Scale(seeds=5, training=20_000, fit=4000, known=4000, foreign=1000),
    }

    def settings(self, job: Seeded, scale: Scale, inputs: tuple[Objects, Objects]) -> dict[str, Any]:
        return super().settings(job, scale, inputs) | {"recipe": RECIPE.to_dict()}

    def run(
        self, job: Seeded, scale: Scale, inputs: tuple[Objects, Objects], folder: Path, context: Context
    ) -> dict[str, Any]:
        objects, others = inputs
        network, training = train_network(objects, scale.training, job.seed, folder, context)
        log = read_log(folder / LOG)
        tap = FeatureTap(network, per="position")
        # The seeds of the scenes are apart from those of training.
        known, *foreign = (
            others.draw(scale.foreign if kind else scale.known, 1000 * (job.seed + 1) + i, kind)
            for i, kind in enumerate(("", *FOREIGN_OBJECTS))
        )
        detectors = [parse_detector(expression) for expression in DETECTORS.split()]
        fit = sampled_parts(_features(tap, training.first(scale.fit)), job.seed)
        excluded = fit_in_batches(detectors, fit)
        detectors = [detector for detector in detectors if detector not in excluded]
        rated = [detector for detector in detectors if repr(detector) in RATES]
        of_every = _scores(tap, known, rated)
        of_known = _scores(tap, known.first(scale.foreign), detectors)
        found: dict[str, Any] = {
            "accuracy": _accuracy(tap, known),
            "train_seconds": sum(entry["seconds"] for entry in log),
            "positions": {name: {} for name in of_known},
            "against_digits": {name: {} for name in of_known},
            "scene_auroc": {name: {} for name in of_known},
            "share": {},
            "excluded": {repr(detector): str(error) for detector, error in excluded.items()},
            "rates": {name: _rates(maps, job.seed) for name, maps in of_every.items()},
        }
        for words, scenes in zip(FOREIGN_OBJECTS.values(), foreign, strict=True):
            scores = _scores(tap, scenes, detectors)
            truth = _at_positions(scenes.truth)
            is_foreign, is_digit = truth == FOREIGN, (truth > 0) & (truth <= DIGITS)
            found["share"][words] = float(is_foreign.double().mean())
            for name, maps in scores.items():
                metrics = evaluate(maps[~is_foreign], maps[is_foreign])
                values = (metrics.auroc, metrics.fpr95, metrics.aupr_out)
                found["positions"][name][words] = [100 * value for value in values]
                found["against_digits"][name][words] = 100 * auroc(maps[is_digit], maps[is_foreign])
                found["scene_auroc"][name][words] = 100 * auroc(_whole(of_known[name]), _whole(maps))
            if job.seed == 0:
                found.setdefault("pictures", []).extend(
                    _pictured(words, scenes, scores[_PICTURED_DETECTOR], of_every[_PICTURED_DETECTOR])
                )
        return found

    def tables(self, content: Sequence[Result]) -> dict[str, Table]:
        """See `Study`; "maps" has the positions, "maps-scenes" the whole scenes, "maps-rates" the rates."""
        notes = [
            f"mean ± standard deviation over {len(content)} seeds",
            *(f"{name}: {content[0]['scenes'][name]:,} scenes" for name in content[0]["scenes"]),
            *environment(content),
        ]
        accuracy = [
            mean_and_deviation([100 * run["accuracy"][name] for run in content]) for name in ("pixels", "digits")
        ]
        shares = [
            f"{mean_and_deviation([100 * run['share'][kind] for run in content])} % of the positions are {kind}"
            for kind in content[0]["share"]
        ]
        of_network = "accuracy {} % of all positions, {} % of those of digits".format(*accuracy)
        names = [name for name in content[0]["positions"] if all(name in run["positions"] for run in content)]
        kinds = list(content[0]["share"])
        names.sort(key=lambda name: -sum(run["positions"][name][kind][0] for run in content for kind in kinds))

        def means(part: str, name: str) -> list[str]:
            return [mean_and_deviation([run[part][name][kind] for run in content]) for kind in kinds]

        positions = [
            [name, *(cell([run["positions"][name][kind] for run in content]) for kind in kinds)] for name in names
        ]
        alone = [[name, *means("against_digits", name), *means("scene_auroc", name)] for name in names]
        rates = [
            [name, f"{runs[0]['calibrated']}", *_rate_cells(runs)]
            for name in content[0]["rates"]
            for runs in zip(*(run["rates"][name] for run in content), strict=True)
        ]
        return {
            "maps": Table(
                "Positions of foreign objects against all others: AUROC ↑ / FPR95 ↓ / AUPR of OOD ↑ in percent",
                ["Detector", *kinds],
                positions,
                [of_network, *shares, *notes, *left_out(content[0])],
            ),
            "maps-scenes": Table(
                "Positions of foreign objects against those of digits, and scenes with a foreign object against "
                "scenes without: AUROC ↑ in percent",
                ["Detector", *kinds, *(f"scenes with {kind}" for kind in kinds)],
                alone,
                [
                    f"the score of a scene is the mean of the lowest {100 * LOWEST:g} % of its positions' scores",
                    *notes,
                ],
            ),
            "maps-rates": Table(
                f"What is flagged of scenes without a foreign object, where at most {100 * (1 - _TPR):.0f} % is "
                "promised",
                [
                    "Detector", "calibration scenes", "flagged positions", "as if positions were independent",
                    "in the range that they would promise", "flagged scenes",
                ],
                rates,
                [
                    f"{DRAWS} draws of calibration scenes per seed; mean, and 5th to 95th percentile of the draws",
                    f"means over {len(content)} seeds",
                    *notes[1:],
                ],
            ),
        }  # fmt: skip

    def pictures(self, content: Sequence[Result]) -> dict[str, str]:
        """See `Study`; one figure of scenes with foreign objects beside the maps of their p-values."""
        return {"maps": _figure(content[0]["pictures"])}


def _features(tap: FeatureTap, scenes: Scenes) -> Iterator[Features]:
    batches = zip(scenes.pixels.split(_BATCH), scenes.truth.split(_BATCH), strict=True)
    yield from tap.stream(((as_pixels(pixels), truth) for pixels, truth in batches), progress=False)


def _scores(tap: FeatureTap, scenes: Scenes, detectors: Sequence[Detector]) -> dict[str, Tensor]:
    """Return the scores of the positions (n, h, w), by detector."""
    found: dict[str, list[Tensor]] = {repr(detector): [] for detector in detectors}
    for features in _features(tap, scenes):
        parts = features.parts
        assert parts is not None
        assert parts.grid is not None
        for detector in detectors:
            maps = detector.score(features).double().reshape(parts.count, *parts.grid)
            found[repr(detector)].append(maps)
    return {name: torch.cat(maps) for name, maps in found.items()}


def _accuracy(tap: FeatureTap, scenes: Scenes) -> dict[str, float]:
    """Return the shares of positions that are classified correctly, of all and of those of digits."""
    pairs = [
        (features.tensor("logits").argmax(1), features.tensor("labels")) for features in _features(tap, scenes)
    ]
    predicted, labels = map(torch.cat, zip(*pairs, strict=True))
    right = (predicted == labels).double()
    return {"pixels": float(right.mean()), "digits": float(right[labels > 0].mean())}


def _at_positions(truth: Tensor) -> Tensor:
    """Return the truth of the pixels (n, H, W) at the positions, as `FeatureTap` takes labels."""
    size = (SIDE // 2, SIDE // 2)
    return nn.functional.interpolate(truth[:, None].double(), size, mode="nearest-exact")[:, 0]


def _whole(scores: Tensor) -> Tensor:
    """Return the scores of whole scenes (n,), from those of their positions (n, h, w)."""
    owners = torch.arange(len(scores)).repeat_interleave(scores[0].numel())
    return unit_scores(scores.flatten(), owners, len(scores), LOWEST)


def _rates(scores: Tensor, seed: int) -> list[dict[str, Any]]:
    """Return what is flagged in scenes without foreign objects, by the number of scenes to calibrate on.

    Each entry has the mean and the 5th and 95th percentile over `DRAWS` of the share of flagged positions:
    ``flagged`` by a `PartCalibration`, and ``independent`` by a `Calibration` on all positions; ``covered``, the
    share of draws in which the latter is in the 90 % range that this calibration gives; and ``scenes``, the mean
    share of flagged scenes.

    Parameters
    ----------
    scores : scores (n, h, w) of the positions of n scenes, of which those that do not calibrate are new ones.
    seed : seed of the draws.
    """
    generator = torch.Generator().manual_seed(seed)
    whole, positions = _whole(scores), scores.flatten(1)
    found = []
    for count in CALIBRATED:
        shares: dict[str, list[float]] = {"flagged": [], "independent": [], "covered": [], "scenes": []}
        owners = torch.arange(count).repeat_interleave(positions.shape[1])
        for _ in range(DRAWS):
            order = torch.randperm(len(scores), generator=generator)
            chosen, new = positions[order[:count]].flatten(), positions[order[count:]]
            by_scene = PartCalibration(chosen, owners, _TPR, lowest=LOWEST)
            pooled = Calibration(chosen, _TPR)
            flagged, independent = (float((new < made.threshold).double().mean()) for made in (by_scene, pooled))
            low, high = pooled.false_alarm_range(0.9)
            shares["flagged"].append(flagged)
            shares["independent"].append(independent)
            shares["covered"].append(float(low <= independent <= high))
            shares["scenes"].append(float((~by_scene.units.is_id(whole[order[count:]])).double().mean()))
        entry: dict[str, Any] = {"calibrated": count}
        for name in ("flagged", "independent"):
            values = torch.tensor(shares[name], dtype=torch.float64)
            entry[name] = [float(values.mean()), *values.quantile(values.new_tensor([0.05, 0.95])).tolist()]
        found.append(entry | {name: statistics.fmean(shares[name]) for name in ("covered", "scenes")})
    return found


def _rate_cells(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the cells of one detector and number of calibration scenes, means over the seeds."""
    cells = []
    for name in ("flagged", "independent"):
        mean, low, high = (100 * statistics.fmean(run[name][i] for run in runs) for i in range(3))
        cells.append(f"{mean:.2f} % ({low:.1f} to {high:.1f})")
    covered, scenes = (100 * statistics.fmean(run[name] for run in runs) for name in ("covered", "scenes"))
    return [*cells, f"{covered:.0f} % of draws", f"{scenes:.2f} %"]


def _pictured(words: str, scenes: Scenes, scores: Tensor, known: Tensor) -> list[dict[str, Any]]:
    """Return the first scenes with the p-values of their positions, as JSON; all known scenes calibrate."""
    owners = torch.arange(len(known)).repeat_interleave(known[0].numel())
    calibration = PartCalibration(known.flatten(), owners, _TPR, lowest=LOWEST)
    found = []
    for pixels, maps in zip(scenes.pixels[:_PICTURED], scores, strict=False):
        buffer = io.BytesIO()
        Image.fromarray(pixels.movedim(0, 2).numpy()).save(buffer, "PNG")
        p_values = [[float(f"{value:.3g}") for value in calibration.p_value(row).tolist()] for row in maps]
        found.append({"kind": words, "scene": base64.b64encode(buffer.getvalue()).decode(), "p_values": p_values})
    return found


def _figure(pictures: Sequence[Mapping[str, Any]]) -> str:
    """Return pictures one below another, two in a row, as SVG text."""
    drawn = []
    for picture in pictures:
        scene = Image.open(io.BytesIO(base64.b64decode(picture["scene"])))
        pixels = torch.frombuffer(bytearray(scene.tobytes()), dtype=torch.uint8).reshape(SIDE, SIDE, 3)
        p_values = torch.tensor(picture["p_values"])
        owners = torch.zeros(p_values.numel(), dtype=torch.int64)
        parts = Parts(owners, 1, (p_values.shape[0], p_values.shape[1]))
        values = p_values.flatten()
        drawn.append(
            map_picture(pixels.movedim(2, 0) / 255, Verdict(values, values, values > 1 - _TPR, None, parts))
        )
    return image_grid(drawn, 2)


MapStudy("maps", "Detectors at the positions of maps")
