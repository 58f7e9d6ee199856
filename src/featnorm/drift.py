"""Drift of a stream: whether the inputs as a whole have changed, even if no single one is extreme.

Every score is ranked among the calibration scores and all earlier scores of the stream. Without drift these ranks,
as conformal p-values, are independent and uniform. A gambler who bets against that at fair odds gains only by
luck: the capital is a martingale, here called the evidence, and the chance that it ever reaches 100 times its
initial value is at most 1 %.

Sources: Vovk, Gammerman and Shafer, "Algorithmic learning in a random world", 2005 (the p-values); Vovk, "Testing
randomness online", Statistical Science 36(4), 2021; Vovk, Petej, Nouretdinov, Ahlberg, Carlsson and Gammerman,
"Retrain or not retrain: conformal test martingales for change-point detection", COPA 2021 (the bets).
"""

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from featnorm._utils.checks import ScoreLike, as_score_array, check_share

__all__ = ["DriftMonitor"]

# A key keeps 22 of the 32 bits of a score in two digits: the sign, the exponent and 13 bits of the fraction.
_DIGIT_BITS = 11
_DIGITS = 1 << _DIGIT_BITS
_DROPPED_BITS = 32 - 2 * _DIGIT_BITS

# How often the gamblers change their bets.
_JUMPING_RATES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)


class DriftMonitor:
    """Raises an alarm when a stream of scores is no longer like the calibration scores.

    The monitor assumes that without drift the calibration inputs and those of the stream are exchangeable (drawn
    from the same distribution, in no particular order), and that no calibration input was used to train the model
    or to fit the detector. The probability of ever raising a false alarm is then at most ``false_alarm``, however
    long the stream, for any number of calibration scores and any distribution. Consecutive frames of a video are
    not exchangeable: a stream whose inputs resemble the previous ones raises alarms without drift.

    A p-value is ``p_t = (#{s_i < s_t} + U_t #{s_i = s_t}) / (n + t)`` over the calibration scores and the first t
    of the stream, ``U_t`` uniform. Gamblers of five jumping rates J each spread their capital ``C`` over the bets
    ``1 + e (p - 1/2)``, e = -1, 0, 1: at every step ``C_e <- (1 - J) C_e + J C / 3``, then ``C_e`` is multiplied
    by its bet. The evidence is their mean capital (the Composite Jumper); it never falls below 1/5.

    Memory is bounded, however long the stream: scores that differ by less than one part in 8192 count as equal,
    and so do those beyond the range of float32. This does not affect validity, and reduces power only if all
    scores are that close.

    Parameters
    ----------
    calibration_scores
        (n,) scores of held-out ID inputs, n >= 1; higher is more in-distribution. With more scores, drift is
        detected sooner.
    false_alarm
        Maximum probability that the alarm is ever raised without drift, in (0, 1).
    seed
        Seed of the ``U_t``. The same scores raise the same alarm again, in batches of any size.

    Attributes
    ----------
    count : int
        Number of scores of the stream so far.
    log10_evidence : float
        Current evidence; 0 at the start.
    highest : float
        Maximum of ``log10_evidence`` so far.
    alarmed_at : int or None
        Index in the stream of the score at which the evidence first reached ``1 / false_alarm``; None before.

    Raises
    ------
    TypeError
        The calibration scores are not real numbers.
    ValueError
        ``false_alarm`` is outside (0, 1), or the calibration scores are empty, not 1-D or hold a NaN.
    """

    def __init__(self, calibration_scores: ScoreLike, false_alarm: float = 0.01, seed: int = 0) -> None:
        check_share(false_alarm, "false_alarm")
        self.false_alarm = false_alarm
        self.count = 0
        self.log10_evidence = 0.0
        self.highest = 0.0
        self.alarmed_at: int | None = None
        self._seen = _Counts()
        for key in _keys(as_score_array(calibration_scores, "calibration_scores")):
            self._seen.add(key)
        self._random = np.random.default_rng(seed)
        self._gamblers = _Gamblers()

    @property
    def alarm_level(self) -> float:
        """The value of ``log10_evidence`` at which the alarm is raised."""
        return -math.log10(self.false_alarm)

    def update(self, scores: ScoreLike) -> npt.NDArray[np.float64]:
        """Update the evidence with the next scores of the stream, in order of time.

        This method is not thread-safe.

        Parameters
        ----------
        scores
            (m,) scores; m = 0 is valid, and so are infinite scores.

        Returns
        -------
        ndarray
            (m,) float64, ``log10_evidence`` after each score.

        Raises
        ------
        TypeError
            The scores are not real numbers.
        ValueError
            The scores are not 1-D or hold a NaN. The monitor is then unchanged.
        """
        keys = _keys(as_score_array(scores, "scores", allow_empty=True))
        p_values = np.empty(len(keys))
        for i, (key, uniform) in enumerate(zip(keys, self._random.random(len(keys)).tolist(), strict=True)):
            below, equal = self._seen.add(key)
            p_values[i] = (below + uniform * equal) / self._seen.total
        evidence = self._gamblers.bet(p_values)
        if len(evidence):
            self.log10_evidence = float(evidence[-1])
            self.highest = max(self.highest, float(evidence.max()))
        if self.alarmed_at is None and self.highest >= self.alarm_level:
            self.alarmed_at = self.count + int(np.argmax(evidence >= self.alarm_level))
        self.count += len(evidence)
        return evidence


