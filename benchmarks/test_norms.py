"""NAN, l1 and l0 compared with reading the array: 80 % of the bandwidth of a plain sum, and no copy of it."""

import shutil

import pytest
import torch

import featnorm as fn
from measuring import peak_memory

NORMS = {"NAN": fn.negative_aware_norm, "l1": fn.l1_norm, "l0": fn.l0_norm}
BANDWIDTH = 1 / 0.8
# As a share of the array's bytes; the norms themselves are one 2048th.
TEMPORARY = 0.05


def activations(n, d):
    return torch.empty(n, d).normal_(generator=torch.Generator().manual_seed(0)).relu_()


@pytest.fixture(scope="module")
def array(size):
    return activations(size(1_000_000, 10_000), 2048)


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("way", ["", ", torch.compile"])
def test_bandwidth(compare, array, name, way):
    norm = NORMS[name]
    if way:
        if shutil.which("g++") is None:
            pytest.skip("torch.compile needs a C++ compiler: g++")
        norm = torch.compile(norm)
    references = {"a plain sum": (array.sum, BANDWIDTH)}
    compare.time(name + way, lambda: norm(array), references, rounds=9, sizes=f"{tuple(array.shape)} float32")


def ask(name, n, d):
    array = activations(n, d)
    NORMS[name](array[:100])
    yield
    NORMS[name](array)
    yield


@pytest.mark.parametrize("name", NORMS)
def test_memory(compare, size, name):
    n, d = size(1_000_000, 10_000), 2048
    compare.memory(
        name,
        lambda: peak_memory(ask, name, n, d),
        {"the array": (lambda: 4 * n * d, TEMPORARY)},
        sizes=f"({n}, {d}) float32",
    )
