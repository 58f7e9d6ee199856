"""Training objectives: the loss of a step, and the state that it needs besides the model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from featnorm.augmentation import augment

if TYPE_CHECKING:
    from featnorm.training.recipe import Recipe


class Batch(NamedTuple):
    """The batch of one process in one step: n inputs, each in one or more views."""

    views: Tensor  # (v n, ...), the first view of every input, then the second
    targets: Tensor  # (n,)
    indices: Tensor  # (n,) in the step's inputs of all processes


class Step(NamedTuple):
    """The result of an objective in one step."""

    loss: Tensor  # 0-d
    accuracy: Tensor | None = None  # 0-d, share of correct classes; None if nothing is classified


class Objective(nn.Module):
    """A training objective, which makes the views of the inputs, runs the model, and returns the loss.

    State besides the model, such as a queue or prototypes, is stored in its buffers, and modules that no optimizer
    trains may be its submodules. They are saved in checkpoints with the model, and are the same in all processes.

    Parameters
    ----------
    recipe : settings of the run.
    """

    #: Number of views per input, if inputs are augmented.
    views = 1
    #: Whether it uses the targets.
    needs_targets = True
    #: Whether the inputs must be square images.
    rotates = False

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe

    def begin(self, model: nn.Module, inputs: Tensor, targets: Tensor, seed: int, fabric: Any) -> None:
        """Initialize the state besides the model, before the first step; a resumed run then overwrites it.

        Parameters
        ----------
        model : model on its device, without the wrapper for several processes.
        inputs, targets, seed : see `featnorm.training.train`.
        fabric : see `featnorm.Runtime.fabric`.
        """

    def make_views(
        self, inputs: Tensor, mine: slice, generator: torch.Generator, crop: int | None, device: torch.device
    ) -> Tensor:
        """Return the views of one process's inputs in a step, concatenated, on a device.

        Parameters
        ----------
        inputs : inputs (n, ...) of all processes, so that all draw the same random numbers.
        mine : rows of this process.
        generator : random generator of the augmentation.
        crop : side of the views, in pixels; None for that of the inputs.
        device : device of the views.
        """
        if not self.recipe.augment:
            return inputs[mine].to(device)
        return torch.cat([augment(inputs, generator, crop)[mine] for _ in range(self.views)]).to(device)

    def forward(self, module: Any, batch: Batch, fabric: Any) -> Step:
        """Run the model on a batch, update the state besides it, and return the loss.

        Parameters
        ----------
        module : the model, in its wrapper if there are several processes.
        batch : batch whose views are those of `make_views`, converted to the model's input type.
        fabric : see `featnorm.Runtime.fabric`.
        """
        raise NotImplementedError


class CrossEntropy(Objective):
    """The cross entropy of the model's logits."""

    def forward(self, module: Any, batch: Batch, fabric: Any) -> Step:
        """See `Objective`."""
        logits = module(batch.views)
        return Step(cross_entropy(logits, batch.targets), accuracy(logits, batch.targets))


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross entropy of logits (n, classes), whose temperature is part of the model."""
    return nn.functional.cross_entropy(logits.float(), targets)


def accuracy(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the share of rows of logits (n, classes) whose largest logit is that of the target."""
    return (logits.detach().argmax(1) == targets).float().mean()
