"""Features made up so that every detector must tell in- from out-of-distribution, and the detectors to try."""

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
    """All that a small model without a head says, given its last hidden layer (which is its pooled feature)."""
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


def id_features(n=150, seed=0, dtype=torch.float64):
    """Each class fires its own third of the units, hard; the others are off, and leak."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % CLASSES
    drive = torch.full((n, UNITS), -0.3)
    strength = 3 * (0.8 + 0.4 * torch.rand(n, 1, generator=g))
    for c, block in enumerate(torch.arange(UNITS).chunk(CLASSES)):
        of_class = (labels == c).nonzero()
        drive[of_class, block] = strength[of_class[:, 0]]
    a = torch.nn.functional.leaky_relu(drive + 0.1 * torch.randn(n, UNITS, generator=g), 0.1)
    return of_activation(a.to(dtype), labels)


def ood_features(n=60, seed=1, dtype=torch.float64):
    """Every unit fires a little, each by itself: no class, low norm, far from training and its subspace."""
    g = torch.Generator().manual_seed(seed)
    return of_activation(0.6 * torch.rand(n, UNITS, generator=g).to(dtype))


def fitted(expression, features=None):
    """The detector of an expression, fitted."""
    return parse_detector(expression).fit(id_features() if features is None else features)


def wide_as(features, width):
    """The same features with fewer units, classifier and logits to match."""
    weight, bias = features.classifier
    a = features.activation[:, :width]
    return features.replace(
        activation=a, pooled=a, logits=a @ weight[:, :width].T + bias, classifier=(weight[:, :width], bias)
    )


def state(detector):
    """What a detector has learned, copied."""
    return {name: value.clone() for name, value in detector.state_dict().items()}


def assert_same_state(before, after):
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(value, after[name]), name


def assert_close(got, expected, rtol=1e-5):
    """Equal to a relative tolerance; of the largest score, for those that happen to be near 0."""
    expected = torch.as_tensor(expected).to(got.dtype)
    atol = rtol * float(expected[expected.isfinite()].abs().max()) if expected.numel() else 0
    torch.testing.assert_close(got, expected, rtol=rtol, atol=atol)
