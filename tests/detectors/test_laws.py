"""Laws of every detector: sign, fits that stream and merge, errors, precision, and no side effects."""

import copy
import itertools
import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch.utils._python_dispatch import TorchDispatchMode

from fabricate import assert_close, assert_same_state, fitted, id_features, of_activation, state, wide_as
from featnorm.detectors import (
    FDBD,
    GEN,
    KNN,
    MSP,
    NAN,
    NCI,
    NECO,
    ORA,
    SHE,
    SSD,
    EmbeddingMagnitude,
    Energy,
    Fusion,
    HiddenConfidence,
    KLMatching,
    KLUniform,
    L1Norm,
    LpNorm,
    Mahalanobis,
    MaxLogit,
    NNGuide,
    NotFittedError,
    OneClassSVM,
    ReAct,
    Residual,
    Sparsity,
    ViM,
    parse_detector,
    statistics,
)
from featnorm.detectors.statistics import unit_rows
from featnorm.features import PER_INPUT, Features
from featnorm.metrics import auroc
from references import EVERY, HELD_OUT, LEARNERS, NEED_LABELS, OOD, TEST, TRAIN, UNFITTED

every = pytest.mark.parametrize("expression", EVERY)
learners = pytest.mark.parametrize("expression", LEARNERS)
F64 = torch.float64


def reads_last_layer(expression):
    """Whether a detector reads the activation if there is one, and otherwise the pooled feature."""
    return any(kind in expression for kind in ("ReAct", "RAS", "FDBD", "NCI", "ORA"))


# Sign


@every
def test_in_distribution_scores_higher(expression):
    detector = fitted(expression)
    assert auroc(detector.score(TEST), detector.score(OOD)) > 0.97


@pytest.mark.parametrize("expression", ["Mahalanobis()", "Residual()", "Residual(dim=4)"])
def test_the_farther_out_the_lower(expression):
    away = torch.linspace(-1, 1, 12, dtype=F64)
    steps = torch.cat([TRAIN.pooled[:1] + s * away for s in (0.0, 1.0, 3.0, 9.0)])
    assert (fitted(expression).score(Features(pooled=steps)).diff() < 0).all()


# Identities


def activations(d=6):
    element = st.one_of(st.just(0.0), st.floats(-100, 100, width=32))
    return arrays("float64", st.tuples(st.integers(1, 5), st.just(d)), elements=element).map(torch.from_numpy)


@settings(max_examples=60)
@given(activations(), arrays("float64", (4, 6), elements=st.sampled_from([-2.0, -1e-9, 0.0, 1e-9, 3.0])))
def test_the_hidden_classifier_is_bounded_by_the_norm(a, weights):
    """Thm. 3, eq. 24, whatever the weights."""
    signs = torch.where(torch.from_numpy(weights) > 0, 1.0, -1.0).double()
    l1, largest = a.abs().sum(1), a.abs().amax(1)
    slack = 1e-9 * (1 + l1)
    for k in range(4):
        features = Features(activation=a, classifier=(torch.from_numpy(weights[k : k + 1]), None))
        psi = HiddenConfidence().score(features)
        assert (psi <= l1 + slack).all()
        bound = largest * (torch.where(a > 0, 1.0, -1.0) - signs[k]).abs().sum(1)
        assert (l1 - psi <= bound + slack).all()
    whole = Features(activation=a, classifier=(torch.from_numpy(weights), None))
    assert (HiddenConfidence().score(whole) <= L1Norm().score(whole) + slack).all()


@settings(max_examples=60)
@given(activations(), st.floats(1.01, 8))
def test_norm_identities(a, p):
    features = Features(activation=a)
    nan, l1, sparsity = (d.score(features) for d in (NAN(), L1Norm(), Sparsity()))
    torch.testing.assert_close(nan, l1 * sparsity, rtol=1e-12, atol=0)
    torch.testing.assert_close(NAN().score(Features(activation=8 * a)), 8 * nan, rtol=1e-12, atol=0)
    lp = LpNorm(p).score(features)
    assert (lp <= l1 * (1 + 1e-12)).all()
    assert (l1 <= 6 ** (1 - 1 / p) * lp * (1 + 1e-12)).all()


logit_rows = arrays("float64", st.tuples(st.integers(1, 4), st.integers(2, 6)), elements=st.floats(-1e4, 1e4))


