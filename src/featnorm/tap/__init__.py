"""`FeatureTap`: what a model says of its inputs, taken from inside it."""

from featnorm.tap.tap import FeatureTap

__all__ = ["FeatureTap"]
