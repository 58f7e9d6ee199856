"""Wrappers that change the last layer before another detector scores it."""

from abc import abstractmethod

import torch
from torch import Tensor

from featnorm._utils.checks import Interval, table
from featnorm.detectors.base import Detector, NotFittedError, Wrapper, joined
from featnorm.detectors.statistics import FloatHistogram, RowMean
from featnorm.features import Features

# exp(88.7) is the largest float32.
_MAX_EXPONENT = 80.0


class _Shaping(Wrapper):
    """Base of the wrappers that change the last hidden layer or, in a model without one, the pooled feature.

    Only scoring changes it, as in the sources. The inner detector is fitted to unchanged features, so a fit still
    takes one pass and merges. Logits are recomputed from the changed layer.
    """

    detector: Detector
    _change: str  # past participle, for error messages

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        self._wrap(detector=detector)
        if "embedding" in detector.reads:
            raise ValueError(
                f"{type(self).__name__} cannot wrap {detector!r}: the embedding is computed from features that "
                f"are not {self._change}"
            )
        self.role = detector.role
        self._recomputes_logits = "logits" in detector.reads
        extra = ("logits", "classifier") if self._recomputes_logits else ()
        layer = ("activation",) if "activation" in detector.reads else ()
        self.reads = joined(detector.reads, extra)
        self.learns = joined(detector.learns, extra, layer)

    def _check_fit(self, features: Features) -> None:
        self._require(features, self.learns)
        self._layer(features)
        super()._check_fit(features)
        self._check_effect(features)

    def _check_effect(self, features: Features) -> None:
        """Raise unless the inner detector reads the changed layer, or logits that can be recomputed from it."""
        if not self._recomputes_logits and not set(self.detector.reads) & _layer_fields(features):
            raise ValueError(
                f"{self!r} would change nothing: the last hidden layer is {self._change}, and {self.detector!r} "
                "does not read that"
            )
        if self._recomputes_logits and not features.classifier_reads(features.last_layer):
            raise ValueError(
                f"{self!r} cannot recompute the logits: they are not a linear map of `{features.last_layer}` "
                "(a cosine classifier, or a head in between); wrap a detector of the activation, such as NAN"
            )

    def _layer(self, features: Features) -> Tensor:
        """Return the layer to change, checked, (n, D)."""
        self._require(features, (features.last_layer,))
        return features.tensor(features.last_layer)

    def _score(self, features: Features) -> Tensor:
        return self.detector.score(self._changed(features))

    def _changed(self, features: Features) -> Features:
        value = self._layer(features)
        # Without a fit, nothing else has compared the classifier with the layer.
        if not self.needs_fit and not torch.compiler.is_compiling():
            self._check_effect(features)
        shaped = self._shape(value.to(torch.promote_types(value.dtype, torch.float32)))
        changed = dict.fromkeys(_layer_fields(features), shaped)
        if self._recomputes_logits:
            weight, bias = features.linear()
            bias = None if bias is None else bias.to(shaped)
            changed["logits"] = torch.nn.functional.linear(shaped, weight.to(shaped), bias)
        return features.replace(**changed)

    @abstractmethod
    def _shape(self, h: Tensor) -> Tensor:
        """Return the changed layer, (n, D), of at least float32."""


class ReAct(_Shaping):
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

    Examples
    --------
    >>> features = FeatureTap(model).extract(train_loader)
    >>> ReAct(Energy()).fit(features).score(features).shape
    torch.Size([320])
    """

    source = "Sun et al., NeurIPS 2021"
    formula = r"a_i \leftarrow \min(a_i, c)"
    cost = "O(C d) and that of the detector"
    standard = ("ReAct(NAN())", "ReAct(Energy())")
    settings = table(percentile=Interval(0, 100))
    percentile: float
    _change = "clipped"

    def __init__(self, detector: Detector, percentile: float = 90) -> None:
        super().__init__(detector)
        self._set(percentile=percentile)
        self.activations = FloatHistogram()

    @property
    def clip(self) -> float:
        """The value at which activations are clipped; it raises a NotFittedError before the fit."""
        if self.activations.is_empty:
            raise NotFittedError(f"{self!r} is not fitted: call fit on in-distribution features")
        return float(self._fitted_state())

    def _partial_fit(self, features: Features) -> None:
        super()._partial_fit(features)
        self.activations.update(features.tensor(features.last_layer))

    def _finalize(self) -> float:
        return self.activations.percentile(self.percentile)

    def _shape(self, h: Tensor) -> Tensor:
        return h.clamp(max=self.clip)


class RAS(_Shaping):
    """Replace the r-th smallest unit by its training mean, then score (RAS: Guglielmo and Masana, ECCV 2026).

    ``m_r`` is the mean over the training inputs of the r-th smallest unit of the last hidden layer or, in a model
    without one, of the pooled feature. Scoring keeps the order of an input's units, and replaces their values by
    ``m_1 <= ... <= m_D``. Units of equal value are ordered by their index.

    Parameters
    ----------
    detector : any detector that does not read the embedding; `Energy` in the source.

    Raises
    ------
    ValueError
        As `ReAct`.

    Examples
    --------
    >>> features = FeatureTap(model).extract(train_loader)
    >>> RAS(Energy()).fit(features).score(features).shape
    torch.Size([320])
    """

    source = "Guglielmo and Masana, ECCV 2026"
    formula = r"h_{(r)} \leftarrow m_r"
    cost = "O(D log D + C D) and that of the detector"
    standard = ("RAS(Energy())",)
    _change = "replaced"

    def __init__(self, detector: Detector) -> None:
        super().__init__(detector)
        self.order_statistics = RowMean()

    def _check_fit(self, features: Features) -> None:
        super()._check_fit(features)
        self.order_statistics.require_width(self._layer(features))

    def _partial_fit(self, features: Features) -> None:
        super()._partial_fit(features)
        self.order_statistics.update(features.tensor(features.last_layer).detach().sort(1).values)

    def _score(self, features: Features) -> Tensor:
        self._same_width(features.last_layer, self._layer(features), self.order_statistics.width)
        return super()._score(features)

    def _shape(self, h: Tensor) -> Tensor:
        mean = self.order_statistics.mean()
        return torch.zeros_like(h).scatter(1, _ascending(h), mean.to(h).expand_as(h))


class _Scaling(_Shaping):
    """Base of `SCALE` and `ASH`: multiply an input's units by ``exp(sum h / sum of its largest units)``."""

    settings = table(percentile=Interval(0, 100))
    percentile: float

    def __init__(self, detector: Detector, percentile: float) -> None:
        super().__init__(detector)
        self._set(percentile=percentile)

    def _layer(self, features: Features) -> Tensor:
        h = super()._layer(features)
        if not torch.compiler.is_compiling() and h.numel():
            negative = (h.detach().amin(1) < 0).nonzero().squeeze(1)
            if len(negative):
                raise ValueError(
                    f"{self!r} needs rectified features: `{features.last_layer}` has negative units in "
                    f"{len(negative)} of {len(h)} inputs, the first at row {int(negative[0])}; use ReAct, or a "
                    "detector that does not rescale"
                )
        return h

    def _largest(self, h: Tensor) -> int:
        # As both sources round it, half to even; a single unit at least, so that the sum is that of some unit.
        return max(h.shape[1] - round(h.shape[1] * self.percentile / 100), 1)

    def _factor(self, h: Tensor, largest: Tensor) -> Tensor:
        # An input without an active unit has 0 / 0, and stays 0 whatever its factor.
        ratio = h.sum(1, keepdim=True) / largest.sum(1, keepdim=True).clamp_min(torch.finfo(h.dtype).tiny)
        return ratio.clamp(max=_MAX_EXPONENT).exp()


