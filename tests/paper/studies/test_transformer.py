"""The transformer of the page on norms, at a size that trains in a moment."""

import json

from featnorm.paper.recipe import PaperRecipe
from featnorm.paper.studies import transformer
from featnorm.tap import FeatureTap
from reproduction import reproduce


def test_the_transformer_is_trained_on_crops_and_scored(root, tmp_path, monkeypatch):
    recipe = PaperRecipe(2, 64, "adamw", 1e-3, augment=True, crop=24, crop_share=0.5)
    tiny = transformer.Scale(8, 1, 2, 2.0, recipe, seeds=1, hidden=16)
    monkeypatch.setitem(transformer.SCALES, "laptop", tiny)
    assert reproduce("transformer", root, tmp_path).exit_code == 0
    (result,) = json.loads((tmp_path / "laptop" / "transformer.json").read_text())
    assert {"NAN()", "HiddenConfidence()"} <= set(result["scores"])
    assert "transformer" in (tmp_path / "laptop" / "transformer.md").read_text()


def test_the_norm_reads_the_hidden_layer_of_the_head():
    tap = FeatureTap(transformer.Scale(8, 1, 2, 2.0, PaperRecipe(1, 1, "adamw", 1e-3), 1, hidden=16).build(0))
    assert "16 units" in tap.describe()
