"""KNN's index: the stated recall, against the exact search that test_references.py holds to the formula."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

import featnorm as fn
from featnorm.detectors import KNN, neighbors

K = 10


@pytest.fixture(autouse=True)
def _indexed(monkeypatch):
    monkeypatch.setattr(neighbors, "_MIN_INDEXED_ROWS", 6_000)


def like_features(n, seed, width=48):
    """Rows like a network's: classes, few directions within each, and a rectifier."""
    random = torch.Generator().manual_seed(0)
    means = torch.randn(20, width, generator=random)
    directions = torch.randn(6, width, generator=random)
    own = torch.Generator().manual_seed(seed)
    kinds = torch.randint(20, (n,), generator=own)
    return (means[kinds] + 0.4 * torch.randn(n, 6, generator=own) @ directions).relu()


@pytest.fixture(scope="module")
def bank():
    return fn.Features(pooled=like_features(8_000, 1))


@pytest.fixture(scope="module")
def queries():
    foreign = torch.rand(100, 48, generator=torch.Generator().manual_seed(3))
    return fn.Features(pooled=torch.cat([like_features(400, 2), foreign]))


def unit(features):
    return normalize(features.pooled)


def is_indexed(detector):
    return isinstance(detector._fitted_state(), neighbors.Index)


@pytest.mark.parametrize("recall", [0.8, 0.99])
def test_recall_is_reached(bank, queries, recall):
    exact, index = KNN(K).fit(bank), KNN(K, recall=recall).fit(bank)
    own = unit(queries)[:400]
    true, found = exact.nearest(own, K), index.nearest(own, K)
    assert is_indexed(index)
    assert not is_indexed(exact)
    assert (found <= true[:, -1:] + 1e-6).float().mean() > recall - 0.02
    assert (found.diff(dim=1) >= 0).all()


def test_what_is_missed_makes_a_distance_larger(bank, queries):
    exact, index = (KNN(K, recall=recall).fit(bank).score(queries) for recall in (None, 0.8))
    assert (index <= exact + 1e-6).all()
    assert (index < exact - 1e-6).any()


def test_a_score_does_not_depend_on_its_batch(bank, queries):
    index = KNN(K, recall=0.9).fit(bank)
    assert is_indexed(index)
    alone = [index.score(queries[row : row + 1]) for row in range(0, 500, 9)]
    torch.testing.assert_close(torch.cat(alone), index.score(queries)[::9], rtol=0, atol=0)


def test_queries_are_asked_in_blocks(bank, queries, monkeypatch):
    index = KNN(K, recall=0.9).fit(bank)
    whole = index.score(queries)
    monkeypatch.setattr(neighbors.Index, "_BLOCK", 7 * 4 * K)
    assert torch.equal(index.score(queries), whole)


def test_a_query_whose_cells_hold_too_few_is_searched_exactly(bank, queries):
    index = KNN(K, recall=0.9).fit(bank)
    index._fitted_state().cells.nprobe = 1
    many = 1_000  # a cell holds some 50
    torch.testing.assert_close(
        index.nearest(unit(queries)[:5], many), KNN(K).fit(bank).nearest(unit(queries)[:5], many)
    )


def test_the_largest_k(queries):
    bank = fn.Features(pooled=like_features(6_001, 4))
    exact, index = (KNN(6_001, recall=recall).fit(bank) for recall in (None, 0.9))
    torch.testing.assert_close(index.score(queries), exact.score(queries))


def test_noise_is_searched_exactly():
    noise = fn.Features(pooled=torch.randn(7_000, 256, generator=torch.Generator().manual_seed(0)))
    index = KNN(K, recall=0.95).fit(noise)
    assert not is_indexed(index)
    assert torch.equal(index.score(noise[:50]), KNN(K).fit(noise).score(noise[:50]))


def test_a_small_bank_is_searched_exactly(queries):
    few = fn.Features(pooled=like_features(5_999, 5))
    assert not is_indexed(KNN(K, recall=0.9).fit(few))


@pytest.mark.parametrize(
    "rows",
    [
        torch.ones(6_500, 5),
        torch.zeros(6_500, 5),
        torch.eye(5).repeat(1_300, 1),
        torch.cat([torch.zeros(3_000, 5), torch.rand(3_500, 5)]),
        torch.rand(6_500, 1),
    ],
    ids=["one point", "zeros", "five points", "half zeros", "one unit"],
)
def test_ugly_banks(rows):
    features = fn.Features(pooled=rows)
    index, exact = (KNN(K, recall=recall).fit(features) for recall in (0.9, None))
    scores = index.score(features[::13])
    assert torch.isfinite(scores).all()
    assert (scores <= exact.score(features[::13]) + 1e-6).all()


def test_merged_fits_are_the_fit_of_the_whole(bank, queries):
    whole = KNN(K, recall=0.99).fit(bank)
    halves = [KNN(K, recall=0.99).fit(half) for half in (bank[:3_000], bank[3_000:])]
    assert torch.equal(halves[0].merge(halves[1]).score(queries), whole.score(queries))
    with pytest.raises(ValueError, match="same detector"):
        whole.merge(KNN(K).fit(bank))


def test_a_bank_in_place_that_is_not_contiguous(bank, queries):
    rows = unit(bank)
    strided = torch.cat([rows, rows], 1)[:, :48]
    assert not strided.is_contiguous()
    assert torch.equal(
        KNN(K, recall=0.9).use_bank(strided).score(queries), KNN(K, recall=0.9).use_bank(rows).score(queries)
    )


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda index: pickle.loads(pickle.dumps(index))])
def test_a_copy_has_no_index_until_it_is_asked(bank, queries, copied):
    index = KNN(K, recall=0.9).fit(bank)
    scores = index.score(queries)
    again = copied(index)
    assert again._finalized is None
    assert torch.equal(again.score(queries), scores)
    assert np.shares_memory(index._fitted_state().bank, index.bank.rows.numpy())


@pytest.mark.parametrize("recall", [0, 1, 1.0, 0.0, -0.5, "0.9", True, float("nan")])
def test_a_recall_that_is_none(recall):
    with pytest.raises(ValueError, match=r"KNN: recall must be a number in \(0, 1\) or None, got "):
        KNN(K, recall=recall)


def test_the_size_of_a_bank_is_bounded():
    rows, queries = (
        fn.Features(pooled=torch.rand(n, 6, generator=torch.Generator().manual_seed(n))) for n in (200, 9)
    )
    whole, sampled = (KNN(k=3, size=size).fit(rows) for size in (None, 60))
    assert sampled.bank_shape == (60, 6)
    kept = (sampled.bank.rows[:, None] == whole.bank.rows).all(2)
    assert kept.any(1).all()
    # A neighbor of the sample is one of the bank, and no nearer than the nearest of all.
    assert (sampled.score(queries) <= whole.score(queries)).all()
    part = KNN(k=3, size=60).partial_fit(rows[150:]).merge(KNN(k=3, size=60).fit(rows[:150]))
    assert torch.equal(part.score(queries), sampled.score(queries))
    again = KNN(k=3, size=60)
    again.load_state_dict(sampled.state_dict())
    assert torch.equal(again.score(queries), sampled.score(queries))
    with pytest.raises(ValueError, match=r"KNN\(size=49\) has only 49 inputs in its bank: raise size, or lower k"):
        KNN(size=49).fit(rows).score(queries)
    with pytest.raises(ValueError, match=r"KNN\(k=3, size=60\) keeps a sample .*: leave out size to use a bank"):
        KNN(k=3, size=60).use_bank(whole.bank.rows)
