"""Which arguments constructors accept, and the errors for anything but `Features`."""

import inspect
import math
from fractions import Fraction

import numpy as np
import pytest
import torch

import featnorm as fn
from featnorm._utils.checks import Choice, Either, Integer, Interval, SequenceOf
from featnorm.detectors import Detector
from references import OWN

NAMED = {name: kind for name, kind in OWN.items() if not kind.operator}
INNER = "detector"  # the argument of a wrapper that is no setting
SETTINGS = {(name, setting): rule for name, kind in NAMED.items() for setting, rule in kind.settings.items()}
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


def good(rule):
    """Values that a constraint allows, with what is kept of each: its ends, and numbers of every library."""
    match rule:
        case Either(first, second):
            return good(first) + good(second)
        case Integer(least):
            makers = int, np.int64, np.uint8, np.int32, torch.tensor, np.array
            return [(make(least + i), least + i) for i, make in enumerate(makers)]
        case Interval(low, high, closed):
            inside = low + min(1, high - low) / 2
            whole = [low + 1] if high - low > 1 else []
            kept = [inside, *whole, *([low] if closed == "left" else []), *([high] if closed == "right" else [])]
            libraries = [(make(inside), inside) for make in (np.float32, np.float64, torch.tensor)]
            return [(value, value) for value in kept] + libraries + [(np.int64(n), n) for n in whole]
        case Choice():
            flags = [option for option in rule.options if isinstance(option, bool)]
            return [(option, option) for option in rule.options] + [
                (make(option), option) for option in flags for make in (np.bool_, torch.tensor)
            ]
        case SequenceOf(item):
            some = [kept for _, kept in good(item)][:2]
            return [(make(some), tuple(some)) for make in (list, tuple, np.array, lambda v: torch.tensor(v))] + [
                ([value for value, _ in good(item)], tuple(kept for _, kept in good(item)))
            ]


def bad(rule):
    """Values that a constraint does not allow, beside those that none does: past its ends, and of other kinds."""
    match rule:
        case Either(first, second):
            options = [option for part in (first, second) if isinstance(part, Choice) for option in part.options]
            wrong = [value for part in (first, second) if not isinstance(part, Choice) for value in bad(part)]
            if isinstance(first, Integer) and isinstance(second, Interval):
                # A count or a share: above the share's end, an integer is a count.
                counts = [v for v in wrong if type(v) is int and v >= first.least]
                wrong = [v for v in wrong if not any(v is count for count in counts)]
            return [value for value in wrong if not any(value is option for option in options)]
        case Integer(least):
            flags = True, np.True_, torch.tensor(True)
            floats = float(least + 1), np.float64(least + 1), least + 0.5, math.inf
            return [least - 1, *floats, *flags, None, torch.tensor([5]), np.array([5]), "classes"]
        case Interval(low, high, closed):
            ends = [low] * (closed != "left") + [high] * (closed != "right") + [high + 1] * (high < math.inf)
            huge = [10**400, Fraction(10**400)]
            return [*ends, low - 1, *huge, None, True, np.True_, torch.tensor([5]), "classes"]
        case Choice():
            return [0, 1, np.int64(1), math.inf, "classes"]
        case SequenceOf(item):
            value = good(item)[0][0]
            return [0, value, True, *([value, wrong] for wrong in bad(item))]


def make(name, **settings):
    kind = NAMED[name]
    inner = (
        [fn.MSP() if kind is fn.TemperatureScaling else fn.NAN()]
        if INNER in inspect.signature(kind).parameters
        else []
    )
    return kind(*inner, **settings)


def test_every_constructor_argument_is_a_row_of_a_table():
    found = {
        (name, parameter)
        for name, kind in NAMED.items()
        for parameter in inspect.signature(kind).parameters
        if parameter != INNER
    }
    assert found == set(SETTINGS)


@pytest.mark.parametrize(("name", "setting"), SETTINGS, ids=[".".join(key) for key in SETTINGS])
def test_numbers_of_any_library_are_taken_and_kept_as_plain_ones(name, setting):
    for given, kept in good(SETTINGS[name, setting]):
        detector = make(name, **{setting: given})
        value = getattr(detector, setting)
        assert value == kept
        plain = value if isinstance(value, tuple) else (value,)
        assert {type(part) for part in plain} <= {int, float, bool, str, type(None)}
        again = fn.parse_detector(repr(detector))
        assert repr(again) == repr(detector)
        assert getattr(again, setting) == kept


@pytest.mark.parametrize(("name", "setting"), SETTINGS, ids=[".".join(key) for key in SETTINGS])
def test_bad_settings_are_refused_by_name(name, setting):
    for value in NEVER + bad(SETTINGS[name, setting]):
        with pytest.raises(ValueError, match=rf"^{name}: {setting} must be .*, got ") as refused:
            make(name, **{setting: value})
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


@pytest.mark.parametrize("name", [*NAMED, "KNN / NAN", "Views(ReAct(SSD / NAN))"])
@pytest.mark.parametrize("method", ["fit", "partial_fit", "score", "forward"])
def test_what_is_no_features_is_refused_with_the_way_to_make_them(name, method):
    detector = make(name) if name in NAMED else fn.parse_detector(name)
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
