"""Every detector against its formula, written out in float64 numpy and not the way the source does it."""

import numpy as np
import pytest
import torch

import featnorm as fn
from fabricate import assert_close, fitted, of_activation
from featnorm.detectors import (
    GEN,
    KNN,
    NECO,
    SHE,
    SSD,
    HiddenConfidence,
    KLMatching,
    Mahalanobis,
    NNGuide,
    ReAct,
    Residual,
    ViM,
    parse_detector,
)
from featnorm.features import Features
from featnorm.paper.networks import CSIHead
from references import (
    BOTH,
    EVERY,
    MODEL_REFERENCES,
    OWN,
    RECTIFIED_BOTH,
    RECTIFIED_REFERENCES,
    RECTIFIED_TRAIN,
    REFERENCES,
    TRAIN,
    net,
    np_knn,
    np_mahalanobis,
    np_nan,
    np_nnguide,
    np_residual,
    np_ssd,
    np_unit,
    quadratic,
)


def test_every_registered_detector_has_a_reference():
    expressions = (*REFERENCES, *RECTIFIED_REFERENCES, *MODEL_REFERENCES)
    detectors = [parse_detector(expression) for expression in expressions]
    found = {type(module).__name__ for detector in detectors for module in detector.modules()}
    # A jackknife neither streams nor merges: tests/detectors/test_jackknife.py compares it with its formula.
    assert found >= set(OWN) - {"Jackknife"}


@pytest.mark.parametrize("expression", MODEL_REFERENCES)
def test_formula_with_a_model(expression):
    model = net(CSIHead(6, hidden=7, embedding=5))
    with torch.no_grad():  # as after training: every rotation's own logit is positive on average
        model[1].rotation.bias += 3
    train, test = (torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(n)) for n in (30, 6))
    got = fn.Scorer(model, parse_detector(expression)).fit(train.split(13))(test).score
    assert_close(got.double(), MODEL_REFERENCES[expression](model, train, test), 1e-5)


@pytest.mark.parametrize("expression", EVERY)
def test_formula(expression):
    got = fitted(expression, TRAIN).score(BOTH)
    assert got.dtype == torch.float64
    # The clip of ReAct is known to one part in 2^11; the neighbors, and the samples for k-means, the alpha of ViM
    # and the support vector machine, are float32.
    rtol = 5e-3 if "ReAct" in expression else 1e-8
    single = ("KNN", "NNGuide", "clusters=3", "OneClassSVM", "ViM(dim=5, normalize=True)")
    if "ReAct" not in expression and any(part in expression for part in single):
        rtol = 1e-4
    assert_close(got, REFERENCES[expression](), rtol)


@pytest.mark.parametrize("expression", RECTIFIED_REFERENCES)
def test_formula_of_rectified_features(expression):
    got = fitted(expression, RECTIFIED_TRAIN).score(RECTIFIED_BOTH)
    assert got.dtype == torch.float64
    assert_close(got, RECTIFIED_REFERENCES[expression](), 1e-4 if "KNN" in expression else 1e-8)


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_mahalanobis_and_ssd_of_features_far_from_the_origin(offset):
    g = torch.Generator().manual_seed(0)
    mixing = torch.randn(6, 6, generator=g, dtype=torch.float64)
    y = torch.randint(0, 4, (300,), generator=g)
    centres = torch.randn(4, 6, generator=g, dtype=torch.float64) * 3
    z = centres[y] + torch.randn(300, 6, generator=g, dtype=torch.float64) @ mixing + offset
    q = torch.randn(50, 6, generator=g, dtype=torch.float64) * 4 + offset
    train, test = Features(pooled=z, labels=y), Features(pooled=q)
    expected = np_mahalanobis(z.numpy() - offset, y.numpy(), q.numpy() - offset)
    assert_close(Mahalanobis().fit(train).score(test), expected, 1e-6)
    in_float32 = Mahalanobis().fit(train.to(torch.float32)).score(test.to(torch.float32))
    assert_close(in_float32.double(), expected, 1e-2 if offset else 1e-5)
    if not offset:
        assert_close(SSD().fit(train).score(test), np_ssd(z.numpy(), q.numpy()), 1e-8)


def test_mahalanobis_with_dead_units_is_the_pseudo_inverse():
    z, y = TRAIN.pooled.clone(), TRAIN.labels
    z[:, 3] = 7.0  # constant
    z[:, 5] = z[:, 4]  # twice the same
    q = BOTH.pooled.clone()
    q[:, 3] += torch.arange(len(q))  # fires at test
    got = Mahalanobis().fit(Features(pooled=z, labels=y)).score(Features(pooled=q))
    assert_close(got, np_mahalanobis(z.numpy(), y.numpy(), q.numpy()), 1e-6)


