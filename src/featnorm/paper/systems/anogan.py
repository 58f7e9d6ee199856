"""AnoGAN (Schlegl et al., Unsupervised Anomaly Detection with Generative Adversarial Networks, IPMI 2017)."""

from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from featnorm._utils.layout import safe_gradients
from featnorm._utils.progress import progress_bar
from featnorm.paper.images import as_pixels
from featnorm.paper.systems.base import OneClassModel, TrainContext
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


class GAN(nn.Module):
    """A generator, and a discriminator in two parts, of which the first computes the features.

    Attributes
    ----------
    start : (1, latent), start of every search, so that a score depends on no other image.
    """

    start: Tensor

    def __init__(self, latent: int, width: int) -> None:
        super().__init__()
        self.generator = Generator(latent, width)
        self.features = Convolutions(width)
        self.head = RealLogit(width)
        initialize(self)
        self.register_buffer("start", uniform(1, latent, torch.device("cpu")))


@dataclass(frozen=True)
class AnoGAN(OneClassModel[GAN]):
    """Minus the loss of the most similar image that a GAN of the training images generates.

    ``-((1 - weight) sum|x - G(z)| + weight sum|f(x) - f(G(z))|)``, the residual and the discrimination loss by
    feature matching: f is the discriminator's last hidden layer, and z is found by gradient descent from one
    random start for all images. The GAN is a DCGAN, with the 256 latent dimensions that it has for CIFAR-10 in
    Ruff et al. (ICML 2018), whose numbers are the published ones.

    Parameters
    ----------
    latent : dimensions of z.
    width : a quarter of the channels of the widest maps.
    epochs, batch_size, lr, beta1
        Settings of the GAN's training, by Adam; an epoch of AnoGAN's 20 has a million patches.
    search_steps, search_lr : settings of the search for z, by Adam; the paper of AnoGAN states no learning rate.
    weight : weight of the discrimination loss.
    """

    latent: int = 256
    width: int = 64
    epochs: int = 100
    batch_size: int = 128
    lr: float = 2e-4
    beta1: float = 0.5
    search_steps: int = 500
    search_lr: float = 0.01
    weight: float = 0.1

    def _train(self, images: Tensor, context: TrainContext) -> GAN:
        model = GAN(self.latent, self.width)

        def step(parts: Parts, pixels: Tensor, epoch: int) -> Losses:
            def logits(images: Tensor) -> Tensor:
                return parts["head"](parts["features"](images))

            generated = parts["generator"](uniform(len(pixels), self.latent, pixels.device))
            real = adversarial(logits(centered(pixels)), True)
            yield "discriminator", real + adversarial(logits(generated.detach()), False)
            yield "generator", adversarial(logits(generated), True)

        train_steps(
            model,
            images,
            step,
            {
                "discriminator": adam(
                    [*model.features.parameters(), *model.head.parameters()], self.lr, beta1=self.beta1
                ),
                "generator": adam(model.generator.parameters(), self.lr, beta1=self.beta1),
            },
            asdict(self),
            context,
        )
        return model

    def _scores(self, model: GAN, images: Tensor, runtime: Runtime) -> dict[str, Tensor]:
        found = []
        with progress_bar(total=len(images), desc="search", progress=runtime.progress) as bar:
            for batch in images.split(self.batch_size):
                pixels = centered(as_pixels(batch, runtime.torch_device))
                found.append(-self.search(model, pixels, runtime)[1].cpu())
                bar.update(len(batch))
        return {"AnoGAN": torch.cat(found)}

    def search(self, model: GAN, images: Tensor, runtime: Runtime) -> tuple[Tensor, Tensor]:
        """Find the latent vectors whose images are most similar.

        Parameters
        ----------
        model : what `train` returned.
        images : (n, 3, 32, 32) between -1 and 1, on the device of the model.
        runtime : precision.

        Returns
        -------
        The latent vectors (n, latent) after the last step, and their losses (n,), which are anomaly scores.
        """
        with torch.inference_mode(False), torch.enable_grad(), safe_gradients(model):
            z = model.start.repeat(len(images), 1).requires_grad_()
            optimizer = adam([z], self.search_lr)
            with torch.no_grad(), runtime.autocast():
                target = model.features(images)
            for _ in range(self.search_steps):
                (z.grad,) = torch.autograd.grad(self._loss(model, images, target, z, runtime).sum(), z)
                optimizer.step()
            with torch.no_grad():
                return z.detach(), self._loss(model, images, target, z, runtime)

    def _loss(self, model: GAN, images: Tensor, target: Tensor, z: Tensor, runtime: Runtime) -> Tensor:
        with runtime.autocast():
            generated = model.generator(z)
            features = model.features(generated)
        residual = (images - generated.float()).abs().sum((1, 2, 3))
        discrimination = (target.float() - features.float()).abs().sum((1, 2, 3))
        return (1 - self.weight) * residual + self.weight * discrimination
