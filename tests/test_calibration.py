"""Promised rates by simulation, and the calibration against its definitions."""

import copy
import math
import pickle
from collections import Counter, defaultdict
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from featnorm import archive
from featnorm.archive import StoredCalibration
from featnorm.calibration import Calibration, are_repeats, benjamini_hochberg, conformal_p_values, threshold_at_tpr

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


@given(scores_with_ties, st.lists(tied, min_size=1, max_size=16))
def test_few_scores_have_the_verdicts_that_they_have_among_many(calibration, scores):
    fitted = Calibration(calibration, 0.05)
    few = torch.tensor(scores)
    for one, other in zip(fitted.predict(few), fitted.predict(few.repeat(17)), strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other[: len(few)])


def test_few_scores_are_compared_with_the_scores_that_are_there_now():
    fitted = Calibration(torch.arange(39))
    assert fitted.p_value(torch.tensor([9.0])).item() == 11 / 40
    other = copy.deepcopy(fitted)
    other.load_state_dict(Calibration(torch.arange(39) + 100).state_dict())
    assert other.p_value(torch.tensor([9.0])).item() == 1 / 40
    assert fitted.p_value(torch.tensor([9.0])).item() == 11 / 40


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


def draw_cameras(rng, n, shares):
    """Names of n groups, drawn with some shares, and scores that are lower and wider from group to group."""
    members = rng.choice(len(shares), n, p=shares)
    return [f"camera {member}" for member in members], rng.normal(-3.0 * members, 1.0 + members)


@pytest.mark.parametrize("tpr", [0.9, 0.95])
def test_each_group_is_accepted_at_the_stated_rate_and_the_small_ones_together(tpr):
    rng = np.random.default_rng(0)
    shares = [0.5, 0.3, 0.14, 0.03, 0.02, 0.01]
    names = [f"camera {i}" for i in range(6)]
    flagged, without = defaultdict(list), defaultdict(list)
    for _ in range(600):
        groups, scores = draw_cameras(rng, 400, shares)
        new, new_scores = draw_cameras(rng, 200, shares)
        fitted = Calibration(scores, tpr, groups, names)
        is_ood = ~fitted.is_id(torch.from_numpy(new_scores), new)
        for name, ood, plain in zip(
            new, is_ood.tolist(), (new_scores < threshold_at_tpr(scores, tpr)).tolist(), strict=True
        ):
            kind = name if fitted.pool(name) == (name,) else "pool"
            for key in {kind, "all"}:
                flagged[key].append(ood)
            without[name].append(plain)
    assert {*names[:3], "pool", "all"} <= flagged.keys()
    for kind, alarms in flagged.items():
        # New inputs share their calibration set, so that one in ten is counted as a draw of its own.
        assert np.mean(alarms) <= 1 - tpr + 4 * math.sqrt(tpr * (1 - tpr) / (len(alarms) / 10)), kind
    assert np.mean(flagged["all"]) > 0.6 * (1 - tpr)
    assert np.mean(without["camera 2"]) > 2 * (1 - tpr)  # which is what groups are for
    assert np.mean(without["camera 0"]) < 0.2 * (1 - tpr)


few_groups = st.lists(st.tuples(st.sampled_from("abcdef"), tied), min_size=5, max_size=40)


@given(few_groups, st.sampled_from([0.5, 0.75, 0.8]))
@example([(name, float(rank)) for rank, name in enumerate("aaaaabbbbcccdd" + "e" * 9)], 0.8)
def test_whichever_input_is_the_new_one_the_rate_holds_in_its_group_or_pool(inputs, tpr):
    """The rate is exact, and not an average over draws: of any inputs, each in turn is the new one."""
    sizes = Counter(name for name, _ in inputs)
    counted, flagged = Counter(), Counter()
    for i, (name, score) in enumerate(inputs):
        others = inputs[:i] + inputs[i + 1 :]
        fitted = Calibration([s for _, s in others], tpr, [g for g, _ in others], list("abcdef"))
        pool = fitted.pool(name)
        counted[pool] += 1
        flagged[pool] += not fitted.is_id(torch.tensor([score], dtype=torch.float64), [name])
        needed = round(1 / (1 - tpr)) - 1
        assert name in pool
        assert len(pool) == 1 or sizes[name] <= needed or sum(sizes[g] for g in pool if g != name) < needed
    small = sum(size for size in sizes.values() if size <= needed)
    for pool, number in counted.items():
        inside = sum(sizes[name] for name in pool)
        assert flagged[pool] <= (1 - Fraction(str(tpr))) * inside
        assert number == inside or small == needed  # otherwise groups and pool do not overlap


