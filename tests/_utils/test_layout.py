"""The layout in which convolutions run: channels last, except where the gradient would corrupt the heap."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import featnorm as fn
from featnorm._utils.layout import fast_layout, safe_gradients
from featnorm.models import cifar_network
from featnorm.paper.recipe import PRESETS
from featnorm.paper.systems import GOAD
from featnorm.training import Recipe, train

RECIPE = Recipe(epochs=1, batch_size=4, optimizer="sgd", lr=0.01)


class Convolutions(TorchDispatchMode):
    """Records the arguments of every convolution, forward and backward."""

    def __init__(self):
        super().__init__()
        self.forward = []
        self.backward = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.convolution.default:
            self.forward.append(signature(*args[:2], args[3], args[4], args[8]))
        if func is torch.ops.aten.convolution_backward.default:
            self.backward.append(signature(*args[1:3], args[4], args[5], args[9]))
        return func(*args, **(kwargs or {}))

    @property
    def faulty(self):
        """The backward passes that would write past their buffer on a CPU with AVX2."""
        return [
            found
            for found in self.backward
            if found["kernel"] == (1, 1)
            and max(found["stride"]) > 1
            and found["padding"] == (0, 0)
            and found["groups"] == 1
            and 2 <= found["channels"] < 8
            and (found["input_last"] or found["weight_last"])
        ]


def signature(images, weight, stride, padding, groups):
    return {
        "kernel": tuple(weight.shape[2:]),
        "channels": images.shape[1],
        "stride": tuple(stride),
        "padding": tuple(padding),
        "groups": groups,
        "input_last": strictly_last(images),
        "weight_last": strictly_last(weight),
    }


def strictly_last(values):
    """Whether torch treats a tensor, or a strided part of it, as channels last."""
    return values.stride(1) == 1 and values.stride(3) >= values.shape[1] > 1


class Functional(nn.Conv2d):
    """A convolution that calls the function itself, as in many libraries."""

    def forward(self, images):
        return nn.functional.conv2d(images, self.weight / 2, self.bias, stride=self.stride, groups=self.groups)


class General(nn.Conv2d):
    def forward(self, images):
        return torch.convolution(images, self.weight, self.bias, [2, 2], [0, 0], [1, 1], False, [0, 0], 1)


class Operator(nn.Conv2d):
    def forward(self, images):
        return torch.ops.aten.conv2d(images, self.weight, self.bias, [2, 2])


class Checkpointed(nn.Conv2d):
    """A convolution that is recomputed in the backward pass."""

    reentrant = False

    def forward(self, images):
        return checkpoint(super().forward, images, use_reentrant=self.reentrant)


class Reentrant(Checkpointed):
    reentrant = True


def narrow(channels, shortcut):
    """A network with a narrow strided 1x1 convolution after other layers."""
    return nn.Sequential(
        nn.Conv2d(3, channels, 3, padding=1),
        nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU(), nn.Sequential(shortcut)),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 3),
    )


def images(n=8, side=8):
    return torch.randint(0, 256, (n, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


SHORTCUTS = {
    "module": lambda c: nn.Conv2d(c, 16, 1, stride=2),
    "function": lambda c: Functional(c, 16, 1, stride=(2, 1), bias=False),
    "wide stride": lambda c: nn.Conv2d(c, 16, 1, stride=3, padding="valid"),
    "general function": lambda c: General(c, 16, 1, stride=2),
    "operator": lambda c: Operator(c, 16, 1, stride=2),
    "checkpoint": lambda c: Checkpointed(c, 16, 1, stride=2),
    "reentrant checkpoint": lambda c: Reentrant(c, 16, 1, stride=2),
    "script": lambda c: torch.jit.script(nn.Conv2d(c, 16, 1, stride=2)),
    "trace": lambda c: torch.jit.trace(nn.Conv2d(c, 16, 1, stride=2), torch.zeros(4, c, 8, 8)),
}


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
@pytest.mark.parametrize("channels", range(2, 8))
@pytest.mark.parametrize("kind", SHORTCUTS)
def test_training_never_runs_the_convolution_that_corrupts_the_heap(kind, channels):
    model = narrow(channels, SHORTCUTS[kind](channels))
    with Convolutions() as run:
        train(model, images(), torch.arange(8) % 3, RECIPE)
    assert len(run.backward) == 2 * 2, "two steps of two convolutions"
    assert run.faulty == []
    assert all(found["input_last"] for found in run.forward), "all of them in the fast layout"
    assert [found["input_last"] for found in run.backward] == 2 * [False, True], "all others on the way back too"


def test_the_trace_detects_the_bug_without_the_workaround():
    model = narrow(4, nn.Conv2d(4, 16, 1, stride=2)).to(memory_format=torch.channels_last)
    with Convolutions() as run, torch.device("meta"):
        model.to("meta")(fast_layout(torch.empty(4, 3, 8, 8))).sum().backward()
    assert len(run.faulty) == 1


def test_networks_of_few_output_channels_train_in_the_fast_layout():
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 3, 3, padding=1), nn.Flatten(), nn.Linear(192, 3)
    )
    with Convolutions() as run:
        train(model, images(), torch.arange(8) % 3, RECIPE)
    assert all(found["input_last"] for found in run.forward)
    assert all(found["input_last"] and found["weight_last"] for found in run.backward)


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("kind", SHORTCUTS)
def test_the_gradients_are_those_of_the_convolution(kind, layout):
    torch.manual_seed(0)
    ours = SHORTCUTS[kind](5).double()
    inputs = torch.randn(3, 5, 9, 10, dtype=torch.float64).contiguous(memory_format=layout).requires_grad_()

    def gradients(context):
        outputs = ours(inputs)
        with context:
            outputs.square().sum().backward()
        found = [tensor.grad for tensor in (inputs, *ours.parameters())]
        inputs.grad = None
        ours.zero_grad()
        return found

    for new, old in zip(gradients(safe_gradients(ours)), gradients(nullcontext()), strict=True):
        torch.testing.assert_close(new, old, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "convolution",
    [
        nn.Conv2d(4, 16, 3, stride=2),
        nn.Conv2d(4, 16, 1, stride=2, groups=2),
        nn.Conv2d(8, 16, 1, stride=2),
        nn.Conv2d(4, 16, 1),
        nn.Conv2d(4, 16, (1, 3), stride=(1, 2), padding="valid"),
    ],
    ids=repr,
)
def test_other_convolutions_are_not_changed(convolution):
    # With one that does not, so that the check has something to find.
    model = nn.ModuleList([fast_layout(convolution), nn.Conv2d(4, 16, 1, stride=2)])
    inputs = fast_layout(torch.randn(2, convolution.in_channels, 8, 8))
    with Convolutions() as run, safe_gradients(model):
        convolution(inputs).sum().backward()
    (found,) = run.backward
    assert found["input_last"]


def test_networks_with_other_convolutions_are_trained():
    model = nn.Sequential(
        nn.Unflatten(1, (3, 1)), nn.Conv3d(3, 4, (1, 3, 3)), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(4, 3)
    )
    before = model[1].weight.clone()
    train(model, images(), torch.arange(8) % 3, RECIPE)
    assert not torch.equal(model[1].weight, before)


def test_nothing_is_done_for_networks_without_such_a_convolution():
    assert isinstance(safe_gradients(cifar_network(4, 3)), nullcontext) is False  # its first shortcut is one
    assert isinstance(safe_gradients(cifar_network(8, 3)), nullcontext)


def test_gradients_through_a_users_model_are_safe_in_its_own_layout():
    model = narrow(4, nn.Conv2d(4, 16, 1, stride=2)).to(memory_format=torch.channels_last).eval()
    batch = fast_layout(images().float() / 255)
    scorer = fn.Scorer(model, fn.ODIN())
    with Convolutions() as run:
        scorer(batch)
        fn.FeatureTap(model, layer="2").hidden(batch)
    assert run.backward
    assert run.faulty == []


def test_one_class_systems_train_in_the_fast_layout():
    with Convolutions() as run:
        GOAD(width=1, epochs=1, batch_size=2).train(images(4, 32))
    assert run.backward
    assert run.faulty == []
    assert all(found["input_last"] for found in run.forward)


def test_recomputed_convolutions_are_safe():
    recipe = replace(PRESETS["MoCo-v2"], epochs=1, batch_size=4, queue=8)
    with Convolutions() as run:
        train(cifar_network(2, None, hidden=8, embedding=4), images(), None, recipe)
    assert run.faulty == []


def test_tensors_that_are_not_images_are_not_changed():
    features = torch.randn(3, 5)
    assert fast_layout(features) is features
