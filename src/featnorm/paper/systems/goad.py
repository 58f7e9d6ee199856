"""GOAD (Bergman and Hoshen, Classification-Based Anomaly Detection for General Data, ICLR 2020), for images."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from featnorm._utils.layout import fast_layout
from featnorm.paper.systems.base import OneClassModel, TrainContext, predict
from featnorm.paper.systems.geometry import TRANSFORMATIONS, WideResNet, transform
from featnorm.paper.systems.steps import Losses, Parts, adam, train_steps
from featnorm.runtime import Runtime

_COUNT = len(TRANSFORMATIONS)
# Images per batch of distances to all centers.
_QUERIES = 1000


class Centers(nn.Module):
    """A network that reads transformed images, and the center of each transformation's features.

    Attributes
    ----------
    centers : (72, D), mean features of the training images.
    """

    centers: Tensor

    def __init__(self, network: WideResNet) -> None:
        super().__init__()
        self.features = network.features
        self.classifier = network.classifier
        self.register_buffer("centers", torch.zeros(_COUNT, network.classifier.in_features))

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the features (n, 72, D) of each transformation of images, pixels in [0, 1]."""
        return _extract(self.features, pixels)


def _extract(features: Callable[[Tensor], Tensor], pixels: Tensor) -> Tensor:
    views = 2 * fast_layout(transform(pixels).flatten(0, 1)) - 1
    return features(views).float().unflatten(0, (len(pixels), _COUNT))


@dataclass(frozen=True)
class GOAD(OneClassModel[Centers]):
    """The sum over 72 transformations of an image of the log-probability of the correct transformation.

    ``P(m | T_m'(x))`` is ``exp(-||f(T_m'(x)) - c_m||^2) + epsilon``, over its sum over m: a softmax of the
    distances to the transformations' centers. ``epsilon`` keeps it uncertain for features that are far from all
    centers. f is trained by a triplet-center loss, and by the cross entropy of a linear classifier, as the authors
    do for images.

    Parameters
    ----------
    depth, width : see `WideResNet`; f is its pooled feature.
    epochs, batch_size, lr
        Settings of the training, by Adam; a step has ``batch_size`` images in all transformations.
    margin, triplet_weight : margin and weight of the triplet-center loss.
    norm_weight : weight of the mean square of the features.
    epsilon : see above; 0 for images in the authors' code.
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

    def _train(self, images: Tensor, context: TrainContext) -> Centers:
        model = Centers(WideResNet(self.depth, self.width, _COUNT))
        targets = torch.arange(_COUNT, device=context.runtime.torch_device).repeat(self.batch_size)

        def step(parts: Parts, pixels: Tensor, epoch: int) -> Losses:
            features = _extract(parts["features"], pixels)
            entropy = nn.functional.cross_entropy(parts["classifier"](features.flatten(0, 1)), targets)
            triplet = triplet_center_loss(features, self.margin)
            yield "network", entropy + self.triplet_weight * triplet + self.norm_weight * features.square().mean()

        train_steps(model, images, step, {"network": adam(model.parameters(), self.lr)}, asdict(self), context)
        features = predict(model, images, context.runtime, batch_size=self.batch_size)
        model.centers.copy_(features.double().mean(0))
        return model

    def _scores(self, model: Centers, images: Tensor, runtime: Runtime) -> dict[str, Tensor]:
        parts = []
        for batch in images.split(_QUERIES):
            features = predict(model, batch, runtime, batch_size=self.batch_size)
            parts.append(log_probability(features, model.centers.cpu(), self.epsilon).sum(1))
        return {"GOAD": torch.cat(parts)}


def triplet_center_loss(features: Tensor, margin: float) -> Tensor:
    """Return the mean of ``max(0, own + margin - other)``, squared distances to own and nearest other center.

    Parameters
    ----------
    features : (n, m, D), of m transformations of n images; a transformation's center is the mean over the images.
    margin : by how much the own center should be closer.
    """
    squared = _squared(features, features.mean(0))
    own = squared.diagonal(dim1=1, dim2=2)
    itself = torch.eye(squared.shape[1], dtype=torch.bool, device=squared.device)
    other = squared.masked_fill(itself, torch.inf).amin(2)
    return (own + margin - other).clamp_min(0).mean()


def log_probability(features: Tensor, centers: Tensor, epsilon: float) -> Tensor:
    """Return the log-probability (n, m) of the correct transformation.

    Parameters
    ----------
    features : (n, m, D), of m transformations of n images.
    centers : (m, D).
    epsilon : number added to the exponential of each distance.
    """
    near = -_squared(features.double(), centers.double())
    if epsilon:
        near = torch.logaddexp(near, torch.full_like(near, math.log(epsilon)))
    return near.log_softmax(2).diagonal(dim1=1, dim2=2)


def _squared(features: Tensor, centers: Tensor) -> Tensor:
    """Return the squared distances (n, m, m') of features (n, m, D) to centers (m', D)."""
    return torch.cdist(features, centers[None], compute_mode="donot_use_mm_for_euclid_dist").square()
