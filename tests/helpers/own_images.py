import copy
import dataclasses
import functools

import numpy as np
import pytest
import torch
from torch import nn

import featnorm as fn
from featnorm import fitting
from featnorm.inputs import open_source
from featnorm.models import create_model
from featnorm.training.runs import digest
from painted import paint


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """240 pictures of four classes; one is corrupt, and one is there twice."""
    folder = tmp_path_factory.mktemp("own")
    random = np.random.default_rng(0)
    for i in range(240):
        paint(folder / "abcd"[i % 4] / f"{i:03}.png", i % 4, random)
    (folder / "a" / "000.png").write_bytes(b"broken")
    (folder / "b" / "copy.png").write_bytes((folder / "b" / "001.png").read_bytes())
    return folder


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def loaded():
    return create_model("featnorm:cifar10-resnet18")


@pytest.fixture(scope="session")
def fitted(folder, loaded, cache):
    source = open_source(str(folder))
    runtime = fn.Runtime(progress=False, workers=0)
    return fitting.fit_source(source, loaded, detector=fn.NAN(), cache=cache, runtime=runtime)[0]


@pytest.fixture
def scorer(fitted):
    """A scorer of a test's own, to be changed."""
    return copy.deepcopy(fitted)


def make_tiny():
    """Return a small backbone and its transform, as `MODULE:FUNCTION` does."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        convolutions = nn.Conv2d(3, 16, 3, stride=2), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2)
        norm = nn.BatchNorm2d(32), nn.ReLU()
        backbone = nn.Sequential(*convolutions, *norm, nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    return backbone, create_model("featnorm:cifar10-resnet18").transform


@pytest.fixture(scope="session")
def tiny(loaded):
    """`make_tiny`, loaded: for tests in which the head and the detector are what matters."""
    return dataclasses.replace(loaded, name="own_images:make_tiny", model=make_tiny()[0])


@pytest.fixture(scope="module")
def heads():
    return {}


@pytest.fixture
def heads_trained_once(heads, monkeypatch):
    """Train a head once per file: the same features and targets give the same one, as a test of its own says."""
    fit_head = fitting.fit_head

    def once(values, targets, **options):
        key = digest(values, targets), options["seed"]
        if key not in heads:
            heads[key] = fit_head(values, targets, **options)
        return copy.deepcopy(heads[key])

    monkeypatch.setattr(fitting, "fit_head", once)


@pytest.fixture
def few_steps(monkeypatch):
    """Train heads for few steps, where it does not matter how much they learn."""
    monkeypatch.setattr(fitting, "_MIN_STEPS", 10)


@pytest.fixture(scope="module")
def few_steps_throughout():
    """As `few_steps`, in a whole file of tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fitting, "_MIN_STEPS", 10)
        yield


@pytest.fixture(scope="session")
def operators_read_once():
    """Keep torch's tables of operators, which each export makes again from the sources or names of all of them."""
    from torch._export import utils
    from torch.onnx._internal.exporter import _registration

    registry = _registration.ONNXRegistry
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "from_torchlib", staticmethod(functools.cache(registry.from_torchlib)))
        patch.setattr(utils, "_materialize_cpp_cia_ops", functools.cache(utils._materialize_cpp_cia_ops))
        yield
