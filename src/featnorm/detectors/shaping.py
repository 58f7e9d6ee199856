"""Detectors that reshape the features before another detector scores them."""

import torch
from torch import Tensor

from featnorm._utils.checks import real, table
from featnorm.detectors.base import Detector, NotFittedError, check_detector
from featnorm.detectors.statistics import FloatHistogram
from featnorm.features import Features


class ReAct(Detector):
    """Clip activations from above, then score as usual (Sun et al., NeurIPS 2021).

    The clip is the given percentile over all units and inputs of the training features: of the last hidden
    layer or, in a model without one, of the pooled feature. It is exact to one part in 2^11. Logits are made
    anew from the clipped layer, and a pooled feature that *is* the last hidden layer is clipped with it.

    As in the source, clipping belongs to scoring: what the inner detector learns, it learns from unclipped
    features, so a fit still takes one pass and merges.

    Parameters
    ----------
    detector : any detector that does not read the embedding.
    percentile : where to clip, between 0 and 100; 90 in the source.

    Raises
    ------
    ValueError
        The percentile is out of range; the detector reads the embedding; the detector reads the logits, and
        they are not a linear map of the clipped layer (a cosine classifier, or a head in between).
    """

    settings = table(percentile=real(0, 100))
    percentile: float

    def __init__(self, detector: Detector, percentile: float = 90) -> None:
        check_detector(detector, "ReAct")
        if "embedding" in detector.reads:
            raise ValueError(f"ReAct cannot wrap {detector!r}: the embedding is made from unclipped features")
        super().__init__()
        self._set(percentile=percentile)
        self.detector = detector
        self.role = detector.role
        self.activations = FloatHistogram()
        self._reshapes_logits = "logits" in detector.reads
        extra = ("logits", "classifier") if self._reshapes_logits else ()
        self.reads = _union(detector.reads, extra)
        self.learns = _union(detector.learns, extra)
        if "activation" in detector.reads:
            self.learns = _union(self.learns, ("activation",))

    @property
    def clip(self) -> float:
        """The value above which activations are clipped; a NotFittedError before the fit."""
        if self.activations.is_empty:
            raise NotFittedError(f"{self!r} has learned nothing yet: call fit on in-distribution features")
        return float(self._learned())

    @property
    def is_fitted(self) -> bool:
        """Whether the clip is known, and the inner detector is fitted."""
        return not self.activations.is_empty and self.detector.is_fitted

    def _check_fit(self, features: Features) -> None:
        super()._check_fit(features)
        self._require(features, (_clipped_field(features),))
        self.detector._check_fit(features)
        if not self._reshapes_logits and not set(self.detector.reads) & _clipped_fields(features):
            raise ValueError(
                f"{self!r} would change nothing: {self.detector!r} reads none of what is clipped, which is the "
                "last hidden layer"
            )
        if self._reshapes_logits and not features.classifier_reads(_clipped_field(features)):
            raise ValueError(
                f"{self!r} cannot make the logits anew: they are not a linear map of "
                f"`{_clipped_field(features)}` (a cosine classifier, or a head in between); "
                "wrap a detector that reads the activation, such as NAN"
            )

    def _partial_fit(self, features: Features) -> None:
        self.detector._partial_fit(features)
        self.activations.update(features.tensor(_clipped_field(features)))

    def _derive(self) -> float:
        return self.activations.percentile(self.percentile)

    def _score(self, features: Features) -> Tensor:
        name = _clipped_field(features)
        self._require(features, (name,))
        value = features.tensor(name)
        clipped = value.to(torch.promote_types(value.dtype, torch.float32)).clamp(max=self.clip)
        changed = dict.fromkeys(_clipped_fields(features), clipped)
        if self._reshapes_logits:
            weight, bias = features.linear()
            bias = None if bias is None else bias.to(clipped)
            changed["logits"] = torch.nn.functional.linear(clipped, weight.to(clipped), bias)
        return self.detector.score(features.replace(**changed))


def _clipped_fields(features: Features) -> set[str]:
    """Return the names under which the clipped layer is there: it may be the pooled feature too."""
    name = _clipped_field(features)
    clipped, pooled = features.tensor(name), features.pooled
    same = pooled is clipped
    if pooled is not None and not same and not torch.compiler.is_compiling():
        same = torch.equal(pooled, clipped)
    return {name, "pooled"} if same else {name}


def _clipped_field(features: Features) -> str:
    return "pooled" if features.activation is None else "activation"


def _union(first: tuple[str, ...], second: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys((*first, *second)))
