"""The drift monitor against its formulas, its false-alarm rate by simulation, and what it finds."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from featnorm import DriftMonitor
from featnorm.drift import _keys

# Told apart by the monitor's keys, with ties among a few of them.
few = st.sampled_from([-math.inf, -3.5, -1.0, -1.0, 0.0, 0.25, 0.25, 2.0, 1e30, math.inf])
JUMPING_RATES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)


def reference(calibration, stream, seed):
    """Straight from the formulas: p-values by counting, capitals by multiplying; log10 of the evidence."""
    uniforms = np.random.default_rng(seed).random(len(stream))
    capitals = {rate: dict.fromkeys((-1, 0, 1), 1 / 3) for rate in JUMPING_RATES}
    seen, evidence = list(calibration), []
    for score, uniform in zip(stream, uniforms, strict=True):
        seen.append(score)
        p = (sum(s < score for s in seen) + uniform * sum(s == score for s in seen)) / len(seen)
        for rate, capital in capitals.items():
            whole = sum(capital.values())
            for e in capital:
                capital[e] = ((1 - rate) * capital[e] + rate * whole / 3) * (1 + e * (p - 0.5))
        evidence.append(
            math.log10(sum(sum(capital.values()) for capital in capitals.values()) / len(JUMPING_RATES))
        )
    return evidence


@given(st.lists(few, min_size=1, max_size=20), st.lists(few, max_size=60), st.integers(0, 9))
def test_equals_its_definition(calibration, stream, seed):
    evidence = DriftMonitor(calibration, seed=seed).update(stream)
    assert evidence.dtype == np.float64
    np.testing.assert_allclose(evidence, reference(calibration, stream, seed), rtol=0, atol=1e-12)


def test_equals_its_definition_over_a_drift():
    rng = np.random.default_rng(0)
    calibration = rng.normal(0, 1, 80).astype(np.float16)
    stream = np.concatenate([rng.normal(0, 1, 200), rng.normal(-1, 1, 200)]).astype(np.float16)
    # Of 11 bits each, so that the monitor's keys lose nothing.
    evidence = DriftMonitor(calibration, seed=3).update(stream)
    np.testing.assert_allclose(evidence, reference(calibration, stream, 3), rtol=0, atol=1e-11)
    assert evidence.max() > 2


@given(st.lists(few, max_size=60), st.lists(st.integers(0, 60), max_size=5), st.integers(0, 2**32))
def test_batches_of_any_size_give_the_same(stream, cuts, seed):
    cuts = sorted(min(cut, len(stream)) for cut in cuts)
    calibration = [0.0, 0.25, 1.0, 2.0]
    whole, parts = (DriftMonitor(calibration, false_alarm=0.5, seed=seed) for _ in range(2))
    evidence = whole.update(stream)
    in_parts = [parts.update(stream[a:b]) for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    assert np.array_equal(evidence, np.concatenate(in_parts))
    assert attributes(whole) == attributes(parts)
    assert whole.count == len(stream)


def attributes(monitor):
    return monitor.count, monitor.log10_evidence, monitor.highest, monitor.alarmed_at


@pytest.mark.parametrize("ties", [False, True])
def test_false_alarms_are_as_rare_as_stated(ties):
    rng = np.random.default_rng(0)
    streams, false_alarm = 300, 0.1
    alarms = 0
    for seed in range(streams):
        scores = rng.standard_cauchy(550)
        scores = np.round(scores) if ties else scores
        monitor = DriftMonitor(scores[:50], false_alarm=false_alarm, seed=seed)
        monitor.update(scores[50:])
        alarms += monitor.alarmed_at is not None
    # Four standard deviations of the binomial above the bound.
    margin = 4 * math.sqrt(false_alarm * (1 - false_alarm) / streams)
    assert alarms / streams <= false_alarm + margin
    assert alarms  # the bound is no empty one


@pytest.mark.parametrize("shift", [-0.5, 0.5])
def test_finds_a_drift_of_scores_none_of_which_is_extreme(shift):
    rng = np.random.default_rng(1)
    calibration = rng.uniform(-2, 2, 1000)
    monitor = DriftMonitor(calibration, false_alarm=0.01)
    monitor.update(rng.uniform(-2, 2, 2000))
    assert monitor.alarmed_at is None
    drifted = np.clip(rng.uniform(-2, 2, 1000) + shift, calibration.min(), calibration.max())
    evidence = monitor.update(drifted)
    assert monitor.alarmed_at is not None
    # The alarm is where the evidence was first enough, counted over the whole stream; it stays there.
    first = int(np.argmax(evidence >= 2))
    assert monitor.alarmed_at == 2000 + first < 2400
    assert monitor.highest == evidence.max()
    at = monitor.alarmed_at
    monitor.update(rng.uniform(-2, 2, 5000))
    assert monitor.alarmed_at == at
    assert monitor.highest > monitor.log10_evidence


def test_the_alarm_is_at_the_stated_evidence():
    stream = np.full(60, -9.0)
    evidence = DriftMonitor(np.arange(500.0)).update(stream)
    for false_alarm in (0.2, 0.01, 1e-6):
        monitor = DriftMonitor(np.arange(500.0), false_alarm=false_alarm)
        assert monitor.alarm_level == -math.log10(false_alarm)
        assert np.array_equal(monitor.update(stream), evidence)
        reached = np.flatnonzero(evidence >= monitor.alarm_level)
        assert monitor.alarmed_at == (int(reached[0]) if len(reached) else None)
        assert monitor.false_alarm == false_alarm


def test_at_the_start_there_is_no_evidence():
    monitor = DriftMonitor([1.0])
    assert attributes(monitor) == (0, 0.0, 0.0, None)
    assert monitor.update([]).shape == monitor.update(torch.empty(0)).shape == (0,)
    assert attributes(monitor) == (0, 0.0, 0.0, None)


def test_one_calibration_score_is_enough_to_be_valid():
    monitor = DriftMonitor([0.0])
    monitor.update(np.random.default_rng(0).normal(size=2000))
    assert monitor.alarmed_at is None
    # The bet on nothing alone keeps a fifth of the capital.
    assert monitor.log10_evidence > math.log10(1 / 5) - 1e-9


def test_scores_are_ranked_in_their_order():
    order = [-math.inf, -3e38, -2.0, -1.001, -1.0, -1e-30, 0.0, 1e-30, 1.0, 1.001, 3e38, math.inf]
    keys = _keys(np.array(order))
    assert keys == sorted(set(keys))
    assert min(keys) >= 0
    assert max(keys) < 2**22


@pytest.mark.parametrize(
    "pair", [(-0.0, 0.0), (-1e-60, 0.0), (1e-60, 0.0), (1e300, math.inf), (-1e300, -math.inf), (1, 1 + 1e-5)]
)
def test_scores_too_close_to_tell_apart_are_equal(pair):
    first, second = _keys(np.array(pair, np.float64))
    assert first == second


def test_refuses_nan_by_index_and_is_unchanged():
    stream = np.random.default_rng(0).normal(size=100)
    monitor, other = DriftMonitor([0.0, 1.0]), DriftMonitor([0.0, 1.0])
    monitor.update(stream[:50])
    message = "scores: 2 of 4 values are NaN, the first at index 1; a NaN has no rank"
    with pytest.raises(ValueError, match=message):
        monitor.update([0.0, math.nan, 1.0, math.nan])
    with pytest.raises(ValueError, match="must be 1-D, one score per input"):
        monitor.update(torch.zeros(2, 2))
    with pytest.raises(TypeError, match="scores must be"):
        monitor.update(["high"])
    monitor.update(stream[50:])
    other.update(stream)
    assert attributes(monitor) == attributes(other)


def test_what_it_cannot_be_made_of():
    with pytest.raises(ValueError, match="calibration_scores is empty"):
        DriftMonitor([])
    with pytest.raises(ValueError, match=r"calibration_scores: 1 of 2 values are NaN, the first at index 1"):
        DriftMonitor([0.0, math.nan])
    for false_alarm in (0, 1, -0.1, math.nan):
        with pytest.raises(ValueError, match=r"false_alarm must be in \(0, 1\)"):
            DriftMonitor([0.0], false_alarm=false_alarm)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int32])
def test_takes_scores_of_any_type(dtype):
    stream = torch.tensor([3, 0, 1, 38, 50, -7])
    expected = DriftMonitor(torch.arange(40)).update(stream.double())
    strided = torch.stack([stream, stream], dim=1)[:, 0].to(dtype)
    assert np.array_equal(DriftMonitor(torch.arange(40).to(dtype)).update(strided), expected)


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ">f8", np.int32])
def test_takes_arrays_of_any_type(dtype):
    stream = np.array([3, 0, 1, 38, 50, -7])
    expected = DriftMonitor(torch.arange(40)).update(torch.from_numpy(stream))
    assert np.array_equal(DriftMonitor(np.arange(40, dtype=dtype)).update(stream.astype(dtype)), expected)


def test_long_streams_neither_overflow_nor_underflow():
    monitor = DriftMonitor([0.0], seed=1)
    calm = np.random.default_rng(0)
    monitor.update(calm.normal(size=5000))
    # Each score is below all before it, the best that a gambler can wish for.
    evidence = monitor.update(-np.geomspace(10, 1e37, 5000))
    assert evidence[-1] > 500  # no float64 holds ten to the power of that
    assert np.isfinite(evidence).all()
    evidence = monitor.update(calm.normal(size=5000))
    assert np.isfinite(evidence).all()


def test_memory_is_bounded():
    monitor = DriftMonitor([0.0])
    bits = np.random.default_rng(0).integers(0, 2**32, 5000, np.uint64).astype(np.uint32)
    scores = bits.view(np.float32)
    monitor.update(scores[~np.isnan(scores)])
    rows = monitor._seen._rows
    assert 1000 < len(rows) <= 2048
    assert {row.nbytes for row in rows.values()} == {2048 * 8}
    usual = DriftMonitor(np.random.default_rng(0).uniform(1, 8, 100))
    usual.update(np.random.default_rng(1).uniform(1, 8, 5000))
    assert len(usual._seen._rows) == 12
