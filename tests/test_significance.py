"""Intervals, tests and cliques, against brute force, scipy, and simulations of their coverage."""

import itertools

import numpy as np
import pytest
from scipy.stats import norm

from featnorm.metrics import auroc, fpr_at_tpr
from featnorm.significance import (
    _CHUNK,
    bootstrap_fpr95,
    cliques,
    delong,
    from_covariance,
    from_resamples,
    placements,
)


def scores(seed, k=3, n=40, m=30, digits=1):
    rng = np.random.default_rng(seed)
    common = rng.normal(0, 1, n + m)
    both = common + rng.normal(0, 0.7, (k, n + m)) + np.linspace(0.3, 1.2, k)[:, None] * (np.arange(n + m) < n)
    return both[:, :n].round(digits), both[:, n:].round(digits)


def test_placements_are_shares_of_pairs_and_average_to_auroc():
    ids, oods = scores(0)
    ids[0, :3], oods[0, :2] = [np.inf, -np.inf, -np.inf], [-np.inf, np.inf]
    of_id, of_ood = placements(ids, oods)
    for x, y, a, b in zip(ids, oods, of_id, of_ood, strict=True):
        wins = (x[:, None] > y) + 0.5 * (x[:, None] == y)
        np.testing.assert_allclose(a, wins.mean(1), atol=1e-12)
        np.testing.assert_allclose(b, wins.mean(0), atol=1e-12)
        assert a.mean() == pytest.approx(auroc(x, y), abs=1e-12)


def test_delong_is_the_sum_of_sample_covariances():
    parts = [placements(*scores(seed, m=m)) for seed, m in ((1, 30), (1, 20))]
    parts[1] = (placements(scores(1)[0], scores(2, m=20)[1])[0], parts[1][1])
    of_id = (parts[0][0] + parts[1][0]) / 2
    expected = np.cov(of_id) / 40 + (np.cov(parts[0][1]) / 30 + np.cov(parts[1][1]) / 20) / 4
    np.testing.assert_allclose(delong(parts), expected, rtol=1e-10)


def test_delong_agrees_with_a_bootstrap():
    ids, oods = scores(3, n=400, m=300)
    rng = np.random.default_rng(0)
    resampled = []
    for _ in range(1500):
        i, j = rng.integers(0, 400, 400), rng.integers(0, 300, 300)
        resampled.append([auroc(x[i], y[j]) for x, y in zip(ids, oods, strict=True)])
    covariance = np.cov(np.transpose(resampled))
    np.testing.assert_allclose(delong([placements(ids, oods)]), covariance, rtol=0.15, atol=1e-5)


