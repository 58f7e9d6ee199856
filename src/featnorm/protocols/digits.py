"""The demonstration's benchmark: handwritten digits and photographs that scikit-learn ships.

A small network learns the digits 0 to 6. The digits 7, 8 and 9 are near-OOD, patches of photographs far-OOD.
Everything is 8 x 8 grey, and training takes seconds on a CPU.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

KNOWN = range(7)
PATCHES = 1000
EPOCHS = 60
_BATCH = 64
_TEMPERATURE = 0.1


@dataclass(frozen=True)
class Digits:
    """Images (n, 1, 8, 8) in [0, 1] and labels (n,) of the three in-distribution folds, and the OOD sets."""

    train: tuple[Tensor, Tensor]
    calibrate: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    ood: dict[str, Tensor]


class DigitNet(nn.Module):
    """Three convolutions and the paper's head: a hidden layer, an embedding, cosine logits (A.2.4, C.1)."""

    def __init__(self, width: int = 64, hidden: int = 512, embedding: int = 128) -> None:
        super().__init__()

        def block(inputs: int, outputs: int) -> nn.Sequential:
            return nn.Sequential(
                nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
            )

        self.backbone = nn.Sequential(
            block(1, width), block(width, width), nn.MaxPool2d(2), block(width, 2 * width)
        )
        self.hidden = nn.Linear(2 * width, hidden)
        self.relu = nn.ReLU()
        self.embedding = nn.Linear(hidden, embedding)
        self.prototypes = nn.Linear(embedding, len(KNOWN), bias=False)

    def forward(self, images: Tensor) -> Tensor:
        """Return the cosine logits (n, 7) of images (n, 1, 8, 8)."""
        pooled = self.backbone(images).mean((2, 3))
        embedding = self.embedding(self.relu(self.hidden(pooled)))
        cosine = nn.functional.linear(
            nn.functional.normalize(embedding), nn.functional.normalize(self.prototypes.weight)
        )
        return cosine / _TEMPERATURE


def load(seed: int = 0) -> Digits:
    """Split the known digits into train, calibration and test (half, quarter, quarter), and cut the patches."""
    from sklearn.datasets import load_digits, load_sample_images

    generator = torch.Generator().manual_seed(seed)
    digits = load_digits()
    images = torch.from_numpy(digits.images).float().div(16)[:, None]
    labels = torch.from_numpy(digits.target).long()
    known = (labels < len(KNOWN)).nonzero().squeeze(1)
    known = known[torch.randperm(len(known), generator=generator)]
    folds = known.tensor_split([len(known) // 2, len(known) * 3 // 4])
    train, calibrate, test = ((images[fold], labels[fold]) for fold in folds)

    photographs = [torch.tensor(photo).float().mean(2) / 255 for photo in load_sample_images().images]
    patches = []
    for i in range(PATCHES):
        grey = photographs[i % len(photographs)]
        size = int(torch.randint(24, 97, (), generator=generator))
        top, left = (int(torch.randint(0, side - size, (), generator=generator)) for side in grey.shape)
        patch = grey[None, None, top : top + size, left : left + size]
        patches.append(nn.functional.interpolate(patch, (8, 8), mode="area")[0])
    ood = {"digits 7, 8, 9": images[labels >= len(KNOWN)], "photographs": torch.stack(patches)}
    return Digits(train, calibrate, test, ood)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Run on one thread: on layers this small threads wait for each other, on a busy machine for minutes."""
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        yield
    finally:
        torch.set_num_threads(threads)


def train(data: tuple[Tensor, Tensor], seed: int = 0) -> DigitNet:
    """Train a network by cross entropy on cosine logits: SGD, cosine schedule, shifts by a pixel."""
    images, labels = data
    # The caller's random state is theirs, and the weights depend on the seed alone.
    with torch.random.fork_rng(devices=[]), _one_thread():
        torch.manual_seed(seed)
        model = DigitNet()
        optimiser = torch.optim.SGD(model.parameters(), lr=0.06, momentum=0.9, weight_decay=5e-4, nesterov=True)
        steps = EPOCHS * (len(images) // _BATCH)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
        padded = nn.functional.pad(images, (1, 1, 1, 1))
        for _ in range(EPOCHS):
            for rows in torch.randperm(len(images))[: len(images) // _BATCH * _BATCH].split(_BATCH):
                dy, dx = torch.randint(0, 3, (2,)).tolist()
                batch = padded[rows, :, dy : dy + 8, dx : dx + 8]
                loss = nn.functional.cross_entropy(model(batch), labels[rows])
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                schedule.step()
    return model.eval()
