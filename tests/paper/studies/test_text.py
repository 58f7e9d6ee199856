"""What detectors are worth on texts, on fabricated texts and a tiny encoder."""

import json
from dataclasses import replace

import pytest
import torch

from featnorm.models import create_model
from featnorm.paper.studies import text
from featnorm.paper.study import MissingError, studies
from reproduction import context, reproduce
from tiny_texts import WORDS, saved, write_texts


@pytest.fixture
def texts_root(tmp_path, monkeypatch):
    root = tmp_path / "root"
    write_texts(root / "text" / "banking77_train.parquet", 6, 25, WORDS[4:])
    write_texts(root / "text" / "banking77_test.parquet", 6, 8, WORDS[4:])
    write_texts(root / "text" / "ag_news_test.parquet", 4, 16, ["the", "news", *WORDS[9:]])
    spec = f"hf:{saved(tmp_path / 'model')}"
    monkeypatch.setattr(text, "create_model", lambda _, pretrained=True: create_model(spec, pretrained=pretrained))
    monkeypatch.setattr(text, "ID_INTENTS", 4)
    monkeypatch.setattr(text, "SEEDS", 2)
    recipes = {name: replace(recipe, epochs=2, batch_size=8) for name, recipe in text.RECIPES.items()}
    monkeypatch.setattr(text, "RECIPES", recipes)
    monkeypatch.setattr("featnorm.fitting._MIN_STEPS", 20)
    return root


def test_every_detector_with_labels_and_clusters(texts_root, tmp_path):
    assert reproduce("text", texts_root, tmp_path / "out").exit_code == 0
    results = json.loads((tmp_path / "out" / "laptop" / "text.json").read_text())
    assert [result["draw"] for result in results] == [
        {"setting": setting, "seed": seed} for setting in ("intents", "all") for seed in (0, 1)
    ]
    assert results[0]["sizes"] == {"training": 100, "ID test": 32, "other intents": 16, "news": 8}
    assert results[2]["sizes"] == {"training": 150, "ID test": 48, "news": 8}
    labels, clusters = (results[0]["heads"][kind] for kind in ("labels", "clusters"))
    assert 0 < labels["accuracy"] <= 1
    assert clusters["accuracy"] is None
    assert set(labels["scores"]["NAN()"]) == {"other intents", "news"}
    assert {"KLUniform() + KNN(k=10)", "GEN()", "NNGuide()", "SHE()"} <= set(labels["scores"])
    # Distances of the frozen features know neither head nor labels.
    assert labels["scores"]["KNN(k=10)"] == clusters["scores"]["KNN(k=10)"]
    assert labels["scores"]["KNN(k=10)"] != results[1]["heads"]["labels"]["scores"]["KNN(k=10)"]
    page = (tmp_path / "out" / "laptop" / "text.md").read_text("utf-8")
    assert page.count("| Detector |") == 4
    assert page.count("accuracy on ID") == 2
    assert page.count("left out NCI(), FDBD(), ORA(): needs logits that are a linear map") == 4


def test_fine_tuned_encoders(texts_root, tmp_path):
    out = tmp_path / "out"
    assert reproduce("text-fine-tuned", texts_root, out).exit_code == 0
    results = json.loads((out / "laptop" / "text-fine-tuned.json").read_text())
    assert [tuple(result["network"].values()) for result in results] == [
        *(("frozen", head, seed) for head in ("MLP", "projection") for seed in (0, 1)),
        *(("fine-tuned", head, seed) for seed in (0, 1) for head in ("MLP", "projection")),
    ]
    assert all(not result["excluded"] for result in results)
    assert all(0 < result["inactive"]["ID"] < 1 for result in results)
    # The frozen encoder is the same under every head, and training changes it.
    knn = [result["scores"]["KNN(k=10)"] for result in results]
    assert knn[0] == knn[2]
    assert knn[0] != knn[4]
    page = (out / "laptop" / "text-fine-tuned.md").read_text("utf-8")
    assert page.count("|  | frozen, MLP | frozen, projection | fine-tuned, MLP | fine-tuned, projection |") == 2
    assert page.count("seeds of each column: 2, 2, 2, 2") == 2
    # An interrupted run resumes: what is trained is not trained again.
    kept = [out / "laptop" / f"text-fine-tuned-MLP-seed0/{name}" for name in ("checkpoint.pt", "result.json")]
    kept[1].unlink()
    before = kept[0].read_bytes()
    assert reproduce("text-fine-tuned", texts_root, out).exit_code == 0
    assert kept[0].read_bytes() == before


def test_features_do_not_depend_on_the_texts_encoded_together(texts_root):
    texts = text.load_texts(context(root=texts_root))["banking77_train"]
    packed = text.Packed(text.create_model("").model)
    whole = packed.features(texts.ids)
    one = torch.cat([packed.features(ids[None]) for ids in texts.ids])
    assert torch.allclose(whole, one, atol=1e-5)


def test_texts_that_are_missing_are_named(tmp_path):
    with pytest.raises(MissingError, match=r"text/ag_news_test\.parquet: name its folder by --data-root"):
        studies()["text"].load(None, context())
    with pytest.raises(MissingError, match=r"banking77_train\.parquet: texts, columns text and label"):
        studies()["text"].load(None, context(root=tmp_path))
