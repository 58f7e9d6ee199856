"""Features of a model: `FeatureTap` captures its last hidden layer, `LayerTap` all of its rectified layers."""

from featnorm.tap.layers import LayerTap
from featnorm.tap.tap import AutocastTap, FeatureTap

__all__ = ["AutocastTap", "FeatureTap", "LayerTap"]
