"""The rate that the jackknife states for small sets, exactly and by simulation, and its scores and state."""

import copy
import functools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import featnorm as fn
from fabricate import assert_same_state, state
from featnorm.calibration import Calibration
from featnorm.detectors import KNN, NAN, SSD, Detector, Jackknife, parse_detector
from featnorm.features import Features
from featnorm.splitting import held_out, left_out

few_values = st.sampled_from([-math.inf, -1.0, 0.0, 0.5, 1.0, math.inf])
without_two = st.integers(2, 14).flatmap(lambda n: arrays(float, (n, n), elements=few_values))


class Given(Detector, registered=False):
    """A detector of given scores: one column of the activation, in the precision of the features."""

    reads = ("activation",)

    def __init__(self, column):
        super().__init__()
        self.column = column

    def _score(self, features):
        return features.tensor("activation")[:, self.column]


@functools.cache
def jackknife_of_columns(count):
    """A jackknife whose copies give the scores in the columns of the activation."""
    detector = Jackknife(NAN(), count=count)
    for column in range(detector.count):
        detector.copies[column] = Given(column)
    detector.reads = ("activation",)
    detector._require = lambda *_: None  # infinite features stand for infinite scores
    for given_scores in detector.copies:
        given_scores._require = detector._require
    return detector


def predict(left_out_scores, scores, tpr):
    detector = jackknife_of_columns(len(left_out_scores))
    detector.left_out.scores = torch.as_tensor(left_out_scores).double()
    detector._drop_fitted_state()
    score = detector.score(Features(activation=torch.as_tensor(scores)))
    return score, *Calibration(detector.calibration_scores, tpr).predict(score)


@given(without_two, st.sampled_from([0.5, 0.75, 0.8, 0.9]))
def test_whichever_input_is_the_new_one_at_most_the_stated_share_is_flagged(scores, tpr):
    """Whatever the detectors are: entry (i, j) is the score of input i if neither i nor j was fitted on."""
    n, needed = len(scores), round(1 / (1 - tpr)) - 1
    if n <= needed:
        with pytest.raises(ValueError, match="calibration scores are too few"):
            predict(np.zeros(n - 1), np.zeros((1, n - 1)), tpr)
        return
    flagged, p_values = 0, []
    for i in range(n):
        others = np.arange(n) != i
        _, p_value, is_id = predict(scores[others, i], scores[i : i + 1, others], tpr)
        flagged += not is_id
        p_values.append(p_value)
    assert flagged <= (1 - tpr) * n + 1e-9
    for u in np.arange(1, n + 1) / n:
        assert sum(p <= u + 1e-9 for p in p_values) <= u * n + 1e-9


