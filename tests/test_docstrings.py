"""The examples in docstrings run: those of every public name, and of its methods."""

import doctest

import pytest
import torch

import featnorm as fn
from featnorm import openood, parts
from featnorm.detectors import base

FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
#: Examples that need data on disk, with what they need.
NOT_RUN = {"fit": "a folder of images", "compare": "loaders of data sets", "openood": "OpenOOD's data"}


def examples():
    """Return the examples by the name of their object."""
    finder = doctest.DocTestFinder(exclude_empty=True)
    objects = {name: getattr(fn, name) for name in fn.__all__} | {"parts": parts, "openood": openood}
    found = {}
    for name, thing in objects.items():
        found.update((test.name, test) for test in finder.find(thing, name) if test.examples)
    return found


@pytest.fixture
def names(monkeypatch):
    """What examples find defined: featnorm, torch, a model and its inputs."""
    monkeypatch.setattr(base, "_REGISTRY", dict(base._REGISTRY))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3))
        loader = [torch.randn(64, 4) for _ in range(5)]
        data = {"model": model, "train_loader": loader, "held_out_loader": loader, "images": torch.randn(8, 4)}
        yield {**{name: getattr(fn, name) for name in fn.__all__}, "fn": fn, "torch": torch, **data}


@pytest.mark.parametrize("name", examples())
def test_an_example_runs(name, names):
    if name.partition(".")[0] in NOT_RUN:
        pytest.skip(f"needs {NOT_RUN[name.partition('.')[0]]}")
    test, printed = examples()[name], []
    test.globs = {**test.globs, **names}
    runner = doctest.DocTestRunner(optionflags=FLAGS)
    assert runner.run(test, out=printed.append).failed == 0, "".join(printed)
