"""Detectors of small sets: each calibration input is scored by a detector that was fitted without it."""

import copy
from collections.abc import Iterator, Sequence
from typing import Self

import torch
from torch import Tensor, nn

from featnorm._utils.checks import Integer, table
from featnorm._utils.ranks import rank_scores
from featnorm.detectors.base import Detector, Wrapper, check_detector
from featnorm.detectors.statistics import Statistic
from featnorm.features import Features

# The fraction of a score is below 1 also in float32, next to thousands of left-out inputs.
_MAX_FRACTION = 1 - 2**-10
# A margin that may be infinite is at most this, and a spread that may be 0 at least that.
# An ONNX graph rounds both to float32.
_MAX_MARGIN, _MIN_SPREAD = 1e30, 1e-30


class LeftOutScores(Statistic):
    """Score of each left-out input, by the detector that was fitted without it."""

    scores: Tensor  # (J,)

    def __init__(self) -> None:
        super().__init__(scores=torch.empty(0, dtype=torch.float64))

    @property
    def is_empty(self) -> bool:
        """Whether there is no score yet."""
        return len(self.scores) == 0

    def merge(self, other: Self) -> None:
        """Copy the scores of another if there are none yet; otherwise raise a ValueError."""
        if not other.is_empty:
            if not self.is_empty:
                raise ValueError("two fits of a Jackknife cannot be merged: fit to all inputs at once")
            self.copy_from(other)

    def validate(self) -> None:
        """Raise a ValueError if a score is NaN; infinite scores are valid."""
        if self.scores.isnan().any():
            raise ValueError("a score of a left-out input is NaN")


