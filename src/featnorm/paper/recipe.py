"""The paper's label schemes, objectives, and training settings."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from featnorm._utils.extras import import_extra
from featnorm.augmentation import SCALE
from featnorm.paper.objectives import CIDER, CSI, MoCo, RotNet, SimCLR, SupCon
from featnorm.training import Recipe
from featnorm.training.objectives import CrossEntropy, Objective

Scheme = Literal["S", "I", "Is", "R", "O"]

OBJECTIVES: dict[str, type[Objective]] = {
    "cross_entropy": CrossEntropy,
    "supcon": SupCon,
    "simclr": SimCLR,
    "moco": MoCo,
    "rotnet": RotNet,
    "cider": CIDER,
    "csi": CSI,
}
_COMPARE_VIEWS = ("supcon", "simclr", "moco", "cider", "csi")
# Settings that only some objectives read.
_READ_BY = {
    "scale": ("simclr", "moco", "cider", "csi"),
    "queue": ("moco",),
    "ema": ("moco", "cider"),
    "weight": ("cider", "csi"),
}


@dataclass(frozen=True)
class PaperRecipe(Recipe):
    """A `featnorm.training.Recipe` with the objectives of the paper, and LARS.

    Parameters
    ----------
    optimizer : "sgd" or "lars", with momentum, or "adamw".
    augment
        As in `featnorm.training.Recipe`; for simclr, moco, cider and csi the views of SimCLR, see
        `featnorm.augmentation.Distortion`.
    objective
        Name of the objective, see `featnorm.paper.objectives`. "cross_entropy" reads logits; "rotnet" reads four
        logits; "supcon", "simclr", "moco" and "cider" read embeddings of two augmented views of each input; "csi"
        reads a mapping with "embedding" and "logits", see `CSIHead`. "simclr", "moco", "rotnet" and "csi" need no
        labels.
    temperature : temperature of the objectives that read embeddings; that of the logits is in the model.
    scale : minimum area of the random resized crops of simclr, moco, cider and csi, as a share of the image.
    queue : number of keys that moco contrasts with.
    ema
        Share of the old value in a moving average: of moco's momentum encoder, at each step, or of cider's
        prototypes, at each input.
    weight : weight of cider's compactness loss, or of csi's rotation loss; the other loss has weight 1.

    Raises
    ------
    ValueError
        A number is out of its range, the optimizer or the objective is unknown, or an objective that compares
        views has no augmentation.
    """

    objective: str = "cross_entropy"
    temperature: float = 0.1
    scale: float = SCALE
    queue: int = 4096
    ema: float = 0.99
    weight: float = 1.0

    optimizers: ClassVar[tuple[str, ...]] = ("sgd", "lars", "adamw")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("temperature", "weight"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)!r}")
        if not 0 < self.scale <= 1:
            raise ValueError(f"scale must be a share of the image's area, got {self.scale!r}")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema must be a share below 1, got {self.ema!r}")
        if self.objective not in OBJECTIVES:
            raise ValueError(f"unknown objective {self.objective!r}: use one of {', '.join(OBJECTIVES)}")
        if self.objective in _COMPARE_VIEWS and not self.augment:
            raise ValueError(f"{self.objective} compares augmented views of each input: set augment=True")
        if self.objective == "moco" and self.queue < self.batch_size:
            raise ValueError(f"a queue of {self.queue} does not hold the keys of a batch of {self.batch_size}")

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain data, without those that the objective does not read."""
        unread = {name for name, objectives in _READ_BY.items() if self.objective not in objectives}
        return {name: value for name, value in super().to_dict().items() if name not in unread}

    def make_objective(self) -> Objective:
        """Return the objective of the run."""
        return OBJECTIVES[self.objective](self)

    def make_optimizer(self, parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
        """Return the optimizer of these parameters."""
        if self.optimizer == "lars":
            # Trust ratios for every weight, decayed or not, as in You et al. (2017), algorithm 1.
            return import_extra("timm.optim").Lars(
                parameters,
                lr=self.lr,
                momentum=self.momentum,
                weight_decay=self.weight_decay,
                trust_coeff=1e-3,
                eps=0.0,
                always_adapt=True,
            )
        return super().make_optimizer(parameters)

    def under(self, scheme: Scheme) -> "PaperRecipe":
        """Return the recipe with the augmentation of a label scheme: none for I, R and O, always for Is."""
        augment = scheme == "Is" or (scheme == "S" and self.augment)
        return replace(self, augment=augment, crop=self.crop if augment else None)


_SIMCLR = PaperRecipe(
    epochs=1000,
    batch_size=512,
    optimizer="lars",
    lr=1.0,
    weight_decay=1e-6,
    warmup=0.01,
    augment=True,
    objective="simclr",
    temperature=0.5,
)
#: Settings by their source: sections of the paper ("Other setups follow the default setting in PyTorch": no weight
#: decay for SGD, 0.01 for AdamW), and those of a framework's authors for CIFAR-10. Where the authors lower the
#: learning rate in steps, it falls along a cosine here.
#:
#: - MoCo-v2: the paper's C.1, and otherwise the demo on CIFAR-10 that it cites (He et al.).
#: - SimCLR, CSI: CSI's own code (Tack et al., NeurIPS 2020), whose SimCLR is CSI without rotations.
#: - RotNet: Gidaris et al., ICLR 2018, section 3.1.
#: - CIDER: its own code (Ming et al., ICLR 2023), for CIFAR-10.
PRESETS = {
    "A.3.1": PaperRecipe(epochs=200, batch_size=256, optimizer="adamw", lr=1e-3, weight_decay=0.01),
    "B": PaperRecipe(epochs=200, batch_size=256, optimizer="sgd", lr=0.06),
    "C.1": PaperRecipe(epochs=800, batch_size=512, optimizer="sgd", lr=0.03, augment=True),
    "D.4": PaperRecipe(epochs=10, batch_size=256, optimizer="sgd", lr=0.03),
    "MoCo-v2": PaperRecipe(
        epochs=800,
        batch_size=512,
        optimizer="sgd",
        lr=0.06,
        weight_decay=5e-4,
        augment=True,
        objective="moco",
        temperature=0.1,
        queue=4096,
        ema=0.99,
    ),
    "SimCLR": _SIMCLR,
    "RotNet": PaperRecipe(
        epochs=100,
        batch_size=128,
        optimizer="sgd",
        lr=0.1,
        nesterov=True,
        weight_decay=5e-4,
        augment=True,
        objective="rotnet",
    ),
    "CIDER": PaperRecipe(
        epochs=500,
        batch_size=512,
        optimizer="sgd",
        lr=0.5,
        nesterov=True,
        weight_decay=1e-4,
        warmup=0.02,
        augment=True,
        objective="cider",
        temperature=0.1,
        scale=0.2,
        ema=0.95,
        weight=2.0,
    ),
    "CSI": replace(_SIMCLR, batch_size=128, objective="csi"),
}


def short(name: str, epochs: int, batch_size: int, lr: float, crop: int, crop_share: float = 0.8) -> PaperRecipe:
    """Return a preset shortened for small machines: few epochs, small views first, SGD with a warm-up."""
    return replace(
        PRESETS[name],
        epochs=epochs,
        batch_size=batch_size,
        optimizer="sgd",
        lr=lr,
        warmup=0.1,
        crop=crop,
        crop_share=crop_share,
    )


def scheme_labels(scheme: Scheme, labels: Tensor, seed: int = 0) -> tuple[Tensor, int]:
    """Return the targets (n,) of a label scheme and their number of classes (paper B).

    - "S": the labels.
    - "I": one class per image.
    - "Is": one class per image, which is then augmented (see `PaperRecipe.under`).
    - "R": a random bit per image.
    - "O": one class for all images.

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
                raise ValueError(
                    f"scheme S trains on labels, and input {first} has none: use Is, which needs none"
                )
            return labels.long(), int(labels.max()) + 1
        case "I" | "Is":
            return torch.arange(n), n
        case "R":
            return torch.randint(0, 2, (n,), generator=torch.Generator().manual_seed(seed)), 2
        case "O":
            return torch.zeros(n, dtype=torch.int64), 1
    raise ValueError(f"unknown label scheme {scheme!r}: use S, I, Is, R or O (paper B)")
