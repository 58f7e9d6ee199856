"""Which of several detectors separate ID from OOD better, and by how much: intervals, tests and cliques.

All detectors score the same inputs, so differences are paired. AUROC has the exact covariance estimate of DeLong,
DeLong and Clarke-Pearson, "Comparing the areas under two or more correlated receiver operating characteristic
curves", Biometrics 1988; FPR95 has a bootstrap, whose resamples all detectors share. Both cover variation over
test inputs, not over training runs. Scores are arrays of one row per detector; higher is more in-distribution.
"""

import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import expit, logit, ndtr, ndtri

from featnorm._utils.checks import count_for_share

__all__ = ["Estimate", "bootstrap_fpr95", "cliques", "delong", "from_covariance", "from_resamples", "placements"]

Array = npt.NDArray[np.float64]
Placements = tuple[Array, Array]

_LEVEL = 0.95
# Resamples whose counts are in memory together.
_CHUNK = 50


@dataclass(frozen=True)
class Estimate:
    """A measure of each detector and its difference from a reference, (K,) each, with 95 % intervals."""

    value: Array
    low: Array
    high: Array
    difference: Array
    difference_low: Array
    difference_high: Array


def placements(id_scores: Array, ood_scores: Array) -> Placements:
    """Return the share of OOD below each ID score (K, n), and of ID above each OOD score (K, m); ties count half.

    Parameters
    ----------
    id_scores, ood_scores : (K, n) and (K, m) scores.
    """
    pairs = list(zip(id_scores, ood_scores, strict=True))
    return np.stack([_below(x, y) for x, y in pairs]), np.stack([1 - _below(y, x) for x, y in pairs])


def _below(scores: Array, others: Array) -> Array:
    ranked = np.sort(others)
    counts = np.searchsorted(ranked, scores, "left") + np.searchsorted(ranked, scores, "right")
    return counts / (2 * len(others))


def delong(parts: Sequence[Placements]) -> Array:
    """Return the covariance (K, K) of the AUROCs of the detectors, each averaged over OOD sets.

    Parameters
    ----------
    parts : placements of the same ID inputs and each OOD set. The sets are independent samples.
    """
    count = len(parts)
    covariance = _covariance_of_mean(np.sum([of_id for of_id, _ in parts], 0) / count)
    return covariance + sum(_covariance_of_mean(of_ood) for _, of_ood in parts) / count**2


def _covariance_of_mean(values: Array) -> Array:
    """Return the covariance of the means of rows (K, n); of a single column nothing can be estimated: NaN."""
    n = values.shape[1]
    if n < 2:
        return np.full((len(values), len(values)), np.nan)
    centered = values - values.mean(1, keepdims=True)
    return centered @ centered.T / (n * (n - 1))


def from_covariance(value: Array, covariance: Array, reference: int) -> Estimate:
    """Return normal intervals of shares, on the logit scale, so that they stay in [0, 1], and of differences.

    Parameters
    ----------
    value, covariance : (K,) shares, and their covariance (K, K).
    reference : index of the detector from which differences are taken.
    """
    z = ndtri((1 + _LEVEL) / 2)
    inside = (value > 0) & (value < 1)
    share = np.where(inside, value, 0.5)
    half = z * np.sqrt(np.diag(covariance)) / (share * (1 - share))
    low, high = (np.where(inside, expit(logit(share) + sign * half), value) for sign in (-1, 1))
    difference = value - value[reference]
    half = z * np.sqrt(_variance_of_differences(covariance)[reference])
    return Estimate(value, low, high, difference, difference - half, difference + half)


def _variance_of_differences(covariance: Array) -> Array:
    variance = np.diag(covariance)
    # Rounding leaves differences of a detector from itself, or from a copy, at about 1e-17.
    return np.clip(variance[:, None] + variance - 2 * covariance, 0, None)


def bootstrap_fpr95(
    id_scores: Array, ood_scores: Sequence[Array], *, n_resamples: int = 1000, seed: int = 0
) -> Array:
    """Return FPR95 in resamples of the inputs, (B, S, K); ID and every OOD set are resampled at their own sizes.

    Parameters
    ----------
    id_scores, ood_scores : (K, n) scores, and (K, m) scores of each of S OOD sets.
    n_resamples, seed : number of resamples B, and the seed of the resampling.
    """
    rng = np.random.default_rng(seed)
    n = id_scores.shape[1]
    allowed = n - count_for_share(0.95, n)  # number of ID inputs that may be below the threshold
    # A resample has about one copy of each input, so its threshold is among a few times as many lowest scores.
    lowest = np.argsort(id_scores, axis=1, kind="stable")[:, : 3 * allowed + 100]
    ood_orders = [np.argsort(scores, axis=1, kind="stable") for scores in ood_scores]
    resampled = []
    for start in range(0, n_resamples, _CHUNK):
        size = min(_CHUNK, n_resamples - start)
        counts = _counts(rng, size, n)
        thresholds = np.stack(
            [
                scores[order[(counts[:, order].cumsum(1) <= allowed).sum(1).clip(max=len(order) - 1)]]
                for scores, order in zip(id_scores, lowest, strict=True)
            ],
            1,
        )
        resampled.append(
            np.stack(
                [
                    _accepted(_counts(rng, size, scores.shape[1]), scores, orders, thresholds)
                    for scores, orders in zip(ood_scores, ood_orders, strict=True)
                ],
                1,
            )
        )
    return np.concatenate(resampled)


