"""Loading of items in batches: decoded and transformed by threads; corrupt items are skipped and reported."""

import math
import os
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from featnorm._utils.errors import RAISED_BY_USERS, UserCodeError, error_site, error_text
from featnorm._utils.memory import in_parts
from featnorm._utils.progress import progress_bar
from featnorm.inputs.errors import DataError, ItemError
from featnorm.inputs.kinds import Inputs, OfAnySize
from featnorm.inputs.source import ImageSource, Source

# Number of items from which threads are faster than the calling thread.
_MIN_THREADED = 256
_MAX_WORKERS = 8
# Batches per thread that are read ahead.
_AHEAD = 2
# On Windows, a wait without a timeout cannot be interrupted.
_POLL_SECONDS = 0.5

# Number of parts of similar lengths in which a batch of texts is run, and the minimum number of texts in one.
_SIMILAR_PARTS, _MIN_SIMILAR = 4, 16

# Number of images per forward pass that is compared with a whole batch, and number of batches to compare them on.
_FEW, _COMPARED = 8, 3

_T = TypeVar("_T")


class TransformError(DataError, UserCodeError):
    """An error raised by the user's transform; its traceback is a note, since it may come from another process."""


class Batch(NamedTuple):
    """A batch of items for a model.

    Attributes
    ----------
    inputs : Tensor, mapping of str to Tensor, or list of Tensor
        Transformed items: of images (n, 3, H, W), of texts the tensors (n, L) that the model takes by name; of an
        `OfAnySize` transform n images (3, H, W).
    labels : Tensor
        Classes, (n,), int64; -1 for an item without a label.
    indices : Tensor
        Indices of the items in the source, (n,), int64.
    """

    inputs: Inputs
    labels: Tensor
    indices: Tensor


@dataclass
class Part:
    """The result of reading consecutive items of a source. Items are named by their indices in the source.

    Attributes
    ----------
    rows : range
        The items.
    batch : Batch or None
        The items that could be read; None if there are none.
    unread : dict of int to str
        Why each of the others could not be read.
    digests : dict of int to bytes
        `Source.digest` of the content that was decoded, also of an unread item if its content could be read.
    several : set of int
        The images that are the first of several frames or pages of their file.
    """

    rows: range
    batch: Batch | None = None
    unread: dict[int, str] = field(default_factory=dict)
    digests: dict[int, bytes] = field(default_factory=dict)
    several: set[int] = field(default_factory=set)


@dataclass
class Extracted:
    """The features of consecutive items of a source.

    Attributes
    ----------
    values : Tensor or None
        Output of the backbone for the items that could be read, (n, D); None if there are none.
    rows, unread, digests, several
        See `Part`.
    """

    rows: range
    values: Tensor | None
    unread: dict[int, str]
    digests: dict[int, bytes]
    several: set[int]

    @property
    def indices(self) -> list[int]:
        """Indices of the items that could be read."""
        return [row for row in self.rows if row not in self.unread]

    def moved(self, start: int) -> "Extracted":
        """Return the same features with the indices of a source in which these items begin at `start`."""
        by = start - self.rows.start
        unread = {row + by: why for row, why in self.unread.items()}
        digests = {row + by: digest for row, digest in self.digests.items()}
        several = {row + by for row in self.several}
        return Extracted(range(start, start + len(self.rows)), self.values, unread, digests, several)


class _Stopped(Exception):
    """The batch is not needed any more."""


class _Batches:
    """Batches of a source, by their number."""

    def __init__(self, source: Source[Any], transform: Callable[[Any], Any], batch_size: int) -> None:
        self.source = source
        self.transform = transform
        self.batch_size = batch_size

    def __len__(self) -> int:
        return math.ceil(len(self.source) / self.batch_size)

    def read(self, number: int, stop: threading.Event) -> Part:
        part = Part(rows_of(number, self.batch_size, len(self.source)))
        kind = self.source.kind
        prepared: list[Any] = []
        indices: list[int] = []
        for i in part.rows:
            if stop.is_set():
                raise _Stopped
            try:
                item, part.digests[i] = self.source.read(i)
            except ItemError as error:
                part.unread[i] = error.reason
                if error.digest is not None:
                    part.digests[i] = error.digest
                continue
            if kind.is_first_of_several(item):
                part.several.add(i)
            try:
                transformed = self.transform(item)
            except ItemError as error:
                part.unread[i] = error.reason
                continue
            except RAISED_BY_USERS as error:
                name = self.source.name(i)
                failure = TransformError(
                    f"the transform failed on {name} ({error_text(error)}){error_site(error)}"
                )
                failure.add_note(traceback.format_exc())
                raise failure from None
            first = None if isinstance(self.transform, OfAnySize) or not prepared else prepared[0]
            kind.check(transformed, first, self.source.name(i))
            prepared.append(transformed)
            indices.append(i)
        if prepared:
            labels = [-1 if (label := self.source.label(i)) is None else label for i in indices]
            part.batch = Batch(kind.collate(prepared, self.transform), torch.tensor(labels), torch.tensor(indices))
        return part


