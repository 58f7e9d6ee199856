"""Images: where they come from, and how they reach a model in batches."""

from featnorm.inputs.cache import CachedFeatures, FeatureCache
from featnorm.inputs.images import DataError, ImageError, ImageSource, SlicedImages
from featnorm.inputs.loading import Extracted, ImageBatch, ImageLoader, extract_images, image_loader, image_tensor
from featnorm.inputs.sources import open_images, open_to_score

__all__ = [
    "CachedFeatures",
    "DataError",
    "Extracted",
    "FeatureCache",
    "ImageBatch",
    "ImageError",
    "ImageLoader",
    "ImageSource",
    "SlicedImages",
    "extract_images",
    "image_loader",
    "image_tensor",
    "open_images",
    "open_to_score",
]
