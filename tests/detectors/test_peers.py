"""Agreement with pytorch-ood 0.4, whose scores are larger for outliers, and with scikit-learn."""

import numpy as np
import pytest
import torch
from sklearn import svm

from fabricate import id_features, of_activation, ood_features
from featnorm.detectors import (
    ASH,
    FDBD,
    GEN,
    KNN,
    MSP,
    NCI,
    SCALE,
    SHE,
    Energy,
    KLMatching,
    Mahalanobis,
    MaxLogit,
    NNGuide,
    OneClassSVM,
    ReAct,
    ViM,
)
from featnorm.features import Features

peers = pytest.importorskip("pytorch_ood.detector")

TRAIN = id_features(300, dtype=torch.float32)
BOTH = Features.cat(
    [f.replace(labels=None) for f in (id_features(50, 5, torch.float32), ood_features(50, 1, torch.float32))]
)


def ranks(scores):
    return np.asarray(scores).argsort(kind="stable").argsort()


def assert_same_ranking(got, theirs, tolerance=0.9999):
    assert np.corrcoef(ranks(got), ranks(-np.asarray(theirs)))[0, 1] > tolerance


@pytest.mark.parametrize(
    ("ours", "theirs"), [(MSP(), peers.MaxSoftmax), (Energy(), peers.EnergyBased), (MaxLogit(), peers.MaxLogit)]
)
@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
def test_confidences(ours, theirs, scale):
    logits = BOTH.logits * scale
    expected = -theirs(None).predict_logits(logits)
    torch.testing.assert_close(ours.score(Features(logits=logits)), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("gamma", "top"), [(0.1, 3), (0.5, 2)])
def test_gen(gamma, top):
    """Theirs is a mean, of probabilities that are clamped to 1e-7."""
    theirs = peers.GEN(None, gamma=gamma, M=top).predict_logits(BOTH.logits)
    torch.testing.assert_close(GEN(gamma, top).score(BOTH), -top * theirs, rtol=1e-4, atol=1e-4)


def test_kl_matching():
    theirs = peers.KLMatching(None).fit_logits(TRAIN.logits, TRAIN.labels).predict_logits(BOTH.logits)
    torch.testing.assert_close(KLMatching().fit(TRAIN).score(BOTH), -theirs, rtol=1e-4, atol=1e-5)


def linear(z):
    weight, bias = TRAIN.classifier
    return z @ weight.T + bias


