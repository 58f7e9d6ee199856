"""Explanations of fabricated images."""

import json

from featnorm.paper.images import CLASSES
from featnorm.paper.study import studies
from reproduction import reproduce


def test_explanation(root, tmp_path):
    assert reproduce("explanation", root, tmp_path).exit_code == 0
    result = json.loads((tmp_path / "laptop" / "explanation.json").read_text())
    assert [row["set"] for row in result["rows"]] == ["cifar10", "SVHN", "large", "noise"]
    for row in result["rows"]:
        off = [value <= 0 for value in row["picture"]["activation"]]
        usual = [rate >= 0.5 for rate in row["picture"]["on_rate"]]
        assert row["active"] == 512 - sum(off)
        assert row["usual"] == sum(usual)
        assert row["inactive"] == sum(a and b for a, b in zip(off, usual, strict=True))
        assert row["predicted"] in CLASSES
    drawn = studies()["explanation"].pictures(result)
    assert list(drawn) == [f"explanation-{name}" for name in ("cifar10", "SVHN", "large", "noise")]
    assert all(text.count("<svg") == 1 for text in drawn.values())
