"""Deep-SVDD (Ruff et al., Deep One-Class Classification, ICML 2018)."""

from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from featnorm.paper.systems.lenet import train_autoencoder
from featnorm.paper.systems.steps import Losses, Parts, adam, train_steps
from featnorm.paper.systems.system import OneClassModel, TrainContext, predict

# Below this size a coordinate of the centre could be met by weights of 0.
_LEAST = 0.1


class Sphere(nn.Module):
    """A network and the centre that it maps the known images to."""

    centre: Tensor

    def __init__(self, normalize: nn.Module, encoder: nn.Module, centre: Tensor) -> None:
        super().__init__()
        self.normalize = normalize
        self.encoder = encoder
        self.register_buffer("centre", centre)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the squared distances (n,) of images, pixels in [0, 1], to the centre."""
        return (self.encoder(self.normalize(pixels)).float() - self.centre).square().sum(1)


@dataclass(frozen=True)
class DeepSVDD(OneClassModel[Sphere]):
    """Minus the squared distance ``||phi(x) - c||^2`` to a centre that a network draws the known images to.

    The one-class objective (eq. 4), the mean squared distance and weight decay, on an encoder that was pre-trained
    as an autoencoder. The centre is the mean of what that one says of the known images, and stays; a coordinate
    nearer to 0 than 0.1 is moved there.

    Parameters
    ----------
    width : of the code, a multiple of 16.
    autoencoder_epochs, autoencoder_drop
        Epochs of pre-training, and the one at which its learning rate falls to a tenth.
    epochs, drop : the same of the training.
    batch_size, lr, weight_decay : of both, by Adam.
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
        centre = predict(pretrained, images, context).mean(0)
        centre = torch.where(centre.abs() < _LEAST, torch.where(centre < 0, -_LEAST, _LEAST), centre)
        sphere = Sphere(pretrained[0], pretrained[1], centre)

        def step(parts: Parts, pixels: Tensor, epoch: int) -> Losses:
            yield "encoder", (parts["encoder"](sphere.normalize(pixels)) - sphere.centre).square().sum(1).mean()

        train_steps(
            sphere,
            images,
            step,
            {"encoder": adam(sphere.encoder.parameters(), self.lr, weight_decay=self.weight_decay)},
            epochs=self.epochs,
            batch_size=self.batch_size,
            settings=settings,
            context=context.part("sphere"),
            drop=self.drop,
        )
        return sphere

    def _scores(self, model: Sphere, images: Tensor, context: TrainContext) -> dict[str, Tensor]:
        return {"Deep-SVDD": -predict(model, images, context)}
