"""The training loop for heads and networks: resumable at every epoch, in any precision, over processes."""

from featnorm.training.loop import train, train_head
from featnorm.training.objectives import Objective
from featnorm.training.recipe import Recipe

__all__ = ["Objective", "Recipe", "train", "train_head"]
