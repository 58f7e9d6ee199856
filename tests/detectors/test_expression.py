"""Detectors as text: the round trip through `repr`, and errors for anything else."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from featnorm.detectors import (
    KNN,
    NAN,
    SSD,
    Detector,
    Fusion,
    LpNorm,
    Mahalanobis,
    ReAct,
    Sum,
    ViM,
    parse_detector,
)
from references import EVERY, OWN


@pytest.mark.parametrize("expression", EVERY)
def test_an_expression_is_its_own_repr(expression):
    assert repr(parse_detector(expression)) == expression


@pytest.mark.parametrize(
    ("expression", "canonical"),
    [
        ("NAN", "NAN()"),
        ("  KNN( k = 50 )/NAN \n", "KNN() / NAN()"),
        ("KNN(7, False)", "KNN(k=7, squared=False)"),
        ("KNN(recall=0.99) / NAN", "KNN(recall=0.99) / NAN()"),
        ("ReAct(Energy)", "ReAct(Energy())"),
        ("ReAct(Energy(), 90.0)", "ReAct(Energy())"),
        ("ReAct(detector=MSP, percentile=85)", "ReAct(MSP(), percentile=85)"),
        ("SSD('labels')", "SSD(clusters='labels')"),
        ("LpNorm(inf)", "LpNorm(p=inf)"),
        ("LpNorm(p=1e-1)", "LpNorm(p=0.1)"),
        ("(Mahalanobis / NAN)", "Mahalanobis() / NAN()"),
        ("ReAct(KNN / NAN)", "ReAct(KNN() / NAN())"),
        ("ReAct(KNN) / ReAct(NAN)", "ReAct(KNN()) / ReAct(NAN())"),
        ("Residual(None)", "Residual()"),
        ("NAN+MSP + Energy", "NAN() + MSP() + Energy()"),
        ("NAN + (MSP + 2*Energy)", "NAN() + MSP() + 2 * Energy()"),
        ("2 * (NAN + 1.5*MSP) + KNN/NAN", "2 * NAN() + 3.0 * MSP() + KNN() / NAN()"),
        ("1e-3*(KNN/NAN)", "0.001 * (KNN() / NAN())"),
        ("1 * NAN", "1 * NAN()"),
        ("ReAct(NAN + MSP)", "ReAct(NAN() + MSP())"),
        ("TemperatureScaling(GEN) + KNN", "TemperatureScaling(GEN()) + KNN()"),
        ("ReAct(ReAct(NAN), 50)", "ReAct(ReAct(NAN()), percentile=50)"),
    ],
)
def test_what_is_understood(expression, canonical):
    detector = parse_detector(expression)
    assert repr(detector) == canonical
    assert repr(parse_detector(canonical)) == canonical


def test_settings_arrive():
    assert parse_detector("KNN(k=7, squared=False)").k == 7
    assert parse_detector("LpNorm(p=inf)").p == math.inf
    assert parse_detector("ViM(dim=3)").dim == 3
    fusion = parse_detector("SSD(clusters=4) / ReAct(NAN(), percentile=95)")
    assert isinstance(fusion, Fusion)
    assert fusion.distance.clusters == 4
    assert fusion.norm.percentile == 95
    assert isinstance(fusion.norm.detector, NAN)


distances = st.one_of(
    st.builds(KNN, st.integers(1, 999), st.booleans(), st.none() | st.sampled_from([0.5, 0.99])),
    st.builds(SSD, st.one_of(st.integers(1, 9), st.just("labels"))),
    st.builds(Mahalanobis),
)
size = st.one_of(st.builds(NAN), st.builds(LpNorm, st.floats(1e-3, 1e3)), st.builds(LpNorm, st.just(math.inf)))


def clipped(inner):
    return st.builds(ReAct, inner, st.floats(0.01, 99.99))


detectors = st.recursive(
    st.one_of(distances, size, st.builds(ViM, st.one_of(st.none(), st.integers(1, 99)))), clipped, max_leaves=4
)
fusions = st.builds(Fusion, st.one_of(distances, clipped(distances)), st.one_of(size, clipped(size)))


weights = st.one_of(st.integers(1, 9), st.floats(1e-3, 1e3))
weighted = st.builds(lambda weight, term: weight * term, weights, st.one_of(detectors, fusions))
sums = st.lists(st.one_of(detectors, fusions, weighted), min_size=1, max_size=4).map(lambda terms: Sum(*terms))


@settings(max_examples=120)
@given(st.one_of(detectors, fusions, clipped(fusions), sums, clipped(sums)))
def test_a_repr_is_read_back(detector):
    text = repr(detector)
    again = parse_detector(text)
    assert type(again) is type(detector)
    assert repr(again) == text


CODE = [
    "__import__('os').system('true')",
    "KNN(k=__import__('os').getpid())",
    "NAN().score",
    "NAN.__class__",
    "(lambda: NAN())()",
    "KNN(k=(lambda: 3)())",
    "[NAN() for _ in 'x']",
    "KNN(k=[3 for _ in 'x'][0])",
    "f'{NAN()}'",
    "KNN(k=f'{3}')",
    "NAN() if True else MSP()",
    "(x := NAN())",
    "KNN(k=2**3)",
    "KNN(k=1+1)",
    "KNN(*[3])",
    "KNN(**{'k': 3})",
    "KNN(k={3})",
    "KNN(k=b'3')",
    "KNN(k=3j)",
    "KNN(k=...)",
    "NAN()()",
    "NAN()[0]",
    "NAN(), MSP()",
    "KNN() * NAN()",
    "KNN() // NAN()",
    "KNN() - NAN()",
    "KNN() + 1",
    "2 + KNN()",
    "NAN() * 2",
    "-1 * NAN()",
    "inf * NAN()",
    "2 * 3",
    "2 * (2 * 'NAN')",
    "2 * NAN() / NAN()",
    "KNN() and NAN()",
    "not NAN()",
    "await NAN()",
    "yield NAN()",
    "import os",
    "x = NAN()",
    "NAN(); MSP()",
    "exec('1')",
    "eval",
    "",
    "   ",
    "\x00",
    "NAN(",
    "\ud800",
]


@pytest.mark.parametrize("expression", CODE, ids=ascii)
def test_code_is_refused(expression):
    with pytest.raises(ValueError, match=r"is not a (valid )?detector|unknown detector|surrogate"):
        parse_detector(expression)


@pytest.mark.parametrize(
    "expression",
    [
        "ReAct(" * 1000 + "NAN()" + ")" * 1000,
        "(" * 1000 + "NAN()" + ")" * 1000,
        "(" * 240 + "NAN()" + ")" * 240,
        "-" * 490 + "1",
        "NAN/" * 120 + "NAN",
        "2*" * 240 + "1",
        "1/" * 240 + "1",
        "NAN()" + " " * 10_000 + "/",
        "[" * 400,
        "9" * 10_000,
    ],
    ids=[
        "nested",
        "parentheses",
        "parentheses within",
        "signs",
        "quotients",
        "products",
        "numbers",
        "spaces",
        "lists",
        "digits",
    ],
)
def test_long_and_deep_expressions_are_refused_at_once(expression):
    # One that takes for ever would end at the time limit of every test.
    with pytest.raises(ValueError, match=r"not a valid detector|at most 500 characters"):
        parse_detector(expression)


@pytest.mark.parametrize(
    "expression",
    [
        "1/0",
        "KNN(k=1/0)",
        "LpNorm(p=1/0)",
        "9" * 400 + "/3",
        "1e308/1e-308",
        "3",
        "'NAN()'",
        "True",
        "None",
        "inf",
    ],
)
def test_what_is_no_detector_is_refused(expression):
    with pytest.raises(ValueError, match=r"detector|LpNorm|KNN"):
        parse_detector(expression)


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("Nan()", "did you mean NAN"),
        ("nan", "did you mean NAN"),
        ("Mahalanobs()", "did you mean Mahalanobis"),
        ("energy", "did you mean Energy"),
        ("ReAct(knn())", "did you mean KNN"),
        ("KNN / Nam", "did you mean NAN"),
    ],
)
def test_an_unknown_name_has_a_hint(expression, message):
    with pytest.raises(ValueError, match=message):
        parse_detector(expression)


def test_a_name_like_no_other_gets_the_list_of_all():
    with pytest.raises(ValueError, match=r"unknown detector 'Zzzzzz' \(available: .*\)") as raised:
        parse_detector("Zzzzzz()")
    available = str(raised.value).partition("available: ")[2].rstrip(")").split(", ")
    assert available == sorted(available)
    # Whatever else has been imported may have registered detectors of its own.
    assert {name for name, kind in OWN.items() if not kind.operator} <= set(available)


@pytest.mark.parametrize(
    "expression", ["Detector", "Fusion(KNN(), NAN())", "Sum(KNN(), NAN())", "_Norm", "Moments", "print", "KNN_"]
)
def test_only_detectors_have_names(expression):
    with pytest.raises(ValueError, match="unknown detector"):
        parse_detector(expression)


@pytest.mark.parametrize(
    "expression",
    [
        "KNN(k=0)",
        "KNN(k=-1)",
        "KNN(k=2.5)",
        "KNN(recall=1)",
        "KNN(recall=0.0)",
        "KNN(recall='0.9')",
        "KNN(k='5')",
        "KNN(k=NAN())",
        "KNN(n=5)",
        "KNN(1, 2, 3)",
        "KNN(5, k=5)",
        "NAN(1)",
        "LpNorm(p=0)",
        "LpNorm(p='2')",
        "LpNorm(p=None)",
        "SSD(clusters=0)",
        "SSD(clusters='class')",
        "ViM(dim=0)",
        "ReAct()",
        "ReAct(3)",
        "ReAct(None)",
        "ReAct('NAN()')",
        "ReAct(NAN(), percentile=100)",
        "ReAct(NAN(), percentile=0)",
        "ReAct(NAN(), percentile='90')",
        "ReAct(NAN(), percentile=None)",
        "ReAct(EmbeddingMagnitude())",
        "NAN() / KNN()",
        "KNN() / 3",
        "3 / NAN()",
        "KNN() / NAN() / NAN()",
        "KNN() / 'NAN()'",
    ],
)
def test_wrong_settings_are_value_errors(expression):
    with pytest.raises(ValueError, match=r"\w+"):
        parse_detector(expression)


def test_names_are_public_classes():
    import featnorm

    for name, kind in OWN.items():
        assert getattr(featnorm, name) is kind
        assert issubclass(kind, Detector)
        assert name in featnorm.__all__


def test_an_unknown_setting_lists_those_there_are():
    with pytest.raises(ValueError, match=r"KNN has no setting 'n'; it has k, squared, recall, normalize, size$"):
        parse_detector("KNN(n=10)")
    with pytest.raises(ValueError, match=r"NAN has no setting 'k'; it has none$"):
        parse_detector("KNN() / NAN(k=1)")
