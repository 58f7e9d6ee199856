"""The Mahalanobis score of 1000 classes: 300 times as fast as pytorch-ood, at most twice its two products."""

import pytest
import torch

import featnorm as fn


def test_score(compare, size):
    peers = pytest.importorskip("pytorch_ood.detector", reason="needs pytorch-ood: pip install '.[bench]'")
    d, classes, fit, asked = size(2048, 256), size(1000, 100), size(20_000, 2_000), size(256, 64)
    random = torch.Generator().manual_seed(0)
    pooled = torch.randn(fit, d, generator=random) * torch.linspace(0.1, 3, d)
    labels = torch.arange(fit) % classes
    inputs = torch.randn(asked, d, generator=random)
    ours = fn.Mahalanobis().fit(fn.Features(pooled=pooled, labels=labels))
    theirs = peers.Mahalanobis(None).fit_features(pooled, labels)
    features = fn.Features(pooled=inputs)
    double, factor = inputs.double(), torch.randn(d, d, dtype=torch.float64)
    centers = torch.randn(classes, d, dtype=torch.float64)
    compare.time(
        "Mahalanobis, the score",
        lambda: ours.score(features),
        {
            "pytorch-ood": (lambda: theirs.predict_features(inputs), 1 / 300),
            "the two products, in float64": (lambda: (double @ factor) @ centers.T, 2),
        },
        rounds=5,
        sizes=f"{asked} inputs, d = {d}, {classes} classes",
    )
