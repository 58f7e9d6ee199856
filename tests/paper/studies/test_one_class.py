"""Table 4, on fabricated images, by models that are quickly trained."""

import json
from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn

import featnorm as fn
from featnorm.paper.numbers import numbers
from featnorm.paper.studies import one_class
from featnorm.paper.study import studies
from featnorm.paper.systems import SVM, DeepSVDD, OneClassModel
from featnorm.paper.systems.frameworks import moco_detectors
from reproduction import reproduce, write_images


@dataclass(frozen=True)
class Brightness(OneClassModel[nn.Linear]):
    """How close the mean of an image is to that of the class, and the mean itself."""

    offset: float = 0.0

    def _train(self, images, context):
        model = nn.Linear(1, 1)
        nn.init.constant_(model.bias, float(images.float().mean()) + self.offset)
        return model

    def _scores(self, model, images, runtime):
        mean = images.float().mean((1, 2, 3))
        return {"NAN": -(mean - model.bias.detach()).abs(), "brightness": mean}


TINY = one_class.Scale(
    {
        "mean": Brightness(),
        "Deep-SVDD": DeepSVDD(width=16, autoencoder_epochs=1, autoencoder_drop=1, epochs=1, drop=1, batch_size=5),
    },
    train_images=10,
    test_images=3,
)


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(one_class.SCALES, "laptop", TINY)


def test_table4_is_made_class_by_class(root, tiny, tmp_path, monkeypatch):
    assert reproduce("table4", root, tmp_path).exit_code == 0
    out = tmp_path / "laptop"
    content = json.loads((out / "table4.json").read_text())
    assert len(content["results"]) == 20
    assert content["left"] == {}
    assert set(content["missing"]) == {"CIFAR-100"}
    result = content["results"][3]
    assert (result["class"], result["train_images"], result["id_images"], result["ood_images"]) == (
        "cat",
        10,
        3,
        27,
    )
    # A model trained on one class scores images of all.
    images = one_class.load_images(root, progress=False)
    train, labels = images.train["CIFAR-10"]
    rows = torch.linspace(0, 11, 10).round().long()
    center = train[labels == 3][rows].float().mean()
    test, labels = images.test["CIFAR-10"]
    score = -(test.float().mean((1, 2, 3)) - center).abs()
    spaced = torch.tensor([0, 2, 3])  # of four, three
    parts = [score[labels == k][spaced] for k in range(10)]
    expected = 100 * fn.auroc(parts[3], torch.cat([*parts[:3], *parts[4:]]))
    assert result["auroc"]["NAN"] == pytest.approx(expected)
    mean = sum(r["auroc"]["NAN"] for r in content["results"][:10]) / 10
    document = (out / "table4.md").read_text()
    assert f"| NAN | {mean:.1f} | 93.7 | – | 88.2 |" in document
    assert "| GOAD | – | 88.2 | – | – |" in document
    assert "without CIFAR-100: not in the data root: put cifar100/train.parquet" in document
    assert f"| cat | {expected:.1f} |" in document

    def never(*_args, **_options):
        raise AssertionError("trained again")

    monkeypatch.setattr(Brightness, "train", never)
    monkeypatch.setattr(DeepSVDD, "train", never)
    assert reproduce("table4", root, tmp_path).exit_code == 0
    assert (out / "table4.md").read_text() == document


def test_an_interrupted_run_leaves_a_partial_table_and_resumes(root, tiny, tmp_path, monkeypatch):
    trained = []
    train = DeepSVDD.train

    def die(self, images, **options):
        if len(trained) == 2:
            raise KeyboardInterrupt
        trained.append(1)
        return train(self, images, **options)

    monkeypatch.setattr(DeepSVDD, "train", die)
    with pytest.raises(KeyboardInterrupt):
        reproduce("table4", root, tmp_path)
    document = (tmp_path / "laptop" / "table4.md").read_text()
    assert "not run yet: Deep-SVDD on CIFAR-10, 8 of its classes" in document
    assert "| Deep-SVDD | – | 64.8 | – | – |" in document
    monkeypatch.setattr(DeepSVDD, "train", train)
    monkeypatch.setattr(Brightness, "train", die)
    assert reproduce("table4", root, tmp_path).exit_code == 0
    document = (tmp_path / "laptop" / "table4.md").read_text()
    assert "not run yet" not in document
    assert "| Deep-SVDD | – |" not in document


def test_a_result_of_other_settings_raises(root, tiny, tmp_path, monkeypatch):
    models = {"mean": Brightness()}
    monkeypatch.setitem(one_class.SCALES, "laptop", replace(TINY, models=models))
    assert reproduce("table4", root, tmp_path).exit_code == 0
    monkeypatch.setitem(one_class.SCALES, "laptop", replace(TINY, models={"mean": Brightness(1.0)}))
    with pytest.raises(ValueError, match="holds a run with other settings: choose another folder"):
        reproduce("table4", root, tmp_path)


def test_super_classes_are_cifar_100s(tmp_path):
    names = [name for members in one_class.SUPER_CLASSES.values() for name in members]
    assert len(one_class.SUPER_CLASSES) == 20
    assert len(set(names)) == 100
    assert all(len(members) == 5 for members in one_class.SUPER_CLASSES.values())
    ordered = sorted(names)
    # Some of torchvision's numbers.
    known = {0: "apple", 1: "aquarium_fish", 19: "cattle", 40: "lamp", 52: "oak_tree", 67: "ray", 99: "worm"}
    assert {i: ordered[i] for i in known} == known
    for split in ("train", "test"):
        for c in range(10):
            write_images(tmp_path / "cifar10" / split / f"{c}", 1, c)
        for c, name in enumerate(ordered):
            write_images(tmp_path / "cifar100" / split / name, 1, c)
    images = one_class.load_images(tmp_path, progress=False)
    assert images.missing == {}
    labels = images.test["CIFAR-100"][1]
    assert torch.bincount(labels).tolist() == [5] * 20
    whales = list(one_class.SUPER_CLASSES).index("aquatic mammals")
    assert int(labels[ordered.index("whale")]) == whales
    assert len(studies()["table4"].jobs(TINY, images)) == 2 * 30


def test_both_scales_have_every_model_and_the_paper_its_rows():
    laptop, paper = (one_class.SCALES[name] for name in ("laptop", "paper"))
    assert laptop.models.keys() == paper.models.keys()
    assert paper.models["OC-SVM"] == SVM()
    rows = numbers("one-class")["table4"]["rows"]
    scores = {repr(detector) for detector in [*moco_detectors(), fn.CSI()]} | set(paper.models)
    assert set(rows) == {one_class.PAPER_ROWS.get(name, name) for name in scores} - {"MoCo-v2", "NAN()"} - {
        "KNN() / NAN()",
        "SSD() / NAN()",
    }
    # The paper's gains by the fusions, from its own figures; its printed gains on CIFAR-100 are wrong.
    assert rows["SSD + NAN"]["CIFAR-10"] - rows["SSD"]["CIFAR-10"] == pytest.approx(3.2)
    assert rows["KNN + NAN"]["CIFAR-10"] - rows["KNN"]["CIFAR-10"] == pytest.approx(2.2)
