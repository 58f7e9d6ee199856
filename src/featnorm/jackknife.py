"""Calibration of small sets: each calibration input is scored by a detector that was fitted without it."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from featnorm._utils.checks import ScoreLike, as_score_tensor, threshold_rank
from featnorm._utils.weights import ExactModule
from featnorm.detectors import Detector
from featnorm.features import Features

__all__ = ["JackknifeCalibration", "fit_left_out"]


class JackknifeCalibration(ExactModule):
    """P-values and verdicts from detectors that were each fitted without one calibration input (jackknife+).

    A set of 20 to 80 inputs is small: if calibration inputs are held out, few are left to fit on. Instead, J of
    its inputs are left out in turn (19 at ``tpr=0.95``, see `featnorm.splitting.left_out`), and detector j is
    fitted to all inputs but the j-th, which it gives the score c_j. A new input has a score s_j of each
    detector, which is compared with the c_j of the same detector::

        rows = left_out(digests, tpr)
        detectors, left_out_scores = fit_left_out(KNN(k=1), features, rows)
        calibration = JackknifeCalibration(left_out_scores, tpr)
        new_scores = torch.stack([detector.score(new) for detector in detectors], 1)
        score, p_value, is_id = calibration.predict(new_scores)

    The p-value is ``(2 #{j: c_j <= s_j} + 1) / (J + 1)``, at most 1; an input is ID if it is above ``1 - tpr``.
    The false-alarm rate is then at most ``1 - tpr``, on average over sets, for every distribution and every
    detector, as long as its fit does not depend on the order of the inputs. If more than a detector is learned
    from the inputs, such as a head, each detector needs its own.

    Proof: let each of the J + 1 inputs in turn be the new one. An input is flagged if it scores lower than the
    others, with at most k - 1 exceptions. Of two inputs, at most one scores lower under the detector that was
    fitted without both. If s inputs are flagged, one of them therefore has (s - 1) / 2 or more exceptions, so
    that ``s <= 2k - 1``. This is the worst case: if the detectors are alike, k inputs are flagged. With J = 19
    at 0.95, k is 1, and both rates are ``1 - tpr``: with more inputs left out, fewer OOD inputs would be
    flagged.

    Source: Barber, Candes, Ramdas and Tibshirani, "Predictive inference with the jackknife+", Annals of Statistics
    49(1), 2021; Vovk, "Cross-conformal predictors", 2015.

    Parameters
    ----------
    left_out_scores
        (J,) score of each left-out input, by the detector that was fitted without it.
    tpr
        Share of new ID inputs to accept, in (0, 1).

    Attributes
    ----------
    scores : Tensor
        (J,) float64, the scores as given.
    threshold : Tensor
        0-d float64, 0: what `predict` returns as a score is at least 0 for ID inputs.
    tpr : float
        Share of new ID inputs to accept; read-only.
    typical_tpr : float
        Share of new ID inputs that is accepted if the detectors are alike; ``tpr`` is a lower bound.

    Raises
    ------
    ValueError
        See `featnorm.calibration.threshold_at_tpr`.
    """

    scores: Tensor
    threshold: Tensor

    def __init__(self, left_out_scores: ScoreLike, tpr: float = 0.95) -> None:
        super().__init__()
        scores = as_score_tensor(left_out_scores, "left_out_scores").to(torch.float64)
        self._tpr = tpr
        # The largest k with 2k - 1 <= (1 - tpr) (J + 1).
        self._rank = (threshold_rank(len(scores), tpr) + 1) // 2
        self.register_buffer("scores", scores)
        self.register_buffer("threshold", scores.new_zeros(()))

    @property
    def tpr(self) -> float:
        """Share of new ID inputs to accept."""
        return self._tpr

    @property
    def typical_tpr(self) -> float:
        """Share of new ID inputs that is accepted if the detectors are alike."""
        return 1 - self._rank / (len(self.scores) + 1)

    def with_tpr(self, tpr: float) -> "JackknifeCalibration":
        """Return a calibration with the same scores for another share of ID inputs to accept."""
        return JackknifeCalibration(self.scores, tpr)

    def predict(self, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the score, the p-value and the verdict of new inputs.

        Parameters
        ----------
        scores : (m, J) scores of new inputs, one column per detector.

        Returns
        -------
        score
            (m,) float64, the k-th largest of ``s_j - c_j``: at least 0 exactly for ID inputs.
        p_value
            (m,) float64, small for OOD.
        is_id
            (m,) bool, True for ID.

        Raises
        ------
        ValueError
            The scores have another shape, or contain a NaN.
        """
        if scores.ndim != 2 or scores.shape[1] != len(self.scores):
            raise ValueError(
                f"scores must be (m, {len(self.scores)}), one per input and detector, got {tuple(scores.shape)}"
            )
        as_score_tensor(scores.flatten(), "scores", allow_empty=True)  # raises if there is a NaN
        scores, left_out = scores.detach().to(torch.float64), self.scores.to(scores.device)
        # The difference of two infinite scores would be NaN.
        margins = torch.where(scores == left_out, 0.0, scores - left_out)
        at_most = (margins >= 0).sum(1)
        p_values = ((2 * at_most + 1).to(torch.float64) / (len(left_out) + 1)).clamp(max=1)
        return margins.topk(self._rank, 1).values[:, -1], p_values, at_most >= self._rank

    def to_dict(self) -> dict[str, Any]:
        """Return everything but tensors as plain data: the share to accept."""
        return {"tpr": self.tpr}

    def fitted_tensors(self) -> dict[str, Tensor]:
        """Return the scores, which with `to_dict` make the calibration again."""
        return {"scores": self.scores}


def fit_left_out(
    detector: Detector, features: Features, rows: Tensor, groups: Tensor | None = None
) -> tuple[nn.ModuleList, Tensor]:
    """Fit a copy of a detector without each of some inputs in turn, and score this input with it.

    Parameters
    ----------
    detector : detector, which is not changed.
    features : features of n ID inputs, with labels for detectors that need them.
    rows : (J,) inputs to leave out, see `featnorm.splitting.left_out`.
    groups : (n,) group of each input; the whole group of an input is left out. Default: no groups.

    Returns
    -------
    detectors, scores
        The J fitted copies, and the score (J,) of each left-out input.

    Raises
    ------
    ValueError, TypeError
        See `featnorm.Detector.fit`.
    """
    members = torch.arange(len(features)) if groups is None else groups
    detectors = [copy.deepcopy(detector).fit(features[members != members[row]]) for row in rows]
    scores = [fitted.score(features[row[None]]) for fitted, row in zip(detectors, rows, strict=True)]
    return nn.ModuleList(detectors), torch.cat(scores)
