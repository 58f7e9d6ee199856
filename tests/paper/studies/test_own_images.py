"""What heads are worth on images of one's own, on fabricated images and a small network."""

import json

import pytest

from featnorm.models import create_model
from featnorm.paper.studies import own_images
from reproduction import reproduce, write_images


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
    monkeypatch.setattr("featnorm.fitting._MIN_STEPS", 20)
    monkeypatch.setattr("featnorm.fitting.DEFAULT_CACHE", tmp_path / "cache")
    out = tmp_path / "out"
    for study in ("own-images", "head-targets"):
        assert reproduce(study, own_root, out).exit_code == 0
    result, targets = (
        json.loads((out / "laptop" / f"{study}.json").read_text()) for study in ("own-images", "head-targets")
    )
    assert result["sizes"] == {
        "training": 96, "held out": 24, "ID test": 48, "other classes": 48, "textures": 20, "digits": 10,
    }  # fmt: skip
    assert {name: len(runs) for name, runs in result["heads"].items()} == {
        "no head": 1,
        "labels": 2,
        "clusters": 2,
    }
    assert set(result["heads"]["labels"][0]["scores"]["NAN()"]) == {"other classes", "textures", "digits"}
    assert "EmbeddingMagnitude()" in result["heads"]["no head"][0]["excluded"]
    matching = {name: "SHE()" in runs[0]["scores"] for name, runs in result["heads"].items()}
    assert matching == {"no head": False, "labels": True, "clusters": False}
    assert all(len(shares) == 2 for shares in result["flagged"].values())
    assert {"labels", "clusters of 10 images", "instances, 5 views each", "one class"} <= set(targets["targets"])
    assert targets["sizes"] == {"training": 72, "ID test": 18, "held-out classes": 6}
    assert "| Targets |" in (out / "laptop" / "head-targets.md").read_text()
    # The pooled feature is the backbone's, whatever head is on it.
    ssd = [runs[0]["scores"]["SSD()"] for runs in result["heads"].values()]
    assert ssd[0] == ssd[1] == ssd[2]
    assert (out / "laptop" / "own-images.md").read_text().count("| Detector |") == 3


def test_views_are_parts_of_the_image():
    from PIL import Image

    image = Image.new("RGB", (10, 20))
    image.putpixel((9, 0), (255, 0, 0))
    seen = [own_images._View(lambda part: part, *view)(image) for view in own_images._VIEWS]
    assert [part.size for part in seen] == [(10, 20), (8, 16), (8, 16), (8, 16)]
    assert seen[0].getpixel((0, 0)) == (255, 0, 0)
