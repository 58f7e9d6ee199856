"""The packaged network with a quarter of its channels, for tests in which what it has learned does not matter."""

import time

import pytest

import apart
from featnorm.models import loading
from featnorm.models.cifar import cifar_network


def load_narrow(_name="cifar10-resnet18"):
    """Return the network with random weights, the same each time."""
    return cifar_network(8, 10).eval()


def command(*arguments):
    """Run the command with that network to the end of the process."""
    loading.load_model = load_narrow
    apart.command(*arguments)


def slow_command(*arguments):
    """As `command`, with time to end the process between two batches."""

    def load_slow(name):
        model = load_narrow(name)
        model[1].stem.register_forward_pre_hook(lambda *_: time.sleep(0.05))
        return model

    loading.load_model = load_slow
    apart.command(*arguments)


@pytest.fixture(scope="module")
def narrow():
    """Let commands in this process load that network by the name of the packaged one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "load_model", load_narrow)
        yield
