"""The benchmark of the demonstration: handwritten digits and photographs that come with scikit-learn.

A small network is trained on the digits 0 to 6. The digits 7, 8 and 9 are near-OOD, patches of photographs
far-OOD. All images are 8 x 8 and gray, and training takes seconds on a CPU.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from featnorm.models import ProjectionHead
from featnorm.training import Recipe
from featnorm.training import train as fit

ID_DIGITS = range(7)
PATCHES = 1000
RECIPE = Recipe(epochs=60, batch_size=64, optimizer="sgd", lr=0.06, nesterov=True, weight_decay=5e-4)


@dataclass(frozen=True)
class Digits:
    """Images (n, 1, 8, 8) in [0, 1] and labels (n,) of the three in-distribution splits, and the OOD sets."""

    train: tuple[Tensor, Tensor]
    calibrate: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    ood: dict[str, Tensor]


def network(width: int = 64) -> nn.Sequential:
    """Return three convolutions with pooling, and the paper's head, for images (n, 1, 8, 8) in [0, 1]."""

    def block(inputs: int, outputs: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
        )

    pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    backbone = nn.Sequential(block(1, width), block(width, width), nn.MaxPool2d(2), block(width, 2 * width), pool)
    return nn.Sequential(backbone, ProjectionHead(2 * width, len(ID_DIGITS), hidden=512))


def load(seed: int = 0) -> Digits:
    """Split the ID digits into training, calibration and test images (2:1:1), and cut the patches."""
    from sklearn.datasets import load_digits, load_sample_images

    generator = torch.Generator().manual_seed(seed)
    digits = load_digits()
    images = torch.from_numpy(digits.images).float().div(16)[:, None]
    labels = torch.from_numpy(digits.target).long()
    rows = (labels < len(ID_DIGITS)).nonzero().squeeze(1)
    rows = rows[torch.randperm(len(rows), generator=generator)]
    splits = rows.tensor_split([len(rows) // 2, len(rows) * 3 // 4])
    train, calibrate, test = ((images[split], labels[split]) for split in splits)

    photographs = [torch.tensor(photo).float().mean(2) / 255 for photo in load_sample_images().images]
    patches = []
    for i in range(PATCHES):
        gray = photographs[i % len(photographs)]
        size = int(torch.randint(24, 97, (), generator=generator))
        top, left = (int(torch.randint(0, side - size, (), generator=generator)) for side in gray.shape)
        patch = gray[None, None, top : top + size, left : left + size]
        patches.append(nn.functional.interpolate(patch, (8, 8), mode="area")[0])
    ood = {"digits 7, 8, 9": images[labels >= len(ID_DIGITS)], "photographs": torch.stack(patches)}
    return Digits(train, calibrate, test, ood)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Run on one thread: with layers this small, threads wait for each other, for minutes on a busy machine."""
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        yield
    finally:
        torch.set_num_threads(threads)


def train(data: tuple[Tensor, Tensor], seed: int = 0) -> nn.Sequential:
    """Train a network by cross entropy on cosine logits."""
    images, labels = data
    # The caller's random state is restored, and the weights depend only on the seed.
    with torch.random.fork_rng(devices=[]), _one_thread():
        torch.manual_seed(seed)
        model = network()
        fit(model, images.mul(255).round().to(torch.uint8), labels, RECIPE, seed=seed)
        return model
