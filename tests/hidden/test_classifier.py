"""The hidden classifier as functions of tensors: Theorem 3, equation 8 and Corollary 4, compared with loops."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import featnorm as fn
from featnorm.hidden.classifier import HiddenClassifier, margin

NUMBERS = st.floats(-1e3, 1e3, allow_subnormal=False)


@st.composite
def classifiers(draw, inputs=None):
    n = inputs or draw(st.integers(1, 5))
    classes, d = draw(st.integers(1, 4)), draw(st.integers(1, 7))
    a = torch.from_numpy(draw(hnp.arrays(float, (n, d), elements=NUMBERS)))
    shape = draw(st.sampled_from([(n, classes, d), (classes, d)]))
    return HiddenClassifier(a, torch.from_numpy(draw(hnp.arrays(float, shape, elements=NUMBERS))))


def rows(hidden):
    """Return the coefficients of each input as (n, K, d) lists."""
    n = len(hidden)
    c = hidden.coefficients
    return (c if c.ndim == 3 else c.expand(n, *c.shape)).tolist()


@given(classifiers())
def test_theorem_3_holds_whatever_the_weights(hidden):
    slack = 1e-9 * (1 + hidden.norm[:, None])
    assert (hidden.gap >= -slack).all()
    assert (hidden.gap <= hidden.bound + slack).all()


@given(classifiers())
def test_everything_is_its_formula(hidden):
    a, c = hidden.activation.tolist(), rows(hidden)
    for i, vector in enumerate(a):
        signs = [1 if x > 0 else -1 for x in vector]
        binary = [[1 if x > 0 else -1 for x in row] for row in c[i]]
        psi = [sum(b * x for b, x in zip(row, vector, strict=True)) for row in binary]
        tolerance = dict(rel=1e-9, abs=1e-9 * (1 + sum(map(abs, vector))))
        assert hidden.logits[i].tolist() == pytest.approx(psi, **tolerance)
        assert float(hidden.confidence[i]) == pytest.approx(max(psi), **tolerance)
        differences = [sum(abs(s - b) for s, b in zip(signs, row, strict=True)) for row in binary]
        assert hidden.sign_difference[i].tolist() == pytest.approx(differences)
        total = sum(math.exp(x - max(psi)) for x in psi)
        p = [math.exp(x - max(psi)) / total for x in psi]
        assert float(hidden.entropy[i]) == pytest.approx(-sum(x * math.log(x) for x in p if x), abs=1e-6)
        for k, row in enumerate(binary):
            classes = torch.full((len(hidden),), k)
            on = sum(x for b, x in zip(row, vector, strict=True) if b == 1)
            off = sum(x for b, x in zip(row, vector, strict=True) if b == -1)
            parts = hidden.parts(classes)
            assert [float(parts[0][i]), float(parts[1][i])] == pytest.approx([on, off], **tolerance)
            same = sum(s == b for s, b in zip(signs, row, strict=True)) / len(signs)
            assert float(hidden.agreement(classes)[i]) == pytest.approx(same)
            norm = sum(map(abs, vector))
            if norm > 0:
                errors = [(norm - x) / norm for x in psi]
                target, others = hidden.approximation_error(classes)
                assert float(target[i]) == pytest.approx(errors[k], abs=1e-6)
                if len(psi) > 1:
                    mean = (sum(errors) - errors[k]) / (len(psi) - 1)
                    assert float(others[i]) == pytest.approx(mean, abs=1e-6)


@given(classifiers(), st.data())
@settings(max_examples=200)
def test_corollary_4_whenever_its_premise_holds(ind, data):
    ood = data.draw(classifiers())
    below = margin(ood, ind) > 1e-9 * (1 + ind.norm.max())
    for i in below.nonzero().flatten().tolist():
        assert (ood.norm[i] < ind.norm).all()


def test_corollary_4_is_not_empty():
    weight = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    ind = HiddenClassifier(torch.tensor([[5.0, 0.0], [0.0, 6.0]]), weight)
    ood = HiddenClassifier(torch.tensor([[0.5, 0.0], [4.0, 4.0]]), weight)
    assert (margin(ood, ind) > 0).tolist() == [True, False]


def test_aligned_signs_make_the_norm_the_confidence():
    a = torch.tensor([[3.0, 0.0, 2.0, 0.0]])
    hidden = HiddenClassifier(a, torch.tensor([[0.1, -5.0, 2.0, -0.3], [-1.0, 1.0, 1.0, 1.0]]))
    assert hidden.prediction.tolist() == [0]
    assert hidden.confidence.tolist() == fn.l1_norm(a).tolist()
    assert hidden.sign_difference.tolist() == [[0.0, 6.0]]
    assert hidden.agreement(torch.tensor([1])).tolist() == [0.25]


def test_it_agrees_with_the_detector():
    torch.manual_seed(0)
    a, weight = torch.rand(6, 9), torch.randn(3, 9)
    score = fn.HiddenConfidence().score(fn.Features(activation=a, classifier=(weight, None)))
    torch.testing.assert_close(HiddenClassifier(a, weight).confidence, score)


def test_what_does_not_fit_is_named():
    a = torch.rand(4, 3)
    with pytest.raises(ValueError, match=r"coefficients must be \(n, K, d\)"):
        HiddenClassifier(a, torch.rand(2, 5))
    with pytest.raises(ValueError, match="floating point"):
        HiddenClassifier(a.long(), torch.rand(2, 3))
    with pytest.raises(ValueError, match=r"offset must be \(4, 2\)"):
        HiddenClassifier(a, torch.rand(2, 3), torch.rand(2))
    hidden = HiddenClassifier(a, torch.rand(2, 3))
    with pytest.raises(ValueError, match="from 0 to 1"):
        hidden.agreement(torch.tensor([0, 1, 2, 0]))
    with pytest.raises(ValueError, match="one class per input"):
        hidden.parts(torch.tensor([0, 1]))
