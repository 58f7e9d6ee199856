"""A MoCo-v2 network scored over its training, on fabricated images."""

import json
import shutil
from dataclasses import replace

import pytest

from featnorm._utils.sealed import read_sealed
from featnorm.metrics import auroc
from featnorm.paper.images import CLASSES
from featnorm.paper.recipe import PaperRecipe
from featnorm.paper.studies import moco_length, one_class
from featnorm.paper.study import studies
from featnorm.paper.systems import MoCo
from featnorm.runtime import Runtime
from featnorm.training import train as really_train
from reproduction import reproduce

pytestmark = pytest.mark.slow

RECIPE = PaperRecipe(epochs=3, batch_size=16, optimizer="sgd", lr=0.02, augment=True, objective="moco", queue=32)
MODEL = MoCo(4, RECIPE, k=3)
TINY = moco_length.Scale(MODEL, CLASSES[:2], (0, 1, 3))


@pytest.fixture(scope="module")
def made(root, tmp_path_factory):
    """The folder of a run that was not broken off; to be read, or copied."""
    out = tmp_path_factory.mktemp("moco-length")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(moco_length.SCALES, "laptop", TINY)
        assert reproduce("moco-length", root, out).exit_code == 0
    return out


def test_the_network_is_scored_before_its_training_and_on_the_way(root, made):
    out = made / "laptop"
    folders = [out / f"moco-length-{name}" for name in ("airplane", "automobile")]
    results = [read_sealed(folder / "result.json") for folder in folders]
    for result in results:
        assert [entry["epoch"] for entry in result["history"]] == [0, 1, 3]
        assert (result["train_images"], result["id_images"], result["ood_images"]) == (12, 4, 36)
    # Its last scores are those of the model of Table 4 on the same images.
    images = one_class.load_images(root, progress=False)
    (train, of), (test, labels) = images.train["CIFAR-10"], images.test["CIFAR-10"]
    model = MODEL.train(train[of == 1], runtime=Runtime(progress=False))
    for name, scores in MODEL.scores(model, test).items():
        found = results[1]["history"][-1]["scores"][name]
        assert found["auroc"] == pytest.approx(100 * auroc(scores[labels == 1], scores[labels != 1]), abs=1e-6)
        assert found["id_mean"] == pytest.approx(float(scores[labels == 1].mean()), rel=1e-4)
        assert found["ood_mean"] == pytest.approx(float(scores[labels != 1].mean()), rel=1e-4)
    document = (out / "moco-length.md").read_text()
    nan = sum(result["history"][1]["scores"]["NAN()"]["auroc"] for result in results) / 2
    header, _, *rows = [line.split(" | ") for line in document.splitlines() if line.startswith("|")]
    assert [row[0].strip("| ") for row in rows[:3]] == ["0", "1", "3"]
    assert rows[1][header.index("NAN()")] == f"{nan:.1f}"
    assert rows[0][header.index("loss")] == "–"
    assert rows[3][header.index("Views(NAN())")] == "93.7"
    assert "| automobile, 3 | " in document
    assert json.loads((out / "moco-length.json").read_text()) == results
    assert studies()["moco-length"].pictures(results)["moco-length"].count("epoch of four rotations") == 2


def test_an_interrupted_run_resumes_and_records_each_epoch_once(root, made, tmp_path, monkeypatch):
    monkeypatch.setitem(moco_length.SCALES, "laptop", replace(TINY, classes=TINY.classes[:1]))

    def die_in_epoch(epoch):
        def train(*args, on_epoch, **options):
            def record(entry, network):
                on_epoch(entry, network)
                if entry["epoch"] == epoch:
                    raise KeyboardInterrupt

            return really_train(*args, on_epoch=record, **options)

        return train

    broken = tmp_path / "broken"
    # In the first epoch before there is a checkpoint, and once there is one.
    for epoch in (1, 3):
        monkeypatch.setattr(moco_length, "train", die_in_epoch(epoch))
        with pytest.raises(KeyboardInterrupt):
            reproduce("moco-length", root, broken)
    monkeypatch.setattr(moco_length, "train", really_train)
    assert reproduce("moco-length", root, broken).exit_code == 0
    histories = [
        read_sealed(out / "laptop" / "moco-length-airplane" / "result.json")["history"] for out in (made, broken)
    ]
    assert histories[0] == histories[1]

    def never(*_args, **_options):
        raise AssertionError("trained again")

    monkeypatch.setattr(moco_length, "train", never)
    assert reproduce("moco-length", root, broken).exit_code == 0


def test_a_result_of_other_settings_raises(root, made, tmp_path, monkeypatch):
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    other = moco_length.Scale(MODEL, CLASSES[:2], (0, 3))
    monkeypatch.setitem(moco_length.SCALES, "laptop", other)
    with pytest.raises(ValueError, match="holds a run with other epochs: choose another folder"):
        reproduce("moco-length", root, tmp_path)


def test_every_scale_scores_at_the_end():
    for scale in moco_length.SCALES.values():
        assert scale.epochs[0] == 0
        assert scale.epochs[-1] == scale.model.recipe.epochs
        assert list(scale.epochs) == sorted(set(scale.epochs))