class SCALE(_Scaling):
    """Multiply the units by ``exp(sum h / sum of the largest units)``, then score as usual (Xu et al., ICLR 2024).

    h is the last hidden layer or, in a model without one, the pooled feature. The largest units are the
    ``D - round(D percentile / 100)`` largest of each input, at least one. The exponent is limited to 80.

    Parameters
    ----------
    detector : any detector that does not read the embedding; `Energy` in the source.
    percentile
        Percentage of the units that are not among the largest, between 0 and 100. Default: 85, which the source
        tuned on OOD data.

    Raises
    ------
    ValueError
        As `ReAct`, or the features to fit or score are not rectified: a unit is negative (the row is named).

    Examples
    --------
    >>> features = FeatureTap(model)(images)
    >>> SCALE(Energy()).score(features).shape
    torch.Size([8])
    """

    source = "Xu et al., ICLR 2024"
    formula = r"h \leftarrow h \cdot \exp \frac{\sum_i h_i}{\sum_{i \in \mathrm{top}} h_i}"
    cost = "O(D log D + C D) and that of the detector"
    standard = ("SCALE(Energy())",)
    _change = "scaled"

    def __init__(self, detector: Detector, percentile: float = 85) -> None:
        super().__init__(detector, percentile)

    def _shape(self, h: Tensor) -> Tensor:
        return h * self._factor(h, h.topk(self._largest(h), 1).values)


class ASH(_Scaling):
    """Keep the largest units alone, multiplied as by `SCALE`, then score (ASH-S: Djurisic et al., ICLR 2023).

    All other units become 0. Units of equal value are ordered by their index.

    Parameters
    ----------
    detector : any detector that does not read the embedding; `Energy` in the source.
    percentile
        Percentage of the units that become 0, between 0 and 100. Default: 90, which the source tuned on OOD data.

    Raises
    ------
    ValueError
        As `SCALE`.

    Examples
    --------
    >>> features = FeatureTap(model)(images)
    >>> ASH(Energy()).score(features).shape
    torch.Size([8])
    """

    source = "Djurisic et al., ICLR 2023"
    formula = (
        r"h_i \leftarrow h_i \cdot \exp \frac{\sum_j h_j}{\sum_{j \in \mathrm{top}} h_j} \text{ for } i "
        r"\in \mathrm{top}, \quad h_i \leftarrow 0 \text{ otherwise}"
    )
    cost = "O(D log D + C D) and that of the detector"
    standard = ("ASH(Energy())",)
    _change = "pruned"

    def __init__(self, detector: Detector, percentile: float = 90) -> None:
        super().__init__(detector, percentile)

    def _shape(self, h: Tensor) -> Tensor:
        index = _ascending(-h)[:, : self._largest(h)]
        kept = torch.zeros_like(h).scatter(1, index, h.gather(1, index))
        return kept * self._factor(h, kept)


def _ascending(h: Tensor) -> Tensor:
    """Return the index of each row's r-th smallest unit, (n, D); equal units are ordered by their index."""
    # ONNX has no stable sort, but its TopK, which a plain sort becomes, orders equal units by their index.
    return h.argsort(1) if torch.compiler.is_compiling() else h.argsort(dim=1, stable=True)


def _layer_fields(features: Features) -> set[str]:
    """Return the fields that hold the last layer: it may be the pooled feature too."""
    name = features.last_layer
    layer, pooled = features.tensor(name), features.pooled
    same = pooled is layer
    if pooled is not None and not same and not torch.compiler.is_compiling():
        same = torch.equal(pooled, layer)
    return {name, "pooled"} if same else {name}
