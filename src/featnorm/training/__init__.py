"""The training loop for heads and networks, which resumes at any epoch and supports precisions and processes."""

from featnorm.training.loop import train, train_head
from featnorm.training.objectives import Objective
from featnorm.training.recipe import Recipe

__all__ = ["Objective", "Recipe", "train", "train_head"]
