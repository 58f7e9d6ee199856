"""The contents of a model are listed again exactly when they have changed."""

import copy
import pickle

import pytest
import torch
from torch import nn

from featnorm import FeatureTap
from featnorm.tap.contents import Contents


def network():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Sequential(nn.Linear(4, 2))).eval()


CHANGES = {
    "a module": lambda model: setattr(model, "0", nn.Linear(3, 4)),
    "a module inside": lambda model: model[3].__setitem__(0, nn.Linear(4, 2)),
    "one more module": lambda model: model[3].append(nn.ReLU()),
    "a module less": lambda model: model[3].__delitem__(0),
    "a parameter": lambda model: setattr(model[0], "weight", nn.Parameter(torch.zeros(4, 3))),
    "a buffer": lambda model: setattr(model[1], "running_mean", torch.zeros(4)),
    "no bias": lambda model: setattr(model[0], "bias", None),
    "all parameters": lambda model: setattr(model[0], "_parameters", dict(nn.Linear(3, 4)._parameters)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_of_the_parts_is_seen(change):
    model = network()
    contents = Contents(model)
    assert contents.is_current()
    change(model)
    assert not contents.is_current()
    assert Contents(model).is_current()


def test_contents_are_kept_while_they_are_current():
    tap = FeatureTap(network())
    first = tap.contents()
    assert tap.contents() is first
    tap.model[0] = nn.Linear(3, 4)
    assert tap.contents() is not first


def test_versions_tell_writes_and_moves():
    model = network()
    contents = Contents(model)
    before = contents.versions()
    assert contents.versions() == before
    with torch.no_grad():
        model[0].weight[0, 0] += 1
    assert contents.versions() != before
    before = contents.versions()
    model[0].weight.data = model[0].weight.data.clone()
    assert contents.versions() != before
    before = contents.versions()
    model.double()
    assert contents.versions() != before


def test_tensors_without_versions_or_addresses_have_versions_too():
    with torch.inference_mode():
        model = network()
    contents = Contents(model)
    assert contents.versions() == contents.versions()
    model.register_buffer("sparse", torch.eye(3).to_sparse())
    contents = Contents(model)
    assert contents.versions() == contents.versions()


def test_modes_are_looked_up_each_time():
    model = network()
    contents = Contents(model)
    assert contents.training() == []
    model[1].train()
    assert contents.training() == [model[1]]
    assert not contents.is_compiled()
    model[3].compile()
    assert contents.is_compiled()


def test_copies_of_a_tap_list_their_own_model():
    tap = FeatureTap(network())
    tap.contents()
    for other in (copy.deepcopy(tap), pickle.loads(pickle.dumps(tap))):
        assert other.contents().modules[0] is other.model is not tap.model