@settings(max_examples=60)
@given(logit_rows.map(torch.from_numpy), st.floats(-1e3, 1e3))
def test_logit_identities(logits, shift):
    features = Features(logits=logits)
    classes = logits.shape[1]
    top, energy, kl, msp = (d.score(features) for d in (MaxLogit(), Energy(), KLUniform(), MSP()))
    slack = 1e-9
    assert (top <= energy + slack).all()
    assert (energy <= top + math.log(classes) + slack).all()
    torch.testing.assert_close(kl, energy - logits.mean(1) - math.log(classes), rtol=1e-9, atol=1e-8)
    assert (kl >= -slack).all()
    assert (msp <= 1 + slack).all()
    assert (msp >= 1 / classes - slack).all()
    torch.testing.assert_close(msp, (top - energy).exp(), rtol=1e-9, atol=1e-12)
    moved = Features(logits=logits + shift)
    torch.testing.assert_close(MSP().score(moved), msp, rtol=1e-7, atol=1e-12)
    torch.testing.assert_close(KLUniform().score(moved), kl, rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(Energy().score(moved), energy + shift, rtol=1e-9, atol=1e-8)


@pytest.mark.parametrize("size", [1.0, 1e4, 1e8, 1e30])
def test_huge_logits(size):
    logits = torch.tensor([[size, size, 0.0, 0.0], [size, 0.0, 0.0, 0.0], [-size, -size, -size, -size]])
    features = Features(logits=logits)
    exact = logits.double().softmax(1).amax(1).float()
    torch.testing.assert_close(MSP().score(features), exact, rtol=1e-5, atol=0)
    for detector in (MaxLogit(), Energy(), KLUniform(), GEN(), KLMatching().fit(features)):
        scores = detector.score(features)
        assert scores.isfinite().all()
        torch.testing.assert_close(
            scores.double(), detector.score(Features(logits=logits.double())), rtol=1e-5, atol=1e-5
        )


@every
def test_the_order_of_units_does_not_matter(expression):
    order = torch.randperm(12, generator=torch.Generator().manual_seed(3))
    weight, bias = TRAIN.classifier

    def permuted(features):
        a = features.activation[:, order]
        return features.replace(activation=a, pooled=a, classifier=(weight[:, order], bias))

    expected = fitted(expression).score(TEST)
    rtol = 1e-3 if "clusters=3" in expression else 1e-5  # its k-means rows are another float32 sample
    got = fitted(expression, permuted(TRAIN), permuted(HELD_OUT)).score(permuted(TEST))
    assert_close(got, expected, rtol)


# Fits


def assert_same_fit(got, expected, rtol=1e-5):
    for features in (TEST, OOD):
        assert_close(got.score(features), expected.score(features), rtol)


SAMPLED = [e for e in LEARNERS if "clusters=3" in e or "ViM" in e or "NNGuide" in e]


@pytest.mark.parametrize(("expression", "sampled"), [(e, False) for e in LEARNERS] + [(e, True) for e in SAMPLED])
def test_batches_and_halves_make_the_whole(expression, sampled, monkeypatch):
    if sampled:  # more inputs than SSD(clusters=3), ViM and NNGuide keep
        monkeypatch.setattr("featnorm.detectors.distance._MAX_CLUSTERED_ROWS", 60)
        monkeypatch.setattr("featnorm.detectors.subspace._MAX_ALPHA_ROWS", 50)
        monkeypatch.setattr("featnorm.detectors.neighbors._MIN_GUIDES", 20)
    whole = fitted(expression)
    again = fitted(expression).fit(TRAIN, HELD_OUT)
    streamed = parse_detector(expression)
    for start, end in itertools.pairwise((0, 1, 38, 43, 107, len(TRAIN))):
        streamed.partial_fit(TRAIN[start:end])
    for cut in (1, 70):
        one, two = (parse_detector(expression).partial_fit(part) for part in (TRAIN[:cut], TRAIN[cut:]))
        other_one, other_two = copy.deepcopy((one, two))
        assert_same_fit(one.merge(two).fit_held_out(HELD_OUT), whole)
        assert_same_fit(other_two.merge(other_one).fit_held_out(HELD_OUT), whole)
        expected = parse_detector(expression).partial_fit(TRAIN[cut:])
        assert_same_state(state(expected), state(two))  # the absorbed one is as it was
    assert_same_fit(again, whole, 0)
    assert_same_fit(streamed.fit_held_out([HELD_OUT[:7], HELD_OUT[7:]]), whole)
    order = torch.randperm(150, generator=torch.Generator().manual_seed(0))
    assert_same_fit(fitted(expression, TRAIN[order], HELD_OUT), whole)
    # Which inputs are held out of one set depends on their content, and not on their order.
    assert_same_fit(fitted(expression, TRAIN[order]), fitted(expression, TRAIN))


@learners
def test_a_fit_forgets_and_a_partial_fit_does_not(expression):
    once, twice = fitted(expression), fitted(expression, OOD if expression not in NEED_LABELS else TRAIN[:60])
    assert_same_fit(twice.fit(TRAIN, HELD_OUT), once, 0)
    before = state(twice)
    twice.partial_fit(TRAIN)
    assert any(not torch.equal(value, before[name]) for name, value in twice.state_dict().items())


@learners
def test_an_empty_batch_adds_nothing(expression):
    detector = fitted(expression)
    before, scores = state(detector), detector.score(TEST)
    detector.partial_fit(TRAIN[:0])
    assert_same_state(before, state(detector))
    assert torch.equal(detector.score(TEST), scores)
    first = parse_detector(expression).partial_fit(TRAIN[:0])
    assert not first.is_fitted
    assert_same_fit(first.partial_fit(TRAIN).fit_held_out(HELD_OUT), detector, 0)


@every
def test_no_input_has_no_score(expression):
    assert fitted(expression).score(TEST[:0]).shape == (0,)


@learners
def test_merging_with_an_unfitted_one(expression):
    whole, into = fitted(expression), parse_detector(expression)
    assert_same_fit(into.merge(whole), whole, 0)
    into.partial_fit(TRAIN[:10])
    assert_same_fit(whole, fitted(expression), 0)  # shares nothing with the one that absorbed it
    assert_same_fit(fitted(expression).merge(parse_detector(expression)), whole, 0)
    assert not parse_detector(expression).merge(parse_detector(expression)).is_fitted


@learners
def test_an_unfitted_detector_says_so(expression):
    detector = parse_detector(expression)
    assert not detector.is_fitted
    with pytest.raises(NotFittedError, match="call fit"):
        detector.score(TEST)
    assert detector.fit(TRAIN) is detector
    assert detector.is_fitted


def test_the_clip_of_an_unfitted_react_says_so():
    with pytest.raises(NotFittedError):
        _ = ReAct(NAN()).clip


@pytest.mark.parametrize("expression", UNFITTED)
def test_what_learns_nothing_needs_no_fit(expression):
    detector = parse_detector(expression)
    assert detector.is_fitted
    expected = detector.score(TEST)
    detector.fit(TRAIN).partial_fit(OOD).merge(parse_detector(expression))
    assert torch.equal(detector.score(TEST), expected)
    assert len(detector.state_dict()) == 0


@learners
def test_no_labels_are_needed_where_the_method_needs_none(expression):
    unlabelled = TRAIN.replace(labels=None)
    if expression in NEED_LABELS:
        with pytest.raises(ValueError, match="`labels`"):
            parse_detector(expression).fit(unlabelled)
    else:
        assert_same_fit(fitted(expression, unlabelled, HELD_OUT), fitted(expression), 0)


# Refusals


def spoilt(name, value, row=17):
    tensor = getattr(TRAIN, name).clone()
    tensor[row, 1] = value
    return TRAIN.replace(**{name: tensor})


def refused_fits(expression):
    """The features that a fit must refuse, and what the message says."""
    learns = parse_detector(expression).learns or ("activation",)
    for name in learns:
        if name in ("labels", "classifier"):
            continue
        for value in (math.nan, math.inf, -math.inf):
            yield spoilt(name, value), rf"`{name}` is not finite for 1 of 150 inputs, the first at row 17"
        if name != "activation":  # without one, the last layer is the pooled feature
            yield TRAIN.replace(**{name: None}), f"`{name}`"
    if expression in NEED_LABELS:
        yield TRAIN.replace(labels=None), "`labels`"
        unlabelled = TRAIN.labels.clone()
        unlabelled[[3, 90]] = -1
        yield TRAIN.replace(labels=unlabelled), "2 of 150 inputs have none, the first at row 3"
    if "classifier" in learns:
        yield TRAIN.replace(classifier=None), "`classifier`"


@learners
def test_a_refused_fit_changes_nothing(expression):
    detector, fresh = fitted(expression), parse_detector(expression)
    before, scores, empty = state(detector), detector.score(TEST), state(fresh)
    for features, message in refused_fits(expression):
        for learn in (detector.fit, detector.partial_fit, fresh.fit, fresh.partial_fit):
            with pytest.raises(ValueError, match=message):
                learn(features)
    assert_same_state(before, state(detector))
    assert torch.equal(detector.score(TEST), scores)
    assert_same_state(empty, state(fresh))
    assert not fresh.is_fitted


@learners
def test_a_refused_fit_right_after_another_changes_nothing(expression):
    """Nothing was asked of the first fit yet: what it learned may still lie in pieces."""
    expected = fitted(expression)
    for features, _ in refused_fits(expression):
        detector = fitted(expression)
        with pytest.raises(ValueError, match=r"`|have none"):
            detector.fit(features)
        assert_same_fit(detector, expected, 0)


@learners
def test_a_fit_in_batches_that_breaks_off_changes_nothing(expression):
    detector, expected = fitted(expression), fitted(expression)
    with pytest.raises(KeyError), detector.refit():  # noqa: PT012
        detector.partial_fit(TRAIN[:60])
        raise KeyError("the loader broke")
    assert_same_fit(detector, expected, 0)
    with detector.refit():
        detector.partial_fit(TRAIN[:60])
        detector.partial_fit(TRAIN[60:]).fit_held_out(HELD_OUT)
    assert_same_fit(detector, expected)


@pytest.mark.parametrize("expression", [e for e in LEARNERS if "pooled" in parse_detector(e).reads])
def test_another_width_is_refused_and_changes_nothing(expression):
    detector = fitted(expression)
    narrow = wide_as(TRAIN, 9)
    before, scores = state(detector), detector.score(TEST)
    with pytest.raises(ValueError, match=r"width 9.* width 12"):
        detector.partial_fit(narrow)
    with pytest.raises(ValueError, match="width 9"):
        detector.merge(fitted(expression, narrow))
    name = "activation" if any(kind in expression for kind in ("RAS", "FDBD", "NCI", "ORA")) else "pooled"
    with pytest.raises(ValueError, match=rf"`{name}` of width 12, got width 9"):
        detector.score(wide_as(TEST, 9))
    assert_same_state(before, state(detector))
    assert torch.equal(detector.score(TEST), scores)
    assert_same_state(state(detector.fit(narrow)), state(fitted(expression, narrow)))


@pytest.mark.parametrize("expression", ["Mahalanobis()", "SSD()", "SSD(clusters='labels')", "ViM()", "Residual()"])
def test_a_fit_refused_for_its_memory_changes_nothing(expression, monkeypatch):
    detector = fitted(expression, wide_as(TRAIN, 9))
    scores = detector.score(wide_as(TEST, 9))
    monkeypatch.setattr(statistics, "_MAX_GRAM_BYTES", 1000)
    with pytest.raises(ValueError, match="GiB"):
        detector.fit(TRAIN)
    assert torch.equal(detector.score(wide_as(TEST, 9)), scores)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(
    ("expression", "place"),
    [
        ("HiddenConfidence()", "weight"),
        *((e, place) for e in ("Residual()", "ViM()", "ReAct(Energy())") for place in ("weight", "bias")),
    ],
)
def test_a_classifier_that_is_not_finite_is_refused(expression, place, value):
    weight, bias = (t.clone() for t in TRAIN.classifier)
    (weight if place == "weight" else bias)[1] = value
    spoilt_features = TRAIN.replace(classifier=(weight, bias))
    detector = parse_detector(expression)
    with pytest.raises(ValueError, match="`classifier` are not finite"):
        detector.fit(spoilt_features).score(spoilt_features)


@pytest.mark.parametrize("expression", ["Residual()", "ViM()"])
def test_a_classifier_that_is_not_finite_and_no_logits_to_tell_by(expression):
    weight, bias = (t.clone() for t in TRAIN.classifier)
    weight[0, 0] = math.nan
    detector = fitted(expression)
    before = state(detector)
    with pytest.raises(ValueError):  # noqa: PT011 - the message is tested above
        detector.fit(TRAIN.replace(classifier=(weight, bias), logits=None))
    assert_same_state(before, state(detector))


@every
def test_an_input_that_is_not_finite_is_refused_by_field_and_row(expression):
    detector = fitted(expression)
    for name in detector.reads:
        if name == "classifier":
            continue
        tensor = getattr(TEST, name).clone()
        for value in (math.nan, math.inf, -math.inf):
            tensor[11, 2] = value
            with pytest.raises(ValueError, match=rf"`{name}` is not finite for 1 of 40 inputs, .* row 11"):
                detector.score(TEST.replace(**{name: tensor}))
        tensor[12, 0], tensor[11, 1] = math.inf, -math.inf
        with pytest.raises(ValueError, match=rf"`{name}` is not finite for 2 of 40 inputs"):
            detector.score(TEST.replace(**{name: tensor}))


@every
def test_a_missing_field_is_named(expression):
    detector = fitted(expression)
    for name in detector.reads:
        if name == "activation" and "ReAct" in expression:
            continue
        rest = TEST.replace(**{name: None})
        with pytest.raises(ValueError, match=rf"reads `{name}`: `{name}` is not in Features"):
            detector.score(rest)


@every
def test_what_a_detector_does_not_read_does_not_matter(expression):
    detector = fitted(expression)
    used = {*detector.reads, *(("activation",) if reads_last_layer(expression) else ())}
    less = TEST.replace(**{name: None for name in (*PER_INPUT, "classifier") if name not in used})
    assert torch.equal(detector.score(less), detector.score(TEST))


def test_hidden_confidence_refuses_the_classifier_of_another_layer():
    with pytest.raises(ValueError, match=r"12 units, the classifier reads 5"):
        HiddenConfidence().score(TEST.replace(classifier=(torch.ones(3, 5, dtype=F64), None)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: KNN(k=0), r"KNN: k must be an integer >= 1, got 0"),
        (lambda: KNN(k=2.0), r"KNN: k must be an integer >= 1, got 2\.0"),
        (lambda: SSD(clusters=0), "clusters must be an integer >= 1 or 'labels', got 0"),
        (lambda: SSD(clusters="classes"), "clusters"),
        (lambda: SSD(clusters=1.5), "clusters"),
        (lambda: OneClassSVM(nu=0), r"nu must be a number in \(0, 1\), got 0"),
        (lambda: OneClassSVM(nu=1), r"nu must be a number in \(0, 1\), got 1"),
        (lambda: OneClassSVM(nu="scale"), r"nu must be a number in \(0, 1\), got 'scale'"),
        (lambda: LpNorm(p=0), r"p must be a number in \(0, inf\], got 0"),
        (lambda: LpNorm(p=math.nan), r"p must be a number in \(0, inf\], got nan"),
        (lambda: Residual(dim=0), "Residual: dim must be an integer >= 1 or None, got 0"),
        (lambda: Mahalanobis(normalize=1), "normalize must be True or False, got 1"),
        (lambda: Residual(normalize=None), "normalize must be True or False, got None"),
        (lambda: ViM(dim=2.5), "ViM: dim must be an integer >= 1 or None"),
        (lambda: GEN(gamma=0), r"GEN: gamma must be a number in \(0, inf\), got 0"),
        (lambda: GEN(top=0), "GEN: top must be an integer >= 1, got 0"),
        (lambda: NNGuide(share=0), r"NNGuide: share must be a number in \(0, 1\], got 0"),
        (lambda: NNGuide(k=0), "NNGuide: k must be an integer >= 1, got 0"),
        (lambda: NECO(dim=0), r"NECO: dim must be an integer >= 1 or a number in \(0, 1\), got 0"),
        (lambda: NECO(dim=1.5), "NECO: dim"),
        (lambda: ReAct(NAN(), percentile=0), "percentile"),
        (lambda: ReAct(NAN(), percentile=100), "percentile"),
        (lambda: ReAct(NAN(), percentile=math.nan), "percentile"),
        (lambda: ReAct(EmbeddingMagnitude()), "embedding"),
        (lambda: ReAct(KNN() / EmbeddingMagnitude()), "embedding"),
    ],
)
def test_wrong_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_principal_dimension_must_leave_a_residual():
    for detector in (Residual(dim=12), ViM(dim=12), ViM(dim=100)):
        with pytest.raises(ValueError, match=r"leaves no residual: the features have 12 dimensions"):
            detector.fit(TRAIN)
        assert not detector.is_fitted


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_vim_of_features_that_lie_in_the_principal_subspace(dtype):
    g = torch.Generator().manual_seed(0)
    pooled = (torch.randn(90, 3, generator=g, dtype=F64) @ torch.randn(3, 8, generator=g, dtype=F64)).to(dtype)
    weight = torch.randn(3, 8, generator=g, dtype=F64).to(dtype)
    features = Features(pooled=pooled, logits=pooled @ weight.T, classifier=(weight, None))
    with pytest.raises(ValueError, match="principal subspace"):
        ViM(dim=4).fit(features).score(features)


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("expression", ["Mahalanobis()", "SSD()", "SSD(clusters='labels')", "SSD(clusters=2)"])
def test_one_input_or_two_identical_ones_have_no_covariance(expression, n):
    same = TRAIN[[0] * n]
    with pytest.raises(ValueError, match=r"no variation|single input"):
        parse_detector(expression).fit(same).score(TEST)


