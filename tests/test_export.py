"""One ONNX graph says what the detector says."""

import json
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torchvision.transforms import v2

import featnorm as fn
from featnorm import engine, export
from featnorm.evaluation import standard_detectors
from featnorm.export import ExportError, export_onnx
from featnorm.fitting import fit_source
from featnorm.inputs import IMAGES, SlicedSource, open_source

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("few_steps_throughout", "operators_read_once")]

# Not of a cosine classifier's logits: see `test_scores_that_read_the_classifier`.
LINEAR = ["ReAct(Energy())", "FDBD()", "NCI()", "NCI(alpha=0.1)", "ORA()", "RAS(Energy())", "SCALE(Energy())"]
LINEAR += ["ASH(Energy())"]
LEFT_OUT = set(LINEAR)
DETECTORS = [repr(d) for d in standard_detectors() if repr(d) not in LEFT_OUT and not d.needs_model]
DETECTORS += ["KNN(k=3, squared=False)", "SSD(clusters=2)"]


def fit(folder, loaded, cache, detector):
    source = open_source(str(folder))
    runtime = fn.Runtime(progress=False, workers=0)
    return fit_source(source, loaded, detector=detector, cache=cache, runtime=runtime, thumbnails=False)[0]


#: Those of whose graphs the tests read the verdicts. They depend on a score alone, and are half of a graph.
WITH_VERDICTS = {"NAN()", "KLUniform() + KNN(k=10)", "ViM()", "OneClassSVM()", "SSD()"}


class Together(torch.nn.Module):
    """The graphs of several scorers of the same network: an export takes about a second, however small it is."""

    def __init__(self, graphs):
        super().__init__()
        self.graphs = torch.nn.ModuleList(graphs)
        self.tap, self.model = graphs[0].tap, graphs[0].model
        self.with_verdicts = [repr(graph.detector) in WITH_VERDICTS for graph in graphs]
        for graph in graphs:
            del graph.model

    def forward(self, inputs):
        features = self.tap.traced(inputs)
        found = []
        for graph, whole in zip(self.graphs, self.with_verdicts, strict=True):
            found += graph.verdicts(features) if whole else [graph.score(features)]
        return tuple(found)


@torch.no_grad()
def outputs_of(scorers, images):
    """Return what one exported graph says of batches of images: by detector, a batch and the outputs by name."""
    graph = Together([export.ScoringGraph(scorer) for scorer in scorers]).eval()
    graph(images[:2])
    names = [
        (repr(scorer.detector), output)
        for scorer in scorers
        for output in (export.OUTPUTS if repr(scorer.detector) in WITH_VERDICTS else ["score"])
    ]
    model = engine.exported(graph, images[:2], IMAGES, [" ".join(name) for name in names])
    session = onnxruntime.InferenceSession(model.SerializeToString())
    found = {detector: [] for detector, _ in names}
    for batch in (images[:1], images):
        outputs = session.run(None, {"images": batch.numpy()})
        for parts in found.values():
            parts.append((batch, {}))
        for (detector, name), value in zip(names, outputs, strict=True):
            found[detector][-1][1][name] = torch.from_numpy(value)
    return found


@pytest.fixture(scope="module")
def together(folder, tiny, cache, few_steps_throughout, operators_read_once):
    """Scorers by detector, and what their graph says."""
    assert set(DETECTORS) >= WITH_VERDICTS
    scorers = {detector: fit(folder, tiny, cache, fn.parse_detector(detector)) for detector in DETECTORS}
    source = open_source(str(folder))
    known = torch.stack([tiny.transform(source.item(i)) for i in range(1, 41)])
    images = torch.cat([known, torch.rand(23, 3, 32, 32, generator=torch.Generator().manual_seed(3))])
    return scorers, outputs_of(scorers.values(), images)


@pytest.mark.parametrize("detector", DETECTORS)
def test_it_scores_as_pytorch_does(together, detector):
    scorers, outputs = together
    scorer = scorers[detector]
    # Of the score over many images: ViM's is a small difference of large numbers, and may be near 0 for one.
    size = float(scorer(outputs[detector][1][0]).score.abs().max())
    assert len(outputs[detector]) == 2
    for batch, found in outputs[detector]:
        wanted = scorer(batch)
        assert torch.allclose(found["score"].double(), wanted.score.double(), rtol=0, atol=1e-4 * size)
        if detector not in WITH_VERDICTS:
            continue
        assert torch.allclose(found["logits"], wanted.logits, atol=1e-3)
        # A score within rounding of one of the calibration's may fall on its other side.
        calibration = scorer.calibration.scores
        gaps = (calibration[None] - wanted.score.double()[:, None]).abs()
        clear = gaps.min(1).values > 1e-4 * size
        assert torch.equal(found["is_id"][clear], wanted.is_id[clear])
        assert torch.allclose(found["p_value"][clear], wanted.p_value[clear])
        most = (gaps <= 1e-4 * size).sum(1) / (len(calibration) + 1) + 1e-9
        assert ((found["p_value"] - wanted.p_value).abs() <= most).all()


