"""ResNet-18 for 32 x 32 images, with the paper's head: the network of its CIFAR-10 benchmark."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from featnorm.models.heads import Activation, CosineClassifier, ProjectionHead

# Mean and standard deviation of CIFAR-10's training images in [0, 1], per channel.
CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR10_STD = (0.2470, 0.2435, 0.2616)


class Normalize(nn.Module):
    """Subtracts the mean of each channel and divides by the standard deviation, as torchvision's `Normalize`.

    A network with this first layer takes pixels in [0, 1].

    Parameters
    ----------
    mean, std : one number per channel.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).reshape(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).reshape(-1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Return the normalized images (n, c, h, w)."""
        return (images - self.mean) / self.std


class CifarResNet18(nn.Module):
    """ResNet-18 for 32 x 32 images: a 3 x 3 stem and no first pooling (He et al., CVPR 2016, for CIFAR).

    It returns the pooled feature, of width ``8 * width``, without a head.

    Parameters
    ----------
    width : number of channels of the first stage. Default: 64, as in the paper.
    """

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.features = 8 * width
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)
        )
        stages: list[nn.Module] = []
        channels = width
        for stage in range(4):
            outputs = width << stage
            stages += [
                _Block(channels, outputs, stride=1 if stage == 0 else 2),
                _Block(outputs, outputs, stride=1),
            ]
            channels = outputs
        self.stages = nn.Sequential(*stages)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Return the pooled features (n, 8 * width) of images (n, 3, h, w)."""
        return self.stages(self.stem(images)).mean((2, 3))


class _Block(nn.Module):
    """A residual block: two convolutions and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu_(self.body(x) + self.shortcut(x))


def cifar_network(
    width: int,
    classes: int | None,
    *,
    hidden: int | None = 512,
    embedding: int = 128,
    activation: Activation = "relu",
    temperature: float = 0.1,
    mean: Sequence[float] = CIFAR10_MEAN,
    std: Sequence[float] = CIFAR10_STD,
    seed: int = 0,
) -> nn.Sequential:
    """Return the network of the paper's 32 x 32 benchmarks (C.1): ``Sequential(Normalize, CifarResNet18, head)``.

    Parameters
    ----------
    width : width of the `CifarResNet18`.
    classes : number of classes. None returns the embedding instead of logits, and requires a hidden layer.
    hidden : width of the `ProjectionHead`'s hidden layer; None for cosine logits of the pooled feature.
    embedding, activation : settings of the `ProjectionHead`; ignored without a hidden layer.
    temperature : temperature of the cosine logits.
    mean, std
        Mean and standard deviation of the pixels in [0, 1], per channel. Default: CIFAR-10's training images.
    seed : seed of the initial weights; the caller's random state does not change.

    Raises
    ------
    ValueError
        The activation is unknown, the temperature is not positive, or both ``classes`` and ``hidden`` are None.
    """

    def head(features: int) -> nn.Module:
        if hidden is not None:
            return ProjectionHead(
                features,
                classes,
                hidden=hidden,
                embedding=embedding,
                activation=activation,
                temperature=temperature,
            )
        if classes is None:
            raise ValueError("a head without classes is a projection head: give it a hidden layer")
        return CosineClassifier(features, classes, temperature)

    return cifar_network_with(head, width, mean=mean, std=std, seed=seed)


def cifar_network_with(
    head: Callable[[int], nn.Module],
    width: int,
    *,
    mean: Sequence[float] = CIFAR10_MEAN,
    std: Sequence[float] = CIFAR10_STD,
    seed: int = 0,
) -> nn.Sequential:
    """Return ``Sequential(Normalize, CifarResNet18, head)`` with a custom head.

    Parameters
    ----------
    head : function that makes the head from the width of the pooled feature, such as `CSIHead`.
    width, mean, std, seed : see `cifar_network`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = CifarResNet18(width)
        return nn.Sequential(Normalize(mean, std), backbone, head(backbone.features))
