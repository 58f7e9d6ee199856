"""From scores to verdicts with a stated error rate: thresholds, conformal p-values, false discoveries.

Everything here rests on one assumption: the calibration inputs and the ID inputs to come are exchangeable,
that is, drawn alike, and no calibration input trained the model or fitted the detector. The promised rates
then hold at every sample size, whatever the distribution of the scores, on average over calibration sets.
Higher scores mean more in-distribution (ID).

Calibration scores are (n,), a tensor on any device, a numpy array or a sequence, of any integer or floating
type; infinite scores are valid. Everywhere, a `TypeError` is raised for what is not real numbers and a
`ValueError` for what is not one-dimensional or holds a NaN, with the argument and the index of the first NaN.
"""

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

from featnorm._utils.checks import ScoreLike, as_p_values, as_score_tensor, check_share, threshold_rank

__all__ = ["Calibration", "benjamini_hochberg", "conformal_p_values", "threshold_at_tpr"]


def threshold_at_tpr(id_scores: ScoreLike, tpr: float = 0.95) -> float:
    """Largest threshold that accepts a new ID input with probability at least ``tpr``.

    With ``alpha = 1 - tpr`` it is the k-th smallest of the n scores, ``k = floor(alpha (n + 1))``: a new,
    exchangeable score is equally likely to take each of the n + 1 ranks, and falls below the threshold only
    in the k lowest. The plain quantile keeps ``tpr`` of the n scores, but less of what comes after.

    Source: Vovk, Gammerman and Shafer, "Algorithmic learning in a random world", 2005; Bates et al.,
    "Testing for outliers with conformal p-values", Annals of Statistics 51(1), 2023.

    Parameters
    ----------
    id_scores
        (n,) scores of ID inputs that neither trained the model nor fitted the detector.
    tpr
        Share of ID inputs to accept, in (0, 1).

    Returns
    -------
    float
        The threshold, one of the scores; an input is ID when ``score >= threshold``.

    Raises
    ------
    ValueError
        ``tpr`` outside (0, 1); too few scores for it (19 are needed at 0.95, 99 at 0.99); scores that are
        empty or that the module's description refuses.
    """
    scores = as_score_tensor(id_scores, "id_scores")
    return float(scores.kthvalue(threshold_rank(len(scores), tpr)).values)


def conformal_p_values(calibration_scores: ScoreLike, scores: Tensor) -> Tensor:
    """P-values of the hypothesis that an input is ID: ``(1 + #{calibration <= score}) / (n + 1)``.

    A small p-value speaks for OOD. For an ID input, ``P(p <= u) <= u`` at every u: rejecting at ``p <= u``
    raises a false alarm for a share u of ID inputs at most.

    Source: Bates et al., "Testing for outliers with conformal p-values", Annals of Statistics 51(1), 2023.

    Parameters
    ----------
    calibration_scores
        (n,) scores of ID inputs that neither trained the model nor fitted the detector, n >= 1.
    scores
        (m,) scores to judge; m = 0 is valid.

    Returns
    -------
    Tensor
        (m,) float64 in [1 / (n + 1), 1], on the device of ``scores``.

    Raises
    ------
    ValueError
        No calibration score, or scores that the module's description refuses.
    """
    calibration = _sorted(calibration_scores, "calibration_scores")
    return _p_values(_count_at_most(calibration, _batch(scores)), len(calibration))


def benjamini_hochberg(p_values: ScoreLike, fdr: float = 0.05) -> Tensor:
    """Which inputs of a batch to declare OOD so that at most a share ``fdr`` of them is ID, in expectation.

    With the p-values sorted, the k smallest are declared OOD, k being the largest with
    ``p_(k) <= fdr k / m``. A fixed threshold bounds false alarms among ID inputs; this bounds them among
    alarms.

    Source: Benjamini and Hochberg, "Controlling the false discovery rate", JRSS B 57(1), 1995. Conformal
    p-values share their calibration set and so depend on each other, but positively (PRDS), under which the
    procedure stays valid: proved by Bates et al., "Testing for outliers with conformal p-values", Annals of
    Statistics 51(1), 2023.

    Parameters
    ----------
    p_values
        (m,) p-values in [0, 1], such as those of `conformal_p_values`; m = 0 is valid.
    fdr
        False-discovery rate, in (0, 1).

    Returns
    -------
    Tensor
        (m,) bool, True where the input is declared OOD, on the device of ``p_values``.

    Raises
    ------
    ValueError
        ``fdr`` outside (0, 1), p-values outside [0, 1], or what the module's description refuses.
    """
    check_share(fdr, "fdr")
    p = as_p_values(p_values, "p_values")
    if p.numel() == 0:
        return torch.zeros_like(p, dtype=torch.bool)
    ordered = p.sort().values
    # Conformal p-values lie on a grid, where p_(k) = fdr k / m is no rare event that rounding may decide.
    limit = fdr * (1 + 1e-12) / len(p) * torch.arange(1, len(p) + 1, dtype=p.dtype, device=p.device)
    return p <= torch.where(ordered <= limit, ordered, -1.0).max()