def test_a_class_of_identical_inputs_does_not_make_every_input_near():
    train = Features.cat([TRAIN, TRAIN[[0, 0]].replace(labels=torch.tensor([9, 9]))])
    try:
        scores = SSD(clusters="labels").fit(train).score(OOD)
    except ValueError as refused:
        assert "9" in str(refused) or "variation" in str(refused) or "covariance" in str(refused)  # noqa: PT017
    else:
        assert (scores < 0).all()


@pytest.mark.parametrize("expression", ["KNN(k=1)", "ReAct(NAN())", "KNN(k=1) / NAN()"])
def test_one_input_is_enough_for_these(expression):
    assert fitted(expression, TRAIN[:1]).score(TEST).isfinite().all()


def test_too_few_inputs():
    with pytest.raises(ValueError, match="only 4 inputs in its bank"):
        KNN(k=5).fit(TRAIN[:4]).score(TEST)
    for detector in (Residual(dim=6), ViM(dim=6)):
        with pytest.raises(
            ValueError, match="the 6 training inputs lie in the principal subspace of 6 dimensions"
        ):
            detector.fit(TRAIN[:6]).score(TEST)
    with pytest.raises(ValueError, match="only 5 inputs to cluster"):
        SSD(clusters=3).fit(TRAIN[:5]).score(TEST)
    with pytest.raises(ValueError, match="cluster of a single input"):
        SSD(clusters="labels").fit(TRAIN[:4]).score(TEST)


