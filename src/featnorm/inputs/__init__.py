"""The user's data: opening it by path, address or name, decoding it, and loading it in batches."""

from featnorm.inputs import images, tables, torchvision_sets  # noqa: F401  each registers its openers
from featnorm.inputs.cache import CachedFeatures, FeatureCache
from featnorm.inputs.errors import DataError, ItemError
from featnorm.inputs.grouping import group_items
from featnorm.inputs.kinds import IMAGES, TEXTS, Kind, kind_of
from featnorm.inputs.loading import Batch, Extracted, SourceLoader, extract_features, image_tensor, source_loader
from featnorm.inputs.openers import Opener, open_source
from featnorm.inputs.source import ImageSource, JoinedSource, SlicedSource, Source

__all__ = [
    "IMAGES",
    "TEXTS",
    "Batch",
    "CachedFeatures",
    "DataError",
    "Extracted",
    "FeatureCache",
    "ImageSource",
    "ItemError",
    "JoinedSource",
    "Kind",
    "Opener",
    "SlicedSource",
    "Source",
    "SourceLoader",
    "extract_features",
    "group_items",
    "image_tensor",
    "kind_of",
    "open_source",
    "source_loader",
]
