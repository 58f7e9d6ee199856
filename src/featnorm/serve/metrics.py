"""Metrics of a service for Prometheus."""

import math
import threading
from collections import Counter as Counts
from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from prometheus_client import CollectorRegistry, Counter, Histogram, Metric, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector
from torch import Tensor

from featnorm._utils.ranks import are_ranks
from featnorm.drift import DriftMonitor
from featnorm.verdict import ItemVerdict

if TYPE_CHECKING:
    from featnorm.serve.scorers import ServedScorer, ServedScorers

# Number of most recent inputs in the share of flagged ones.
_RECENT = 1000
# Probability that a stream without drift ever raises the alarm.
_FALSE_ALARM = 0.01
_LATENCIES = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_QUANTILES = (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99)
_SCORES = "featnorm_score", "Scores of inputs; the buckets end at quantiles of the scorer's calibration set."


class ScoredInputs:
    """Statistics of the inputs of one scorer that start over when its file is loaded again.

    Parameters
    ----------
    name : str
        Name of the scorer.
    calibration : Tensor
        Scores of the calibration set, (n,). The buckets of the scores end at their quantiles.

    Attributes
    ----------
    drift : DriftMonitor or None
        Monitor of all scores, in the order in which their requests were completed. None if the calibration scores
        are the fixed ones of a `featnorm.Jackknife`, which new scores cannot be compared with, or depend on each
        other, as those of the frames of a clip do.
    """

    def __init__(self, name: str, calibration: Tensor, *, exchangeable: bool = True) -> None:
        comparable = exchangeable and not are_ranks(calibration.cpu().numpy())
        self.drift = DriftMonitor(calibration, _FALSE_ALARM) if comparable else None
        self._lock = threading.Lock()  # an application may run in several event loops
        self._recent: deque[bool] = deque(maxlen=_RECENT)
        self._bounds = score_buckets(calibration)
        self._histogram = Histogram(*_SCORES, ["scorer"], buckets=self._bounds, registry=None)
        self._scores = self._histogram.labels(name)

    def add(self, score: float, flagged: bool) -> None:
        """Count an input."""
        self._recent.append(flagged)
        if self.drift is not None:
            with self._lock:
                self.drift.update([score])
        if math.isinf(score):  # the same bucket, and a finite sum
            score = math.nextafter(self._bounds[-1], math.inf) if score > 0 else self._bounds[0]
        self._scores.observe(score)

    @property
    def scores(self) -> Metric:
        """Histogram of the scores."""
        (metric,) = self._histogram.collect()
        return metric

    @property
    def flagged_share(self) -> float:
        """Share of the most recent inputs that were flagged as OOD; NaN if there is none."""
        return sum(self._recent) / len(self._recent) if self._recent else math.nan


class Metrics(Collector):
    """The metrics of one service, in a registry of its own.

    Parameters
    ----------
    scorers : ServedScorers
        The scorers of the service.
    pending : callable
        Returns the number of inputs in the queue by name of the scorer.
    batch_size : int
        Maximum number of inputs per batch.
    """

    def __init__(self, scorers: "ServedScorers", pending: Callable[[], Counts[str]], batch_size: int) -> None:
        self._scorers = scorers
        self._pending = pending
        self._registry = registry = CollectorRegistry()
        self._seconds = Histogram(
            "featnorm_request_seconds",
            "Seconds from a request to its response; the scorer is empty for requests to none.",
            ["scorer", "route", "status"],
            buckets=_LATENCIES,
            registry=registry,
        )
        self._inputs = Counter(
            "featnorm_inputs", "Inputs by their verdict.", ["scorer", "verdict"], registry=registry
        )
        sizes = [2**i for i in range(math.ceil(math.log2(batch_size)))] + [batch_size]
        self._batches = Histogram(
            "featnorm_batch_inputs", "Inputs per batch of the model.", ["scorer"], buckets=sizes, registry=registry
        )
        for name in scorers:  # from the start, so that their rates can be computed
            self._batches.labels(name)
            for verdict in ("ID", "OOD", "unreadable"):
                self._inputs.labels(name, verdict)
        registry.register(self)

    def request(self, scorer: str, route: str, status: int, seconds: float) -> None:
        """Count a request."""
        self._seconds.labels(scorer, route, str(status)).observe(seconds)

    def batch(self, scorer: str, size: int) -> None:
        """Count a batch."""
        self._batches.labels(scorer).observe(size)

    def verdict(self, scorer: "ServedScorer", verdict: ItemVerdict) -> None:
        """Count an input by its verdict."""
        word = {True: "ID", False: "OOD", None: "unreadable"}[verdict.is_id]
        self._inputs.labels(scorer.name, word).inc()
        if verdict.score is not None:
            scorer.seen.add(verdict.score, verdict.is_id is False)

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics that are computed when they are requested."""
        scores = Metric(*_SCORES, "histogram")
        share = GaugeMetricFamily(
            "featnorm_flagged_share",
            f"Share of the last {_RECENT} scored inputs that were flagged as OOD.",
            labels=["scorer"],
        )
        queue = GaugeMetricFamily("featnorm_queue_inputs", "Inputs in the queue of the model.", labels=["scorer"])
        reloads = CounterMetricFamily(
            "featnorm_reloads", "Times that a scorer's file was loaded again.", labels=["scorer", "result"]
        )
        evidence = GaugeMetricFamily(
            "featnorm_drift_log10_evidence",
            "Evidence that the scored inputs have drifted from the calibration set; 0 at the start.",
            labels=["scorer"],
        )
        alarm = GaugeMetricFamily(
            "featnorm_drift_alarm",
            f"1 once the evidence has reached {-math.log10(_FALSE_ALARM):g}, otherwise 0. If nothing drifts, the "
            f"chance of that is at most {_FALSE_ALARM:g}.",
            labels=["scorer"],
        )
        pending = self._pending()
        for name, scorer in self._scorers.items():
            scores.samples += scorer.seen.scores.samples
            share.add_metric([name], scorer.seen.flagged_share)
            queue.add_metric([name], pending[name])
            if (drift := scorer.seen.drift) is not None:
                evidence.add_metric([name], drift.log10_evidence)
                alarm.add_metric([name], drift.alarmed_at is not None)
            for result in ("loaded", "failed"):
                reloads.add_metric([name, result], self._scorers.reloads[name, result])
        yield from (scores, share, queue, evidence, alarm, reloads)

    def text(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self._registry)


def score_buckets(calibration: Tensor) -> list[float]:
    """Return the upper ends of the buckets: quantiles of scores (n,), finite and strictly increasing."""
    finite = calibration[torch.isfinite(calibration)].cpu().numpy()
    if not len(finite):
        return [0.0]
    return np.unique(np.quantile(finite, _QUANTILES, method="lower")).tolist()