def test_merge_refuses_another_detector():
    for other in (KNN(k=6), SSD(), KNN(k=5, squared=False), KNN(k=5) / NAN()):
        with pytest.raises(ValueError, match="must be the same detector"):
            KNN(k=5).merge(other)


def test_react_refuses_logits_that_are_no_map_of_the_clipped_layer():
    weight, _ = TRAIN.classifier
    cosine = TRAIN.replace(logits=torch.nn.functional.normalize(TRAIN.activation) @ weight.T)
    with pytest.raises(ValueError, match="cannot recompute the logits"):
        ReAct(Energy()).fit(cosine)
    assert ReAct(NAN()).fit(cosine).is_fitted


# Ugly input


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, F64], ids=str)
def test_precision_of_the_input(expression, dtype):
    """Narrow features are scored as the same numbers in float32, and give at least float32."""
    detector, narrow = fitted(expression), TEST.to(dtype)
    got = detector.score(narrow)
    wide = torch.promote_types(dtype, torch.float32)
    assert got.dtype == wide
    assert_close(got, detector.score(narrow.to(wide)), 1e-5)


@learners
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_a_fit_to_narrow_features_is_the_fit_to_the_same_numbers(expression, dtype):
    narrow = TRAIN.to(dtype)
    assert_close(
        fitted(expression, narrow).score(TEST), fitted(expression, narrow.to(torch.float32)).score(TEST), 1e-5
    )


