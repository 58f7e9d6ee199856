"""Two detectors made into one."""

import torch
from torch import Tensor

from featnorm.detectors.base import Detector, check_detector
from featnorm.features import Features


class Fusion(Detector):
    """A distance over a norm, ``-d(x) / ||a||_NAN`` (paper eq. 49), written ``KNN(k=50) / NAN()``.

    Where the norm is 0 the input is out-of-distribution for certain: the score is minus infinity.

    Parameters
    ----------
    distance : a detector that scores a negated distance: `KNN`, `SSD`, `Mahalanobis`, `Residual`.
    norm : a detector that scores a norm: `NAN`, `L1Norm`, `LpNorm`, `Sparsity`, `EmbeddingMagnitude`.
        Either may be wrapped in `ReAct`.

    Raises
    ------
    TypeError
        The first is not a distance, or the second not a norm.
    """

    def __init__(self, distance: Detector, norm: Detector) -> None:
        for detector in (distance, norm):
            check_detector(detector, "Fusion")
        if distance.role != "distance":
            raise TypeError(f"{distance!r} is not a distance: only KNN, SSD, Mahalanobis and Residual divide")
        if norm.role != "norm":
            raise TypeError(
                f"{norm!r} is not a norm: divide by NAN, L1Norm, LpNorm, Sparsity or EmbeddingMagnitude"
            )
        super().__init__()
        self.distance = distance
        self.norm = norm
        self.reads = tuple(dict.fromkeys((*distance.reads, *norm.reads)))
        self.learns = tuple(dict.fromkeys((*distance.learns, *norm.learns)))

    def __repr__(self) -> str:
        return f"{self.distance!r} / {self.norm!r}"

    @property
    def is_fitted(self) -> bool:
        """Whether both detectors are fitted."""
        return self.distance.is_fitted and self.norm.is_fitted

    def _check_fit(self, features: Features) -> None:
        self.distance._check_fit(features)
        self.norm._check_fit(features)

    def _partial_fit(self, features: Features) -> None:
        self.distance._partial_fit(features)
        self.norm._partial_fit(features)

    def _score(self, features: Features) -> Tensor:
        negated, norm = self.distance.score(features), self.norm.score(features)
        certain = torch.full_like(negated, -torch.inf)
        return torch.where(norm > 0, negated / norm, certain)