class SourceLoader:
    """An iterable of `Batch`, in the order of the source; `source_loader` creates it.

    It can be iterated any number of times, and reports corrupt items each time. Its length counts all batches,
    although one in which all items are corrupt is skipped.
    """

    def __init__(self, batches: _Batches, workers: int, on_corrupt: Callable[[str, str], None] | None) -> None:
        self._batches = batches
        self._workers = workers
        self._on_corrupt = on_corrupt

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        for part in self.parts():
            if part.batch is not None:
                yield part.batch

    def parts(self) -> Iterator[Part]:
        """Yield the result of each batch in order, also of batches in which no item can be read."""
        for part in self._read():
            if self._on_corrupt is not None:
                for row, reason in part.unread.items():
                    self._on_corrupt(self._batches.source.name(row), reason)
            yield part

    def _read(self) -> Iterator[Part]:
        stop = threading.Event()
        numbers = iter(range(len(self)))
        if not self._workers:
            for number in numbers:
                yield self._batches.read(number, stop)
            return
        pool = _started(min(self._workers, len(self)))
        ahead: deque[Future[Part]] = deque()
        try:
            for number in numbers:
                ahead.append(pool.submit(self._batches.read, number, stop))
                if len(ahead) == _AHEAD * self._workers:
                    yield _result(ahead.popleft())
            while ahead:
                yield _result(ahead.popleft())
        finally:
            # Also if the caller stops or is interrupted: each thread ends after its current item.
            stop.set()
            pool.shutdown(cancel_futures=True)


def _started(workers: int) -> ThreadPoolExecutor:
    """Start a pool of threads in each of which torch's operators use one thread.

    torch has a number of threads for each calling thread, and uses the number that was set last for new calling
    threads; the latter is restored here.
    """
    # If several threads load Pillow's plugins at the same time, a format may be unknown to one of them.
    Image.init()
    own = torch.get_num_threads()
    pool = ThreadPoolExecutor(workers, "featnorm-loader")
    gate = threading.Barrier(workers)

    def start() -> None:
        torch.get_num_threads()  # initializes the number of this thread
        torch.set_num_threads(1)
        gate.wait()

    try:
        for future in [pool.submit(start) for _ in range(workers)]:
            _result(future)
    except BaseException:
        gate.abort()
        pool.shutdown(cancel_futures=True)
        raise
    finally:
        torch.set_num_threads(own)
    return pool


def _result(future: Future[_T]) -> _T:
    while not wait([future], _POLL_SECONDS).done:
        pass
    return future.result()


class PassSize:
    """Runs a batch of images at once or 8 at a time, whichever took less time per image on the first batches.

    The first three batches of more than 16 images are run both ways: 8 images to warm up, 8, and the rest.

    If the C library returns freed memory to the system, large batches take about twice the time on a CPU (see
    `featnorm.keep_freed_memory`). The results differ by rounding only.
    """

    def __init__(self) -> None:
        # Shortest time per image, by the place of the part in a compared batch: 1 has 8 images, 2 all others.
        self._seconds = {1: math.inf, 2: math.inf}
        self._left = _COMPARED

    def __call__(self, function: Callable[..., _T], inputs: Tensor, *others: Tensor) -> list[_T]:
        """Return the results of a function for consecutive parts of a batch."""
        count = len(inputs)
        compares = self._left > 0 and count > 2 * _FEW
        self._left -= compares
        sizes: Any = _FEW if self._seconds[1] < self._seconds[2] else max(1, count)
        if compares:
            # The first few are not timed: a network's first pass takes longer.
            sizes = [_FEW, _FEW, count - 2 * _FEW]
        found: list[_T] = []
        for i, part in enumerate(zip(*(values.split(sizes) for values in (inputs, *others)), strict=True)):
            began = time.perf_counter()
            found += in_parts(function, *part)
            if compares and i:
                self._seconds[i] = min(self._seconds[i], (time.perf_counter() - began) / len(part[0]))
        return found


def over_parts(
    function: Callable[..., Any], inputs: Inputs, *others: Tensor, passes: PassSize | None = None
) -> Any:
    """Return the results of a function for the rows of a batch, which is run in parts.

    Texts of similar lengths are run together, without the padding that longer ones of the batch need. If the
    device runs out of memory, smaller parts are run.

    Parameters
    ----------
    function : callable
        From some of the rows to one result per row, a tensor or a list.
    inputs, *others : Tensor, mapping of str to Tensor or list of Tensor, and Tensor
        The rows.
    passes : PassSize, optional
        Number of images to run at a time. Default: all.
    """
    if passes is not None and isinstance(inputs, Tensor):
        return _joined(passes(function, inputs, *others))
    mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
    if mask is None:
        return _joined(in_parts(function, inputs, *others))
    lengths = mask.sum(1)
    order = lengths.argsort()
    found = []
    for rows in order.split(max(_MIN_SIMILAR, math.ceil(len(order) / _SIMILAR_PARTS))):
        part = {name: tensor[rows, : int(lengths[rows].max())] for name, tensor in inputs.items()}  # type: ignore[union-attr]
        found += in_parts(function, part, *(other[rows] for other in others))
    results, places = _joined(found), order.argsort()
    return results[places] if isinstance(results, Tensor) else [results[place] for place in places.tolist()]


