"""Metrics compared with their definitions and scikit-learn, and properties of ranks."""

import dataclasses
import math
from fractions import Fraction
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from featnorm.metrics import (
    Metrics,
    aupr_in,
    aupr_out,
    auroc,
    bootstrap_interval,
    detection_accuracy,
    evaluate,
    fpr_at_tpr,
    fpr_at_tpr_ood_positive,
    roc_curve,
)

MEASURES = [auroc, aupr_in, aupr_out, fpr_at_tpr, fpr_at_tpr_ood_positive, detection_accuracy]

tied = st.sampled_from([-math.inf, -1e300, -2.0, -0.0, 0.0, 0.5, 1.0, 1e300, math.inf])
any_score = st.floats(allow_nan=False, width=64)
samples = st.one_of(
    st.lists(tied, min_size=1, max_size=40),
    st.lists(any_score, min_size=1, max_size=40),
    st.lists(st.integers(-3, 3).map(float), min_size=1, max_size=40),
)
shares = st.one_of(st.sampled_from([0.05, 0.5, 0.9, 0.95, 1.0]), st.integers(1, 100).map(lambda k: k / 100))


def thresholds(id_scores, ood_scores):
    return sorted({*id_scores, *ood_scores}, reverse=True)


def auroc_by_pairs(id_scores, ood_scores):
    wins = sum(Fraction(int(i > o) * 2 + int(i == o), 2) for i in id_scores for o in ood_scores)
    return wins / (len(id_scores) * len(ood_scores))


def average_precision_by_steps(positive, negative):
    total, recall = 0.0, 0.0
    for tau in thresholds(positive, negative):
        tp = sum(s >= tau for s in positive)
        fp = sum(s >= tau for s in negative)
        total += (tp / len(positive) - recall) * tp / (tp + fp)
        recall = tp / len(positive)
    return total


def fpr_by_search(positive, negative, tpr):
    for tau in thresholds(positive, negative):
        if Fraction(sum(s >= tau for s in positive), len(positive)) >= Fraction(str(tpr)):
            return sum(s >= tau for s in negative) / len(negative)
    raise AssertionError("the smallest threshold accepts everything")


def accuracy_by_search(id_scores, ood_scores):
    def accuracy(tau):
        tpr = np.mean([s >= tau for s in id_scores])
        return (tpr + np.mean([s < tau for s in ood_scores])) / 2

    return max(0.5, *(accuracy(tau) for tau in [math.inf, *thresholds(id_scores, ood_scores)]))


def negated(scores):
    return [-s for s in scores]


def ranked(*lists):
    """Return integer ranks of the scores, with the same order and ties, in the range that scikit-learn accepts."""
    ranks = np.unique(np.concatenate(lists), return_inverse=True)[1]
    return np.split(ranks, np.cumsum([len(x) for x in lists])[:-1])


@pytest.fixture(scope="module")
def gaussian():
    rng = np.random.default_rng(0)
    return rng.normal(1, 1, 700), rng.normal(0, 1.5, 400)


@given(samples, samples, shares)
@example([3.0], [3.0], 0.95)
@example([1.0], [2.0], 0.95)
@example([math.inf], [-math.inf], 1.0)
def test_measures_equal_their_definitions(id_scores, ood_scores, tpr):
    assert auroc(id_scores, ood_scores) == float(auroc_by_pairs(id_scores, ood_scores))
    assert aupr_in(id_scores, ood_scores) == pytest.approx(
        average_precision_by_steps(id_scores, ood_scores), abs=1e-12
    )
    assert aupr_out(id_scores, ood_scores) == pytest.approx(
        average_precision_by_steps(negated(ood_scores), negated(id_scores)), abs=1e-12
    )
    assert fpr_at_tpr(id_scores, ood_scores, tpr) == fpr_by_search(id_scores, ood_scores, tpr)
    assert fpr_at_tpr_ood_positive(id_scores, ood_scores, tpr) == fpr_by_search(
        negated(ood_scores), negated(id_scores), tpr
    )
    assert detection_accuracy(id_scores, ood_scores) == pytest.approx(
        accuracy_by_search(id_scores, ood_scores), abs=1e-12
    )


