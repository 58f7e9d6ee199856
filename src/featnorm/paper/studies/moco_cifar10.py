"""Whether NAN detects after a long training without labels (paper 6.3, Table 3): MoCo-v2 on all of CIFAR-10."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar

from torch import Tensor, nn

from featnorm.detectors import (
    KNN,
    NAN,
    SSD,
    ActivationPattern,
    Detector,
    HiddenConfidence,
    KLUniform,
    L1Norm,
    PredictedMahalanobis,
    Sparsity,
)
from featnorm.hidden import ActivationStatistics
from featnorm.models import cifar_network
from featnorm.norms import l1_norm
from featnorm.paper.images import Images, as_pixels, cifar10_images, spaced
from featnorm.paper.numbers import numbers
from featnorm.paper.panels import Line, Panel, panel_figure
from featnorm.paper.recipe import PRESETS, PaperRecipe, short
from featnorm.paper.scoring import score
from featnorm.paper.study import Context, Seeded, Study
from featnorm.paper.systems.frameworks import moco_detectors
from featnorm.paper.tables import MEASURES, Result, Table, compared, facts
from featnorm.tap import FeatureTap
from featnorm.training import train
from featnorm.training.runs import log, read_log

_HISTORY = "history.jsonl"
_BATCH = 250


@dataclass(frozen=True)
class Scale:
    """What is trained, and when it is scored.

    Parameters
    ----------
    width : channels of the first stage of the ResNet-18.
    recipe : settings of its training.
    epochs : epochs after which it is scored; 0 is before its training.
    probed : number of images of each set that are scored then, evenly spaced; at the end all are.
    """

    width: int
    recipe: PaperRecipe
    epochs: tuple[int, ...]
    probed: int = 2000


SCALES = {
    "laptop": Scale(16, short("MoCo-v2", 12, 256, 0.06, 24), (0, 1, 3, 6, 12)),
    # By the speed of its first epochs, at least six hours of one CPU core in bfloat16.
    "workstation": Scale(
        16,
        short("MoCo-v2", 340, 256, 0.06, 24),
        (0, 1, 3, 6, 12, 25, 50, 75, 100, 140, 180, 220, 260, 272, 285, 300, 320, 340),
    ),
    "paper": Scale(64, PRESETS["MoCo-v2"], (0, 1, 3, 6, 12, 25, 50, 100, 200, 400, 600, 800)),
}


@dataclass(frozen=True, eq=False)
class MoCoTraining(Study[Scale, Images, Seeded]):
    """Scores of a MoCo-v2 network over its training, and those of Table 3 at its end.

    A result has ``history``: by epoch the loss, what `featnorm.paper.scoring.score` returns for some images of
    each set, and ``inner``, see `inner_measures`; and what `score` returns at the end for all images.
    """

    page: ClassVar[str] = "label-free"
    scales: ClassVar[Mapping[str, Scale]] = SCALES

    def load(self, scale: Scale, context: Context) -> Images:
        return context.once(cifar10_images)

    def jobs(self, scale: Scale, inputs: Images) -> list[Seeded]:
        return [Seeded(self.name, 0)]

    def settings(self, job: Seeded, scale: Scale, inputs: Images) -> dict[str, Any]:
        return {
            "width": scale.width,
            "recipe": scale.recipe.to_dict(),
            "epochs": list(scale.epochs),
            "probed": scale.probed,
            "seed": job.seed,
            "images": inputs.facts,
        }

    def run(self, job: Seeded, scale: Scale, inputs: Images, folder: Path, context: Context) -> dict[str, Any]:
        file = folder / _HISTORY
        shown = replace(
            inputs,
            test=(spaced(inputs.test[0], scale.probed), spaced(inputs.test[1], scale.probed)),
            ood={name: spaced(pixels, scale.probed) for name, pixels in inputs.ood.items()},
        )
        sets = {"train": spaced(inputs.train[0], scale.probed), "cifar10": shown.test[0], **shown.ood}

        def measured(images: Images, detectors: Sequence[Detector]) -> dict[str, Any]:
            return score(network, images, detectors, context, labels=False, same_precision=True)

        def record(entry: Mapping[str, Any], model: nn.Module) -> None:
            if entry["epoch"] in scale.epochs:
                found = measured(shown, _detectors())
                log(
                    file,
                    {
                        "epoch": entry["epoch"],
                        "loss": entry["loss"],
                        "inner": inner_measures(model, sets),
                        **found,
                    },
                )

        network = cifar_network(scale.width, None, seed=job.seed)
        if not file.exists():
            record({"epoch": 0, "loss": None}, network)
        train(
            network,
            inputs.train[0],
            None,
            scale.recipe,
            folder=folder,
            runtime=context.runtime,
            seed=job.seed,
            on_epoch=record,
        )
        every = {repr(detector): detector for detector in (*moco_detectors(), *_detectors())}
        return {"history": read_log(file), **measured(inputs, list(every.values()))}

    def tables(self, content: Sequence[Result]) -> dict[str, Table]:
        (result,) = content
        history = result["history"]
        names = list(history[0]["scores"])
        sets = list(history[0]["scores"][names[0]])
        theirs = numbers("cifar10")["table3-label-free"]["rows"]
        over = [
            [f"{entry['epoch']}", _loss(entry), *(f"{_mean(entry, name):.1f}" for name in names)]
            for entry in history
        ]
        ends = [[name, *compared([result], name, theirs.get(name, {}), sets)] for name in result["scores"]]
        inner = [
            [
                f"{entry['epoch']}",
                *(f"{measures[key]:.3g}" for measures in entry["inner"].values() for key in measures),
            ]
            for entry in history
        ]
        kinds = list(next(iter(history[0]["inner"].values())))
        notes = _notes(result)
        return {
            self.name: Table(
                f"{self.title}, over its training: mean AUROC ↑ in percent", ["Epoch", "loss", *names], over, notes
            ),
            f"{self.name}-end": Table(
                f"{self.title}, at the end: {MEASURES}",
                ["Detector", "Mean, ours", "Average, paper", *sets],
                ends,
            ),
            f"{self.name}-inner": Table(
                f"{self.title}, inside the last hidden layer",
                ["Epoch", *(f"{kind}, {name}" for name in history[0]["inner"] for kind in kinds)],
                inner,
            ),
        }

    def pictures(self, content: Sequence[Result]) -> dict[str, str]:
        """See `Study`; AUROC by epoch, one panel for the mean and one for each OOD set."""
        history = content[0]["history"]
        epochs = [entry["epoch"] for entry in history]
        drawn = [repr(detector) for detector in (NAN(), L1Norm(), Sparsity(), KNN(50), SSD())]
        sets = list(history[0]["scores"][drawn[0]])
        panels = [
            Panel(
                title,
                "epoch",
                "AUROC, %",
                [
                    Line(name, [_mean(entry, name, chosen) for entry in history], epochs, style)
                    for style, name in enumerate(drawn)
                ],
            )
            for title, chosen in [("mean", sets), *((name, [name]) for name in sets)]
        ]
        return {self.name: panel_figure([panels])}


def _detectors() -> list[Detector]:
    """Return what the network is scored by on its way: the paper's, the parts of NAN, and sums."""
    knn, pattern = KNN(50), ActivationPattern() + PredictedMahalanobis()
    return [
        NAN(),
        L1Norm(),
        Sparsity(),
        HiddenConfidence(),
        knn,
        SSD(),
        knn / NAN(),
        SSD() / NAN(),
        NAN() + knn,
        pattern,
        KLUniform() + pattern,
    ]


