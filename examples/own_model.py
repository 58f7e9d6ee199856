"""Train a torchvision ResNet on handwritten digits, as a project of one's own would, without featnorm.

It writes the folders ``digits/train`` and ``digits/new`` (one subfolder per class), ``patches`` (of photographs)
and the weights ``own_model.pth``. `make` is what featnorm takes as ``--model own_model:make``:

    python own_model.py
    featnorm fit digits/train --model own_model:make -o fitted.featnorm
    featnorm calibrate fitted.featnorm digits/new --model own_model:make -o digits.featnorm
    featnorm score digits.featnorm patches --model own_model:make
    featnorm serve digits.featnorm --model own_model:make

The detector is fitted to the training images, and calibrated on images that the network was not trained on, so
that its false-alarm rate holds.
"""

from pathlib import Path

import torch
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.models.resnet import BasicBlock, ResNet
from torchvision.transforms import v2

WEIGHTS = Path("own_model.pth")
transform = v2.Compose(
    [v2.Resize((16, 16)), v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.3] * 3, [0.4] * 3)]
)


def network() -> ResNet:
    """Return an untrained ResNet-10 with ten classes."""
    return ResNet(BasicBlock, [1, 1, 1, 1], num_classes=10)


def make() -> tuple[ResNet, v2.Compose]:
    """Return the trained network and its transform."""
    model = network()
    model.load_state_dict(torch.load(WEIGHTS, weights_only=True))
    return model, transform


def write_images() -> None:
    """Write two thirds of the digits to train on, the others, and patches of photographs."""
    digits = load_digits()
    for i, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        place = Path("digits", "new" if i % 3 == 0 else "train", str(label))
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels * 255 / 16).astype("uint8")).save(place / f"{i:04}.png")
    Path("patches").mkdir(exist_ok=True)
    for number, photograph in enumerate(load_sample_images().images):
        for i in range(50):
            top, left = 37 * (i // 10), 61 * (i % 10)
            Image.fromarray(photograph[top : top + 32, left : left + 32]).save(f"patches/{number}-{i:02}.png")


def train(epochs: int = 3) -> None:
    """Train the network and write its weights."""
    torch.manual_seed(0)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    loader = DataLoader(ImageFolder("digits/train", transform), batch_size=64, shuffle=True)
    for epoch in range(epochs):
        for images, labels in loader:
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}")
    torch.save(model.state_dict(), WEIGHTS)


if __name__ == "__main__":
    write_images()
    train()
