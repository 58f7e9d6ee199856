"""OCGAN, GANs with constrained latent representations (Perera et al., CVPR 2019)."""

from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from featnorm.paper.systems.base import OneClassModel, TrainContext, predict
from featnorm.paper.systems.dcgan import (
    Convolutions,
    Generator,
    RealLogit,
    adversarial,
    centered,
    initialize,
    uniform,
)
from featnorm.paper.systems.steps import Losses, Parts, adam, train_steps
from featnorm.runtime import Runtime

# Widths of the latent discriminator.
_LAYERS = (128, 64, 32, 16)


class OneClassGAN(nn.Module):
    """A denoising autoencoder with codes in [-1, 1], discriminators of its codes and images, and a classifier."""

    def __init__(self, latent: int, width: int, discriminator_width: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            Convolutions(width), nn.Flatten(), nn.Linear(64 * width, latent, bias=False), nn.Tanh()
        )
        self.decoder = Generator(latent, width)
        layers: list[nn.Module] = []
        inputs = latent
        for outputs in _LAYERS:
            layers += [nn.Linear(inputs, outputs), nn.ReLU()]
            inputs = outputs
        self.latent_discriminator = nn.Sequential(*layers, nn.Linear(inputs, 1))
        self.visual_discriminator = nn.Sequential(
            Convolutions(discriminator_width), RealLogit(discriminator_width)
        )
        self.classifier = nn.Sequential(Convolutions(discriminator_width), RealLogit(discriminator_width))
        initialize(self)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the mean squared reconstruction error (n,) of images, pixels in [0, 1]."""
        images = centered(pixels)
        return (self.decoder(self.encoder(images)).float() - images).square().mean((1, 2, 3))


@dataclass(frozen=True)
class OCGAN(OneClassModel[OneClassGAN]):
    """Minus the reconstruction error of an autoencoder whose whole latent space is trained to decode to the class.

    A latent discriminator makes the codes, in a cube, uniformly distributed; a visual discriminator makes the
    images decoded from uniform codes similar to the training images. A classifier distinguishes reconstructions
    from images decoded from uniform codes: in the last part of the training, gradient descent finds codes whose
    images it rejects (informative-negative mining), and these replace the uniform codes for the decoder.

    The steps, weights and mining are those of the authors' code; their paper states 10 as the weight of the
    reconstruction. They enlarge the images of CIFAR-10 to 61 x 61; here they are 32 x 32, on maps half the size.

    Parameters
    ----------
    latent : dimensions of the code.
    width : a quarter of the channels of the autoencoder's widest maps.
    discriminator_width : the same for the visual discriminator and the classifier.
    epochs, batch_size, lr, beta1 : settings of the training, by Adam.
    noise : standard deviation of the noise added to images in [-1, 1].
    reconstruction, latent_weight
        Weights of the mean squared error and of the latent discriminator; that of the visual discriminator is 1.
    mining : share of the epochs before mining starts.
    mining_steps, mining_lr : steps and learning rate of the gradient descent on the codes, before a tanh.
    """

    latent: int = 256
    width: int = 64
    discriminator_width: int = 12
    epochs: int = 200
    batch_size: int = 512
    lr: float = 2e-4
    beta1: float = 0.5
    noise: float = 0.2**0.5
    reconstruction: float = 250.0
    latent_weight: float = 10.0
    mining: float = 0.75
    mining_steps: int = 1
    mining_lr: float = 2.0

    def _train(self, images: Tensor, context: TrainContext) -> OneClassGAN:
        model = OneClassGAN(self.latent, self.width, self.discriminator_width)

        def step(parts: Parts, pixels: Tensor, epoch: int) -> Losses:
            clean = centered(pixels)
            noisy = clean + self.noise * torch.randn_like(clean)
            random = uniform(len(pixels), self.latent, pixels.device)
            with torch.no_grad():
                code = parts["encoder"](noisy)
                rebuilt = parts["decoder"](code)
                generated = parts["decoder"](random)
            real = adversarial(parts["classifier"](rebuilt), True)
            yield "classifier", (real + adversarial(parts["classifier"](generated), False)) / 2
            real = adversarial(parts["latent_discriminator"](random), True)
            latent = (real + adversarial(parts["latent_discriminator"](code), False)) / 2
            real = adversarial(parts["visual_discriminator"](clean), True)
            visual = (real + adversarial(parts["visual_discriminator"](generated), False)) / 2
            yield "discriminators", latent + visual
            mined = epoch >= self.mining * self.epochs
            negative = self.mine(model, random, context.runtime) if mined else random
            code = parts["encoder"](noisy)
            error = (parts["decoder"](code) - clean).square().mean()
            visual = adversarial(parts["visual_discriminator"](parts["decoder"](negative)), True)
            latent = adversarial(parts["latent_discriminator"](code), True)
            yield "autoencoder", visual + self.latent_weight * latent + self.reconstruction * error

        def optimizer(*trained: nn.Module) -> torch.optim.Adam:
            parameters = [parameter for part in trained for parameter in part.parameters()]
            return adam(parameters, self.lr, beta1=self.beta1)

        train_steps(
            model,
            images,
            step,
            {
                "classifier": optimizer(model.classifier),
                "discriminators": optimizer(model.latent_discriminator, model.visual_discriminator),
                "autoencoder": optimizer(model.encoder, model.decoder),
            },
            asdict(self),
            context,
        )
        return model

    def mine(self, model: OneClassGAN, start: Tensor, runtime: Runtime) -> Tensor:
        """Return codes (n, latent) close to the given ones whose images the classifier rejects.

        Parameters
        ----------
        model : its decoder and classifier are used.
        start : codes (n, latent) in [-1, 1]; the result passes through a tanh.
        runtime : precision.
        """
        codes = start.detach().requires_grad_()
        for _ in range(self.mining_steps):
            # Not the parts as fabric wraps them, which allow only the gradients of the training.
            with runtime.autocast():
                logits = model.classifier(model.decoder(codes.tanh()))
            # Each code has a loss of its own, however many there are.
            (gradient,) = torch.autograd.grad(len(codes) * adversarial(logits.float(), False), codes)
            codes = (codes - self.mining_lr * gradient).detach().requires_grad_()
        return codes.tanh().detach()

    def _scores(self, model: OneClassGAN, images: Tensor, runtime: Runtime) -> dict[str, Tensor]:
        return {"OCGAN": -predict(model, images, runtime)}
