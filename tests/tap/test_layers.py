"""`LayerTap`: every rectified layer in one pass, whether a module or a function."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from featnorm.models import CifarResNet18, ProjectionHead
from featnorm.tap import FeatureTap, LayerTap


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.act = nn.GELU()
        self.fc = nn.Linear(4, 5)
        self.out = nn.Linear(5, 2)

    def forward(self, x):
        x = self.act(self.conv(x))
        return self.out(F.relu(self.fc(x.mean((2, 3)))))


def test_modules_and_functions_in_order():
    torch.manual_seed(0)
    model = Mixed()
    x = torch.randn(3, 3, 6, 6)
    tap = LayerTap(model, x)
    values = tap(x)
    assert tap.names == list(values) == ["0: act", "1: relu"]
    with torch.no_grad():
        a = model.act(model.conv(x))
        torch.testing.assert_close(values["0: act"], a.flatten(1))
        torch.testing.assert_close(values["1: relu"], F.relu(model.fc(a.mean((2, 3)))))
    assert model.training


def test_residual_networks_and_chosen_modules():
    torch.manual_seed(0)
    model = nn.Sequential(CifarResNet18(8), ProjectionHead(64, 10)).eval()
    x = torch.rand(2, 3, 32, 32)
    values = LayerTap(model, x)(x)
    assert len(values) == 18  # the stem, two in each of eight blocks, the head's
    with torch.no_grad():
        torch.testing.assert_close(list(values.values())[-1], torch.relu(model[1].hidden(model[0](x))))
    chosen = LayerTap(model, x, ["0.stages.7", "1.embedding"])(x)
    assert {name: tuple(value.shape) for name, value in chosen.items()} == {
        "0.stages.7": (2, 64 * 4 * 4),
        "1.embedding": (2, 128),
    }
    with pytest.raises(ValueError, match=r"no module '1\.nothing' ran"):
        LayerTap(model, x, ["1.nothing"])
    with pytest.raises(ValueError, match="nothing in this model is rectified"):
        LayerTap(nn.Linear(3, 2), torch.rand(2, 3))


def test_the_hidden_classifiers_of_all_layers_are_those_of_each():
    torch.manual_seed(0)
    model = nn.Sequential(CifarResNet18(4), ProjectionHead(32, 10, embedding=8)).eval()
    x = torch.rand(2, 3, 16, 16)
    names = ["0.stages.3", "0.stages.7", "1.activation"]
    together = LayerTap(model, x, names).hidden(x)
    for name in names:
        alone = FeatureTap(model, name).hidden(x)
        torch.testing.assert_close(together[name].coefficients, alone.coefficients)
        torch.testing.assert_close(together[name].offset, alone.offset)
