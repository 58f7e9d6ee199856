"""Every score on the packaged network, which is seed 0 of the networks of Table 3."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from featnorm.models import load_model
from featnorm.paper.heads import NETWORK
from featnorm.paper.images import Images, cifar10_images
from featnorm.paper.numbers import numbers
from featnorm.paper.scoring import compared_detectors, score
from featnorm.paper.study import Context, SingleRun, Whole
from featnorm.paper.tables import MEASURES, Table, facts, left_out, ranked


class PackagedScores(SingleRun[Images]):
    """The scores that need no trained network but the packaged one; see `featnorm.paper.scoring.score`."""

    page: ClassVar[str] = "cifar10"

    def load(self, scale: None, context: Context) -> Images:
        return context.once(cifar10_images)

    def settings(self, job: Whole, scale: None, inputs: Images) -> dict[str, Any]:
        return {"network": NETWORK, "images": inputs.facts}

    def run(self, job: Whole, scale: None, inputs: Images, folder: Path, context: Context) -> dict[str, Any]:
        return score(load_model(NETWORK), inputs, compared_detectors(), context)

    def tables(self, content: Mapping[str, Any]) -> dict[str, Table]:
        headers, rows = ranked([content], numbers("cifar10")["table3"]["rows"])
        notes = [
            f"{content['network']}, detectors fitted to all training images; "
            f"accuracy on ID {100 * content['accuracy']:.1f} %",
            "the paper's networks are larger, and its OOD sets are others: see Table 3",
            *facts([content]),
            *left_out(content),
        ]
        return {self.name: Table(f"{self.title}: {MEASURES}", headers, rows, notes)}


PackagedScores("packaged-scores", "Every score on the packaged network", duration="10 min")
