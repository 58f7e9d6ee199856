"""onnxruntime runs a network as PyTorch does, or PyTorch runs it and the reason is said."""

import threading
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.transforms import v2

import featnorm as fn
from featnorm import engine
from featnorm.engine import EngineError, relative_gap
from featnorm.fitting import fit_source
from featnorm.inputs import open_source
from featnorm.models import LoadedModel
from featnorm.scoring import score_source

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("operators_read_once")]

TRANSFORM = v2.Compose([v2.ToImage(), v2.Resize((16, 16)), v2.ToDtype(torch.float32, scale=True)])


@pytest.fixture(autouse=True)
def graphs(tmp_path, monkeypatch):
    """The folder of exported graphs; `auto` exports for any number of items."""
    monkeypatch.setattr(engine, "DEFAULT_CACHE", str(tmp_path / "engines"))
    monkeypatch.setattr(engine, "MIN_ITEMS", 1)
    return tmp_path / "engines"


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2))
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 5))

    def forward(self, x):
        return self.head(self.body(x))


class Branching(Net):
    """A path that depends on the values of the input, which no graph can have."""

    def forward(self, x):
        return super().forward(x if float(x.mean()) > 0.4 else 2 * x)


def scorer_of(net=Net, detector="KLUniform() + KNN(k=3)", **options):
    torch.manual_seed(0)
    images = torch.rand(200, 3, 16, 16) * torch.rand(200, 3, 1, 1)
    scorer = fn.Scorer(net().eval(), fn.parse_detector(detector), preprocess=TRANSFORM, **options)
    return scorer.fit(images[:100].split(20)).calibrate(images[100:].split(20))


@pytest.fixture
def photos(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    for i in range(130):
        pixels = rng.random((20, 24, 3)) * rng.random(3) * 256
        Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / f"photos/{i:03}.png")
    (tmp_path / "photos/broken.png").write_bytes(b"no image")
    return open_source(str(tmp_path / "photos"))


def verdicts(scorer, source, engine):
    found = []
    summary = score_source(
        scorer, source, runtime=fn.Runtime(engine=engine, progress=False), on_batch=found.extend
    )
    return found, summary


@pytest.mark.parametrize("detector", ["NAN()", "KLUniform() + KNN(k=3)", "ReAct(Energy())"])
def test_verdicts_are_those_of_pytorch(photos, detector):
    scorer = scorer_of(detector=detector)
    (expected, _), (found, summary) = (verdicts(scorer, photos, name) for name in ("torch", "onnx"))
    assert [one.item for one in found] == [one.item for one in expected]
    assert [one.error for one in found] == [one.error for one in expected]
    scores = torch.tensor(
        [[a.score, b.score] for a, b in zip(found, expected, strict=True) if a.score is not None]
    )
    assert torch.allclose(scores[:, 0], scores[:, 1], rtol=0, atol=1e-4 * float(scores.abs().max()))
    assert sum(a.is_id != b.is_id for a, b in zip(found, expected, strict=True)) <= 1
    assert 0 < summary.model_seconds < summary.seconds


def test_the_model_is_not_run_by_pytorch(photos, monkeypatch):
    scorer = scorer_of()
    made = scorer.engine(fn.Runtime(engine="onnx"), 1)
    monkeypatch.setattr(scorer.tap, "capture", lambda *_, **__: pytest.fail("PyTorch ran the model"))
    assert sum(map(len, scorer.stream(photos, engine=made))) == 131


def test_a_graph_is_exported_once(photos, graphs, monkeypatch):
    first = verdicts(scorer_of(), photos, "auto")[0]
    assert len(list(graphs.iterdir())) == 1
    monkeypatch.setattr(engine, "exported", lambda *_, **__: pytest.fail("exported again"))
    assert verdicts(scorer_of(), photos, "auto")[0] == first


def test_a_damaged_graph_is_exported_again(photos, graphs):
    first = verdicts(scorer_of(), photos, "auto")[0]
    (file,) = graphs.iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    assert verdicts(scorer_of(), photos, "auto")[0] == first
    assert len(file.read_bytes()) == len(whole)


