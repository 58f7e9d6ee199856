"""What detectors are worth on boxes, on fabricated images and a network that has hardly been trained."""

import json

import pytest
import torch

from featnorm.paper.scenes import FOREIGN, SIDE
from featnorm.paper.studies import boxes
from reproduction import reproduce, write_images


@pytest.fixture
def scenes_root(root, tmp_path):
    write_images(tmp_path / "ood224" / "textures", 6, 200, size=128)
    for name in ("mnist", "cifar10"):
        (tmp_path / name).symlink_to(root / name)
    return tmp_path


def test_boxes(scenes_root, tmp_path, monkeypatch):
    scale = boxes.Scale(seeds=2, steps=12, training=30, known=30, foreign=12)
    monkeypatch.setitem(boxes.BoxStudy.scales, "laptop", scale)
    # A network with so little training is sure of nothing.
    monkeypatch.setattr(boxes, "MIN_CONFIDENCE", 0.02)
    monkeypatch.setattr(boxes, "CALIBRATED", (19,))
    monkeypatch.setattr(boxes, "DRAWS", 3)
    out = tmp_path / "out"
    assert reproduce("boxes", scenes_root, out).exit_code == 0
    first, second = json.loads((out / "laptop" / "boxes.json").read_text())
    assert set(first["scores"]["NAN()"]) == {"digits 8 and 9", "photographs"}
    assert first["scores"] != second["scores"]
    assert "EmbeddingMagnitude()" in first["excluded"]
    for result in (first, second):
        assert 0 <= result["accuracy"] <= 1
        assert all(0 < share <= 1 for share in result["found"].values())
        assert all(count["all"] >= count["digits"] + count["foreign"] for count in result["boxes"].values())
        assert result["boxes"]["digits"]["foreign"] == 0
        assert set(result["rates"]) == set(boxes.RATES)
    assert [len(first["pictures"]), "pictures" in second] == [9, False]
    page = (out / "laptop" / "boxes.md").read_text("utf-8")
    assert "| Detector | digits 8 and 9 | photographs | scenes, digits 8 and 9 |" in page
    assert page.count("| NAN() | 19 |") == 1
    assert (out / "laptop" / "boxes.svg").read_text().count("<image ") == 9
    # An interrupted run does not train a network again.
    folder = out / "laptop" / "boxes-seed1"
    (folder / "result.json").unlink()
    monkeypatch.setattr(boxes, "train_detector", lambda *_, **__: pytest.fail("it was trained"))
    assert reproduce("boxes", scenes_root, out).exit_code == 0
    assert json.loads((out / "laptop" / "boxes.json").read_text())[1]["scores"] == second["scores"]


def test_targets_are_the_bounds_of_the_objects_in_each_place():
    truth = torch.zeros(2, SIDE, SIDE, dtype=torch.int64)
    truth[0, 3:10, 5:20] = 4
    truth[0, 40:60, 33:50] = FOREIGN
    first, second = boxes.targets_of(truth)
    assert first["boxes"].tolist() == [[5, 3, 20, 10], [33, 40, 50, 60]]
    assert first["labels"].tolist() == [4, FOREIGN]
    assert second["boxes"].shape == (0, 4)


def test_boxes_of_few_scenes_are_not_so_many_observations(monkeypatch):
    # With images as units the promise holds, and with boxes as if independent it does not: scenes with many boxes
    # outweigh those with one.
    monkeypatch.setattr(boxes, "DRAWS", 200)
    monkeypatch.setattr(boxes, "SIMULATED", 300)
    for entry in boxes._simulated_rates():
        # The mean over the draws has a standard error of 0.0035 at most.
        assert entry["flagged"][0] <= 0.06
        assert entry["scenes"] <= 0.06
        assert entry["independent"][0] > 0.08
