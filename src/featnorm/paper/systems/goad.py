"""GOAD (Bergman and Hoshen, Classification-Based Anomaly Detection for General Data, ICLR 2020), for images."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from featnorm._utils.layout import fast_layout
from featnorm.paper.systems.geometry import TRANSFORMATIONS, WideResNet, transform
from featnorm.paper.systems.steps import Losses, Parts, adam, train_steps
from featnorm.paper.systems.system import OneClassModel, TrainContext, predict

_COUNT = len(TRANSFORMATIONS)
# Images whose distances to all centres are held at once.
_QUERIES = 1000


class Centres(nn.Module):
    """A network of transformed images, and the centre of each transformation's features.

    Attributes
    ----------
    centres : (72, D), the mean features of the known images.
    """

    centres: Tensor

    def __init__(self, network: WideResNet) -> None:
        super().__init__()
        self.features = network.features
        self.classifier = network.classifier
        self.register_buffer("centres", torch.zeros(_COUNT, network.classifier.in_features))

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the features (n, 72, D) of each transformation of images, pixels in [0, 1]."""
        return _ask(self.features, pixels)


def _ask(features: Callable[[Tensor], Tensor], pixels: Tensor) -> Tensor:
    views = 2 * fast_layout(transform(pixels).flatten(0, 1)) - 1
    return features(views).float().unflatten(0, (len(pixels), _COUNT))


@dataclass(frozen=True)
class GOAD(OneClassModel[Centres]):
    """The log-probability that each of 72 transformations of an image is known for what it is, summed.

    ``P(m | T_m'(x))`` is ``exp(-||f(T_m'(x)) - c_m||^2) + epsilon``, over its sum over m: a softmax of the
    distances to the transformations' centres, which an ``epsilon`` keeps from being sure of what is far from all.
    f is trained by a triplet-centre loss, and by cross entropy of a linear classifier, as the authors do for
    images.

    Parameters
    ----------
    depth, width : of the `WideResNet`, whose pooled feature f is.
    epochs, batch_size, lr : of the training, by Adam; a step is of so many images in all transformations.
    margin, triplet_weight : of the triplet-centre loss.
    norm_weight : of the mean square of the features.
    epsilon : see above; the authors' code has 0 for images.
    """

    depth: int = 10
    width: int = 4
    epochs: int = 16
    batch_size: int = 4
    lr: float = 1e-3
    margin: float = 1.0
    triplet_weight: float = 0.1
    norm_weight: float = 10.0
    epsilon: float = 0.0

    def _train(self, images: Tensor, context: TrainContext) -> Centres:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(context.seed)
            model = Centres(WideResNet(self.depth, self.width, _COUNT))
        targets = torch.arange(_COUNT, device=context.device).repeat(self.batch_size)

        def step(parts: Parts, pixels: Tensor, epoch: int) -> Losses:
            features = _ask(parts["features"], pixels)
            entropy = nn.functional.cross_entropy(parts["classifier"](features.flatten(0, 1)), targets)
            triplet = triplet_centre_loss(features, self.margin)
            yield "network", entropy + self.triplet_weight * triplet + self.norm_weight * features.square().mean()

        train_steps(
            model,
            images,
            step,
            {"network": adam(model.parameters(), self.lr)},
            epochs=self.epochs,
            batch_size=self.batch_size,
            settings=asdict(self),
            context=context,
        )
        known = predict(model, images, context, batch_size=self.batch_size)
        model.centres.copy_(known.double().mean(0))
        return model

    def _scores(self, model: Centres, images: Tensor, context: TrainContext) -> dict[str, Tensor]:
        centres = model.centres.cpu()
        parts = [
            log_probability(predict(model, batch, context, batch_size=self.batch_size), centres, self.epsilon).sum(
                1
            )
            for batch in images.split(_QUERIES)
        ]
        return {"GOAD": torch.cat(parts)}


def triplet_centre_loss(features: Tensor, margin: float) -> Tensor:
    """Return how far features are from their centre, beyond the nearest other one less a margin.

    Parameters
    ----------
    features : (n, m, D), of m transformations of n images; a transformation's centre is the mean over the images.
    margin : by which the own centre is to be nearer.
    """
    squared = _squared(features, features.mean(0))
    own = squared.diagonal(dim1=1, dim2=2)
    itself = torch.eye(squared.shape[1], dtype=torch.bool, device=squared.device)
    other = squared.masked_fill(itself, torch.inf).amin(2)
    return (own + margin - other).clamp_min(0).mean()


def log_probability(features: Tensor, centres: Tensor, epsilon: float) -> Tensor:
    """Return the log-probability (n, m) that each transformation is known for what it is.

    Parameters
    ----------
    features : (n, m, D), of m transformations of n images.
    centres : (m, D).
    epsilon : is added to each exponential of a distance.
    """
    near = -_squared(features.double(), centres.double())
    if epsilon:
        near = torch.logaddexp(near, torch.full_like(near, math.log(epsilon)))
    return near.log_softmax(2).diagonal(dim1=1, dim2=2)


def _squared(features: Tensor, centres: Tensor) -> Tensor:
    """Return the squared distances (n, m, m') of features (n, m, D) to centres (m', D)."""
    return torch.cdist(features, centres[None], compute_mode="donot_use_mm_for_euclid_dist").square()
