"""Deep-SVDD (Ruff et al., Deep One-Class Classification, ICML 2018)."""

from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from featnorm.paper.systems.base import OneClassModel, TrainContext, predict
from featnorm.paper.systems.lenet import train_autoencoder
from featnorm.paper.systems.steps import Losses, Parts, adam, train_steps
from featnorm.runtime import Runtime

# Weights of 0 could reach a coordinate of the center that is smaller than this.
_MIN_COORDINATE = 0.1


class Sphere(nn.Module):
    """A network, and the center that it maps the training images to."""

    center: Tensor

    def __init__(self, normalize: nn.Module, encoder: nn.Module, center: Tensor) -> None:
        super().__init__()
        self.normalize = normalize
        self.encoder = encoder
        self.register_buffer("center", center)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the squared distances (n,) of images, pixels in [0, 1], to the center."""
        return (self.encoder(self.normalize(pixels)).float() - self.center).square().sum(1)


@dataclass(frozen=True)
class DeepSVDD(OneClassModel[Sphere]):
    """Minus the squared distance ``||phi(x) - c||^2`` to a center that the network is trained to map the class to.

    The one-class objective (eq. 4), mean squared distance and weight decay, trains an encoder that was pre-trained
    as an autoencoder. The center is the mean of the pre-trained encoder's outputs for the training images, and is
    fixed; coordinates closer to 0 than 0.1 are moved to 0.1 or -0.1.

    Parameters
    ----------
    width : width of the code, a multiple of 16.
    autoencoder_epochs, autoencoder_drop
        Epochs of the pre-training, and the epoch at which its learning rate falls to a tenth.
    epochs, drop : the same for the training.
    batch_size, lr, weight_decay : settings of both, by Adam.
    """

    width: int = 128
    autoencoder_epochs: int = 350
    autoencoder_drop: int = 250
    epochs: int = 150
    drop: int = 50
    batch_size: int = 200
    lr: float = 1e-4
    weight_decay: float = 0.5e-6

    def _train(self, images: Tensor, context: TrainContext) -> Sphere:
        settings = asdict(self)
        pretrained = train_autoencoder(images, settings, context.part("autoencoder"))
        center = predict(pretrained, images, context.runtime).mean(0)
        center = torch.where(
            center.abs() < _MIN_COORDINATE, torch.where(center < 0, -_MIN_COORDINATE, _MIN_COORDINATE), center
        )
        sphere = Sphere(pretrained[0], pretrained[1], center)

        def step(parts: Parts, pixels: Tensor, epoch: int) -> Losses:
            yield "encoder", (parts["encoder"](sphere.normalize(pixels)) - sphere.center).square().sum(1).mean()

        optimizer = adam(sphere.encoder.parameters(), self.lr, weight_decay=self.weight_decay)
        train_steps(sphere, images, step, {"encoder": optimizer}, settings, context.part("sphere"))
        return sphere

    def _scores(self, model: Sphere, images: Tensor, runtime: Runtime) -> dict[str, Tensor]:
        return {"Deep-SVDD": -predict(model, images, runtime)}