@every
def test_memory_layout_and_gradients_do_not_matter(expression):
    def odd(features):
        strided = {
            name: value.repeat_interleave(2, 1)[:, ::2].clone().T.contiguous().T.requires_grad_()
            for name, value in features.fields()
            if name != "labels"
        }
        strided["pooled"] = strided["activation"]
        weight, bias = features.classifier
        return features.replace(**strided, classifier=(weight.T.contiguous().T.requires_grad_(), bias))

    expected = fitted(expression).score(TEST)
    got = fitted(expression, odd(TRAIN), odd(HELD_OUT)).score(odd(TEST))
    assert_close(got.detach(), expected, 1e-4 if "clusters=3" in expression else 1e-5)


@every
def test_inputs_are_not_changed_and_not_kept(expression):
    train, test = (
        Features(
            **{name: value.clone() for name, value in f.fields() if name != "pooled"}, classifier=f.classifier
        )
        for f in (TRAIN, TEST)
    )
    train, test = train.replace(pooled=train.activation), test.replace(pooled=test.activation)
    detector = parse_detector(expression).fit(train)
    other = parse_detector(expression).partial_fit(train).partial_fit(train)
    for before, after in ((TRAIN, train), (TEST, test)):
        detector.score(after)
        for name, value in before.fields():
            assert torch.equal(value, getattr(after, name)), name
    kept, also_kept = state(detector), state(other)
    fresh = parse_detector(expression).fit(train)
    for _, value in train.fields():
        value.zero_()
    assert_same_state(kept, state(detector))
    assert_same_state(also_kept, state(other))
    assert_same_state(kept, state(fresh))
    assert torch.equal(fresh.score(TEST), detector.score(TEST))


@every
def test_a_score_does_not_depend_on_its_batch(expression):
    detector = fitted(expression)
    together = detector.score(Features.cat([TEST, OOD.replace(labels=TEST.labels)]))
    alone = torch.cat([detector.score(TEST[i : i + 1]) for i in range(40)])
    assert_close(alone, together[:40], 1e-5)
    assert_close(detector.score(TEST[[5, 5, 0]]), together[[5, 5, 0]], 1e-5)