@given(st.lists(st.tuples(st.sampled_from("abcd"), tied), min_size=4, max_size=60), st.sampled_from([0.5, 0.8]))
def test_groups_equal_a_calibration_with_the_scores_of_each(inputs, tpr):
    groups, scores = [g for g, _ in inputs], torch.tensor([s for _, s in inputs], dtype=torch.float64)
    fitted = Calibration(scores, tpr, groups)
    stored = StoredCalibration(fitted.scores.numpy(), tpr, fitted.members.numpy(), fitted.group_names)
    judged = torch.tensor([-math.inf, -1.0, 0.25, 0.5, math.inf], dtype=torch.float64)
    assert fitted.group_sizes() == dict(sorted(Counter(groups).items()))
    assert stored.threshold.tolist() == fitted.threshold.tolist()
    for index, name in enumerate(fitted.group_names):
        own = Calibration([s for g, s in inputs if g in fitted.pool(name)], tpr)
        p_value, is_id = fitted.predict(judged, [name] * 5)
        assert p_value.tolist() == own.p_value(judged).tolist()
        assert stored.p_value(judged.numpy(), [name] * 5).tolist() == p_value.tolist()
        assert is_id.tolist() == own.is_id(judged).tolist() == (judged >= fitted.threshold[index]).tolist()
        assert fitted.threshold[index] == own.threshold
        assert fitted.false_alarm_range(0.9, name) == own.false_alarm_range(0.9)
    mixed = torch.arange(5) % len(fitted.group_names)
    singles = [fitted.predict(judged[i : i + 1], mixed[i : i + 1]) for i in range(5)]
    assert torch.equal(fitted.p_value(judged, mixed), torch.cat([p for p, _ in singles]))
    assert torch.equal(fitted.is_id(judged, mixed.numpy()), torch.cat([is_id for _, is_id in singles]))


def test_small_groups_share_a_pool_and_the_smallest_other_group_joins_one_that_is_too_small():
    def pools(sizes):
        groups = [name for name, size in sizes.items() for _ in range(size)]
        fitted = Calibration(torch.arange(float(len(groups))), 0.9, groups, list(sizes))
        assert fitted.group_sizes() == sizes
        return {name: "".join(fitted.pool(name)) for name in sizes}

    assert pools({"a": 9, "b": 20}) == {"a": "a", "b": "b"}
    assert pools({"a": 30, "b": 4, "c": 5, "d": 0}) == {"a": "a", "b": "bcd", "c": "bcd", "d": "bcd"}
    assert pools({"a": 30, "b": 20, "c": 5}) == {"a": "a", "b": "bc", "c": "bc"}
    assert pools({"a": 30, "b": 9, "c": 5}) == {"a": "a", "b": "bc", "c": "bc"}
    assert pools({"a": 30, "b": 9, "c": 5, "d": 5}) == {"a": "a", "b": "b", "c": "bcd", "d": "bcd"}
    assert pools({"a": 5, "b": 4}) == {"a": "ab", "b": "ab"}
    with pytest.raises(ValueError, match=r"^8 calibration scores are too few for tpr=0\.9: at least 9"):
        pools({"a": 4, "b": 4})


def grouped(**options):
    return Calibration(torch.arange(60.0), 0.9, ["x", "y", "z"] * 20, **options)


