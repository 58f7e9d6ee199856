"""Geom (Golan and El-Yaniv, Deep Anomaly Detection Using Geometric Transformations, NeurIPS 2018)."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from featnorm._utils.layout import fast_layout
from featnorm.paper.recipe import PaperRecipe
from featnorm.paper.systems.base import OneClassModel, TrainContext, predict
from featnorm.paper.systems.geometry import TRANSFORMATIONS, WideResNet, transform
from featnorm.runtime import Runtime
from featnorm.training import train

_COUNT = len(TRANSFORMATIONS)
# Images per batch, each in all its transformations.
_IMAGES = 16


RECIPE = PaperRecipe(epochs=3, batch_size=128, optimizer="adamw", lr=1e-3, weight_decay=5e-4)


class Transformed(nn.Module):
    """A classifier of transformations, and a Dirichlet distribution of its outputs for each transformation.

    Attributes
    ----------
    concentration : (72, 72), parameters of the distributions, fitted to the training images.
    """

    concentration: Tensor

    def __init__(self, network: WideResNet) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("concentration", torch.ones(_COUNT, _COUNT, dtype=torch.float64))

    def forward(self, pixels: Tensor) -> Tensor:
        """Return log-softmax outputs (n, 72, 72), by transformation of an image and by class."""
        views = fast_layout(transform(pixels).flatten(0, 1))
        return self.network(views).float().log_softmax(1).unflatten(0, (len(pixels), _COUNT))


@dataclass(frozen=True)
class Geom(OneClassModel[Transformed]):
    """The confidence of a classifier of 72 transformations on the transformations of an image.

    "Geom" is the Dirichlet normality score: the mean over the transformations of ``sum_k (alpha_k - 1) log y_k``,
    where y are the softmax outputs and alpha is the concentration of their distribution over the training images,
    by maximum likelihood. "Geom, softmax sum" is the simplified score: the mean output for the correct
    transformation.

    Parameters
    ----------
    depth, width : see `WideResNet`.
    recipe
        Settings of its training on all transformations of the training images, one class for each. The authors'
        Adam has a constant learning rate, and weight decay in the gradient; here the rate falls along a cosine,
        and the decay is AdamW's.
    """

    depth: int = 10
    width: int = 4
    recipe: PaperRecipe = RECIPE

    def _train(self, images: Tensor, context: TrainContext) -> Transformed:
        network = WideResNet(self.depth, self.width, _COUNT)
        train(
            network,
            torch.cat([transform(batch).flatten(0, 1) for batch in images.split(_IMAGES)]),
            torch.arange(_COUNT).repeat(len(images)),
            self.recipe,
            folder=context.folder,
            runtime=context.runtime,
            seed=context.seed,
        )
        model = Transformed(network).eval()
        logs = predict(model, images, context.runtime, batch_size=_IMAGES).double()
        model.concentration.copy_(dirichlet(logs))
        return model

    def _scores(self, model: Transformed, images: Tensor, runtime: Runtime) -> dict[str, Tensor]:
        logs = predict(model, images, runtime, batch_size=_IMAGES).double()
        weights = model.concentration.cpu() - 1
        return {
            "Geom": (weights * logs).sum(2).mean(1),
            "Geom, softmax sum": logs.diagonal(dim1=1, dim2=2).exp().mean(1),
        }


def dirichlet(logs: Tensor) -> Tensor:
    """Return the concentrations (..., k) of Dirichlet distributions by maximum likelihood (Minka, 2000).

    Parameters
    ----------
    logs : (n, ..., k) float64, logarithms of n samples of each distribution.

    Raises
    ------
    ValueError
        All n samples are the same.
    """
    if not float(logs.std(0, correction=0).amax(-1).amin()) > 0:
        raise ValueError(f"the outputs for all {len(logs)} images are the same: train on different images")
    shares, mean = logs.exp().mean(0), logs.mean(0)
    # A start with the right sum (Wicker et al., 2008).
    euler = -torch.digamma(torch.ones((), dtype=logs.dtype))
    spread = (shares * (shares.log() - mean)).sum(-1, keepdim=True)
    concentration = shares * (shares.shape[-1] - 1) * euler / spread
    for _ in range(1000):
        before = concentration
        gradient = _gradient(before, mean)
        # Newton's step; its Hessian is a diagonal plus a constant. Where it does not reduce the gradient, Minka's
        # fixed point is taken, which always comes closer.
        scale = torch.polygamma(1, before).reciprocal()
        total = torch.polygamma(1, before.sum(-1, keepdim=True)).reciprocal()
        shared = (gradient * scale).sum(-1, keepdim=True) / (total - scale.sum(-1, keepdim=True))
        concentration = before + (gradient + shared) * scale
        nearer = _gradient(concentration, mean).norm(dim=-1) < gradient.norm(dim=-1)
        away = ~(nearer & (concentration > 0).all(-1))
        if bool(away.any()):
            fixed = _inverse_digamma(before[away].sum(-1, keepdim=True).digamma() + mean[away])
            concentration[away] = fixed
        if float((concentration - before).norm(dim=-1).amax()) < 1e-9:
            break
    return concentration


def _gradient(concentration: Tensor, mean: Tensor) -> Tensor:
    """Return the gradient of the likelihood (..., k), from the means of the logarithms (..., k)."""
    return concentration.sum(-1, keepdim=True).digamma() - concentration.digamma() + mean


def _inverse_digamma(y: Tensor) -> Tensor:
    """Return x with digamma(x) = y, by Newton's method from Minka's start."""
    x = torch.where(y >= -2.22, y.exp() + 0.5, -1 / (y - torch.digamma(torch.ones_like(y))))
    for _ in range(5):
        x = x - (x.digamma() - y) / torch.polygamma(1, x)
    return x
