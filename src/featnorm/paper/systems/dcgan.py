"""The networks of DCGAN at 32 x 32 (Radford et al., ICLR 2016), the parts of AnoGAN and OCGAN."""

import torch
from torch import Tensor, nn

_KERNEL = 5


def centered(pixels: Tensor) -> Tensor:
    """Return pixels in [0, 1] scaled to [-1, 1], the range of the networks."""
    return 2 * pixels - 1


class Generator(nn.Sequential):
    """Latent vectors (n, latent) to images (n, 3, 32, 32) in [-1, 1]; the last maps have ``width`` channels."""

    def __init__(self, latent: int, width: int) -> None:
        layers: list[nn.Module] = [nn.Linear(latent, 64 * width, bias=False), nn.Unflatten(1, (4 * width, 4, 4))]
        for inputs, channels in ((4 * width, 2 * width), (2 * width, width)):
            layers += [nn.BatchNorm2d(inputs), nn.ReLU()]
            layers.append(_double(inputs, channels, bias=False))
        layers += [nn.BatchNorm2d(width), nn.ReLU()]
        super().__init__(*layers, _double(width, 3), nn.Tanh())


class Convolutions(nn.Sequential):
    """Images (n, 3, 32, 32) to features (n, 4 * width, 4, 4): the body of discriminators and encoders."""

    def __init__(self, width: int) -> None:
        super().__init__(
            _halve(3, width),
            nn.LeakyReLU(0.2),
            _halve(width, 2 * width, bias=False),
            nn.BatchNorm2d(2 * width),
            nn.LeakyReLU(0.2),
            _halve(2 * width, 4 * width, bias=False),
            nn.BatchNorm2d(4 * width),
            nn.LeakyReLU(0.2),
        )


class RealLogit(nn.Sequential):
    """Features (n, 4 * width, 4, 4) to one logit each (n, 1), positive for real images."""

    def __init__(self, width: int) -> None:
        super().__init__(nn.Flatten(), nn.Linear(64 * width, 1))


def _halve(inputs: int, outputs: int, *, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, _KERNEL, stride=2, padding=_KERNEL // 2, bias=bias)


def _double(inputs: int, outputs: int, *, bias: bool = True) -> nn.ConvTranspose2d:
    return nn.ConvTranspose2d(
        inputs, outputs, _KERNEL, stride=2, padding=_KERNEL // 2, output_padding=1, bias=bias
    )


def initialize(model: nn.Module) -> None:
    """Draw the weights as DCGAN does, from a normal distribution with standard deviation 0.02."""
    for layer in model.modules():
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            nn.init.normal_(layer.weight, 0.0, 0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.weight, 1.0, 0.02)


def uniform(count: int, latent: int, device: torch.device) -> Tensor:
    """Draw latent vectors (count, latent), uniform in [-1, 1]."""
    return 2 * torch.rand(count, latent, device=device) - 1


def adversarial(logits: Tensor, real: bool) -> Tensor:
    """Return the mean cross entropy of logits, whose target is real or generated."""
    target = torch.full_like(logits, float(real))
    return nn.functional.binary_cross_entropy_with_logits(logits, target)
