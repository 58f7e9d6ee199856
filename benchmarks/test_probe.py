"""What a probe adds to an epoch of CIFAR-10: the mark is under a tenth, at its default settings."""

import time

import torch
from torch import nn

from featnorm._memory import keep_freed_memory
from featnorm.training import Probe, cifar_network

TRAINING_IMAGES = 45_000
BATCH = 128


def images(n):
    return torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8)


def test_an_epoch(benchmark, capsys):
    keep_freed_memory()
    model = cifar_network(24, 10, hidden=512, seed=0).to(memory_format=torch.channels_last)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.01)
    pixels = torch.rand(BATCH, 3, 32, 32).contiguous(memory_format=torch.channels_last)

    def step():
        loss = nn.functional.cross_entropy(model(pixels), torch.arange(BATCH) % 10)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()

    step()
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    folds = {name: (images(500), torch.arange(500) % 10) for name in ("train", "test")}
    probe = Probe(folds, {f"ood {i}": images(500) for i in range(3)}, pre_activation="2.hidden")
    benchmark.group = "a probe of 500 images of each of five sets"
    benchmark.pedantic(probe.measure, (model.eval(),), rounds=3, warmup_rounds=1)
    share = benchmark.stats.stats.min / (min(seconds) * TRAINING_IMAGES / BATCH)
    benchmark.extra_info["share of an epoch"] = share
    with capsys.disabled():
        print(f"\na probe takes {share:.1%} of an epoch of {TRAINING_IMAGES} images")
