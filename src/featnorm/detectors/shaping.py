"""Wrappers that change the features before another detector scores them."""

import torch
from torch import Tensor

from featnorm._utils.checks import Interval, table
from featnorm.detectors.base import Detector, NotFittedError, Wrapper, joined
from featnorm.detectors.statistics import FloatHistogram
from featnorm.features import Features


class ReAct(Wrapper):
    """Clip activations from above, then score as usual (Sun et al., NeurIPS 2021).

    The clip is the given percentile over all units and inputs of the training features, which are the last hidden
    layer or, in a model without one, the pooled feature. It is exact to one part in 2^11. Logits are recomputed
    from the clipped layer, and a pooled feature that *is* the last hidden layer is clipped with it.

    As in the source, only scoring clips. The inner detector is fitted to unclipped features, so a fit still takes
    one pass and merges.

    Parameters
    ----------
    detector : any detector that does not read the embedding.
    percentile : percentile at which activations are clipped, between 0 and 100; 90 in the source.

    Raises
    ------
    ValueError
        The percentile is out of range; the detector reads the embedding; the detector reads the logits, and they
        are not a linear map of the clipped layer (a cosine classifier, or a head in between).
    """

    source = "Sun et al., NeurIPS 2021"
    cost = "O(C d) and that of the detector"
    standard = ("ReAct(NAN())", "ReAct(Energy())")
    settings = table(percentile=Interval(0, 100))
    detector: Detector
    percentile: float

    def __init__(self, detector: Detector, percentile: float = 90) -> None:
        super().__init__()
        self._wrap(detector=detector)
        self._set(percentile=percentile)
        if "embedding" in detector.reads:
            raise ValueError(f"ReAct cannot wrap {detector!r}: the embedding is computed from unclipped features")
        self.role = detector.role
        self.activations = FloatHistogram()
        self._recomputes_logits = "logits" in detector.reads
        extra = ("logits", "classifier") if self._recomputes_logits else ()
        clipped = ("activation",) if "activation" in detector.reads else ()
        self.reads = joined(detector.reads, extra)
        self.learns = joined(detector.learns, extra, clipped)

    @property
    def clip(self) -> float:
        """The value at which activations are clipped; it raises a NotFittedError before the fit."""
        if self.activations.is_empty:
            raise NotFittedError(f"{self!r} is not fitted: call fit on in-distribution features")
        return float(self._fitted_state())

    def _check_fit(self, features: Features) -> None:
        self._require(features, self.learns)
        self._require(features, (_clipped_field(features),))
        super()._check_fit(features)
        if not self._recomputes_logits and not set(self.detector.reads) & _clipped_fields(features):
            raise ValueError(
                f"{self!r} would change nothing: it clips the last hidden layer, and {self.detector!r} does not "
                "read that"
            )
        if self._recomputes_logits and not features.classifier_reads(_clipped_field(features)):
            raise ValueError(
                f"{self!r} cannot recompute the logits: they are not a linear map of `{_clipped_field(features)}` "
                "(a cosine classifier, or a head in between); wrap a detector of the activation, such as NAN"
            )

    def _partial_fit(self, features: Features) -> None:
        super()._partial_fit(features)
        self.activations.update(features.tensor(_clipped_field(features)))

    def _finalize(self) -> float:
        return self.activations.percentile(self.percentile)

    def _score(self, features: Features) -> Tensor:
        name = _clipped_field(features)
        self._require(features, (name,))
        value = features.tensor(name)
        clipped = value.to(torch.promote_types(value.dtype, torch.float32)).clamp(max=self.clip)
        changed = dict.fromkeys(_clipped_fields(features), clipped)
        if self._recomputes_logits:
            weight, bias = features.linear()
            bias = None if bias is None else bias.to(clipped)
            changed["logits"] = torch.nn.functional.linear(clipped, weight.to(clipped), bias)
        return self.detector.score(features.replace(**changed))


def _clipped_fields(features: Features) -> set[str]:
    """Return the fields that hold the clipped layer, which may be the pooled feature too."""
    name = _clipped_field(features)
    clipped, pooled = features.tensor(name), features.pooled
    same = pooled is clipped
    if pooled is not None and not same and not torch.compiler.is_compiling():
        same = torch.equal(pooled, clipped)
    return {name, "pooled"} if same else {name}


def _clipped_field(features: Features) -> str:
    return "pooled" if features.activation is None else "activation"