@pytest.mark.parametrize("expression", ["Mahalanobis(normalize=True)", "Residual(dim=4, normalize=True)"])
def test_normalized_features_have_no_length(expression):
    """Each row is scaled by itself, in training and at test; a zero vector stays one."""
    g = torch.Generator().manual_seed(0)
    train, test = (
        Features(pooled=f.pooled * (0.1 + torch.rand(len(f), 1, generator=g)), labels=f.labels)
        for f in (TRAIN, BOTH)
    )
    assert_close(fitted(expression, train).score(test), REFERENCES[expression](), 1e-8)
    detector = fitted(expression, train)
    assert detector.score(Features(pooled=torch.zeros(1, 12, dtype=torch.float64))).isfinite().all()


def test_ssd_with_a_dead_unit_is_the_pseudo_inverse():
    z, q = TRAIN.pooled.clone(), BOTH.pooled.clone()
    z[:, 3] = 0.0
    assert_close(SSD().fit(Features(pooled=z)).score(Features(pooled=q)), np_ssd(z.numpy(), q.numpy()), 1e-6)


@pytest.mark.parametrize("clusters", ["labels", 3])
def test_ssd_with_fewer_inputs_in_a_cluster_than_dimensions_is_the_pseudo_inverse(clusters):
    g = torch.Generator().manual_seed(0)
    y = torch.arange(30) % 3
    centres = torch.randn(3, 32, generator=g, dtype=torch.float64)
    z, q = (centres[y] + 0.05 * torch.randn(30, 32, generator=g, dtype=torch.float64) for _ in range(2))
    got = SSD(clusters).fit(Features(pooled=z, labels=y)).score(Features(pooled=q))
    assert_close(got, np_ssd(z.numpy(), q.numpy(), y.numpy()), 1e-6)


@pytest.mark.parametrize("spread", [1, 4, 7])
def test_ssd_with_units_of_very_different_scale(spread):
    g = torch.Generator().manual_seed(0)
    scales = torch.logspace(0, -spread, 8, dtype=torch.float64)
    z = (torch.randn(400, 8, generator=g, dtype=torch.float64) + 1) * scales
    q = (torch.randn(50, 8, generator=g, dtype=torch.float64) + 1) * scales
    got = SSD().fit(Features(pooled=z)).score(Features(pooled=q))
    assert_close(got, np_ssd(z.numpy(), q.numpy()), 1e-6)


def test_standardising_leaves_the_one_cluster_score_unchanged():
    z, q = np_unit(TRAIN.pooled.numpy()), np_unit(BOTH.pooled.numpy())
    expected = -quadratic(q, z.mean(0), np.linalg.inv(np.cov(z.T, bias=True)))
    assert_close(fitted("SSD()", TRAIN).score(BOTH), expected, 1e-8)


@pytest.mark.parametrize("bias", ["bias", "no bias", "cosine", "head", "no logits"])
def test_the_origin_of_the_residual(bias):
    """-pinv(W) b where logits = W pooled + b, 0 where they are not."""
    features, test = TRAIN, BOTH
    weight, b = features.classifier
    if bias == "no bias":
        features = features.replace(classifier=(weight, None), logits=features.logits - b)
    elif bias == "cosine":
        features = features.replace(logits=torch.nn.functional.normalize(features.pooled) @ weight.T)
    elif bias == "head":
        features = features.replace(classifier=(torch.randn(3, 20, dtype=torch.float64), b))
    elif bias == "no logits":
        features = features.replace(logits=None)
    with_origin = bias in ("bias", "no logits")
    expected = -np_residual(
        features.pooled.numpy(), weight.numpy(), b.numpy() if with_origin else None, test.pooled.numpy(), 4
    )
    assert_close(Residual(dim=4).fit(features).score(test), expected, 1e-8)


@pytest.mark.parametrize(("width", "principal"), [(1, 0), (2, 1), (7, 3), (767, 383), (768, 512), (2048, 1000)])
def test_the_principal_dimension(width, principal):
    from featnorm.detectors.subspace import principal_dimension

    assert principal_dimension(width) == principal


def test_the_default_principal_dimension_always_leaves_a_residual():
    for width in (1, 2, 3):
        g = torch.Generator().manual_seed(width)
        pooled = torch.randn(50, width, generator=g, dtype=torch.float64)
        features = Features(pooled=pooled, logits=pooled, classifier=(torch.eye(width, dtype=torch.float64), None))
        for detector in (Residual(), ViM()):
            assert detector.fit(features).score(features).unique().numel() > 10


@pytest.mark.parametrize("k", [1, 7, 150])
@pytest.mark.parametrize("squared", [True, False])
def test_knn_is_brute_force(k, squared):
    got = KNN(k, squared).fit(TRAIN).score(BOTH)
    assert_close(got, np_knn(TRAIN.pooled.numpy(), BOTH.pooled.numpy(), k, squared), 1e-5)


