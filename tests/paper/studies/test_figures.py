"""The figures, from networks that are trained for an epoch or two on a few fabricated images."""

import json
import math
from dataclasses import replace

import pytest
import torch

from featnorm.paper import theory
from featnorm.paper.images import Images
from featnorm.paper.panels import Panel
from featnorm.paper.probe import LAST
from featnorm.paper.recipe import PaperRecipe
from featnorm.paper.studies.figures import Figure, gap, rank_correlation, series
from featnorm.paper.study import studies
from reproduction import context, reproduce

pytestmark = pytest.mark.slow

RECIPE = PaperRecipe(epochs=2, batch_size=32, optimizer="sgd", lr=0.02)
VARIANTS = (theory.Job("resnet", seed=1), theory.Job("resnet", decay=True), theory.Job("resnet", width=4))
TINY = theory.Scale(8, 60, RECIPE, replace(RECIPE, optimizer="adamw", lr=1e-3), variants=VARIANTS)


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(theory.SCALES, "laptop", TINY)


def test_every_figure_is_drawn_once_trained(root, tiny, tmp_path, monkeypatch):
    # One epoch: most of the time is that of measuring the networks after each.
    once = replace(TINY, recipe=replace(RECIPE, epochs=1), mlp=replace(TINY.mlp, epochs=1))
    monkeypatch.setitem(theory.SCALES, "laptop", once)
    figures = [name for name, study in studies().items() if isinstance(study, Figure) and name != "figure13"]
    assert len(figures) == 13
    for name in figures:
        assert reproduce(name, root, tmp_path).exit_code == 0, name
    out = tmp_path / "laptop"
    networks = {place.name for place in out.iterdir() if place.is_dir()}
    assert networks == {
        *(f"resnet-cifar10-relu-{scheme}" for scheme in theory.SCHEMES),
        "resnet-cifar10-relu-S-decay",
        "resnet-cifar10-relu-S-seed1",
        "resnet-cifar10-relu-S-width4",
        *(f"mlp-{data}-{name}-S" for data in ("cifar10", "mnist") for name in theory.ACTIVATIONS),
    }
    for name in figures:
        picture = (out / f"{name}.svg").read_text()
        assert picture.count("<svg") == 1
        kept = json.loads((out / f"{name}.json").read_text())
        panels = [[Panel.from_dict(panel) for panel in row] for row in kept["panels"]]
        assert [[panel.to_dict() for panel in row] for row in panels] == kept["panels"]
        assert picture.count('id="axes_') == sum(len(row) for row in panels)
        assert studies()[name].tables(kept)[name].markdown() == (out / f"{name}.md").read_text()
        assert "scale laptop" in (out / f"{name}.md").read_text()
    # Drawing takes seconds: one of them is drawn again from what was kept.
    kept = json.loads((out / "figure3.json").read_text())
    assert studies()["figure3"].pictures(kept)["figure3"] == (out / "figure3.svg").read_text()
    assert "layer 5" in (out / "figure12.md").read_text()
    assert "before the rectifier" in (out / "figure8.md").read_text()
    rows = (out / "schemes.md").read_text()
    assert all(f"| {row} | " in rows for row in ("S", "S, seed 1", "S, with weight decay", "S, width 4", "O"))
    assert rows.count("| 60 | ") == len(theory.SCHEMES) + len(VARIANTS)
    assert "ResNet-18 of width 4 and 8" in rows
    assert "| – | " in rows.split("| R | ")[1].splitlines()[0]

    def never(*_args, **_options):
        raise AssertionError("trained again")

    before = (out / "figure3.md").read_text()
    monkeypatch.setattr(theory, "train", never)
    assert reproduce("figure3", root, tmp_path).exit_code == 0
    assert (out / "figure3.md").read_text() == before