class Calibration(nn.Module):
    """A threshold and p-values learned from the scores of held-out ID inputs.

    The two agree: an input is ID exactly when its p-value is above ``1 - tpr``, meant as a decimal (at
    ``tpr=0.9`` compare with 0.1; ``1 - 0.9`` is a little less in floating point).

    What it learned are float64 buffers. They stay float64 when a surrounding model is cast to another type,
    as rounded scores would void the promised rate. To rebuild one from a state dict, construct it from the
    stored ``scores`` and the ``tpr``, which is an attribute and no part of the state.

    Parameters
    ----------
    id_scores
        (n,) scores of ID inputs that neither trained the model nor fitted the detector.
    tpr
        Share of new ID inputs to accept, in (0, 1).

    Attributes
    ----------
    scores : Tensor
        (n,) float64, the calibration scores in ascending order.
    threshold : Tensor
        0-d float64; see `threshold_at_tpr`.
    tpr : float
        As given; read-only, since the threshold is of this share. For another one make another `Calibration`.

    Raises
    ------
    ValueError
        As `threshold_at_tpr`.
    """

    scores: Tensor
    threshold: Tensor

    def __init__(self, id_scores: ScoreLike, tpr: float = 0.95) -> None:
        super().__init__()
        scores = _sorted(id_scores, "id_scores")
        self._tpr = tpr
        self._rank = threshold_rank(len(scores), tpr)
        self.register_buffer("scores", scores)
        self.register_buffer("threshold", scores[self._rank - 1].clone())

    @property
    def tpr(self) -> float:
        """The share of new ID inputs to accept."""
        return self._tpr

    def p_value(self, scores: Tensor) -> Tensor:
        """P-values of (m,) scores, small for OOD: (m,) float64; see `conformal_p_values`."""
        return self.judge(scores)[0]

    def is_id(self, scores: Tensor) -> Tensor:
        """Whether each of (m,) scores reaches the threshold: (m,) bool, True for ID; as `judge`."""
        return self.judge(scores)[1]

    def judge(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Return the p-values of (m,) scores, and whether each reaches the threshold, by one look-up.

        Raises
        ------
        ValueError
            Scores that are not one-dimensional or hold a NaN.
        """
        at_most = _count_at_most(self.scores, _batch(scores))
        # The threshold is the k-th smallest: reached where k of the scores at least are no larger.
        return _p_values(at_most, len(self.scores)), at_most >= self._rank

    def false_alarm_range(self, confidence: float = 0.9) -> tuple[float, float]:
        """Bounds of the share of new ID inputs that this threshold refuses.

        On average over calibration sets it is at most ``1 - tpr``; with the n scores that were drawn it is
        Beta(k, n + 1 - k) distributed, k being the threshold's rank, for scores without ties (with ties it is
        lower). The bounds are its central interval.

        Source: Vovk, "Conditional validity of inductive conformal predictors", ACML 2012.

        Parameters
        ----------
        confidence
            Probability that the share lies within the bounds, in (0, 1).

        Raises
        ------
        ValueError
            ``confidence`` outside (0, 1).
        """
        from scipy.stats import beta

        check_share(confidence, "confidence")
        n = len(self.scores)
        k = threshold_rank(n, self.tpr)
        low, high = beta.ppf([(1 - confidence) / 2, (1 + confidence) / 2], k, n + 1 - k)
        return float(low), float(high)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def move_only(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(move_only, recurse)  # type: ignore[no-untyped-call]
        return self


def _sorted(scores: ScoreLike, name: str) -> Tensor:
    return as_score_tensor(scores, name).to(torch.float64).sort().values


def _count_at_most(calibration: Tensor, scores: Tensor) -> Tensor:
    """How many of the calibration scores, in ascending order, are no larger than each score."""
    return torch.searchsorted(calibration.to(scores.device), scores.contiguous(), right=True)


def _p_values(at_most: Tensor, n: int) -> Tensor:
    """Conformal p-values, from how many of n calibration scores are no larger."""
    return (1 + at_most).to(torch.float64) / (n + 1)


def _batch(scores: Tensor) -> Tensor:
    """Scores to judge, in the precision of the calibration scores."""
    return as_score_tensor(scores, "scores", allow_empty=True).to(torch.float64)
