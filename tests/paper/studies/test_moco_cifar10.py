"""A MoCo-v2 network of all classes scored over its training, on fabricated images."""

import json

import pytest
import torch

from featnorm._utils.sealed import read_sealed
from featnorm.detectors import HiddenConfidence
from featnorm.models import cifar_network
from featnorm.paper.images import as_pixels
from featnorm.paper.recipe import PaperRecipe
from featnorm.paper.studies import moco_cifar10
from featnorm.paper.study import studies
from featnorm.tap import FeatureTap
from reproduction import reproduce

RECIPE = PaperRecipe(epochs=2, batch_size=16, optimizer="sgd", lr=0.02, augment=True, objective="moco", queue=32)


def test_the_network_is_scored_on_its_way_and_at_the_end(root, tmp_path, monkeypatch):
    monkeypatch.setitem(moco_cifar10.SCALES, "laptop", moco_cifar10.Scale(4, RECIPE, (0, 2)))
    assert reproduce("moco-cifar10", root, tmp_path).exit_code == 0
    out = tmp_path / "laptop"
    result = read_sealed(out / "moco-cifar10-seed0" / "result.json")
    assert [entry["epoch"] for entry in result["history"]] == [0, 2]
    assert result["history"][0]["loss"] is None
    assert set(result["history"][1]["scores"]) < set(result["scores"])
    # All images were probed, so the last entry and the end are the same measurement.
    last = result["history"][-1]["scores"]["NAN()"]
    for name, sets in result["history"][-1]["scores"].items():
        for ood, measures in sets.items():
            assert measures == pytest.approx(result["scores"][name][ood], abs=1e-6)
    document = (out / "moco-cifar10.md").read_text()
    rows = [line.split(" | ") for line in document.splitlines() if line.startswith("| 2 | ")]
    assert rows[0][2] == f"{sum(auroc for auroc, _ in last.values()) / len(last):.1f}"
    assert "| KNN() / NAN() |" in document
    assert "| Views(NAN()) |" in document
    assert "entropy, cifar10" in document
    assert studies()["moco-cifar10"].pictures(json.loads((out / "moco-cifar10.json").read_text()))


def test_the_unaligned_share_is_what_the_confidence_lacks_of_the_norm():
    network = cifar_network(4, None, seed=0).eval()
    images = torch.randint(0, 256, (30, 3, 32, 32), dtype=torch.uint8)
    found = moco_cifar10.inner_measures(network, {"ours": images})["ours"]
    features = FeatureTap(network)(as_pixels(images))
    a, weight = features.tensor("activation").double(), features.linear()[0]
    on = a > 0
    assert found["norm"] == pytest.approx(float(a.sum(1).mean()))
    assert found["unaligned"] == pytest.approx(float((1 - HiddenConfidence().score(features) / a.sum(1)).mean()))
    signs = weight[:, None] > 0
    lacking = (2 * a * ~signs).sum(2) / a.sum(1)
    assert found["unaligned"] == pytest.approx(float(lacking.amin(0).mean()), rel=1e-5)
    p = on.double().mean(0)
    entropy = -(p * p.log() + (1 - p) * (1 - p).log()).nan_to_num(0.0)
    assert found["entropy"] == pytest.approx(float(entropy.mean()))
