"""Models whose features are wide and cost next to nothing, so that memory held per item shows."""

import torch
from torch import Tensor, nn

WIDTH = 4096


class Wide(nn.Module):
    def __init__(self, inputs: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.hidden = nn.Linear(inputs, WIDTH)
        self.classifier = nn.Linear(WIDTH, 10)


class OfImages(Wide):
    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.hidden(images.flatten(1)).relu())


class OfTexts(Wide):
    def forward(self, tokens: Tensor) -> Tensor:
        return self.classifier(self.hidden(nn.functional.one_hot(tokens, 256).float().mean(1)).relu())


class Bytes:
    kind = "texts"

    def __call__(self, text: str) -> dict[str, Tensor]:
        return {"tokens": torch.tensor([*text.encode()])}


def images():
    """Return a model of images and its transform."""
    from torchvision.transforms import v2

    transform = v2.Compose([v2.ToImage(), v2.Resize((16, 16)), v2.ToDtype(torch.float32, scale=True)])
    return OfImages(3 * 16 * 16), transform


def texts():
    """Return a model of texts and its transform."""
    return OfTexts(256), Bytes()
