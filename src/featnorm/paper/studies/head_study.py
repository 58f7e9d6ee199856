"""What of a head's training moves NAN: heads on one frozen backbone, one setting changed at a time."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from featnorm.detectors import KNN, MSP, NAN, Energy, HiddenConfidence, KLUniform, L1Norm, Sparsity
from featnorm.paper.heads import FROZEN, NETWORK, fit_and_score, pooled_features
from featnorm.paper.images import Images
from featnorm.paper.study import Context, SingleRun, Whole
from featnorm.paper.tables import Table, facts, mean_pair

#: Setting -> temperature, width of the hidden layer, recipe. None is chosen by the OOD sets.
SETTINGS = {
    "20 epochs, T = 0.1, width 512, no weight decay": (0.1, 512, FROZEN),
    **{f"{n} epochs": (0.1, 512, replace(FROZEN, epochs=n)) for n in (5, 100, 300)},
    **{f"T = {t}": (t, 512, FROZEN) for t in (0.05, 0.2, 0.5, 1.0)},
    **{f"weight decay {w:g}": (0.1, 512, replace(FROZEN, weight_decay=w)) for w in (5e-4, 5e-3)},
    **{f"width {d}": (0.1, d, FROZEN) for d in (64, 2048)},
}
_DETECTORS = (NAN, L1Norm, Sparsity, HiddenConfidence, MSP, Energy, KLUniform, KNN)


@dataclass(frozen=True, eq=False)
class HeadStudy(SingleRun[Images]):
    """One head for each of `SETTINGS`, one seed each.

    Its result has ``rows``, one per setting: its name, recipe and what `featnorm.paper.heads.fit_and_score`
    returns.
    """

    page: ClassVar[str] = "cifar10"

    def load(self, scale: None, context: Context) -> Images:
        return context.once(pooled_features)

    def settings(self, job: Whole, scale: None, inputs: Images) -> dict[str, Any]:
        settings = {name: [t, width, recipe.to_dict()] for name, (t, width, recipe) in SETTINGS.items()}
        return {"settings": settings, "images": inputs.facts}

    def run(self, job: Whole, scale: None, inputs: Images, folder: Path, context: Context) -> dict[str, Any]:
        rows = []
        for name, (temperature, width, recipe) in SETTINGS.items():
            outcome = fit_and_score(
                inputs,
                recipe,
                [detector() for detector in _DETECTORS],
                hidden=width,
                temperature=temperature,
                progress=context.progress,
            )
            rows.append({"setting": name, "recipe": recipe.to_dict(), **outcome})
        return {"rows": rows}

    def tables(self, content: Mapping[str, Any]) -> dict[str, Table]:
        detectors = list(content["rows"][0]["scores"])
        rows = [
            [
                row["setting"],
                f"{row['train_loss']:.3f}",
                f"{row['accuracy']:.1%}",
                f"{1 - row['inactive']['cifar10']:.0%}",
                *(f"{mean_pair(row, name)[0]:.1f}" for name in detectors),
            ]
            for row in content["rows"]
        ]
        notes = [
            f"heads alone, one seed each, on the frozen backbone of {NETWORK}, on images that are not augmented; "
            "every row changes one setting of the first",
            *facts([content]),
        ]
        headers = ["Head", "training loss", "accuracy", "units on, ID", *detectors]
        title = f"{self.title}: AUROC in percent, mean of the OOD sets"
        return {self.name: Table(title, headers, rows, notes)}


HeadStudy("head-study", "What of the head's training moves the scores", duration="13 min")
