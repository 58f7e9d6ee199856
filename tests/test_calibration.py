"""Promised rates by simulation, and the calibration against its definitions."""

import copy
import math
import pickle
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from featnorm.calibration import Calibration, benjamini_hochberg, conformal_p_values, threshold_at_tpr

tied = st.sampled_from([-math.inf, -1e300, -1.0, 0.0, 0.5, 1.0, 1e300, math.inf])
scores_with_ties = st.lists(tied, min_size=20, max_size=60)
p_lists = st.lists(st.integers(0, 40).map(lambda k: k / 40), max_size=60)


def draw(rng, shape, ties):
    """Scores of an odd shape; with ties, a handful of values."""
    scores = rng.standard_cauchy(shape)
    return np.clip(np.round(scores), -3, 3) if ties else scores


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(
    ("n", "tpr", "repetitions"), [(19, 0.95, 1000), (33, 0.9, 1000), (60, 0.95, 1000), (1000, 0.95, 400)]
)
def test_new_id_inputs_are_accepted_at_the_promised_rate(n, tpr, repetitions, ties):
    rng = np.random.default_rng(n)
    new_per_repetition = 50
    accepted = np.array(
        [
            np.mean(
                draw(rng, new_per_repetition, ties) >= threshold_at_tpr(draw(rng, n, ties), tpr),
            )
            for _ in range(repetitions)
        ]
    )
    error = 4 * accepted.std() / math.sqrt(repetitions)
    assert accepted.mean() >= tpr - error
    if not ties:  # and not more than the n + 1 possible ranks force
        assert accepted.mean() <= tpr + 1 / (n + 1) + error


@pytest.mark.parametrize("n", [9, 200])
@pytest.mark.parametrize("ties", [False, True])
def test_p_values_of_id_inputs_are_super_uniform(n, ties):
    rng = np.random.default_rng(n)
    repetitions = 1000
    p = torch.stack(
        [conformal_p_values(draw(rng, n, ties), torch.from_numpy(draw(rng, 20, ties))) for _ in range(repetitions)]
    ).numpy()
    for u in (0.02, 0.1, 0.25, 0.5, 0.9):
        below = np.mean(p <= u, axis=1)
        assert below.mean() <= u + 4 * below.std() / math.sqrt(repetitions) + 1e-12