def test_a_graph_of_other_code_is_exported_again(photos, graphs):
    class Other(Net):
        def forward(self, x):
            return super().forward(1 - x)

    scorer_of(detector="NAN()").engine(fn.Runtime(engine="onnx"), 1)
    other = scorer_of(Other, "NAN()")
    # The weights and the layers are the same.
    (expected, _), (found, _) = (verdicts(other, photos, name) for name in ("torch", "onnx"))
    assert found[0].score == pytest.approx(expected[0].score, rel=1e-4)


def test_a_graph_of_other_settings_is_exported_again(photos):
    def capped():
        net = Net()
        net.head[2] = nn.Hardtanh(0, 1e6)  # on inputs that reach no cap it is ReLU
        return net

    scorer_of(capped, "NAN()").engine(fn.Runtime(engine="onnx"), 1)

    def lower():
        net = capped()
        net.head[2].max_val = 0.05
        return net

    other = scorer_of(lower, "NAN()")
    (expected, _), (found, _) = (verdicts(other, photos, name) for name in ("torch", "onnx"))
    assert found[0].score == pytest.approx(expected[0].score, rel=1e-4)


@pytest.mark.parametrize("fault", ["lock", "squeeze"])
def test_a_model_that_cannot_be_copied_or_takes_no_batch_of_one_runs_in_pytorch(photos, fault):
    class Odd(Net):
        def __init__(self):
            super().__init__()
            self.lock = threading.Lock() if fault == "lock" else None

        def forward(self, x):
            pooled = self.body(x)
            return self.head(pooled.squeeze().reshape(len(x), -1) if fault == "lock" else pooled.squeeze())

    scorer = scorer_of(Odd, "NAN()")
    with pytest.warns(UserWarning, match="^PyTorch runs the model, not onnxruntime"):
        assert scorer.engine(fn.Runtime(engine="auto"), 1) is None


def test_changed_buffers_outside_the_state_are_noticed(photos):
    class Scaled(Net):
        def __init__(self):
            super().__init__()
            self.register_buffer("scale", torch.ones(1), persistent=False)

        def forward(self, x):
            return super().forward(x) * self.scale

    scorer = scorer_of(Scaled, "MaxLogit()")
    made = scorer.engine(fn.Runtime(engine="onnx"), 1)
    scorer.model.scale *= 100
    (expected, _), found = verdicts(scorer, photos, "torch"), next(iter(scorer.stream(photos, engine=made)))
    assert found[0].score == pytest.approx(expected[0].score, rel=1e-4)


def test_what_cannot_be_exported_runs_in_pytorch(photos):
    scorer = scorer_of(Branching)
    expected = verdicts(scorer, photos, "torch")[0]
    with pytest.warns(UserWarning, match="^PyTorch runs the model, not onnxruntime: it cannot be exported: "):
        found = verdicts(scorer, photos, "auto")[0]
    assert found == expected
    with pytest.raises(EngineError, match="cannot be exported"):
        verdicts(scorer, photos, "onnx")


def test_images_of_different_sizes_need_a_resize():
    scorer = scorer_of()
    transform = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
    scorer = fn.Scorer(scorer.model, fn.NAN(), preprocess=transform)
    words = "the preprocess returns images of different sizes: add a resize or crop to one size"
    with pytest.warns(UserWarning, match=rf"^PyTorch runs .*: {words}\. To hide this note, .*--engine torch\)$"):
        assert scorer.engine(fn.Runtime(), 1000) is None


def test_a_detector_that_runs_the_model_again_needs_pytorch(photos):
    scorer = scorer_of(detector="ODIN()")
    with pytest.raises(EngineError, match=r"ODIN.* runs it again"):
        scorer.engine(fn.Runtime(engine="onnx"), 1)


def test_a_graph_with_other_outputs_is_not_used(monkeypatch):
    run = engine.Engine.__call__
    monkeypatch.setattr(engine.Engine, "__call__", lambda self, x: [1.001 * value for value in run(self, x)])
    with pytest.raises(EngineError, match=r"differs from PyTorch's by 1\.0e-03"):
        scorer_of().engine(fn.Runtime(engine="onnx"), 1)


