"""`featnorm reproduce all` puts every result that can be made on one page, and names the others there."""

import json
from dataclasses import replace

import pytest

from featnorm.paper import scoring, study, theory
from featnorm.paper.recipe import PaperRecipe
from featnorm.paper.studies import cifar10
from reproduction import reproduce

RECIPE = PaperRecipe(epochs=1, batch_size=32, optimizer="sgd", lr=0.02)


@pytest.fixture
def few(monkeypatch):
    """A few studies: two tables share a network, and one figure has no images."""
    names = ("table5", "table10", "table1", "figure2", "figure13", "explanation")
    known = study.studies()
    monkeypatch.setattr(study, "_STUDIES", {name: known[name] for name in names})
    monkeypatch.setitem(cifar10.SCALES, "laptop", cifar10.Scale(8, RECIPE, RECIPE, frozen=False, seeds=1))
    mlp = replace(RECIPE, optimizer="adamw", lr=1e-3)
    monkeypatch.setitem(theory.SCALES, "laptop", theory.Scale(8, 60, RECIPE, mlp))


def test_all_makes_one_page_and_names_what_is_missing(root, few, tmp_path, monkeypatch):
    result = reproduce("all", root, tmp_path)
    assert result.exit_code == 0
    out = tmp_path / "laptop"
    page = (out / "results.html").read_text("utf-8")
    for name in ("table5", "table10", "figure2", "explanation"):
        assert f'<h2 id="{name}">' in page
        assert (out / f"{name}.md").exists()
    assert '<h2 id="figure13">' not in page
    assert "figure13" in page
    assert "svhn:train" in page
    assert "tiny-imagenet-200.zip" in page
    assert page.count("data:image/svg+xml") == 1 + len(list(out.glob("explanation-*.svg")))
    assert "Paper" in page
    for name in ("table5", "figure2"):
        assert json.loads((out / f"{name}.json").read_text())

    def never(*_args, **_options):
        raise AssertionError("trained again")

    monkeypatch.setattr(scoring, "train", never)
    monkeypatch.setattr(theory, "train", never)
    assert reproduce("all", root, tmp_path).exit_code == 0


def test_all_is_broken_off_by_a_fault_of_ours(root, few, tmp_path, monkeypatch):
    def fault(*_args, **_options):
        raise TypeError("a fault")

    monkeypatch.setattr(scoring, "train", fault)
    with pytest.raises(TypeError, match="a fault"):
        reproduce("all", root, tmp_path)
