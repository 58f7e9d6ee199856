import pytest

import featnorm as fn
from featnorm import fitting
from featnorm.inputs import open_source
from featnorm.models import create_model
from featnorm.serve.scorers import ServedScorer


@pytest.fixture(scope="module")
def loaded(narrow):
    """A quick network: what it has learned does not matter to the service."""
    return create_model("featnorm:cifar10-resnet18")


@pytest.fixture(scope="module")
def fitted(folder, loaded, cache):
    source, runtime = open_source(str(folder)), fn.Runtime(progress=False, workers=0)
    return fitting.fit_source(source, loaded, detector=fn.NAN(), cache=cache, runtime=runtime)[0]


@pytest.fixture(autouse=True)
def warm_up_explanations(monkeypatch):
    """Let services start without an explanation, which takes longer than most tests; returns what makes it."""
    warm_up = ServedScorer.warm_up_explanations
    monkeypatch.setattr(ServedScorer, "warm_up_explanations", lambda self: None)
    return warm_up
