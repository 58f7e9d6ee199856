"""Metrics of a service for Prometheus."""

import math
import threading
from collections import deque
from collections.abc import Callable

import numpy as np
import torch
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from torch import Tensor

from featnorm._utils.ranks import are_ranks
from featnorm.drift import DriftMonitor
from featnorm.verdict import ItemVerdict

# Number of most recent images in the share of flagged ones.
_RECENT = 1000
_LATENCIES = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_QUANTILES = (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99)


class Metrics:
    """The metrics of one service, in a registry of its own.

    Parameters
    ----------
    calibration : Tensor
        Scores of the calibration set, (n,). The buckets of the scores end at their quantiles.
    batch_size : int
        Maximum number of images per batch.

    Attributes
    ----------
    drift : DriftMonitor or None
        Monitor of all scores, in the order in which their requests were completed. None if the calibration scores
        are the fixed ones of a `featnorm.Jackknife`, which new scores cannot be compared with.
    """

    def __init__(self, calibration: Tensor, batch_size: int) -> None:
        self._registry = registry = CollectorRegistry()
        self._recent: deque[bool] = deque(maxlen=_RECENT)
        self.drift = None if are_ranks(calibration.cpu().numpy()) else DriftMonitor(calibration)
        self._lock = threading.Lock()  # an application may run in several event loops
        self._bounds = score_buckets(calibration)
        self._seconds = Histogram(
            "featnorm_request_seconds",
            "Seconds from a request to its response.",
            ["route", "status"],
            buckets=_LATENCIES,
            registry=registry,
        )
        self._images = Counter("featnorm_images", "Images by their verdict.", ["verdict"], registry=registry)
        for verdict in ("ID", "OOD", "unreadable"):
            self._images.labels(verdict)  # from the start, so that their rates can be computed
        self._scores = Histogram(
            "featnorm_score",
            "Scores of images; the buckets end at quantiles of the calibration set.",
            buckets=self._bounds,
            registry=registry,
        )
        sizes = [2**i for i in range(math.ceil(math.log2(batch_size)))] + [batch_size]
        self._batches = Histogram(
            "featnorm_batch_images", "Images per batch of the model.", buckets=sizes, registry=registry
        )
        self._queue = Gauge("featnorm_queue_images", "Images in the queue of the model.", registry=registry)
        share = Gauge(
            "featnorm_flagged_share",
            f"Share of the last {_RECENT} scored images that were flagged as OOD.",
            registry=registry,
        )
        share.set_function(lambda: sum(self._recent) / len(self._recent) if self._recent else math.nan)

        if self.drift is not None:
            self._watch(self.drift)

    def _watch(self, drift: DriftMonitor) -> None:
        """Add the metrics of drift."""
        evidence = Gauge(
            "featnorm_drift_log10_evidence",
            "Evidence that the scored images have drifted from the calibration set; 0 at the start.",
            registry=self._registry,
        )
        evidence.set_function(lambda: drift.log10_evidence)
        alarm = Gauge(
            "featnorm_drift_alarm",
            f"1 once the evidence has reached {drift.alarm_level:g}, otherwise 0. If nothing drifts, the "
            f"chance of that is at most {drift.false_alarm:g}.",
            registry=self._registry,
        )
        alarm.set_function(lambda: drift.alarmed_at is not None)

    def set_queue(self, pending: Callable[[], int]) -> None:
        """Set the function that returns the number of images in the queue."""
        self._queue.set_function(pending)

    def request(self, route: str, status: int, seconds: float) -> None:
        """Count a request."""
        self._seconds.labels(route, str(status)).observe(seconds)

    def batch(self, size: int) -> None:
        """Count a batch."""
        self._batches.observe(size)

    def image(self, verdict: ItemVerdict) -> None:
        """Count an image with its verdict."""
        if verdict.score is None:
            self._images.labels("unreadable").inc()
            return
        flagged = verdict.is_id is False
        self._images.labels("OOD" if flagged else "ID").inc()
        self._recent.append(flagged)
        score = verdict.score
        if self.drift is not None:
            with self._lock:
                self.drift.update([score])
        if math.isinf(score):  # the same bucket, and a finite sum
            score = math.nextafter(self._bounds[-1], math.inf) if score > 0 else self._bounds[0]
        self._scores.observe(score)

    def text(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self._registry)


def score_buckets(calibration: Tensor) -> list[float]:
    """Return the upper ends of the buckets: quantiles of scores (n,), finite and strictly increasing."""
    finite = calibration[torch.isfinite(calibration)].cpu().numpy()
    if not len(finite):
        return [0.0]
    return np.unique(np.quantile(finite, _QUANTILES, method="lower")).tolist()
