"""The drift monitor against its formulas, its false-alarm rate by simulation, and what it finds."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm

from featnorm import DriftMonitor
from featnorm._utils.sealed import write_sealed
from featnorm.drift import _Gamblers, _keys

# Told apart by the monitor's keys, with ties among a few of them.
few = st.sampled_from([-math.inf, -3.5, -1.0, -1.0, 0.0, 0.25, 0.25, 2.0, 1e30, math.inf])
SHIFTS = [(1 / abs(m), 1, m, 1) for m in (-2, -1, -0.5, -0.25, -0.125, 0.125, 0.25, 0.5, 1, 2)]
SCALES = [(1.5, 1, 0, s) for s in (0.5, 0.7, 1.4, 2)]
FEW_OTHERS = [(1.5, 0.1, -2, 1), (1.5, 0.05, -3, 1), (1.5, 0.1, 2, 1)]
BETS = [*SHIFTS, *SCALES, *FEW_OTHERS]
WEIGHTS = np.array([weight for weight, *_ in BETS] + [2.0])
WEIGHTS /= WEIGHTS.sum()


def densities(past, p):
    """Of each bet at a p-value, after those of the past."""
    z = norm.ppf(p)
    normal = [1 - w + w * norm.pdf(z, m, s) / norm.pdf(z) for _, w, m, s in BETS]
    ages = 0.99 ** np.arange(len(past) - 1, -1, -1)
    counts = 0.5 + np.histogram(past, 16, (0, 1), weights=ages)[0]
    return np.array([*normal, 16 * counts[min(int(16 * p), 15)] / counts.sum()])


def reference(calibration, stream, seed):
    """Straight from the formulas: p-values by counting, capitals by multiplying; log10 of the evidence."""
    uniforms = np.random.default_rng(seed).random(len(stream))
    cash, bets, seen, past, evidence = 0.5, 0.5 * WEIGHTS, list(calibration), [], []
    for t, (score, uniform) in enumerate(zip(stream, uniforms, strict=True)):
        seen.append(score)
        p = (sum(s < score for s in seen) + uniform * sum(s == score for s in seen)) / len(seen)
        moved = 0.3 / (t + 30) * cash
        cash -= moved
        bets = (bets + moved * WEIGHTS) * densities(past, p)
        past.append(p)
        evidence.append(math.log10(cash + bets.sum()))
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


@given(st.lists(st.floats(0, 1), max_size=40))
def test_bets_are_fair(past):
    """Whatever came before, a bet has the mean 1 over uniform p-values: it is an e-value."""
    gamblers = _Gamblers()
    gamblers.bet(np.array(past))
    # The mean over p is that over the quantile z, which is smooth but for the histogram's jumps.
    z = np.linspace(-7.9, 7.9, 401)
    over_z = np.array([gamblers.densities(p)[:-1] for p in norm.cdf(z)])
    means = np.trapezoid(over_z * norm.pdf(z)[:, None], z, axis=0)
    np.testing.assert_allclose(means, 1, rtol=0, atol=1e-4)  # the bets on the widest scores lose most at the ends
    assert means.max() < 1 + 1e-6
    histogram = [gamblers.densities((i + 0.5) / 16)[-1] for i in range(16)]
    assert np.mean(histogram) == pytest.approx(1, abs=1e-12)
    assert all(min(gamblers.densities(p)) >= 0 for p in (0.0, 1e-300, 0.5, 1.0))


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


@pytest.mark.slow
@pytest.mark.parametrize(("ties", "calibrated"), [(False, 50), (True, 50), (False, 1)])
def test_false_alarms_are_as_rare_as_stated(ties, calibrated):
    rng = np.random.default_rng(0)
    streams, false_alarm = 300, 0.1
    alarms, last = 0, []
    for seed in range(streams):
        scores = rng.standard_cauchy(500 + calibrated)
        scores = np.round(scores) if ties else scores
        monitor = DriftMonitor(scores[:calibrated], false_alarm=false_alarm, seed=seed)
        last.append(monitor.update(scores[calibrated:])[-1])
        alarms += monitor.alarmed_at is not None
    # Four standard deviations of the binomial above the bound.
    margin = 4 * math.sqrt(false_alarm * (1 - false_alarm) / streams)
    assert alarms / streams <= false_alarm + margin
    assert alarms  # the bound is no empty one
    assert np.mean(10.0 ** np.array(last)) < 1.5  # a martingale's is 1


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
    # What is still in cash.
    assert monitor.log10_evidence > math.log10(0.5 * math.prod(1 - 0.3 / (t + 30) for t in range(2000))) - 1e-9


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


DRIFTS = {
    "a shift of 1": (45, lambda rng, n: rng.normal(-1, 1, n)),
    "a shift of 2": (15, lambda rng, n: rng.normal(2, 1, n)),
    "wider scores": (120, lambda rng, n: rng.normal(0, 1.5, n)),
    "narrower scores": (120, lambda rng, n: rng.normal(0, 0.6, n)),
    "a tenth of another kind": (300, lambda rng, n: rng.normal(0, 1, n) - 3 * (rng.random(n) < 0.1)),
    "two kinds": (300, lambda rng, n: rng.choice([-1.0, 1.0], n) + rng.normal(0, 0.5, n)),
    "a camera that repeats one image": (40, lambda rng, n: np.full(n, 0.3)),
}


@pytest.mark.parametrize("drift", DRIFTS)
def test_finds_drifts_of_many_kinds_in_time(drift):
    most, draw = DRIFTS[drift]
    delays = []
    for seed in range(5):
        rng = np.random.default_rng(seed)
        monitor = DriftMonitor(rng.normal(0, 1, 1000))
        monitor.update(rng.normal(0, 1, 1000))
        assert monitor.alarmed_at is None
        monitor.update(draw(rng, 1000))
        delays.append(math.inf if monitor.alarmed_at is None else monitor.alarmed_at - 999)
    assert np.median(delays) <= most


@given(st.lists(few, max_size=60), st.integers(0, 60), st.integers(0, 2**32))
def test_a_saved_monitor_continues_as_if_it_had_not_stopped(tmp_path_factory, stream, cut, seed):
    path = tmp_path_factory.mktemp("state") / "m.json"
    calibration = [0.0, 0.25, 1.0, 2.0]
    whole, first = (DriftMonitor(calibration, false_alarm=0.5, seed=seed) for _ in range(2))
    evidence = whole.update(stream)
    before = first.update(stream[:cut])
    first.save(path)
    second = DriftMonitor.load(path)
    assert attributes(second) == attributes(first)
    after = second.update(stream[cut:])
    assert np.array_equal(np.concatenate([before, after]), evidence)
    assert attributes(second) == attributes(whole)
    assert second.state() == whole.state()
    assert json.loads(json.dumps(whole.state())) == whole.state()


def test_a_file_that_is_no_monitor_is_refused(tmp_path):
    path = tmp_path / "m.json"
    monitor = DriftMonitor([0.0, 1.0])
    monitor.update(np.arange(50.0))
    monitor.save(path)
    good = path.read_bytes()
    message = "m.json holds no drift monitor that this version of featnorm can load, or is damaged: make a new"
    for content in (b"", b"{}", good[:-40], good.replace(b'"count": 50', b'"count": 51'), b"\xff\x00"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            DriftMonitor.load(path)
    state = monitor.state()
    for content in ({"format": 1}, {"format": 2}, {**state, "format": 2}, {**state, "seen": 5},
                    {**state, "random": {}}, {**state, "gamblers": None}):  # fmt: skip
        write_sealed(path, content)
        with pytest.raises(ValueError, match=message):
            DriftMonitor.load(path)
    write_sealed(path, {"auroc": 0.5})
    with pytest.raises(ValueError, match=message):
        DriftMonitor.load(path)
    with pytest.raises(FileNotFoundError):
        DriftMonitor.load(tmp_path / "nowhere.json")
    path.write_bytes(good)
    assert DriftMonitor.load(str(path)).state() == monitor.state()