@given(
    st.integers(19, 40).flatmap(
        lambda n: st.tuples(arrays(float, (6, n), elements=few_values), arrays(float, n, elements=few_values))
    ),
    st.sampled_from([0.5, 0.9, 0.95]),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_score_p_value_and_verdict_agree(both, tpr, dtype):
    scores, left = both
    count = len(left)
    score, p_value, is_id = predict(left, torch.from_numpy(scores).to(dtype), tpr)
    at_most = (left <= scores).sum(1)
    assert score.dtype == dtype
    assert score.floor().tolist() == at_most.tolist()
    assert p_value.tolist() == np.minimum(1, (2 * at_most + 1) / (count + 1)).tolist()
    assert is_id.tolist() == (p_value > 1 - tpr + 1e-12).tolist()
    rank = int(((1 - tpr) * (count + 1) + 1 + 1e-9) // 2)
    assert is_id.tolist() == (at_most >= rank).tolist()


def test_alike_detectors_keep_the_order_of_one():
    left = torch.arange(19.0)
    new = torch.cat(
        [
            torch.tensor([-math.inf, -1e20, -10.0, -1.0, -1e-6]),
            torch.linspace(0, 18, 90),
            torch.tensor([18.5, 20.0, 1e3]),
        ]
    )
    score, _, is_id = predict(left, new[:, None].expand(-1, 19), 0.95)
    assert (score.diff() > 0).all()
    assert score[0] < 1e-20
    torch.testing.assert_close(score[5:95], new[5:95] + 1, rtol=0, atol=2e-3)
    assert is_id.tolist() == (new >= 0).tolist()
    equal, *_ = predict(torch.zeros(19), torch.tensor([[-1.0], [0.0], [1.0]]).expand(-1, 19), 0.95)
    assert equal.tolist() == pytest.approx([0, 19, 20 - 2**-10], abs=1e-20)


def test_scores_do_not_jump():
    generator = torch.Generator().manual_seed(0)
    left, start, end = torch.randn(3, 19, generator=generator, dtype=torch.float64)
    way = torch.linspace(0, 1, 20001, dtype=torch.float64)[:, None]
    score, *_ = predict(left, start + way * (end - start), 0.95)
    assert score.diff().abs().max() < 0.05


def test_the_fixed_scores():
    assert Jackknife(KNN()).calibration_scores.tolist() == [
        1,
        1,
        2,
        2,
        3,
        3,
        4,
        4,
        5,
        5,
        6,
        6,
        7,
        7,
        8,
        8,
        9,
        9,
        10,
    ]
    assert [Jackknife(KNN(), count=n).calibration_scores.tolist() for n in (1, 2, 3)] == [[1], [1, 1], [1, 1, 2]]


def small_set(generator, count):
    """Features of two kinds of input, one rare and spread out, in 8 dimensions."""
    rare = torch.rand(count, 1, generator=generator) < 0.2
    return torch.randn(count, 8, generator=generator) * torch.where(rare, 3.0, 1.0) + torch.where(rare, 4.0, 0.0)


@pytest.mark.parametrize("detector", [KNN(1), SSD()], ids=repr)
def test_a_fit_on_thirty_inputs_flags_as_many_as_stated(detector):
    flagged, held = [], []
    for seed in range(50):
        generator = torch.Generator().manual_seed(seed)
        values, new = small_set(generator, 30), small_set(generator, 100)
        digests = [bytes([seed, i]) for i in torch.randperm(30, generator=generator).tolist()]
        rows = left_out(digests, 0.95)
        assert len(rows) == 19
        fitted = Jackknife(detector).fit(Features(pooled=values), rows)
        calibration = Calibration(fitted.calibration_scores)
        flagged.append(float((~calibration.is_id(fitted.score(Features(pooled=new)))).double().mean()))
        # Without the jackknife: the detector is calibrated on the inputs that it was fitted to.
        own = copy.deepcopy(detector).fit(Features(pooled=values))
        calibration = Calibration(own.score(Features(pooled=values)))
        held.append(float((~calibration.is_id(own.score(Features(pooled=new)))).double().mean()))
    assert np.mean(flagged) <= 0.05 + 4 * np.std(flagged) / 50**0.5
    assert np.mean(flagged) >= 0.03
    assert np.mean(held) > 0.2


def test_a_detector_is_fitted_without_the_group_of_the_input_that_it_is_calibrated_with():
    values = torch.eye(6)
    rows, groups = torch.tensor([1, 4]), torch.tensor([0, 1, 1, 2, 3, 2])
    fitted = Jackknife(KNN(1), count=2).fit(Features(pooled=values), rows, groups)
    assert [len(detector.bank.rows) for detector in fitted.copies] == [4, 5]
    assert torch.equal(fitted.copies[0].bank.rows, values[[0, 3, 4, 5]])
    assert fitted.left_out.scores.tolist() == pytest.approx([-2, -2])
    fitted.fit(Features(pooled=values), rows)
    assert torch.equal(fitted.copies[1].bank.rows, values[[0, 1, 2, 3, 5]])
    with pytest.raises(ValueError, match=r"needs 2 rows, each of another group, got \[1, 2\]"):
        fitted.fit(Features(pooled=values), [1, 2], groups)
    assert torch.equal(fitted.copies[1].bank.rows, values[[0, 1, 2, 3, 5]])


def test_inputs_to_leave_out_are_one_of_each_group_and_do_not_depend_on_the_order():
    generator = torch.Generator().manual_seed(0)
    digests = [bytes([i]) for i in torch.randperm(60, generator=generator).tolist()]
    assert len(left_out(digests, 0.9)) == 9
    groups = torch.arange(60) // 2
    rows = left_out(digests, 0.95, groups)
    assert len(rows) == len(groups[rows].unique()) == 19
    order = torch.randperm(60, generator=generator)
    again = left_out([digests[i] for i in order.tolist()], 0.95, groups[order])
    assert sorted(order[again].tolist()) == rows.tolist()
    for split in (left_out(digests, 0.95), held_out(digests, tpr=0.95)):
        assert len(split)
    for choose in (lambda: left_out(digests[:19], 0.95), lambda: left_out(digests, 0.95, groups // 2)):
        with pytest.raises(
            ValueError, match=r"^1[59] groups of inputs are too few for tpr=0\.95: 19 are needed for"
        ):
            choose()


def test_state_and_errors():
    generator = torch.Generator().manual_seed(0)
    features = Features(pooled=torch.randn(30, 8, generator=generator))
    new = Features(pooled=torch.randn(50, 8, generator=generator))
    fitted = Jackknife(KNN(k=2, squared=False), count=9).fit(features)
    assert repr(fitted) == "Jackknife(KNN(k=2, squared=False), count=9)"
    again = parse_detector(repr(fitted))
    with pytest.raises(fn.NotFittedError):
        again.score(new)
    again.load_state_dict(fitted.state_dict())
    again.validate()
    assert torch.equal(again.score(new), fitted.score(new))
    assert_same_state(state(copy.deepcopy(fitted).half()), state(fitted))
    with pytest.raises(ValueError, match="is fitted to all inputs at once: pass them to fit, as one batch"):
        fitted.partial_fit(features)
    with pytest.raises(ValueError, match="two fits of a Jackknife cannot be merged: fit to all inputs at once"):
        again.merge(fitted)
    assert_same_state(state(again), state(fitted))
    unfitted = parse_detector(repr(fitted))
    assert_same_state(state(unfitted.merge(fitted)), state(fitted))
    with pytest.raises(ValueError, match=r"leaves out 9 inputs in turn, so at least 10 are needed, got 9: add"):
        fitted.fit(features[:9])
    assert torch.equal(again.score(new), fitted.score(new))
    assert torch.equal(
        Jackknife(KNN(k=2, squared=False), count=9).partial_fit(features).score(new), again.score(new)
    )
    again.left_out.scores = again.left_out.scores[1:]
    with pytest.raises(ValueError, match="has the scores of 8 left-out inputs"):
        again.validate()
    again.left_out.scores = fitted.left_out.scores.clone().fill_(math.nan)
    with pytest.raises(ValueError, match="a score of a left-out input is NaN"):
        again.validate()
