"""A small sample of the images that a scorer was fitted to, among which the most similar ones are found."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from featnorm._utils.checks import check_text
from featnorm.inputs.decoding import decode
from featnorm.inputs.kinds import THUMBNAIL

#: Maximum number of images in a sample.
MAX_EXAMPLES = 512
#: Maximum size of all thumbnails together, in bytes.
MAX_BYTES = 1_500_000


@dataclass(frozen=True, eq=False)
class Neighbor:
    """An image of the sample that is similar to an input.

    Attributes
    ----------
    index : position in the sample.
    similarity
        Cosine similarity of the pooled features, at most 1; or minus their distance, see `Examples.nearest`.
    label : class of the image, or None.
    thumbnail
        Encoded thumbnail of an image, or the beginning of a text, or None. It comes from a file: use `image` or
        `text`, which decode it safely.
    """

    index: int
    similarity: float
    label: str | None
    thumbnail: bytes | None

    def image(self) -> Image.Image | None:
        """Return the thumbnail in RGB, or None; an `featnorm.inputs.ItemError` if it is damaged."""
        if self.thumbnail is None:
            return None
        return decode(self.thumbnail, f"thumbnail {self.index}", max_pixels=THUMBNAIL**2)

    def text(self) -> str | None:
        """Return the beginning of a text, or None."""
        return None if self.thumbnail is None else self.thumbnail.decode("utf-8", "replace")

    def __str__(self) -> str:
        return f"{'' if self.label is None else f'{self.label}, '}similarity {self.similarity:.2f}"


class Examples:
    """A sample of in-distribution images: their pooled features and, if there are any, classes and thumbnails.

    Parameters
    ----------
    features : pooled features (m, D) in float32, on the CPU; 1 to 512 of them.
    labels : class of each image, or None for an image without one.
    thumbnails
        Encoded thumbnail of each image, or the beginning of each text in UTF-8, 1.5 MB in all. Default: none.

    Raises
    ------
    ValueError
        The parts do not fit each other, a feature is not finite, or there are too many images or bytes.
    TypeError
        A label is not a string.
    """

    def __init__(
        self, features: Tensor, labels: Sequence[str | None], thumbnails: Sequence[bytes] | None = None
    ) -> None:
        if features.dtype != torch.float32 or features.ndim != 2 or not features.isfinite().all():
            raise ValueError("the features of the examples must be finite, (m, D) and float32")
        if not 1 <= len(features) <= MAX_EXAMPLES or len(labels) != len(features):
            raise ValueError(f"expected a label for each of 1 to {MAX_EXAMPLES} examples")
        if thumbnails is not None and (len(thumbnails) != len(features) or sum(map(len, thumbnails)) > MAX_BYTES):
            raise ValueError(f"expected a thumbnail for each example, at most {MAX_BYTES:,} bytes in all")
        self.features = features
        self.labels = [None if label is None else check_text(label) for label in labels]
        self.thumbnails = thumbnails
        self._directions = normalize(features)

    def nearest(self, pooled: Tensor, k: int = 3, *, by_distance: bool = False) -> list[list[Neighbor]]:
        """Return the k images that are most similar to each of n inputs, the most similar first.

        Parameters
        ----------
        pooled : pooled features (n, D).
        k : number of images; all if there are fewer.
        by_distance
            Whether the similarity is minus the Euclidean distance, as for the columns of a table, whose length is
            information. Default: it is the cosine similarity.
        """
        pooled = pooled.float().cpu()
        similarities = (
            -torch.cdist(pooled, self.features) if by_distance else normalize(pooled) @ self._directions.T
        )
        found = similarities.topk(min(k, len(self.features)))
        return [
            [
                Neighbor(i, value, self.labels[i], None if self.thumbnails is None else self.thumbnails[i])
                for i, value in zip(row, values, strict=True)
            ]
            for row, values in zip(found.indices.tolist(), found.values.tolist(), strict=True)
        ]

    def mean(self, neighbors: Sequence[Neighbor]) -> Tensor:
        """Return the mean of the pooled features of some images, (D,)."""
        return self.features[[neighbor.index for neighbor in neighbors]].mean(0)

    @property
    def classes(self) -> list[str]:
        """The classes of the images, sorted."""
        return sorted({label for label in self.labels if label is not None})

    def tensors(self) -> dict[str, Tensor]:
        """Return the sample as tensors, for a file, except for the names of its `classes`."""
        place: dict[str | None, int] = {label: k for k, label in enumerate(self.classes)}
        labels = torch.tensor([place.get(label, -1) for label in self.labels])
        found = {"features": self.features, "labels": labels}
        if self.thumbnails is not None:
            found["thumbnails"] = torch.frombuffer(bytearray(b"".join(self.thumbnails)), dtype=torch.uint8)
            found["sizes"] = torch.tensor([len(data) for data in self.thumbnails])
        return found

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], classes: Sequence[str]) -> "Examples":
        """Create a sample from what `tensors` returned, and its classes.

        Raises
        ------
        KeyError, TypeError, ValueError
            The tensors are damaged.
        """
        names = set(tensors)
        if names not in ({"features", "labels"}, {"features", "labels", "thumbnails", "sizes"}):
            raise ValueError(f"its examples have {sorted(names)}")
        labels = tensors["labels"]
        if labels.dtype != torch.int64 or labels.ndim != 1 or any(not -1 <= k < len(classes) for k in labels):
            raise ValueError("the labels of its examples are not those of its example classes")
        words = [None if k < 0 else classes[k] for k in labels.tolist()]
        thumbnails = [*_split(tensors["thumbnails"], tensors["sizes"])] if "sizes" in names else None
        return cls(tensors["features"], words, thumbnails)


def _split(data: Tensor, sizes: Tensor) -> Iterator[bytes]:
    fits = data.dtype == torch.uint8 and data.ndim == 1 and sizes.dtype == torch.int64 and sizes.ndim == 1
    if not fits or bool((sizes < 1).any()) or int(sizes.sum()) != len(data):
        raise ValueError("the thumbnails of its examples do not fit their sizes")
    return (part.numpy().tobytes() for part in data.split(sizes.tolist()))
