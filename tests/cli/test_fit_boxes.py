"""A detector of objects, from a folder of images through every command."""

import csv
import json
import sys

import numpy as np
import pytest
from PIL import Image

import featnorm as fn
from detection import tiny_detector

MODEL = ("--model", "boxes_model:make")
# Images whose boxes are few, or none at all, since the detector is hardly sure of any.
MIN_CONFIDENCE = 0.6


def make():
    from torchvision.transforms.functional import pil_to_tensor

    return tiny_detector(box_score_thresh=MIN_CONFIDENCE), lambda image: pil_to_tensor(image) / 255


def write(folder, count, seed):
    rng = np.random.default_rng(seed)
    folder.mkdir()
    for i in range(count):
        shape = ((40, 60), (64, 64), (50, 30))[i % 3]
        pixels = rng.integers(0, 255, (*shape, 3)) * rng.uniform(0.1, 1)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i:03}.png")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images, and a scorer that was fitted to them."""
    pytest.importorskip("torchvision")
    root = tmp_path_factory.mktemp("boxes")
    write(root / "photos", 130, 0)
    write(root / "new", 9, 1)
    (root / "new" / "broken.png").write_bytes(b"no image")
    module = type(sys)("boxes_model")
    module.make = make
    sys.modules["boxes_model"] = module
    scorer = fn.fit(root / "photos", "boxes_model:make", detector="KNN(k=1)", per="box", cache=root / "cache")
    scorer.save(root / "d.featnorm", weights=True)
    yield root
    del sys.modules["boxes_model"]


def test_a_fit_says_what_is_promised(folder, featnorm):
    arguments = ["fit", folder / "photos", *MODEL, "--per", "box", "-o", "d.featnorm", "--cache", folder / "cache"]
    status, said, error = featnorm(*arguments)
    assert (status, error) == (0, "")
    assert "Head: the model's own classifier, 4 logits" in said
    assert "KLUniform() is calibrated on" in said
    assert "It flags at most 5.0 % of the boxes of such images, averaged over" in said
    status, _, error = featnorm("fit", folder / "photos", *MODEL, "--per", "box", "--head", "train")
    assert (status, error.count("verdicts per box need the model's own classifier")) == (2, 1)


