"""What the constructors take, and what every detector does with what is no `Features`."""

import inspect
import math
from fractions import Fraction

import numpy as np
import pytest
import torch

import featnorm as fn
from featnorm.detectors import Detector
from references import OWN

_DETECTORS = {name: kind for name, kind in OWN.items() if not kind.operator}
INNER = "detector"  # the argument of a wrapper that is no setting
#: For every setting: good values with what is kept of them, and bad ones beside those that no setting takes.
GOOD = {
    ("LpNorm", "p"): [(3, 3), (0.5, 0.5), (math.inf, math.inf), (np.float32(0.5), 0.5), (np.int64(3), 3)],
    ("SSD", "clusters"): [(2, 2), (np.int64(2), 2), (torch.tensor(2), 2), ("labels", "labels")],
    ("KNN", "k"): [(5, 5), (np.int64(5), 5), (np.uint8(5), 5), (torch.tensor(5), 5), (np.array(5), 5)],
    ("KNN", "squared"): [(False, False), (np.False_, False), (torch.tensor(False), False)],
    ("KNN", "recall"): [(0.75, 0.75), (np.float64(0.75), 0.75), (torch.tensor(0.75), 0.75), (None, None)],
    ("OneClassSVM", "nu"): [(0.25, 0.25), (np.float32(0.25), 0.25)],
    ("Residual", "dim"): [(3, 3), (np.int32(3), 3), (None, None)],
    ("ViM", "dim"): [(3, 3), (np.int32(3), 3), (None, None)],
    ("ReAct", "percentile"): [(80, 80), (np.float64(80.5), 80.5), (torch.tensor(80), 80)],
    ("ODIN", "temperature"): [(10, 10), (np.float64(0.5), 0.5)],
    ("ODIN", "eps"): [(0, 0), (np.float64(0.5), 0.5)],
    ("ODIN", "std"): [
        ([0.5, 1], (0.5, 1)),
        (np.array([0.5, 1.0]), (0.5, 1.0)),
        (torch.tensor([0.5, 1.0]), (0.5, 1.0)),
        (None, None),
    ],
    ("Views", "shift"): [(0.25, 0.25), (np.float32(0.25), 0.25)],
    ("CSI", "augmentations"): [(3, 3), (np.int64(3), 3)],
    ("CSI", "scale"): [(1, 1), (np.float32(0.5), 0.5)],
}
NEVER = [
    "2",
    "",
    b"2",
    -1,
    -0.5,
    math.nan,
    -math.inf,
    np.nan,
    1j,
    (),
    [2.0, "3"],
    {"k": 2},
    object(),
    int,
    torch.tensor([2.0, -1.0]),
    torch.tensor([[1]]),
    np.array([[1]]),
    torch.tensor(math.nan),
    torch.tensor(2, device="meta"),
    np.array([2, 0]),
    fn.NAN(),
]
ALSO_BAD = {
    ("LpNorm", "p"): [0, None, True, np.True_, 10**400, Fraction(10**400), torch.tensor([5])],
    ("SSD", "clusters"): [0, 1.5, 2.0, None, True, np.True_, torch.tensor(True), math.inf, "classes"],
    ("KNN", "k"): [
        0,
        torch.tensor([5]),
        np.array([5]),
        2.0,
        np.float64(2),
        None,
        True,
        np.True_,
        torch.tensor(True),
        math.inf,
    ],
    ("KNN", "squared"): [0, 1, None, np.int64(1), math.inf],
    ("KNN", "recall"): [0, 1, 1.0, True, math.inf],
    ("OneClassSVM", "nu"): [0, 1, None, True, math.inf],
    ("Residual", "dim"): [0, 2.5, True, math.inf],
    ("ViM", "dim"): [0, 2.5, True, math.inf],
    ("ReAct", "percentile"): [0, 100, None, True, math.inf],
    ("ODIN", "temperature"): [0, None, True, math.inf],
    ("ODIN", "eps"): [None, True, math.inf],
    ("ODIN", "std"): [0, 0.5, True, [0.5, True], [0.5, 0], [0.5, math.inf]],
    ("Views", "shift"): [0, 1, None, True, math.inf],
    ("CSI", "augmentations"): [0, 2.0, None, True, math.inf],
    ("CSI", "scale"): [0, 1.5, None, True, math.inf],
}


