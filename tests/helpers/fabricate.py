"""Synthetic features on which every detector must separate ID from OOD inputs."""

import functools

import torch

from featnorm.detectors import parse_detector
from featnorm.features import Features

UNITS, CLASSES = 12, 3


def _classifier(dtype=torch.float32):
    g = torch.Generator().manual_seed(99)
    weight = torch.full((CLASSES, UNITS), -0.25) + 0.05 * torch.randn(CLASSES, UNITS, generator=g)
    for c, block in enumerate(torch.arange(UNITS).chunk(CLASSES)):
        weight[c, block] += 0.75
    return weight.to(dtype), torch.tensor([0.3, -0.2, 0.1], dtype=dtype)


def of_activation(a, labels=None, pooled=None):
    """All features of a small model without a head, given its last hidden layer (which is its pooled feature)."""
    weight, bias = _classifier(a.dtype)
    g = torch.Generator().manual_seed(7)
    projection = torch.randn(UNITS, 5, generator=g).to(a.dtype)
    return Features(
        activation=a,
        pooled=a if pooled is None else pooled,
        embedding=a @ projection,
        logits=a @ weight.T + bias,
        labels=labels,
        classifier=(weight, bias),
    )


@functools.cache
def id_features(n=150, seed=0, dtype=torch.float64):
    """Each class strongly activates its own third of the units; the others are inactive, and leak."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % CLASSES
    drive = torch.full((n, UNITS), -0.3)
    strength = 3 * (0.8 + 0.4 * torch.rand(n, 1, generator=g))
    for c, block in enumerate(torch.arange(UNITS).chunk(CLASSES)):
        of_class = (labels == c).nonzero()
        drive[of_class, block] = strength[of_class[:, 0]]
    a = torch.nn.functional.leaky_relu(drive + 0.1 * torch.randn(n, UNITS, generator=g), 0.1)
    return of_activation(a.to(dtype), labels)


@functools.cache
def held_out_features():
    """ID inputs for the second phase of a fit."""
    return id_features(60, seed=8)


@functools.cache
def ood_features(n=60, seed=1, dtype=torch.float64):
    """Every unit is weakly active, independently: no class, a low norm, far from training and its subspace."""
    g = torch.Generator().manual_seed(seed)
    return of_activation(0.6 * torch.rand(n, UNITS, generator=g).to(dtype))


def fitted(expression, features=None, held_out=None):
    """Return the fitted detector of an expression; without features, held-out inputs are further ones."""
    if features is None:
        features, held_out = id_features(), held_out_features()
    return parse_detector(expression).fit(features, held_out)


def wide_as(features, width):
    """Return the features with fewer units, and classifier and logits to match."""
    weight, bias = features.classifier
    a = features.activation[:, :width]
    return features.replace(
        activation=a, pooled=a, logits=a @ weight[:, :width].T + bias, classifier=(weight[:, :width], bias)
    )


def state(detector):
    """Return a copy of the fitted state of a detector."""
    return {name: value.clone() for name, value in detector.state_dict().items()}


def assert_same_state(before, after):
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(value, after[name]), name


def assert_close(got, expected, rtol=1e-5):
    """Assert equality to a relative tolerance; for scores near 0, relative to the largest score."""
    expected = torch.as_tensor(expected).to(got.dtype)
    atol = rtol * float(expected[expected.isfinite()].abs().max()) if expected.numel() else 0
    torch.testing.assert_close(got, expected, rtol=rtol, atol=atol)
