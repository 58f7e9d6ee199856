"""Detectors at the positions of maps, on fabricated textures, digits and photographs."""

import json
from dataclasses import replace

import pytest
import torch

from featnorm.paper.scenes import DIGITS, FOREIGN, FOREIGN_OBJECTS, load_objects
from featnorm.paper.studies import maps
from reproduction import context, reproduce, write_images


@pytest.fixture(scope="module")
def maps_root(root, tmp_path_factory):
    folder = tmp_path_factory.mktemp("maps")
    write_images(folder / "ood224" / "textures", 12, 100, size=48)
    for name in ("mnist", "cifar10"):
        (folder / name).symlink_to(root / name)
    return folder


def test_positions_scenes_and_rates(maps_root, tmp_path, monkeypatch):
    tiny = maps.Scale(seeds=2, training=12, fit=8, known=24, foreign=4)
    monkeypatch.setitem(maps.MapStudy.scales, "laptop", tiny)
    monkeypatch.setattr(maps, "RECIPE", replace(maps.RECIPE, epochs=1, batch_size=4))
    monkeypatch.setattr(maps, "CALIBRATED", (19, 20))
    monkeypatch.setattr(maps, "DRAWS", 3)
    out = tmp_path / "out"
    assert reproduce("maps", maps_root, out).exit_code == 0
    results = json.loads((out / "laptop" / "maps.json").read_text())
    assert [result["draw"]["seed"] for result in results] == [0, 1]
    result = results[0]
    kinds = list(FOREIGN_OBJECTS.values())
    assert set(result["positions"]["NAN()"]) == set(result["scene_auroc"]["NAN()"]) == set(kinds)
    assert not result["excluded"]
    assert len(result["positions"]) == len(maps.DETECTORS.split())
    assert [entry["calibrated"] for entry in result["rates"]["NAN()"]] == [19, 20]
    assert ("pictures" in result, "pictures" in results[1]) == (True, False)
    assert [picture["kind"] for picture in result["pictures"]] == [kind for kind in kinds for _ in range(2)]
    page = (out / "laptop" / "maps.md").read_text("utf-8")
    assert page.count("| Detector |") == 3
    assert (out / "laptop" / "maps.svg").read_text("utf-8").count("<image ") == 4


def test_scenes_have_the_truth_of_every_pixel(maps_root):
    training, others = load_objects(context(root=maps_root))
    assert len(training.textures) == 8
    assert len(others.textures) == 4
    scenes = training.draw(20, seed=3)
    assert scenes.pixels.shape == (20, 3, 64, 64)
    assert scenes.truth.max() <= DIGITS
    assert (scenes.truth > 0).any()
    assert torch.equal(training.draw(20, seed=3).pixels, scenes.pixels)
    for foreign in ("digits", "photos"):
        strange = others.draw(20, 3, foreign).truth == FOREIGN
        assert strange.flatten(1).any(1).all(), "every scene has a foreign object"
        # It lies in one quarter.
        quarters = strange.unfold(1, 32, 32).unfold(2, 32, 32).flatten(3).any(3).sum((1, 2))
        assert (quarters == 1).all()
