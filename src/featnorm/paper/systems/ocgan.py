"""OCGAN, GANs with constrained latent representations (Perera et al., CVPR 2019)."""

from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from featnorm.paper.systems.dcgan import (
    Convolutions,
    Generator,
    Verdict,
    adversarial,
    centred,
    initialise,
    uniform,
)
from featnorm.paper.systems.steps import Losses, Parts, adam, train_steps
from featnorm.paper.systems.system import OneClassModel, TrainContext, predict

# Of the latent discriminator.
_LAYERS = (128, 64, 32, 16)


class OneClassGAN(nn.Module):
    """A denoising autoencoder with a code between -1 and 1, what judges its codes and images, and a classifier."""

    def __init__(self, latent: int, width: int, judge_width: int) -> None:
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
        self.latent_judge = nn.Sequential(*layers, nn.Linear(inputs, 1))
        self.visual_judge = nn.Sequential(Convolutions(judge_width), Verdict(judge_width))
        self.classifier = nn.Sequential(Convolutions(judge_width), Verdict(judge_width))
        initialise(self)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the mean squared error (n,) of what the autoencoder makes of images, pixels in [0, 1]."""
        images = centred(pixels)
        return (self.decoder(self.encoder(images)).float() - images).square().mean((1, 2, 3))


@dataclass(frozen=True)
class OCGAN(OneClassModel[OneClassGAN]):
    """Minus the mean squared error of an autoencoder whose whole latent space is to make images of the class.

    Its codes, in a cube, are drawn to the uniform distribution by a latent discriminator, and what the decoder
    makes of uniform codes to the known images by a visual one. A classifier tells reconstructions from those:
    codes that it takes for none of the class are sought by gradient descent (informative-negative mining) and take
    the place of the uniform ones, for the decoder, in the last part of the training.

    The steps, weights and mining are those of the authors' code; their paper prints 10 for the weight of the
    reconstruction. Their images of CIFAR-10 are enlarged to 61 x 61; here they are 32 x 32, on maps half the size.

    Parameters
    ----------
    latent, width : dimensions of the code, and channels of the autoencoder's widest maps over four.
    judge_width : the same of the visual discriminator and the classifier.
    epochs, batch_size, lr, beta1 : of the training, by Adam.
    noise : standard deviation of what is added to images between -1 and 1.
    reconstruction, latent_weight
        Of the mean squared error, and of the latent discriminator, against the visual one's weight of 1.
    mining : the share of the epochs before mining sets in.
    mining_steps, mining_lr : of the gradient descent on the codes, before a tanh.
    """

    latent: int = 256
    width: int = 64
    judge_width: int = 12
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
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(context.seed)
            model = OneClassGAN(self.latent, self.width, self.judge_width)

        def step(parts: Parts, pixels: Tensor, epoch: int) -> Losses:
            clean = centred(pixels)
            noisy = clean + self.noise * torch.randn_like(clean)
            random = uniform(len(pixels), self.latent, pixels.device)
            with torch.no_grad():
                code = parts["encoder"](noisy)
                rebuilt = parts["decoder"](code)
                made = parts["decoder"](random)
            real = adversarial(parts["classifier"](rebuilt), True)
            yield "classifier", (real + adversarial(parts["classifier"](made), False)) / 2
            real = adversarial(parts["latent_judge"](random), True)
            latent = (real + adversarial(parts["latent_judge"](code), False)) / 2
            real = adversarial(parts["visual_judge"](clean), True)
            visual = (real + adversarial(parts["visual_judge"](made), False)) / 2
            yield "discriminators", latent + visual
            mined = epoch >= self.mining * self.epochs
            negative = self.mine(model, random, context) if mined else random
            code = parts["encoder"](noisy)
            error = (parts["decoder"](code) - clean).square().mean()
            looks = adversarial(parts["visual_judge"](parts["decoder"](negative)), True)
            lies = adversarial(parts["latent_judge"](code), True)
            yield "autoencoder", looks + self.latent_weight * lies + self.reconstruction * error

        def optimizer(*trained: nn.Module) -> torch.optim.Adam:
            parameters = [parameter for part in trained for parameter in part.parameters()]
            return adam(parameters, self.lr, beta1=self.beta1)

        train_steps(
            model,
            images,
            step,
            {
                "classifier": optimizer(model.classifier),
                "discriminators": optimizer(model.latent_judge, model.visual_judge),
                "autoencoder": optimizer(model.encoder, model.decoder),
            },
            epochs=self.epochs,
            batch_size=self.batch_size,
            settings=asdict(self),
            context=context,
        )
        return model

    def mine(self, model: OneClassGAN, start: Tensor, context: TrainContext) -> Tensor:
        """Return codes (n, latent) near others whose images the classifier takes for none of the class.

        Parameters
        ----------
        model : with the decoder and the classifier.
        start : codes (n, latent), between -1 and 1; what is descended from passes a tanh.
        context : precision.
        """
        codes = start.detach().requires_grad_()
        for _ in range(self.mining_steps):
            # Not by the parts as fabric wraps them, which take no gradient but the training's.
            with context.autocast():
                logits = model.classifier(model.decoder(codes.tanh()))
            # Of each code its own loss, whatever their number.
            (gradient,) = torch.autograd.grad(len(codes) * adversarial(logits.float(), False), codes)
            codes = (codes - self.mining_lr * gradient).detach().requires_grad_()
        return codes.tanh().detach()

    def _scores(self, model: OneClassGAN, images: Tensor, context: TrainContext) -> dict[str, Tensor]:
        return {"OCGAN": -predict(model, images, context)}
