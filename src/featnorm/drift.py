"""Drift of a stream: whether the inputs as a whole have changed, even if no single one is extreme.

Every score is ranked among the calibration scores and all earlier scores of the stream. Without drift these ranks,
as conformal p-values, are independent and uniform. A gambler who bets against that at fair odds gains only by
luck: the capital is a martingale, here called the evidence, and the chance that it ever reaches 100 times its
initial value is at most 1 %.

Sources: Vovk, Gammerman and Shafer, "Algorithmic learning in a random world", 2005 (the p-values); Vovk, "Testing
randomness online", Statistical Science 36(4), 2021 (betting on them); Shin, Ramdas and Rinaldo, "E-detectors: a
nonparametric framework for sequential change detection", New England Journal of Statistics in Data Science 2(2),
2024 (a mixture over the start of the drift).
"""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import NormalDist
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from featnorm._utils.checks import ScoreLike, as_score_array, check_share
from featnorm._utils.sealed import read_sealed, write_sealed

__all__ = ["DriftMonitor"]

# A key keeps 22 of the 32 bits of a score in two digits: the sign, the exponent and 13 bits of the fraction.
_DIGIT_BITS = 11
_DIGITS = 1 << _DIGIT_BITS
_DROPPED_BITS = 32 - 2 * _DIGIT_BITS

_FORMAT = 1


class _Bet(NamedTuple):
    """A drift to bet on: ``share`` of the normal quantiles of the p-values have another mean or deviation."""

    weight: float
    share: float = 1.0
    mean: float = 0.0
    deviation: float = 1.0


# With a smaller share of the capital a bet pays later, by more inputs the smaller the shift that it is on.
_BETS = (
    *(_Bet(1 / shift, mean=sign * shift) for shift in (0.125, 0.25, 0.5, 1.0, 2.0) for sign in (-1, 1)),
    *(_Bet(1.5, deviation=deviation) for deviation in (0.5, 0.7, 1.4, 2.0)),
    *(_Bet(1.5, share=share, mean=mean) for share, mean in ((0.1, -2.0), (0.05, -3.0), (0.1, 2.0))),
    # The density of this one is a histogram of recent p-values: it finds a drift that no other bet describes.
    _Bet(2.0),
)
_BINS = 16
_PRIOR = 0.5  # count in every bin of the histogram, which is not forgotten
_FORGETTING = 0.99
# Share of the capital that is bet from the first input on. Step t bets ``_RATE / (t + _SCALE)`` of the rest.
_FIRST = 0.5
_RATE = 0.3
_SCALE = 30
_NORMAL = NormalDist()
# The quantile of 0 and 1 is infinite.
_MIN_P = 1e-15


