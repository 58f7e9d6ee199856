"""Every detector against its formula, written out in float64 numpy and not the way the source does it."""

import math

import numpy as np
import pytest
import torch

from fabricate import EVERY, assert_close, fitted, id_features, of_activation, ood_features
from featnorm.detectors import KNN, SSD, HiddenConfidence, Mahalanobis, ReAct, Residual, ViM, parse_detector
from featnorm.features import Features

TRAIN, TEST, OOD = id_features(), id_features(40, seed=5), ood_features(40)
BOTH = Features.cat([TEST.replace(labels=None), OOD])


def np_unit(z):
    return z / (np.sqrt((z**2).sum(1, keepdims=True)) + 1e-10)


def quadratic(rows, mean, precision):
    return np.array([(r - mean) @ precision @ (r - mean) for r in rows])


def np_mahalanobis(z, y, q):
    cov, means = np.zeros((z.shape[1], z.shape[1])), []
    for c in np.unique(y):
        own = z[y == c]
        means.append(own.mean(0))
        for row in own:
            cov += np.outer(row - means[-1], row - means[-1])
    precision = np.linalg.pinv(cov / len(z), hermitian=True)
    return -np.min([quadratic(q, m, precision) for m in means], axis=0)


def np_ssd(z, q, groups=None):
    z, q = np_unit(z), np_unit(q)
    mean, std = z.mean(0), z.std(0)
    std = np.where(std > 1e-12, std, 1)
    z, q = (z - mean) / std, (q - mean) / std
    groups = np.zeros(len(z)) if groups is None else groups
    distances = []
    for g in np.unique(groups):
        own = z[groups == g]
        cov = np.atleast_2d(np.cov(own.T, bias=True))
        distances.append(quadratic(q, own.mean(0), np.linalg.pinv(cov, hermitian=True)))
    return -np.min(distances, axis=0)


def np_residual(z, weight, bias, q, dim):
    u = -np.linalg.pinv(weight) @ bias if bias is not None else np.zeros(z.shape[1])
    principal = np.linalg.svd(z - u, full_matrices=True)[2][:dim]
    return np.linalg.norm((q - u) - (q - u) @ principal.T @ principal, axis=1)


def np_knn(z, q, k, squared=True):
    z, q = np_unit(z), np_unit(q)
    d = np.array([np.sort(((z - row) ** 2).sum(1))[k - 1] for row in q])
    return -(d if squared else np.sqrt(d))


def np_svm(z, q, nu):
    """The dual, times nu n (Schölkopf et al., eq. 13): the least a'Ka / 2 with 0 <= a_i <= 1 and sum a = nu n.

    Solved by exchanging weight between the two inputs that gain most by it, until none does.
    """
    gamma = 1 / (z.shape[1] * z.var())

    def kernel(a, b):
        return np.exp(-gamma * ((a[:, None] - b[None]) ** 2).sum(2))

    gram = kernel(z, z)
    a = np.full(len(z), nu)
    while True:
        slope = gram @ a
        low = np.where(a < 1, slope, np.inf).argmin()  # gains by more weight
        high = np.where(a > 0, slope, -np.inf).argmax()
        if slope[high] - slope[low] < 1e-11:
            break
        step = (slope[high] - slope[low]) / (gram[low, low] + gram[high, high] - 2 * gram[low, high])
        step = min(step, 1 - a[low], a[high])
        a[low] += step
        a[high] -= step
    inner = (a > 0) & (a < 1)  # on the boundary, where the score is 0
    return kernel(q, z) @ a - (gram @ a)[inner].mean()


def np_lse(logits):
    return np.array([math.log(sum(math.exp(v - max(row)) for v in row)) + max(row) for row in logits])


def np_nan(a):
    return np.abs(a).sum(1) / np.maximum((a > 0).sum(1), 1)


def parts(features):
    weight, bias = features.classifier
    a = features.activation.numpy()
    return a, features.logits.numpy(), weight.numpy(), bias.numpy()


