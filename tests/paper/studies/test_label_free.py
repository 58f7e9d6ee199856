"""Table 3 without labels, and Table 11, on fabricated images and networks that fit them."""

import json
import statistics
from dataclasses import replace

import pytest
import torch

from featnorm.paper import scoring
from featnorm.paper.images import load_images
from featnorm.paper.numbers import numbers
from featnorm.paper.studies import label_free
from featnorm.paper.study import studies
from featnorm.paper.systems import GOAD
from reproduction import assert_resumes_after_training, context, reproduce

pytestmark = pytest.mark.slow

TABLES = ("table3-label-free", "table11")
TINY = label_free.Scale(
    4,
    {
        name: replace(recipe, epochs=1, batch_size=32, queue=64, crop=16, crop_share=0.5)
        for name, recipe in label_free.SCALES["laptop"].recipes.items()
    },
    goad=GOAD(width=1, epochs=1, lr=3e-3),
    fit_images=12,
)


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(label_free.SCALES, "laptop", TINY)
    # After so little training it does not recognize rotations.
    monkeypatch.setitem(
        label_free.FRAMEWORKS, "CSI", replace(label_free.FRAMEWORKS["CSI"], build=_csi_that_knows_rotations)
    )


def _csi_that_knows_rotations(width, seed, build=label_free.FRAMEWORKS["CSI"].build):
    model = build(width, seed)
    model[2].rotation.bias.data += 50
    return model


def test_both_tables_are_made_once_trained(root, tiny, tmp_path, monkeypatch):
    for table in TABLES:
        assert reproduce(table, root, tmp_path).exit_code == 0, table
    out = tmp_path / "laptop"
    assert {place.name for place in out.iterdir() if place.is_dir()} == {
        "moco-v2-1epochs-seed0",
        "rotnet-1epochs-seed0",
        "csi-1epochs-seed0",
        "goad-1epochs-seed0",
        "cider-1epochs-seed0",
    }
    results = {result["framework"]: result for result in json.loads((out / "table3-label-free.json").read_text())}
    assert [result.get("accuracy") for result in results.values()] == [None] * 4
    assert [result["fit_images"] for result in results.values()] == [None, None, 12, 12]
    assert all(not result["excluded"] for result in results.values())
    paper = numbers("cifar10")["table3-label-free"]["rows"]
    found = {name for result in results.values() for name in result["scores"]}
    assert set(paper) <= found
    assert set(results["MoCo-v2"]["scores"]["KNN() / Views(NAN())"]) == {"SVHN", "noise", "large"}
    document = (out / "table3-label-free.md").read_text()
    assert "| RotNet() | RotNet |" in document
    auroc, fpr = results["GOAD"]["scores"]["GOAD()"]["SVHN"]
    assert f"| {auroc:.1f} / {fpr:.1f} (96.3 / –) |" in document
    assert "a WideResNet of depth 10 and width 1, 1 epochs of Adam on 72 transformations" in document
    assert "trained on 12 training images" in document
    assert "92.5 / 38.1" in document  # the paper's NAN
    assert "fitted to 12 training images" in document
    cider = json.loads((out / "table11.json").read_text())
    assert cider[0]["scores"].keys() == numbers("cifar10")["table11"]["rows"].keys()
    assert "97.57 / 11.73" in (out / "table11.md").read_text()

    def never(*_args, **_options):
        raise AssertionError("trained again")

    monkeypatch.setattr(scoring, "train", never)
    assert reproduce("table3-label-free", root, tmp_path).exit_code == 0
    assert (out / "table3-label-free.md").read_text() == document


def test_an_interrupted_run_resumes(root, tiny, tmp_path, monkeypatch):
    folder = tmp_path / "laptop" / "cider-1epochs-seed0"
    assert_resumes_after_training("table11", folder, root, monkeypatch)
    monkeypatch.setitem(label_free.SCALES, "laptop", replace(TINY, width=8))
    with pytest.raises(ValueError, match="holds a run with other width: choose another folder"):
        reproduce("table11", root, tmp_path)


def test_the_paper_agrees_with_itself():
    for table in TABLES:
        for name, row in numbers("cifar10")[table]["rows"].items():
            sets = [pair for key, pair in row.items() if key != "Average"]
            for i in range(2) if "Average" in row else ():
                mean = statistics.fmean(pair[i] for pair in sets)
                assert mean == pytest.approx(row["Average"][i], abs=0.11), name


def test_the_papers_settings():
    paper = label_free.SCALES["paper"]
    moco = paper.recipes["MoCo-v2"]
    assert (moco.epochs, moco.batch_size, moco.lr, moco.queue, moco.ema) == (800, 512, 0.06, 4096, 0.99)
    assert (moco.temperature, moco.weight_decay, moco.optimizer) == (0.1, 5e-4, "sgd")
    for table in TABLES:
        assert all(getattr(job.recipe, "crop", None) is None for job in studies()[table].jobs(paper, None))
    assert paper.goad == GOAD()
    assert paper.fit_images is None


@pytest.mark.parametrize("same", [True, False])
def test_the_model_runs_in_the_precision_of_its_training(root, same):

    images = load_images(root, progress=False)
    framework = label_free.FRAMEWORKS["RotNet"]
    model = framework.build(4, 0)
    kinds = []
    model[1].stem[0].register_forward_hook(lambda _, __, output: kinds.append(output.dtype))
    mixed = context("bf16-mixed")
    result = scoring.score(model, images, framework.detectors(), mixed, labels=False, same_precision=same)
    assert set(kinds) == {torch.bfloat16 if same else torch.float32}
    assert result["accuracy"] is None
    assert set(result["scores"]) == {"RotNet()"}