def test_groups_survive_storage_casts_and_other_rates():
    fitted = grouped()
    assert set(fitted.state_dict()) == {"scores", "threshold", "members"}
    scores, groups = torch.arange(0.0, 60.0, 0.5), ["z", "x", "y"] * 40
    tensors, plain = fitted.fitted_tensors(), fitted.to_dict()
    assert plain == {"tpr": 0.9, "groups": ["x", "y", "z"]}
    rebuilt = Calibration(tensors["scores"], plain["tpr"], tensors["members"], plain["groups"])
    for other in (rebuilt, copy.deepcopy(fitted), pickle.loads(pickle.dumps(fitted)), grouped().half()):
        for one, same in zip(other.predict(scores, groups), fitted.predict(scores, groups), strict=True):
            assert torch.equal(one, same)
    assert Calibration(torch.arange(9), 0.9).to_dict() == {"tpr": 0.9, "groups": None}

    stricter = fitted.with_tpr(0.5)
    assert torch.equal(stricter.p_value(scores, groups), fitted.p_value(scores, groups))
    assert stricter.threshold.tolist() == [27.0, 28.0, 29.0]
    assert fitted.threshold.tolist() == [3.0, 4.0, 5.0]
    assert Calibration(torch.arange(100)).with_tpr(0.9).threshold == threshold_at_tpr(torch.arange(100), 0.9)


def test_groups_are_stored_in_a_detector_file(tmp_path):
    fitted = grouped()
    file = tmp_path / "d.featnorm"
    tensors = {f"calibration.{name}": value for name, value in fitted.fitted_tensors().items()}
    archive.write(file, tensors, {"model": {}, **fitted.to_dict()})
    scores, groups = torch.arange(0.0, 60.0, 0.5).double(), ["z", "x", "y"] * 40
    restored, stored = archive.calibration(*archive.read(file), file), archive.read_calibration(file)
    assert torch.equal(restored.p_value(scores, groups), fitted.p_value(scores, groups))
    assert stored.p_value(scores.numpy(), groups).tolist() == fitted.p_value(scores, groups).tolist()
    assert restored.to_dict() == fitted.to_dict()
    for wrong, message in (
        ({"groups": None}, "it has only one of the groups of calibration scores and their names"),
        ({"groups": ["x", "y"]}, "group 2 .index 2. was not in the calibration"),
        ({"groups": "xyz"}, "group_names must be a sequence of strings"),
    ):
        archive.write(file, tensors, {"model": {}, **fitted.to_dict(), **wrong})
        for read in (
            lambda: archive.calibration(*archive.read(file), file),
            lambda: archive.read_calibration(file),
        ):
            with pytest.raises(archive.ArchiveError, match=f"is damaged: {message}"):
                read()


def test_scores_are_added_to_those_that_are_there():
    more = grouped().with_scores(torch.arange(100.0, 140.0), ["y", "new"] * 20)
    both = [*["x", "y", "z"] * 20, *["y", "new"] * 20]
    expected = Calibration([*range(60), *range(100, 140)], 0.9, both, ["x", "y", "z", "new"])
    assert more.to_dict() == expected.to_dict()
    assert torch.equal(more.scores, expected.scores)
    assert torch.equal(more.members, expected.members)
    assert grouped().with_scores([5.0], torch.tensor([2])).group_sizes() == {"x": 20, "y": 20, "z": 21}
    plain = Calibration(torch.arange(30), 0.9).with_scores([7, 8])
    assert torch.equal(plain.scores, Calibration([*range(30), 7, 8]).scores)
    assert plain.tpr == 0.9


