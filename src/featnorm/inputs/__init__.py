"""The user's data: opening it by path, address or name, decoding it, and loading it in batches."""

from featnorm.inputs import arrays, images, torchvision_sets, video  # noqa: F401  each registers its openers
from featnorm.inputs.cache import CachedFeatures, FeatureCache
from featnorm.inputs.errors import DataError, ItemError
from featnorm.inputs.grouping import group_items
from featnorm.inputs.kinds import FRAMES, IMAGES, ROWS, TEXTS, Kind, kind_of
from featnorm.inputs.loading import Batch, Extracted, SourceLoader, extract_features, image_tensor, source_loader
from featnorm.inputs.openers import Opener, open_source
from featnorm.inputs.rows import Rows, Table, Vector
from featnorm.inputs.source import ImageSource, JoinedSource, SlicedSource, Source
from featnorm.inputs.tables import source_of

__all__ = [
    "FRAMES",
    "IMAGES",
    "ROWS",
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
    "Rows",
    "SlicedSource",
    "Source",
    "SourceLoader",
    "Table",
    "Vector",
    "extract_features",
    "group_items",
    "image_tensor",
    "kind_of",
    "open_source",
    "source_loader",
    "source_of",
]
