"""Classifiers of transformers: an input has the same score alone and in a padded batch."""

import pytest

pytest.importorskip("transformers")

from zoo_transformers import ZOO, check

pytestmark = pytest.mark.slow

# Importing a model of transformers takes longer than checking it: docs/zoo-transformers.md has all of them.
QUICK = (
    "Bert",
    "DistilBert",
    "ModernBert",
    "GPT2",
    "Llama",
    "Bart",
    "T5",
    "ViT",
    "ConvNext",
    "Wav2Vec2",
    "Whisper",
)


@pytest.mark.parametrize("name", QUICK)
def test_an_input_alone_and_in_a_padded_batch(name: str) -> None:
    row = check(name)
    assert row["labels"].tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    assert row["logits"] == 0, "not what the model calls logits"
    assert {"pooled", "logits"} <= row["widths"].keys()
    assert row["widths"]["logits"] == 4 < row["widths"]["pooled"]
    assert {"MSP()", "KNN(k=1)"} <= row["padded"].keys()
    assert max(row["padded"].values()) < 1e-4, row["padded"]
    assert row["classifier"] is None or row["classifier"] < 1e-5


def test_the_zoo_holds_every_kind_of_model() -> None:
    assert set(QUICK) < ZOO.keys()
    assert len(ZOO) >= 15
    assert {ZOO[name].kind for name in QUICK} == {"encoder", "decoder", "encoder-decoder", "vision", "audio"}