def test_a_neighbor_found_in_a_large_batch_is_the_one_found_alone():
    g = torch.Generator().manual_seed(0)
    bank, queries = (torch.randn(n, 96, generator=g) + 5 for n in (3000, 600))
    detector = KNN(k=3).fit(Features(pooled=bank))
    together = detector.score(Features(pooled=queries))
    alone = torch.cat([detector.score(Features(pooled=q[None])) for q in queries[:30]])
    torch.testing.assert_close(together[:30], alone, rtol=1e-5, atol=0)


@pytest.mark.parametrize("normalize", [True, False])
def test_a_neighbor_is_found_where_a_product_of_matrices_rounds_distances_away(normalize):
    g = torch.Generator().manual_seed(0)
    bank, queries = (torch.randn(n, 64, generator=g) for n in (2000, 256))
    if normalize:
        bank, queries = bank + 1000, queries + 1000
    else:
        bank[0] = 1e4
    detector = KNN(k=10, normalize=normalize).fit(Features(pooled=bank))
    together = detector.score(Features(pooled=queries))
    alone = torch.cat([detector.score(Features(pooled=q[None])) for q in queries])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=0)


@every
def test_an_input_that_is_all_zero_has_a_score(expression):
    zero = of_activation(torch.zeros(2, 12, dtype=F64))
    scores = fitted(expression).score(zero)
    assert not scores.isnan().any()
    assert scores[0] == scores[1]


@learners
def test_training_with_zeros_ties_and_constant_units(expression):
    a = TRAIN.activation.clone()
    a[:, 3] = 0.0  # dead
    a[:, 8] = 2.0  # constant
    a[20] = 0.0
    a[30:36] = a[30]
    detector = fitted(expression, of_activation(a, TRAIN.labels))
    # A constant unit that moves at test, and a dead one that fires, are finite numbers still.
    for test in (of_activation(a), TEST, OOD):
        scores = detector.score(test)
        assert not scores.isnan().any()
        assert scores[test.activation.abs().sum(1) > 0].isfinite().all()


UNIT = ["KNN(k=3)", "SSD()", "KNN(k=3) / NAN()", "Mahalanobis(normalize=True)", "Residual(dim=4, normalize=True)"]


@pytest.mark.parametrize("expression", UNIT)
@pytest.mark.parametrize("scale", [1e15, 1e25])
def test_the_direction_of_a_huge_feature_is_not_lost(expression, scale):
    huge_train, huge_test = (of_activation(f.activation.float() * scale, f.labels) for f in (TRAIN, TEST))
    expected = fitted(expression).score(TEST).float()
    if "NAN" in expression:
        expected = expected / scale
    assert_close(fitted(expression, huge_train).score(huge_test), expected, 1e-3)


@every
@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_features_of_another_scale(expression, scale):
    train, test, ood = (of_activation(f.activation * scale, f.labels) for f in (TRAIN, TEST, OOD))
    detector = fitted(expression, train)
    scores = detector.score(test)
    assert scores.isfinite().all()
    if not set(detector.reads) & {"logits"}:
        assert auroc(scores, detector.score(ood)) > 0.95


@pytest.mark.parametrize("expression", [e for e in EVERY if "dim=" not in e])
def test_a_single_unit_and_a_single_class(expression):
    g = torch.Generator().manual_seed(0)
    a = torch.rand(60, 1, generator=g, dtype=F64) + 0.1
    a[::7] = -a[::7]  # of unit length, a single unit is its sign
    weight = torch.ones(1, 1, dtype=F64)
    features = Features(
        activation=a,
        pooled=a,
        embedding=a,
        logits=a,
        labels=torch.zeros(60, dtype=torch.int64),
        classifier=(weight, torch.zeros(1, dtype=F64)),
    )
    try:
        scores = fitted(expression, features).score(features)
    except ValueError as refused:
        reasons = {
            "SSD": "cluster|variation",
            "+": "cannot be standardized",
            "Temperature": "no better than chance",
        }
        assert any(part in expression and re.search(why, str(refused)) for part, why in reasons.items())  # noqa: PT017
    else:
        assert scores.shape == (60,)
        assert scores.isfinite().all()


def test_one_or_two_classes_of_logits():
    # A constant score would call every input ID: one logit z is that of two classes, (-z / 2, z / 2).
    one = Features(logits=torch.tensor([[3.0], [-2.0]]))
    assert MSP().score(one).tolist() == pytest.approx([1 / (1 + math.exp(-3)), 1 / (1 + math.exp(-2))])
    assert KLUniform().score(one).tolist() == pytest.approx(
        [math.log(1 + math.exp(z)) - z / 2 - math.log(2) for z in (3, -2)], rel=1e-5
    )
    energy = [math.log(math.exp(z / 2) + math.exp(-z / 2)) for z in (3, -2)]
    assert Energy().score(one).tolist() == pytest.approx(energy)
    assert MaxLogit().score(one).tolist() == [1.5, 1]
    two = Features(logits=torch.tensor([[1.0, 1.0], [2.0, 0.0]]))
    assert MSP().score(two).tolist() == pytest.approx([0.5, 1 / (1 + math.exp(-2))])


# Modules


@every
def test_state_goes_to_a_fresh_detector(expression):
    detector = fitted(expression)
    for fresh in (parse_detector(expression), fitted(expression, TRAIN[:60])):
        fresh.load_state_dict(detector.state_dict())
        assert fresh.is_fitted
        assert_same_state(state(detector), state(fresh))
        assert_same_fit(fresh, detector, 0)
        fresh.partial_fit(TRAIN[:20])
        assert_same_fit(detector, fitted(expression), 0)


