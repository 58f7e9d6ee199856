"""The page that shows drift in a stream of scores, as found by `featnorm.DriftMonitor`."""

import math
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from featnorm.archive import StoredCalibration
from featnorm.drift import DriftMonitor

_MAX_POINTS = 2000
_MAX_LATEST = 1000
# Maximum number of bins in the plot of mean p-values, and minimum number of inputs in a bin.
_MAX_BINS = 50
_MIN_INPUTS = 20

Array = npt.NDArray[np.float64]


class StreamHistory:
    """The history of a stream in a bounded number of points, and its latest scores.

    Every point but the last covers the same number of inputs. If there are too many points, neighbors are merged.

    Attributes
    ----------
    count : number of inputs so far.
    latest, latest_p_values : the last scores and their p-values, at most 1000.
    """

    def __init__(self) -> None:
        self.count = 0
        self.latest: deque[float] = deque(maxlen=_MAX_LATEST)
        self.latest_p_values: deque[float] = deque(maxlen=_MAX_LATEST)
        self._step = 1
        self._highest: list[float] = []
        self._p_sums: list[float] = []

    def state(self) -> dict[str, Any]:
        """Return the state as plain data, which JSON can hold."""
        return {name: list(value) if isinstance(value, deque) else value for name, value in vars(self).items()}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        """Return the history whose `state` this is."""
        history = cls()
        for name, value in vars(history).items():
            setattr(history, name, deque(state[name], _MAX_LATEST) if isinstance(value, deque) else state[name])
        return history

    def add(self, scores: Array, evidence: Array, p_values: Array) -> None:
        """Add (n,) scores, the evidence after each, and their p-values among the calibration scores."""
        self.latest.extend(scores.tolist())
        self.latest_p_values.extend(p_values.tolist())
        for log10, p in zip(evidence.tolist(), p_values.tolist(), strict=True):
            if self.count % self._step:
                self._highest[-1] = max(self._highest[-1], log10)
                self._p_sums[-1] += p
            else:
                self._make_room()
                self._highest.append(log10)
                self._p_sums.append(p)
            self.count += 1

    def _make_room(self) -> None:
        if len(self._highest) == _MAX_POINTS:
            self._highest = list(map(max, self._highest[::2], self._highest[1::2]))
            self._p_sums = list(map(sum, zip(self._p_sums[::2], self._p_sums[1::2], strict=True)))
            self._step *= 2

    def evidence(self) -> tuple[Array, Array]:
        """Return increasing counts, from 0, and the highest evidence between each and the one before."""
        ends = [min((i + 1) * self._step, self.count) for i in range(len(self._highest))]
        return np.array([0.0, *ends]), np.array([0.0, *self._highest])

    def mean_p_values(self) -> tuple[Array, Array]:
        """Return the edges of bins, as counts (n + 1,), and the mean p-value in each bin (n,)."""
        points = max(-(-_MIN_INPUTS // self._step), -(-len(self._p_sums) // _MAX_BINS))
        starts = np.arange(0, len(self._p_sums), points)
        if len(starts) > 1 and self.count - starts[-1] * self._step < points * self._step / 2:
            # The last bin has too few inputs for a meaningful mean: merge it into the one before.
            starts = starts[:-1]
        edges = np.array([*(starts * self._step), self.count], np.float64)
        return edges, np.add.reduceat(np.array(self._p_sums), starts) / np.diff(edges)


def write_drift_page(
    path: Path,
    monitor: DriftMonitor,
    history: StreamHistory,
    calibration: StoredCalibration,
    *,
    summary: str,
    facts: Mapping[str, str],
) -> None:
    """Write the page on a stream of scores as one HTML file that works offline.

    Parameters
    ----------
    path : file to write, in an existing directory; an existing file is replaced.
    monitor, history : the monitor and the history of the same stream, which has at least one score.
    calibration : calibration of the detector that computed the scores.
    summary, facts : sentences under the heading, and provenance, as label -> text.
    """
    # Drawing takes half a second to import, which `featnorm monitor` without a page does not need.
    from featnorm.report import plots
    from featnorm.report.html import Key, number, percent, render, write

    alarmed_at = None if monitor.alarmed_at is None else monitor.alarmed_at + 1
    edges, means = history.mean_p_values()
    calibrated, latest = calibration.scores, np.array(history.latest)
    # Half-width for means of uniform p-values, whose variance is 1/12; the calibration scores are a sample too.
    usual = 1.96 * np.sqrt((1 / np.diff(edges) + 1 / len(calibrated)) / 12)
    # There is no line to draw where each group has its own threshold.
    threshold = math.nan if calibration.group_names else float(calibration.threshold)
    histogram, outside = plots.histogram(
        [calibrated, latest],
        threshold,
        prefix="h",
        label=f"Histograms of the calibration scores and of the latest {len(latest)} scores.",
    )
    html = render(
        "drift.html",
        title="Drift" if alarmed_at else "No drift",
        summary=summary,
        facts=facts,
        noun=calibration.noun,
        alarmed_at=alarmed_at,
        alarm_evidence=format_evidence(monitor.alarm_level),
        evidence=plots.evidence(
            *history.evidence(),
            monitor.alarm_level,
            alarmed_at,
            noun=calibration.noun,
            prefix="e",
            label=f"Evidence for drift over {history.count} {calibration.noun}s, at most "
            f"{format_evidence(monitor.highest)}.",
        ),
        p_values=plots.mean_p_values(
            edges,
            means,
            usual,
            alarmed_at,
            noun=calibration.noun,
            prefix="p",
            label=f"Mean p-values, from {means[0]:.2f} at the start to {means[-1]:.2f} at the end.",
        ),
        histogram=histogram,
        keys=[
            Key(f"{len(calibrated):,} calibration scores", *plots.series(0)),
            Key(f"the latest {len(latest):,} scores of the stream", *plots.series(1)),
        ],
        threshold="" if calibration.group_names else number(threshold),
        # A score is below the threshold if its p-value is at most 1 - tpr, which is not exact in binary.
        flagged=percent(float(np.mean(np.array(history.latest_p_values) <= 1 - calibration.tpr + 1e-12))),
        promised=percent(1 - calibration.tpr),
        has_outside=any(out.below or out.above for out in outside),
    )
    write(path, html)


def format_evidence(log10: float) -> str:
    """Format evidence, given as its base-10 logarithm, as odds."""
    if log10 >= 6:
        return f"10^{log10:.0f} to 1"
    return f"{10**log10:,.0f} to 1" if log10 >= 1 else f"{10**log10:.1f} to 1"
