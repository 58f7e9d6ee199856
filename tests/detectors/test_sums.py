"""Sums of detectors, temperature scaling, and the inputs that are held out of a fit."""

import copy
import itertools
import math
import random

import numpy as np
import pytest
import torch
from scipy.stats import binom

import featnorm as fn
from fabricate import assert_close, assert_same_state, fitted, id_features, state
from featnorm.detectors import (
    GEN,
    KNN,
    MSP,
    NAN,
    ODIN,
    SSD,
    EmbeddingMagnitude,
    Energy,
    Jackknife,
    KLMatching,
    KLUniform,
    NotFittedError,
    ReAct,
    Sum,
    TemperatureScaling,
    Views,
    parse_detector,
)
from featnorm.detectors.held_out import fit_in_batches
from featnorm.features import Features
from references import HELD_OUT, TEST, TRAIN

SUMS = ["KLUniform() + KNN(k=5)", "ReAct(NAN() + 2 * SSD())", "TemperatureScaling(GEN()) + Mahalanobis()"]


# Expressions


def test_operators_make_sums():
    knn, nan = KNN(k=5), NAN()
    assert repr(knn + nan) == "KNN(k=5) + NAN()"
    assert repr(2 * MSP() + knn / nan) == "2 * MSP() + KNN(k=5) / NAN()"
    assert repr(MSP() * 2 + 0.5 * (knn / nan)) == "2 * MSP() + 0.5 * (KNN(k=5) / NAN())"
    assert repr((MSP() + 2 * nan) + 3 * (knn + Energy())) == "MSP() + 2 * NAN() + 3 * KNN(k=5) + 3 * Energy()"
    assert (knn + nan).terms[0] is knn
    assert Sum(knn, nan, weights=[1, 2.5]).weights == (1, 2.5)
    assert (knn + nan).role == "confidence"


def test_a_sum_reads_what_its_terms_do_and_is_fitted_to_that():
    detector = MSP() + SSD(clusters="labels") / NAN() + ODIN()
    assert detector.reads == ("logits", "pooled", "activation")
    assert set(detector.learns) == {"logits", "pooled", "activation", "labels"}
    assert detector.needs_model
    assert detector.needs_held_out
    assert detector.needs_fit
    assert not MSP().needs_held_out
    assert not (KNN() / NAN()).needs_held_out


@pytest.mark.parametrize("other", [2, "NAN()", None, NAN])
def test_only_detectors_are_added_and_only_numbers_multiply(other):
    with pytest.raises(TypeError):
        _ = KNN() + other
    with pytest.raises(TypeError):
        Sum(KNN(), other)
    if other != 2:
        with pytest.raises(TypeError):
            _ = KNN() * other


@pytest.mark.parametrize("weight", [0, -1, math.inf, math.nan, True])
def test_weights_are_positive_numbers(weight):
    with pytest.raises(ValueError, match=r"Sum: weights must be a sequence \(each item a number in \(0, inf\)\)"):
        _ = weight * NAN()
    with pytest.raises(ValueError, match="Sum: weights must"):
        _ = 1e300 * (1e300 * NAN())


def test_a_sum_needs_terms_and_one_weight_for_each():
    with pytest.raises(TypeError, match="a Sum needs at least one detector"):
        Sum()
    with pytest.raises(ValueError, match="a Sum of 2 detectors got 3 weights"):
        Sum(NAN(), MSP(), weights=[1, 2, 3])


# Scores


def test_each_term_has_mean_0_and_deviation_1_on_the_held_out_inputs():
    detector = (KLUniform() + KNN(k=3)).fit(TRAIN, HELD_OUT)
    for term in detector.terms:
        alone = (1 * term).fit_held_out(HELD_OUT).score(HELD_OUT)
        torch.testing.assert_close(alone.mean(), torch.tensor(0.0, dtype=torch.float64), atol=1e-12, rtol=0)
        torch.testing.assert_close(alone.std(correction=0), torch.tensor(1.0, dtype=torch.float64))
    parts = sum((1 * term).fit_held_out(HELD_OUT).score(TEST) for term in detector.terms)
    torch.testing.assert_close(detector.score(TEST), parts)
    doubled = (2 * detector).fit_held_out(HELD_OUT).score(TEST)
    torch.testing.assert_close(doubled, 2 * parts)


def test_a_fitted_detector_stays_fitted_in_a_sum():
    knn = fitted("KNN(k=3)")
    detector = (knn + NAN()).fit_held_out(HELD_OUT)
    assert_close(detector.score(TEST), fitted("KNN(k=3) + NAN()").score(TEST), 1e-6)