@every
def test_a_copy_is_its_own(expression):
    detector = fitted(expression)
    scores = detector.score(TEST)
    copied = copy.deepcopy(detector)
    assert torch.equal(copied.score(TEST), scores)
    copied.partial_fit(TRAIN[:40])
    assert torch.equal(detector.score(TEST), scores)


@every
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16, F64])
def test_casting_a_detector_leaves_what_it_learned(expression, dtype):
    detector = fitted(expression)
    scores, before = detector.score(TEST), state(detector)
    detector.to(dtype)
    assert_same_state(before, state(detector))
    assert torch.equal(detector.score(TEST), scores)


@every
def test_a_detector_has_buffers_and_no_parameters(expression):
    detector = fitted(expression)
    assert_same_state(dict(detector.named_buffers()), state(detector))
    assert not list(detector.parameters())
    assert detector.train().score(TEST).equal(detector.eval().score(TEST))
    assert torch.equal(detector(TEST), detector.score(TEST))


@learners
def test_a_fit_in_inference_mode_can_go_on_outside(expression):
    with torch.inference_mode():
        detector = fitted(expression, TRAIN[:100], HELD_OUT)
    assert_same_fit(detector.partial_fit(TRAIN[100:]).fit_held_out(HELD_OUT), fitted(expression))


@pytest.mark.parametrize("expression", ["NAN()", "Energy()", "Mahalanobis()", "SSD()", "Residual()", "ViM()"])
def test_scores_have_gradients(expression):
    a = TEST.activation.clone().requires_grad_()
    fitted(expression).score(of_activation(a)).sum().backward()
    assert a.grad.isfinite().all()
    assert a.grad.abs().sum() > 0


# Samples


@pytest.mark.parametrize("heavy", [False, True])
def test_alpha_of_a_sample_is_that_of_the_whole(monkeypatch, heavy):
    g = torch.Generator().manual_seed(0)
    pooled = torch.randn(20_000, 16, generator=g)
    if heavy:
        pooled = pooled * torch.rand(20_000, 1, generator=g).add(0.2) ** -0.5
    weight = torch.randn(4, 16, generator=g)
    features = Features(pooled=pooled, logits=pooled @ weight.T, classifier=(weight, None))
    monkeypatch.setattr("featnorm.detectors.subspace._MAX_ALPHA_ROWS", 10**6)
    exact = ViM().fit(features)._fitted_state()[1]
    monkeypatch.setattr("featnorm.detectors.subspace._MAX_ALPHA_ROWS", 1000)
    assert float(ViM().fit(features)._fitted_state()[1]) == pytest.approx(float(exact), rel=2e-3)


def test_clusters_of_a_sample_are_nearly_those_of_the_whole(monkeypatch):
    train = id_features(3000)
    whole = SSD(clusters=3).fit(train).score(TEST)
    monkeypatch.setattr("featnorm.detectors.distance._MAX_CLUSTERED_ROWS", 1000)
    sampled = SSD(clusters=3).fit(train)
    assert len(sampled.state_dict()["sample.rows"]) == 1000
    assert float(torch.corrcoef(torch.stack([whole, sampled.score(TEST)]))[0, 1]) > 0.95


# Fusion


def test_fusion_is_the_distance_over_the_norm():
    knn, nan = KNN(k=5).fit(TRAIN), NAN()
    expected = knn.score(TEST) / nan.score(TEST)
    torch.testing.assert_close((KNN(k=5) / NAN()).fit(TRAIN).score(TEST), expected)
    torch.testing.assert_close((knn / nan).score(TEST), expected)  # made of what is fitted
    torch.testing.assert_close(Fusion(knn, nan).score(TEST), expected)


def test_no_norm_is_out_of_distribution_for_certain():
    a = torch.zeros(3, 12, dtype=F64)
    a[1:, 0] = 1.0
    train = of_activation(torch.cat([TRAIN.activation, torch.zeros(2, 12, dtype=F64)]))
    scores = (KNN(k=1) / NAN()).fit(train).score(of_activation(a))
    assert scores[0] == -math.inf  # and its distance is 0
    assert scores[1:].isfinite().all()
    assert (KNN(k=1) / NAN()).fit(of_activation(a)).score(of_activation(a)[1:]).tolist() == [0, 0]


def test_squaring_changes_a_fusion_and_not_the_ranking_alone():
    both = Features.cat([TEST.replace(labels=None), OOD])
    squared, plain = (KNN(k=5, squared=s).fit(TRAIN) for s in (True, False))
    assert torch.equal(squared.score(both).argsort(stable=True), plain.score(both).argsort(stable=True))
    torch.testing.assert_close(squared.score(both), -plain.score(both).square(), rtol=1e-5, atol=1e-9)
    assert not torch.equal((squared / NAN()).score(both).argsort(), (plain / NAN()).score(both).argsort())


@pytest.mark.parametrize(
    ("distance", "norm", "message"),
    [
        (NAN(), NAN(), r"NAN\(\) is not a distance"),
        (Energy(), NAN(), r"Energy\(\) is not a distance"),
        (ViM(), NAN(), r"ViM\(\) is not a distance"),
        (KNN(), KNN(), r"KNN\(\) is not a norm"),
        (KNN(), Energy(), r"Energy\(\) is not a norm"),
        (KNN(), HiddenConfidence(), "is not a norm"),
        (KNN() / NAN(), NAN(), "is not a distance"),
        (KNN(), ReAct(MSP()), "is not a norm"),
        (Mahalanobis(relative=True), NAN(), "is not a distance"),
    ],
)
def test_only_a_distance_over_a_norm_makes_a_fusion(distance, norm, message):
    with pytest.raises(TypeError, match=message):
        Fusion(distance, norm)
    with pytest.raises(TypeError, match=message):
        _ = distance / norm