def test_bad_groups_are_refused_by_name():
    fitted = grouped()
    message = (
        "^group 'cam' \\(index 1\\) was not in the calibration, whose groups are 'x', 'y', 'z': calibrate with"
    )
    stored = StoredCalibration(np.arange(60.0), 0.9, np.arange(60) % 3, ["x", "y", "z"])
    for predict, two in ((fitted.predict, torch.zeros(2)), (stored.p_value, np.zeros(2))):
        with pytest.raises(ValueError, match=message):
            predict(two, ["x", "cam"])
        with pytest.raises(
            ValueError, match=r"^this calibration has groups \('x', 'y', 'z'\): pass the group of ea"
        ):
            predict(two)
        with pytest.raises(
            ValueError, match=r"^groups must have one entry per score, got shape \(1,\) for 2 scores"
        ):
            predict(two, ["x"])
    with pytest.raises(ValueError, match=r"^group 3 \(index 1\) was not in the calibration"):
        fitted.predict(torch.zeros(2), torch.tensor([0, 3]))
    with pytest.raises(ValueError, match="whose groups are '0', '1', '2', '3', '4' and 5 more: calibrate"):
        Calibration(range(40), 0.9, [str(i % 10) for i in range(40)]).false_alarm_range(0.9, "10")
    plain = Calibration(torch.arange(60))
    for call in (plain.predict, plain.with_scores):
        with pytest.raises(
            ValueError, match=r"^this calibration has no groups: calibrate with groups, or pass none"
        ):
            call(torch.zeros(1), ["x"])
    with pytest.raises(ValueError, match=r"^this calibration has groups"):
        fitted.with_scores([1.0])
    with pytest.raises(ValueError, match=r"^this calibration has groups"):
        fitted.false_alarm_range()
    with pytest.raises(ValueError, match=r"^group_names has 'x' twice"):
        grouped(group_names=["x", "y", "z", "x"])
    with pytest.raises(ValueError, match=r"^group 'z' \(index 2\) was not in"):
        grouped(group_names=["x", "y"])
    for wrong in ("x" * 60, torch.zeros(60), 5):
        with pytest.raises(TypeError, match=r"^groups must be a sequence of strings, got"):
            Calibration(torch.arange(60), 0.9, wrong)
    with pytest.raises(TypeError, match=r"^groups must be a sequence of strings, got 7 at index 1"):
        Calibration(torch.arange(2), 0.5, ["x", 7])
    with pytest.raises(TypeError, match=r"^groups must be a sequence of strings, got Tensor of shape \(2,\)"):
        Calibration(torch.arange(2), 0.5, torch.tensor([0, 1]))


DRAWS = {
    "normal": lambda rng, n: rng.normal(-100, 3, n),
    "heavy tails": lambda rng, n: rng.standard_t(2, n),
    "saturated": lambda rng, n: np.minimum(rng.normal(size=n), 0.5),
    "grid": lambda rng, n: np.round(rng.normal(size=n), 1),
}


@pytest.mark.parametrize("draws", DRAWS.values(), ids=DRAWS)
def test_repeats_are_found_by_their_scores(draws):
    rng = np.random.default_rng(0)
    known = draws(rng, 1000)
    for rounding in (0, 1e-6):  # that of another engine
        again = known + rounding * rng.uniform(-1, 1, 1000)
        assert are_repeats(known, again)
        assert are_repeats(known, again[:200]) or draws is DRAWS["grid"]
        assert not are_repeats(known, [*again[:200], -50.0])
    assert not any(are_repeats(known, draws(rng, size)) for size in [999, 1000, 2000] * 10)
    assert sum(are_repeats(known, draws(rng, size)) for size in range(1, 201)) <= 2


def test_few_items_with_common_scores_are_no_repeats():
    rng = np.random.default_rng(0)
    for values, known, added in ((20, 30, 5), (20, 30, 10), (50, 200, 8)):
        draws = [(rng.integers(values, size=known), rng.integers(values, size=added)) for _ in range(300)]
        assert sum(are_repeats(*map(np.float64, pair)) for pair in draws) <= 2
    many = rng.normal(size=20_000)
    assert not are_repeats(many, many[:4])


def test_repeats_are_found_among_tens_of_thousands():
    rng = np.random.default_rng(0)
    known = rng.normal(size=50_000)
    again = rng.permutation(known) + 1e-5 * rng.uniform(-1, 1, 50_000)
    assert are_repeats(known, again)
    assert are_repeats([-math.inf, *known], [*again, -math.inf])
    assert are_repeats(known, known[:10_000] + 1e-6 * rng.uniform(-1, 1, 10_000))
    assert not are_repeats(known, rng.normal(size=50_000))
    assert not are_repeats(known, rng.normal(size=10_000))


@pytest.mark.slow
def test_a_thousand_groups_are_ranked_in_seconds():
    rng = np.random.default_rng(0)
    members = rng.integers(0, 1000, 200_000)
    names = [f"class {i}" for i in range(1000)]
    fitted = Calibration(rng.normal(size=200_000), 0.95, members, names)
    assert all(fitted.pool(name) == (name,) for name in names)