def test_knn_tells_features_far_from_the_origin_apart():
    g = torch.Generator().manual_seed(0)
    z, q = (torch.randn(400, 64, generator=g) + 100 for _ in range(2))
    got = KNN(3).fit(Features(pooled=z)).score(Features(pooled=q))
    assert_close(got.double(), np_knn(z.double().numpy(), q.double().numpy(), 3), 1e-3)


def test_knn_of_training_inputs_themselves_is_zero():
    assert KNN(1).fit(TRAIN).score(TRAIN).abs().max() < 1e-6


@pytest.mark.parametrize("percentile", [1, 50, 85, 90, 99, 99.9])
def test_the_clip_of_react_is_numpys_percentile(percentile):
    a = TRAIN.activation.numpy()
    detector = ReAct(parse_detector("NAN()"), percentile).fit(TRAIN)
    assert detector.clip == pytest.approx(np.percentile(a, percentile), rel=2**-11, abs=1e-4)


def test_react_of_a_model_without_a_hidden_layer_clips_the_pooled_feature():
    train, test = (f.replace(activation=None) for f in (TRAIN, BOTH))
    whole = fitted("ReAct(Energy(), percentile=80)", TRAIN).score(BOTH)
    assert_close(fitted("ReAct(Energy(), percentile=80)", train).score(test), whole, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gen_of_probabilities_that_round_to_zero_and_one(dtype):
    """p = e^-m and 1 - p = 2 e^-m: at gamma = 0.1 they still count."""
    margins = torch.tensor([1.0, 20.0, 100.0, 700.0, 3000.0])
    logits = torch.stack([margins, margins * 0, margins * 0], 1).to(dtype)
    expected = []
    for m in margins.double().tolist():
        rest = 2 * np.exp(np.longdouble(-m)) if m > 1 else np.longdouble(2 * np.exp(-m))
        top = 1 / (1 + rest)
        expected.append(-((top * rest * top) ** 0.1 + 2 * (rest / 2 * top * (1 - rest / 2 * top)) ** 0.1))
    assert_close(GEN().score(Features(logits=logits)), np.array(expected, float), 1e-6)
    assert (GEN().score(Features(logits=logits)).diff() > 0).all()


def test_gen_takes_the_largest_probabilities():
    logits = torch.randn(20, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    p = logits.softmax(1).sort(descending=True).values[:, :4]
    expected = -(p * (1 - p)).pow(0.3).sum(1)
    torch.testing.assert_close(GEN(gamma=0.3, top=4).score(Features(logits=logits)), expected)
    every = GEN(top=6).score(Features(logits=logits))
    assert torch.equal(GEN(top=100).score(Features(logits=logits)), every)


def test_kl_matching_skips_a_class_that_is_never_predicted():
    logits = torch.cat([TRAIN.logits, TRAIN.logits.new_full((len(TRAIN), 1), -40.0)], 1)
    detector = KLMatching().fit(Features(logits=logits))
    assert detector.softmax.groups.tolist() == [0, 1, 2]
    wide = torch.cat([BOTH.logits, BOTH.logits.new_full((len(BOTH), 1), -40.0)], 1)
    assert_close(detector.score(Features(logits=wide)), REFERENCES["KLMatching()"](), 1e-8)


def test_kl_matching_of_certain_logits_is_finite():
    train = Features(logits=torch.tensor([[9e3, 0, 0], [0, 9e3, 0]]))
    scores = KLMatching().fit(train).score(Features(logits=torch.tensor([[9e3, 0, 0], [0, 0, 9e3], [0, 0, 0]])))
    assert scores.isfinite().all()
    assert scores[0] == 0
    assert (scores[1:] < -100).all()
    with pytest.raises(ValueError, match="`logits` of width 3, got width 2"):
        KLMatching().fit(train).score(Features(logits=torch.ones(1, 2)))


def test_she_of_classes_without_a_correct_input():
    """Class 1 has no correctly classified input, class 2 no input at all."""
    h = torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 2.0], [0.0, 4.0], [9.0, 9.0]])
    logits = torch.nn.functional.one_hot(torch.tensor([0, 0, 0, 0, 2]), 4).float()
    train = Features(pooled=h, logits=logits, labels=torch.tensor([0, 0, 1, 1, 0]))
    test = Features(pooled=torch.ones(4, 2), logits=torch.eye(4))
    assert SHE().fit(train).score(test).tolist() == [2, 3, 0, 0]
    with pytest.raises(ValueError, match="row 3 has the label 4, and there are only 4 logits"):
        SHE().fit(train.replace(labels=torch.tensor([0, 0, 1, 4, 4])))