def reference(expression):
    z, logits, weight, bias = parts(TRAIN)
    q, q_logits, _, _ = parts(BOTH)
    y = TRAIN.labels.numpy()
    ones = np.where(weight > 0, 1, -1)
    p90, p80, p70, p95 = (np.percentile(z, p) for p in (90, 80, 70, 95))

    def vim(dim, clip=np.inf):
        x = np.minimum(q, clip)
        alpha = logits.max(1).mean() / np_residual(z, weight, bias, z, dim).mean()
        return np_lse(x @ weight.T + bias) - alpha * np_residual(z, weight, bias, x, dim)

    table = {
        "NAN()": lambda: np_nan(q),
        "L1Norm()": lambda: np.abs(q).sum(1),
        "LpNorm()": lambda: np.sqrt((q**2).sum(1)),
        "LpNorm(p=0.5)": lambda: np.sqrt(np.abs(q)).sum(1) ** 2,
        "LpNorm(p=inf)": lambda: np.abs(q).max(1),
        "Sparsity()": lambda: 1 / np.maximum((q > 0).sum(1), 1),
        "EmbeddingMagnitude()": lambda: np.linalg.norm(BOTH.embedding.numpy(), axis=1),
        "HiddenConfidence()": lambda: np.array([max(sum(s * x) for s in ones) for x in q]),
        "MSP()": lambda: np.array([np.exp(r - r.max()).max() / np.exp(r - r.max()).sum() for r in q_logits]),
        "MaxLogit()": lambda: q_logits.max(1),
        "Energy()": lambda: np_lse(q_logits),
        "KLUniform()": lambda: np.array(
            [
                sum(1 / 3 * (math.log(1 / 3) - (v - lse)) for v in r)
                for r, lse in zip(q_logits, np_lse(q_logits), strict=True)
            ]
        ),
        "Mahalanobis()": lambda: np_mahalanobis(z, y, q),
        "SSD()": lambda: np_ssd(z, q),
        "SSD(clusters=3)": lambda: np_ssd(z, q, y),  # the classes are far apart: k-means finds them
        "SSD(clusters='labels')": lambda: np_ssd(z, q, y),
        "KNN(k=5)": lambda: np_knn(z, q, 5),
        "KNN(k=2, squared=False)": lambda: np_knn(z, q, 2, squared=False),
        "OneClassSVM()": lambda: np_svm(z, q, 0.1),
        "OneClassSVM(nu=0.5)": lambda: np_svm(z, q, 0.5),
        "Residual()": lambda: -np_residual(z, weight, bias, q, 6),
        "Residual(dim=4)": lambda: -np_residual(z, weight, bias, q, 4),
        "ViM()": lambda: vim(6),
        "ViM(dim=5)": lambda: vim(5),
        "ReAct(NAN())": lambda: np_nan(np.minimum(q, p90)),
        "ReAct(HiddenConfidence())": lambda: (np.minimum(q, p90) @ ones.T).max(1),
        "ReAct(Energy(), percentile=80)": lambda: np_lse(np.minimum(q, p80) @ weight.T + bias),
        "ReAct(KNN(k=3), percentile=70)": lambda: np_knn(z, np.minimum(q, p70), 3),
        "ReAct(ViM(dim=4))": lambda: vim(4, p90),
        "ReAct(KNN(k=3) / NAN())": lambda: np_knn(z, np.minimum(q, p90), 3) / np_nan(np.minimum(q, p90)),
        "KNN(k=5) / NAN()": lambda: np_knn(z, q, 5) / np_nan(q),
        "SSD() / L1Norm()": lambda: np_ssd(z, q) / np.abs(q).sum(1),
        "Residual() / EmbeddingMagnitude()": lambda: (
            -np_residual(z, weight, bias, q, 6) / np.linalg.norm(BOTH.embedding.numpy(), axis=1)
        ),
        "ReAct(SSD()) / Sparsity()": lambda: np_ssd(z, np.minimum(q, p90)) * np.maximum((q > 0).sum(1), 1),
        "Mahalanobis() / ReAct(NAN(), percentile=95)": lambda: (
            np_mahalanobis(z, y, q) / np_nan(np.minimum(q, p95))
        ),
    }
    return table[expression]()


@pytest.mark.parametrize("expression", EVERY)
def test_formula(expression):
    got = fitted(expression, TRAIN).score(BOTH)
    assert got.dtype == torch.float64
    # The clip of ReAct is known to one part in 2^11; the neighbors, and the samples for k-means and the support
    # vector machine, are float32.
    rtol = 5e-3 if "ReAct" in expression else 1e-8
    if any(kind in expression for kind in ("KNN", "clusters=3", "OneClassSVM")) and "ReAct" not in expression:
        rtol = 1e-4
    assert_close(got, reference(expression), rtol)


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
