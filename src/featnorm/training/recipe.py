"""What to train on and how: the paper's label schemes and the settings of its appendices."""

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

Scheme = Literal["S", "I", "Is", "R", "O"]
Objective = Literal["cross_entropy", "supcon"]


@dataclass(frozen=True)
class Recipe:
    """The settings of a training run.

    Parameters
    ----------
    epochs, batch_size : passes over the data, and inputs a step (over all processes).
    optimiser : "sgd", with its momentum, or "adamw".
    lr : the highest learning rate; it falls to 0 by a cosine.
    momentum, nesterov : of SGD.
    weight_decay : of the optimiser; 0 is none.
    warmup : the share of the steps over which the learning rate rises, by a line.
    augment : random crops (padding of an eighth, mirrored) and horizontal flips.
    crop, crop_share
        Train on crops of this side, in pixels, for this share of the steps at first, and on whole images after
        it: convolutions cost by the area. None for whole images throughout.
    objective
        "cross_entropy" on the logits that the model returns, or "supcon" on the embeddings that it returns, of
        two augmented views of each input.
    temperature : of supcon; that of the logits is the model's.

    Raises
    ------
    ValueError
        A number is out of its range, the optimiser or the objective is unknown, or supcon has no augmentation.
    """

    epochs: int
    batch_size: int
    optimiser: Literal["sgd", "adamw"]
    lr: float
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 0.0
    warmup: float = 0.0
    augment: bool = False
    crop: int | None = None
    crop_share: float = 0.7
    objective: Objective = "cross_entropy"
    temperature: float = 0.1

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "lr", "temperature"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)!r}")
        for name in ("warmup", "crop_share"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be a share of the steps below 1, got {getattr(self, name)!r}")
        if self.optimiser not in ("sgd", "adamw"):
            raise ValueError(f"there is no optimiser {self.optimiser!r}: use sgd or adamw")
        if self.objective not in get_args(Objective):
            known = ", ".join(get_args(Objective))
            raise ValueError(f"there is no objective {self.objective!r}: use one of {known}")
        if self.objective == "supcon" and not self.augment:
            raise ValueError("supcon compares augmented views of each input: set augment=True")
        if self.crop is not None and not self.augment:
            raise ValueError("crops are an augmentation: set augment=True, or crop=None")

    def settings(self) -> dict[str, Any]:
        """Return the settings as plain data, by which runs are told apart."""
        return asdict(self)

    def under(self, scheme: Scheme) -> "Recipe":
        """Return the recipe with the augmentation that a label scheme means: I, R and O none, Is always."""
        augment = scheme == "Is" or (scheme == "S" and self.augment)
        return replace(self, augment=augment, crop=self.crop if augment else None)


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
