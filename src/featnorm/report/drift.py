"""A page on the drift of a stream of scores, as `featnorm.DriftMonitor` found it."""

from collections import deque
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from featnorm.calibration import Calibration
from featnorm.drift import DriftMonitor
from featnorm.report import plots
from featnorm.report.html import Key, number, percent, render, write

_MOST_POINTS = 2000
_LATEST = 1000
# Stretches of a stream that a mean p-value is shown of, and the fewest images that make one.
_MOST_STRETCHES = 50
_LEAST_IMAGES = 20

Array = npt.NDArray[np.float64]


class StreamHistory:
    """The course of a stream in a bounded number of points, and its latest scores.

    A point stands for as many images as any other but the last; when there are too many, neighbors become one.

    Attributes
    ----------
    count : images so far.
    latest : the last scores, 1000 at most.
    """

    def __init__(self) -> None:
        self.count = 0
        self.latest: deque[float] = deque(maxlen=_LATEST)
        self._step = 1
        self._highest: list[float] = []
        self._p_sums: list[float] = []

    def add(self, scores: Array, evidence: Array, p_values: Array) -> None:
        """Take the next images: scores, evidence after each, p-values among the calibration scores."""
        self.latest.extend(scores.tolist())
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
        if len(self._highest) == _MOST_POINTS:
            self._highest = list(map(max, self._highest[::2], self._highest[1::2]))
            self._p_sums = list(map(sum, zip(self._p_sums[::2], self._p_sums[1::2], strict=True)))
            self._step *= 2

    def evidence(self) -> tuple[Array, Array]:
        """Numbers of images, ascending from 0, and the highest evidence from one to the next."""
        ends = [min((i + 1) * self._step, self.count) for i in range(len(self._highest))]
        return np.array([0.0, *ends]), np.array([0.0, *self._highest])

    def mean_p_values(self) -> tuple[Array, Array]:
        """Numbers of images between which stretches lie, and the mean p-value of each."""
        points = max(-(-_LEAST_IMAGES // self._step), -(-len(self._p_sums) // _MOST_STRETCHES))
        starts = np.arange(0, len(self._p_sums), points)
        if len(starts) > 1 and self.count - starts[-1] * self._step < points * self._step / 2:
            # Too few for a stretch of their own: its mean would say nothing.
            starts = starts[:-1]
        edges = np.array([*(starts * self._step), self.count], np.float64)
        return edges, np.add.reduceat(np.array(self._p_sums), starts) / np.diff(edges)


def write_drift_page(
    path: Path,
    monitor: DriftMonitor,
    history: StreamHistory,
    calibration: Calibration,
    *,
    summary: str,
    facts: Mapping[str, str],
) -> None:
    """Write what became of a stream as one HTML file, which opens offline.

    Parameters
    ----------
    path : the file to write, in a directory that exists; a file that is there is replaced.
    monitor, history : what took the stream, of at least one score.
    calibration : what the scores are of.
    summary, facts : sentences under the heading, and what a reader should know, by short names.
    """
    alarmed_at = None if monitor.alarmed_at is None else monitor.alarmed_at + 1
    edges, means = history.mean_p_values()
    known, latest = calibration.scores.numpy(), np.array(history.latest)
    # Of means of uniform p-values, whose variance is 1/12; the calibration scores vary as those of a stretch do.
    usual = 1.96 * np.sqrt((1 / np.diff(edges) + 1 / len(known)) / 12)
    threshold = float(calibration.threshold)
    histogram, outside = plots.histogram(
        [known, latest],
        threshold,
        prefix="h",
        label=f"Histograms of the calibration scores and of the latest {len(latest)} scores.",
    )
    html = render(
        "drift.html",
        title="Drift" if alarmed_at else "No drift",
        summary=summary,
        facts=facts,
        alarmed_at=alarmed_at,
        alarm_evidence=format_evidence(monitor.alarm_level),
        evidence=plots.evidence(
            *history.evidence(),
            monitor.alarm_level,
            alarmed_at,
            prefix="e",
            label=f"Evidence for drift over {history.count} images, at most {format_evidence(monitor.highest)}.",
        ),
        p_values=plots.mean_p_values(
            edges,
            means,
            usual,
            alarmed_at,
            prefix="p",
            label=f"Mean p-values, from {means[0]:.2f} at first to {means[-1]:.2f} at last.",
        ),
        histogram=histogram,
        keys=[
            Key(f"{len(known):,} calibration scores", *plots.series(0)),
            Key(f"the latest {len(latest):,} scores of the stream", *plots.series(1)),
        ],
        threshold=number(threshold),
        refused=percent(float(np.mean(latest < threshold))),
        promised=percent(1 - calibration.tpr),
        has_outside=any(out.below or out.above for out in outside),
    )
    write(path, html)


def format_evidence(log10: float) -> str:
    """Return evidence, given by its logarithm, for people."""
    if log10 >= 6:
        return f"10^{log10:.0f} to 1"
    return f"{10**log10:,.0f} to 1" if log10 >= 1 else f"{10**log10:.1f} to 1"