@settings(max_examples=50)
@given(samples, samples)
def test_agrees_with_scikit_learn(id_scores, ood_scores):
    id_ranks, ood_ranks = ranked(id_scores, ood_scores)
    is_id = np.repeat([1, 0], [len(id_ranks), len(ood_ranks)])
    ranks = np.concatenate([id_ranks, ood_ranks])
    assert auroc(id_scores, ood_scores) == pytest.approx(sk.roc_auc_score(is_id, ranks), abs=1e-12)
    expected_in = sk.average_precision_score(is_id, ranks)
    expected_out = sk.average_precision_score(1 - is_id, -ranks)
    assert aupr_in(id_scores, ood_scores) == pytest.approx(expected_in, abs=1e-12)
    assert aupr_out(id_scores, ood_scores) == pytest.approx(expected_out, abs=1e-12)
    fpr, tpr, _ = sk.roc_curve(is_id, ranks, drop_intermediate=False)
    for ours, theirs in zip(roc_curve(id_scores, ood_scores), (fpr, tpr), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-12)


@given(samples, samples)
def test_evaluate_is_the_single_functions(id_scores, ood_scores):
    measures = evaluate(id_scores, ood_scores)
    assert measures == Metrics(
        auroc=auroc(id_scores, ood_scores),
        aupr_in=aupr_in(id_scores, ood_scores),
        aupr_out=aupr_out(id_scores, ood_scores),
        fpr95=fpr_at_tpr(id_scores, ood_scores),
        detection_accuracy=detection_accuracy(id_scores, ood_scores),
    )
    for value in dataclasses.astuple(measures):
        assert type(value) is float
        assert 0 <= value <= 1


@given(samples, samples)
def test_auroc_is_antisymmetric(a, b):
    assert auroc(a, b) + auroc(b, a) == pytest.approx(1, abs=2**-52)
    assert auroc(negated(a), negated(b)) == auroc(b, a)


@given(st.lists(st.integers(-50, 50), min_size=1), st.lists(st.integers(-50, 50), min_size=1))
def test_strictly_increasing_maps_change_nothing(id_scores, ood_scores):
    expected = evaluate(id_scores, ood_scores)
    id_array, ood_array = np.array(id_scores, dtype=float), np.array(ood_scores, dtype=float)
    for increasing in (lambda x: 1e6 * x, lambda x: 1e300 * x, lambda x: x**3 - 7, np.exp, np.arctan):
        assert evaluate(increasing(id_array), increasing(ood_array)) == expected


def test_large_scores_are_not_squashed():
    # Under a sigmoid every one of these is 1, and AUROC one half.
    scores = torch.arange(1000.0)
    assert auroc(1e6 * (scores + 1000), 1e6 * scores) == 1


@pytest.mark.parametrize(
    "dtype",
    [
        "float16",
        "bfloat16",
        "float32",
        "float64",
        "float8_e4m3fn",
        "uint8",
        "int8",
        "int16",
        "int32",
        "int64",
        "uint64",
    ],
)
def test_tensor_types(dtype):
    id_scores, ood_scores = [3, 1, 2, 2, 7], [0, 2, 1, 1]
    expected = evaluate(id_scores, ood_scores)
    id_tensor = torch.tensor(id_scores).to(getattr(torch, dtype))
    assert evaluate(id_tensor, torch.tensor(ood_scores).to(id_tensor.dtype)) == expected
    assert evaluate(id_tensor, np.array(ood_scores, dtype=np.float32)) == expected


def test_types_meet_without_rounding():
    # 0.1 in float32 lies above 0.1 in float64; rounding either to the other's type would tie or flip them.
    assert auroc(np.array([0.1], np.float32), np.array([0.1], np.float64)) == 1
    assert auroc([2**53 - 1], [2**53 - 2]) == 1


