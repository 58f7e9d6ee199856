"""Streamed fits up to the first score, compared with the product X'X: at most 1.25 times the time, few d x d."""

import pytest
import torch

import featnorm as fn
from measuring import peak_memory

DETECTORS = {"Mahalanobis": fn.Mahalanobis, "SSD": fn.SSD, "Residual": fn.Residual, "ViM": fn.ViM}
BATCH = 4096
CLASSES = 1000
# Number of distinct batches, which the stream repeats.
DISTINCT = 16
GRAMS = 3
# A quarter of the million rows for which the target is meant. Each batch costs the same, so what is done once, up
# to the first score, weighs four times as much here.
BATCHES = 61


def batches(d, count):
    """Return features that, like those of a network, do not fill their space evenly."""
    random = torch.Generator().manual_seed(0)
    scale = torch.linspace(0.1, 3, d)
    weight = torch.randn(CLASSES, d, generator=random) / d**0.5
    bias = torch.randn(CLASSES, generator=random)
    made = []
    for _ in range(count):
        pooled = (torch.randn(BATCH, d, generator=random) * scale).relu_()
        logits = torch.addmm(bias, pooled, weight.T)
        labels = torch.randint(CLASSES, (BATCH,), generator=random)
        made.append(fn.Features(pooled=pooled, logits=logits, labels=labels, classifier=(weight, bias)))
    return made


def fit(name, stream, times):
    detector = DETECTORS[name]()
    for i in range(times):
        detector.partial_fit(stream[i % len(stream)])
    detector.score(stream[0][:1])


@pytest.fixture(scope="module")
def stream(size):
    return batches(size(2048, 256), size(DISTINCT, 2))


@pytest.fixture(scope="module")
def doubles(stream):
    return [features.pooled.double() for features in stream]


@pytest.mark.parametrize("name", DETECTORS)
def test_time(compare, size, stream, doubles, name):
    d, times = stream[0].pooled.shape[1], size(BATCHES, 4)

    def product(of):
        gram = of[0].new_zeros(d, d)
        for i in range(times):
            gram.addmm_(of[i % len(of)].T, of[i % len(of)])

    compare.time(
        f"fit of {name}",
        lambda: fit(name, stream, times),
        {
            "X'X in float64, as the fit takes it": (lambda: product(doubles), 1.25),
            "X'X in float32": (lambda: product([features.pooled for features in stream]), None),
        },
        rounds=3,
        sizes=f"n = {times * BATCH:,}, d = {d}, {CLASSES} classes, in batches of {BATCH}",
        warm=False,
    )


def streamed(name, d, times, scored):
    stream = batches(d, 1)
    fit(name, batches(64, 1), 1)  # loads the libraries, which are not counted
    yield
    detector = DETECTORS[name]()
    for _ in range(times):
        detector.partial_fit(stream[0])
    if scored:
        detector.score(stream[0][:1])
    yield


@pytest.mark.parametrize("name", DETECTORS)
@pytest.mark.parametrize("times", [4, 8, 16])
@pytest.mark.parametrize("scored", [False, True], ids=["fit", "fit and first score"])
def test_memory(compare, size, name, times, scored):
    """The first score computes eigenvectors, for which LAPACK allocates matrices; it has no target."""
    d = size(2048, 256)
    compare.memory(
        f"fit{' and first score' if scored else ''} of {name}, n = {times * BATCH:,}",
        lambda: peak_memory(streamed, name, d, times, scored),
        {f"{GRAMS} d² float64 and a batch": (lambda: GRAMS * 8 * d * d + 4 * BATCH * d, None if scored else 1)},
        sizes=f"d = {d}, {CLASSES} classes, in batches of {BATCH}",
    )
