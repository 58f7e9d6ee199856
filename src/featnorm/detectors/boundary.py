"""Detectors that learn a boundary around the training features."""

from typing import NamedTuple

import torch
from torch import Tensor

from featnorm._utils.checks import real, table
from featnorm.detectors.base import Detector
from featnorm.detectors.statistics import RowSample
from featnorm.features import Features

# libsvm's time grows with the square of the rows: above this many it learns from a sample of them.
_MOST_ROWS = 1 << 14
# Far below libsvm's own 1e-3, so that the order of the rows does not show in the scores.
_TOLERANCE = 1e-6
_CACHE = 1000  # MB of kernel columns
_QUERIES = 4096


class _Support(NamedTuple):
    """``sum_i weights_i exp(-gamma ||x - vectors_i||^2) - offset``."""

    origin: Tensor  # (D,) taken from vectors and queries, which keeps distances of far clouds exact
    vectors: Tensor  # (s, D)
    weights: Tensor  # (s,)
    gamma: float
    offset: float


class OneClassSVM(Detector):
    """How far inside the boundary of a one-class support vector machine (Schölkopf et al., NeurIPS 1999).

    Reads the pooled feature. Gaussian kernel ``exp(-gamma ||x - x'||^2)`` with scikit-learn's gamma "scale", one
    over the number of dimensions times the variance over all numbers. Solved by scikit-learn, from a sample of
    16,384 inputs that does not depend on their order where there are more. The score is the decision function: it
    is 0 on the boundary, and far away the same for all inputs, since the kernel ends there.

    Parameters
    ----------
    nu : between 0 and 1; of training inputs at most this share is outside, at least this share support vectors.

    Raises
    ------
    ValueError
        ``nu`` is out of its range; all training inputs are the same.
    """

    reads = ("pooled",)
    learns = ("pooled",)
    settings = table(nu=real(0, 1))
    nu: float

    def __init__(self, nu: float = 0.1) -> None:
        super().__init__()
        self._set(nu=nu)
        self.sample = RowSample(_MOST_ROWS)

    def _partial_fit(self, features: Features) -> None:
        self.sample.update(features.tensor("pooled"))

    def _derive(self) -> _Support:
        from sklearn.svm import OneClassSVM as Solver

        rows = self.sample.rows.double()
        origin = rows.mean(0)
        rows = rows - origin
        # The variance of "scale" is about the mean of all numbers, not of each dimension.
        variance = float((rows + (origin - origin.mean())).square().mean())
        if not float(rows.abs().max()) > 0:
            raise ValueError(f"{self!r} found no variation among its {len(rows)} inputs: it needs different ones")
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
        support: _Support = self._learned()
        inside = [self._inside(part, support) for part in pooled.split(_QUERIES)]
        return torch.cat(inside) - support.offset

    def _inside(self, pooled: Tensor, support: _Support) -> Tensor:
        queries = pooled.double() - support.origin
        squared = torch.addmm(support.vectors.square().sum(1), queries, support.vectors.T, alpha=-2)
        squared = (squared + queries.square().sum(1, keepdim=True)).clamp_min(0)
        # Not a product with the weights, which rounds equal rows differently.
        return squared.mul_(-support.gamma).exp_().mul_(support.weights).sum(1)
