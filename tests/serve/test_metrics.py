"""The drift of the scored images, in the metrics and on the page; the other metrics are in test_service.py."""

import threading
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient
from torch import nn

import featnorm as fn
from featnorm import DriftMonitor
from featnorm.serve import create_app
from featnorm.serve.metrics import Metrics, ScoredInputs
from featnorm.verdict import ItemVerdict, unreadable
from image_files import encoded

CALIBRATION = torch.from_numpy(np.random.default_rng(0).normal(2, 1, 600))


class Scorers(dict):
    """One scorer as the metrics see it."""

    def __init__(self):
        self.seen = ScoredInputs("d", CALIBRATION)
        self.reloads = Counter()
        super().__init__(d=SimpleNamespace(name="d", seen=self.seen))


def drift(text):
    return {
        sample.name: sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name.startswith("featnorm_drift")
    }


def verdict(score):
    return ItemVerdict("a.png", score, 0.5, True, None, None)


def test_metrics_have_the_evidence_and_the_alarm():
    scorers, monitor = Scorers(), DriftMonitor(CALIBRATION)
    metrics = Metrics(scorers, Counter, 8)
    assert drift(metrics.text().decode()) == {"featnorm_drift_log10_evidence": 0, "featnorm_drift_alarm": 0}
    for score in [*np.random.default_rng(1).normal(2, 1, 50).tolist(), float("inf"), float("-inf")]:
        metrics.verdict(scorers["d"], verdict(score))
        metrics.verdict(scorers["d"], unreadable("b.png", "not an image"))
        monitor.update([score])
    found = drift(metrics.text().decode())
    assert found == {"featnorm_drift_log10_evidence": monitor.log10_evidence, "featnorm_drift_alarm": 0}
    for score in np.random.default_rng(2).normal(0, 1, 50).tolist():
        metrics.verdict(scorers["d"], verdict(score))
        monitor.update([score])
    assert monitor.alarmed_at is not None
    found = drift(metrics.text().decode())
    assert found == {"featnorm_drift_log10_evidence": monitor.log10_evidence, "featnorm_drift_alarm": 1}


def test_threads_lose_no_score():
    scorers = Scorers()
    metrics = Metrics(scorers, Counter, 8)

    def work():
        for score in np.random.default_rng(1).normal(2, 1, 300).tolist():
            metrics.verdict(scorers["d"], verdict(score))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert scorers.seen.drift.count == 1200
    assert sum(scorers.seen.drift.state()["seen"].values()) == 600 + 1200


def test_no_drift_is_watched_from_scores_that_depend_on_each_other(app):
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 12), nn.ReLU())
    scorer = fn.Scorer(model, fn.NAN(), preprocess=lambda image: torch.full((3, 2, 2), image.width / 8))
    frames = [torch.rand(60, 3, 2, 2)]
    scorer.calibrate(frames, units=[f"clip {i // 3}" for i in range(60)], progress=False)
    with TestClient(create_app(scorer), base_url="http://localhost", client=("127.0.0.1", 1)) as client:
        assert client.get("/v1/detector").json()["drift"] is None


def test_no_drift_is_watched_from_a_jackknife(app):
    detector = fn.Jackknife(fn.KNN(k=1)).fit(fn.Features(pooled=torch.rand(30, 12)))
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 12), nn.ReLU())
    scorer = fn.Scorer(model, detector, preprocess=lambda image: torch.full((3, 2, 2), image.width / 8))
    with TestClient(
        create_app(scorer.use_scores(detector.calibration_scores)),
        base_url="http://localhost",
        client=("127.0.0.1", 1),
    ) as client:
        response = client.post("/v1/score", content=encoded(200), headers={"content-type": "image/png"})
        (result,) = response.json()["results"]
        assert result["p_value"] == min(1, (2 * int(result["score"]) + 1) / 20)
        found = client.get("/v1/detector").json()
        assert found["drift"] is None
        assert sum(found["calibration"]["counts"]) == found["calibration"]["edges"][-1] == 19
        metrics = client.get("/metrics").text
        assert drift(metrics) == {}
        assert 'featnorm_score_count{scorer="default"} 1.0' in metrics


@pytest.fixture(scope="module")
def app():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))
    scorer = fn.Scorer(model, fn.NAN(), preprocess=lambda image: torch.full((3, 2, 2), image.width / 8))
    return create_app(scorer.calibrate([torch.rand(400, 3, 2, 2)]))


def test_the_service_tells_of_its_drift(app):
    with TestClient(app, base_url="http://localhost", client=("127.0.0.1", 1)) as client:
        empty = client.get("/v1/detector").json()["drift"]
        assert empty == {"inputs": 0, "log10_evidence": 0, "highest": 0, "alarm_level": 2, "alarmed_at": None}
        for _ in range(40):
            response = client.post("/v1/score", content=encoded(200), headers={"content-type": "image/png"})
            assert response.status_code == 200
        found = client.get("/v1/detector").json()["drift"]
        assert found["inputs"] == 40
        assert found["highest"] >= 2
        assert 1 < found["alarmed_at"] <= 40
        metrics = drift(client.get("/metrics").text)
        assert metrics == {"featnorm_drift_log10_evidence": found["log10_evidence"], "featnorm_drift_alarm": 1}