def test_a_score_of_minus_infinity_stays_and_does_not_spoil_the_constants():
    z = TRAIN.activation.clone()
    zero = TRAIN.replace(activation=torch.zeros_like(z))
    detector = KNN(k=3) / NAN() + KLUniform()
    detector.fit(TRAIN, [HELD_OUT, zero[:5]])
    assert (detector.score(zero[:3]) == -math.inf).all()
    assert detector.score(TEST).isfinite().all()
    mean = (KNN(k=3) / NAN()).fit(TRAIN).score(HELD_OUT).mean()
    torch.testing.assert_close(detector.constants.values[0, 0], mean)


def test_a_term_whose_scores_are_all_equal_is_refused_by_name():
    same = HELD_OUT.replace(logits=torch.zeros_like(HELD_OUT.logits))
    detector = (KLUniform() + KNN(k=3)).fit(TRAIN, HELD_OUT)
    before = state(detector)
    with pytest.raises(
        ValueError, match=r"scores of KLUniform\(\) are the same for all 60 held-out inputs.*leave"
    ):
        detector.fit_held_out(same)
    with pytest.raises(ValueError, match=r"scores of KLUniform\(\)"):
        detector.fit(TRAIN, same)
    assert_same_state(before, state(detector))
    zero = HELD_OUT.replace(activation=torch.zeros_like(HELD_OUT.activation))
    with pytest.raises(ValueError, match=r"scores of KNN\(k=3\) / NAN\(\) are the same for all 60"):
        (KNN(k=3) / NAN() + MSP()).fit(TRAIN, zero)


def test_scores_that_differ_by_rounding_alone_are_equal():
    z = torch.full((20,), 1000.0, dtype=torch.float32) + 6e-5 * (torch.arange(20) % 2)
    with pytest.raises(ValueError, match="are the same for all"):
        (1 * NAN()).fit_held_out(Features(activation=z[:, None]))


# The two phases


@pytest.mark.parametrize("expression", SUMS)
def test_the_second_phase_follows_the_first(expression):
    detector = parse_detector(expression)
    if detector.learns != detector.reads:
        with pytest.raises(NotFittedError, match="call fit"):
            detector.fit_held_out(HELD_OUT)
    detector.partial_fit(TRAIN)
    with pytest.raises(NotFittedError, match=r"after partial_fit or merge, call fit_held_out on held-out ones"):
        detector.score(TEST)
    assert detector.fit_held_out(HELD_OUT) is detector
    expected = detector.score(TEST)
    assert_close(fitted(expression).score(TEST), expected, 1e-9)
    # More inputs, or those of another fit, end the second phase.
    more = copy.deepcopy(detector).partial_fit(TEST)
    merged = copy.deepcopy(detector).merge(detector)
    assert not more.is_fitted
    assert not merged.is_fitted
    # Batches of held-out inputs in any order are their whole.
    parts = [HELD_OUT[40:], HELD_OUT[:0], HELD_OUT[:40]]
    assert_close(detector.fit_held_out(iter(parts)).score(TEST), expected, 1e-9)


@pytest.mark.parametrize("expression", ["Mahalanobis() + NAN()", "ReAct(SSD(clusters='labels') + 2 * MSP())"])
def test_the_second_phase_needs_labels_only_for_a_temperature(expression):
    unlabeled = HELD_OUT.replace(labels=None)
    detector = parse_detector(expression)
    assert "labels" in detector.learns
    expected = copy.deepcopy(detector).fit(TRAIN, HELD_OUT).score(TEST)
    assert torch.equal(detector.fit(TRAIN, unlabeled).score(TEST), expected)
    assert_close(detector.fit_held_out([unlabeled[:9], unlabeled[9:]]).score(TEST), expected, 1e-9)
    for temperature in (TemperatureScaling(MSP()), NAN() + TemperatureScaling(MSP())):
        with pytest.raises(ValueError, match=r"^TemperatureScaling\(MSP\(\)\) reads `labels`"):
            temperature.fit(TRAIN, unlabeled)
    with pytest.raises(ValueError, match="reads `labels`"):
        detector.fit(TRAIN.replace(labels=None), HELD_OUT)


@pytest.mark.parametrize("expression", SUMS)
def test_a_refused_second_phase_changes_nothing(expression):
    detector = fitted(expression)
    before, scores = state(detector), detector.score(TEST)
    name = detector.reads[0]
    spoilt = getattr(HELD_OUT, name).clone()
    spoilt[7] = math.nan
    for held, message in (
        (HELD_OUT.replace(**{name: None}), f"`{name}`"),
        (HELD_OUT.replace(**{name: spoilt}), "not finite for 1 of 60 inputs, the first at row 7"),
        (HELD_OUT[:0], "no held-out inputs"),
        ([], "no held-out inputs"),
    ):
        with pytest.raises(ValueError, match=message):
            detector.fit_held_out(held)
        with pytest.raises(ValueError, match=message):
            detector.fit(TRAIN, held)
    assert_same_state(before, state(detector))
    assert torch.equal(detector.score(TEST), scores)
    with pytest.raises(TypeError, match="takes Features"):
        detector.fit_held_out([HELD_OUT.pooled])