@pytest.mark.parametrize("detector", ["NAN()", "KLUniform() + KNN(k=10)", "ViM()", "OneClassSVM()", LINEAR[0]])
def test_a_file_scores_as_its_graph_does(request, tmp_path, detector):
    scorers, outputs = request.getfixturevalue("linear" if detector in LINEAR else "together")
    assert export_onnx(scorers[detector], tmp_path / "d.onnx") <= 1e-4
    session = onnxruntime.InferenceSession(tmp_path / "d.onnx")
    for batch, found in outputs[detector]:
        wanted = found["score"]
        score = torch.from_numpy(session.run(None, {"images": batch.numpy()})[1])
        torch.testing.assert_close(score, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


@pytest.fixture(scope="module")
def linear(operators_read_once):
    """Scorers of a network with a linear classifier, and one module twice; and what their graph says."""
    torch.manual_seed(0)
    rectifier = torch.nn.ReLU()
    body = [torch.nn.Conv2d(3, 8, 3), rectifier, torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten()]
    model = torch.nn.Sequential(*body, torch.nn.Linear(32, 24), rectifier, torch.nn.Linear(24, 5)).eval()
    images = torch.rand(80, 3, 16, 16)
    transform = v2.Compose([v2.ToImage(), v2.Resize((16, 16)), v2.ToDtype(torch.float32, scale=True)])
    scorers = {}
    for expression in LINEAR:
        scorer = fn.Scorer(model, fn.parse_detector(expression), preprocess=transform)
        scorers[expression] = scorer.fit(images.split(20)).calibrate(images.split(20))
    return scorers, outputs_of(scorers.values(), images)


@pytest.mark.parametrize("expression", LINEAR)
def test_scores_that_read_the_classifier(linear, expression):
    scorers, outputs = linear
    for batch, found in outputs[expression]:
        assert torch.allclose(
            found["score"].double(), scorers[expression](batch).score.double(), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("expression", ["KNN(k=1)", "SSD()", "KNN(k=2) / ReAct(NAN())"])
def test_a_jackknife_is_one_graph(folder, tiny, cache, tmp_path, expression):
    source = open_source(str(folder))
    few = SlicedSource(source, range(0, 240, 6), "few")
    runtime = fn.Runtime(progress=False, workers=0)
    detector = fn.parse_detector(expression)
    # Each of four left out has a part of the graph: the export takes as long as there are nodes.
    scorer = fit_source(few, tiny, detector=detector, cache=cache, runtime=runtime, tpr=0.8)[0]
    assert scorer.is_jackknife
    assert export_onnx(scorer, tmp_path / "d.onnx") <= 1e-4
    images = torch.stack([tiny.transform(source.item(row)) for row in range(1, 240, 6)])
    session = onnxruntime.InferenceSession(str(tmp_path / "d.onnx"))
    score, p_value, is_id = map(torch.from_numpy, session.run(None, {"images": images.numpy()}))
    # Of 4: these pictures are so alike that rounding is felt where two of the left-out scores are close.
    torch.testing.assert_close(score, scorer(images).score, rtol=0, atol=0.05)
    assert len(score.floor().unique()) > 2
    for found, wanted in zip((p_value, is_id), scorer.calibration.predict(score), strict=True):
        torch.testing.assert_close(found, wanted)


def test_its_metadata_names_the_classes(folder, tiny, cache, tmp_path):
    scorer = fit(folder, tiny, cache, fn.NAN())
    assert export_onnx(scorer, tmp_path / "d.onnx") <= 1e-4
    model = onnx.load(tmp_path / "d.onnx")
    onnx.checker.check_model(model, full_check=True)
    (facts,) = [json.loads(entry.value) for entry in model.metadata_props if entry.key == "featnorm"]
    assert facts["classes"] == ["a", "b", "c", "d"]
    assert facts["detector"] == "NAN()"
    assert [entry.name for entry in model.graph.output] == list(export.OUTPUTS)


@pytest.mark.parametrize(("pooled", "resize"), [(1, []), (2, []), (1, [v2.Resize(32)]), (4, [v2.Resize(32)])])
def test_a_preprocess_that_keeps_aspect_ratios_has_a_graph_for_all_sizes(tmp_path, pooled, resize):
    torch.manual_seed(0)
    body = [torch.nn.Conv2d(3, 8, 3, 2), torch.nn.AdaptiveAvgPool2d(pooled), torch.nn.Flatten()]
    hidden = torch.nn.Linear(8 * pooled**2, 8)
    model = torch.nn.Sequential(*body, hidden, torch.nn.ReLU(), torch.nn.Linear(8, 3)).eval()
    transform = v2.Compose([v2.ToImage(), *resize, v2.ToDtype(torch.float32, scale=True)])
    scorer = fn.Scorer(model, fn.NAN(), preprocess=transform).calibrate([torch.rand(20, 3, 32, 32)])
    path = tmp_path / "d.onnx"
    if pooled > 1:  # onnxruntime pools to the size for which the graph was traced
        with pytest.raises(
            ExportError, match=r"different sizes, .* add a resize or crop to one size\. The error was: \S"
        ):
            export_onnx(scorer, path)
        assert not path.exists()
        return
    assert export_onnx(scorer, path) <= 1e-4
    assert export.input_size(scorer) == (3, None, None)
    for size in ((32, 32), (40, 63)):
        images = torch.rand(3, 3, *size)
        _, score, *_ = onnxruntime.InferenceSession(path).run(None, {"images": images.numpy()})
        torch.testing.assert_close(torch.from_numpy(score), scorer(images).score, rtol=1e-4, atol=1e-6)


def test_what_is_refused(folder, tiny, cache, tmp_path, monkeypatch):
    for detector in (fn.Views(fn.NAN()), fn.ODIN(), fn.Views(fn.KNN(k=3)), fn.RotNet()):
        scorer = fit(folder, tiny, cache, detector)
        with pytest.raises(ExportError, match="runs the model again"):
            export_onnx(scorer, tmp_path / "d.onnx")
    scorer = fit(folder, tiny, cache, fn.NAN())
    with pytest.raises(FileNotFoundError, match="no folder"):
        export_onnx(scorer, tmp_path / "none" / "d.onnx")
    run = onnxruntime.InferenceSession.run

    class Wrong(onnxruntime.InferenceSession):
        def run(self, *arguments):
            logits, score, *rest = run(self, *arguments)
            return [logits, score * np.float32(1.01), *rest]

    monkeypatch.setattr(onnxruntime, "InferenceSession", Wrong)
    with pytest.raises(
        ExportError, match=r"the graph's score differs from PyTorch's by 1\.0e-02 of its largest value"
    ):
        export_onnx(scorer, tmp_path / "d.onnx")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match=r"this needs onnxruntime .*pip install 'featnorm\[onnx\]'$"):
        export_onnx(scorer, tmp_path / "d.onnx")
    scorer.calibration = None
    monkeypatch.undo()
    with pytest.raises(ExportError, match="not calibrated"):
        export_onnx(scorer, tmp_path / "d.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def found():
    """A scorer, images, and what a sound graph says of them."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    scorer = fn.Scorer(model, fn.NAN()).calibrate([torch.randn(40, 4)])
    images = torch.randn(5, 4)
    verdict = scorer(images)
    return scorer, images, dict(zip(export.OUTPUTS, (verdict.logits, *verdict[:3]), strict=True))


def test_a_sound_graph_passes(found):
    scorer, images, outputs = found
    assert export._check(outputs, scorer, images) == 0
    near = {**outputs, "logits": outputs["logits"] * 1.00001}
    assert export._check(near, scorer, images) == 0


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("logits", lambda t: t * float("nan"), "the graph's logits is NaN"),
        (
            "logits",
            lambda t: t + 0.1 * t.abs().max(),
            r"logits differs from PyTorch's by 1\.0e-01 of its largest",
        ),
        ("logits", lambda t: t[:, :2], r"logits has shape \(5, 2\), but PyTorch's has \(5, 3\)"),
        ("score", lambda t: torch.where(torch.arange(5) == 4, float("nan"), t), "the graph's score is NaN"),
        ("score", lambda t: t * 1.01, r"score differs from PyTorch's by 1\.0e-02 of its largest value"),
        ("score", lambda t: t * float("inf"), "score differs from PyTorch's by inf of its largest value"),
        ("p_value", lambda t: t * float("nan"), "p_value differs from that of its score by nan"),
        ("p_value", lambda t: t + 1 / 41, r"p_value differs from that of its score by 2\.4e-02"),
        ("is_id", lambda t: ~t, "is_id is not that of its score for 5 of 5 images"),
        ("is_id", lambda t: t[:1], r"is_id has shape \(1,\), but PyTorch's has \(5,\)"),
    ],
)
def test_a_graph_with_another_output_is_refused(found, name, change, words):
    scorer, images, outputs = found
    with pytest.raises(ExportError, match=words):
        export._check({**outputs, name: change(outputs[name])}, scorer, images)
