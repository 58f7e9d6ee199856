"""One ONNX graph says what the detector says."""

import json
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

import featnorm as fn
from featnorm.data import open_images
from featnorm.deploy import ExportError, export, export_onnx
from featnorm.evaluation import standard_detectors

LEFT_OUT = {"ReAct(Energy())"}  # not of a cosine classifier's logits
DETECTORS = [repr(d) for d in standard_detectors() if repr(d) not in LEFT_OUT]
DETECTORS += ["KNN(k=3, squared=False)", "SSD(clusters=2)", "OneClassSVM()"]


def fit(folder, loaded, cache, detector):
    source = open_images(str(folder))
    return fn.fit_images(source, loaded, detector=detector, cache=cache, progress=False, workers=0).scorer


@pytest.mark.parametrize("detector", DETECTORS)
def test_it_scores_as_pytorch_does(folder, loaded, cache, tmp_path, detector):
    scorer = fit(folder, loaded, cache, fn.parse_detector(detector))
    assert export_onnx(scorer, tmp_path / "d.onnx") <= 1e-4
    session = onnxruntime.InferenceSession(tmp_path / "d.onnx")
    source = open_images(str(folder))
    known = torch.stack([loaded.transform(source.image(i)) for i in range(1, 41)])
    images = torch.cat([known, torch.rand(23, 3, 32, 32, generator=torch.Generator().manual_seed(3))])
    # Of the score over many images: ViM's is a small difference of large numbers, and may be near 0 for one.
    size = float(scorer.scorer(images).score.abs().max())
    for batch in (images[:1], images):
        logits, score, p_value, is_id = map(torch.from_numpy, session.run(None, {"images": batch.numpy()}))
        wanted = scorer.scorer(batch)
        assert torch.allclose(score.double(), wanted.score.double(), rtol=0, atol=1e-4 * size)
        assert torch.allclose(logits, wanted.logits, atol=1e-3)
        # A score within rounding of one of the calibration's may fall on its other side.
        calibration = scorer.scorer.calibration.scores
        gaps = (calibration[None] - wanted.score.double()[:, None]).abs()
        clear = gaps.min(1).values > 1e-4 * size
        assert torch.equal(is_id[clear], wanted.is_id[clear])
        assert torch.allclose(p_value[clear], wanted.p_value[clear])
        assert (
            (p_value - wanted.p_value).abs() <= (gaps <= 1e-4 * size).sum(1) / (len(calibration) + 1) + 1e-9
        ).all()


def test_its_metadata_names_the_classes(folder, loaded, cache, tmp_path):
    scorer = fit(folder, loaded, cache, fn.NAN())
    export_onnx(scorer, tmp_path / "d.onnx")
    model = onnx.load(tmp_path / "d.onnx")
    onnx.checker.check_model(model, full_check=True)
    (facts,) = [json.loads(entry.value) for entry in model.metadata_props if entry.key == "featnorm"]
    assert facts["classes"] == ["a", "b", "c", "d"]
    assert facts["detector"] == "NAN()"
    assert [entry.name for entry in model.graph.output] == list(export.OUTPUTS)


def test_what_is_refused(folder, loaded, cache, tmp_path, monkeypatch):
    for detector in (fn.Views(fn.NAN()), fn.ODIN(), fn.Views(fn.KNN(k=3)), fn.RotNet()):
        scorer = fit(folder, loaded, cache, detector)
        with pytest.raises(ExportError, match="asks the model again"):
            export_onnx(scorer, tmp_path / "d.onnx")
    scorer = fit(folder, loaded, cache, fn.NAN())
    with pytest.raises(FileNotFoundError, match="no folder"):
        export_onnx(scorer, tmp_path / "none" / "d.onnx")
    run = onnxruntime.InferenceSession.run

    class Wrong(onnxruntime.InferenceSession):
        def run(self, *arguments):
            logits, score, *rest = run(self, *arguments)
            return [logits, score * np.float32(1.01), *rest]

    monkeypatch.setattr(onnxruntime, "InferenceSession", Wrong)
    with pytest.raises(ExportError, match="scores differ from PyTorch's by"):
        export_onnx(scorer, tmp_path / "d.onnx")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match=r"pip install '.\[onnx\]'"):
        export_onnx(scorer, tmp_path / "d.onnx")
    scorer.scorer.calibration = None
    monkeypatch.undo()
    with pytest.raises(ExportError, match="not calibrated"):
        export_onnx(scorer, tmp_path / "d.onnx")
    assert list(tmp_path.iterdir()) == []
