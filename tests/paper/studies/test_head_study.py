"""What of a head's training moves the scores, on fabricated images."""

import json
from dataclasses import replace

from featnorm.paper.studies import head_study
from reproduction import reproduce


def test_head_study(root, tmp_path, monkeypatch):
    settings = {name: head_study.SETTINGS[name] for name in ("T = 0.5", "width 64")}
    short = {name: (t, d, replace(recipe, epochs=2, batch_size=32)) for name, (t, d, recipe) in settings.items()}
    monkeypatch.setattr(head_study, "SETTINGS", short)
    assert reproduce("head-study", root, tmp_path).exit_code == 0
    result = json.loads((tmp_path / "laptop" / "head-study.json").read_text())
    assert [row["setting"] for row in result["rows"]] == ["T = 0.5", "width 64"]
    first, second = (row["scores"] for row in result["rows"])
    assert first["KNN()"] == second["KNN()"]
    assert first["NAN()"] != second["NAN()"]
    assert "| width 64 |" in (tmp_path / "laptop" / "head-study.md").read_text()
