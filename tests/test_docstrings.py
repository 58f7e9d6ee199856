"""The examples in docstrings run: those of every public name, and of its methods."""

import doctest
import functools

import lightning.pytorch
import numpy as np
import pytest
import torch
import transformers

import featnorm as fn
from featnorm import openood, parts
from featnorm.detectors import base

FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
#: Examples that need data on disk, with what they need.
NOT_RUN = {"openood": "OpenOOD's data", "Scorer.watch": "a camera"}


@functools.cache
def examples():
    """Return the examples by the name of their object."""
    finder = doctest.DocTestFinder(exclude_empty=True)
    objects = {name: getattr(fn, name) for name in fn.__all__} | {"parts": parts, "openood": openood}
    objects |= {name: getattr(fn, name) for name in ("lightning", "torchmetrics", "transformers")}
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
        pool = [torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()]
        model = torch.nn.Sequential(
            torch.nn.Conv2d(3, 16, 3), torch.nn.ReLU(), *pool, torch.nn.Linear(16, 3)
        ).eval()
        batches = [torch.randn(64, 3, 8, 8) for _ in range(5)]
        loader = [(batch, model(batch).detach().argmax(1)) for batch in batches]
        data = {
            "model": model,
            "train_loader": loader,
            "held_out_loader": loader,
            "images": torch.randn(8, 3, 8, 8),
        }
        packages = {"fn": fn, "np": np, "torch": torch, "lightning": lightning, "transformers": transformers}
        yield {**{name: getattr(fn, name) for name in fn.__all__}, **packages, **data}


def test_every_public_name_has_an_example():
    found = {name.partition(".")[0] for name in examples()}
    assert set(fn.__all__) - found == {"ArchiveError", "NotFittedError"}


@pytest.mark.parametrize("name", examples())
def test_an_example_runs(name, names, monkeypatch, tmp_path):
    if name in NOT_RUN:
        pytest.skip(f"needs {NOT_RUN[name]}")
    monkeypatch.chdir(tmp_path)
    test, printed = examples()[name], []
    test.globs = {**test.globs, **names}
    runner = doctest.DocTestRunner(optionflags=FLAGS)
    assert runner.run(test, out=printed.append).failed == 0, "".join(printed)
