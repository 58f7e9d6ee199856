"""The CIFAR-10 benchmark, on a small data root of fabricated images and networks that fit them."""

import json
import re
import statistics
from dataclasses import replace

import pytest
import torch

from featnorm.__main__ import COMMANDS
from featnorm.cli.app import run_command
from featnorm.inputs import DataError
from featnorm.paper import scoring
from featnorm.paper.heads import FROZEN
from featnorm.paper.images import PAPER_SETS, load_images
from featnorm.paper.numbers import numbers
from featnorm.paper.recipe import PaperRecipe
from featnorm.paper.studies import cifar10
from featnorm.paper.study import studies
from reproduction import assert_resumes_after_training, context, reproduce, write_images

RECIPE = PaperRecipe(epochs=2, batch_size=32, optimizer="sgd", lr=0.05, augment=True, crop=24, warmup=0.2)
TINY = cifar10.Scale(8, RECIPE, replace(FROZEN, epochs=1, batch_size=32), frozen=True, seeds=2)


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(cifar10.SCALES, "laptop", TINY)


def test_every_table_is_made_once_trained(root, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(cifar10, "WIDTHS", (8, 512))
    for table in (name for name, study in studies().items() if isinstance(study, cifar10.Cifar10Study)):
        assert reproduce(table, root, tmp_path).exit_code == 0, table
    out = tmp_path / "laptop"
    networks = {place.name for place in out.iterdir() if place.is_dir()}
    assert networks == {
        "relu-512-2epochs-seed0",
        "relu-512-2epochs-seed1",
        "headless-2epochs-seed0",
        *(f"{name}-frozen-1epochs-seed0" for name in ("relu-512", "leaky_relu-512", "gelu-512", "relu-8")),
    }
    results = json.loads((out / "table3.json").read_text())
    assert [result["seed"] for result in results] == [0, 1]
    assert set(results[0]["scores"]["NAN()"]) == {"SVHN", "noise", "large"}
    assert {repr(detector) for detector in cifar10.detectors()} == set(results[0]["scores"]) | set(
        results[0]["excluded"]
    )
    assert {"ODIN()", "Views(NAN())", "KNN() / NAN()"} <= set(results[0]["scores"])
    document = (out / "table3.md").read_text()
    assert "95.0 / 30.1" in document  # the paper's NAN
    assert "(99.7 / 1.3)" in document  # and on SVHN, which is here
    assert "2 seeds, mean ± standard deviation" in document
    assert "92.43 / 43.02" in (out / "table7.md").read_text()
    assert (out / "figure7.svg").read_text().count("<svg") == 1

    def never(*_args, **_options):
        raise AssertionError("trained again")

    monkeypatch.setattr(scoring, "train", never)
    assert reproduce("table3", root, tmp_path).exit_code == 0
    assert (out / "table3.md").read_text() == document


def test_an_interrupted_run_resumes(root, tiny, tmp_path, monkeypatch):
    folder = tmp_path / "laptop" / "relu-512-2epochs-seed0"
    assert_resumes_after_training("table5", folder, root, monkeypatch)
    assert len((folder / "log.jsonl").read_text().splitlines()) == 2


def test_a_result_of_other_settings_raises(root, tiny, tmp_path, monkeypatch):
    reproduce("table5", root, tmp_path)
    monkeypatch.setitem(cifar10.SCALES, "laptop", replace(TINY, width=16))
    with pytest.raises(ValueError, match="holds a run with other width: choose another folder"):
        reproduce("table5", root, tmp_path)
    file = tmp_path / "laptop" / "relu-512-2epochs-seed0" / "result.json"
    file.write_text(file.read_text().replace('"accuracy": 0', '"accuracy": 1', 1))
    with pytest.raises(ValueError, match=r"result\.json is damaged, or of an earlier version: delete it"):
        reproduce("table5", root, tmp_path)


def test_what_cannot_be_reproduced_is_named(tmp_path, featnorm):
    with pytest.raises(
        ValueError,
        match="unknown name 'table99': choose all, or one of boxes, explanation, feature-length, figure1, figure2",
    ):
        reproduce("table99", tmp_path, tmp_path)
    with pytest.raises(ValueError, match="NAME is missing: `featnorm reproduce --list`"):
        run_command(["reproduce"], COMMANDS)
    with pytest.raises(ValueError, match="table3 has no scale 'workstation': use laptop, gpu, paper"):
        reproduce("table3", tmp_path, tmp_path, "--scale", "workstation")
    status, _, said = featnorm("reproduce", "table3", "--scale", "huge")
    assert status == 2
    assert re.search(r"'huge' is not one of 'laptop', \W*'workstation', \W*'gpu', \W*'paper'", said)


def test_the_pooled_norm_is_of_the_pooled_feature(root):
    import featnorm as fn

    images = load_images(root, progress=False)
    model = cifar10.MAIN.build(8, 0).eval()
    result = scoring.score(model, images, [fn.NAN()], context())
    with torch.no_grad():
        pooled = [model[1](model[0](pixels.float() / 255)) for pixels in (images.test[0], images.ood["noise"])]
        hidden = [torch.relu(model[2].hidden(h)) for h in pooled]
    for part, (id_values, ood_values) in {"pooled": pooled, "scores": hidden}.items():
        ours = fn.auroc(fn.negative_aware_norm(id_values), fn.negative_aware_norm(ood_values))
        assert result[part]["NAN()"]["noise"][0] == pytest.approx(100 * ours, abs=0.05)
    assert result["inactive"]["noise"] == pytest.approx(float((hidden[1] <= 0).float().mean()), abs=1e-3)


def test_images_are_resized_and_the_missing_named(root, tmp_path):
    images = load_images(root, progress=False)
    assert {name: tuple(pixels.shape) for name, pixels in images.ood.items()} == {
        "SVHN": (10, 3, 32, 32),
        "noise": (12, 3, 32, 32),
        "large": (11, 3, 32, 32),
    }
    assert set(images.missing) == {"LSUN-fix", "ImageNet-fix", "CIFAR-100", "Places365"}
    assert images.train[1].tolist() == [c for c in range(10) for _ in range(12)]
    write_images(tmp_path / "cifar10" / "train", 3, 0)
    write_images(tmp_path / "cifar10" / "test", 3, 1)
    write_images(tmp_path / "ood32" / "noise", 3, 1)
    with pytest.raises(DataError, match="has no label below 10"):
        load_images(tmp_path, progress=False)


def test_the_paper_agrees_with_itself():
    tables = numbers("cifar10")
    for name, row in tables["table3"]["rows"].items():
        sets = [pair for key, pair in row.items() if key != "Average"]
        if "Average" in row:
            for i in range(2):
                assert statistics.fmean(pair[i] for pair in sets) == pytest.approx(row["Average"][i], abs=0.11), (
                    name
                )
    ten = tables["table10"]["rows"]["HiddenConfidence()"]
    assert statistics.fmean(ten[name][0] for name in PAPER_SETS) == pytest.approx(ten["Average"][0], abs=0.01)
    known = {repr(detector) for detector in cifar10.detectors()}
    assert set(tables["table3"]["rows"]) <= known