def test_she():
    theirs = peers.SHE(None, linear).fit_features(TRAIN.pooled, TRAIN.labels).predict_features(BOTH.pooled)
    torch.testing.assert_close(SHE().fit(TRAIN).score(BOTH), -theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("k", [1, 10])
def test_nnguide(k):
    """Theirs has no sample: its bank holds every training input, as ours does of up to 1,000."""
    theirs = peers.NNGuide(None, linear, k).fit_features(TRAIN.pooled, TRAIN.labels).predict_features(BOTH.pooled)
    torch.testing.assert_close(NNGuide(k).fit(TRAIN).score(BOTH), -theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("k", [1, 5, 50])
def test_knn(k):
    """Theirs is the Euclidean distance; a zero vector is theirs to clamp and ours to leave."""
    theirs = peers.KNN(None, k=k).fit_features(TRAIN.pooled, TRAIN.labels).predict_features(BOTH.pooled)
    plain = KNN(k, squared=False).fit(TRAIN).score(BOTH)
    torch.testing.assert_close(-plain.double(), theirs.double(), rtol=1e-3, atol=1e-4)
    assert_same_ranking(KNN(k).fit(TRAIN).score(BOTH), theirs)


@pytest.mark.parametrize("nu", [0.001, 0.05, 0.95])
def test_one_class_svm(nu):
    theirs = svm.OneClassSVM(nu=nu, gamma="scale", tol=1e-9).fit(TRAIN.pooled.double().numpy())
    expected = torch.from_numpy(theirs.decision_function(BOTH.pooled.double().numpy()))
    scores = OneClassSVM(nu).fit(TRAIN).score(BOTH).double()
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("dim", [3, 6, 9])
def test_vim(dim):
    """Theirs is in single precision, 0.07 from the formula here on one processor; ours is 3e-6 from it."""
    weight, bias = TRAIN.classifier
    theirs = peers.ViM(None, d=dim, w=weight, b=bias).fit_features(TRAIN.pooled, TRAIN.labels)
    ours = ViM(dim).fit(TRAIN)
    assert theirs.alpha == pytest.approx(float(ours._fitted_state()[1]), rel=1e-3)
    torch.testing.assert_close(ours.score(BOTH), -theirs.predict_features(BOTH.pooled), rtol=1e-3, atol=1e-1)


def test_mahalanobis():
    """Theirs is half the square under a covariance that is a *sum*, plus a ridge of 1e-6.

    So theirs x 2 N is ours where every direction varies by much more than the ridge, and only there.
    """
    theirs = peers.Mahalanobis(None).fit_features(TRAIN.pooled, TRAIN.labels).predict_features(BOTH.pooled)
    ours = Mahalanobis().fit(TRAIN).score(BOTH)
    torch.testing.assert_close(-ours, 2 * len(TRAIN) * theirs, rtol=2e-2, atol=1.0)
    assert_same_ranking(ours, theirs, 0.999)


def test_relative_mahalanobis():
    """As for `test_mahalanobis`, but not halved. pytorch-ood has neither NECO nor a normalized Mahalanobis."""
    theirs = peers.RMD(None).fit_features(TRAIN.pooled, TRAIN.labels).predict_features(BOTH.pooled)
    ours = Mahalanobis(relative=True).fit(TRAIN).score(BOTH)
    torch.testing.assert_close(-ours, len(TRAIN) * theirs, rtol=2e-2, atol=1.0)
    assert_same_ranking(ours, theirs, 0.999)


def test_a_dead_unit_rules_mahalanobis_under_a_ridge_and_not_ours():
    train, test = TRAIN.pooled.clone(), BOTH.pooled.clone()
    train[:, 0] = 0.0
    test[:, 0] = torch.linspace(0, 1, len(test))
    ours = Mahalanobis().fit(Features(pooled=train, labels=TRAIN.labels))
    quiet = test.clone()
    quiet[:, 0] = 0.0
    torch.testing.assert_close(ours.score(Features(pooled=test)), ours.score(Features(pooled=quiet)))
    theirs = peers.Mahalanobis(None).fit_features(train, TRAIN.labels).predict_features(test)
    assert np.corrcoef(ranks(theirs), np.arange(len(test)))[0, 1] > 0.999  # in the order in which the unit fires


@pytest.mark.parametrize("percentile", [50, 90, 99])
def test_react(percentile):
    weight, bias = TRAIN.classifier
    theirs = peers.ReAct(
        backbone=torch.nn.Identity(), head=lambda z: z @ weight.T + bias, percentile=percentile / 100
    ).fit_feature_maps(TRAIN.activation, TRAIN.labels)
    ours = ReAct(Energy(), percentile).fit(TRAIN)
    assert ours.clip == pytest.approx(theirs.threshold, rel=1e-2, abs=1e-3)
    torch.testing.assert_close(
        ours.score(BOTH), -theirs.predict_feature_maps(BOTH.activation), rtol=1e-2, atol=1e-2
    )
    assert torch.equal(BOTH.logits, of_activation(BOTH.activation).logits)


@pytest.mark.parametrize("percentile", [50, 65, 85, 90])
@pytest.mark.parametrize(("ours", "theirs"), [(SCALE, peers.SCALE), (ASH, peers.ASH)])
def test_scale_and_ash(ours, theirs, percentile):
    """Theirs is of feature maps, and its default percentile is 65."""
    features = of_activation(BOTH.activation.relu())
    weight, bias = features.classifier
    peer = theirs(
        backbone=torch.nn.Identity(),
        head=lambda maps: maps.flatten(1) @ weight.T + bias,
        percentile=percentile / 100,
    )
    expected = -peer.predict_feature_maps(features.activation[:, :, None, None])
    torch.testing.assert_close(ours(Energy(), percentile).score(features), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("ours", "theirs", "settings"),
    [(FDBD, peers.fDBD, {}), (NCI, peers.NCI, {}), (NCI, peers.NCI, {"alpha": 0.1})],
)
def test_margins(ours, theirs, settings):
    """It has neither ORA nor RAS."""
    weight, bias = TRAIN.classifier
    head = torch.nn.Linear(*weight.T.shape).requires_grad_(False)
    head.weight.copy_(weight)
    head.bias.copy_(bias)
    peer = theirs(None, head, **settings).fit_features(TRAIN.pooled)
    expected = -peer.predict_features(BOTH.pooled)
    torch.testing.assert_close(ours(**settings).fit(TRAIN).score(BOTH), expected, rtol=1e-4, atol=1e-5)
