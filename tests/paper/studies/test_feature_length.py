"""Lengths and directions of the features of fabricated images."""

import json

import pytest

from featnorm.paper.study import studies
from reproduction import reproduce


def test_feature_length(root, tmp_path, monkeypatch):
    # There are fewer images than half the width.
    monkeypatch.setattr("featnorm.detectors.subspace.principal_dimension", lambda width: 8)
    assert reproduce("feature-length", root, tmp_path).exit_code == 0
    result = json.loads((tmp_path / "laptop" / "feature-length.json").read_text())
    assert [sorted(row["auroc"]) for row in result["rows"]] == [["Mahalanobis", "Residual", "ViM"]] * 3 + [
        ["Mahalanobis"]
    ]
    for row in result["rows"]:
        for sets in row["auroc"].values():
            assert list(sets) == ["SVHN", "large", "noise"]
            assert all(0 <= value <= 100 for value in sets.values())
    assert list(result["features"]) == ["train", "cifar10", "SVHN", "large", "noise"]
    assert all(of["length"] > 0 and 0 <= of["outside"] <= 1 for of in result["features"].values())
    table = studies()["feature-length"].tables(result)["feature-length"]
    assert table.rows[-1][2:] == ["–", "–"]
    mean = sum(result["rows"][0]["auroc"]["Mahalanobis"].values()) / 3
    assert table.rows[0][1].startswith(f"{mean:.1f} (")
    assert mean != pytest.approx(sum(result["rows"][1]["auroc"]["Mahalanobis"].values()) / 3)
