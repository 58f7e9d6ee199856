"""Promised rates over parts of units by simulation, and the calibration against its definition."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import featnorm as fn
from featnorm import archive
from featnorm.calibration import Calibration
from featnorm.features import Features, Parts
from featnorm.parts import MAX_PARTS, PartCalibration, drawn_parts, sampled_parts, unit_scores

values = st.sampled_from([-math.inf, -1.0, 0.0, 0.5, 1.0, 1e300, math.inf]) | st.floats(-3, 3)
units_of_parts = st.lists(st.lists(values, min_size=1, max_size=7), min_size=19, max_size=30)


def flat(units):
    scores = torch.tensor([score for unit in units for score in unit], dtype=torch.float64)
    return scores, torch.tensor([j for j, unit in enumerate(units) for _ in unit])


@given(units_of_parts, st.lists(values, max_size=10), st.sampled_from([0.95, 0.9, 0.8]))
def test_p_values_and_verdicts_are_those_of_the_definition(units, new, tpr):
    calibration = PartCalibration(*flat(units), tpr, lowest=0)
    p_value, is_id = calibration.predict(torch.tensor(new, dtype=torch.float64))
    for score, p, accepted in zip(new, p_value.tolist(), is_id.tolist(), strict=True):
        at_most = sum(Fraction(sum(one <= score for one in unit), len(unit)) for unit in units)
        expected = (1 + at_most) / (len(units) + 1)
        assert p == pytest.approx(float(expected), abs=1e-12)
        assert accepted == (expected > 1 - Fraction(str(tpr)))
        assert accepted == (score >= float(calibration.threshold))


@given(st.lists(values, min_size=19, max_size=60), st.lists(values, min_size=1, max_size=10))
def test_units_of_one_part_are_independent_inputs(scores, new):
    new = torch.tensor(new, dtype=torch.float64)
    parts = PartCalibration(scores, torch.arange(len(scores)), lowest=0.3)
    plain = Calibration(scores)
    assert torch.equal(parts.predict(new)[1], plain.predict(new)[1])
    torch.testing.assert_close(parts.p_value(new), plain.p_value(new), rtol=0, atol=1e-12)
    assert parts.threshold == plain.threshold == parts.units.threshold


@given(st.lists(st.lists(values, max_size=7), min_size=1, max_size=9), st.sampled_from([0, 0.1, 0.3, 0.5, 1]))
def test_the_score_of_a_unit_is_the_mean_of_its_lowest_parts(units, lowest):
    scores, owners = flat(units)
    order = torch.randperm(len(scores))
    found = unit_scores(scores[order], owners[order].long(), len(units), lowest)
    for unit, value in zip(units, found.tolist(), strict=True):
        taken = sorted(unit)[: max(math.ceil(Fraction(str(lowest)) * len(unit)), 1)]
        with np.errstate(invalid="ignore"):
            expected = np.mean(np.array(taken)) if unit else math.inf
        np.testing.assert_allclose(value, expected, rtol=1e-12, atol=1e-12)


def dependent_units(rng, count, heterogeneous=True):
    """Units whose parts share a level, of very different numbers; those with many parts have low scores."""
    levels = rng.standard_normal(count)
    sizes = np.where(levels < -0.5, 40, 2) if heterogeneous else np.full(count, 20)
    owners = np.repeat(np.arange(count), sizes)
    return levels[owners] + 0.3 * rng.standard_normal(len(owners)), owners


@pytest.mark.parametrize("count", [19, 60])
def test_the_expected_share_of_flagged_parts_in_a_new_unit_is_as_promised(count):
    rng = np.random.default_rng(count)
    shares, whole, as_if_independent = [], [], []
    for _ in range(600):
        scores, owners = dependent_units(rng, count)
        new, of_new = map(torch.from_numpy, dependent_units(rng, 40))
        calibration = PartCalibration(scores, owners, lowest=0.25)
        flagged = ~calibration.is_id(new)
        sizes = torch.bincount(of_new)
        shares.append((torch.bincount(of_new, flagged.double()) / sizes).mean())
        whole.append((~calibration.predict_units(new, of_new, 40).is_id).double().mean())
        flagged = ~Calibration(scores).is_id(new)
        as_if_independent.append((torch.bincount(of_new, flagged.double()) / sizes).mean())
    shares, whole, as_if_independent = map(np.array, (shares, whole, as_if_independent))
    error = 4 * shares.std() / math.sqrt(len(shares))
    assert shares.mean() <= 0.05 + error
    assert shares.mean() >= 0.05 - 2 / (count + 1) - error
    assert whole.mean() <= 0.05 + 4 * whole.std() / math.sqrt(len(whole))
    # Pooled parts bound the share over all parts, not over the parts of a unit.
    assert abs(as_if_independent.mean() - 0.05) > 0.01


def test_of_a_unit_with_many_parts_a_random_sample_keeps_the_rate():
    rng = np.random.default_rng(1)
    shares = []
    for _ in range(200):
        scores = torch.from_numpy(rng.standard_normal((20, 1)) + rng.standard_normal((20, 600)))
        calibration = PartCalibration(scores.flatten(), torch.arange(20).repeat_interleave(600), lowest=0.05)
        assert torch.bincount(calibration.owners).tolist() == [MAX_PARTS] * 20
        new = torch.from_numpy(rng.standard_normal((50, 1)) + rng.standard_normal((50, 600)))
        shares.append((~calibration.is_id(new.flatten())).double().mean())
    assert np.mean(shares) <= 0.05 + 4 * np.std(shares) / math.sqrt(len(shares))
    torch.testing.assert_close(calibration.unit_scores, scores.sort(1).values[:, :30].mean(1))


def test_units_have_names_and_parts_in_any_order():
    scores, owners = flat([[float(j), j + 0.5] for j in range(20)])
    order = torch.randperm(len(scores), generator=torch.Generator().manual_seed(0))
    by_name = PartCalibration(scores[order], [f"clip {owners[i]}" for i in order], lowest=1)
    by_number = PartCalibration(scores, owners, lowest=1)
    new = torch.linspace(-1, 21, 50)
    assert torch.equal(by_name.p_value(new), by_number.p_value(new))
    assert torch.equal(by_name.units.scores, by_number.units.scores)


def test_a_unit_without_parts_is_not_flagged():
    calibration = PartCalibration(*flat([[float(j)] for j in range(20)]), lowest=0)
    verdict = calibration.predict_units(torch.tensor([-1.0, 5.0]), torch.tensor([0, 2]), 3)
    assert verdict.score.tolist() == [-1.0, math.inf, 5.0]
    assert verdict.is_id.tolist() == [False, True, True]
    assert verdict.p_value[1] == 1


@pytest.mark.parametrize(
    ("scores", "units", "settings", "message"),
    [
        (
            torch.randn(40),
            torch.arange(40) // 4,
            {},
            "10 calibration images or clips are too few for tpr=0.95: at least 19",
        ),
        (torch.randn(40), torch.arange(39), {}, "one entry per score"),
        (torch.randn(40), torch.arange(40), {"lowest": 1.5}, "lowest must be a share between 0 and 1, got 1.5"),
        (torch.randn(40), torch.arange(40), {"tpr": 1.2}, "tpr"),
        (torch.full((40,), math.nan), torch.arange(40), {}, "id_scores"),
    ],
)
def test_invalid_calibrations_are_named(scores, units, settings, message):
    with pytest.raises(ValueError, match=message):
        PartCalibration(scores, units, **{"lowest": 0, **settings})


def test_units_that_are_not_names_or_integers_are_named():
    for units in (torch.randn(40), list(range(40)), "clip", None):
        with pytest.raises(TypeError, match="units must be names or integers"):
            PartCalibration(torch.randn(40), units, lowest=0)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))


def clips(count, frames=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 1, 8, generator=generator) + 0.2 * torch.randn(
        count, frames, 8, generator=generator
    )
    return inputs.flatten(0, 1).split(16), [f"clip {i:03}" for i in range(count) for _ in range(frames)]


def test_a_scorer_of_dependent_inputs_is_saved_updated_and_set_to_another_rate(tmp_path):
    frames, units = clips(40)
    scorer = fn.Scorer(network(), fn.NAN()).calibrate(frames, units=units)
    assert len(scorer.calibration.unit_scores) == 40
    verdict = scorer(frames[0])
    scorer.save(tmp_path / "s.featnorm", weights=True)
    loaded = fn.load(tmp_path / "s.featnorm", network())
    assert torch.equal(loaded(frames[0]).p_value, verdict.p_value)
    assert loaded.calibration.to_dict() == scorer.calibration.to_dict()
    assert loaded.digest() == scorer.digest()
    state = fn.Scorer(network(), fn.NAN())
    state.load_state_dict(scorer.state_dict())
    assert torch.equal(state(frames[0]).is_id, verdict.is_id)
    more, others = clips(20, seed=1)
    loaded.calibrate(more, units=others, update=True)
    assert len(loaded.calibration.unit_scores) == 60
    together = fn.Scorer(network(), fn.NAN()).calibrate(
        [*frames, *more], units=[*units, *("b" + u for u in others)]
    )
    assert torch.equal(together.calibration.scores, loaded.calibration.scores)
    assert loaded.set_tpr(0.8).calibration.threshold > together.calibration.threshold
    with pytest.raises(ValueError, match="of parts of units"):
        loaded.calibrate(more, update=True)
    with pytest.raises(archive.ArchiveError, match="depend on each other"):
        archive.read_calibration(tmp_path / "s.featnorm")


def test_frames_as_if_independent_are_told_from_clips():
    frames, units = clips(40)
    scorer = fn.Scorer(network(), fn.NAN()).calibrate(frames)
    with pytest.raises(ValueError, match="of independent inputs"):
        scorer.calibrate(frames, units=units, update=True)
    with pytest.raises(ValueError, match="thresholds_by"):
        fn.Scorer(network(), fn.NAN(), thresholds_by="class").calibrate(frames, units=units)


def test_what_drawn_parts_returns_in_pieces_is_the_whole():
    scores, owners = flat([[float(j), j + 0.5, j - 3.0] for j in range(30)])
    first, second = owners < 12, owners >= 12
    a, b = drawn_parts(scores[first], owners[first], 0.4), drawn_parts(scores[second], owners[second], 0.4)
    joined = PartCalibration.from_state(a[0], a[1], a[2], 0.5, 0.4).with_parts(*b)
    whole = PartCalibration(scores, owners, 0.5, lowest=0.4)
    for name, value in whole.fitted_tensors().items():
        assert torch.equal(getattr(joined, name), value), name


def test_the_parts_kept_of_one_unit_are_drawn_independently_of_those_of_another():
    positions = torch.arange(600.0)
    kept = [drawn_parts(positions, torch.zeros(600, dtype=torch.int64), 0.0, first)[0] for first in range(3)]
    assert {len(one) for one in kept} == {MAX_PARTS}
    assert not torch.equal(kept[0], kept[1])
    assert not torch.equal(kept[1], kept[2])
    together, owners, _ = drawn_parts(positions.repeat(2), torch.arange(2).repeat_interleave(600), 0.0)
    assert not torch.equal(together[owners == 0], together[owners == 1])


def test_an_update_averages_as_many_parts_as_the_calibration_did():
    frames, units = clips(40)
    source = fn.Scorer(network(), fn.NAN(), lowest=0.0).calibrate(frames, units=units)
    loaded = fn.Scorer(network(), fn.NAN(), lowest=1.0)
    loaded.load_state_dict(source.state_dict())
    assert loaded.lowest == 0.0
    loaded.lowest = 1.0
    with pytest.raises(ValueError, match="averages the lowest 0 of a unit's parts, and the scorer 1"):
        loaded.calibrate(frames, units=units, update=True)


def test_damaged_states_are_refused():
    scores, owners, of_units = drawn_parts(*flat([[float(j)] * 2 for j in range(20)]), 0.0)
    for bad in (owners[:-1], owners.clamp(max=18), owners - 1):
        with pytest.raises(ValueError, match="not those of its units"):
            PartCalibration.from_state(scores, bad, of_units, 0.95, 0.0)


def test_a_fit_reads_a_random_sample_of_the_labeled_parts_of_each_input():
    sizes = [600, 3, 0, 300]
    owners = torch.arange(4).repeat_interleave(torch.tensor(sizes))
    values = torch.arange(len(owners), dtype=torch.float32)[:, None]
    labels = torch.where(torch.arange(len(owners)) % 3 == 0, -1, 1)
    features = Features(pooled=values, labels=labels, parts=Parts(owners, 4))
    plain = Features(pooled=values)
    first, second, whole = sampled_parts([features, features, plain])
    assert whole is plain
    kept = first.pooled[:, 0].long()
    assert torch.bincount(owners[kept], minlength=4).tolist() == [256, 2, 0, 200]
    assert (first.labels == 1).all()
    assert not torch.equal(kept, second.pooled[:, 0].long())
    # Other rows of the same input are as likely: of 400 labeled ones, the mean place is in the middle.
    assert 230 < kept[owners[kept] == 0].double().mean() < 370
    (every,) = sampled_parts([features.replace(labels=torch.full_like(labels, -1))])
    assert torch.bincount(owners[every.pooled[:, 0].long()], minlength=4).tolist() == [256, 3, 0, 256]
