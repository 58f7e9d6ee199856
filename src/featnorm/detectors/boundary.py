"""Detectors that fit a boundary around the training features."""

from typing import NamedTuple

import torch
from torch import Tensor

from featnorm._utils.checks import Interval, table
from featnorm.detectors.base import Detector
from featnorm.detectors.statistics import RowSample
from featnorm.features import Features

# The time of libsvm grows with the square of the number of rows: above this number it is fitted to a sample.
_MAX_ROWS = 1 << 14
# Far below libsvm's default of 1e-3, so that the order of the rows does not affect the scores.
_TOLERANCE = 1e-6
_CACHE = 1000  # MB of kernel columns
_QUERIES = 4096


class _Support(NamedTuple):
    """``sum_i weights_i exp(-gamma ||x - vectors_i||^2) - offset``."""

    origin: Tensor  # (D,) subtracted from vectors and queries, which keeps distances far from 0 exact
    vectors: Tensor  # (s, D)
    weights: Tensor  # (s,)
    gamma: float
    offset: float


class OneClassSVM(Detector):
    """The decision function of a one-class support vector machine (Schölkopf et al., NeurIPS 1999).

    It reads the pooled feature. The kernel is Gaussian, ``exp(-gamma ||x - x'||^2)``, with scikit-learn's gamma
    "scale": one over the product of the number of dimensions and the variance of all numbers. Above 16,384 inputs
    it is fitted to a sample of that size, which does not depend on their order. The score is 0 on the boundary,
    and the same for all inputs far away from it, where the kernel vanishes. The solver is scikit-learn's.

    Parameters
    ----------
    nu : maximum share of training inputs outside the boundary and minimum share of support vectors, in (0, 1).

    Raises
    ------
    ValueError
        ``nu`` is out of its range; all training inputs are the same.

    Examples
    --------
    >>> features = FeatureTap(model).extract(train_loader)
    >>> OneClassSVM().fit(features).score(features).shape
    torch.Size([320])
    """

    reads = ("pooled",)
    learns = ("pooled",)
    source = "Schölkopf et al., NeurIPS 1999"
    formula = r"\sum_i \alpha_i \exp(-\gamma \lVert h - h_i \rVert^2) - \rho"
    cost = "O(s D) for s support vectors"
    standard = ("OneClassSVM()",)
    settings = table(nu=Interval(0, 1))
    nu: float

    def __init__(self, nu: float = 0.1) -> None:
        super().__init__()
        self._set(nu=nu)
        self.sample = RowSample(_MAX_ROWS)

    def _partial_fit(self, features: Features) -> None:
        self.sample.update(features.tensor("pooled"))

    def _finalize(self) -> _Support:
        from sklearn.svm import OneClassSVM as Solver

        rows = self.sample.rows.double()
        origin = rows.mean(0)
        rows = rows - origin
        # The variance of "scale" is about the mean of all numbers, not about that of each dimension.
        variance = float((rows + (origin - origin.mean())).square().mean())
        if not float(rows.abs().max()) > 0:
            raise ValueError(
                f"{self!r} found no variation among its {len(rows)} inputs: fit on inputs that differ"
            )
        gamma = 1 / (rows.shape[1] * variance)
        solver = Solver(nu=self.nu, gamma=gamma, tol=_TOLERANCE, cache_size=_CACHE).fit(rows.cpu().numpy())
        return _Support(
            origin,
            torch.from_numpy(solver.support_vectors_).to(rows),
            torch.from_numpy(solver.dual_coef_[0].copy()).to(rows),
            gamma,
            float(solver.offset_[0]),
        )

    def _score(self, features: Features) -> Tensor:
        pooled = features.tensor("pooled")
        self._same_width("pooled", pooled, self.sample.width)
        support: _Support = self._fitted_state()
        inside = [self._inside(part, support) for part in pooled.split(_QUERIES)]
        return torch.cat(inside) - support.offset

    def _inside(self, pooled: Tensor, support: _Support) -> Tensor:
        queries = pooled.double() - support.origin
        squared = torch.addmm(support.vectors.square().sum(1), queries, support.vectors.T, alpha=-2)
        squared = (squared + queries.square().sum(1, keepdim=True)).clamp_min(0)
        # A matrix product with the weights would round equal rows differently.
        return squared.mul_(-support.gamma).exp_().mul_(support.weights).sum(1)
