"""Where in a model to listen: `FeatureTap` finds the last hidden layer, `LayerTap` listens to all of them."""

from featnorm.tap.layers import LayerTap
from featnorm.tap.tap import AutocastTap, FeatureTap

__all__ = ["AutocastTap", "FeatureTap", "LayerTap"]
