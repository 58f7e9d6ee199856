"""Temperature scaling of the logits that another detector reads."""

import math
from collections.abc import Sequence

import torch
from scipy.optimize import brentq
from torch import Tensor

from featnorm.detectors.base import Detector, NotFittedError, Wrapper, joined, require_labels
from featnorm.detectors.statistics import HeldOutConstants
from featnorm.features import Features


class TemperatureScaling(Wrapper):
    """Divide the logits by a temperature T that calibrates the softmax, then score (Guo et al., ICML 2017).

    T minimizes the negative log-likelihood of the labels of held-out in-distribution inputs, which is convex in
    1 / T. `fit` holds inputs out; after `partial_fit`, `fit_held_out` takes them. A share of 1 / (n + 1) of the n
    targets is spread over all classes, much as in Platt's scaling: so T is positive even if the model classifies
    all inputs correctly.

    Parameters
    ----------
    detector : detector that reads logits and is not fitted to them; `MSP` in the source.

    Raises
    ------
    ValueError
        The detector does not read logits, is fitted to them, or runs the model again. In a fit: a held-out input
        has no label, or one that is not the index of a logit, or the model classifies no better than chance.

    Examples
    --------
    >>> detector = TemperatureScaling(MSP())
    >>> logits, labels = torch.tensor([[6.0, 0.0]] * 10), torch.tensor([0] * 8 + [1] * 2)  # overconfident
    >>> features = Features(logits=logits, labels=labels)
    >>> detector.fit(features, held_out=features).temperature > 1
    True
    """

    source = "Guo et al., ICML 2017"
    formula = r"l \leftarrow l / T"
    cost = "O(C) and that of the detector"
    standard = ("TemperatureScaling(MSP())",)
    detector: Detector

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        self._wrap(detector=detector)
        if "logits" not in detector.reads:
            raise ValueError(f"TemperatureScaling would change nothing: {detector!r} does not read logits")
        if "logits" in detector.learns or detector.needs_model:
            why = "runs the model again" if detector.needs_model else "is fitted to logits"
            raise ValueError(
                f"TemperatureScaling cannot wrap {detector!r}, which {why}: wrap a detector of the logits alone, "
                "such as MSP or GEN"
            )
        self.role = detector.role
        self.learns = joined(detector.learns, ("logits", "labels"))
        self.constants = HeldOutConstants()  # the temperature, (1, 1)

    @property
    def temperature(self) -> float:
        """The temperature; it raises a NotFittedError before the fit."""
        if self.constants.is_empty:
            raise NotFittedError(f"{self!r} is not fitted: call fit on in-distribution features")
        return float(self.constants.values)

    def _check_fit(self, features: Features) -> None:
        self._require(features, self.learns)
        require_labels(self, features.tensor("labels"), features.tensor("logits").shape[1])
        super()._check_fit(features)

    def _fit_held_out(self, batches: Sequence[Features]) -> None:
        for features in batches:
            self._check_fit(features)
        logits = torch.cat([features.tensor("logits").double() for features in batches])
        labels = torch.cat([features.tensor("labels").to(logits.device, torch.int64) for features in batches])
        temperature = self._calibrating(logits, labels)
        self.constants.values = torch.full((1, 1), temperature, dtype=torch.float64, device=logits.device)
        super()._fit_held_out(batches)

    def _calibrating(self, logits: Tensor, labels: Tensor) -> float:
        """Return the temperature of logits (n, C) float64 and labels (n,)."""
        logits = logits - logits.amax(1, keepdim=True)
        smoothing = 1 / (len(logits) + 1)
        target = (1 - smoothing) * logits.gather(1, labels[:, None]).mean() + smoothing * logits.mean()

        def slope(log_inverse: float) -> float:
            """Return the derivative of the negative log-likelihood with respect to 1 / T."""
            weights = (logits * math.exp(log_inverse)).softmax(1)
            return float((weights * logits).sum(1).mean() - target)

        if not float(target - logits.mean()) > 0:
            raise ValueError(
                f"{self!r}: the model classifies the {len(logits)} held-out inputs no better than chance: check "
                "that labels are indices of logits"
            )
        low = high = -math.log(float(-logits.mean()))
        while slope(low) >= 0:
            low -= 1
        while slope(high) <= 0:
            high += 1
        return math.exp(-brentq(slope, low, high, xtol=1e-10))

    def _changed(self, features: Features) -> Features:
        value = features.tensor("logits")
        logits = value.to(torch.promote_types(value.dtype, torch.float32))
        temperature = self.constants.values[0, 0].to(logits)
        classifier = features.classifier
        if classifier is not None:
            weight, bias = features.linear()
            classifier = weight / temperature, None if bias is None else bias / temperature
        return features.replace(logits=logits / temperature, classifier=classifier)

    def _score(self, features: Features) -> Tensor:
        return self.detector.score(self._changed(features))

    def _validate(self) -> None:
        if self.constants.values.shape != (1, 1) or not self.constants.values > 0:
            raise ValueError(f"{self!r} must have one positive temperature")
