"""`Recipe`: the settings of a training run."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from featnorm.training.objectives import CrossEntropy, Objective


@dataclass(frozen=True)
class Recipe:
    """The settings of a training run that minimizes the cross entropy of labels.

    Parameters
    ----------
    epochs, batch_size : number of passes over the data, and inputs per step (over all processes).
    optimizer : "sgd" (with momentum) or "adamw".
    lr : maximum learning rate, which decreases to 0 along a cosine.
    momentum, nesterov : momentum of SGD, and whether to use Nesterov momentum.
    weight_decay : weight decay of the optimizer. Default: 0.
    warmup : share of the steps over which the learning rate increases linearly.
    augment : whether to use random crops (mirrored padding of an eighth) and horizontal flips.
    crop, crop_share
        Side of square crops, in pixels, and share of the steps, from the first on, in which to train on them; the
        rest use whole images. Smaller crops reduce the cost of convolutions. Default: whole images.

    Raises
    ------
    ValueError
        A number is out of range, or the optimizer is unknown.
    """

    epochs: int
    batch_size: int
    optimizer: str
    lr: float
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 0.0
    warmup: float = 0.0
    augment: bool = False
    crop: int | None = None
    crop_share: float = 0.7

    #: Names of the optimizers.
    optimizers: ClassVar[tuple[str, ...]] = ("sgd", "adamw")

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "lr"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)!r}")
        for name in ("warmup", "crop_share"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be a share of the steps below 1, got {getattr(self, name)!r}")
        if self.optimizer not in self.optimizers:
            raise ValueError(f"unknown optimizer {self.optimizer!r}: use one of {', '.join(self.optimizers)}")
        if self.crop is not None and not self.augment:
            raise ValueError("crops are an augmentation: set augment=True, or crop=None")

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain data, which identify a run."""
        return asdict(self)

    def make_objective(self) -> Objective:
        """Return the objective of the run."""
        return CrossEntropy(self)

    def make_optimizer(self, parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
        """Return an optimizer of the parameters."""
        if self.optimizer == "adamw":
            return torch.optim.AdamW(parameters, lr=self.lr, weight_decay=self.weight_decay)
        return torch.optim.SGD(
            parameters,
            lr=self.lr,
            momentum=self.momentum,
            nesterov=self.nesterov,
            weight_decay=self.weight_decay,
        )
