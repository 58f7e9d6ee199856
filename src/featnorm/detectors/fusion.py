"""Combinations of two detectors."""

import torch
from torch import Tensor

from featnorm.detectors.base import Detector, Wrapper, registered_detectors
from featnorm.features import Features


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
    """

    operator = "/"
    source = "Park et al., ICCV 2023, eq. 49"
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
        negated, norm = self.distance.score(features), self.norm.score(features)
        certain = torch.full_like(negated, -torch.inf)
        return torch.where(norm > 0, negated / norm, certain)


def _names(role: str) -> str:
    return ", ".join(sorted(name for name, kind in registered_detectors().items() if kind.role == role))