def test_the_verdicts_on_boxes_in_a_table_and_in_pictures(folder, featnorm, tmp_path):
    score = ["score", folder / "d.featnorm", folder / "new", *MODEL]
    for name in ("v.csv", "v.jsonl", "v.parquet"):
        status, said, error = featnorm(*score, "-o", name, *(["--maps", "pictures"] if name == "v.csv" else []))
        assert status == 0, error
    with (tmp_path / "v.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    scorer = fn.load(folder / "d.featnorm", "boxes_model:make")
    paths = sorted((folder / "new").glob("*.png"))
    verdicts = scorer.predict(paths)
    assert [verdict.item for verdict in verdicts for _ in verdict.boxes or (None,)] == [
        row["path"] for row in rows
    ]
    assert {len(verdict.boxes) for verdict in verdicts if verdict.boxes is not None} >= {0, 6}
    for verdict in verdicts:
        of_image = [row for row in rows if row["path"] == verdict.item]
        if verdict.boxes is None:
            assert of_image[0]["error"]
            assert [row["score"] + row["x1"] + row["image_verdict"] for row in of_image] == [""]
            continue
        assert {row["image_verdict"] for row in of_image} == {"ID" if verdict.is_id else "OOD"}
        if not verdict.boxes:
            assert [row["score"] + row["x1"] + row["verdict"] + row["predicted"] for row in of_image] == [""]
            assert float(of_image[0]["image_p_value"]) == 1
            assert verdict.flagged_share == 0
        for row, box in zip(of_image, verdict.boxes, strict=False):
            assert [float(row[name]) for name in ("x1", "y1", "x2", "y2")] == pytest.approx(box.corners, abs=1e-3)
            assert float(row["score"]) == pytest.approx(box.score, rel=1e-4)
            assert float(row["confidence"]) == pytest.approx(box.confidence)
            assert float(row["p_value"]) == pytest.approx(box.p_value, abs=0.02)
            assert row["predicted"] == box.label
            assert row["verdict"] == ("ID" if box.is_id else "OOD")
    lines = [json.loads(line) for line in (tmp_path / "v.jsonl").read_text().splitlines()]
    assert [line["x1"] for line in lines] == [float(row["x1"]) if row["x1"] else None for row in rows]
    pictures = sorted((tmp_path / "pictures").iterdir())
    assert [picture.name for picture in pictures][:1] == ["000000-000.png"]
    assert len(pictures) == 9
    assert max(Image.open(pictures[0]).size) == 640
    status, said, _ = featnorm(*score)
    assert status == 0
    assert said.count("box ") == sum(len(verdict.boxes or ()) for verdict in verdicts)


def test_an_interrupted_run_resumes_with_its_boxes(folder, featnorm, tmp_path, monkeypatch):
    score = ["score", folder / "d.featnorm", folder / "new", *MODEL, "--batch-size", 4]
    assert featnorm(*score, "-o", "whole.csv")[0] == 0
    from featnorm import records

    with monkeypatch.context() as patch:
        patch.setattr(records.Journal, "write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        featnorm(*score, "-o", "v.csv")
    assert (tmp_path / ".v.csv.part").exists()
    assert "resuming after 10 of 10 images" in featnorm(*score, "-o", "v.csv")[1]
    assert (tmp_path / "v.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()


def test_the_other_commands(folder, featnorm, tmp_path):
    file = folder / "d.featnorm"
    status, said, error = featnorm("calibrate", file, folder / "photos", "-o", "c.featnorm", "--tpr", 0.9, *MODEL)
    assert status == 0, error
    assert "it flags at most 10.0 % of in-distribution images" in said
    assert fn.load(tmp_path / "c.featnorm", "boxes_model:make").calibration.tpr == 0.9
    status, _, error = featnorm("score", file, folder / "new", *MODEL, "--html", "page.html")
    assert status == 0, error
    assert "data:image" in (tmp_path / "page.html").read_text("utf-8")
    data = ["--id", folder / "photos", "--ood", folder / "new"]
    status, said, error = featnorm("evaluate", file, *data, *MODEL, "--out", "evaluation")
    assert status == 0, error
    assert "KNN(k=1)" in said
    options = ["--per", "box", "--detector", "MSP()"]
    status, said, error = featnorm("evaluate", *data, *MODEL, *options, "--out", "evaluation")
    assert status == 0, error
    assert "MSP()" in said
    assert featnorm("inspect", file)[0] == 0
    assert featnorm("score", file, folder / "new", *MODEL, "-o", "v.csv")[0] == 0
    status, _, error = featnorm("monitor", file, "v.csv")
    assert status == 2
    assert "is calibrated on parts of images or clips, which depend on each other" in error
    status, _, error = featnorm("export", file, *MODEL)
    assert (status, error.count("a graph does not score yet")) == (2, 1)


def test_the_service_returns_boxes(folder):
    testclient = pytest.importorskip("fastapi.testclient")
    from featnorm.serve import create_app

    scorer = fn.load(folder / "d.featnorm", "boxes_model:make")
    paths = sorted((folder / "new").glob("0*.png"))
    expected = scorer.predict(paths)
    with testclient.TestClient(create_app(scorer), "http://localhost") as client:
        files = [("files", (path.name, path.read_bytes(), "image/png")) for path in paths]
        results = client.post("/v1/score", files=files).json()["results"]
    for result, verdict in zip(results, expected, strict=True):
        assert result["verdict"] == ("ID" if verdict.is_id else "OOD")
        assert result["flagged_share"] == verdict.flagged_share
        assert [box["label"] for box in result["boxes"]] == [box.label for box in verdict.boxes]
        assert [box["verdict"] for box in result["boxes"]] == [
            "ID" if box.is_id else "OOD" for box in verdict.boxes
        ]
        if not verdict.boxes:
            assert (result["score"], result["p_value"], result["boxes"]) == (None, 1, [])
