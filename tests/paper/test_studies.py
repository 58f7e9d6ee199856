"""What heads are worth and what moves them, on fabricated images and small networks."""

import json
from dataclasses import replace

import pytest

from featnorm.models import create_model
from featnorm.paper.images import CLASSES
from featnorm.paper.studies import head_study, own_images
from featnorm.paper.study import studies
from small import reproduce, write_images


@pytest.fixture
def own_root(root, tmp_path):
    for split, count, seed in (("train", 30, 0), ("val", 12, 1)):
        for c in range(8):
            write_images(tmp_path / "tiny_imagenet" / split / f"{c}", count, 10 * seed + c, shift=15 * c)
    write_images(tmp_path / "ood224" / "textures", 20, 100, size=48)
    (tmp_path / "mnist").symlink_to(root / "mnist")
    return tmp_path


def test_own_images(own_root, tmp_path, monkeypatch):
    monkeypatch.setattr(own_images, "ID_CLASSES", 4)
    monkeypatch.setattr(own_images, "TARGET_CLASSES", 3)
    monkeypatch.setattr(own_images, "SEEDS", 2)
    monkeypatch.setattr(own_images, "CLUSTER_SIZES", (10,))
    small = create_model("timm:test_efficientnet", pretrained=False)
    monkeypatch.setattr(own_images, "create_model", lambda _: small)
    monkeypatch.setattr("featnorm.fitting._LEAST_STEPS", 20)
    monkeypatch.setattr("featnorm.fitting.DEFAULT_CACHE", tmp_path / "cache")
    out = tmp_path / "out"
    assert reproduce("own-images", own_root, out).exit_code == 0
    result = json.loads((out / "laptop" / "own-images.json").read_text())
    assert result["sizes"] == {
        "learned from": 96, "calibrated on": 24, "known": 48, "other classes": 48, "textures": 20, "digits": 10,
    }  # fmt: skip
    assert {name: len(runs) for name, runs in result["heads"].items()} == {
        "no head": 1,
        "labels": 2,
        "clusters": 2,
    }
    assert set(result["heads"]["labels"][0]["scores"]["NAN()"]) == {"other classes", "textures", "digits"}
    assert "EmbeddingMagnitude()" in result["heads"]["no head"][0]["left_out"]
    assert {"labels", "clusters of 10 images", "instances, 5 views each", "one class"} <= set(result["targets"])
    # The pooled feature is the backbone's, whatever head is on it.
    ssd = [runs[0]["scores"]["SSD()"] for runs in result["heads"].values()]
    assert ssd[0] == ssd[1] == ssd[2]
    assert (out / "laptop" / "own-images.md").read_text().count("| Detector |") == 3


def test_views_are_parts_of_the_image():
    from PIL import Image

    image = Image.new("RGB", (10, 20))
    image.putpixel((9, 0), (255, 0, 0))
    seen = [own_images._Viewed(lambda part: part, view)(image) for view in own_images._VIEWS]
    assert [part.size for part in seen] == [(10, 20), (8, 16), (8, 16), (8, 16)]
    assert seen[0].getpixel((0, 0)) == (255, 0, 0)


def test_head_study(root, tmp_path, monkeypatch):
    settings = {name: head_study.SETTINGS[name] for name in ("T = 0.5", "width 64")}
    short = {name: (t, d, replace(recipe, epochs=2, batch_size=32)) for name, (t, d, recipe) in settings.items()}
    monkeypatch.setattr(head_study, "SETTINGS", short)
    assert reproduce("head-study", root, tmp_path).exit_code == 0
    result = json.loads((tmp_path / "laptop" / "head-study.json").read_text())
    assert [row["setting"] for row in result["rows"]] == ["T = 0.5", "width 64"]
    first, second = (row["scores"] for row in result["rows"])
    assert first["KNN()"] == second["KNN()"]
    assert first["NAN()"] != second["NAN()"]
    assert "| width 64 |" in (tmp_path / "laptop" / "head-study.md").read_text()


def test_explanation(root, tmp_path):
    assert reproduce("explanation", root, tmp_path).exit_code == 0
    result = json.loads((tmp_path / "laptop" / "explanation.json").read_text())
    assert [row["set"] for row in result["rows"]] == ["cifar10", "SVHN", "large", "noise"]
    for row in result["rows"]:
        off = [value <= 0 for value in row["picture"]["activation"]]
        usual = [rate >= 0.5 for rate in row["picture"]["on_rate"]]
        assert row["active"] == 512 - sum(off)
        assert row["usual"] == sum(usual)
        assert row["missing"] == sum(a and b for a, b in zip(off, usual, strict=True))
        assert row["predicted"] in CLASSES
    drawn = studies()["explanation"].pictures(result)
    assert list(drawn) == [f"explanation-{name}" for name in ("cifar10", "SVHN", "large", "noise")]
    assert all(text.count("<svg") == 1 for text in drawn.values())
