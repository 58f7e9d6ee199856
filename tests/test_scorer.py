"""A model, a detector and a threshold in one module, from fit to file."""

import json
import os
import pickle
import re
import struct
import sys
import threading
import types
from contextlib import suppress
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from torchvision.transforms import v2

import featnorm as fn
from detection import noise_images, tiny_detector
from featnorm import archive
from featnorm._utils.weights import single_precision
from featnorm.calibration import Calibration
from featnorm.cli.monitor import monitor
from featnorm.evaluation import standard_detectors
from featnorm.fitting import fit_source
from featnorm.inputs import ItemError, open_source
from featnorm.models import ModelError, create_model
from mutations import mutated
from tiny import make as make_tiny

CLASSES = 5


class Net(nn.Module):
    """Convolutions, batch norm, dropout, and a plain MLP head, so that every detector finds what it reads."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 12, 3, padding=1)
        self.norm = nn.BatchNorm2d(12)
        self.hidden = nn.Linear(12, 16)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x):
        pooled = torch.relu(self.norm(self.conv(x))).mean((2, 3))
        return self.head(self.dropout(torch.relu(self.hidden(pooled))))


class Cosine(Net):
    """The same with an embedding and a cosine classifier."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Linear(16, 8)
        self.prototypes = nn.Linear(8, CLASSES, bias=False)

    def forward(self, x):
        pooled = torch.relu(self.norm(self.conv(x))).mean((2, 3))
        g = nn.functional.normalize(self.embedding(torch.relu(self.hidden(pooled))))
        return g @ nn.functional.normalize(self.prototypes.weight).T / 0.1


class Functional(Net):
    """The same without a module that receives or returns its pooled feature as it is."""

    def forward(self, x):
        pooled = torch.relu(self.norm(self.conv(x))).mean((2, 3))
        return self.head(torch.relu(nn.functional.linear(pooled, self.hidden.weight, self.hidden.bias)))


def uses(path, model):
    """Open a file and use what there is in it; say how that ended, where it may."""
    try:
        scorer = fn.load(path, model=model)
    except fn.ArchiveError as error:
        assert "\n" not in str(error)  # noqa: PT017
        return "refused"
    try:
        scorer(loader(1)[0][0])
    except RuntimeError as error:
        assert "a different path than when it was traced" in str(error)  # noqa: PT017
        return "not reached"
    assert isinstance(scorer.tap.describe(), str)
    assert isinstance(repr(scorer), str)
    return "works"


def model_for(detector):
    torch.manual_seed(0)
    return Cosine() if "embedding" in detector.reads else Net()


def loader(n=4, size=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(size, 3, 6, 6, generator=generator),
            torch.randint(CLASSES, (size,), generator=generator),
        )
        for _ in range(n)
    ]


def everything(module):
    """All that a caller could see of a model."""
    return {
        "tensors": {name: value.clone() for name, value in module.state_dict().items()},
        "modes": {name: child.training for name, child in module.named_modules()},
        "hooks": {
            name: [len(value) for key, value in vars(child).items() if key.endswith("hooks")]
            for name, child in module.named_modules()
        },
        "attributes": {name: sorted(vars(child)) for name, child in module.named_modules()},
        "gradients": {name: p.grad is None and p.requires_grad for name, p in module.named_parameters()},
    }


def assert_same(before, after):
    tensors, others = before.pop("tensors"), after.pop("tensors")
    assert tensors.keys() == others.keys()
    assert all(torch.equal(tensors[name], others[name]) for name in tensors)
    assert before == after


DETECTORS = [repr(detector) for detector in standard_detectors()]


@pytest.fixture(params=DETECTORS)
def detector(request):
    return fn.parse_detector(request.param.replace("KNN()", "KNN(k=3)"))


def test_model_is_left_as_it_was(detector):
    model = model_for(detector)
    model.conv.eval()  # a mix of modes must survive too
    before = everything(model)
    random = torch.get_rng_state()
    scorer = fn.Scorer(model, detector).fit(loader()).calibrate(loader(seed=1))
    scorer(loader(1, seed=2)[0][0])
    assert torch.equal(random, torch.get_rng_state())
    assert_same(before, everything(model))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_model_is_left_as_it_was_when_it_raises(detector, error):
    model = model_for(detector)
    scorer = fn.Scorer(model, detector).fit(loader())

    def fail(*_):
        raise error("in the middle")

    handle = model.hidden.register_forward_hook(fail)
    before = everything(model)
    with pytest.raises(error, match="in the middle"):
        scorer(loader(1)[0][0])
    assert torch.is_grad_enabled()
    assert_same(before, everything(model))
    handle.remove()