@pytest.mark.parametrize("ood_share", [0.0, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("fdr", [0.1, 0.3])
def test_benjamini_hochberg_controls_the_false_discovery_rate(ood_share, fdr):
    rng = np.random.default_rng(round(100 * ood_share))
    m, repetitions = 100, 250
    is_ood = np.arange(m) < round(ood_share * m)
    false_discoveries, power = [], []
    for _ in range(repetitions):
        scores = torch.from_numpy(np.where(is_ood, rng.normal(-4, 1, m), rng.normal(0, 1, m)))
        declared = benjamini_hochberg(conformal_p_values(rng.normal(0, 1, 400), scores), fdr).numpy()
        false_discoveries.append(np.sum(declared & ~is_ood) / max(np.sum(declared), 1))
        power.append(np.mean(declared[is_ood]) if ood_share else 1.0)
    error = 4 * np.std(false_discoveries) / math.sqrt(repetitions)
    assert np.mean(false_discoveries) <= (1 - ood_share) * fdr + error
    assert np.mean(power) > 0.5


@given(scores_with_ties, st.lists(tied, max_size=20))
def test_p_values_equal_their_definition(calibration, scores):
    p = conformal_p_values(calibration, torch.tensor(scores, dtype=torch.float32))
    singles = torch.tensor(scores, dtype=torch.float32).tolist()
    expected = [(1 + sum(c <= s for c in calibration)) / (len(calibration) + 1) for s in singles]
    assert p.dtype == torch.float64
    assert p.tolist() == expected


@given(scores_with_ties, st.lists(tied, max_size=20), st.sampled_from([0.05, 0.5, 0.7, 0.8, 0.9, 0.95]))
@example([float(i) for i in range(49)], [float(i) for i in range(49)], 0.9)
def test_verdict_and_p_value_agree(calibration, scores, tpr):
    fitted = Calibration(calibration, tpr)
    judged = torch.tensor([*scores, *calibration, -math.inf, math.inf], dtype=torch.float64)
    n = len(calibration)
    # p-values are whole multiples of 1 / (n + 1); in fractions, 1 - tpr is the decimal that tpr says.
    numerators = (fitted.p_value(judged) * (n + 1)).round().long().tolist()
    expected = [Fraction(k, n + 1) > 1 - Fraction(str(tpr)) for k in numerators]
    assert fitted.is_id(judged).tolist() == expected
    assert (fitted.p_value(judged) > round(1 - tpr, 12)).tolist() == expected
    assert fitted.threshold.item() == threshold_at_tpr(calibration, tpr)


@pytest.mark.parametrize(
    ("tpr", "least"), [(0.05, 1), (0.5, 1), (0.9, 9), (0.95, 19), (0.99, 99), (0.999, 999), (0.9999, 9999)]
)
def test_the_least_number_of_calibration_inputs(tpr, least):
    assert threshold_at_tpr(torch.arange(least), tpr) == 0
    message = f"^{least - 1} calibration scores are too few for tpr={tpr}: at least {least} are needed; add"
    if least > 1:
        with pytest.raises(ValueError, match=message):
            threshold_at_tpr(torch.arange(least - 1), tpr)
        with pytest.raises(ValueError, match=message):
            Calibration(torch.arange(least - 1), tpr)


def test_threshold_is_the_kth_smallest_score():
    assert threshold_at_tpr(torch.arange(1.0, 100.0)) == 5
    assert threshold_at_tpr(np.arange(100)[::-1], 0.9) == 9
    assert threshold_at_tpr([1.0] * 5 + [2.0] * 34, 0.9) == 1
    assert threshold_at_tpr([-math.inf] * 19) == -math.inf
    assert threshold_at_tpr(torch.full((19,), 0.1, dtype=torch.bfloat16)) == torch.tensor(0.1).bfloat16().item()


@given(p_lists, st.sampled_from([0.05, 0.1, 0.25, 0.5]))
def test_benjamini_hochberg_equals_its_definition(p_values, fdr):
    m = len(p_values)
    exact = [Fraction(round(40 * p), 40) for p in p_values]
    passing = [p for k, p in enumerate(sorted(exact), 1) if p <= Fraction(str(fdr)) * k / m]
    expected = [p <= max(passing, default=-1) for p in exact]
    declared = benjamini_hochberg(torch.tensor(p_values), fdr)
    assert declared.dtype == torch.bool
    assert benjamini_hochberg(p_values, fdr).tolist() == expected


def test_benjamini_hochberg_equals_scipy():
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    for m in (1, 2, 10, 500):
        for power in (1, 3):
            p = rng.uniform(size=m) ** power
            for fdr in (0.01, 0.05, 0.3):
                expected = stats.false_discovery_control(p) <= fdr
                np.testing.assert_array_equal(benjamini_hochberg(p, fdr).numpy(), expected)


def test_empty_batches():
    assert conformal_p_values([1.0], torch.empty(0)).shape == (0,)
    declared = benjamini_hochberg(torch.empty(0))
    assert declared.shape == (0,)
    assert declared.dtype == torch.bool
    fitted = Calibration(torch.arange(50))
    assert fitted.is_id(torch.empty(0)).shape == fitted.p_value(torch.empty(0)).shape == (0,)


def test_state_is_buffers_and_makes_the_calibration_again():
    scores = torch.randn(200, generator=torch.Generator().manual_seed(0))
    fitted = Calibration(scores, tpr=0.9)
    state = fitted.state_dict()
    assert set(state) == {"scores", "threshold"}
    assert not list(fitted.parameters())
    assert fitted.scores.dtype == fitted.threshold.dtype == torch.float64
    assert torch.equal(fitted.scores, scores.double().sort().values)

    rebuilt = Calibration(state["scores"], fitted.tpr)
    loaded = Calibration(torch.zeros(200), tpr=0.9)
    loaded.load_state_dict(state)
    for other in (rebuilt, loaded, copy.deepcopy(fitted)):
        assert torch.equal(other.scores, fitted.scores)
        assert torch.equal(other.threshold, fitted.threshold)
        assert torch.equal(other.p_value(scores), fitted.p_value(scores))
        assert torch.equal(other.is_id(scores), fitted.is_id(scores))


def test_casting_the_model_around_it_leaves_the_scores_exact():
    scores = 1e6 * torch.randn(100, generator=torch.Generator().manual_seed(0))
    fitted = Calibration(scores)
    expected = fitted.scores.clone()
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), fitted).half().to(torch.bfloat16).to("cpu", torch.float32)
    assert model[0].weight.dtype == torch.float32
    assert fitted.scores.dtype == fitted.threshold.dtype == torch.float64
    assert torch.equal(fitted.scores, expected)
    assert fitted.to("meta").scores.device.type == "meta"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int32])
