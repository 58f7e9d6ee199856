"""A training step, run in several ways, compared with its operations at the rate of the best convolution.

The best rate is that of the forward pass of a large 3 x 3 convolution, over precisions and memory formats. The
operations of a step are counted from its shapes, forward and backward.
"""

import time

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from featnorm.models import CifarResNet18, ProjectionHead

WAYS = {
    "default layout": (torch.contiguous_format, None, False),
    "channels last": (torch.channels_last, None, False),
    "channels last, bf16": (torch.channels_last, torch.bfloat16, False),
    "channels last, compiled": (torch.channels_last, None, True),
    "channels last, bf16, compiled": (torch.channels_last, torch.bfloat16, True),
}


def counted(work):
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


@pytest.fixture(scope="module")
def best():
    """Return the name of the machine's best convolution and its operations per second."""
    found = {}
    for name, (layout, dtype, compiled) in WAYS.items():
        if compiled:
            continue
        images = torch.randn(64, 128, 16, 16).to(dtype or torch.float32).contiguous(memory_format=layout)
        layer = nn.Conv2d(128, 128, 3, padding=1).to(dtype or torch.float32).to(memory_format=layout)
        with torch.no_grad():
            operations = counted(lambda: layer(images))  # noqa: B023
            seconds = []
            for _ in range(5):
                start = time.perf_counter()
                layer(images)
                seconds.append(time.perf_counter() - start)
        found[name] = operations / min(seconds)
    return max(found.items(), key=lambda item: item[1])


@pytest.mark.parametrize("way", WAYS)
def test_step(compare, size, best, way):
    layout, dtype, compiled = WAYS[way]
    torch.manual_seed(0)
    width, batch = size(32, 8), size(128, 16)
    model = nn.Sequential(CifarResNet18(width), ProjectionHead(8 * width, 10, hidden=512)).to(memory_format=layout)
    runs = torch.compile(model) if compiled else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    images = torch.randn(batch, 3, 32, 32).contiguous(memory_format=layout)
    targets = torch.arange(batch) % 10

    def step(network=runs):
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            loss = nn.functional.cross_entropy(network(images).float(), targets)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    operations = counted(lambda: step(model))
    work, sizes, rounds = f"a training step, {way}", f"{batch} images, ResNet-18 of width {width}", 3
    medians = compare.time(work, step, {}, rounds=rounds, sizes=sizes)
    if medians:
        reference = f"its operations at the rate of the best convolution ({best[0]})"
        least = operations / best[1]
        compare.record(work, medians["ours"], reference, least, None, unit="s", rounds=rounds, sizes=sizes)
