"""Why inputs score as they do: a typical input of each set, explained by the packaged network."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from featnorm._utils.layout import fast_layout
from featnorm.explainer import Explainer
from featnorm.hidden.figure import explanation_figure
from featnorm.models import load_model
from featnorm.norms import negative_aware_norm
from featnorm.paper.heads import NETWORK
from featnorm.paper.images import CLASSES, Images, as_pixels, cifar10_images, spaced
from featnorm.paper.study import Context, SingleRun, Whole
from featnorm.paper.tables import Table, facts
from featnorm.tap import FeatureTap

#: Number of training images that the explainer is fitted on, evenly spaced.
FIT_IMAGES = 5000
_BATCH = 250


@dataclass(frozen=True, eq=False)
class Explanation(SingleRun[Images]):
    """Explanations of the input of each set whose negative-aware norm is the median of the set.

    Its result has ``rows``, one per set: what the table shows, and what the picture is drawn from.
    """

    page: ClassVar[str] = "theory"

    def load(self, scale: None, context: Context) -> Images:
        return context.once(cifar10_images)

    def settings(self, job: Whole, scale: None, inputs: Images) -> dict[str, Any]:
        return {"network": NETWORK, "fit_images": FIT_IMAGES, "images": inputs.facts}

    def run(self, job: Whole, scale: None, inputs: Images, folder: Path, context: Context) -> dict[str, Any]:
        model = fast_layout(load_model(NETWORK))
        explainer = Explainer(model, class_names=CLASSES).fit(
            _batches(spaced(inputs.train[0], FIT_IMAGES)), progress=context.progress
        )
        tap = FeatureTap(model)
        rows = []
        for name, pixels in {"cifar10": inputs.test[0], **inputs.ood}.items():
            nan = torch.cat([negative_aware_norm(tap(batch).tensor("activation")) for batch in _batches(pixels)])
            chosen = int(nan.argsort(stable=True)[len(nan) // 2])
            why = explainer(as_pixels(pixels[chosen : chosen + 1]))[0]
            rows.append(
                {
                    "set": name,
                    "input": chosen,
                    "predicted": why.predicted_name,
                    "hidden": why.hidden_predicted_name,
                    "confidence": why.hidden_confidence / max(why.norm, 1e-30),
                    "nan": why.nan,
                    "active": why.active,
                    "usual": int((why.on_rate >= 0.5).sum()),
                    "inactive": len(why.inactive_units),
                    "unexpected": len(why.unexpected_units),
                    "picture": {
                        "activation": _short(why.activation),
                        "on_rate": _short(why.on_rate),
                        "logits": _short(why.hidden_logits),
                        "norm": why.norm,
                        "predicted": why.predicted,
                        "peers": why.predicted_name,
                    },
                }
            )
        return {"rows": rows}

    def tables(self, content: Mapping[str, Any]) -> dict[str, Table]:
        rows = [
            [
                f"{row['set']}, {row['input']}",
                row["predicted"],
                f"{row['hidden']}, {row['confidence']:.0%} of the norm",
                f"{row['nan']:.3g}",
                str(row["active"]),
                f"{row['inactive']} of {row['usual']}",
                str(row["unexpected"]),
            ]
            for row in content["rows"]
        ]
        notes = [
            f"explained by {NETWORK}, with {FIT_IMAGES} of its training images; one input per set, of median NAN",
            *facts([content]),
        ]
        headers = [
            "Input",
            "predicted",
            "hidden classifier",
            "NAN",
            "units on",
            "usual units that are off",
            "unusual units that are on",
        ]
        return {self.name: Table(self.title, headers, rows, notes)}

    def pictures(self, content: Mapping[str, Any]) -> dict[str, str]:
        """See `Study`; one figure per set."""
        return {f"{self.name}-{row['set']}": explanation_figure(**row["picture"]) for row in content["rows"]}


def _batches(images: Tensor) -> list[Tensor]:
    return [as_pixels(batch) for batch in images.split(_BATCH)]


def _short(values: Tensor) -> list[float]:
    return [float(f"{value:.4g}") for value in values.tolist()]


Explanation("explanation", "Why an input scores as it does")