def test_scores_do_not_depend_on_the_batch_or_the_mode(detector):
    model = model_for(detector)
    scorer = fn.Scorer(model, detector).fit(loader()).calibrate(loader(seed=1))
    inputs = loader(1, 8, seed=2)[0][0]
    model.train()
    together = scorer(inputs)
    model.eval()
    alone = [scorer(inputs[i : i + 1]) for i in range(len(inputs))]
    torch.testing.assert_close(together.score, torch.cat([v.score for v in alone]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(together.logits, model(inputs), rtol=1e-5, atol=1e-6)


def test_save_and_load_give_the_same_verdicts(detector, tmp_path):
    model = model_for(detector)
    scorer = fn.Scorer(model, detector).fit(loader()).calibrate(loader(seed=1), tpr=0.9)
    inputs = loader(1, seed=2)[0][0]
    scorer.save(tmp_path / "d.featnorm")
    again = fn.load(tmp_path / "d.featnorm", model=model_for(detector))
    assert again.calibration.tpr == 0.9
    for old, new in zip(scorer(inputs)[:4], again(inputs)[:4], strict=True):
        assert torch.equal(old, new)


def test_fit_in_a_stream_is_the_fit_of_the_whole(detector):
    model = model_for(detector)
    scorer = fn.Scorer(model, detector).fit(loader())
    whole = fn.parse_detector(repr(detector)).fit(scorer.tap.extract(loader(), progress=False))
    inputs = scorer.tap(loader(1, seed=2)[0][0])
    torch.testing.assert_close(detector.score(inputs), whole.score(inputs), rtol=1e-4, atol=1e-6)


def test_held_out_inputs_of_a_sum_need_no_labels():
    held_out, inputs = loader(2, seed=1), loader(1, seed=2)[0][0]
    scores = []
    for others in (held_out, [images for images, _ in held_out]):
        scorer = fn.Scorer(model_for(fn.NAN()), fn.Mahalanobis() + fn.NAN()).fit(loader(), others)
        scores.append(scorer(inputs).score)
    assert torch.equal(*scores)


def test_two_scorers_on_one_model_do_not_disturb_each_other():
    model = model_for(fn.NAN())
    inputs = loader(1, 64, seed=2)[0][0]
    react = fn.Scorer(model, fn.ReAct(fn.Energy(), percentile=10)).fit(loader())
    nan = fn.Scorer(model, fn.NAN()).fit(loader())
    expected = nan(inputs).score
    logits = model.eval()(inputs)
    clipped = react(inputs)
    assert torch.equal(clipped.logits, logits)
    assert torch.equal(model(inputs), logits)
    assert torch.equal(nan(inputs).score, expected)


def test_threads_get_their_own_verdicts():
    scorer = fn.Scorer(model_for(fn.NAN()).eval(), fn.NAN()).calibrate(loader())
    batches = [loader(1, seed=seed)[0][0] for seed in range(8)]
    expected = [scorer(batch).score for batch in batches]
    wrong = []

    def work(i):
        scores = [scorer(batches[i]).score for _ in range(30)]
        wrong.extend(score for score in scores if not torch.equal(score, expected[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_verdicts_before_calibration_are_none():
    verdict = fn.Scorer(model_for(fn.NAN()), fn.NAN())(loader(1)[0][0])
    assert verdict.p_value is None
    assert verdict.is_id is None
    assert verdict.score.shape == (32,)


def test_calibration_keeps_the_promised_share():
    scorer = fn.Scorer(model_for(fn.NAN()), fn.NAN()).calibrate(loader(40, seed=1), tpr=0.9)
    accepted = torch.cat([scorer(images).is_id for images, _ in loader(40, seed=2)])
    assert accepted.double().mean() > 0.9 - 3 * (0.1 * 0.9 * 2 / 1280) ** 0.5


def test_a_new_fit_drops_the_calibration():
    scorer = fn.Scorer(model_for(fn.KNN()), fn.KNN(k=3)).fit(loader()).calibrate(loader(seed=1))
    scorer.fit(loader(seed=3))
    assert scorer.calibration is None


def test_a_failed_fit_keeps_the_earlier_one():
    scorer = fn.Scorer(model_for(fn.KNN()), fn.KNN(k=3)).fit(loader()).calibrate(loader(seed=1))
    inputs = loader(1, seed=2)[0][0]
    before = scorer(inputs)
    bad = loader()
    bad[2][0][5, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"not finite for 1 of 32 inputs, the first at row 5"):
        scorer.fit(bad)
    for old, new in zip(before[:4], scorer(inputs)[:4], strict=True):
        assert torch.equal(old, new)


def test_a_model_without_a_hidden_layer_is_refused_with_advice():
    model = nn.Sequential(nn.Flatten(), nn.LayerNorm(108), nn.Linear(108, CLASSES))
    with pytest.raises(ValueError, match=r"NAN\(\) reads `activation`.*no rectified hidden layer.*MLP head"):
        fn.Scorer(model, fn.NAN())(loader(1)[0][0])
    fn.Scorer(model, fn.KNN(k=3)).fit(loader())


def test_an_unfitted_scorer_is_refused(tmp_path):
    scorer = fn.Scorer(model_for(fn.KNN()), fn.KNN())
    with pytest.raises(fn.NotFittedError, match="call fit"):
        scorer(loader(1)[0][0])
    with pytest.raises(fn.NotFittedError, match="call fit"):
        scorer.save(tmp_path / "d.featnorm")


def test_too_few_inputs_to_calibrate():
    scorer = fn.Scorer(model_for(fn.NAN()), fn.NAN())
    with pytest.raises(ValueError, match="19"):
        scorer.calibrate([torch.randn(18, 3, 6, 6)])


class Stream(IterableDataset):
    def __iter__(self):
        return iter([images for images, _ in loader()])


def test_a_loader_over_an_iterable_data_set():
    scorer = fn.Scorer(model_for(fn.KNN()), fn.KNN(k=3))
    scorer.fit(DataLoader(Stream(), batch_size=None)).calibrate(DataLoader(Stream(), batch_size=None))
    assert len(scorer.detector.bank.rows) == 128


def test_an_iterator_is_not_used_up_in_silence():
    scorer = fn.Scorer(model_for(fn.NAN()), fn.NAN())
    batches = iter(loader())
    scorer.fit(batches).calibrate(batches)
    assert len(scorer.calibration.scores) == 128
    with pytest.raises(ValueError, match="one pass uses up"):
        scorer.calibrate(batches)


def test_a_calibrated_scorer_is_in_its_state_dict():
    scorer = fn.Scorer(model_for(fn.KNN()), fn.KNN(k=3)).fit(loader()).calibrate(loader(seed=1), tpr=0.8)
    other = fn.Scorer(model_for(fn.KNN()), fn.KNN(k=3))
    other.load_state_dict(scorer.state_dict())
    inputs = loader(1, seed=2)[0][0]
    for old, new in zip(scorer(inputs)[:4], other(inputs)[:4], strict=True):
        assert torch.equal(old, new)


def test_labels_that_are_no_classes_are_named():
    scorer = fn.Scorer(model_for(fn.Mahalanobis()), fn.Mahalanobis())
    batches = [(images, nn.functional.one_hot(labels, CLASSES)) for images, labels in loader()]
    with pytest.raises(ValueError, match=r"`labels`: the loader's are torch.int64 of shape \(32, 5\)"):
        scorer.fit(batches)


def test_what_is_no_detector_or_no_tensor_is_named():
    model = model_for(fn.NAN())
    with pytest.raises(TypeError, match=r"a detector such as NAN\(\), got 'NAN'"):
        fn.Scorer(model, "NAN")
    with pytest.raises(TypeError, match="the batch is a list, without a tensor of inputs"):
        fn.Scorer(model, fn.NAN())([1, 2])
    with pytest.raises(TypeError, match=r"Scorer takes a detector, got the class NAN: write NAN\(\)"):
        fn.Scorer(model, fn.NAN)


@pytest.mark.parametrize("wrong", [torch.zeros(2, 4), [torch.zeros(2, 4)], {"x": 1}, None, "x", 5])
def test_a_wrong_thing_at_any_entry_is_named(wrong):
    """What is no model, no batch, no loader and no features, at every method that takes such."""
    model = model_for(fn.NAN())
    scorer = fn.Scorer(model, fn.NAN())
    learner = fn.Scorer(model, fn.KNN(k=1))
    tap = fn.FeatureTap(model)
    name = type(wrong).__name__
    for take in (fn.FeatureTap, fn.Explainer, lambda w: fn.Scorer(w, fn.NAN()), lambda w: fn.LayerTap(w, w)):
        with pytest.raises(TypeError, match=rf"the model must be a torch\.nn\.Module, got {name}"):
            take(wrong)
    with pytest.raises(TypeError, match=rf"takes Features, got {name}: wrap tensors in"):
        scorer.predict_features(wrong)
    for classifier in ((wrong, 3), wrong) if wrong is not None else ((wrong, 3),):
        with pytest.raises(TypeError, match=r"classifier must be a pair|of the classifier must be a tensor"):
            fn.Features(logits=torch.zeros(2, 4), classifier=classifier)
    with pytest.raises(TypeError, match=r"must be a sequence of Features, got|batch 0 must be Features, got"):
        fn.Features.cat(wrong)
    if not isinstance(wrong, torch.Tensor):
        for take in (scorer, tap, tap.trace, tap.hidden) if not isinstance(wrong, list) else ():
            with pytest.raises(TypeError, match=f"the batch is a {name}.*, without a tensor of inputs"):
                take(wrong)
        with pytest.raises(TypeError, match=f"the inputs must be a tensor, got {name}"):
            fn.LayerTap(model, wrong)
        for take in (fn.negative_aware_norm, fn.l1_norm, fn.l0_norm, lambda w: fn.lp_norm(w, 2)):
            with pytest.raises(TypeError, match=f"the activations must be a tensor, got {name}"):
                take(wrong)
        with pytest.raises(TypeError, match=f"activations must be a tensor, got {name}"):
            fn.ActivationStatistics().update(wrong)
    if not isinstance(wrong, str):
        opens = (fn.load, lambda w: fn.load(w, model), lambda w: archive.write(w, {}, {}))
        for take in opens:
            with pytest.raises(TypeError, match=f"the path must be a str or a Path, got {name}"):
                take(wrong)
    if wrong is None or isinstance(wrong, (int, torch.Tensor)):
        loaders = (scorer.fit, learner.fit, scorer.calibrate, tap.extract, fn.Explainer(model).fit)
        for take in loaders:
            with pytest.raises(TypeError, match=r"a tensor is not a loader|the loader must be an iterable"):
                take(wrong)


def test_a_covariance_too_large_for_its_machine_is_refused():
    wide = fn.Features(pooled=torch.randn(3, 12000))
    with pytest.raises(ValueError, match=r"12000 x 12000 need 1\.1 GiB"):
        fn.SSD().fit(wide)


class TestFile:
    @pytest.fixture
    def path(self, tmp_path):
        path = tmp_path / "d.featnorm"
        fn.Scorer(model_for(fn.NAN()), fn.NAN()).calibrate(loader()).save(path)
        return path

    def rewrite(self, path, **changes):
        tensors, header = archive.read(path)
        archive.write(path, tensors, {**header, **changes})

    def test_is_safetensors_and_json(self, path):
        assert "calibration.scores" in load_file(path)
        raw = path.read_bytes()
        header = json.loads(raw[8 : 8 + struct.unpack("<Q", raw[:8])[0]])
        assert json.loads(header["__metadata__"]["featnorm"])["detector"] == "NAN()"

    def test_other_weights_are_refused(self, path):
        model = model_for(fn.NAN())
        with torch.no_grad():
            model.head.bias[0] += 1
        with pytest.raises(fn.ArchiveError, match="other weights"):
            fn.load(path, model=model)

    def test_another_model_is_refused(self, path):
        with pytest.raises(fn.ArchiveError, match=r"a Net with .* values, but this is a Linear with"):
            fn.load(path, model=nn.Linear(3, 3))

    @pytest.mark.filterwarnings("ignore:Sparse .* tensor support is in beta state")
    @pytest.mark.parametrize("layout", ["sparse_coo", "sparse_csr", "sparse_csc", "sparse_bsr"])
    def test_a_sparse_buffer_is_part_of_the_model(self, tmp_path, layout):
        def model(value):
            places = torch.zeros(4, 4)
            places[1, 2] = value
            made = model_for(fn.NAN())
            block = {"blocksize": (2, 2)} if layout == "sparse_bsr" else {}
            made.register_buffer("adjacency", places.to_sparse(layout=getattr(torch, layout), **block))
            return made

        path = tmp_path / "d.featnorm"
        fn.Scorer(model(1.0), fn.NAN()).calibrate(loader()).save(path)
        assert fn.load(path, model=model(1.0)).calibration is not None
        with pytest.raises(fn.ArchiveError, match="other weights"):
            fn.load(path, model=model(2.0))

    def test_a_buffer_that_cannot_be_hashed_or_written_is_named(self, tmp_path):
        odd = model_for(fn.NAN())
        odd.register_buffer("packed", torch.ones(4, 4).to_mkldnn())
        with pytest.raises(ValueError, match=r"the model's packed is a tensor of layout torch\._mkldnn"):
            fn.Scorer(odd, fn.NAN()).calibrate(loader()).save(tmp_path / "d.featnorm")
        with pytest.raises(ValueError, match=r"model\.adjacency is a tensor of layout torch\.sparse_coo, which a"):
            archive.write(tmp_path / "d.featnorm", {"model.adjacency": torch.eye(3).to_sparse()}, {"model": {}})
        assert not list(tmp_path.iterdir())

    def test_a_wrapped_model_is_the_same_model(self, path):
        inputs = loader(1)[0][0]
        plain = fn.load(path, model=model_for(fn.NAN()))(inputs)
        wrapped = fn.load(path, model=nn.DataParallel(model_for(fn.NAN())))(inputs)
        assert torch.equal(plain.score, wrapped.score)

    def test_a_pickle_is_refused_and_not_run(self, tmp_path):
        class Bomb:
            def __reduce__(self):
                return (open, (str(tmp_path / "went-off"), "w"))

        path = tmp_path / "bomb.featnorm"
        path.write_bytes(pickle.dumps(Bomb()))
        with pytest.raises(fn.ArchiveError, match="not a featnorm detector file"):
            fn.load(path, model=nn.Linear(3, 3))
        assert not (tmp_path / "went-off").exists()

    def test_a_later_format_is_refused(self, path):
        self.rewrite(path, format=99)
        with pytest.raises(fn.ArchiveError, match="newer featnorm"):
            fn.load(path, model=model_for(fn.NAN()))

    @pytest.mark.parametrize(
        "changes",
        [
            {"detector": "__import__('os').system('true')"},
            {"detector": "KNN(k=3)"},
            {"tap": {}},
            {"tap": None},
            {"tpr": "much"},
            {"tpr": 7},
            {"model": None},
        ],
    )
    def test_a_damaged_header_is_refused(self, path, changes):
        self.rewrite(path, **changes)
        with pytest.raises(fn.ArchiveError, match="damaged"):
            fn.load(path, model=model_for(fn.NAN()))

    @pytest.mark.parametrize(
        ("detector", "name", "change"),
        [
            ("KNN(k=3)", "bank.rows", lambda t: t * float("nan")),
            ("KNN(k=3)", "bank.rows", lambda t: t[:0]),
            ("SSD()", "moments.shift", lambda t: t[:1]),
            ("SSD()", "moments.counts", lambda t: -t),
            ("SSD()", "moments.gram", lambda t: t[:, :2]),
            ("ReAct(NAN())", "activations.counts", lambda t: -t),
            ("ReAct(NAN())", "activations.counts", lambda t: t[:2]),
            ("ViM()", "sample.rows", lambda t: t[:, :3].contiguous()),
            ("ViM()", "sample.keys", lambda t: t[:4]),
            ("NAN() + KNN(k=3)", "constants.values", lambda t: t * float("nan")),
            ("NAN() + KNN(k=3)", "constants.values", lambda t: -t.abs()),
            ("NAN() + KNN(k=3)", "constants.values", lambda t: t[:, :1].contiguous()),
            ("NAN() + KNN(k=3)", "constants.values", lambda t: t[:0]),
            ("NAN() + KNN(k=3)", "terms.1.bank.rows", lambda t: t[:2]),
            ("TemperatureScaling(MSP())", "constants.values", lambda t: 0 * t),
            ("TemperatureScaling(MSP())", "constants.values", lambda t: t.expand(1, 2).contiguous()),
        ],
    )
    def test_what_no_fit_could_have_learned_is_refused(self, tmp_path, detector, name, change):
        path = tmp_path / "d.featnorm"
        model = model_for(fn.NAN())
        fn.Scorer(model, fn.parse_detector(detector)).fit(loader()).save(path)
        tensors, header = archive.read(path)
        tensors[f"detector.{name}"] = change(tensors[f"detector.{name}"])
        archive.write(path, tensors, header)
        with pytest.raises(fn.ArchiveError, match="damaged"):
            fn.load(path, model=model)

    @pytest.mark.parametrize(
        ("where", "value"),
        [
            (("points", "activation", "module"), "nowhere"),
            (("points", "activation", "side"), "bogus"),
            (("points",), []),
            (("weights", 1, 1), "__class__"),
        ],
    )
    def test_a_tap_that_does_not_fit_the_model_is_refused(self, path, where, value):
        _, header = archive.read(path)
        place = header["tap"]["plan"]
        for key in where[:-1]:
            place = place[key]
        place[where[-1]] = value
        self.rewrite(path, tap=header["tap"])
        with pytest.raises(fn.ArchiveError, match="damaged"):
            fn.load(path, model=model_for(fn.NAN()))

    @pytest.mark.parametrize(("what", "value"), [("call", 3), ("slot", [5]), ("module", "embedding")])
    def test_a_place_that_the_model_does_not_reach_is_blamed_on_the_file(self, path, what, value):
        _, header = archive.read(path)
        header["tap"]["plan"]["points"]["activation"][what] = value
        self.rewrite(path, tap=header["tap"])
        model = model_for(fn.NAN())
        model.embedding = nn.Identity()  # which does not run
        scorer = fn.load(path, model=model)
        said = "the file that the tap was read from is damaged or does not fit the model: fit again$"
        with pytest.raises(RuntimeError, match=said):
            scorer(loader(1)[0][0])
        scorer.tap.trace(loader(1)[0][0])
        scorer(loader(1)[0][0])

    def test_whatever_a_header_says_it_is_refused_or_works(self, path, monkeypatch):
        monkeypatch.setattr("os.fsync", lambda handle: None)
        model = Functional()
        detector = fn.parse_detector("2 * NAN() + KNN(k=3) / NAN()")
        fn.Scorer(model, detector).fit(loader()).calibrate(loader(seed=1)).save(path)
        tensors, header = archive.read(path)
        assert {point["side"] for point in header["tap"]["plan"]["points"].values()} == {"in", "out", "op"}
        header["tap"]["layer"] = "hidden"
        results = []
        for what, changed in mutated(header):
            archive.write(path, tensors, changed)
            try:
                results.append(uses(path, model))
            except BaseException as error:
                error.add_note(what)
                raise
        assert 0 < results.count("works") < 0.2 * len(results)
        # A place that is one, but not of this model, shows where the model is run.
        assert results.count("not reached") < 0.1 * len(results)

    @pytest.mark.parametrize(
        "detector", ["KNN(k=129)", "KNN(k=129) / NAN()", "Residual(dim=12)", "KNN(k=129) / ReAct(NAN())"]
    )
    def test_settings_that_do_not_fit_what_was_learned_are_refused(self, path, detector):
        model = model_for(fn.NAN())
        fitting = detector.replace("129", "3").replace("12", "3")
        fn.Scorer(model, fn.parse_detector(fitting)).fit(loader()).save(path)
        self.rewrite(path, detector=detector)
        with pytest.raises(fn.ArchiveError, match="damaged"):
            fn.load(path, model=model)

    def test_a_flipped_bit_anywhere_is_refused(self, path):
        whole = path.read_bytes()
        for place in range(0, len(whole), max(1, len(whole) // 200)):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1 :])
            with pytest.raises(fn.ArchiveError, match="damaged"):
                fn.load(path, model=model_for(fn.NAN()))

    def test_a_stranger_among_the_tensors_is_refused(self, path):
        tensors, header = archive.read(path)
        archive.write(path, {**tensors, "evil": torch.zeros(1)}, header)
        with pytest.raises(fn.ArchiveError, match="evil"):
            fn.load(path, model=model_for(fn.NAN()))

    @pytest.mark.parametrize("keep", [0, 7, 100])
    def test_a_truncated_file_is_refused(self, path, keep):
        path.write_bytes(path.read_bytes()[:keep])
        with pytest.raises(fn.ArchiveError, match="damaged"):
            fn.load(path, model=model_for(fn.NAN()))

    def test_safetensors_of_something_else_is_refused(self, tmp_path):
        save_file({"weight": torch.zeros(2)}, tmp_path / "w.safetensors")
        with pytest.raises(fn.ArchiveError, match="not a featnorm detector file"):
            fn.load(tmp_path / "w.safetensors", model=nn.Linear(3, 3))

    def test_a_missing_file(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"cannot find the detector file .*none"):
            fn.load(tmp_path / "none.featnorm", model=nn.Linear(3, 3))

    def test_a_failed_save_keeps_the_earlier_file(self, path, monkeypatch):
        before = path.read_bytes()

        def fail(*_):
            raise OSError("disk full")

        monkeypatch.setattr("safetensors.torch.save_file", fail)
        with pytest.raises(OSError, match="disk full"):
            fn.Scorer(model_for(fn.NAN()), fn.NAN()).calibrate(loader()).save(path)
        assert path.read_bytes() == before
        assert list(path.parent.iterdir()) == [path]


MODEL = "tiny:make"


def fitted(folder, cache, detector, spec=MODEL):
    source = open_source(str(folder))
    options = {"cache": cache, "runtime": fn.Runtime(progress=False, workers=0)}
    return fit_source(source, create_model(spec), detector=fn.parse_detector(detector), **options)[0]


@pytest.fixture
def quick_disk(monkeypatch):
    """Do not wait for the disk, where thousands of files are written."""

    def replace(source, target, rename=os.replace):
        # Taking the place of a file waits for the disk, too.
        Path(target).unlink(missing_ok=True)
        rename(source, target)

    monkeypatch.setattr("os.fsync", lambda handle: None)
    monkeypatch.setattr("os.replace", replace)


@pytest.fixture(scope="module")
def file(folder, cache, tmp_path_factory):
    path = tmp_path_factory.mktemp("file") / "d.featnorm"
    with pytest.MonkeyPatch.context() as patch:
        # Small, as it is written and read a thousand times.
        patch.setattr("featnorm.fitting.MAX_EXAMPLES", 12)
        fitted(folder, cache, "KNN(k=3) / NAN()").save(path, weights=True)
    return path


def pictures(n=3):
    return torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float32)


def test_a_model_with_an_expanded_buffer_is_saved_and_opened(folder, cache, file):
    assert create_model(MODEL).model.scale.stride() == (0,)
    made, opened = fitted(folder, cache, "KNN(k=3) / NAN()"), fn.load(file, model=MODEL)
    for one, other in zip(made(pictures())[:4], opened(pictures())[:4], strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("spec", [MODEL, "timm:test_resnet"])
def test_a_file_opens_under_another_default_type(folder, cache, tmp_path, spec, monkeypatch):
    own = {"model": spec} if spec == MODEL else {}
    if not own:
        # Without a download: random weights are saved, too.
        loaded = create_model(spec, pretrained=False)
        monkeypatch.setattr(f"{__name__}.create_model", lambda _: loaded)
    with single_precision():
        torch.set_default_dtype(torch.float64)
        scorer = fitted(f"{folder}[:120]", cache, "KNN(k=3) / NAN()", spec)
        scorer.save(tmp_path / "d.featnorm", weights=True)
        for default in (torch.float32, torch.float64):
            torch.set_default_dtype(default)
            again = fn.load(tmp_path / "d.featnorm", **own)
            images = torch.rand(3, *again.input_size, generator=torch.Generator().manual_seed(0)).float()
            assert again.predict_batch(images, "abc") == scorer.predict_batch(images, "abc")


def test_another_preprocess_or_model_is_named_as_it_was_given(tmp_path, monkeypatch):
    model, transform = Net().eval(), v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
    smaller = v2.Compose([v2.Resize((24, 32)), transform])
    path = tmp_path / "d.featnorm"
    fn.Scorer(model, fn.NAN(), preprocess=transform, spec="own:make").calibrate([torch.rand(40, 3, 8, 8)]).save(
        path
    )

    def refused(words, *arguments, **options):
        with pytest.raises(ValueError, match=rf"d\.featnorm was made with another {words}"):
            fn.load(path, *arguments, **options)

    def brighter(image):
        return 2 * transform(image)

    refused("preprocess than that passed here: use the same", model, preprocess=brighter)
    own = types.ModuleType("own")
    own.make = lambda: (model, transform)
    own.brighter = lambda: (model, brighter)
    own.small = lambda: (model, smaller)
    monkeypatch.setitem(sys.modules, "own", own)
    refused("preprocess than that of own:brighter: use the same", "own:brighter")
    monkeypatch.setattr(model.norm, "eps", 1.0)
    sizes = "which makes images of 3 x 24 x 32 instead of 3 x 192 x 256"
    refused(f"preprocess than that of own:small, {sizes}: use the same", "own:small")
    refused("model or preprocess than own:make: the weights are the same", "own:make")
    refused("model or preprocess than the Net passed here: the weights", model, preprocess=transform)


def test_a_calibration_on_the_inputs_of_the_fit_warns(recwarn):
    images = torch.rand(60, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    scorer = fn.Scorer(Net(), fn.KNN(k=1)).fit(images[:40].split(8))
    scorer.calibrate([images[20:]])
    scorer.calibrate([images[40:]], update=True)
    one_hot = torch.eye(40).unflatten(1, (1, 40))
    fn.Scorer(nn.Flatten(), fn.KNN(k=1)).fit([one_hot[torch.arange(40) // 2]]).calibrate([one_hot])
    assert not recwarn.list
    with pytest.warns(
        UserWarning, match="^these are the 40 inputs that the detector was fitted to, .* is flagged$"
    ):
        scorer.calibrate(images[:40].flip(0).split(16))


def test_reprs_are_one_line():
    scorer, images = fn.Scorer(Net(), fn.NAN()), torch.rand(40, 3, 8, 8)
    assert repr(scorer) == "Scorer(Net, NAN(), not calibrated)"
    assert re.fullmatch(r"Verdict\(2 inputs, not calibrated; score=\[[\d.]+, [\d.]+\]\)", repr(scorer(images[:2])))
    scorer.calibrate([images])
    assert repr(scorer) == "Scorer(Net, NAN(), tpr=0.95, calibrated on 40 scores)"
    words = r"Verdict\(40 inputs, 1 flagged as OOD; score=\[[\d., ]+, \.\.\.\], p_value=\[[\d., ]+, \.\.\.\]\)"
    assert re.fullmatch(words, repr(scorer(images)))


def test_an_array_of_another_width_is_one_error():
    scorer = fn.fit(np.random.default_rng(0).normal(size=(40, 6)), detector="KNN(k=1)")
    for rows in (np.zeros((9, 4)), torch.zeros(9, 4)):
        with pytest.raises(ValueError, match="the array has 4 columns, and vectors of 6 numbers are needed"):
            scorer.predict(rows)
    assert scorer.predict(np.zeros((0, 6))) == []
    assert [one.error is None for one in scorer.predict([[0.0] * 6, [0.0] * 4])] == [True, False]
    with pytest.raises(
        ValueError, match=r"KLUniform\(\) needs a classifier, .* use head='train' \(--head train\)"
    ):
        fn.fit(np.random.default_rng(0).normal(size=(40, 6)), detector="KLUniform()")


def usable(path):
    """Open a file and use all that there is in it."""
    scorer = fn.load(path, model=MODEL)
    judged = scorer.predict_batch(pictures(), "abc", explain=[0, 1, 2], heat=True)
    for verdict in judged:
        assert (verdict.predicted is None) == (scorer.classes is None)
        assert verdict.why.sentence
        assert (verdict.why.heat is None) == bool(verdict.why.no_heat)
        for neighbor in verdict.why.nearest:
            with suppress(ItemError):
                assert max(neighbor.image().size) <= 64
    assert scorer.tap.describe()
    assert all(isinstance(text, str) for pair in scorer.facts.items() for text in pair)


def opens(use, what):
    """Tell whether a file is used without an error; one is a line that says that the file is at fault."""
    try:
        use()
    except (archive.ArchiveError, ModelError) as error:
        words = str(error)
    except BaseException as error:
        error.add_note(what)
        raise
    else:
        return True
    assert "\n" not in words, what
    return False


@pytest.mark.slow
@pytest.mark.usefixtures("quick_disk")
def test_whatever_a_header_says_a_file_with_its_model_is_refused_or_works(file, tmp_path):
    tensors, header = archive.read(file)
    path = tmp_path / "d.featnorm"
    opened = []
    for what, changed in mutated(header):
        archive.write(path, tensors, changed)
        opened.append(opens(lambda: usable(path), what))
    # What is read by people alone may be anything.
    assert 0 < sum(opened) < 0.2 * len(opened)


@pytest.mark.usefixtures("quick_disk")
def test_whatever_a_header_says_monitor_refuses_or_reads_it(file, tmp_path):
    tensors, header = archive.read(file)
    path = tmp_path / "d.featnorm"
    lowest = 1 / (len(tensors[archive.CALIBRATION]) + 1)
    (tmp_path / "t.csv").write_text(f"path,score,p_value\na,-inf,{lowest}\n")
    for what, changed in mutated({"tpr": header["tpr"], "model": header["model"]}):
        archive.write(path, tensors, changed)
        opens(lambda: monitor(path, tmp_path / "t.csv"), what)


@pytest.mark.usefixtures("quick_disk")
def test_whatever_a_tensor_is_a_file_with_its_model_is_refused_or_works(file, tmp_path):
    tensors, header = archive.read(file)
    path = tmp_path / "d.featnorm"
    for name, tensor in tensors.items():
        for what, changed in changes(tensor).items():
            others = {key: value for key, value in tensors.items() if key != name}
            archive.write(path, others if changed is None else {**others, name: changed}, header)
            opens(lambda: usable(path), f"{name}: {what}")


def changes(tensor):
    made = {
        "none": None,
        "empty": tensor.new_empty(0, *tensor.shape[1:]),
        "one more dimension": tensor[None],
        "flat": tensor.reshape(-1),
        "as integers": tensor.to(torch.int64),
        "as booleans": tensor.bool(),
        "in half precision": tensor.half(),
        "negative": -tensor,
        "huge": torch.full_like(tensor, 255 if tensor.dtype == torch.uint8 else torch.finfo(torch.float16).max),
    }
    if tensor.is_floating_point():
        made["NaN"] = tensor * float("nan")
        made["infinite"] = torch.full_like(tensor, float("inf"))
    return made


def test_a_model_that_is_trained_further_is_noticed_when_it_is_saved(tmp_path):
    for detector in (fn.NAN(), fn.KNN(k=3)):
        model = model_for(detector)
        scorer = fn.Scorer(model, detector).fit(loader()).calibrate(loader(seed=1))
        scorer.save(tmp_path / "d.featnorm")
        before = (tmp_path / "d.featnorm").read_bytes()
        with torch.no_grad():
            next(model.parameters()).mul_(1.01)
        changed = "weights or their precision have changed since the detector was fitted"
        with pytest.raises(ValueError, match=changed):
            scorer.save(tmp_path / "d.featnorm")
        images = next(iter(loader()))[0]
        for predict in (scorer, lambda x, scorer=scorer: scorer.predict_batch(x, range(len(x)))):
            with pytest.raises(ValueError, match=changed):
                predict(images)
        if detector.needs_fit:
            with pytest.raises(ValueError, match=changed):
                scorer.calibrate(loader(seed=1))
        assert (tmp_path / "d.featnorm").read_bytes() == before
        scorer.fit(loader()).calibrate(loader(seed=1)).save(tmp_path / "d.featnorm")
        parameter = next(model.parameters())
        parameter.data = parameter.data.clone()  # elsewhere, and the same
        scorer(images)
        model.norm.running_mean = model.norm.running_mean + 1
        with pytest.raises(ValueError, match=changed):
            scorer(images)


@pytest.mark.parametrize("by", ["class", "folder"])
def test_thresholds_by_group(tmp_path, by):
    model = model_for(fn.Energy())
    scorer = fn.Scorer(model, fn.Energy(), thresholds_by=by)
    known = torch.cat([inputs for inputs, _ in loader(20, seed=1)])
    classes = scorer(known).logits.argmax(1)
    names = [f"class {k}" for k in classes.tolist()] if by == "class" else ["ab"[i % 2] for i in range(len(known))]
    given = None if by == "class" else names
    if by == "folder":
        with pytest.raises(ValueError, match="has thresholds by 'folder': pass the group of each input"):
            scorer.calibrate([known])
    scorer.calibrate([known], tpr=0.9, groups=given)
    alone = fn.Calibration(scorer(known, given).score, 0.9, names, scorer.calibration.group_names)
    verdict = scorer(known, given)
    p_values, is_id = alone.predict(verdict.score, names)
    assert torch.equal(verdict.p_value, p_values)
    assert torch.equal(verdict.is_id, is_id)
    scorer.save(tmp_path / "d.featnorm")
    again = fn.load(tmp_path / "d.featnorm", model)
    other = fn.Scorer(model, fn.Energy(), thresholds_by=by)
    other.load_state_dict(scorer.state_dict())
    for restored in (again, other, scorer.set_tpr(0.9)):
        for one, two in zip(restored(known, given)[:4], verdict[:4], strict=True):
            assert torch.equal(one, two)
    judged = again.predict(list(known[:5]), groups=given and given[:5])
    assert [one.group for one in judged] == names[:5]
    again.calibrate([known], groups=given, update=True)
    assert len(again.calibration.scores) == 2 * len(known)
    assert again.calibration.tpr == 0.9
    if by == "folder":
        with pytest.raises(ValueError, match="'c'"):
            scorer(known[:2], ["a", "c"])
        with pytest.raises(ValueError, match="groups"):
            scorer(known[:2])
    with pytest.raises(ValueError, match="there is no calibration to update"):
        fn.Scorer(model, fn.Energy()).calibrate([known], update=True)


class MapNet(nn.Module):
    """Maps of half the size of the images, interpolated to their size."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Sequential(nn.Conv2d(3, 12, 3, stride=2, padding=1), nn.ReLU())
        self.head = nn.Conv2d(12, CLASSES, 1)

    def forward(self, x):
        return nn.functional.interpolate(self.head(self.trunk(x)), x.shape[2:], mode="bilinear")


@pytest.mark.parametrize("detector", ["NAN", "KLUniform", "SSD", "KNN(k=3)", "Mahalanobis", "KLUniform+KNN(k=3)"])
def test_positions_have_verdicts_and_images_too(detector, tmp_path):
    images, masks = torch.rand(60, 3, 12, 8), torch.randint(CLASSES, (60, 12, 8))
    scorer = fn.Scorer(MapNet(), fn.parse_detector(detector), per="position")
    scorer.fit([(images[:30], masks[:30])], progress=False).calibrate(images[30:].split(7), progress=False)
    verdict = scorer(images[:4])
    assert verdict.score.shape == verdict.p_value.shape == verdict.is_id.shape == (4 * 6 * 4,)
    assert (verdict.parts.count, verdict.parts.grid) == (4, (6, 4))
    lowest = verdict.score.double().reshape(4, 24).sort(1).values[:, :2].mean(1)
    torch.testing.assert_close(verdict.units.score, lowest)
    assert verdict.units.is_id.shape == (4,)
    # No image depends on the others of its batch.
    torch.testing.assert_close(scorer(images[2:3]).score, verdict.score[48:72], rtol=1e-4, atol=1e-4)
    scorer.save(tmp_path / "s.featnorm")
    loaded = fn.load(tmp_path / "s.featnorm", MapNet())
    torch.testing.assert_close(loaded(images[:4]).p_value, verdict.p_value)
    # Images of another size have other maps.
    assert loaded(torch.rand(2, 3, 20, 8)).parts.grid == (10, 4)


def test_items_of_a_scorer_of_positions_have_a_share_of_flagged_ones():
    def to_tensor(image):
        return torch.from_numpy(np.array(image)).movedim(2, 0) / 255

    images = np.random.default_rng(0).integers(0, 256, (40, 12, 8, 3), np.uint8)
    scorer = fn.Scorer(MapNet(), fn.NAN(), per="position", preprocess=to_tensor)
    (before,) = scorer.predict(list(images[:1]))
    assert before.parts.p_value is before.flagged_share is before.is_id is None
    scorer.calibrate([torch.stack([to_tensor(image) for image in images])], tpr=0.8)
    found = scorer.predict([*images[:3], images[0][:8]])
    whole = scorer(torch.stack([to_tensor(image) for image in images[:3]]))
    assert [verdict.score for verdict in found[:3]] == pytest.approx(whole.units.score.tolist())
    assert [verdict.is_id for verdict in found[:3]] == whole.units.is_id.tolist()
    shares = 1 - whole.is_id.double().reshape(3, -1).mean(1)
    assert [verdict.flagged_share for verdict in found[:3]] == pytest.approx(shares.tolist())
    assert found[3].parts.parts.grid == (4, 4)
    assert repr(found[3]).endswith(f"flagged_share={found[3].flagged_share!r}, parts=<16 verdicts>)")
    torch.testing.assert_close(found[0].parts.p_value, whole.p_value[:24])
    assert not scorer.explains
    with pytest.raises(ValueError, match="thresholds_by is for a scorer per input"):
        fn.Scorer(MapNet(), fn.NAN(), per="position", thresholds_by="class")
    with pytest.raises(
        ValueError, match=r"ODIN\(\) runs the model on changed inputs, which is possible per input"
    ):
        fn.Scorer(MapNet(), fn.ODIN(), per="position").calibrate([torch.rand(30, 3, 12, 8)])
    with pytest.raises(ValueError, match="calibrated on parts"):
        scorer.export("x.onnx")


def test_the_share_of_flagged_positions_of_new_images_is_as_promised():
    """Positions of an image resemble each other: that they are independent would promise a range that is wrong."""
    generator = torch.Generator().manual_seed(0)
    net = MapNet()

    def drawn(count):
        # The brightness of an image shifts the scores of all of its positions.
        light = 2 * torch.rand(count, 1, 1, 1, generator=generator) ** 3
        return light + 0.05 * torch.rand(count, 3, 8, 8, generator=generator)

    shares, images, claimed = [], [], []
    for _ in range(150):
        calibrates, new = drawn(19), drawn(60)
        scorer = fn.Scorer(net, fn.L1Norm(), per="position").calibrate([calibrates], progress=False)
        verdict = scorer(new)
        shares.append(1 - verdict.is_id.double().mean())
        images.append(1 - verdict.units.is_id.double().mean())
        pooled = Calibration(scorer.detector.score(scorer.tap(calibrates)))
        low, high = pooled.false_alarm_range(0.9)
        flagged = float((~pooled.is_id(verdict.score)).double().mean())
        claimed.append(low <= flagged <= high)
    shares, images = torch.stack(shares), torch.stack(images)
    assert shares.mean() <= 0.05 + 4 * shares.std() / 150**0.5
    assert images.mean() <= 0.05 + 4 * images.std() / 150**0.5
    # The 90 % range that 304 independent positions would give holds for far fewer calibration sets.
    assert sum(claimed) < 0.6 * 150


@pytest.fixture
def watcher():
    model, preprocess = make_tiny()
    return fn.Scorer(model.eval(), fn.NAN(), preprocess=preprocess)


def test_a_stream_is_scored_frame_by_frame_as_it_comes(watcher):
    frames = torch.randint(0, 256, (7, 24, 32, 3), dtype=torch.uint8).numpy()
    taken = []

    def camera():
        for i in range(10**9):
            taken.append(i)
            yield frames[i % 7]

    stream = watcher.watch(camera())
    verdicts = list(islice(stream, 9))
    assert taken == list(range(9))
    expected = [one.score for one in watcher.predict(list(frames))]
    assert [one.score for one in verdicts] == pytest.approx([*expected, *expected[:2]])
    assert [one.item for one in verdicts] == [f"frame {i}" for i in range(9)]
    times = [one.time for one in verdicts]
    assert times[0] == 0
    assert times == sorted(times)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_frames_of_a_stream_are_what_predict_takes_and_what_pyav_decodes(watcher, tmp_path, batch_size):
    av = pytest.importorskip("av", reason="PyAV is not installed")
    from clips import write_clip

    path = write_clip(tmp_path / "clip.mkv", 25, fps=10)
    scored = next(iter(watcher.stream(open_source(str(path), fps=0))))
    with av.open(str(path)) as pipe:
        watched = list(watcher.watch(pipe.decode(video=0), batch_size=batch_size))
    assert [one.time for one in watched] == pytest.approx([i / 10 for i in range(25)])
    assert [one.time for one in watched] == pytest.approx([one.time for one in scored])
    assert [one.score for one in watched] == pytest.approx([one.score for one in scored])
    with av.open(str(path)) as pipe:
        some = list(watcher.watch(pipe.decode(video=0), fps=2, batch_size=batch_size))
    assert [one.item for one in some] == [f"frame {i}" for i in range(0, 25, 5)]
    image = Image.fromarray(torch.zeros(8, 8, 3, dtype=torch.uint8).numpy())
    mixed = list(watcher.watch([image, torch.zeros(3, 8, 8), image.resize((1, 900))], batch_size=batch_size))
    assert mixed[0].score == pytest.approx(mixed[1].score)
    assert "too narrow" in mixed[2].error


def test_frames_with_rounded_stamps_and_streams_that_start_again_are_watched(watcher):
    class Frame(np.ndarray):
        time = None

    def frame(moment):
        made = np.zeros((8, 8, 3), np.uint8).view(Frame)
        made.time = moment
        return made

    rounded = [frame(round(i / 30, 3)) for i in range(300)]
    assert len(list(watcher.watch(rounded, fps=30))) == 300
    twice = [frame(i / 30) for i in range(60)] * 2
    assert len(list(watcher.watch(twice, fps=5))) == 20


def test_a_stream_that_cannot_be_watched_is_named_at_once(watcher):
    with pytest.raises(ValueError, match="fps and batch_size must be positive, got 0 and 1"):
        watcher.watch([], fps=0)
    with pytest.raises(ValueError, match="fps and batch_size must be positive, got None and 0"):
        watcher.watch([], batch_size=0)
    with pytest.raises(TypeError, match="frame 0 is of type int: expected a path, a PIL image"):
        list(watcher.watch([5]))
    assert list(watcher.watch([])) == []


def test_boxes_have_verdicts_and_images_too(tmp_path):
    model = tiny_detector()
    images = [noise_images(8, seed) for seed in range(9)]
    targets = [
        {"boxes": one["boxes"].detach(), "labels": one["labels"]} for batch in images for one in model(batch)
    ]
    labeled = [(batch, targets[8 * i : 8 * i + 8]) for i, batch in enumerate(images)]
    scorer = fn.Scorer(model, fn.Mahalanobis(), per="box", classes=["background", "a", "b", "c"])
    scorer.fit(labeled[:5], progress=False).calibrate(images[5:], progress=False)
    verdict = scorer(images[0])
    boxes = verdict.parts.boxes
    assert len(verdict.score) == len(verdict.p_value) == len(boxes.corners) > 8
    lowest = [verdict.score[verdict.parts.owners == i].min() for i in range(8)]
    torch.testing.assert_close(verdict.units.score, torch.stack(lowest).double())
    found = scorer.predict(images[0])
    assert [len(item.boxes) for item in found] == torch.bincount(verdict.parts.owners, minlength=8).tolist()
    box = found[0].boxes[0]
    assert box.corners == pytest.approx(boxes.corners[0].tolist(), abs=1e-3)
    assert box.label == "abc"[int(boxes.labels[0]) - 1]
    assert (box.confidence, box.score) == pytest.approx((float(boxes.confidence[0]), float(verdict.score[0])))
    scorer.save(tmp_path / "s.featnorm")
    loaded = fn.load(tmp_path / "s.featnorm", model)
    torch.testing.assert_close(loaded(images[0]).p_value, verdict.p_value)
    model.roi_heads.score_thresh = 1.0
    (nothing,) = scorer.predict(images[0][:1])
    assert (nothing.boxes, nothing.is_id, nothing.p_value, nothing.flagged_share) == ((), True, 1.0, 0.0)
    with pytest.raises(ValueError, match="there is no box in the calibration inputs"):
        scorer.calibrate(images[5:], progress=False)


def test_boxes_are_found_in_images_of_any_size(tmp_path):
    model = tiny_detector()
    scorer = fn.Scorer(model, fn.NAN(), per="box", preprocess=to_pixels).calibrate(
        [noise_images(30)], progress=False
    )
    pictures = [np.full(shape, 90, np.uint8) for shape in ((40, 60, 3), (64, 50, 3))]
    assert [verdict.error for verdict in scorer.predict(pictures)] == [None, None]
    scorer.save(tmp_path / "s.featnorm", weights=True)
    assert fn.load(tmp_path / "s.featnorm", model, preprocess=to_pixels).preprocess.transform is to_pixels
    with pytest.raises(ValueError, match="boxes are found in images, and the preprocess takes texts"):
        fn.Scorer(model, fn.NAN(), per="box", preprocess=to_pixels, kind="texts")
    scorer.classes = ["a", "b"]
    with pytest.raises(ValueError, match="there are 2 class names, but the model has 4 logits"):
        scorer.predict(noise_images(2))


def to_pixels(image):
    return torch.from_numpy(np.array(image)).movedim(2, 0) / 255


class Scaled(fn.Scorer):
    """A scorer that changes its inputs first."""

    def forward(self, inputs, groups=None):
        return super().forward(inputs / 10, groups)


def test_a_subclass_changes_the_inputs_once():
    images = torch.randn(64, 3, 6, 6)
    model = Net().eval()
    scaled = Scaled(model, fn.NAN()).calibrate([images], progress=False)
    expected = fn.Scorer(model, fn.NAN())(images / 10).score
    torch.testing.assert_close(scaled(images).score, expected)
    with torch.no_grad():
        torch.testing.assert_close(scaled(images).score, expected)


class Stateful(Net):
    """A model with a state that is not a tensor."""

    def get_extra_state(self):
        return {"version": 1}

    def set_extra_state(self, state):
        pass


def test_extra_state_that_is_a_tensor_in_the_file_alone(tmp_path, monkeypatch):
    model = Stateful().eval()
    monkeypatch.setattr(Stateful, "get_extra_state", lambda module: torch.ones(1))
    fn.Scorer(model, fn.NAN()).calibrate([torch.randn(64, 3, 6, 6)], progress=False).save(
        tmp_path / "s.featnorm", weights=True
    )
    monkeypatch.undo()
    with pytest.raises(archive.ArchiveError, match="a Stateful with 679 values, but this is a Stateful with 678"):
        fn.load(tmp_path / "s.featnorm", model)


def test_extra_state_of_a_wrong_model_is_not_taken_for_a_tensor(tmp_path):
    fn.Scorer(Net().eval(), fn.NAN()).calibrate([torch.randn(64, 3, 6, 6)], progress=False).save(
        tmp_path / "s.featnorm", weights=True
    )
    model = Stateful().eval()
    with pytest.raises(archive.ArchiveError, match=r'Stateful: .*Missing key.* "_extra_state"; pass the model'):
        fn.load(tmp_path / "s.featnorm", model)
    model.head = nn.Linear(16, 2)
    with pytest.raises(
        archive.ArchiveError, match=r"head.bias is of shape \(5,\) in the file and of shape \(2,\) in the model"
    ):
        fn.load(tmp_path / "s.featnorm", model)