def test_a_run_records_what_it_was(root, tiny, tmp_path):

    here = context(root=root, out=tmp_path)
    study = studies()["figure3"]
    images = study.load(TINY, here)
    job = theory.Job("resnet", scheme="O")
    run = study.result(job, TINY, images, here)
    folder = tmp_path / job.folder
    assert run["inputs"] == 60
    assert run["recipe"]["augment"] is False
    assert run["accuracy"] == {"train": 1}
    assert [record["epoch"] for record in run["records"]] == [1, 2]
    assert series(run, LAST, "hidden", "train", "accuracy") == [1, 1]
    assert "test" not in run["records"][0]["layers"][LAST]["hidden"]
    assert len(gap(run, "nan")) == 2
    assert run["tensors"]["pattern:train"].shape == (50, 512)
    assert run["tensors"]["norm:noise"].shape == (12,)
    active = run["tensors"]["l0:test"].double().clamp_min(1)
    sparsity = run["records"][-1]["layers"][LAST]["sparsity"]["test"]
    assert sparsity == pytest.approx(float((1 / active).mean()), rel=1e-3)
    again = study.result(job, TINY, images, here)
    assert again.keys() == run.keys()
    assert all(torch.equal(value, run["tensors"][name]) for name, value in again["tensors"].items())
    with pytest.raises(ValueError, match="holds a run with other width"):
        study.result(job, replace(TINY, width=4), images, here)
    damaged = bytearray((folder / "tensors.safetensors").read_bytes())
    damaged[-1] ^= 1
    (folder / "tensors.safetensors").write_bytes(damaged)
    with pytest.raises(ValueError, match=r"tensors\.safetensors is damaged: delete .*result\.json"):
        study.result(job, TINY, images, here)


def test_the_accuracy_is_of_the_trained_network_on_new_images(root, tiny, tmp_path):
    here = context(root=root, out=tmp_path)
    study = studies()["schemes"]
    images = study.load(TINY, here)
    job = theory.Job("resnet", seed=1)
    run = study.result(job, TINY, images, here)
    model = theory.build(job, TINY, images.train[0].shape[1:], 10, 1)
    model.load_state_dict(torch.load(tmp_path / job.folder / "checkpoint.pt", weights_only=True)["model"])
    pixels, labels = images.test
    right = model.eval()(pixels.float() / 255).argmax(1) == labels
    assert run["accuracy"]["test"] == pytest.approx(float(right.float().mean()))
    assert run["job"]["seed"] == 1


def test_the_label_schemes_train_as_the_paper_says():
    scale = theory.SCALES["paper"]
    for scheme in theory.SCHEMES:
        recipe = theory.Job("resnet", scheme=scheme).recipe(scale)
        assert recipe.augment == (scheme == "Is")
        assert (recipe.epochs, recipe.lr, recipe.batch_size, recipe.weight_decay) == (200, 0.06, 256, 0)
    assert theory.Job("resnet", decay=True).recipe(scale).weight_decay > 0
    longer = theory.SCALES["workstation"]
    images = Images((torch.zeros(45_000, 1, 1, 1, dtype=torch.uint8), torch.zeros(45_000)), ())
    used = {}
    for scheme in theory.SCHEMES:
        job = theory.Job("resnet", scheme=scheme)
        used[scheme] = len(theory.training_images(job, longer, images)[0]), job.recipe(longer).epochs
    memorized = (10_000, 100)
    assert used == {"S": (45_000, 40), "I": memorized, "Is": memorized, "R": memorized, "O": (10_000, 5)}
    plain = theory.Job("resnet", augment=False).recipe(longer)
    assert (plain.augment, plain.crop) == (False, None)
    assert theory.Job("resnet", scheme="Is", augment=False).recipe(longer).augment
    mlp = theory.Job("mlp").recipe(scale)
    assert (mlp.epochs, mlp.optimizer, mlp.lr, mlp.batch_size) == (200, "adamw", 1e-3, 256)


def test_digits_are_gray(root):
    images = theory.LOADERS["mnist"](context(root=root))
    assert images.train[0].shape == (120, 1, 28, 28)
    model = theory.build(theory.Job("mlp", "mnist"), TINY, images.train[0].shape[1:], 10)
    assert model(torch.rand(3, 1, 28, 28)).shape == (3, 10)


def test_rank_correlation():
    assert rank_correlation([1, 2, 3], [1, 4, 9]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3], [5, 4, 4.5]) == pytest.approx(-0.5)
    assert math.isnan(rank_correlation([1, 1, 1], [1, 2, 3]))
