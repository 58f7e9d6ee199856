import pytest

from featnorm.serve.scorers import ServedScorer


@pytest.fixture(autouse=True)
def warm_up_explanations(monkeypatch):
    """Let services start without an explanation, which takes longer than most tests; returns what makes it."""
    warm_up = ServedScorer.warm_up_explanations
    monkeypatch.setattr(ServedScorer, "warm_up_explanations", lambda self: None)
    return warm_up
