"""The time that a probe with default settings adds to an epoch of CIFAR-10: at most a tenth."""

import torch
from torch import nn

from featnorm.models import cifar_network
from featnorm.paper.probe import Probe

TRAINING_IMAGES = 45_000
BATCH = 128
# Number of training steps that are timed.
STEPS = 3


def images(n):
    return torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8)


def test_an_epoch(compare, size):
    width, asked = size(24, 8), size(500, 50)
    model = cifar_network(width, 10, hidden=512, seed=0).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    pixels = torch.rand(BATCH, 3, 32, 32).contiguous(memory_format=torch.channels_last)

    def steps():
        model.train()
        for _ in range(STEPS):
            loss = nn.functional.cross_entropy(model(pixels), torch.arange(BATCH) % 10)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()

    splits = {name: (images(asked), torch.arange(asked) % 10) for name in ("train", "test")}
    probe = Probe(splits, {f"ood {i}": images(asked) for i in range(3)}, pre_activation="2.hidden")
    epoch = TRAINING_IMAGES / BATCH / STEPS
    compare.time(
        f"a probe of {asked} images of each of five sets",
        lambda: probe.measure(model.eval()),
        {f"{STEPS} steps of training, of {epoch:.0f} times as many in an epoch": (steps, 0.1 * epoch)},
        rounds=3,
        sizes=f"batches of {BATCH}, CIFAR's ResNet-18 of width {width}",
    )
