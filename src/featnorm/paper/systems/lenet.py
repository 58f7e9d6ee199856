"""The LeNet-type encoder of Deep-SVDD, and the autoencoder that pre-trains it (Ruff et al., ICML 2018).

Layers have no bias, and normalizations no shift: with them the network could map every input to the center.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from featnorm.paper.systems.base import TrainContext
from featnorm.paper.systems.steps import Losses, Parts, adam, train_steps

#: Channels of the three convolutions, each followed by a pool.
_CHANNELS = (32, 64, 128)
_KERNEL = 5


class ContrastNormalize(nn.Module):
    """Global contrast normalization by the l1-norm, and then a scaling that maps the training images to [0, 1].

    Parameters
    ----------
    images : training images (n, 3, 32, 32) uint8.
    """

    low: Tensor
    high: Tensor

    def __init__(self, images: Tensor) -> None:
        super().__init__()
        parts = [self._contrast(batch.float() / 255) for batch in images.split(1000)]
        self.register_buffer("low", torch.stack([part.min() for part in parts]).min())
        self.register_buffer("high", torch.stack([part.max() for part in parts]).max())

    @staticmethod
    def _contrast(pixels: Tensor) -> Tensor:
        centered = pixels - pixels.mean((1, 2, 3), keepdim=True)
        # An image of one color has no contrast, and becomes 0.
        return centered / centered.abs().mean((1, 2, 3), keepdim=True).clamp_min(1e-8)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the normalized pixels (n, 3, 32, 32)."""
        return (self._contrast(pixels) - self.low) / (self.high - self.low)


class Encoder(nn.Sequential):
    """Three convolutions with pooling, then a linear layer: pixels (n, 3, 32, 32) to codes (n, width)."""

    def __init__(self, width: int) -> None:
        layers: list[nn.Module] = []
        inputs = 3
        for channels in _CHANNELS:
            layers += [nn.Conv2d(inputs, channels, _KERNEL, padding=_KERNEL // 2, bias=False), _norm2d(channels)]
            layers += [nn.LeakyReLU(), nn.MaxPool2d(2)]
            inputs = channels
        super().__init__(*layers, nn.Flatten(), nn.Linear(inputs * 16, width, bias=False))


class Decoder(nn.Sequential):
    """The encoder mirrored: codes (n, width) to pixels (n, 3, 32, 32) in [0, 1]; ``width`` is a multiple of 16."""

    def __init__(self, width: int) -> None:
        inputs = width // 16
        layers: list[nn.Module] = [nn.BatchNorm1d(width, eps=1e-4, affine=False), nn.Unflatten(1, (inputs, 4, 4))]
        layers.append(nn.LeakyReLU())
        for channels in reversed(_CHANNELS):
            layers += [nn.ConvTranspose2d(inputs, channels, _KERNEL, padding=_KERNEL // 2, bias=False)]
            layers += [_norm2d(channels), nn.LeakyReLU(), nn.Upsample(scale_factor=2)]
            inputs = channels
        last = nn.ConvTranspose2d(inputs, 3, _KERNEL, padding=_KERNEL // 2, bias=False)
        super().__init__(*layers, last, nn.Sigmoid())


def _norm2d(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-4, affine=False)


def train_autoencoder(images: Tensor, settings: Mapping[str, Any], context: TrainContext) -> nn.Sequential:
    """Train an autoencoder on images of one class, by the squared error summed over an image.

    Parameters
    ----------
    images : (n, 3, 32, 32) uint8.
    settings
        ``width`` of the code, a multiple of 16; ``autoencoder_epochs``; ``autoencoder_drop``, the epoch at which
        the learning rate falls to a tenth; ``batch_size``; and ``lr`` and ``weight_decay`` of Adam.
    context : where and how.

    Returns
    -------
    ``Sequential(ContrastNormalize, Encoder)``, in evaluation mode.

    Raises
    ------
    ValueError
        The width is not a multiple of 16, or see `featnorm.paper.systems.OneClassModel.train`.
    """
    width = settings["width"]
    if width % 16:
        raise ValueError(f"width must be a multiple of 16, since the code is reshaped to 4 x 4 maps, got {width}")
    model = nn.ModuleDict(
        {"normalize": ContrastNormalize(images), "encoder": Encoder(width), "decoder": Decoder(width)}
    )
    for layer in model.modules():
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.xavier_uniform_(layer.weight, gain=nn.init.calculate_gain("leaky_relu"))

    def step(parts: Parts, pixels: Tensor, epoch: int) -> Losses:
        target = model["normalize"](pixels)
        output = parts["decoder"](parts["encoder"](target))
        yield "autoencoder", (output - target).square().sum((1, 2, 3)).mean()

    optimizer = adam(model.parameters(), settings["lr"], weight_decay=settings["weight_decay"])
    settings = {**settings, "epochs": settings["autoencoder_epochs"], "drop": settings["autoencoder_drop"]}
    train_steps(model, images, step, {"autoencoder": optimizer}, settings, context)
    return nn.Sequential(model["normalize"], model["encoder"])