class _Counts:
    """Number of scores of each key: a sum per first digit, and for each first digit a row of second digits."""

    def __init__(self) -> None:
        self.total = 0
        self._sums = np.zeros(_DIGITS, np.int64)
        self._rows: dict[int, npt.NDArray[np.int64]] = {}

    def add(self, key: int) -> tuple[int, int]:
        """Count a score; return the number of scores below it, and of those equal to it, including itself."""
        first, second = divmod(key, _DIGITS)
        row = self._rows.get(first)
        if row is None:
            row = self._rows[first] = np.zeros(_DIGITS, np.int64)
        row[second] += 1
        self._sums[first] += 1
        self.total += 1
        return int(self._sums[:first].sum() + row[:second].sum()), int(row[second])


class _Gamblers:
    """The Composite Jumper: one gambler per jumping rate, all with the same initial capital."""

    def __init__(self) -> None:
        # Capitals outgrow float64 within thousands of steps. The three bets of a gambler (low, none, high) stay
        # close to each other, because the jumps level them: they are kept as shares of the gambler's capital.
        self._shares = [(1 / 3, 1 / 3, 1 / 3)] * len(_JUMPING_RATES)
        self._log_capital = np.zeros((1, len(_JUMPING_RATES)))

    def bet(self, p_values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Bet on (m,) p-values; return log10 of the mean capital after each."""
        gains = np.empty((len(p_values), len(_JUMPING_RATES)))
        # Plain numbers, because arrays of three numbers are several times slower.
        for step, p in enumerate(p_values.tolist()):
            for i, rate in enumerate(_JUMPING_RATES):
                low, none, high = self._shares[i]
                jumped, stay = rate / 3, 1 - rate
                low = (stay * low + jumped) * (1.5 - p)
                none = stay * none + jumped
                high = (stay * high + jumped) * (0.5 + p)
                gain = low + none + high
                self._shares[i] = (low / gain, none / gain, high / gain)
                gains[step, i] = gain
        log_capital = np.cumsum(np.concatenate([self._log_capital, np.log(gains)]), axis=0)
        self._log_capital = log_capital[-1:]
        mean = np.logaddexp.reduce(log_capital[1:], axis=1) - math.log(len(_JUMPING_RATES))
        return mean / math.log(10)


def _keys(scores: npt.NDArray[Any]) -> list[int]:
    """Return scores as integers of 22 bits whose order is that of the scores; close scores get equal integers.

    The bins are fixed in advance. If they were made from the calibration scores, these would be treated
    differently from later scores, and the two would no longer be exchangeable; bins made from all scores would
    need all scores.
    """
    # Adding zero turns -0.0 into 0.0, also if it is a tiny number that was rounded to float32.
    with np.errstate(over="ignore"):  # beyond the range of float32 a score becomes infinite
        bits = (scores.astype(np.float32) + np.float32(0)).view(np.int32)
    ordered = np.where(bits >= 0, bits, bits ^ 0x7FFFFFFF)
    keys: list[int] = ((ordered >> _DROPPED_BITS) + _DIGITS * _DIGITS // 2).tolist()
    return keys
