"""Activation statistics (paper sec. 4.2): how often units are on, for which class, and how many at once."""

from typing import Self

import torch
from torch import Tensor, nn

from featnorm._utils.checks import check_type
from featnorm.detectors.statistics import Statistic


class ActivationStatistics(Statistic):
    """Counts of the on and off states of d units, which can be updated by batches and merged.

    A unit is on if its activation is positive (eq. 7 and 9). Counts are integers, so the result does not depend on
    the order of batches, and merging is exact.

    Examples
    --------
    >>> statistics = ActivationStatistics()
    >>> for batch in FeatureTap(model).stream(train_loader):
    ...     _ = statistics.update(batch.activation, batch.logits.argmax(1))
    """

    inputs: Tensor  # () number of inputs
    on: Tensor  # (d,) number of inputs for which each unit was on
    active: Tensor  # (d + 1,) number of inputs with 0, 1, ..., d units on
    class_inputs: Tensor  # (K,) number of inputs of each class
    class_on: Tensor  # (K, d) `on`, by class

    def __init__(self) -> None:
        i64 = torch.int64
        super().__init__(
            inputs=torch.zeros((), dtype=i64),
            on=torch.empty(0, dtype=i64),
            active=torch.empty(0, dtype=i64),
            class_inputs=torch.empty(0, dtype=i64),
            class_on=torch.empty(0, 0, dtype=i64),
        )

    @property
    def is_empty(self) -> bool:
        """Whether no inputs were added yet."""
        return int(self.inputs) == 0

    @property
    def width(self) -> int:
        """Number of units d."""
        return len(self.on)

    def update(self, activation: Tensor, labels: Tensor | None = None) -> Self:
        """Add activations (n, d), after the non-linearity, and optionally classes (n,), negative if unknown.

        Raises
        ------
        ValueError
            The activation is not a floating-point matrix, contains NaN, or has another width than before; or the
            labels are not n integers.
        """
        check_type(activation, Tensor, "activations", "a tensor")
        check_type(labels, (Tensor, type(None)), "labels", "a tensor or None")
        if activation.ndim != 2 or not activation.is_floating_point():
            raise ValueError(
                f"activations must be floating point (n, d), got {activation.dtype} {tuple(activation.shape)}"
            )
        self.require_width(activation)
        if labels is not None and (labels.shape != activation.shape[:1] or labels.is_floating_point()):
            raise ValueError(f"labels must be {len(activation)} integers, got {tuple(labels.shape)}")
        if len(activation) == 0:
            return self
        if bool(torch.isnan(activation).any()):
            row = int(torch.isnan(activation).any(1).nonzero()[0])
            raise ValueError(f"input {row} of the batch has a unit that is NaN")
        device = self.on.device
        on = (activation.detach() > 0).to(device)
        width = on.shape[1]
        if self.is_empty:
            self._open(width, 0)
        self.inputs = self.inputs + len(on)
        self.on = self.on + on.sum(0)
        self.active = self.active + torch.bincount(on.sum(1), minlength=width + 1)
        if labels is not None:
            labeled = labels.to(device) >= 0
            classes, on = labels.to(device).long()[labeled], on[labeled]
            if len(classes):
                self._open(width, int(classes.max()) + 1)
                self.class_inputs = self.class_inputs.index_add(0, classes, torch.ones_like(classes))
                self.class_on = self.class_on.index_add(0, classes, on.long())
        return self

    def merge(self, other: Self) -> None:
        """Add the counts of other statistics."""
        if other.is_empty:
            return
        if self.is_empty:
            self.copy_from(other)
            return
        if other.width != self.width:
            raise ValueError(f"statistics of {other.width} units cannot be merged into those of {self.width}")
        device = self.on.device
        self._open(self.width, len(other.class_inputs))
        self.inputs = self.inputs + other.inputs.to(device)
        self.on = self.on + other.on.to(device)
        self.active = self.active + other.active.to(device)
        more = len(self.class_inputs) - len(other.class_inputs)
        self.class_inputs = self.class_inputs + nn.functional.pad(other.class_inputs.to(device), (0, more))
        their_on = other.class_on.to(device).reshape(-1, self.width)
        self.class_on = self.class_on + nn.functional.pad(their_on, (0, 0, 0, more))

    def validate(self) -> None:
        """Raise a ValueError if the buffers cannot be the result of counting."""
        super().validate()
        d, classes = len(self.on), len(self.class_inputs)
        shapes = [tuple(self.active.shape), tuple(self.class_on.shape)]
        if not self.is_empty and shapes not in ([(d + 1,), (classes, d)], [(d + 1,), (0, 0)]):
            raise ValueError(f"active and class_on of {d} units and {classes} classes are of shapes {shapes}")
        if not self.is_empty and int(self.active.sum()) != int(self.inputs):
            raise ValueError(
                f"the counts are of {int(self.active.sum())} inputs, but there are {int(self.inputs)}"
            )

    @property
    def on_rate(self) -> Tensor:
        """Share of inputs for which each unit is on (d,)."""
        self._require()
        return self.on.double() / self.inputs

    @property
    def class_on_rate(self) -> Tensor:
        """Share of inputs of each class for which each unit is on (K, d); NaN for a class without inputs."""
        self._require()
        return self.class_on.double() / self.class_inputs[:, None]

    @property
    def entropy(self) -> Tensor:
        """Entropy of activation of each unit (d,), in nats; at most log 2 (eq. 7)."""
        p = self.on_rate
        return -(torch.special.xlogy(p, p) + torch.special.xlogy(1 - p, 1 - p))

    @property
    def mean_entropy(self) -> float:
        """Mean entropy of activation over the units (paper Figures 3b, 5, 6b)."""
        return float(self.entropy.mean())

    @property
    def dead(self) -> Tensor:
        """Mask (d,) of the units that were never on."""
        self._require()
        return self.on == 0

    @property
    def always_on(self) -> Tensor:
        """Mask (d,) of the units that were on for every input."""
        self._require()
        return self.on == self.inputs

    @property
    def mean_active(self) -> float:
        """Mean number of units that are on, the mean of ``||a||_0`` over the inputs."""
        self._require()
        return float(self.on.sum()) / float(self.inputs)

    @property
    def mean_sparsity(self) -> float:
        """Mean of ``1 / max(||a||_0, 1)`` over the inputs (paper Figure 6a)."""
        self._require()
        counts = torch.arange(len(self.active), device=self.active.device).clamp_min(1)
        return float((self.active / counts.double()).sum() / self.inputs)

    def _require(self) -> None:
        if self.is_empty:
            raise ValueError("the activation statistics are empty: add activations first")

    def _open(self, width: int, classes: int) -> None:
        """Enlarge the buffers to a number of units and classes."""
        device = self.on.device
        if self.is_empty and not len(self.on):
            self.on = torch.zeros(width, dtype=torch.int64, device=device)
            self.active = torch.zeros(width + 1, dtype=torch.int64, device=device)
        more = classes - len(self.class_inputs)
        if more > 0 or self.class_on.shape[1] != width:
            self.class_inputs = nn.functional.pad(self.class_inputs, (0, max(more, 0)))
            self.class_on = torch.cat(
                [
                    self.class_on.reshape(-1, width),
                    torch.zeros(max(more, 0), width, dtype=torch.int64, device=device),
                ]
            )