def test_nnguide_uses_energies_with_their_sign():
    train, test = (f.replace(logits=f.logits - 100) for f in (TRAIN, BOTH))
    parts = (f.numpy() for f in (train.pooled, train.logits, test.pooled, test.logits))
    assert_close(NNGuide(k=4).fit(train).score(test), np_nnguide(*parts, 4), 1e-5)


def test_the_bank_of_nnguide_is_a_share(monkeypatch):
    monkeypatch.setattr("featnorm.detectors.neighbors._MIN_GUIDES", 20)
    g = torch.Generator().manual_seed(0)
    train = Features(pooled=torch.rand(4000, 6, generator=g), logits=torch.rand(4000, 3, generator=g))
    sizes = {share: len(NNGuide(share=share).fit(train).bank.rows) for share in (0.001, 0.1, 0.5, 1)}
    assert sizes[0.001] == 20
    assert (350 < sizes[0.1] < 450, 1900 < sizes[0.5] < 2100, sizes[1]) == (True, True, 4000)
    with pytest.raises(ValueError, match="only 20 inputs in its bank"):
        NNGuide(k=21, share=0.001).fit(train).score(train)


def test_the_components_of_neco():
    g = torch.Generator().manual_seed(0)
    z = torch.randn(500, 4, generator=g, dtype=torch.float64)
    z = torch.linalg.qr(z - z.mean(0)).Q * torch.tensor([5.0, 3, 2, 1]) + 7
    axes = Features(pooled=torch.cat([torch.eye(4, dtype=torch.float64), torch.zeros(1, 4, dtype=torch.float64)]))
    # Variances 25, 9, 4 and 1 explain 64, 87, 97 and 100 %.
    for dim, kept in ((0.6, 1), (0.85, 2), (0.9, 3), (0.99, 4), (1, 1), (3, 3)):
        got = NECO(dim=dim).fit(Features(pooled=z)).score(axes)
        assert got.tolist() == pytest.approx([1.0] * kept + [0.0] * (5 - kept), abs=1e-6)
    with pytest.raises(ValueError, match="keeps every direction: the features have 4 dimensions, use dim < 4"):
        NECO(dim=4).fit(Features(pooled=z))
    with pytest.raises(ValueError, match="no variation among its 3 inputs"):
        NECO().fit(Features(pooled=z[[0, 0, 0]])).score(axes)


def test_hidden_confidence_counts_a_zero_weight_as_minus_one():
    features = Features(
        activation=torch.tensor([[1.0, 2.0, -4.0]]),
        classifier=(torch.tensor([[0.0, 5.0, -0.0], [-1.0, 0.0, 1e-30]]), None),
    )
    assert HiddenConfidence().score(features).tolist() == [5.0]  # max(-1 + 2 + 4, -1 - 2 - 4)


def test_one_class_and_two_classes():
    one = TRAIN.replace(labels=torch.zeros_like(TRAIN.labels))
    assert_close(
        fitted("Mahalanobis()", one).score(BOTH),
        np_mahalanobis(TRAIN.pooled.numpy(), np.zeros(len(TRAIN)), BOTH.pooled.numpy()),
        1e-8,
    )
    assert_close(fitted("SSD(clusters='labels')", one).score(BOTH), fitted("SSD()", TRAIN).score(BOTH), 1e-8)
    assert_close(fitted("SSD(clusters=1)", one).score(BOTH), fitted("SSD()", TRAIN).score(BOTH), 1e-12)


@pytest.mark.parametrize("expression", ["Mahalanobis()", "SSD(clusters='labels')"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8])
def test_labels_of_any_value_and_type(expression, dtype):
    names = {torch.int64: [2**62, 0, 10**12], torch.int32: [2**31 - 1, 5, 70_000]}.get(dtype, [99, 7, 120])
    odd = TRAIN.replace(labels=torch.tensor(names, dtype=dtype)[TRAIN.labels])
    assert_close(fitted(expression, odd).score(BOTH), fitted(expression, TRAIN).score(BOTH), 1e-8)


def test_two_dimensions_by_hand():
    z = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 2.0], [0.0, -2.0]], dtype=torch.float64)
    train = Features(pooled=z, labels=torch.zeros(4, dtype=torch.int64))
    # Variances 1/2 and 2 about the origin: (1, 1) is 1 / 0.5 + 1 / 2 away.
    got = Mahalanobis().fit(train).score(Features(pooled=torch.ones(1, 2, dtype=torch.float64)))
    assert got.item() == pytest.approx(-2.5)


def test_a_model_with_negative_activations():
    g = torch.Generator().manual_seed(0)
    a = torch.nn.functional.gelu(2 * torch.randn(50, 12, generator=g, dtype=torch.float64))
    features = of_activation(a)
    assert (a < 0).any()
    assert_close(parse_detector("NAN()").score(features), np_nan(a.numpy()), 1e-12)