def _counts(rng: np.random.Generator, size: int, n: int) -> npt.NDArray[np.float32]:
    """Return how often each of n inputs is in each of some resamples, (size, n)."""
    flat = rng.integers(0, n, (size, n)) + n * np.arange(size)[:, None]
    return np.bincount(flat.ravel(), minlength=size * n).reshape(size, n).astype(np.float32)


def _accepted(
    counts: npt.NDArray[np.float32], scores: Array, orders: npt.NDArray[np.int64], thresholds: Array
) -> Array:
    """Return the share of each resample (B, m) at or above its threshold, (B, K).

    The thresholds of a detector are close to one another: the inputs above all of them are counted by one product
    of matrices, and only those between them one by one.
    """
    places = np.stack(
        [
            np.searchsorted(row[order], taus, "left")
            for row, order, taus in zip(scores, orders, thresholds.T, strict=True)
        ]
    )  # (K, B)
    above = np.zeros(scores.shape, np.float32)
    for row, order, place in zip(above, orders, places, strict=True):
        row[order[place.max() :]] = 1
    accepted = (counts @ above.T).astype(np.float64)
    for k, (order, place) in enumerate(zip(orders, places, strict=True)):
        first, last = place.min(), place.max()
        between = counts[:, order[first:last]]
        accepted[:, k] += (between * (np.arange(first, last) >= place[:, None])).sum(1)
    return accepted / scores.shape[1]


def from_resamples(value: Array, resampled: Array, reference: int) -> Estimate:
    """Return percentile intervals of a measure and of its differences.

    Parameters
    ----------
    value, resampled : (K,) values of the measure, and those in resamples, (B, K).
    reference : index of the detector from which differences are taken.
    """
    ends = ((1 - _LEVEL) / 2, (1 + _LEVEL) / 2)
    low, high = np.quantile(resampled, ends, axis=0)
    difference_low, difference_high = np.quantile(resampled - resampled[:, [reference]], ends, axis=0)
    return Estimate(value, low, high, value - value[reference], difference_low, difference_high)


def cliques(value: Array, covariance: Array, *, alpha: float = 0.05) -> list[str]:
    """Return the cliques of each detector, as letters: detectors that share one cannot be told apart.

    Every pair is compared by a two-sided normal test of the difference, with the correction of Holm, "A simple
    sequentially rejective multiple test procedure", 1979, over all pairs: the chance that any pair of equals is
    told apart is at most ``alpha``. A clique is a largest run of neighbors in the ranking of which no two are told
    apart; "a" holds the best detector.

    Parameters
    ----------
    value, covariance : (K,) values, higher is better, and their covariance (K, K).
    alpha : bound on the chance of any wrong difference.
    """
    k = len(value)
    order = np.argsort(-value, kind="stable")
    first, second = np.triu_indices(k, 1)
    difference = np.abs(value[first] - value[second])
    deviation = np.sqrt(_variance_of_differences(covariance)[first, second])
    ratio = np.divide(difference, deviation, out=np.full(len(first), np.inf), where=deviation != 0)
    # Copies of one detector differ by rounding alone.
    p = np.where(difference < 1e-12, 1.0, 2 * ndtr(-ratio))
    differs = np.zeros((k, k), bool)
    for step, pair in enumerate(np.argsort(p, kind="stable")):
        # Also false for NaN, where there are too few inputs for a test.
        if not p[pair] <= alpha / (len(p) - step):
            break
        differs[first[pair], second[pair]] = differs[second[pair], first[pair]] = True
    differs = differs[np.ix_(order, order)]
    letters = _letters()
    result = [""] * k
    reached = 0
    for start in range(k):
        end = start + 1
        while end < k and not differs[start : end + 1, start : end + 1].any():
            end += 1
        if end > reached:
            letter, reached = next(letters), end
            for place in order[start:end]:
                result[place] += letter
    return result


def _letters() -> Iterator[str]:
    yield from string.ascii_lowercase
    yield from (f"({number})" for number in range(27, 10**6))
