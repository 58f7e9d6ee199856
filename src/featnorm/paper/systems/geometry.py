"""Geometric transformations, and the network that classifies them (Golan and El-Yaniv, NeurIPS 2018)."""

import itertools

import torch
from torch import Tensor, nn

#: (flip, right, down, rotation): moves are quarters of a side, rotations quarters of a circle.
TRANSFORMATIONS = tuple(itertools.product((False, True), (0, -1, 1), (0, -1, 1), range(4)))


def transform(images: Tensor) -> Tensor:
    """Return the 72 transformations of images; moved images are mirrored at the border.

    Parameters
    ----------
    images : (n, c, s, s), of any type; s is a multiple of 4.

    Returns
    -------
    (n, 72, c, s, s), in the order of `TRANSFORMATIONS`.
    """
    side = images.shape[-1]
    indices = torch.arange(side, device=images.device)
    views = []
    for flip, right, down, rotation in TRANSFORMATIONS:
        rows, columns = (_mirror(indices - shift * side // 4, side) for shift in (down, right))
        moved = (images.flip(3) if flip else images)[:, :, rows][:, :, :, columns]
        views.append(moved.rot90(rotation, (2, 3)))
    return torch.stack(views, 1)


def _mirror(indices: Tensor, side: int) -> Tensor:
    """Return indices mirrored at the border; the pixel at the border occurs twice."""
    indices = torch.where(indices < 0, -indices - 1, indices)
    return torch.where(indices >= side, 2 * side - 1 - indices, indices)


class WideResNet(nn.Module):
    """A wide residual network (Zagoruyko and Komodakis, BMVC 2016) for 32 x 32 images.

    Parameters
    ----------
    depth : number of layers, 6 k + 4.
    width : widening factor; the pooled feature has 64 times as many units.
    classes : number of classes.

    Raises
    ------
    ValueError
        The depth is not 6 k + 4.
    """

    def __init__(self, depth: int, width: int, classes: int) -> None:
        if depth < 10 or depth % 6 != 4:
            raise ValueError(f"a wide residual network has 6 k + 4 layers, 10 or more, not {depth}")
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, padding=1, bias=False)]
        inputs = 16
        for stage in range(3):
            for block in range((depth - 4) // 6):
                outputs = (16 << stage) * width
                layers.append(_Block(inputs, outputs, stride=2 if stage > 0 and block == 0 else 1))
                inputs = outputs
        self.features = nn.Sequential(
            *layers, nn.BatchNorm2d(inputs), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )
        self.classifier = nn.Linear(inputs, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (n, classes) of images (n, 3, 32, 32)."""
        return self.classifier(self.features(images))


class _Block(nn.Module):
    """Two convolutions, each after batch normalization and a ReLU, and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.BatchNorm2d(inputs), nn.ReLU())
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
        )
        self.shortcut = None if inputs == outputs else nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        rectified = self.first(x)
        return self.body(rectified) + (x if self.shortcut is None else self.shortcut(rectified))
