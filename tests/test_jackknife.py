"""The rate that the jackknife states for small sets, exactly and by simulation."""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from featnorm.calibration import Calibration
from featnorm.detectors import KNN, SSD
from featnorm.features import Features
from featnorm.jackknife import JackknifeCalibration, fit_left_out
from featnorm.splitting import held_out, left_out

few_values = st.sampled_from([-math.inf, -1.0, 0.0, 0.5, 1.0, math.inf])
without_two = st.integers(2, 14).flatmap(lambda n: arrays(float, (n, n), elements=few_values))


@given(without_two, st.sampled_from([0.5, 0.75, 0.8, 0.9]))
def test_whichever_input_is_the_new_one_at_most_the_stated_share_is_flagged(scores, tpr):
    """Whatever the detectors are: entry (i, j) is the score of input i if neither i nor j was fitted on."""
    n, needed = len(scores), round(1 / (1 - tpr)) - 1
    if n <= needed:
        with pytest.raises(ValueError, match="calibration scores are too few"):
            JackknifeCalibration(np.zeros(n - 1), tpr)
        return
    flagged, p_values = 0, []
    for i in range(n):
        others = np.arange(n) != i
        fitted = JackknifeCalibration(scores[others, i], tpr)
        _, p_value, is_id = fitted.predict(torch.from_numpy(scores[i : i + 1, others]))
        flagged += not is_id
        p_values.append(p_value)
    assert flagged <= (1 - tpr) * n + 1e-9
    for u in np.arange(1, n + 1) / n:
        assert sum(p <= u + 1e-9 for p in p_values) <= u * n + 1e-9


@given(
    arrays(float, (6, 39), elements=few_values),
    arrays(float, 39, elements=few_values),
    st.sampled_from([0.5, 0.95]),
)
def test_score_p_value_and_verdict_agree(scores, left, tpr):
    fitted = JackknifeCalibration(left, tpr)
    score, p_value, is_id = fitted.predict(torch.from_numpy(scores))
    at_most = (left <= scores).sum(1)
    assert p_value.tolist() == np.minimum(1, (2 * at_most + 1) / 40).tolist()
    assert is_id.tolist() == (p_value > 1 - tpr + 1e-12).tolist() == (score >= fitted.threshold).tolist()
    rank = int(((1 - tpr) * 40 + 1 + 1e-9) // 2)
    assert fitted.typical_tpr == 1 - rank / 40
    assert is_id.tolist() == (at_most >= rank).tolist()
    assert not score.isnan().any()


def test_alike_detectors_give_the_scores_of_one():
    left = torch.arange(59.0)
    fitted = JackknifeCalibration(left)
    score, _, is_id = fitted.predict(torch.tensor([[0.5], [1.0], [1.5], [10.0]]).expand(-1, 59))
    assert score.tolist() == [-0.5, 0.0, 0.5, 9.0]
    assert is_id.tolist() == [False, True, True, True]
    assert fitted.typical_tpr == pytest.approx(1 - 2 / 60)
    assert JackknifeCalibration(torch.zeros(19)).typical_tpr == pytest.approx(0.95)


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
        detectors, left = fit_left_out(detector, Features(pooled=values), rows)
        scores = torch.stack([fitted.score(Features(pooled=new)) for fitted in detectors], 1)
        flagged.append(float((~JackknifeCalibration(left).predict(scores)[2]).double().mean()))
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
    detectors, scores = fit_left_out(KNN(1), Features(pooled=values), rows, groups)
    assert [len(detector.bank.rows) for detector in detectors] == [4, 5]
    assert torch.equal(detectors[0].bank.rows, values[[0, 3, 4, 5]])
    assert scores.tolist() == pytest.approx([-2, -2])
    detectors, _ = fit_left_out(KNN(1), Features(pooled=values), rows)
    assert torch.equal(detectors[1].bank.rows, values[[0, 1, 2, 3, 5]])


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


def test_state_rates_and_errors():
    fitted = JackknifeCalibration(torch.arange(99), 0.99)
    scores = torch.randn(5, 99, generator=torch.Generator().manual_seed(0)) + 50
    rebuilt = JackknifeCalibration(**{"left_out_scores": fitted.fitted_tensors()["scores"], **fitted.to_dict()})
    for one, same in zip(rebuilt.predict(scores), fitted.predict(scores), strict=True):
        assert torch.equal(one, same)
    assert fitted.with_tpr(0.9).tpr == 0.9
    assert JackknifeCalibration(torch.arange(99)).half().scores.dtype == torch.float64
    assert fitted.predict(torch.empty(0, 99))[0].shape == (0,)
    with pytest.raises(ValueError, match=r"^scores must be \(m, 99\), one per input and detector, got \(5, 98\)"):
        fitted.predict(scores[:, 1:])
    scores[2, 3] = math.nan
    with pytest.raises(ValueError, match=r"^scores: 1 of 495 values are NaN"):
        fitted.predict(scores)
    with pytest.raises(ValueError, match=r"^left_out_scores is empty"):
        JackknifeCalibration([])
