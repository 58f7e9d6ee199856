"""Networks made from a function, and checks of the features that a tap finds in them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from featnorm.features import Features
from featnorm.tap import FeatureTap


class Net(nn.Module):
    """A network of named modules, whose forward pass is a function of the network and its input."""

    def __init__(self, forward: Callable[[Any, Tensor], Any], **parts: nn.Module | Tensor) -> None:
        super().__init__()
        self._run = forward
        for name, part in parts.items():
            if isinstance(part, (nn.Parameter, nn.Module)):
                setattr(self, name, part)
            else:
                self.register_buffer(name, part)

    def forward(self, x: Tensor) -> Any:
        return self._run(self, x)


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape))


def tapped(net: nn.Module, x: Tensor, layer: str | nn.Module | None = None) -> Features:
    return FeatureTap(net.eval(), layer)(x)


def plain(net: nn.Module, x: Tensor) -> Any:
    with torch.no_grad():
        return net.eval()(x)


def same(actual: Tensor | None, expected: Tensor) -> None:
    assert actual is not None
    torch.testing.assert_close(actual, expected.detach(), rtol=1e-5, atol=1e-6)


def assert_reproduces(features: Features, name: str, logits: Tensor | None = None) -> None:
    """Check that W f + b are the logits, where f is the field."""
    weight, bias = features.linear()
    expected = features.tensor("logits") if logits is None else logits.detach()
    out = features.tensor(name) @ weight.T + (0 if bias is None else bias)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def assert_absent(features: Features, *names: str) -> None:
    for name in names:
        assert getattr(features, name) is None, name
        assert features.absent[name], f"no reason is given for the missing {name}"


def batch_norm(width: int) -> nn.BatchNorm1d:
    norm = nn.BatchNorm1d(width)
    with torch.no_grad():
        for tensor in (norm.weight, norm.bias, norm.running_mean):
            tensor.normal_()
        norm.running_var.uniform_(0.5, 2)
    return norm
