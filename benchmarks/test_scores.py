"""FDBD, NCI and ORA compared with the product of the features and the classifier: 3 times its time, and 100 MB."""

import pytest
import torch

import featnorm as fn
from measuring import peak_memory

MAX_RATIO = 3
MAX_BYTES = 100 * 10**6
DETECTORS = [fn.FDBD, fn.NCI, fn.ORA]


def features(n, d, classes):
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(classes, d, generator=random) / d**0.5
    h = torch.randn(n, d, generator=random).relu_()
    return fn.Features(pooled=h, logits=h @ weight.T, classifier=(weight, None))


@pytest.fixture(scope="module")
def shape(size):
    return size(256, 64), size(2048, 256), size(1000, 100)


@pytest.mark.parametrize("kind", DETECTORS)
def test_score(compare, shape, kind):
    inputs = features(*shape)
    detector, weight = kind().fit(inputs), inputs.classifier[0]
    compare.time(
        f"{kind.__name__}, the score",
        lambda: detector.score(inputs),
        {"the product h W'": (lambda: inputs.pooled @ weight.T, MAX_RATIO)},
        rounds=15,
        sizes=f"{shape[0]} inputs, d = {shape[1]}, {shape[2]} classes",
    )


def ask(kind, shape):
    inputs = features(*shape)
    detector = kind().fit(inputs)
    detector.score(inputs[:2])
    yield
    detector.score(inputs)
    yield


@pytest.mark.parametrize("kind", DETECTORS)
def test_memory(compare, shape, kind):
    compare.memory(
        f"{kind.__name__}, the score",
        lambda: peak_memory(ask, kind, shape),
        {"100 MB": (lambda: MAX_BYTES, 1)},
        sizes=f"{shape[0]} inputs, d = {shape[1]}, {shape[2]} classes",
    )
