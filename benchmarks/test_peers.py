"""Fit and score of each detector that pytorch-ood or oodeel has too, on the same features: never slower or larger.

All are called with features, so that no model or loader is included. The target allows 5 %, by which two runs of
the same work may differ.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import featnorm as fn
from measuring import peak_memory

LEVEL = 1.05
K = 50


@dataclass(frozen=True)
class Peer:
    """Functions that create, fit and score a detector of another library."""

    make: Callable[[fn.Features], Any]
    fit: Callable[[Any, fn.Features], object] | None
    score: Callable[[Any, fn.Features], object]


OURS = {
    "MSP": fn.MSP,
    "MaxLogit": fn.MaxLogit,
    "Energy": fn.Energy,
    "ReAct": lambda: fn.ReAct(fn.Energy()),
    "Mahalanobis": fn.Mahalanobis,
    "KNN": lambda: fn.KNN(K),
    "ViM": fn.ViM,
}
BOTH = [("pytorch-ood", name) for name in OURS] + [("oodeel", name) for name in OURS if name != "ReAct"]


def principal(features):
    """Return the principal dimension that ViM chooses, so that the others use it too."""
    width = features.pooled.shape[1]
    return 1000 if width >= 2048 else width // 2


def pytorch_ood():
    from pytorch_ood import detector

    def of_logits(kind):
        return Peer(lambda _: kind(None), None, lambda peer, f: peer.predict_logits(f.logits))

    def of_pooled(make):
        return Peer(
            make,
            lambda peer, f: peer.fit_features(f.pooled, f.labels),
            lambda peer, f: peer.predict_features(f.pooled),
        )

    return {
        "MSP": of_logits(detector.MaxSoftmax),
        "MaxLogit": of_logits(detector.MaxLogit),
        "Energy": of_logits(detector.EnergyBased),
        "ReAct": Peer(
            lambda f: detector.ReAct(
                torch.nn.Identity(), lambda z: torch.nn.functional.linear(z, *f.classifier), percentile=0.9
            ),
            lambda peer, f: peer.fit_feature_maps(f.activation, f.labels),
            lambda peer, f: peer.predict_feature_maps(f.activation),
        ),
        "Mahalanobis": of_pooled(lambda _: detector.Mahalanobis(None)),
        "KNN": of_pooled(lambda _: detector.KNN(None, k=K)),
        "ViM": of_pooled(lambda f: detector.ViM(None, principal(f), *f.classifier)),
    }


def oodeel():
    from oodeel import methods
    from oodeel.utils.torch_operator import TorchOperator

    def ready(peer, **attributes):
        # Attributes that its own fit sets from the model.
        for name, value in {"op": TorchOperator(), "backend": "torch", **attributes}.items():
            setattr(peer, name, value)
        return peer

    def of_logits(make):
        return Peer(
            # Stands in for its model, and returns these logits.
            lambda _: ready(
                make(), feature_extractor=SimpleNamespace(predict_tensor=lambda logits: (None, logits))
            ),
            None,
            lambda peer, f: peer._score_tensor(f.logits),
        )

    def of_pooled(make):
        return Peer(
            lambda f: ready(make(f)),
            lambda peer, f: peer._fit_layer(
                0, f.pooled.numpy(), {"labels": f.labels.numpy(), "logits": f.logits.numpy()}
            ),
            lambda peer, f: peer._score_layer(0, f.pooled, {"logits": f.logits}),
        )

    return {
        "MSP": of_logits(lambda: methods.MLS(output_activation="softmax")),
        "MaxLogit": of_logits(methods.MLS),
        "Energy": of_logits(methods.Energy),
        "Mahalanobis": of_pooled(lambda _: methods.Mahalanobis()),
        "KNN": of_pooled(lambda _: methods.DKNN(nearest=K)),
        "ViM": of_pooled(lambda f: methods.VIM(princ_dims=principal(f))),
    }


LIBRARIES = {"pytorch-ood": pytorch_ood, "oodeel": oodeel}


def theirs(library, name):
    module, way = {
        "pytorch-ood": ("pytorch_ood", "pip install '.[bench]'"),
        "oodeel": ("oodeel", "pip install --no-deps oodeel==0.4.0, as it asks for an older numpy than featnorm"),
    }[library]
    pytest.importorskip(module, reason=f"needs {library}: {way}")
    return LIBRARIES[library]()[name]


def fitted(peer, features):
    made = peer.make(features)
    if peer.fit is not None:
        peer.fit(made, features)
    return made


def ours_fitted(name, features):
    detector = OURS[name]().fit(features)
    # Work that a fit defers to the first score belongs to the fit.
    detector.score(features[:1])
    return detector


def made_features(n, d, classes, seed=0):
    random = torch.Generator().manual_seed(seed)
    weight = torch.randn(classes, d, generator=random) / d**0.5
    bias = torch.randn(classes, generator=random)
    a = (torch.randn(n, d, generator=random) * torch.linspace(0.1, 3, d)).relu_()
    logits = torch.addmm(bias, a, weight.T)
    return fn.Features(
        activation=a, pooled=a, logits=logits, labels=torch.arange(n) % classes, classifier=(weight, bias)
    )


@pytest.fixture(scope="module")
def shape(size):
    """Return the numbers of inputs to fit on and to score, their width, and the number of classes."""
    return size((50_000, 1_000, 2048, 100), (2_000, 100, 128, 10))


@pytest.fixture(scope="module")
def train_features(shape):
    n, _, d, classes = shape
    return made_features(n, d, classes)


def described(shape):
    n, asked, d, classes = shape
    return f"n = {n:,}, {asked:,} scored, d = {d}, {classes} classes"


@pytest.mark.parametrize(
    ("library", "name"), [(library, name) for library, name in BOTH if OURS[name]().needs_fit]
)
def test_fit(compare, shape, train_features, library, name):
    peer = theirs(library, name)
    compare.time(
        f"{name}, fit",
        lambda: ours_fitted(name, train_features),
        {library: (lambda: fitted(peer, train_features), LEVEL)},
        rounds=3,
        sizes=described(shape),
    )


@pytest.mark.parametrize(("library", "name"), BOTH)
def test_score(compare, shape, train_features, library, name):
    peer = theirs(library, name)
    inputs = made_features(shape[1], *shape[2:], seed=1)
    detector, other = ours_fitted(name, train_features), fitted(peer, train_features)
    compare.time(
        f"{name}, score",
        lambda: detector.score(inputs),
        {library: (lambda: peer.score(other, inputs), LEVEL)},
        rounds=9,
        sizes=described(shape),
    )


def fit_and_score(library, name, shape):
    n, asked, d, classes = shape
    train, inputs = made_features(n, d, classes), made_features(asked, d, classes, seed=1)
    few = made_features(20 * K, 64, 2)

    def work(train, inputs):
        if library is None:
            ours_fitted(name, train).score(inputs)
        else:
            peer = LIBRARIES[library]()[name]
            peer.score(fitted(peer, train), inputs)

    work(few, few[:10])  # imports libraries, which are not counted
    yield
    work(train, inputs)
    yield


@pytest.mark.parametrize(("library", "name"), BOTH)
def test_memory(compare, shape, library, name):
    theirs(library, name)
    compare.memory(
        f"{name}, fit and score",
        lambda: peak_memory(fit_and_score, None, name, shape),
        {library: (lambda: peak_memory(fit_and_score, library, name, shape), LEVEL)},
        sizes=described(shape),
    )
