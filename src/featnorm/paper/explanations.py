"""Why inputs score as they do: a usual input of each set, explained by the network of the package."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from featnorm._utils.layout import fast_layout
from featnorm.explainer import Explainer
from featnorm.hidden.figure import explanation_figure
from featnorm.models import load_model
from featnorm.norms import negative_aware_norm
from featnorm.paper import cifar10
from featnorm.paper.heads import NETWORK
from featnorm.paper.probe import spaced
from featnorm.paper.tables import Table
from featnorm.tap import FeatureTap

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
#: Training images that the explainer is fitted on, evenly spaced.
KNOWN = 5000
_BATCH = 250


def run(images: cifar10.Images, *, environment: Mapping[str, str], progress: bool | None = None) -> dict[str, Any]:
    """Explain, of each set, the input whose negative-aware norm is the set's median.

    Parameters
    ----------
    images : see `featnorm.paper.cifar10.load_images`.
    environment : facts of versions, machine and date, which are kept with the result.
    progress : show progress bars; None for where there is a terminal.

    Returns
    -------
    ``rows``, one a set: what the table shows, and what the picture is drawn from; ``images``, ``environment``.
    """
    model = fast_layout(load_model(NETWORK))
    known = spaced(images.train[0], KNOWN)
    explainer = Explainer(model, class_names=CLASSES).fit(_batches(known), progress=progress)
    tap = FeatureTap(model)
    found = []
    for name, pixels in {"cifar10": images.test[0], **images.ood}.items():
        nan = torch.cat([negative_aware_norm(tap(batch).tensor("activation")) for batch in _batches(pixels)])
        chosen = int(nan.argsort(stable=True)[len(nan) // 2])
        why = explainer(_pixels(pixels[chosen : chosen + 1]))[0]
        found.append(
            {
                "set": name,
                "input": chosen,
                "predicted": why.predicted_name,
                "hidden": why.hidden_predicted_name,
                "confidence": why.hidden_confidence / max(why.norm, 1e-30),
                "nan": why.nan,
                "active": why.active,
                "usual": int((why.on_rate >= 0.5).sum()),
                "missing": len(why.inactive_units),
                "strange": len(why.unexpected_units),
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
    return {"rows": found, "images": images.facts, "environment": dict(environment)}


def tables(result: Mapping[str, Any]) -> dict[str, Table]:
    """Return the table of a result of `run`, by its name, "explanation"."""
    rows = [
        [
            f"{row['set']}, {row['input']}",
            row["predicted"],
            f"{row['hidden']}, {row['confidence']:.0%} of the norm",
            f"{row['nan']:.3g}",
            str(row["active"]),
            f"{row['missing']} of {row['usual']}",
            str(row["strange"]),
        ]
        for row in result["rows"]
    ]
    notes = [
        f"by {NETWORK}, and {KNOWN} of its training images; of each set the input of median NAN",
        *(f"{name}: {value}" for name, value in {**result["images"], **result["environment"]}.items()),
    ]
    headers = [
        "Input",
        "predicted",
        "hidden classifier",
        "NAN",
        "units on",
        "usual units that are off",
        "unusual on",
    ]
    return {"explanation": Table("Why an input scores as it does", headers, rows, notes)}


def pictures(result: Mapping[str, Any]) -> dict[str, str]:
    """Return the picture of each explanation as SVG text, by its set."""
    return {row["set"]: explanation_figure(**row["picture"]) for row in result["rows"]}


def _batches(images: Tensor) -> list[Tensor]:
    return [_pixels(batch) for batch in images.split(_BATCH)]


def _pixels(images: Tensor) -> Tensor:
    return fast_layout(images).float().div_(255)


def _short(values: Tensor) -> list[float]:
    return [float(f"{value:.4g}") for value in values.tolist()]