def test_judges_scores_of_any_type(dtype):
    fitted = Calibration(torch.arange(39))
    scores = torch.tensor([3, 0, 1, 38, 50, -7])
    with torch.no_grad():
        assert fitted.is_id(scores.to(dtype)).tolist() == [True, False, True, True, True, False]
        assert fitted.p_value(scores.to(dtype)).tolist() == [5 / 40, 2 / 40, 3 / 40, 1, 1, 1 / 40]
    strided = torch.stack([scores, scores], dim=1)[:, 0].double().requires_grad_()
    assert not fitted.p_value(strided).requires_grad
    assert fitted.is_id(strided).tolist() == fitted.is_id(scores).tolist()


@pytest.mark.filterwarnings("error")
def test_strided_scores_raise_no_warning():
    strided = torch.arange(40.0, dtype=torch.float64)[::2]
    assert conformal_p_values(strided, strided).tolist() == [k / 21 for k in range(2, 22)]


def test_bad_scores_are_refused_by_name_and_index():
    fitted = Calibration(torch.arange(50))
    scores = torch.tensor([0.0, 1.0, math.nan, math.nan])
    message = "^{}: 2 of 4 values are NaN, the first at index 2; a NaN has no rank"
    for function in (fitted.is_id, fitted.p_value, lambda s: conformal_p_values([1.0], s)):
        with pytest.raises(ValueError, match=message.format("scores")):
            function(scores)
        with pytest.raises(ValueError, match=r"^scores must be 1-D, one score per input, got shape \(2, 3\)"):
            function(torch.zeros(2, 3))
    for calibrate in (threshold_at_tpr, Calibration):
        with pytest.raises(ValueError, match=message.format("id_scores")):
            calibrate(scores)
        with pytest.raises(ValueError, match="id_scores is empty: at least one score"):
            calibrate([])
    with pytest.raises(ValueError, match=message.format("calibration_scores")):
        conformal_p_values(scores, torch.zeros(1))
    with pytest.raises(ValueError, match="calibration_scores is empty: at least one score"):
        conformal_p_values([], torch.zeros(1))
    with pytest.raises(ValueError, match=message.format("p_values")):
        benjamini_hochberg(scores)
    with pytest.raises(ValueError, match=r"^p_values: 2 of 3 values are outside \[0, 1\].* index 0; pass p-val"):
        benjamini_hochberg([-0.1, 0.5, 1.1])


@pytest.mark.parametrize("share", [0.0, 1.0, -0.5, 95, math.nan])
def test_bad_rates_are_refused(share):
    for calibrate in (threshold_at_tpr, Calibration):
        with pytest.raises(ValueError, match=rf"^tpr must be in \(0, 1\), got {share}"):
            calibrate(torch.arange(50), share)
    with pytest.raises(ValueError, match=rf"^fdr must be in \(0, 1\), got {share}"):
        benjamini_hochberg([0.5], share)


def test_the_share_cannot_leave_its_threshold_behind():
    calibration = Calibration(torch.arange(100.0), 0.9)
    with pytest.raises(AttributeError):
        calibration.tpr = 0.5
    assert calibration.tpr == 0.9
    assert float(calibration.threshold) == threshold_at_tpr(torch.arange(100.0), 0.9)
    assert copy.deepcopy(calibration).tpr == pickle.loads(pickle.dumps(calibration)).tpr == 0.9
