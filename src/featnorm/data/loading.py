"""Images in batches: decoded and transformed in workers, corrupt ones left out and reported."""

import math
import os
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from featnorm._errors import UserCodeError, at
from featnorm._memory import in_parts
from featnorm.data.images import DataError, ImageError, ImageSource, first_line

_FEW = 256  # images; below, starting workers takes longer than reading


class TransformError(DataError, UserCodeError):
    """A transform that raised an error; its traceback, which may be of another process, is a note of this one."""


class ImageBatch(NamedTuple):
    """Some images, ready for a model.

    Attributes
    ----------
    images : Tensor
        Transformed images, (n, 3, H, W).
    labels : Tensor
        Classes, (n,), int64; -1 where there is none.
    indices : Tensor
        Where in the source the images stand, (n,), int64.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor


@dataclass
class ImagePart:
    """What became of consecutive images of a source.

    Attributes
    ----------
    rows : range
        Where in the source they stand.
    batch : ImageBatch or None
        Those that could be read; None where there is none.
    unread : dict of int to str
        Why the others could not, by where in the source they stand.
    """

    rows: range
    batch: ImageBatch | None = None
    unread: dict[int, str] = field(default_factory=dict)


@dataclass
class Extracted:
    """What a backbone says of consecutive images of a source.

    Attributes
    ----------
    rows : range
        Where in the source they stand.
    values : Tensor or None
        What the backbone returned for those that could be read; None where there is none.
    unread : dict of int to str
        Why the others could not, by where in the source they stand.
    """

    rows: range
    values: Tensor | None
    unread: dict[int, str]

    @property
    def indices(self) -> list[int]:
        """Where in the source those stand that could be read."""
        return [row for row in self.rows if row not in self.unread]

    def moved(self, start: int) -> "Extracted":
        """Return the same of a source in which these images begin elsewhere."""
        by = start - self.rows.start
        unread = {row + by: why for row, why in self.unread.items()}
        return Extracted(range(start, start + len(self.rows)), self.values, unread)


@dataclass
class _Result:
    """What a worker sends back: as data, since an exception would end the loader and lose its own message."""

    part: ImagePart
    error: str | None = None
    trace: str = ""


class _Batches(Dataset[_Result]):
    """Whole batches of a source, by their number."""

    def __init__(self, source: ImageSource, transform: Callable[[Image.Image], Tensor], batch_size: int) -> None:
        self.source = source
        self.transform = transform
        self.batch_size = batch_size

    def __len__(self) -> int:
        return math.ceil(len(self.source) / self.batch_size)

    def __getitem__(self, number: int) -> _Result:
        part = ImagePart(rows_of(number, self.batch_size, len(self.source)))
        result = _Result(part)
        images: list[Tensor] = []
        indices: list[int] = []
        for i in part.rows:
            try:
                image = self.source.image(i)
            except ImageError as error:
                part.unread[i] = error.reason
                continue
            try:
                transformed = self.transform(image)
            except Exception as error:
                what = f"{type(error).__name__}: {first_line(error)}"
                result.error = f"the transform failed on {self.source.name(i)} ({what}){at(error)}"
                result.trace = traceback.format_exc()
                return result
            result.error = self._refusal(i, transformed, images)
            if result.error is not None:
                return result
            images.append(transformed)
            indices.append(i)
        if images:
            labels = [-1 if (label := self.source.label(i)) is None else label for i in indices]
            part.batch = ImageBatch(torch.stack(images), torch.tensor(labels), torch.tensor(indices))
        return result

    def _refusal(self, i: int, transformed: object, before: list[Tensor]) -> str | None:
        name = self.source.name(i)
        if not isinstance(transformed, Tensor):
            return f"the transform returned {type(transformed).__name__} for {name}: it must return a Tensor"
        if before and transformed.shape != before[0].shape:
            return (
                f"{name} has shape {tuple(transformed.shape)} after the transform, the ones before it in the "
                f"batch {tuple(before[0].shape)}: use a transform that resizes all images to one size"
            )
        return None


class ImageLoader:
    """An iterable of `ImageBatch`, in the order of the source; made by `image_loader`.

    It can be iterated any number of times, and reports corrupt images each time. ``len`` is the number of
    batches if in none all images are corrupt.
    """

    def __init__(
        self, source: ImageSource, batches: DataLoader[_Result], on_corrupt: Callable[[str, str], None] | None
    ) -> None:
        self._source = source
        self._batches = batches
        self._on_corrupt = on_corrupt

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[ImageBatch]:
        for part in self.parts():
            if part.batch is not None:
                yield part.batch

    def parts(self) -> Iterator[ImagePart]:
        """Yield what became of each batch in order, of those with no image that can be read as well."""
        for result in self._batches:
            if self._on_corrupt is not None:
                for row, reason in result.part.unread.items():
                    self._on_corrupt(self._source.name(row), reason)
            if result.error is not None:
                if not result.trace:
                    raise DataError(result.error)
                error = TransformError(result.error)
                error.add_note(result.trace)
                raise error
            yield result.part


def named(source: ImageSource, rows: Sequence[int]) -> str:
    """Return what to call some images of a source in an error: the one, or the first and the last."""
    if len(rows) == 1:
        return source.name(rows[0])
    return f"a batch of {len(rows)} images, {source.name(rows[0])} to {source.name(rows[-1])}"


def rows_of(number: int, batch_size: int, total: int) -> range:
    """Return the rows of a batch by its number, of so many in all."""
    return range(number * batch_size, min((number + 1) * batch_size, total))


def extract_images(
    source: ImageSource,
    transform: Callable[[Image.Image], Tensor],
    backbone: Callable[[Tensor], Tensor],
    *,
    batch_size: int = 64,
    workers: int | None = None,
) -> Iterator[Extracted]:
    """Yield what a backbone says of images, batch by batch in their order.

    Where the device has not the memory for a batch, the backbone is asked for parts of it.

    Parameters
    ----------
    source, transform, batch_size, workers : see `image_loader`.
    backbone : from a batch of transformed images (n, 3, H, W) to features (n, D).

    Raises
    ------
    DataError
        See `image_loader`.
    """
    for part in image_loader(source, transform, batch_size=batch_size, workers=workers).parts():
        if part.batch is None:
            yield Extracted(part.rows, None, part.unread)
            continue
        try:
            found = in_parts(backbone, part.batch.images)
        except UserCodeError as error:
            raise error.on(named(source, part.batch.indices.tolist())) from error.__cause__
        values = found[0] if len(found) == 1 else torch.cat(found)
        yield Extracted(part.rows, values, part.unread)


def image_loader(
    source: ImageSource,
    transform: Callable[[Image.Image], Tensor],
    *,
    batch_size: int = 64,
    workers: int | None = None,
    on_corrupt: Callable[[str, str], None] | None = None,
) -> ImageLoader:
    """Read a source in order, in batches, leaving out the images that cannot be read.

    Parameters
    ----------
    source : ImageSource
        The images.
    transform : callable
        From a PIL image in RGB to a tensor (3, H, W), the same shape for all images of a batch.
    batch_size : int
        Images read a batch. One with corrupt images yields fewer, and one with nothing else is left out.
    workers : int, optional
        Processes that read; 0 is this one. Without it 0 for fewer than 256 images, else one a processor, at
        most 8. Those that read an object store are started anew: a script then keeps what it does under
        ``if __name__ == "__main__"``, and the transform has to be picklable.
    on_corrupt : callable, optional
        Called in this process with the name of each unreadable image and the reason, before its batch comes.

    Returns
    -------
    ImageLoader
        An iterable of `ImageBatch`. Iterating raises DataError if the transform returns no tensor, or different
        shapes within a batch, and its subclass `TransformError` if it raises an error (whose traceback is a note).

    Raises
    ------
    ValueError
        If `batch_size` is less than 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}: it must be at least 1")
    if workers is None:
        workers = 0 if len(source) < _FEW else min(_processors(), 8)
    batches = DataLoader(
        _Batches(source, transform, batch_size),
        batch_size=None,
        num_workers=workers,
        multiprocessing_context="spawn" if workers and not source.may_fork else None,
    )
    return ImageLoader(source, batches, on_corrupt)


def _processors() -> int:
    # The ones this process may use: in a container they are fewer than the machine has.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def image_tensor(source: ImageSource, size: int, *, progress: bool | None = None) -> Tensor:
    """Decode all images of a source into one tensor.

    Parameters
    ----------
    source : the images.
    size : of the sides; images of other sizes are resized to it, antialiased, whatever their shape.
    progress : show a progress bar; None for where there is a terminal.

    Returns
    -------
    (n, 3, size, size), uint8.

    Raises
    ------
    ImageError
        An image cannot be read: of a benchmark none may be left out.
    """
    images = torch.empty(len(source), 3, size, size, dtype=torch.uint8)
    hidden = None if progress is None else not progress
    for i in tqdm(range(len(source)), desc=source.title, unit="image", disable=hidden, leave=False):
        image = source.image(i)
        if image.size != (size, size):
            image = image.resize((size, size), Image.Resampling.BILINEAR)
        images[i] = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    return images