@pytest.mark.parametrize("other", [2, "NAN()", None])
def test_a_detector_divides_by_detectors_only(other):
    with pytest.raises(TypeError):
        _ = KNN() / other
    with pytest.raises(TypeError):
        Fusion(KNN(), other)
    with pytest.raises(TypeError):
        ReAct(other)


# ReAct


def test_react_learns_inside_from_unclipped_features():
    inside = ReAct(KNN(k=3), percentile=50).fit(TRAIN).detector
    assert torch.equal(inside.score(TEST), fitted("KNN(k=3)").score(TEST))


def test_react_clips_the_pooled_feature_with_the_layer_it_is():
    detector = ReAct(KNN(k=3), percentile=70).fit(TRAIN)
    clipped = TEST.activation.clamp(max=detector.clip)
    assert_close(detector.score(TEST), detector.detector.score(Features(pooled=clipped)), 1e-6)
    assert torch.equal(TEST.activation, id_features(40, seed=5).activation)


def test_react_does_not_ask_which_tensor_object_the_pooled_feature_is():
    detector = ReAct(KNN(k=3), percentile=70).fit(TRAIN)
    apart = TEST.replace(pooled=TEST.activation.clone())  # as when it comes from a file
    assert_close(detector.score(apart), detector.score(TEST), 1e-6)


def test_react_above_everything_changes_little_and_nothing_below_its_clip():
    low = of_activation(TEST.activation.clamp(max=1.0))
    for inner in ("NAN()", "Energy()"):
        detector = fitted(f"ReAct({inner}, percentile=99.99)")
        torch.testing.assert_close(detector.score(low), parse_detector(inner).score(low))


# Memory


class Largest(TorchDispatchMode):
    """Records the number of elements of the largest tensor made."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for made in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(made, torch.Tensor):
                self.elements = max(self.elements, made.numel())
        return out


def test_no_tensor_of_inputs_by_classes_by_units():
    n, classes, d = 2000, 500, 64
    g = torch.Generator().manual_seed(0)
    pooled = torch.randn(n, d, generator=g)
    labels = torch.arange(n) % classes
    weight = torch.randn(classes, d, generator=g)
    features = Features(pooled=pooled, logits=pooled @ weight.T, labels=labels, classifier=(weight, None))
    distances = (Mahalanobis(), Mahalanobis(relative=True), SSD(clusters=1))
    for detector in (*distances, KLMatching(), SHE(), GEN(), FDBD(), NCI(), ORA()):
        with Largest() as largest:
            detector.fit(features).score(features)
        assert largest.elements <= 2 * n * classes
    with Largest() as largest:
        SSD().fit(features).score(features)
    assert largest.elements <= 2 * n * d  # no n x n matrix to read its diagonal


def test_moments_do_not_keep_the_inputs():
    sizes = []
    for n in (300, 3000):
        kinds = ("Mahalanobis", "SSD", "Residual", "KLMatching", "SHE", "NECO", "ReAct(NAN)")
        detectors = [fitted(kind, id_features(n)) for kind in kinds]
        sizes.append(sum(v.numel() for d in detectors[:-1] for v in d.state_dict().values()))
        assert sum(v.numel() for v in detectors[-1].state_dict().values()) < 2**17
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("detector", [NAN(), KNN(), Energy()], ids=repr)
def test_a_bare_tensor_is_refused_with_what_to_do(detector):
    for call in (detector.score, detector.partial_fit) if detector.needs_fit else (detector.score,):
        with pytest.raises(TypeError, match=r"takes Features, got Tensor: wrap tensors in Features\("):
            call(torch.rand(3, 4))


@pytest.mark.parametrize("traced", [False, True])
def test_distances_of_rows_far_from_zero_keep_their_digits(traced):
    generator = torch.Generator().manual_seed(0)
    train, test = (torch.rand(n, 3, generator=generator) + 1000 for n in (200, 30))
    knn = KNN(k=3, normalize=False).use_bank(train)
    found = knn._traced(test) if traced else -knn.score(Features(pooled=test))
    exact = torch.cdist(test.double(), train.double()).square().sort(1).values[:, 2]
    torch.testing.assert_close(found.double(), exact, rtol=1e-3, atol=1e-5)


def test_a_bank_is_used_without_a_copy(tmp_path):
    train = Features(pooled=torch.rand(300, 6, generator=torch.Generator().manual_seed(1)))
    rows = unit_rows(train.tensor("pooled")).float()
    file = tmp_path / "bank.f32"
    file.write_bytes(rows.numpy().tobytes())
    mapped = torch.from_file(str(file), size=rows.numel()).reshape(rows.shape)
    used = KNN(k=5).use_bank(mapped)
    assert used.bank.rows.data_ptr() == mapped.data_ptr()
    test = Features(pooled=torch.rand(40, 6, generator=torch.Generator().manual_seed(2)))
    assert torch.equal(used.score(test), KNN(k=5).fit(train).score(test))
    # What is learned later is added to it, and the bank that was given stays as it is.
    used.partial_fit(test)
    assert (len(used.bank.rows), len(mapped)) == (340, 300)
    with pytest.raises(ValueError, match=r"row 7 of the bank of KNN\(\) has length 2"):
        KNN().use_bank(torch.cat([rows[:7], 2 * rows[7:]]))
    with pytest.raises(ValueError, match=r"takes a bank \(n, D\) of float32, got torch.float64"):
        KNN().use_bank(rows.double())
