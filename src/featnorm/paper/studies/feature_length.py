"""Why Mahalanobis, Residual and ViM fail on the packaged network: the length of features, or their directions."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch

from featnorm._utils.layout import fast_layout
from featnorm.detectors import parse_detector
from featnorm.features import Features
from featnorm.metrics import auroc
from featnorm.models import load_model
from featnorm.paper.heads import NETWORK
from featnorm.paper.images import Images, as_pixels, cifar10_images, spaced
from featnorm.paper.study import Context, SingleRun, Whole
from featnorm.paper.tables import Table, facts
from featnorm.tap import FeatureTap

#: Number of training images that the detectors are fitted on, evenly spaced.
FIT_IMAGES = 5000
_BATCH = 250
_DETECTORS = ("Mahalanobis", "Residual", "ViM")


class FeatureLength(SingleRun[Images]):
    """Separates two causes by changing the pooled features, whose lengths and directions are otherwise tied.

    Its result has ``rows``, one per change, with the AUROC in percent by detector and OOD set, and ``features``,
    the mean length per set and the mean share of the squared length outside the span of the class means.
    """

    page: ClassVar[str] = "cifar10"

    def load(self, scale: None, context: Context) -> Images:
        return context.once(cifar10_images)

    def settings(self, job: Whole, scale: None, inputs: Images) -> dict[str, Any]:
        return {"network": NETWORK, "fit_images": FIT_IMAGES, "images": inputs.facts}

    def run(self, job: Whole, scale: None, inputs: Images, folder: Path, context: Context) -> dict[str, Any]:
        tap = FeatureTap(fast_layout(load_model(NETWORK)))
        pixels = {"train": spaced(inputs.train[0], FIT_IMAGES), "cifar10": inputs.test[0], **inputs.ood}
        made = {
            name: Features.cat([tap(as_pixels(part)) for part in images.split(_BATCH)])
            for name, images in pixels.items()
        }
        made["train"] = made["train"].replace(labels=spaced(inputs.train[1], FIT_IMAGES))
        z = {name: features.tensor("pooled").double() for name, features in made.items()}
        lengths = {name: rows.norm(dim=1, keepdim=True) for name, rows in z.items()}
        labels = made["train"].tensor("labels")
        means = torch.stack([z["train"][labels == label].mean(0) for label in labels.unique()])
        basis = torch.linalg.qr(means.T).Q
        spanned = {name: rows @ basis @ basis.T for name, rows in z.items()}
        generator = torch.Generator().manual_seed(0)
        lent = dict(z)
        for name in inputs.ood:
            drawn = torch.randint(len(z["cifar10"]), (len(z[name]),), generator=generator)
            lent[name] = z[name] / lengths[name] * lengths["cifar10"][drawn]
        kept = {name: rows / rows.norm(dim=1, keepdim=True) * lengths[name] for name, rows in spanned.items()}
        every = [*_DETECTORS]
        changes = [
            ("none", z, every),
            ("every feature to length 1", z, [f"{name}(normalize=True)" for name in _DETECTORS]),
            ("each OOD feature to the length of a random test image", lent, every),
            # The span has fewer dimensions than the principal subspace, so there is no residual.
            ("within-class directions removed, lengths kept", kept, every[:1]),
        ]
        rows = []
        for change, pooled, expressions in changes:
            features = {name: made[name].replace(pooled=pooled[name]) for name in made}
            found = {}
            for name, expression in zip(_DETECTORS, expressions, strict=False):
                detector = parse_detector(expression).fit(features["train"])
                known = detector.score(features["cifar10"])
                found[name] = {ood: 100 * float(auroc(known, detector.score(features[ood]))) for ood in inputs.ood}
            rows.append({"change": change, "auroc": found})
        shares = {
            name: {
                "length": float(lengths[name].mean()),
                "outside": float(1 - (spanned[name].norm(dim=1) / lengths[name][:, 0]).square().mean()),
            }
            for name in made
        }
        return {"rows": rows, "features": shares}

    def tables(self, content: Mapping[str, Any]) -> dict[str, Table]:
        rows = [
            [row["change"], *(_cell(row["auroc"].get(name)) for name in _DETECTORS)] for row in content["rows"]
        ]
        described = [
            f"{name}: mean length {of['length']:.2f}, "
            f"{of['outside']:.0%} of the squared length outside the span of the class means"
            for name, of in content["features"].items()
        ]
        notes = [
            f"pooled features of {NETWORK}; detectors fitted to {FIT_IMAGES} of its training images",
            *described,
            *facts([content]),
        ]
        return {self.name: Table(self.title, ["Change of the features", *_DETECTORS], rows, notes)}


def _cell(sets: Mapping[str, float] | None) -> str:
    """Return the mean over the OOD sets, and the value of each."""
    if sets is None:
        return "–"
    mean = sum(sets.values()) / len(sets)
    return f"{mean:.1f} ({', '.join(f'{value:.1f}' for value in sets.values())})"


FeatureLength("feature-length", "Why Mahalanobis, Residual and ViM fail: AUROC in percent, mean (each OOD set)")
