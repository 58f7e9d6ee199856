"""The user's data: opening it by path, address or name, decoding it, and loading it in batches."""

from featnorm.inputs import images, parquet, torchvision_sets  # noqa: F401  each registers its openers
from featnorm.inputs.cache import CachedFeatures, FeatureCache
from featnorm.inputs.grouping import group_items
from featnorm.inputs.loading import Extracted, ImageBatch, ImageLoader, extract_images, image_loader, image_tensor
from featnorm.inputs.openers import Opener, open_source
from featnorm.inputs.source import DataError, ImageSource, ItemError, JoinedSource, SlicedSource, Source

__all__ = [
    "CachedFeatures",
    "DataError",
    "Extracted",
    "FeatureCache",
    "ImageBatch",
    "ImageLoader",
    "ImageSource",
    "ItemError",
    "JoinedSource",
    "Opener",
    "SlicedSource",
    "Source",
    "extract_images",
    "group_items",
    "image_loader",
    "image_tensor",
    "open_source",
]
