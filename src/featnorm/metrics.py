"""How well scores separate in-distribution (ID) from out-of-distribution (OOD) inputs.

Every measure depends only on the order of the scores: it is exact with ties, and does not change under a strictly
increasing map of the scores. Higher scores mean more in-distribution.

All functions take two samples of scores:

- ``id_scores``: (n,) scores of ID inputs,
- ``ood_scores``: (m,) scores of OOD inputs,

Each is a tensor on any device, a numpy array or a sequence, of any integer or floating type. Infinite scores are
valid. A `TypeError` is raised for values that are not real numbers, and a `ValueError` for a sample that is empty,
not one-dimensional or contains NaN; the message names the argument and the index of the first NaN.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from featnorm._utils.checks import ScoreLike, as_score_array, check_share, count_for_share, shown

__all__ = [
    "Metrics",
    "aupr_in",
    "aupr_out",
    "auroc",
    "bootstrap_interval",
    "detection_accuracy",
    "evaluate",
    "fpr_at_tpr",
    "fpr_at_tpr_ood_positive",
    "roc_curve",
]

Metric = Callable[[ScoreLike, ScoreLike], float]


@dataclass(frozen=True)
class Metrics:
    """All measures of one pair of samples, each in [0, 1]; see the functions of the same names."""

    auroc: float
    aupr_in: float
    aupr_out: float
    fpr95: float
    """`fpr_at_tpr` at its default TPR of 0.95."""
    detection_accuracy: float


def auroc(id_scores: ScoreLike, ood_scores: ScoreLike) -> float:
    """Area under the ROC curve: the probability that an ID input scores above an OOD input.

    Ties count one half (the Mann-Whitney statistic divided by n m). Counts are integers, so that only the final
    quotient is rounded.

    Parameters
    ----------
    id_scores, ood_scores
        (n,) and (m,) scores; see the module's description for types and errors.

    Returns
    -------
    float
        In [0, 1]; 0.5 is chance.

    Examples
    --------
    >>> auroc([3.0, 2.0, 1.0], [1.5, 0.5])
    0.8333333333333334
    """
    return _Roc.of(id_scores, ood_scores).area()


def aupr_in(id_scores: ScoreLike, ood_scores: ScoreLike) -> float:
    """Average precision with ID as the positive class.

    ``sum_k (recall_k - recall_{k-1}) precision_k`` over the distinct scores in decreasing order, without
    interpolation, as scikit-learn's ``average_precision_score``. It depends on the ratio n : m.

    Parameters
    ----------
    id_scores, ood_scores
        (n,) and (m,) scores; see the module's description for types and errors.

    Returns
    -------
    float
        In (0, 1]; n / (n + m) is chance.

    Examples
    --------
    >>> round(aupr_in([3.0, 2.0, 1.0], [1.5, 0.5]), 3)
    0.917
    """
    return _Roc.of(id_scores, ood_scores).average_precision()


def aupr_out(id_scores: ScoreLike, ood_scores: ScoreLike) -> float:
    """Average precision with OOD as the positive class, ranked by the negated score; see `aupr_in`.

    Parameters
    ----------
    id_scores, ood_scores
        (n,) and (m,) scores; see the module's description for types and errors.

    Returns
    -------
    float
        In (0, 1]; m / (n + m) is chance.

    Examples
    --------
    >>> round(aupr_out([3.0, 2.0, 1.0], [1.5, 0.5]), 3)
    0.833
    """
    return _Roc.of(id_scores, ood_scores).flipped().average_precision()


def fpr_at_tpr(id_scores: ScoreLike, ood_scores: ScoreLike, tpr: float = 0.95) -> float:
    """Share of OOD accepted when at least ``tpr`` of ID is accepted; FPR95 by default.

    An input is accepted if its score is at least tau, where tau is the largest threshold that accepts the share
    ``tpr`` of ID. This is the paper's definition, with ID as the positive class; `fpr_at_tpr_ood_positive` is the
    opposite one.

    Parameters
    ----------
    id_scores, ood_scores
        (n,) and (m,) scores; see the module's description for types and errors.
    tpr
        Share of ID to accept, in (0, 1].

    Returns
    -------
    float
        In [0, 1]; lower is better.

    Raises
    ------
    ValueError
        ``tpr`` is outside (0, 1], or the scores are invalid; see the module's description.

    Examples
    --------
    >>> fpr_at_tpr([4.0, 3.0, 2.0, 1.0], [1.5, 0.5], tpr=0.75)
    0.0
    """
    check_share(tpr, "tpr", one_allowed=True)
    return _Roc.of(id_scores, ood_scores).fpr_at(tpr)


def fpr_at_tpr_ood_positive(id_scores: ScoreLike, ood_scores: ScoreLike, tpr: float = 0.95) -> float:
    """Share of ID flagged when at least ``tpr`` of OOD is flagged: OOD is the positive class.

    An input is flagged if its score is at most tau, where tau is the smallest threshold that flags the share
    ``tpr`` of OOD. Some benchmarks call this FPR95; it is not comparable with `fpr_at_tpr`, the paper's
    definition.

    Parameters
    ----------
    id_scores, ood_scores
        (n,) and (m,) scores; see the module's description for types and errors.
    tpr
        Share of OOD to flag, in (0, 1].

    Returns
    -------
    float
        In [0, 1]; lower is better.

    Raises
    ------
    ValueError
        ``tpr`` is outside (0, 1], or the scores are invalid; see the module's description.

    Examples
    --------
    >>> fpr_at_tpr_ood_positive([4.0, 3.0, 2.0, 1.0], [1.5, 0.5])
    0.25
    """
    check_share(tpr, "tpr", one_allowed=True)
    return _Roc.of(id_scores, ood_scores).flipped().fpr_at(tpr)


def detection_accuracy(id_scores: ScoreLike, ood_scores: ScoreLike) -> float:
    """Best accuracy of any threshold if ID and OOD are equally likely: max (TPR + TNR) / 2.

    One minus the detection error of Liang, Li and Srikant, "Enhancing the reliability of out-of-distribution
    image detection in neural networks" (ODIN), ICLR 2018.

    Parameters
    ----------
    id_scores, ood_scores
        (n,) and (m,) scores; see the module's description for types and errors.

    Returns
    -------
    float
        In [0.5, 1]; accepting everything gives one half.

    Examples
    --------
    >>> detection_accuracy([3.0, 2.0, 1.0], [1.5, 0.5])
    0.8333333333333334
    """
    return _Roc.of(id_scores, ood_scores).best_accuracy()


def evaluate(id_scores: ScoreLike, ood_scores: ScoreLike) -> Metrics:
    """All measures at once, from one sort of the scores.

    Parameters
    ----------
    id_scores, ood_scores
        (n,) and (m,) scores; see the module's description for types and errors.

    Returns
    -------
    Metrics
        AUROC, AUPR with either class as positive, FPR95 and detection accuracy, each in [0, 1].
    """
    roc = _Roc.of(id_scores, ood_scores)
    return Metrics(
        auroc=roc.area(),
        aupr_in=roc.average_precision(),
        aupr_out=roc.flipped().average_precision(),
        fpr95=roc.fpr_at(0.95),
        detection_accuracy=roc.best_accuracy(),
    )


def roc_curve(
    id_scores: ScoreLike, ood_scores: ScoreLike
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Points of the ROC curve, with ID as the positive class.

    Parameters
    ----------
    id_scores, ood_scores
        (n,) and (m,) scores; see the module's description for types and errors.

    Returns
    -------
    fpr, tpr
        (k + 1,) float64 arrays for k distinct scores: the shares of OOD and ID that each threshold accepts, from
        (0, 0) to (1, 1).
    """
    roc = _Roc.of(id_scores, ood_scores)
    return roc.fp / roc.fp[-1], roc.tp / roc.tp[-1]


