"""RAS, SCALE and ASH: ties, inputs without an active unit, and the features that they refuse."""

import pytest
import torch

from fabricate import assert_close, fitted, of_activation
from featnorm.detectors import ASH, RAS, SCALE, EmbeddingMagnitude, Energy, L1Norm, parse_detector
from references import OOD, RECTIFIED_REFERENCES, RECTIFIED_TEST, RECTIFIED_TRAIN, TEST, TRAIN, np_scale

rectified = pytest.mark.parametrize("expression", RECTIFIED_REFERENCES)


def test_ras_orders_equal_units_by_their_index():
    train = of_activation(torch.arange(12.0).repeat(5, 1))
    changed = RAS(L1Norm()).fit(train)._shape(torch.tensor([[2.0] * 6 + [1.0] * 6]))
    assert changed.tolist() == [[6.0, 7, 8, 9, 10, 11, 0, 1, 2, 3, 4, 5]]


def test_ash_orders_equal_units_by_their_index():
    kept = ASH(L1Norm(), percentile=75)._shape(torch.ones(1, 12))
    assert (kept > 0).tolist() == [[True] * 3 + [False] * 9]


@pytest.mark.parametrize("percentile", [1e-9, 4.2, 12.5, 50, 85, 90, 99, 99.9])
@pytest.mark.parametrize("kind", [SCALE, ASH])
def test_the_number_of_units_is_whole_and_at_least_one(kind, percentile):
    expected = np_scale(RECTIFIED_TEST.activation.numpy(), min(percentile, 94), kind is ASH)
    assert_close(kind(L1Norm(), percentile).score(RECTIFIED_TEST), abs(expected).sum(1), 1e-8)


@rectified
def test_features_that_are_not_rectified_are_refused(expression):
    a = RECTIFIED_TRAIN.activation.clone()
    a[[17, 40], 1] = -1e-6
    spoilt = of_activation(a, TRAIN.labels)
    detector = fitted(expression, RECTIFIED_TRAIN)
    for call in (detector.score, detector.partial_fit, detector.fit):
        with pytest.raises(ValueError, match=r"`activation` has negative units in 2 of 150 .* first at row 17"):
            call(spoilt)


@rectified
def test_inputs_of_all_kinds_have_a_score(expression):
    detector = fitted(expression, RECTIFIED_TRAIN)
    whole = detector.score(RECTIFIED_TEST)
    alone = torch.cat([detector.score(RECTIFIED_TEST[i : i + 1]) for i in range(40)])
    assert_close(alone, whole, 1e-6)
    for a in (torch.zeros(2, 12), torch.ones(2, 12), OOD.activation.half(), 1e6 * OOD.activation.float()):
        features = of_activation(a)
        scores = detector.score(features)
        assert scores.isfinite().all()
        assert scores.dtype == torch.promote_types(a.dtype, torch.float32)
    assert detector.score(RECTIFIED_TEST[:0]).shape == (0,)
    for dtype in (torch.float16, torch.bfloat16):
        narrow = RECTIFIED_TEST.to(dtype)
        assert_close(detector.score(narrow), detector.score(narrow.to(torch.float32)), 1e-5)


@pytest.mark.parametrize("expression", ["RAS(Energy())", "SCALE(Energy())", "ASH(Energy())"])
def test_logits_that_are_no_linear_map_are_refused(expression):
    weight, _ = TRAIN.classifier
    logits = torch.nn.functional.normalize(RECTIFIED_TRAIN.activation) @ weight.T
    cosine = RECTIFIED_TRAIN.replace(logits=logits)
    detector = parse_detector(expression)
    for call in (detector.fit,) if detector.needs_fit else (detector.fit, detector.score):
        with pytest.raises(ValueError, match="cannot recompute the logits"):
            call(cosine)


@pytest.mark.parametrize("kind", [RAS, SCALE, ASH])
def test_what_cannot_be_wrapped(kind):
    with pytest.raises(ValueError, match=rf"{kind.__name__} cannot wrap .* the embedding is computed from"):
        kind(EmbeddingMagnitude())
    with pytest.raises(TypeError, match="takes a detector such as"):
        kind(2)


def test_wrong_percentiles():
    for kind in (SCALE, ASH):
        for percentile in (0, 100):
            with pytest.raises(ValueError, match=rf"{kind.__name__}: percentile must be a number in \(0, 100\)"):
                kind(Energy(), percentile)


def test_ras_keeps_an_input_that_is_the_mean():
    same = TRAIN[[3] * 20]
    assert_close(RAS(Energy()).fit(same).score(same), Energy().score(same), 1e-12)
    assert TEST.activation.min() < 0  # negative units are allowed