def test_inputs_as_users_hold_them(gaussian):
    id_scores, ood_scores = gaussian
    expected = evaluate(id_scores, ood_scores)
    id_copy = id_scores.copy()
    id_copy.flags.writeable = False
    assert evaluate(id_copy, list(ood_scores)) == expected
    assert evaluate(id_scores[::-1], tuple(ood_scores)) == expected
    assert evaluate(torch.tensor(id_scores, requires_grad=True), torch.tensor(ood_scores)) == expected
    np.testing.assert_array_equal(id_copy, id_scores)


def test_fpr_at_tpr_counts_are_free_of_float_error():
    # 0.95 * 20 must keep 19 of 20, 0.9 * 10 keep 9 of 10 and (1 - 0.7) * 10 keep 3 of 10, not one more.
    for tpr, n, k in [(0.95, 20, 19), (0.9, 10, 9), (1 - 0.7, 10, 3), (0.07, 100, 7), (1.0, 7, 7)]:
        tau = n - k  # of the scores 0 .. n - 1, those at n - k and above
        assert fpr_at_tpr(range(n), [tau, tau - 1], tpr) == 0.5
    assert fpr_at_tpr(range(10), [9, 8], 1e-20) == 0.5


def test_the_two_conventions_differ():
    id_scores, ood_scores = [2.0] * 50 + [0.0] * 50, [1.0] * 100
    assert fpr_at_tpr(id_scores, ood_scores) == 1
    assert fpr_at_tpr_ood_positive(id_scores, ood_scores) == 0.5


def test_roc_curve_runs_from_corner_to_corner(gaussian):
    fpr, tpr = roc_curve(*gaussian)
    assert (fpr[0], tpr[0], fpr[-1], tpr[-1]) == (0, 0, 1, 1)
    assert np.all(np.diff(fpr) >= 0)
    assert np.all(np.diff(tpr) >= 0)
    assert fpr.dtype == tpr.dtype == np.float64
    assert np.trapezoid(tpr, fpr) == pytest.approx(auroc(*gaussian), abs=1e-12)


def test_large_samples_agree_with_scikit_learn():
    rng = np.random.default_rng(1)
    id_scores = rng.normal(1, 1, 200_000).round(3).astype(np.float32)
    ood_scores = rng.normal(0, 1, 100_000).round(3).astype(np.float32)
    is_id = np.repeat([1, 0], [200_000, 100_000])
    scores = np.concatenate([id_scores, ood_scores])
    assert auroc(id_scores, ood_scores) == pytest.approx(sk.roc_auc_score(is_id, scores), abs=1e-12)
    expected = sk.average_precision_score(is_id, scores)
    assert aupr_in(id_scores, ood_scores) == pytest.approx(expected, abs=1e-12)


def test_counts_do_not_overflow_32_bits():
    scores = torch.arange(100_000)
    assert auroc(scores, scores) == 0.5
    assert detection_accuracy(scores + 50_000, scores) == 0.75


def test_bootstrap_interval_covers_the_known_auroc():
    # Two unit Gaussians sqrt(2) apart: AUROC = Phi(1). 95 % of 80 intervals, within 4 deviations.
    truth = 0.5 * math.erfc(-1 / math.sqrt(2))
    rng = np.random.default_rng(2)
    covered = 0
    for seed in range(80):
        id_scores, ood_scores = rng.normal(math.sqrt(2), 1, 100), rng.normal(0, 1, 60)
        low, high = bootstrap_interval(auroc, id_scores, ood_scores, n_resamples=80, seed=seed)
        covered += low <= truth <= high
    assert abs(covered / 80 - 0.95) < 4 * math.sqrt(0.95 * 0.05 / 80)