def test_one_input_in_five_is_held_out_by_its_content():
    seen = []

    class Recorder(fn.L1Norm, registered=False):
        needs_held_out = True

        def _partial_fit(self, features):
            seen.append(features)

        def fit_held_out(self, held_out):
            seen.append(held_out)

    def rows(features):
        return sorted(features.activation.tolist())

    def split(batches):
        seen.clear()
        assert not fit_in_batches([Recorder()], batches)
        *fit, chosen = seen
        return rows(Features.cat([part for part in fit if len(part)])), rows(chosen)

    for n, expected in ((10, 5), (24, 5), (40, 8), (6000, 1024)):
        features = id_features(n)
        fit, chosen = split([features])
        assert len(chosen) == expected
        assert sorted(fit + chosen) == rows(features)
        order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
        cuts = sorted({0, n, *random.Random(0).sample(range(n), 7)})
        parts = [features[order][start:end] for start, end in itertools.pairwise(cuts)]
        assert split(parts) == (fit, chosen)


def test_too_few_inputs_to_hold_some_out():
    detector = fitted(SUMS[0])
    before = state(detector)
    with pytest.raises(ValueError, match="at least 10 inputs are needed to hold 5 of them out, got 9"):
        detector.fit(TRAIN[:9])
    assert_same_state(before, state(detector))
    assert (1 * NAN()).fit(TRAIN[:10]).is_fitted


def test_what_needs_no_held_out_inputs_is_fitted_to_all_of_them():
    detectors = [KNN(k=3), KLUniform() + KNN(k=3), MSP(), SSD()]
    assert not fit_in_batches(detectors, [TRAIN[:60], TRAIN[60:]])
    assert len(detectors[0].bank.rows) == 150
    assert len(detectors[1].terms[1].bank.rows) == 120
    assert_close(detectors[1].score(TEST), (KLUniform() + KNN(k=3)).fit(TRAIN).score(TEST), 1e-9)
    given = [KNN(k=3), KLUniform() + KNN(k=3)]
    assert not fit_in_batches(given, [TRAIN], [HELD_OUT])
    assert len(given[1].terms[1].bank.rows) == 150


def test_the_errors_of_detectors_that_cannot_be_fitted():
    detectors = [KNN(k=3), KNN(k=3) + EmbeddingMagnitude(), KNN(k=3) + ODIN(), KNN(k=3) + NAN()]
    failed = fit_in_batches(detectors, [TRAIN.replace(embedding=None)])
    assert list(failed) == [detectors[2], detectors[1]]
    assert "`embedding` is not in Features" in str(failed[detectors[1]])
    assert "runs the model again, so no inputs can be held out" in str(failed[detectors[2]])
    assert detectors[0].is_fitted
    assert detectors[3].is_fitted
    (error,) = fit_in_batches([NAN() + MSP()], [TRAIN[:4], TRAIN[4:8]]).values()
    assert "got 8: add inputs, or pass held_out" in str(error)


def test_each_copy_of_a_jackknife_holds_inputs_out_of_its_own_fit():
    detector = Jackknife(KLUniform() + KNN(k=1), count=9)
    assert not detector.needs_held_out
    detector.fit(TRAIN[:30])
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    again = Jackknife(KLUniform() + KNN(k=1), count=9).fit(TRAIN[:30][order], order.argsort()[:9])
    assert_close(again.score(TEST), detector.score(TEST), 1e-6)
    assert {len(part.terms[1].bank.rows) for part in detector.copies} == {24}
    into = Jackknife(KLUniform() + KNN(k=1), count=9).merge(detector)
    assert torch.equal(into.score(TEST), detector.score(TEST))


def test_detectors_that_run_the_model_again_take_their_held_out_inputs_from_a_loader():
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 6, 3),
        torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(6, 4),
    )
    train, other, test = (torch.rand(n, 3, 8, 8) for n in (40, 30, 6))
    scorer = fn.Scorer(model, parse_detector("ODIN() + Views(KNN(k=2)) + KNN(k=2)"))
    with pytest.raises(ValueError, match=r"^ODIN\(\) \+ .* runs the model again, .*: pass held_out"):
        scorer.fit(train.split(16))
    scorer.fit(train.split(16), other.split(16))
    terms = [
        fn.Scorer(model, parse_detector(e)).fit(train.split(16)) for e in ("ODIN()", "Views(KNN(k=2))", "KNN(k=2)")
    ]
    expected = sum(
        (term(test).score.double() - term(other).score.double().mean())
        / term(other).score.double().std(correction=0)
        for term in terms
    )
    assert_close(scorer(test).score, expected, 1e-4)