def make(name, **settings):
    kind = _DETECTORS[name]
    inner = [fn.NAN()] if INNER in inspect.signature(kind).parameters else []
    return kind(*inner, **settings)


def test_every_constructor_argument_is_a_row_of_a_table():
    found = {
        (name, parameter)
        for name, kind in _DETECTORS.items()
        for parameter in inspect.signature(kind).parameters
        if parameter != INNER
    }
    tables = {(name, setting) for name, kind in _DETECTORS.items() for setting in kind.settings}
    assert found == tables == set(GOOD) == set(ALSO_BAD)


@pytest.mark.parametrize(("name", "setting"), GOOD, ids=[".".join(key) for key in GOOD])
def test_numbers_of_any_library_are_taken_and_kept_as_plain_ones(name, setting):
    for given, kept in GOOD[name, setting]:
        detector = make(name, **{setting: given})
        value = getattr(detector, setting)
        assert value == kept
        plain = value if isinstance(value, tuple) else (value,)
        assert {type(part) for part in plain} <= {int, float, bool, str, type(None)}
        again = fn.parse_detector(repr(detector))
        assert repr(again) == repr(detector)
        assert getattr(again, setting) == kept


@pytest.mark.parametrize(("name", "setting"), GOOD, ids=[".".join(key) for key in GOOD])
def test_bad_settings_are_refused_by_name(name, setting):
    for bad in NEVER + ALSO_BAD[name, setting]:
        with pytest.raises(ValueError, match=rf"^{name}: {setting} must be .*, got ") as refused:
            make(name, **{setting: bad})
        assert "\n" not in str(refused.value)
        assert len(str(refused.value)) < 200


@pytest.mark.parametrize("wrap", [fn.ReAct, fn.Views], ids=lambda kind: kind.__name__)
def test_a_wrapper_takes_detectors_alone(wrap):
    for wrong in ("NAN", 3, None, torch.zeros(2), torch.nn.ReLU()):
        with pytest.raises(TypeError, match=rf"{wrap.__name__} takes a detector such as NAN\(\), got "):
            wrap(wrong)
    with pytest.raises(TypeError, match=rf"{wrap.__name__} takes a detector, got the class NAN: write NAN\(\)"):
        wrap(fn.NAN)


def test_a_fusion_takes_detectors_alone():
    for pair in ((fn.KNN(), 3), ("KNN", fn.NAN()), (None, None)):
        with pytest.raises(TypeError, match=r"Fusion takes a detector such as NAN\(\), got "):
            fn.Fusion(*pair)
    with pytest.raises(TypeError, match=r"Fusion takes a detector, got the class NAN: write NAN\(\)"):
        fn.Fusion(fn.KNN(), fn.NAN)


@pytest.mark.parametrize("name", [*_DETECTORS, "KNN / NAN", "Views(ReAct(SSD / NAN))"])
@pytest.mark.parametrize("method", ["fit", "partial_fit", "score", "forward"])
def test_what_is_no_features_is_refused_with_the_way_to_make_them(name, method):
    detector = make(name) if name in _DETECTORS else fn.parse_detector(name)
    assert isinstance(detector, Detector)
    for wrong in (torch.zeros(3, 4), [torch.zeros(3, 4)], {"logits": torch.zeros(3, 4)}, None, np.zeros((3, 4))):
        with pytest.raises(
            TypeError, match=rf"takes Features, got {type(wrong).__name__}: wrap tensors in Features\(\w+=\.\.\.\)"
        ):
            getattr(detector, method)(wrong)


@pytest.mark.parametrize("wrong", [torch.zeros(2), None, "KNN(k=5)", {}])
def test_a_merge_with_what_is_no_detector_is_refused(wrong):
    with pytest.raises(TypeError, match=r"KNN\(k=5\)\.merge takes a detector such as NAN\(\), got "):
        fn.KNN(k=5).merge(wrong)


def test_an_expression_is_a_string():
    for wrong in (None, 5, fn.NAN(), ["NAN"]):
        with pytest.raises(TypeError, match=r"the expression must be a string such as .*, got "):
            fn.parse_detector(wrong)