@pytest.mark.parametrize("metric", [*MEASURES, partial(fpr_at_tpr, tpr=0.8)])
def test_bootstrap_interval_of_every_measure(metric, gaussian):
    low, high = bootstrap_interval(metric, *gaussian, n_resamples=100)
    assert 0 <= low < metric(*gaussian) < high <= 1


def test_bootstrap_interval_depends_on_seed_and_level_alone(gaussian):
    interval = partial(bootstrap_interval, auroc, *gaussian, n_resamples=100)
    assert interval(seed=3) == interval(seed=3) != interval(seed=4)
    narrow, wide = interval(level=0.5), interval(level=0.99)
    assert wide[0] < narrow[0] < narrow[1] < wide[1]
    # Only the ranks matter, and resampling one score each gives the same score.
    id_scores, ood_scores = gaussian
    assert interval() == bootstrap_interval(auroc, 1e6 * id_scores, 1e6 * ood_scores, n_resamples=100)
    assert bootstrap_interval(auroc, [-math.inf], [-math.inf], n_resamples=1) == (0.5, 0.5)


@pytest.mark.parametrize(
    ("id_scores", "ood_scores", "error", "message"),
    [
        ([], [1.0], ValueError, "id_scores is empty: at least one score"),
        ([1.0], torch.empty(0), ValueError, "ood_scores is empty"),
        ([[1.0]], [1.0], ValueError, r"id_scores must be 1-D, one score per input, got shape \(1, 1\)"),
        (1.0, [1.0], ValueError, r"id_scores must be 1-D, one score per input, got shape \(\)"),
        ([1.0, math.nan, 2.0, math.nan], [1.0], ValueError, "id_scores: 2 of 4 values are NaN.* index 1;"),
        (
            [1.0],
            torch.tensor([math.nan], dtype=torch.bfloat16),
            ValueError,
            "ood_scores: 1 of 1 values are NaN",
        ),
        ([1, 2**53], [1.0], ValueError, r"id_scores: 1 of 2 values are integers of.* index 1; subtract"),
        ([-(2**63)], [1.0], ValueError, r"id_scores: 1 of 1 values are integers of"),
        ([True, False], [1.0], TypeError, "id_scores must be .* of real numbers, got bool"),
        ([1.0], [1j], TypeError, "ood_scores must be .* of real numbers, got complex128"),
        (["a"], [1.0], TypeError, "id_scores must be .* of real numbers, got <U1"),
        ([1.0], [[1.0], [1.0, 2.0]], TypeError, "ood_scores must be .* of real numbers: .*inhomogeneous"),
        ([1.0], np.ones(2, np.longdouble), TypeError, "ood_scores must be .* of real numbers, got (float|longd)"),
    ],
)
@pytest.mark.parametrize("measure", [*MEASURES, evaluate, roc_curve, partial(bootstrap_interval, auroc)])
def test_bad_scores_are_refused_by_name(measure, id_scores, ood_scores, error, message):
    with pytest.raises(error, match=message):
        measure(id_scores, ood_scores)


@pytest.mark.parametrize("tpr", [0.0, -0.1, 1.01, 95, math.nan])
@pytest.mark.parametrize("measure", [fpr_at_tpr, fpr_at_tpr_ood_positive])
def test_bad_tpr_is_refused(measure, tpr):
    with pytest.raises(ValueError, match=rf"tpr must be in \(0, 1\], got {tpr}"):
        measure([1.0], [0.0], tpr)


def test_bad_bootstrap_arguments_are_refused():
    with pytest.raises(TypeError, match="metric must be a function of ID and OOD scores such as auroc, got 3"):
        bootstrap_interval(3, [1.0], [2.0])
    with pytest.raises(ValueError, match=r"level must be in \(0, 1\), got 1"):
        bootstrap_interval(auroc, [1.0], [0.0], level=1)
    with pytest.raises(ValueError, match="n_resamples must be at least 1, got 0"):
        bootstrap_interval(auroc, [1.0], [0.0], n_resamples=0)