# The guarantee


def test_the_false_alarm_rate_is_exact_if_three_sets_are_apart():
    """Calibration and new inputs are exchangeable if neither the fit nor the constants depend on them."""
    rng = torch.Generator().manual_seed(0)
    rate, draws = 0.05, 1500

    def draw(count):
        z = torch.randn(count, 4, generator=rng)
        return Features(pooled=z, logits=2 * z)

    alarms = 0
    for _ in range(draws):
        detector = (KLUniform() + KNN(k=1)).fit(draw(30), draw(10))
        # One of 20 exchangeable scores is the lowest.
        calibration = fn.Calibration(detector.score(draw(19)), 1 - rate)
        alarms += int(not calibration.predict(detector.score(draw(1)))[1])
    low, high = binom.ppf([0.0005, 0.9995], draws, rate)
    assert low <= alarms <= high


def test_the_inputs_of_the_fit_give_other_constants():
    """Each is its own nearest neighbor: held-out inputs, as new ones, are at a distance."""
    with pytest.raises(ValueError, match=r"scores of KNN\(k=1\) are the same for all"):
        (KLUniform() + KNN(k=1)).fit(TRAIN, TRAIN)


# Temperature scaling


def test_the_temperature_calibrates_the_softmax():
    rng = np.random.default_rng(0)
    logits = torch.from_numpy(2 * rng.standard_normal((20_000, 5)))
    labels = torch.from_numpy(np.array([rng.choice(5, p=p) for p in logits.softmax(1).numpy()]))
    for temperature in (0.1, 1, 7.5):
        held = Features(logits=logits * temperature, labels=labels)
        detector = TemperatureScaling(MSP()).fit_held_out(held)
        assert detector.temperature == pytest.approx(temperature, rel=0.03)
        torch.testing.assert_close(
            detector.score(held), (logits * temperature / detector.temperature).softmax(1).amax(1)
        )


def test_the_temperature_is_positive_even_if_all_inputs_are_classified_correctly():
    for n in (5, 500):
        labels = torch.arange(n) % 3
        logits = torch.nn.functional.one_hot(labels, 3).double() * 8
        scaled = TemperatureScaling(MSP()).fit_held_out(Features(logits=logits, labels=labels))
        # A share 1 / (n + 1) of the targets is spread over all classes.
        expected = 1 - 2 / 3 / (n + 1)
        torch.testing.assert_close(scaled.score(Features(logits=logits)), torch.full((n,), expected).double())


def test_what_temperature_scaling_refuses():
    with pytest.raises(ValueError, match=r"would change nothing: NAN\(\) does not read logits"):
        TemperatureScaling(NAN())
    for inner, why in (
        (KLMatching(), "is fitted to logits"),
        (MSP() + NAN(), "is fitted"),
        (Views(MSP()), "runs"),
    ):
        with pytest.raises(ValueError, match=f"TemperatureScaling cannot wrap .* which {why}"):
            TemperatureScaling(inner)
    detector = TemperatureScaling(GEN())
    with pytest.raises(NotFittedError):
        _ = detector.temperature
    labels = HELD_OUT.labels.clone()
    for value, message in ((-1, "1 of 60 inputs have none, the first at row 4"), (3, "row 4 has the label 3")):
        labels[4] = value
        with pytest.raises(ValueError, match=message):
            detector.fit_held_out(HELD_OUT.replace(labels=labels))
    wrong = (HELD_OUT.labels + 1) % 3
    with pytest.raises(ValueError, match="classifies the 60 held-out inputs no better than chance"):
        detector.fit_held_out(HELD_OUT.replace(labels=wrong))
    flat = HELD_OUT.replace(logits=torch.ones_like(HELD_OUT.logits))
    with pytest.raises(ValueError, match="no better than chance"):
        detector.fit_held_out(flat)
    assert not detector.is_fitted


def test_logits_recomputed_from_the_classifier_are_divided_too():
    inside = TemperatureScaling(Energy()).fit(TRAIN, HELD_OUT)
    changed = inside._changed(TEST)
    weight, bias = changed.linear()
    torch.testing.assert_close(changed.activation @ weight.T + bias, changed.logits)
    torch.testing.assert_close(changed.logits, TEST.logits / inside.temperature)


def test_a_wrapper_that_changes_features_shows_the_changed_ones_to_the_sum_inside():
    detector = ReAct(KLUniform() + NAN(), percentile=60).fit(TRAIN, HELD_OUT)
    scores = detector.score(HELD_OUT)
    torch.testing.assert_close(scores.mean(), torch.tensor(0.0, dtype=torch.float64), atol=1e-9, rtol=0)
