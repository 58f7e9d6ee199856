"""Drift of a stream: whether inputs as a whole have changed, though no single one may be extreme.

Every score is ranked among the calibration scores and all that came before it in the stream. Without drift these
ranks, as conformal p-values, are independent and uniform. A gambler who bets against that at fair odds gains only
by luck: the capital is a martingale, called the evidence here, and that it ever reaches 100 times what it began
with has a chance of 1 % at most.

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

# Of the 32 bits of a score these remain: sign, exponent and 13 bits of the fraction, in two digits of a key.
_DIGIT_BITS = 11
_DIGITS = 1 << _DIGIT_BITS
_DROPPED_BITS = 32 - 2 * _DIGIT_BITS

# How fast the gamblers change their minds.
_JUMPING_RATES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)


class DriftMonitor:
    """Raises an alarm when a stream of scores is no longer like the calibration scores.

    Assumed is that without drift the calibration inputs and those of the stream are exchangeable, that is, drawn
    alike and in no order, and that no calibration input trained the model or fitted the detector. The alarm is
    then false with probability ``false_alarm`` at most, however long the stream, at any number of calibration
    scores and whatever their distribution. Neighbouring frames of a video are not exchangeable: a stream whose
    inputs resemble those before them raises alarms without drift.

    A p-value is ``p_t = (#{s_i < s_t} + U_t #{s_i = s_t}) / (n + t)`` over the calibration scores and the first t
    of the stream, ``U_t`` uniform. Gamblers of five jumping rates J each spread their capital ``C`` over the bets
    ``1 + e (p - 1/2)``, e = -1, 0, 1: at every step ``C_e <- (1 - J) C_e + J C / 3``, then ``C_e`` is multiplied
    by its bet. The evidence is their mean capital (the Composite Jumper); it never falls below 1/5.

    Memory is bounded, whatever the length of the stream: scores are told apart to a part in 8192, and below that
    count as equal, as do those beyond the range of float32. That costs no validity, and power only where all
    scores are that close.

    Parameters
    ----------
    calibration_scores
        (n,) scores of held-out ID inputs, n >= 1, higher for more in-distribution. The more, the sooner drift is
        found.
    false_alarm
        Chance that the alarm is ever raised without drift, in (0, 1).
    seed
        Of the ``U_t``. The same scores raise the same alarm again, in batches of any size.

    Attributes
    ----------
    count : int
        Scores of the stream so far.
    log10_evidence : float
        The evidence now; 0 at the start.
    highest : float
        The most that ``log10_evidence`` has been.
    alarmed_at : int or None
        Index in the stream of the score at which the evidence first reached ``1 / false_alarm``; None before.

    Raises
    ------
    TypeError
        Calibration scores that are not real numbers.
    ValueError
        ``false_alarm`` outside (0, 1); calibration scores that are empty, not 1-D or hold a NaN.
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
        """What ``log10_evidence`` must reach for the alarm."""
        return -math.log10(self.false_alarm)

    def update(self, scores: ScoreLike) -> npt.NDArray[np.float64]:
        """Take the next scores of the stream, in order of time.

        Not to be called by two threads at once.

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
            Scores that are not real numbers.
        ValueError
            Scores that are not 1-D or hold a NaN; none of the batch is then taken.
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
    """How many scores of each key there were: the sum over a first digit, and a row of second digits each."""

    def __init__(self) -> None:
        self.total = 0
        self._sums = np.zeros(_DIGITS, np.int64)
        self._rows: dict[int, npt.NDArray[np.int64]] = {}

    def add(self, key: int) -> tuple[int, int]:
        """Count a score; return how many are below it, and how many equal to it, itself among them."""
        first, second = divmod(key, _DIGITS)
        row = self._rows.get(first)
        if row is None:
            row = self._rows[first] = np.zeros(_DIGITS, np.int64)
        row[second] += 1
        self._sums[first] += 1
        self.total += 1
        return int(self._sums[:first].sum() + row[:second].sum()), int(row[second])


class _Gamblers:
    """The Composite Jumper: a gambler for each jumping rate, with the same capital to begin with."""

    def __init__(self) -> None:
        # Capitals outgrow float64 within thousands of steps. Within a gambler's they do not grow far apart,
        # since the jumps level them: they are kept as shares of it, of the bets on low, on nothing, on high.
        self._shares = [(1 / 3, 1 / 3, 1 / 3)] * len(_JUMPING_RATES)
        self._log_capital = np.zeros((1, len(_JUMPING_RATES)))

    def bet(self, p_values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Bet on (m,) p-values; return log10 of the mean capital after each."""
        gains = np.empty((len(p_values), len(_JUMPING_RATES)))
        # Plain numbers: arrays of three make it several times slower.
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
    """Scores as integers of 22 bits in the same order, or equal.

    The bins are fixed beforehand. Bins made from the calibration scores would treat these unlike the scores to
    come, which then were exchangeable no longer, and p-values in bins that are made anew from all scores would
    need all scores.
    """
    # Adding zero makes 0.0 of -0.0, also where rounding to float32 made that of a smaller number.
    with np.errstate(over="ignore"):  # what lies beyond the range of float32 becomes infinite
        bits = (scores.astype(np.float32) + np.float32(0)).view(np.int32)
    ordered = np.where(bits >= 0, bits, bits ^ 0x7FFFFFFF)
    keys: list[int] = ((ordered >> _DROPPED_BITS) + _DIGITS * _DIGITS // 2).tolist()
    return keys