def test_changed_weights_are_noticed(photos):
    scorer = scorer_of()
    made = scorer.engine(fn.Runtime(engine="onnx"), 1)
    with torch.no_grad():
        scorer.model.head[1].bias += 1
    with pytest.raises(ValueError, match="weights"):
        list(scorer.stream(photos, engine=made))


def test_inputs_of_another_size_run_in_pytorch():
    scorer = scorer_of()
    made = scorer.engine(fn.Runtime(engine="onnx"), 1)
    inputs = torch.rand(3, 3, 24, 24)
    expected = scorer.predict_batch(inputs, list("abc"))
    assert scorer.predict_batch(inputs, list("abc"), engine=made) == expected


def test_few_items_and_other_devices_run_in_pytorch(monkeypatch):
    monkeypatch.setattr(engine, "MIN_ITEMS", 1000)
    scorer = scorer_of()
    assert scorer.engine(fn.Runtime(), 999) is None
    assert scorer.engine(fn.Runtime(engine="torch"), 1000) is None
    assert scorer.engine(fn.Runtime(precision="bf16-mixed"), 1000) is None
    with pytest.raises(ValueError, match="got cpu, bf16-mixed: use the engine auto or torch"):
        scorer.engine(fn.Runtime(engine="onnx", precision="bf16-mixed"), 1000)
    monkeypatch.setattr(engine, "_PACKAGES", ("torch", "no_such_package"))
    assert scorer.engine(fn.Runtime(), 1000) is None
    with pytest.raises(ImportError, match="the engine onnx needs no_such_package"):
        scorer.engine(fn.Runtime(engine="onnx"), 1000)
    with pytest.raises(ValueError, match="engine must be one of auto, torch, onnx, got 'tpu'"):
        fn.Runtime(engine="tpu")


@pytest.mark.parametrize("head", ["keep", "none"])
def test_a_fit_is_that_of_pytorch(photos, tmp_path, head):
    def fitted(engine):
        torch.manual_seed(0)
        loaded = LoadedModel(Net().eval(), TRANSFORM, (3, 16, 16), "")
        runtime = fn.Runtime(engine=engine, progress=False)
        detector = fn.KNN(k=3)
        return fit_source(photos, loaded, detector=detector, head=head, cache=tmp_path / "c", runtime=runtime)

    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        (torchs, _), (ours, report) = fitted("torch"), fitted("auto")
    assert report.computed == 130
    assert (torchs.facts["engine"], ours.facts["engine"]) == ("PyTorch", "onnxruntime")
    expected = torchs.calibration.scores
    assert torch.allclose(ours.calibration.scores, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
    assert fitted("auto")[1].computed == 0


def test_a_comparison_is_that_of_pytorch(photos):
    def compared(engine):
        detectors, runtime = ["NAN", "ODIN", "Views(NAN)", "KNN(k=3)"], fn.Runtime(engine=engine, progress=False)
        sets = {"id_set": ("one", photos), "ood_sets": {"other": photos}, "fit": photos}
        return fn.compare(detectors, model=scorer.model, preprocess=TRANSFORM, **sets, runtime=runtime)

    scorer = scorer_of()
    torchs, ours = compared("torch"), compared("auto")
    assert (torchs.facts, ours.facts) == ({}, {"engine": "onnxruntime"})
    assert (len(ours.results), ours.items, ours.skipped) == (4, torchs.items, torchs.skipped)
    for found, expected in zip(ours.results, torchs.results, strict=True):
        assert found.detector == expected.detector
        assert np.allclose(found.id_scores, expected.id_scores, rtol=1e-3)
    maps = fn.FeatureTap(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 1)), per="position")
    sets = {"id_set": photos, "ood_sets": {"other": photos}, "runtime": fn.Runtime(engine="onnx", progress=False)}
    with pytest.raises(EngineError, match="its features are of each position"):
        fn.compare(["MSP"], model=maps, preprocess=TRANSFORM, **sets)


def test_infinite_scores_are_equal():
    one = torch.tensor([1.0, -torch.inf, 2.0])
    assert relative_gap(one, one) == 0
    assert relative_gap(torch.tensor([-torch.inf]), torch.tensor([-torch.inf])) == 0
    assert relative_gap(one, torch.tensor([1.0, 5.0, 2.0])) == torch.inf
