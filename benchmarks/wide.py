"""A model of images whose features are wide and cost next to nothing, so that memory held per image shows."""

import torch
from torch import Tensor, nn
from torchvision.transforms import v2

WIDTH = 4096
_SIDE = 16


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.hidden = nn.Linear(3 * _SIDE**2, WIDTH)
        self.classifier = nn.Linear(WIDTH, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.hidden(images.flatten(1)).relu())


def images():
    """Return the model and its transform."""
    transform = v2.Compose([v2.ToImage(), v2.Resize((_SIDE, _SIDE)), v2.ToDtype(torch.float32, scale=True)])
    return Wide(), transform
