"""Activation statistics compared with counting, in batches and in merged halves."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from featnorm.hidden.statistics import ActivationStatistics

SMALL = st.sampled_from([-1.0, -0.0, 0.0, 1e-30, 0.5, 3.0])


@st.composite
def seen(draw):
    n, d = draw(st.integers(1, 8)), draw(st.integers(1, 5))
    a = torch.from_numpy(draw(hnp.arrays("float32", (n, d), elements=SMALL.map(lambda x: float(torch.tensor(x))))))
    labels = torch.tensor(draw(st.lists(st.integers(-1, 3), min_size=n, max_size=n)))
    return a, labels, draw(st.integers(0, n))


def same(a, b):
    for (name, x), (_, y) in zip(a.named_buffers(), b.named_buffers(), strict=True):
        assert torch.equal(x, y), name


@given(seen())
def test_everything_is_its_count(case):
    a, labels, cut = case
    whole = ActivationStatistics().update(a, labels)
    n, d = a.shape
    on = [[float(x) > 0 for x in row] for row in a]
    for i in range(d):
        p = sum(row[i] for row in on) / n
        assert float(whole.on_rate[i]) == pytest.approx(p)
        entropy = -sum(q * math.log(q) for q in (p, 1 - p) if q)
        assert float(whole.entropy[i]) == pytest.approx(entropy, abs=1e-12)
        assert bool(whole.dead[i]) == (p == 0)
        assert bool(whole.always_on[i]) == (p == 1)
        for k, count in enumerate(whole.class_inputs.tolist()):
            members = [row[i] for row, label in zip(on, labels.tolist(), strict=True) if label == k]
            assert count == len(members)
            assert float(whole.class_on_rate[k, i]) == pytest.approx(
                sum(members) / count if count else math.nan, nan_ok=True
            )
    counts = [sum(row) for row in on]
    assert whole.active.tolist() == [counts.count(k) for k in range(d + 1)]
    assert whole.mean_active == pytest.approx(sum(counts) / n)
    assert whole.mean_sparsity == pytest.approx(sum(1 / max(c, 1) for c in counts) / n)

    batches = ActivationStatistics().update(a[:cut], labels[:cut]).update(a[cut:], labels[cut:])
    halves = ActivationStatistics().update(a[:cut], labels[:cut])
    halves.merge(ActivationStatistics().update(a[cut:], labels[cut:]))
    assert torch.equal(batches.on, whole.on)
    assert torch.equal(halves.on, whole.on)
    assert torch.equal(halves.active, whole.active)
    known = len(whole.class_inputs)
    for other in (batches, halves):
        assert torch.equal(other.class_on[:known], whole.class_on)
        assert torch.equal(other.class_inputs[:known], whole.class_inputs)


def test_it_is_kept_in_buffers():
    stats = ActivationStatistics().update(torch.rand(5, 3) - 0.5, torch.tensor([0, 2, 2, 0, -1]))
    again = ActivationStatistics()
    again.load_state_dict(stats.state_dict())
    same(stats, again)
    stats.reset()
    assert stats.is_empty


def test_what_is_wrong_is_named_and_changes_nothing():
    stats = ActivationStatistics()
    with pytest.raises(ValueError, match="statistics are empty"):
        _ = stats.entropy
    stats.update(torch.rand(4, 3))
    before = {name: value.clone() for name, value in stats.named_buffers()}
    bad = torch.rand(2, 3)
    bad[1, 2] = math.nan
    for call, message in (
        (lambda: stats.update(bad), "input 1 of the batch has a unit that is NaN"),
        (lambda: stats.update(torch.rand(2, 4)), "width 4 after features of width 3"),
        (lambda: stats.update(torch.rand(2, 3), torch.tensor([1])), "labels must be 2 integers"),
        (lambda: stats.update(torch.ones(2, 3, dtype=torch.int64)), "floating point"),
        (lambda: stats.merge(ActivationStatistics().update(torch.rand(1, 5))), "5 units cannot be merged"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    for name, value in stats.named_buffers():
        assert torch.equal(value, before[name])


def test_a_state_that_was_taken_stays_as_it_was():
    stats = ActivationStatistics().update(torch.rand(6, 3) - 0.5, torch.tensor([0, 1, 2, 0, 1, 2]))
    state = stats.state_dict()
    kept = {name: value.clone() for name, value in state.items()}
    stats.update(torch.rand(4, 3), torch.tensor([0, 1, 5, -1]))
    stats.merge(ActivationStatistics().update(torch.rand(2, 3), torch.tensor([1, 1])))
    stats.validate()
    for name, value in state.items():
        assert torch.equal(value, kept[name])
    again = ActivationStatistics()
    again.load_state_dict(kept)
    again.validate()
    again.class_on = torch.zeros(3, 7, dtype=torch.int64)
    with pytest.raises(ValueError, match="are of shapes"):
        again.validate()