def _joined(found: list[Any]) -> Any:
    if len(found) == 1:
        return found[0]
    return torch.cat(found) if isinstance(found[0], Tensor) else list(chain(*found))


def named(source: Source[Any], rows: Sequence[int]) -> str:
    """Return a name of some items of a source for errors: of the only one, or of the first and the last."""
    if len(rows) == 1:
        return source.name(rows[0])
    return f"a batch of {len(rows)} {source.kind.name}, {source.name(rows[0])} to {source.name(rows[-1])}"


def rows_of(number: int, batch_size: int, total: int) -> range:
    """Return the rows of batch `number`, out of `total` rows."""
    return range(number * batch_size, min((number + 1) * batch_size, total))


def extract_features(
    source: Source[Any],
    transform: Callable[[Any], Any],
    backbone: Callable[[Inputs], Tensor],
    *,
    batch_size: int = 64,
    workers: int | None = None,
    passes: PassSize | None = None,
) -> Iterator[Extracted]:
    """Yield the features of items, batch by batch in the order of the source.

    If the device runs out of memory, a batch is processed in parts.

    Parameters
    ----------
    source, transform, batch_size, workers
        See `source_loader`.
    backbone : callable
        From a batch of transformed items (`Batch.inputs`) to features (n, D).
    passes
        See `over_parts`.

    Raises
    ------
    DataError
        See `source_loader`.
    """
    for part in source_loader(source, transform, batch_size=batch_size, workers=workers).parts():
        if part.batch is None:
            yield Extracted(part.rows, None, part.unread, part.digests, part.several)
            continue
        try:
            values = over_parts(backbone, part.batch.inputs, passes=passes)
        except UserCodeError as error:
            raise error.on(named(source, part.batch.indices.tolist())) from error.__cause__
        yield Extracted(part.rows, values, part.unread, part.digests, part.several)


def source_loader(
    source: Source[Any],
    transform: Callable[[Any], Any],
    *,
    batch_size: int = 64,
    workers: int | None = None,
    on_corrupt: Callable[[str, str], None] | None = None,
) -> SourceLoader:
    """Read a source in order, in batches, and skip the items that cannot be read.

    Parameters
    ----------
    source : Source
        The items.
    transform : callable
        From a PIL image in RGB to a tensor (3, H, W), the same shape for all images of a batch; or from a text to
        the tensors (L,) that the model takes by name. It must be safe to call from several threads at the same
        time, unless `workers` is 0 or 1.
    batch_size : int
        Number of items read per batch. A batch with corrupt items is smaller, and one without readable items is
        skipped.
    workers : int, optional
        Number of threads that read and transform items; 0 for the calling thread. Default: 0 for fewer than 256
        items, else one per CPU, at most 8. There are never more than the source's ``max_readers``. Pillow and
        torch release Python's lock while they work, so that threads are as fast as processes, and need no shared
        memory. A transform that is mostly Python code gains little from more threads.
    on_corrupt : callable, optional
        Called in this process with the name of each unreadable item and the reason, before its batch is yielded.

    Returns
    -------
    SourceLoader
        An iterable of `Batch`. Iterating raises DataError if the transform returns something else, or
        different shapes of images within a batch, and its subclass `TransformError` if the transform raises an
        error (whose traceback is a note).

    Raises
    ------
    ValueError
        If `batch_size` is less than 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}: it must be at least 1")
    if workers is None:
        workers = 0 if len(source) < _MIN_THREADED else min(_processors(), _MAX_WORKERS)
    workers = min(workers, source.max_readers or workers)
    return SourceLoader(_Batches(source, transform, batch_size), workers, on_corrupt)


def _processors() -> int:
    # The CPUs that this process may use: in a container, fewer than the machine has.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def image_tensor(source: ImageSource, size: int, *, progress: bool | None = None) -> Tensor:
    """Decode all images of a source into one tensor.

    Parameters
    ----------
    source : ImageSource
        The images.
    size : int
        Height and width. Images of other sizes are resized to it, antialiased, whatever their aspect ratio.
    progress : bool, optional
        Whether to show a progress bar. Default: on a terminal; elsewhere a line every 30 seconds.

    Returns
    -------
    Tensor
        The images, (n, 3, size, size), uint8.

    Raises
    ------
    ItemError
        If an image cannot be read: no image of a benchmark may be skipped.
    """
    images = torch.empty(len(source), 3, size, size, dtype=torch.uint8)
    for i in progress_bar(range(len(source)), desc=source.title, unit="image", progress=progress):
        image = source.item(i)
        if image.size != (size, size):
            image = image.resize((size, size), Image.Resampling.BILINEAR)
        images[i] = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    return images