class DriftMonitor:
    """Raises an alarm when a stream of scores is no longer like the calibration scores.

    The monitor assumes that without drift the calibration inputs and those of the stream are exchangeable (drawn
    from the same distribution, in no particular order), and that no calibration input was used to train the model
    or to fit the detector. The probability of ever raising a false alarm is then at most ``false_alarm``, however
    long the stream, for any number of calibration scores and any distribution. Consecutive frames of a video are
    not exchangeable: a stream whose inputs resemble the previous ones raises alarms without drift.

    A p-value is ``p_t = (#{s_i < s_t} + U_t #{s_i = s_t}) / (n + t)`` over the calibration scores and the first t
    of the stream, ``U_t`` uniform. The capital is spread over 18 bets and cash. A bet multiplies its part by its
    density at ``p_t``, which has the mean 1 over uniform p-values. With ``z`` the standard normal quantile of
    ``p_t``, 17 bets have the density ``1 - w + w N(z; m, s^2) / N(z; 0, 1)``: for shifts of all inputs (m = 0.125
    to 2, both signs, bet on in inverse proportion to the shift), wider and narrower scores (s = 0.5 to 2), and a
    few inputs of another kind (w = 0.05 or 0.1). The last one is a histogram of earlier p-values in 16 bins; each
    p-value counts 0.99 times as much as the next, and 0.5 is added to every bin. Half of the capital is bet at the
    start, and step t moves ``0.3 / (t + 30)`` of the cash into the bets, for drifts that start there. The evidence
    never falls below the cash, about ``0.5 (30 / (t + 30))^0.3``.

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

    Examples
    --------
    >>> monitor = DriftMonitor(torch.randn(1000))
    >>> evidence = monitor.update(torch.randn(500) - 1)  # the scores fall by one deviation
    >>> bool(evidence[-1] > 2)  # log10 of the evidence: more than 100 to 1
    True
    """

    def __init__(self, calibration_scores: ScoreLike, false_alarm: float = 0.01, seed: int = 0) -> None:
        check_share(false_alarm, "false_alarm")
        self.false_alarm = float(false_alarm)
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

    def state(self) -> dict[str, Any]:
        """Return the state as plain data, which JSON can hold; `from_state` continues from it."""
        return {
            "format": _FORMAT,
            "false_alarm": self.false_alarm,
            "count": self.count,
            "log10_evidence": self.log10_evidence,
            "highest": self.highest,
            "alarmed_at": self.alarmed_at,
            "random": self._random.bit_generator.state,
            "seen": {str(key): number for key, number in self._seen.items()},
            "gamblers": self._gamblers.state(),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        """Return the monitor whose `state` this is.

        Raises
        ------
        ValueError
            It is the state of another version, or not a state of a monitor.
        """
        if not isinstance(state, Mapping) or state.get("format") != _FORMAT:
            raise ValueError(f"it is not the state of a drift monitor, format {_FORMAT}")
        monitor = cls.__new__(cls)
        for name in ("false_alarm", "count", "log10_evidence", "highest", "alarmed_at"):
            setattr(monitor, name, state[name])
        monitor._random = np.random.default_rng()
        monitor._random.bit_generator.state = state["random"]
        monitor._seen = _Counts()
        for key, number in state["seen"].items():
            monitor._seen.add(int(key), number)
        monitor._gamblers = _Gamblers.from_state(state["gamblers"])
        return monitor

    def save(self, path: str | Path) -> None:
        """Save the monitor to a JSON file with a checksum; an existing file is replaced.

        Parameters
        ----------
        path
            The file. It holds how often each score was seen, rounded to one part in 8192.

        Raises
        ------
        OSError
            The file cannot be written.
        """
        write_sealed(Path(path), self.state())

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Load a monitor that was saved by `save`. It continues the stream as if it had not been interrupted.

        Raises
        ------
        OSError
            The file cannot be read.
        ValueError
            The file is damaged, was not written by `save`, or was written by another version.
        """
        try:
            return cls.from_state(read_sealed(Path(path)))
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(
                f"{path} holds no drift monitor that this version of featnorm can load, or is damaged: make a new "
                "monitor from the calibration scores"
            ) from error

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

    def add(self, key: int, number: int = 1) -> tuple[int, int]:
        """Count scores of a key; return how many scores are below these, and how many equal, these included."""
        first, second = divmod(key, _DIGITS)
        row = self._rows.get(first)
        if row is None:
            row = self._rows[first] = np.zeros(_DIGITS, np.int64)
        row[second] += number
        self._sums[first] += number
        self.total += number
        return int(self._sums[:first].sum() + row[:second].sum()), int(row[second])

    def items(self) -> Iterator[tuple[int, int]]:
        """Yield every key and the number of its scores."""
        for first, row in self._rows.items():
            for second in np.flatnonzero(row).tolist():
                yield first * _DIGITS + second, int(row[second])


class _Gamblers:
    """The capital, as shares in cash and in the bets, which add up to 1, and as the logarithm of the whole."""

    _weights, _share, _mean, _deviation = np.array(_BETS).T
    _weights = _weights / _weights.sum()
    # The logarithm of a ratio of normal densities is (square z + slope) z + constant.
    _square, _slope = (1 - _deviation**-2) / 2, _mean * _deviation**-2
    _constant = -_mean * _slope / 2
    _factor, _rest = _share / _deviation, 1 - _share

    def __init__(self) -> None:
        self._log_capital = 0.0
        self._steps = 0
        self._cash = 1 - _FIRST
        self._bets = _FIRST * self._weights
        self._histogram = np.full(_BINS, _PRIOR)

    def state(self) -> dict[str, Any]:
        """Return the state as plain data."""
        return {
            "log_capital": self._log_capital,
            "steps": self._steps,
            "cash": self._cash,
            "bets": self._bets.tolist(),
            "histogram": self._histogram.tolist(),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        """Return the gamblers whose `state` this is."""
        gamblers = cls()
        for name, value in state.items():
            setattr(gamblers, f"_{name}", np.array(value) if isinstance(value, list) else value)
        return gamblers

    def bet(self, p_values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Bet on (m,) p-values; return log10 of the capital after each."""
        evidence = np.empty(len(p_values))
        for i, p in enumerate(p_values.tolist()):
            moved = self._cash * _RATE / (self._steps + _SCALE)
            self._cash -= moved
            self._bets = (self._bets + moved * self._weights) * self.densities(p)
            gain = self._cash + float(self._bets.sum())
            self._cash /= gain
            self._bets /= gain
            self._log_capital += math.log(gain)
            self._steps += 1
            self._histogram = _FORGETTING * self._histogram + (1 - _FORGETTING) * _PRIOR
            self._histogram[_bin(p)] += 1
            evidence[i] = self._log_capital / math.log(10)
        return evidence

    def densities(self, p: float) -> npt.NDArray[np.float64]:
        """Return the density of each bet at a p-value."""
        z = _NORMAL.inv_cdf(min(max(p, _MIN_P), 1 - _MIN_P))
        densities = self._rest + self._factor * np.exp((self._square * z + self._slope) * z + self._constant)
        densities[-1] = self._histogram[_bin(p)] * (_BINS / self._histogram.sum())
        return densities


def _bin(p: float) -> int:
    return min(int(_BINS * p), _BINS - 1)


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
