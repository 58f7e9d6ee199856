"""What a step of training lowers, and what it needs for that besides the model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from featnorm.augmentation import augment

if TYPE_CHECKING:
    from featnorm.training.recipe import Recipe


class Batch(NamedTuple):
    """What a step is of, of one process: n inputs, each in one view or several."""

    views: Tensor  # (v n, ...), the first view of every input, then the second
    targets: Tensor  # (n,)
    indices: Tensor  # (n,) in the step's inputs of all processes


class Step(NamedTuple):
    """What an objective found in a step."""

    loss: Tensor  # 0-d
    accuracy: Tensor | None = None  # 0-d, the share of right classes; None where nothing is classified


class Objective(nn.Module):
    """What a step of training lowers: it makes the views of the inputs, asks the model, and returns the loss.

    What it learns besides the model, such as a queue or prototypes, are its buffers, and what no optimizer trains
    may be its modules: they are checkpointed with the model, and the same in all processes.

    Parameters
    ----------
    recipe : the settings of the run.
    """

    #: How many views it takes of an input, where these are augmented.
    views = 1
    #: Whether it reads the targets.
    needs_targets = True
    #: Whether the inputs must be square images.
    rotates = False

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe

    def begin(self, model: nn.Module, inputs: Tensor, targets: Tensor, seed: int, fabric: Any) -> None:
        """Make what it learns besides the model, before the first step; resuming then overwrites it.

        Parameters
        ----------
        model : on its device, without the wrapper for several processes.
        inputs, targets, seed, fabric : as `featnorm.training.train` takes them.
        """

    def make_views(
        self, inputs: Tensor, mine: slice, generator: torch.Generator, crop: int | None, device: torch.device
    ) -> Tensor:
        """Return the views of a process's part of a step's inputs, one after the other, on a device.

        Parameters
        ----------
        inputs : (n, ...) of all processes, so that they draw the same random numbers.
        mine : this process's rows.
        generator : of the augmentation.
        crop : the side of the views, in pixels; None for that of the inputs.
        device : where to put them.
        """
        if not self.recipe.augment:
            return inputs[mine].to(device)
        return torch.cat([augment(inputs, generator, crop)[mine] for _ in range(self.views)]).to(device)

    def forward(self, module: Any, batch: Batch, fabric: Any) -> Step:
        """Ask the model about a batch; what is learned besides it goes a step on.

        Parameters
        ----------
        module : the model, in the wrapper for several processes where there are any.
        batch : with the views that `make_views` returned, as the model takes them.
        fabric : a `lightning_fabric.Fabric`, or None.
        """
        raise NotImplementedError


class CrossEntropy(Objective):
    """The `cross_entropy` of the logits that the model returns."""

    def forward(self, module: Any, batch: Batch, fabric: Any) -> Step:
        """See `Objective`."""
        logits = module(batch.views)
        return Step(cross_entropy(logits, batch.targets), accuracy(logits, batch.targets))


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross entropy of logits (n, classes); their temperature is in the model."""
    return nn.functional.cross_entropy(logits.float(), targets)


def accuracy(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the share of logits (n, classes) whose largest is the target's."""
    return (logits.detach().argmax(1) == targets).float().mean()