@pytest.mark.parametrize(("n", "m", "digits"), [(300, 200, 1), (1, 1, 1), (19, 5, 1), (500, 40, 8)])
def test_the_bootstrap_of_fpr95_is_the_metric_on_the_resamples(n, m, digits):
    sets = [scores(seed, n=n, m=m, digits=digits) for seed in (4, 5)]
    ids, oods = sets[0][0], [one[1] for one in sets]
    oods[0][0, : m // 4] = -np.inf
    count = _CHUNK + 30
    got = bootstrap_fpr95(ids, oods, n_resamples=count, seed=7)
    assert got.shape == (count, 2, 3)
    rng = np.random.default_rng(7)
    expected = []
    for size in (_CHUNK, count - _CHUNK):
        rows = rng.integers(0, n, (size, n))
        for_sets = [rng.integers(0, m, (size, m)) for _ in oods]
        for b in range(size):
            pairs = [(y, of[b]) for y, of in zip(oods, for_sets, strict=True)]
            expected.append([[fpr_at_tpr(ids[k][rows[b]], y[k][of]) for k in range(3)] for y, of in pairs])
    np.testing.assert_allclose(got, expected, atol=1e-6)


def test_intervals_of_shares_stay_inside_and_differences_are_paired():
    value, covariance = np.array([0.99, 1.0, 0.5]), np.diag([1e-3, 0.0, 1e-3])
    covariance[0, 2] = covariance[2, 0] = 9e-4
    found = from_covariance(value, covariance, 2)
    assert (found.low[1], found.high[1]) == (1, 1)
    assert 0 < found.low[0] < 0.99 < found.high[0] < 1
    half = norm.ppf(0.975) * np.sqrt(2e-3 - 2 * 9e-4)
    np.testing.assert_allclose([found.difference_low[0], found.difference_high[0]], [0.49 - half, 0.49 + half])
    assert found.difference[2] == found.difference_low[2] == found.difference_high[2] == 0


def test_one_input_has_no_interval():
    found = from_covariance(np.array([0.5]), delong([placements(np.ones((1, 1)), np.ones((1, 5)))]), 0)
    assert np.isnan(found.low[0])


@pytest.mark.slow
def test_intervals_cover_the_truth():
    """Binormal scores, whose AUROC and FPR95 are known; two detectors, correlated."""
    shifts = np.array([1.5, 1.2])
    true_auroc = norm.cdf(shifts / np.sqrt(2))
    true_fpr = norm.cdf(norm.ppf(0.95) - shifts)
    covered = np.zeros((4, 2))
    runs = 300
    rng = np.random.default_rng(0)
    for run in range(runs):
        ids, oods = (
            0.8 * rng.normal(size=n) + 0.6 * rng.normal(size=(2, n)) + shift
            for n, shift in ((300, shifts[:, None]), (250, 0))
        )
        value = np.array([auroc(x, y) for x, y in zip(ids, oods, strict=True)])
        of_auroc = from_covariance(value, delong([placements(ids, oods)]), 1)
        value = np.array([fpr_at_tpr(x, y) for x, y in zip(ids, oods, strict=True)])
        resampled = bootstrap_fpr95(ids, [oods], n_resamples=300, seed=run)[:, 0]
        of_fpr = from_resamples(value, resampled, 1)
        for row, (found, truth) in enumerate(((of_auroc, true_auroc), (of_fpr, true_fpr))):
            covered[2 * row] += (found.low <= truth) & (truth <= found.high)
            difference = truth - truth[1]
            covered[2 * row + 1] += (found.difference_low <= difference) & (difference <= found.difference_high)
    share = covered / runs
    assert (share[0] > 0.92).all()
    assert share[1, 0] > 0.92
    assert (share[2] > 0.90).all()
    assert share[3, 0] > 0.90


def test_cliques_are_runs_of_the_ranking_without_a_difference():
    value = np.array([0.7, 0.9, 0.89, 0.8, 0.71])
    covariance = np.eye(5) * 1e-5
    assert cliques(value, covariance) == ["c", "a", "a", "b", "c"]
    # Neighbors cannot be told apart, but the ends can.
    assert cliques(np.array([0.9, 0.89, 0.88]), np.eye(3) * 2e-5) == ["a", "ab", "b"]
    assert cliques(np.array([0.9, 0.9]), np.zeros((2, 2))) == ["a", "a"]
    assert cliques(np.array([0.9, 0.8]), np.zeros((2, 2))) == ["a", "b"]
    assert cliques(np.array([0.9]), np.zeros((1, 1))) == ["a"]
    assert cliques(np.array([1.0, 0.5]), np.full((2, 2), np.nan)) == ["a", "a"]
    many = cliques(np.linspace(1, 0, 30), np.zeros((30, 30)))
    assert many[25:] == ["z", "(27)", "(28)", "(29)", "(30)"]


def test_cliques_apply_holms_correction():
    rng = np.random.default_rng(1)
    for _ in range(30):
        value, deviation = rng.normal(0.8, 0.01, 4), 0.004
        pairs = list(itertools.combinations(range(4), 2))
        p = {(i, j): 2 * norm.sf(abs(value[i] - value[j]) / (deviation * 2**0.5)) for i, j in pairs}
        rejected = set()
        for step, pair in enumerate(sorted(p, key=p.get)):
            if p[pair] > 0.05 / (6 - step):
                break
            rejected.add(pair)
        letters = cliques(value, np.eye(4) * deviation**2)
        order = np.argsort(-value)
        for a, b in itertools.combinations(range(4), 2):
            run = order[a : b + 1]
            apart = any(tuple(sorted(pair)) in rejected for pair in itertools.combinations(run.tolist(), 2))
            assert bool(set(letters[order[a]]) & set(letters[order[b]])) != apart


@pytest.mark.slow
def test_equal_detectors_are_rarely_told_apart():
    rng = np.random.default_rng(2)
    wrong = 0
    for _ in range(300):
        ids, oods = (rng.normal(size=n) + rng.normal(size=(5, n)) + shift for n, shift in ((200, 1.5), (150, 0)))
        value = np.array([auroc(x, y) for x, y in zip(ids, oods, strict=True)])
        wrong += len(set(cliques(value, delong([placements(ids, oods)])))) > 1
    assert wrong / 300 < 0.08