def inner_measures(model: nn.Module, sets: Mapping[str, Tensor]) -> dict[str, dict[str, float]]:
    """Return what the paper derives detection from, for the last hidden layer of a network.

    Parameters
    ----------
    model : network for pixels in [0, 1]; its mode is restored.
    sets : images (n, 3, h, w) uint8 by name.

    Returns
    -------
    By set ``norm``, the mean l1-norm; ``entropy`` of activation in nats (eq. 7 and 8); and ``unaligned``, the mean
    share of the norm that the hidden classifier's confidence lacks: that of the units whose sign differs (eq. 3).
    """
    tap, confidence, found = FeatureTap(model), HiddenConfidence(), {}
    for name, images in sets.items():
        statistics, norms, confidences = ActivationStatistics(), [], []
        for batch in images.split(_BATCH):
            features = tap(as_pixels(batch, next(model.parameters()).device))
            statistics.update(features.tensor("activation").cpu())
            norms += l1_norm(features.tensor("activation")).tolist()
            confidences += confidence.score(features).tolist()
        found[name] = {
            "norm": fmean(norms),
            "entropy": statistics.mean_entropy,
            "unaligned": fmean(1 - c / n for c, n in zip(confidences, norms, strict=True) if n > 0),
        }
    return found


def _mean(entry: Mapping[str, Any], name: str, sets: Sequence[str] | None = None) -> float:
    found = entry["scores"][name]
    return fmean(found[set_][0] for set_ in (sets or found))


def _loss(entry: Mapping[str, Any]) -> str:
    return "–" if entry["loss"] is None else f"{entry['loss']:.2f}"


def _notes(result: Result) -> list[str]:
    recipe = result["recipe"]
    crop = recipe["crop"]
    small = f", views of {crop} pixels for the first {recipe['crop_share']:.0%}" if crop else ""
    return [
        f"scale {result['scale']}: ResNet-18 of width {result['width']}, seed {result['seed']}",
        f"{recipe['epochs']} epochs of SGD, batch {recipe['batch_size']}, learning rate {recipe['lr']}, "
        f"weight decay {recipe['weight_decay']}{small}",
        f"over its training {result['probed']} images of each set, at most; at the end all",
        *facts([result]),
    ]


MoCoTraining("moco-cifar10", "MoCo-v2 on CIFAR-10")
