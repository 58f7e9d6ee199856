"""The registry: which classes are in it, and that a user's own class is a detector like any other."""

import importlib
import sys

import pytest
import torch
from torch import nn

import featnorm as fn
from featnorm.detectors import base
from featnorm.detectors.base import Wrapper
from featnorm.evaluation import standard_detectors
from references import OWN, TEST, TRAIN

MODULE = """
import featnorm as fn
from featnorm.detectors.statistics import Total

class Spread(fn.Detector):
    reads = ("logits",)
    learns = ("logits",)

    def __init__(self, power=1.0, sign=-1):
        super().__init__()
        self.power, self.sign = power, sign
        self.total = Total()

    def _partial_fit(self, features):
        self.total.update(features.tensor("logits").std(1))

    def _score(self, features):
        return (features.tensor("logits").std(1) / self.total.mean()) ** self.power * -self.sign
"""


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    """What a test registers is forgotten after it."""
    monkeypatch.setattr(base, "_REGISTRY", dict(base._REGISTRY))


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    (tmp_path / "users_detectors.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("users_detectors")
    del sys.modules["users_detectors"]


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))


def test_every_detector_says_what_the_registry_needs():
    for name, kind in OWN.items():
        assert kind.source, name
        assert kind.cost, name
        assert kind.formula, name
        left_aside = bool(kind.network) or kind is fn.Jackknife  # a calibration of any detector
        assert bool(kind.standard) != left_aside, f"{name} is compared, or needs a special network"
        for expression in kind.standard:
            assert kind in {type(module) for module in fn.parse_detector(expression).modules()}


def test_the_standard_comparison_is_every_detector_but_those_for_special_networks():
    found = {type(module).__name__ for detector in standard_detectors() for module in detector.modules()}
    assert found & set(OWN) == set(OWN) - {"CSI", "RotNet", "Jackknife"}
    assert {repr(detector) for detector in standard_detectors()} >= {
        "KNN() / NAN()",
        "SSD() / NAN()",
        "ReAct(NAN())",
    }


def test_abstract_bases_are_not_registered():
    assert not {"Detector", "Wrapper", "_Norm", "_Confidence", "_SubspaceDetector"} & set(
        fn.registered_detectors()
    )


def test_a_class_can_be_left_unregistered():
    class Part(fn.MSP, registered=False):
        pass

    assert "Part" not in fn.registered_detectors()
    assert repr(Part()) == "Part()"
    for module, name in {"cluster.bank": "ShardedKNN", "paper.studies.imagenet": "PooledReAct"}.items():
        assert hasattr(importlib.import_module(f"featnorm.{module}"), name)
        assert name not in fn.registered_detectors()


def test_a_users_detector_works_in_expressions(user_module):
    detector = fn.parse_detector("ReAct(Spread(power=2.0), percentile=85)").fit(TRAIN)
    assert isinstance(detector.detector, user_module.Spread)
    assert detector.score(TEST).shape == (40,)
    assert repr(fn.parse_detector("Spread(-0.5, sign=-inf)")) == "Spread(power=-0.5, sign=-inf)"


def test_a_users_detector_is_saved_and_loaded(user_module, tmp_path, monkeypatch):
    net, inputs = model(), torch.randn(64, 5)
    scorer = fn.Scorer(net, user_module.Spread(power=0.5)).fit([inputs]).calibrate([inputs])
    scorer.save(tmp_path / "d.featnorm")
    loaded = fn.load(tmp_path / "d.featnorm", model=net)
    assert loaded.detector.power == 0.5
    assert torch.equal(loaded(inputs).p_value, scorer(inputs).p_value)

    monkeypatch.delitem(base._REGISTRY, "Spread")
    with pytest.raises(fn.ArchiveError, match=r"d\.featnorm needs the detector class Spread, .* import the mod"):
        fn.load(tmp_path / "d.featnorm", model=net)
    importlib.reload(user_module)
    assert torch.equal(fn.load(tmp_path / "d.featnorm", model=net)(inputs).score, scorer(inputs).score)


@pytest.mark.parametrize("setting", [[1, 2], {"a": 1}, torch.ones(2), "x" * 500])
def test_a_detector_that_could_not_be_loaded_is_not_saved(user_module, tmp_path, setting):
    net, inputs = model(), torch.randn(64, 5)
    detector = user_module.Spread()
    scorer = fn.Scorer(net, detector).fit([inputs])
    detector.sign = setting
    with pytest.raises(ValueError, match=r"cannot be saved: this expression does not make it again"):
        scorer.save(tmp_path / "d.featnorm")
    assert not (tmp_path / "d.featnorm").exists()


def test_a_class_that_is_defined_again_takes_the_place_of_the_first(user_module):
    first = user_module.Spread
    again = importlib.reload(user_module).Spread
    assert first is not again
    assert type(fn.parse_detector("Spread")) is again
    scope = {"fn": fn, "__name__": "__main__"}  # as in two cells of a notebook
    for value in (1, 2):
        exec(f"class Cell(fn.MSP):\n    value = {value}", scope)
    assert fn.parse_detector("Cell").value == 2


def test_two_classes_of_one_name_are_an_error(user_module):
    with pytest.raises(TypeError, match=r"there is a detector KNN already, featnorm\.detectors\.neighbors\.KNN"):

        class KNN(fn.MSP):
            pass

    with pytest.raises(TypeError, match=r"users_detectors\.Spread: give .*<locals>\.Spread another name"):

        class Spread(fn.MSP):
            pass

    assert type(fn.parse_detector("KNN")) is fn.KNN


@pytest.mark.parametrize("fields", ["logits", ["logits"], ("logit",), ("logits", 3)])
@pytest.mark.parametrize("attribute", ["reads", "learns"])
def test_fields_that_are_none_are_an_error_when_the_class_is_defined(attribute, fields):
    with pytest.raises(TypeError, match=rf"^Wrong\.{attribute} must be a tuple of .*logits.*, got "):
        type("Wrong", (fn.MSP,), {attribute: fields})
    assert "Wrong" not in fn.registered_detectors()


def test_a_wrapper_of_the_users_own_delegates_to_the_detectors_inside():
    class Added(Wrapper):
        def __init__(self, first, second):
            super().__init__()
            self._wrap(first=first, second=second)

        def _score(self, features):
            return self.first.score(features) + self.second.score(features)

    detector = fn.parse_detector("Added(Mahalanobis(), Views(Energy()))")
    assert detector.reads == ("pooled", "logits")
    assert detector.learns == ("pooled", "labels")
    assert detector.needs_model
    assert not detector.is_fitted
    with pytest.raises(ValueError, match="`labels`"):
        detector.fit(TRAIN.replace(labels=None))
    both = Added(fn.KNN(k=3), fn.Energy()).fit(TRAIN)
    assert both.is_fitted
    torch.testing.assert_close(both.score(TEST), fn.KNN(k=3).fit(TRAIN).score(TEST) + fn.Energy().score(TEST))
    with pytest.raises(TypeError, match=r"Added takes a detector such as NAN\(\), got 3"):
        Added(fn.NAN(), 3)


def test_a_wrapper_asks_the_detectors_inside_whether_they_are_fitted():
    class Never(fn.MSP):
        is_fitted = False

    assert not fn.Views(Never()).is_fitted
