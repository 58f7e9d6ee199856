"""Fitted state: moments, samples, histograms and banks, compared with numpy, in parts and merged."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from featnorm.detectors import statistics
from featnorm.detectors.statistics import (
    Bank,
    FloatHistogram,
    Moments,
    RowSample,
    Total,
    single_unit_rows,
    unit_rows,
    whitening,
)

F64 = torch.float64


def rows_of(n=200, d=5, seed=0, dtype=F64):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def split_fit(make, rows, sizes, *more):
    """A statistic fitted to batches of these sizes, and the merge of one per batch."""
    streamed, merged = make(), make()
    for i, batch in enumerate(rows.split(sizes)):
        extra = [m.split(sizes)[i] for m in more]
        streamed.update(batch, *extra)
        one = make()
        one.update(batch, *extra)
        merged.merge(one)
    return streamed, merged


SIZES = [1, 7, 64, 0, 100, 28]

# Moments


@pytest.mark.parametrize("offset", [0.0, 1e4, 1e8])
def test_moments_are_numpys(offset):
    z = rows_of() + offset
    moments = Moments()
    moments.update(z)
    tolerance = {0.0: 1e-12, 1e4: 1e-9, 1e8: 1e-6}[offset]
    torch.testing.assert_close(moments.mean(), torch.from_numpy(z.numpy().mean(0)), rtol=1e-12, atol=1e-12)
    expected = torch.from_numpy(np.cov((z.numpy() - offset).T, bias=True))
    torch.testing.assert_close(moments.covariance(), expected, rtol=tolerance, atol=tolerance)
    assert moments.total == 200
    assert moments.width == 5


@pytest.mark.parametrize("per_group", [False, True])
def test_moments_by_group_in_parts_and_merged(per_group):
    z, labels = rows_of(), torch.tensor([10**15, 3, 7])[torch.arange(200) % 3]
    expected = [z[labels == label].numpy() for label in (3, 7, 10**15)]
    for moments in split_fit(lambda: Moments(gram_per_group=per_group), z, SIZES, labels):
        assert moments.groups.tolist() == [3, 7, 10**15]
        assert moments.counts.tolist() == [67, 66, 67]
        torch.testing.assert_close(moments.means(), torch.from_numpy(np.stack([e.mean(0) for e in expected])))
        torch.testing.assert_close(moments.covariance(), torch.from_numpy(np.cov(z.numpy().T, bias=True)))
        own = [np.cov(e.T, bias=True) for e in expected]
        pooled = sum(len(e) * c for e, c in zip(expected, own, strict=True)) / 200
        torch.testing.assert_close(moments.within_covariance(), torch.from_numpy(pooled))
        if per_group:
            for (got, _), cov in zip(moments.group_covariances(), own, strict=True):
                torch.testing.assert_close(got, torch.from_numpy(cov))


def test_moments_without_a_gram_matrix():
    z, labels = rows_of(), torch.tensor([10**15, 3, 7])[torch.arange(200) % 3]
    expected = torch.stack([z[labels == label].mean(0) for label in (3, 7, 10**15)])
    for moments in split_fit(lambda: Moments(gram=False), z, SIZES, labels):
        torch.testing.assert_close(moments.means(), expected)
        assert moments.gram.numel() == 0
        moments.validate()


def test_moments_about_a_given_point():
    z, point = rows_of(), torch.arange(5.0)
    moments = Moments()
    moments.update(z[:50], shift=point)
    moments.update(z[50:])
    centred = z - point
    torch.testing.assert_close(moments.second_moment(), centred.T @ centred / 200)


def test_moments_of_a_first_batch_far_from_the_rest():
    z = rows_of()
    z[0] += 1e4
    whole, one_first = Moments(), Moments()
    whole.update(z)
    one_first.update(z[:1])
    one_first.update(z[1:])
    torch.testing.assert_close(one_first.covariance(), whole.covariance(), rtol=1e-8, atol=1e-6)


def test_moments_take_blocks(monkeypatch):
    z = rows_of()
    whole, blocks = Moments(), Moments()
    whole.update(z)
    monkeypatch.setattr(statistics, "_BLOCK_ROWS", 17)
    blocks.update(z)
    torch.testing.assert_close(blocks.covariance(), whole.covariance())


@pytest.mark.parametrize("per_group", [False, True])
def test_moments_take_panels(monkeypatch, per_group):
    z, labels = rows_of(d=11), torch.arange(200) % 3
    whole = Moments(gram_per_group=per_group)
    whole.update(z, labels)
    monkeypatch.setattr(statistics, "_PANEL_COLUMNS", 4)
    for panels in split_fit(lambda: Moments(gram_per_group=per_group), z, SIZES, labels):
        torch.testing.assert_close(panels.covariance(), whole.covariance())
        torch.testing.assert_close(panels.within_covariance(), whole.within_covariance())
        about = Moments()
        about.update(z, shift=panels.shift)
        torch.testing.assert_close(panels.second_moment(), about.second_moment())
        if per_group:
            pairs = zip(panels.group_covariances(), whole.group_covariances(), strict=True)
            for (covariance, _), (expected, _) in pairs:
                torch.testing.assert_close(covariance, expected)


def test_moments_refuse_another_width_and_too_much_memory(monkeypatch):
    moments = Moments()
    moments.update(rows_of())
    before = copy.deepcopy(moments.state_dict())
    with pytest.raises(ValueError, match="width 4 after features of width 5"):
        moments.update(rows_of(d=4))
    assert all(torch.equal(before[k], v) for k, v in moments.state_dict().items())
    monkeypatch.setattr(statistics, "_MAX_GRAM_BYTES", 1000)
    with pytest.raises(ValueError, match=r"1 covariance\(s\) of 12 x 12"):
        Moments().update(rows_of(d=12))


def test_half_precision_rows_are_summed_in_float64():
    z = (rows_of(5000) + 100).to(torch.float16)
    moments = Moments()
    moments.update(z)
    torch.testing.assert_close(moments.mean(), z.double().mean(0), rtol=1e-12, atol=0)


# Samples of rows


def sample_of(rows, size, sizes=None):
    sample = RowSample(size)
    for batch in rows.split(sizes or len(rows)):
        sample.update(batch)
    return sample


def test_a_sample_below_its_size_is_all_rows():
    z = rows_of(dtype=torch.float32)
    sample = sample_of(z, 200)
    assert sample.is_complete
    assert {tuple(r.tolist()) for r in sample.rows} == {tuple(r.tolist()) for r in z}


@settings(max_examples=25)
@given(st.permutations(range(60)), st.integers(1, 59), st.integers(1, 70))
def test_a_sample_knows_no_order_no_batches_and_no_halves(order, cut, size):
    z = rows_of(60, dtype=torch.float32)
    whole, z = sample_of(z, size), z[list(order)]
    first, second = sample_of(z[:cut], size), sample_of(z[cut:], size)
    other_way = copy.deepcopy(second)
    other_way.merge(first)
    first.merge(second)
    for got in (sample_of(z, size, 7), first, other_way):
        assert torch.equal(got.rows, whole.rows)
        assert int(got.seen) == 60
        assert got.is_complete == (size >= 60)


def test_a_wide_sample_is_put_in_order_a_part_at_a_time():
    z = torch.randn(400, 600, generator=torch.Generator().manual_seed(0))
    whole, parts = sample_of(z, 50), sample_of(z, 50, 30)
    assert torch.equal(parts.rows, whole.rows)
    assert {tuple(r.tolist()) for r in parts.rows} <= {tuple(r.tolist()) for r in z}


@pytest.mark.parametrize("kind", ["normal", "integers", "one dimension", "one-hot", "relu"])
def test_a_sample_is_uniform(kind):
    g = torch.Generator().manual_seed(0)
    n = 20_000
    z = {
        "normal": lambda: torch.randn(n, 4, generator=g),
        "integers": lambda: torch.randint(0, 100, (n, 4), generator=g).float(),
        "one dimension": lambda: torch.randn(n, 1, generator=g),
        "one-hot": lambda: torch.eye(4)[torch.randint(4, (n,), generator=g)] * torch.rand(n, 1, generator=g),
        "relu": lambda: torch.randn(n, 8, generator=g).relu(),
    }[kind]()
    sample = sample_of(z, 2000)
    assert len(sample.rows) == 2000
    error = z.std(0) / 2000**0.5
    assert ((sample.rows.mean(0) - z.mean(0)).abs() < 4.5 * error).all()
    assert ((sample.rows.std(0) / z.std(0) - 1).abs() < 0.15).all()


@pytest.mark.parametrize("share", [0.01, 0.3, 1])
def test_a_sample_of_a_share_knows_no_order_and_no_halves(share):
    z = torch.randn(20_000, 3, generator=torch.Generator().manual_seed(0))

    def of(rows):
        sample = RowSample(50, share)
        for batch in rows.split(3000):
            sample.update(batch)
        return sample

    whole, first = of(z), of(z.flip(0)[:7000])
    first.merge(of(z.flip(0)[7000:]))
    assert torch.equal(first.rows, whole.rows)
    assert abs(len(whole.rows) - share * 20_000) < 4 * (20_000 * share * (1 - share)) ** 0.5 + 1
    assert len(of(z[:60]).rows) == (60 if share == 1 else 50)
    whole.validate()


def test_a_sample_of_identical_rows():
    sample = sample_of(torch.ones(50, 3), 10, 7)
    assert sample.rows.tolist() == [[1.0] * 3] * 10
    assert not sample.is_complete


def test_a_sample_is_a_copy():
    z = rows_of(dtype=torch.float32)
    sample = sample_of(z, 300)
    before = sample.rows.clone()
    z.zero_()
    assert torch.equal(sample.rows, before)


# Histograms

floats = st.floats(-(2.0**99), 2.0**99, width=32).filter(lambda x: x == 0 or abs(x) > 1e-30)


def percentile_of(values, p, sizes=None):
    histogram = FloatHistogram()
    for part in values.split(sizes or max(len(values), 1)):
        histogram.update(part)
    return histogram.percentile(p)


@settings(max_examples=60)
@given(arrays(np.float32, array_shapes(max_dims=1, max_side=40), elements=floats), st.floats(0.1, 99.9))
def test_a_percentile_is_between_its_order_statistics(values, p):
    got = percentile_of(torch.from_numpy(values), p)
    ordered = np.sort(values).astype(np.float64)
    rank = p / 100 * (len(ordered) - 1)
    low, high = ordered[int(np.floor(rank))], ordered[int(np.ceil(rank))]
    assert low - abs(low) * 2**-11 - 1e-40 <= got <= high + abs(high) * 2**-11 + 1e-40


@pytest.mark.parametrize("values", [[1.0, 2.0], [0.0, 0.0, 0.0, 8.0], [-4.0, 3.0, 100.0], [5.0]])
@pytest.mark.parametrize("p", [10, 50, 90])
def test_a_percentile_of_few_numbers_is_linear_between_them_as_numpys(values, p):
    got = percentile_of(torch.tensor(values), p)
    assert got == pytest.approx(np.percentile(values, p), rel=2**-10, abs=1e-30)


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
@pytest.mark.parametrize("p", [0.5, 5, 50, 90, 99.9])
def test_percentiles_of_many_numbers(scale, p):
    values = rows_of(4000).relu().add(0.01).reshape(-1) * scale
    expected = np.percentile(values.numpy(), p)
    assert percentile_of(values, p) == pytest.approx(expected, rel=1e-3)
    assert percentile_of(-values, p) == pytest.approx(np.percentile(-values.numpy(), p), rel=1e-3)
    assert percentile_of(values, p, 777) == percentile_of(values, p)


def test_a_histogram_merges():
    values = rows_of(500).reshape(-1)
    parts = [FloatHistogram() for _ in range(2)]
    parts[0].update(values[:10])
    parts[1].update(values[10:])
    parts[0].merge(parts[1])
    assert parts[0].percentile(90) == percentile_of(values, 90)
    assert int(parts[0].counts.sum()) == 2500


def test_a_histogram_of_nothing_or_one_value():
    histogram = FloatHistogram()
    histogram.update(torch.empty(0, 3))
    assert histogram.is_empty
    assert percentile_of(torch.full((1000,), 3.0), 90) == pytest.approx(3, rel=2**-11)
    assert percentile_of(torch.zeros(1000), 90) == pytest.approx(0, abs=1e-30)
    assert percentile_of(-torch.zeros(1000), 90) == pytest.approx(0, abs=1e-30)


# Totals and banks


def test_total():
    for total in split_fit(Total, torch.arange(200.0), SIZES):
        assert total.mean() == 99.5
    assert Total().is_empty


def test_a_bank_keeps_all_rows_in_order():
    z = rows_of(dtype=torch.float32)
    for bank in split_fit(Bank, z, SIZES):
        assert torch.equal(bank.rows, z)
        assert bank.width == 5
    with pytest.raises(ValueError, match="width 4 after features of width 5"):
        bank.update(z[:, :4])


def test_a_bank_takes_copies():
    z = rows_of(dtype=torch.float32)
    bank = Bank()
    bank.update(z)
    z.zero_()
    assert bank.rows.abs().max() > 1


def test_a_bank_that_loads_forgets_what_it_had():
    one, other = Bank(), Bank()
    one.update(rows_of(10))
    other.update(rows_of(20, seed=3))
    one.load_state_dict(other.state_dict())
    assert torch.equal(one.rows, other.rows)


MAKERS = [
    Moments,
    lambda: Moments(gram=False),
    lambda: Moments(gram_per_group=True),
    lambda: RowSample(50),
    lambda: RowSample(50, 0.5),
    FloatHistogram,
    Bank,
]


@pytest.mark.parametrize("make", MAKERS)
def test_every_statistic_is_reset_copied_and_merged_with_nothing(make):
    statistic = make()
    assert statistic.is_empty
    statistic.update(rows_of())
    whole = {k: v.clone() for k, v in statistic.state_dict().items()}
    copied = make()
    copied.copy_from(statistic)
    statistic.merge(make())
    empty = make()
    empty.merge(statistic)
    statistic.reset()
    assert statistic.is_empty
    assert statistic.width == 0
    statistic.update(rows_of())
    for same in (statistic, copied, empty):
        for name, value in same.state_dict().items():
            assert torch.equal(value, whole[name]), name


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("cast", [lambda s: s.half(), lambda s: s.double(), lambda s: s.to(torch.bfloat16)])
def test_no_cast_changes_a_statistic(make, cast):
    statistic = make()
    statistic.update(rows_of())
    before = {k: v.clone() for k, v in statistic.state_dict().items()}
    for name, value in cast(statistic).state_dict().items():
        assert value.dtype == before[name].dtype
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("make", MAKERS)
def test_a_state_of_another_kind_is_refused(make):
    statistic = make()
    statistic.update(rows_of())
    wrong = {name: value.to(torch.float16) for name, value in statistic.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"torch\.float16"):
        make().load_state_dict(wrong)
    with pytest.raises(RuntimeError, match="Missing key"):
        make().load_state_dict({})


# Helpers


def test_unit_rows():
    z = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1e-3, 0.0]], dtype=F64)
    torch.testing.assert_close(
        unit_rows(z), torch.tensor([[0.6, 0.8], [0, 0], [1, 0]], dtype=F64), atol=2e-7, rtol=0
    )


def test_whitening_is_a_root_of_the_pseudo_inverse():
    z = rows_of(100, 6)
    z[:, 2] = 0
    z[:, 4] = z[:, 1]
    covariance = np.cov(z.numpy().T, bias=True)
    factor = whitening(torch.from_numpy(covariance), torch.tensor(1e-14, dtype=F64))
    assert factor.shape == (6, 4)
    np.testing.assert_allclose(factor @ factor.T, np.linalg.pinv(covariance, hermitian=True), atol=1e-9)


def test_whitening_of_nothing_has_no_directions():
    zero = torch.zeros(3, 3, dtype=F64)
    assert whitening(zero, torch.zeros((), dtype=F64)).shape == (3, 0)


def test_unit_rows_in_single_precision_take_blocks(monkeypatch):
    z = rows_of(dtype=torch.float32)
    z[3] = 0
    expected = unit_rows(z).float()
    monkeypatch.setattr(statistics, "_BLOCK_ROWS", 17)
    assert torch.equal(single_unit_rows(z), expected)
    assert single_unit_rows(z[:0]).shape == (0, 5)
