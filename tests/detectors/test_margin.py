"""FDBD, NCI and ORA where their formulas divide by zero, and the logits that they refuse."""

import pytest
import torch

from fabricate import assert_close, fitted
from featnorm.detectors import FDBD, NCI, ORA
from featnorm.features import Features
from references import TEST, TRAIN, np_fdbd, np_nci, np_ora

KINDS = {FDBD: np_fdbd, NCI: np_nci, ORA: np_ora}
kinds = pytest.mark.parametrize("kind", KINDS)


def of(h, weight, bias=None):
    return Features(pooled=h, logits=torch.nn.functional.linear(h, weight, bias), classifier=(weight, bias))


def expected(kind, train, test):
    arrays = (train.pooled, train.classifier[0], test.logits, test.pooled)
    return KINDS[kind](*(array.double().numpy() for array in arrays))


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_rows_of_the_classifier_have_no_boundary(kind, dtype):
    weight, bias = (t.to(dtype) for t in TRAIN.classifier)
    weight = torch.cat([weight, weight]) + 5  # what all rows share does not matter
    train, test = (of(f.pooled.to(dtype), weight, torch.cat([bias, bias])) for f in (TRAIN, TEST))
    scores = kind().fit(train).score(test)
    assert_close(scores.double(), expected(kind, train, test), 1e-8 if dtype == torch.float64 else 1e-4)


@kinds
def test_a_classifier_of_equal_rows_has_a_score(kind):
    train = of(TRAIN.pooled, torch.ones(4, 12, dtype=torch.float64))
    scores = kind().fit(train).score(train)
    assert scores.isfinite().all()
    if kind is not NCI:
        assert (scores == 0).all()


@kinds
def test_an_input_at_the_mean_scores_zero(kind):
    same = TRAIN[[7] * 30]
    assert (fitted(f"{kind.__name__}()", same).score(same) == 0).all()
    away = same.replace(pooled=None, activation=same.activation + 1)
    assert fitted(f"{kind.__name__}()", same).score(away.replace(pooled=away.activation)).isfinite().all()


@kinds
def test_two_classes_and_a_classifier_without_a_bias(kind):
    train, test = (of(f.pooled, TRAIN.classifier[0][:2]) for f in (TRAIN, TEST))
    assert_close(kind().fit(train).score(test), expected(kind, train, test), 1e-8)


@kinds
def test_the_blocks_of_a_large_batch_do_not_matter(kind, monkeypatch):
    whole = kind().fit(TRAIN).score(TRAIN)
    monkeypatch.setattr("featnorm.detectors.margin._BLOCK_ELEMENTS", 1)
    monkeypatch.setattr("featnorm.detectors.margin._MIN_BLOCK_ROWS", 7)
    torch.testing.assert_close(kind().fit(TRAIN).score(TRAIN), whole, rtol=1e-12, atol=0)


@kinds
def test_logits_that_are_no_linear_map_are_refused(kind):
    weight, _ = TRAIN.classifier
    cosine = TRAIN.replace(logits=torch.nn.functional.normalize(TRAIN.activation) @ weight.T)
    with pytest.raises(ValueError, match="needs logits that are a linear map of `activation`"):
        kind().fit(cosine)


@kinds
def test_the_layer_is_the_one_that_the_classifier_reads(kind):
    behind_a_head = TRAIN.replace(pooled=torch.rand(150, 5, dtype=torch.float64))
    assert_close(kind().fit(behind_a_head).score(behind_a_head), kind().fit(TRAIN).score(TRAIN), 1e-12)


def test_wrong_alpha():
    with pytest.raises(ValueError, match=r"NCI: alpha must be a number in \[0, inf\), got -1"):
        NCI(alpha=-1)
