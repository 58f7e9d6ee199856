"""What to train on and how: the paper's label schemes and the settings of its appendices."""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

Scheme = Literal["S", "I", "Is", "R", "O"]


@dataclass(frozen=True)
class Recipe:
    """The settings of a training run.

    Parameters
    ----------
    epochs, batch_size : passes over the data, and inputs a step (over all processes).
    optimiser : "sgd", with its momentum, or "adamw".
    lr : the learning rate of the first step; it falls to 0 by a cosine.
    momentum, weight_decay : of the optimiser; weight decay 0 is none.
    augment : random crops (padding of an eighth, mirrored) and horizontal flips.

    Raises
    ------
    ValueError
        A number that must be positive is not, or the optimiser is unknown.
    """

    epochs: int
    batch_size: int
    optimiser: Literal["sgd", "adamw"]
    lr: float
    momentum: float = 0.9
    weight_decay: float = 0.0
    augment: bool = False

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "lr"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)!r}")
        if self.optimiser not in ("sgd", "adamw"):
            raise ValueError(f"there is no optimiser {self.optimiser!r}: use sgd or adamw")

    def under(self, scheme: Scheme) -> "Recipe":
        """Return the recipe with the augmentation that a label scheme means: I, R and O none, Is always."""
        return replace(self, augment=scheme == "Is" or (scheme == "S" and self.augment))


#: The paper's own settings by the section that gives them. "Other setups follow the default setting in PyTorch":
#: no weight decay for SGD, 0.01 for AdamW.
PRESETS = {
    "A.3.1": Recipe(epochs=200, batch_size=256, optimiser="adamw", lr=1e-3, weight_decay=0.01),
    "B": Recipe(epochs=200, batch_size=256, optimiser="sgd", lr=0.06),
    "C.1": Recipe(epochs=800, batch_size=512, optimiser="sgd", lr=0.03, augment=True),
    "D.4": Recipe(epochs=10, batch_size=256, optimiser="sgd", lr=0.03),
}


def scheme_labels(scheme: Scheme, labels: Tensor, seed: int = 0) -> tuple[Tensor, int]:
    """Return the targets (n,) of a label scheme and their number of classes (paper B).

    "S" takes the labels; "I" makes each image its own class; "Is" does too, for augmented images (see
    `Recipe.under`); "R" gives each image a random bit; "O" puts all into one class.

    Raises
    ------
    ValueError
        The scheme is unknown, or it is "S" and an input has no label.
    """
    n = len(labels)
    match scheme:
        case "S":
            if (labels < 0).any():
                first = int((labels < 0).nonzero()[0])
                raise ValueError(f"scheme S trains on labels, and input {first} has none; Is needs none")
            return labels.long(), int(labels.max()) + 1
        case "I" | "Is":
            return torch.arange(n), n
        case "R":
            return torch.randint(0, 2, (n,), generator=torch.Generator().manual_seed(seed)), 2
        case "O":
            return torch.zeros(n, dtype=torch.int64), 1
    raise ValueError(f"there is no label scheme {scheme!r}: use S, I, Is, R or O (paper B)")
