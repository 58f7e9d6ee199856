"""Combinations of detectors: the fusion and the sum."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from featnorm._utils.checks import Interval, SequenceOf, table
from featnorm.detectors.base import Detector, Wrapper, check_detector, joined, registered_detectors
from featnorm.detectors.statistics import HeldOutConstants
from featnorm.features import Features

# Scores whose deviation is below this share of the largest are equal up to the rounding of float32.
_ROUNDING = 4 * torch.finfo(torch.float32).eps


class Fusion(Wrapper):
    """A distance over a norm, ``-d(x) / ||a||_NAN`` (paper eq. 49), written ``KNN(k=50) / NAN()``.

    An input whose norm is 0 is certainly out-of-distribution: its score is minus infinity.

    Parameters
    ----------
    distance : detector that scores a negated distance, such as `KNN` or `SSD`; it may be wrapped in `ReAct`.
    norm : detector that scores a norm, such as `NAN`; it may be wrapped in `ReAct`.

    Raises
    ------
    TypeError
        The first detector is not a distance, or the second is not a norm.

    Examples
    --------
    >>> KNN(k=50) / NAN()
    KNN() / NAN()
    >>> features = FeatureTap(model).extract(train_loader)
    >>> (KNN(k=10) / NAN()).fit(features).score(features).shape
    torch.Size([320])
    """

    operator = "/"
    source = "Park et al., ICCV 2023, eq. 49"
    formula = r"-d(x) / \lVert a \rVert"
    cost = "that of both detectors"
    standard = ("KNN() / NAN()", "SSD() / NAN()")
    distance: Detector
    norm: Detector

    def __init__(self, distance: Detector, norm: Detector) -> None:
        super().__init__()
        self._wrap(distance=distance, norm=norm)
        if distance.role != "distance":
            raise TypeError(f"{distance!r} is not a distance: divide one of {_names('distance')}")
        if norm.role != "norm":
            raise TypeError(f"{norm!r} is not a norm: divide by one of {_names('norm')}")

    def __repr__(self) -> str:
        return f"{self.distance!r} / {self.norm!r}"

    def _score(self, features: Features) -> Tensor:
        negated, norm = self.distance._checked_score(features), self.norm._checked_score(features)
        certain = torch.full_like(negated, -torch.inf)
        return torch.where(norm > 0, negated / norm, certain)


class Sum(Wrapper):
    """A sum of detectors, each standardized on ID inputs: ``KLUniform() + 2 * KNN(k=10)``.

    ``sum_i w_i (s_i(x) - m_i) / d_i``, where m_i and d_i are the mean and the standard deviation of the scores of
    detector i on in-distribution inputs that were held out of its fit. On the inputs of the fit itself, a detector
    with a bank or a covariance scores higher than on new inputs. `fit` holds inputs out; after `partial_fit`,
    `fit_held_out` takes them.

    An infinite score, such as that of a `Fusion` whose norm is 0, does not count for m_i and d_i, and makes the
    sum infinite.

    Parameters
    ----------
    *terms : detectors to add, with scores of any kind; the terms of a sum become terms of this one.
    weights : positive weight w_i of each detector. Default: 1.

    Raises
    ------
    TypeError
        There are no detectors, or a term is not a detector.
    ValueError
        A weight is not positive, or there is not one per detector. In a fit: the scores of a detector are equal
        for all held-out inputs.

    Examples
    --------
    >>> KLUniform() + 2 * KNN(k=10)
    KLUniform() + 2 * KNN(k=10)
    >>> features = FeatureTap(model).extract(train_loader)
    >>> (KLUniform() + KNN(k=10)).fit(features).score(features).shape
    torch.Size([320])
    """

    operator = "+"
    source = "Jain, Nandakumar and Ross, Pattern Recognition 38(12), 2005"
    formula = r"\sum_i w_i \, \frac{s_i(x) - m_i}{d_i}"
    cost = "that of all detectors"
    standard = ("KLUniform() + KNN(k=10)",)
    settings = table(weights=SequenceOf(Interval(0, math.inf)))
    weights: tuple[float, ...]

    def __init__(self, *terms: Detector, weights: Sequence[float] | None = None) -> None:
        super().__init__()
        if not terms:
            raise TypeError("a Sum needs at least one detector: pass them one by one, as in Sum(MSP(), NAN())")
        for term in terms:
            check_detector(term, "Sum")
        self._set(weights=[1] * len(terms) if weights is None else weights)
        if len(self.weights) != len(terms):
            raise ValueError(f"a Sum of {len(terms)} detectors got {len(self.weights)} weights")
        flat = [
            (part, weight * own)
            for term, weight in zip(terms, self.weights, strict=True)
            for part, own in (
                zip(term._inner(), term.weights, strict=True) if isinstance(term, Sum) else [(term, 1)]
            )
        ]
        self._set(weights=[weight for _, weight in flat])
        self.terms = nn.ModuleList(part for part, _ in flat)
        self._read_as(self._inner())
        # A score is standardized in the fit.
        self.learns = joined(self.learns, self.reads)
        self.constants = HeldOutConstants()  # means and deviations, (2, terms)

    def __repr__(self) -> str:
        terms = zip(self._inner(), self.weights, strict=True)
        return " + ".join(_weighted(term, weight, len(self.terms)) for term, weight in terms)

    def _check_fit(self, features: Features) -> None:
        self._require(features, self.learns)
        super()._check_fit(features)

    def _fit_held_out(self, batches: Sequence[Features]) -> None:
        super()._fit_held_out(batches)
        for term in self._inner():
            term.require_fitted()
        scores = torch.cat([self._scores(features) for features in batches])
        constants = [self._standard(term, own) for term, own in zip(self._inner(), scores.T, strict=True)]
        self.constants.values = torch.tensor(constants, dtype=torch.float64, device=scores.device).T.contiguous()
        self._finalized = None

    @staticmethod
    def _standard(term: Detector, scores: Tensor) -> tuple[float, float]:
        """Return mean and standard deviation of the finite scores (n,) of a term."""
        finite = scores[scores.isfinite()]
        deviation = float(finite.std(correction=0)) if len(finite) else 0.0
        if deviation <= _ROUNDING * float(finite.abs().sum()) / max(len(finite), 1):
            raise ValueError(
                f"the scores of {term!r} are the same for all {len(scores)} held-out inputs, so they cannot be "
                "standardized: leave it out of the sum, or hold out other inputs"
            )
        return float(finite.mean()), deviation

    def _scores(self, features: Features) -> Tensor:
        return torch.stack([term._checked_score(features) for term in self._inner()], 1).double()

    def term_scores(self, features: Features) -> Tensor:
        """Return the standardized score of each term, times its weight, (n, terms); their sum is the score."""
        scores = self._scores(features)
        mean, scale = self._fitted_state()
        return (scores - mean.to(scores.device)) * scale.to(scores.device)

    def _finalize(self) -> tuple[Tensor, Tensor]:
        mean, deviation = self.constants.values
        return mean, torch.tensor(self.weights, dtype=torch.float64, device=mean.device) / deviation

    def _score(self, features: Features) -> Tensor:
        return self.term_scores(features).sum(1)

    def _validate(self) -> None:
        if self.constants.values.shape != (2, len(self.terms)) or not (self.constants.values[1] > 0).all():
            raise ValueError(f"{self!r} must have a mean and a positive deviation of each term")

    def _inner(self) -> list[Detector]:
        return list(self.terms)  # type: ignore[arg-type]


def _weighted(term: Detector, weight: float, terms: int) -> str:
    if weight == 1 and terms > 1:
        return repr(term)
    return f"{weight!r} * ({term!r})" if isinstance(term, Fusion) else f"{weight!r} * {term!r}"


def _names(role: str) -> str:
    return ", ".join(sorted(name for name, kind in registered_detectors().items() if kind.role == role))
