"""Explanations of a network with hand-written weights."""

import pytest
import torch
from torch import nn

import featnorm as fn


def network():
    """Return a network with two classes of four units each, and one unused unit."""
    model = nn.Sequential(nn.Linear(9, 9, bias=False), nn.ReLU(), nn.Linear(9, 2, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(9))
        model[2].weight.copy_(torch.tensor([[1.0] * 4 + [-1.0] * 4 + [0.0], [-1.0] * 4 + [1.0] * 4 + [0.0]]))
    return model.eval()


def known(n=40):
    generator = torch.Generator().manual_seed(0)
    x = torch.zeros(n, 9)
    x[: n // 2, :4] = 1 + torch.rand(n // 2, 4, generator=generator)
    x[n // 2 :, 4:8] = 1 + torch.rand(n // 2, 4, generator=generator)
    return x


def test_an_input_like_the_others_has_no_inactive_or_unexpected_units():
    explainer = fn.Explainer(network()).fit(known().split(7), progress=False)
    (one,) = explainer(torch.tensor([[3.0, 1, 1, 1, 0, 0, 0, 0, 0]]))
    assert (one.predicted, one.hidden_prediction) == (0, 0)
    assert one.hidden_confidence == one.norm == 6
    assert one.active == 4
    assert one.nan == 1.5
    assert one.top_units[0] == 0
    assert len(one.inactive_units) == len(one.unexpected_units) == 0


def test_inactive_and_unexpected_units_are_named():
    explainer = fn.Explainer(network()).fit(known().split(7), progress=False)
    inputs = torch.tensor([[0.0, 2, 0, 2, 0, 1, 0, 0, 5], [0, 0, 0, 0, 1, 1, 1, 1, 0]])
    one, other = explainer(inputs)
    assert one.predicted == 0
    assert one.inactive_units.tolist() == [0, 2]
    assert one.unexpected_units.tolist() == [8, 5]
    assert one.hidden_confidence == 2 + 2 - 1 - 5  # sign(0) = -1 for the unit that nothing reads
    rows = dict(one.rows())
    assert rows["usually on for class 0, off here"] == "2 of 4: 0, 2"
    assert rows["usually off for class 0, on here"] == "2 of 5: 8, 5"
    assert rows["largest units"] == "8, 1, 3, 5 (100% of the norm)"
    assert all(how in str(one) for how in rows.values())
    assert other.predicted == 1
    assert len(other.inactive_units) == 0
    assert one.svg().count("<svg") == 1


def test_class_names_are_used():
    explainer = fn.Explainer(network(), class_names=["cat", "dog"]).fit(known().split(7), progress=False)
    (one,) = explainer(known()[-1:])
    assert (one.predicted_name, one.hidden_predicted_name) == ("dog", "dog")
    assert dict(one.rows())["the network predicts"] == "dog"


def test_errors_name_what_is_missing():
    explainer = fn.Explainer(network())
    with pytest.raises(ValueError, match="not fitted: call fit with a loader"):
        explainer(known()[:1])
    misnamed = fn.Explainer(network(), class_names=["cat"]).fit([known()], progress=False)
    with pytest.raises(ValueError, match="got 1 class names for 2 classes"):
        misnamed(known()[:1])


def test_a_class_that_is_never_predicted_is_compared_with_all_inputs():
    explainer = fn.Explainer(network()).fit([known()[:10]], progress=False)
    one, other = explainer(known()[[0, 30]])
    assert (one.seen, other.seen) == (10, 0)
    assert torch.equal(other.on_rate, explainer.statistics.on_rate)
    rows = dict(other.rows())
    assert rows["the network predicts"] == "class 1, which it predicts for no in-distribution input"
    assert rows["usually on for the in-distribution inputs, off here"] == "4 of 4: 0, 1, 2, 3"


def test_the_sentence_counts_against_what_is_usual():
    x = known()
    x[0, 1] = 0  # one of 20 has a unit off that the others have on
    x[1:5, 8] = 1  # four of 20 have one on that the others have off
    explainer = fn.Explainer(network()).fit([x], progress=False)
    (one,) = explainer(torch.tensor([[0.0, 2, 0, 2, 0, 1, 0, 0, 5]]))
    assert one.sentence == (
        "Predicted: class 0. 2 of the 4 units that are usually on for class 0 are off (0 expected); "
        "2 of the 5 others are on (0 expected)."
    )


def test_a_refit_forgets():
    explainer = fn.Explainer(network()).fit([known()], progress=False)
    explainer.fit([known()[:10]], progress=False)
    assert int(explainer.statistics.inputs) == 10
