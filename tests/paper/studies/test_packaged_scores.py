"""Every score on the packaged network, on fabricated images."""

import json

from featnorm.paper.scoring import compared_detectors
from featnorm.paper.study import studies
from reproduction import reproduce


def test_packaged_scores(root, tmp_path):
    assert reproduce("packaged-scores", root, tmp_path).exit_code == 0
    result = json.loads((tmp_path / "laptop" / "packaged-scores.json").read_text())
    assert {repr(detector) for detector in compared_detectors()} == set(result["scores"]) | set(result["excluded"])
    assert {"GEN()", "SHE()", "NNGuide()", "KLUniform() + KNN(k=10)"} <= set(result["scores"])
    table = studies()["packaged-scores"].tables(result)["packaged-scores"]
    assert table.headers[:3] == ["Detector", "Mean, ours", "Average, paper"]
    averages = {row[0]: row[2] for row in table.rows}
    assert (averages["NAN()"], averages["GEN()"]) == ("95.0 / 30.1", "–")
    # A reason that detectors share stands there once.
    assert sum("FDBD(), ORA()" in note for note in table.notes) == 1