class Jackknife(Wrapper):
    """A detector with a calibration for a small set, such as 20 to 100 inputs (jackknife+).

    If calibration inputs were held out of a small set, few would be left to fit to. Instead, J of its inputs are
    left out in turn: copy j of the detector is fitted to all inputs but the j-th, which it gives the score c_j. A
    new input has a score s_j of each copy, which is compared with the c_j of the same copy. Its score is the count
    ``c = #{j: c_j <= s_j}``, plus a fraction ``a / (a + b)`` below 1, where a is the smallest ``s_j - c_j`` of the
    counted, and b the smallest ``c_j - s_j`` of the others: the score interpolates between the c_j. If
    none or all are counted, the standard deviation of the c_j takes the place of a or b. Calibrate with fixed
    scores, without held-out inputs::

        rows = left_out(digests, tpr)  # of featnorm.splitting
        detector = Jackknife(KNN(k=1), count=len(rows)).fit(features, rows)
        calibration = Calibration(detector.calibration_scores, tpr)

    The fixed scores are the first J of 1, 1, 2, 2, 3, 3, ..., of which 2c are at most the score (J if 2c is more),
    so that the p-value is ``min(1, (2c + 1) / (J + 1))``. An input is ID if it is above ``1 - tpr``. The
    false-alarm rate is then at most ``1 - tpr``, on average over sets, for every distribution and every detector,
    as long as its fit does not depend on the order of the inputs, and the choice of the inputs to leave out does
    not depend on their scores. This holds for every ``tpr`` that J is large enough for. If more than a detector is
    learned from the inputs, such as a head, each copy would need its own.

    Proof: let each of the J + 1 inputs in turn be the new one. It is flagged if ``2c + 1 <= m``, where m is the
    largest integer with ``m <= (1 - tpr) (J + 1)``: if it scores lower than the others, with at most k - 1
    exceptions, where k is the largest integer with ``2k - 1 <= m``. Of two inputs, at most one scores lower under
    the detector that was fitted without both. If s inputs are flagged, one of them therefore has (s - 1) / 2 or
    more exceptions, so that ``s <= 2k - 1 <= m``. This is the worst case: if the copies are alike, k inputs are
    flagged. With J = 19 at 0.95, k is 1, and both rates are ``1 - tpr``: with more inputs left out, fewer OOD
    inputs would be flagged.

    A fit takes all inputs at once: it neither streams nor merges. Its state is J times that of the detector.

    Parameters
    ----------
    detector : any detector that does not run the model again.
    count : number J of inputs that are left out in turn; 19 for a threshold at ``tpr=0.95``, 9 at 0.9.

    Raises
    ------
    ValueError
        ``count`` is not a positive integer, or there are no more inputs than ``count``.

    Examples
    --------
    >>> features = Features(pooled=torch.randn(25, 8))
    >>> detector = Jackknife(KNN(k=1), count=19).fit(features, torch.arange(19))
    >>> detector.score(features).shape
    torch.Size([25])
    """

    source = "Barber, Candes, Ramdas and Tibshirani, Annals of Statistics 49(1), 2021; Vovk, 2015"
    formula = r"\#\{j : c_j \le s_j(x)\} + \frac{a}{a + b}"
    cost = "J times that of the detector"
    settings = table(count=Integer(1))
    count: int

    def __init__(self, detector: Detector, count: int = 19) -> None:
        super().__init__()
        check_detector(detector, type(self).__name__)
        self._set(count=count)
        self.left_out = LeftOutScores()
        self.copies = nn.ModuleList(copy.deepcopy(detector) for _ in range(self.count))
        self.reads, self.learns, self.needs_model = detector.reads, detector.learns, detector.needs_model

    @property
    def detector(self) -> Detector:
        """The first copy of the detector."""
        return next(self._copies())

    @property
    def calibration_scores(self) -> Tensor:
        """(J,) float64, the fixed scores for a `Calibration`: the first J of 1, 1, 2, 2, 3, 3, ..."""
        return torch.from_numpy(rank_scores(self.count))

    def fit(  # type: ignore[override]  # it leaves inputs out itself
        self, features: Features, rows: Tensor | Sequence[int] | None = None, groups: Tensor | None = None
    ) -> Self:
        """Fit each copy without one of the inputs, discarding any earlier fit.

        Parameters
        ----------
        features : features of n in-distribution inputs.
        rows
            (J,) inputs to leave out in turn, see `featnorm.splitting.left_out`. Default: the first J, for inputs
            in random order.
        groups
            (n,) group of each input, such as the clip of a frame: the whole group of an input is left out with it.
            At most one input of a group is left out. Default: no groups.

        Raises
        ------
        ValueError
            A field is missing or not finite, there are too few inputs, or ``rows`` are not J inputs of different
            groups; the earlier fit is kept.
        TypeError
            ``features`` is not a `Features`.
        """
        with self.refit(), torch.inference_mode(False), torch.no_grad():
            self._check_fit(features)
            self._fit_copies(features, rows, groups)
        return self

    def _check_fit(self, features: Features) -> None:
        if not self.left_out.is_empty:
            raise ValueError(f"{self!r} is fitted to all inputs at once: pass them to fit, as one batch")
        super()._check_fit(features)
        if len(features) <= self.count:
            raise ValueError(
                f"{self!r} leaves out {self.count} inputs in turn, so at least {self.count + 1} are needed, got "
                f"{len(features)}: add inputs, or lower count"
            )

    def _partial_fit(self, features: Features) -> None:
        self._fit_copies(features, None, None)

    def _fit_copies(self, features: Features, rows: Tensor | Sequence[int] | None, groups: Tensor | None) -> None:
        chosen = torch.arange(self.count) if rows is None else torch.as_tensor(rows)
        members = torch.arange(len(features)) if groups is None else groups
        if chosen.shape != (self.count,) or len(members[chosen].unique()) != self.count:
            raise ValueError(f"{self!r} needs {self.count} rows, each of another group, got {chosen.tolist()}")
        scores = []
        for fitted, row in zip(self._copies(), chosen, strict=True):
            fitted.fit(features[members != members[row]])
            scores.append(fitted.score(features[row[None]]).double())
        self.left_out.scores = torch.cat(scores)

    def _finalize(self) -> float:
        """Return the standard deviation of the left-out scores that are finite."""
        scores = self.left_out.scores
        finite = scores[scores.isfinite()]
        return max(float(finite.std(correction=0)), _MIN_SPREAD) if len(finite) else _MIN_SPREAD

    def _score(self, features: Features) -> Tensor:
        scores = torch.stack([fitted.score(features) for fitted in self._copies()], 1).double()
        left_out = self.left_out.scores.to(scores.device)
        # The difference of two infinite scores would be NaN.
        margins = torch.where(scores == left_out, 0.0, scores - left_out)
        counted = margins >= 0
        count, sizes, spread = counted.sum(1), margins.abs().clamp(max=_MAX_MARGIN), self._fitted_state()
        above = torch.where(count > 0, sizes.masked_fill(~counted, torch.inf).amin(1), spread)
        below = torch.where(count < self.count, sizes.masked_fill(counted, torch.inf).amin(1), spread)
        return count + _MAX_FRACTION * above / (above + below)

    def _validate(self) -> None:
        if len(self.left_out.scores) != self.count:
            raise ValueError(f"{self!r} has the scores of {len(self.left_out.scores)} left-out inputs")

    def _inner(self) -> list[Detector]:
        return list(self._copies())

    def _held_out_statistics(self) -> Iterator[Statistic]:
        # Each copy holds inputs out of its own fit.
        yield from ()

    def _copies(self) -> Iterator[Detector]:
        yield from self.copies  # type: ignore[misc]