def bootstrap_interval(
    metric: Metric,
    id_scores: ScoreLike,
    ood_scores: ScoreLike,
    *,
    level: float = 0.95,
    n_resamples: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """Confidence interval of a measure by the percentile bootstrap.

    ID and OOD scores are resampled independently, with replacement, at their own sizes. The interval covers
    variation over test inputs, not over training runs.

    Source: Efron and Tibshirani, "An introduction to the bootstrap", 1993, chapter 13.

    Parameters
    ----------
    metric
        A function of ID and OOD scores that returns a float, such as `auroc`, or
        ``functools.partial(fpr_at_tpr, tpr=0.99)``.
    id_scores, ood_scores
        (n,) and (m,) scores; see the module's description for types and errors.
    level
        Share of resamples inside the interval, in (0, 1).
    n_resamples
        Number of resamples, at least 1.
    seed
        Seed of the resampling; equal seeds give equal intervals.

    Returns
    -------
    low, high
        The ends of the interval.

    Raises
    ------
    TypeError
        ``metric`` is not a function.
    ValueError
        ``level`` is outside (0, 1), ``n_resamples`` is below 1, or the scores are invalid; see the module's
        description.

    Examples
    --------
    >>> low, high = bootstrap_interval(auroc, [3.0, 2.0, 1.0], [1.5, 0.5])
    >>> low <= auroc([3.0, 2.0, 1.0], [1.5, 0.5]) <= high
    True
    """
    if not callable(metric):
        raise TypeError(f"metric must be a function of ID and OOD scores such as auroc, got {shown(metric)}")
    check_share(level, "level")
    if n_resamples < 1:
        raise ValueError(f"n_resamples must be at least 1, got {n_resamples}")
    id_array = as_score_array(id_scores, "id_scores")
    ood_array = as_score_array(ood_scores, "ood_scores")
    rng = np.random.default_rng(seed)
    values = [
        metric(rng.choice(id_array, len(id_array)), rng.choice(ood_array, len(ood_array)))
        for _ in range(n_resamples)
    ]
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


@dataclass(frozen=True)
class _Roc:
    """The ROC curve in integer counts, from which every measure is computed.

    At the i-th largest distinct score, ``tp[i]`` positives and ``fp[i]`` negatives are accepted; both are 0 at i =
    0. ID is the positive class, or OOD after `flipped`. Products of counts fit into int64 up to n m = 2**62, that
    is, two samples of two billion scores.
    """

    tp: npt.NDArray[np.int64]
    fp: npt.NDArray[np.int64]

    @classmethod
    def of(cls, id_scores: ScoreLike, ood_scores: ScoreLike) -> Self:
        id_array = as_score_array(id_scores, "id_scores")
        ood_array = as_score_array(ood_scores, "ood_scores")
        # numpy's vectorized sort is faster than its argsort. Two sorted runs are merged in linear time by the
        # stable argsort. Mixed types are promoted to float64, which represents both exactly.
        runs = np.concatenate([np.sort(id_array), np.sort(ood_array)])
        order = np.argsort(runs, kind="stable")[::-1]
        ranked = runs[order]
        ends = np.flatnonzero(np.append(ranked[1:] != ranked[:-1], True))
        tp = np.cumsum(order < len(id_array), dtype=np.int64)[ends]
        return cls(tp=np.append(0, tp), fp=np.append(0, ends + 1 - tp))

    def flipped(self) -> Self:
        """Exchange the classes, which reverses the order of the scores."""
        return type(self)(tp=self.fp[-1] - self.fp[::-1], fp=self.tp[-1] - self.tp[::-1])

    def area(self) -> float:
        twice = np.dot(np.diff(self.fp), self.tp[1:] + self.tp[:-1])
        return int(twice) / (2 * int(self.tp[-1]) * int(self.fp[-1]))

    def average_precision(self) -> float:
        tp, fp = self.tp[1:], self.fp[1:]
        return float(np.sum(np.diff(self.tp) * (tp / (tp + fp))) / tp[-1])

    def fpr_at(self, tpr: float) -> float:
        needed = count_for_share(tpr, int(self.tp[-1]))
        return float(self.fp[np.searchsorted(self.tp, needed)] / self.fp[-1])

    def best_accuracy(self) -> float:
        n, m = int(self.tp[-1]), int(self.fp[-1])
        return (n * m + int(np.max(self.tp * m - self.fp * n))) / (2 * n * m)
