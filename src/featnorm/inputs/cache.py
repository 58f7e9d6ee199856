"""A cache of features on disk, so that a frozen backbone runs once per item."""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from io import FileIO
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from filelock import Timeout
from torch import Tensor

from featnorm._utils.files import WriteError, acquire_lock, flush_to_disk, replacing, sync_folder
from featnorm._utils.progress import progress_bar
from featnorm._utils.sealed import seal, unseal
from featnorm.inputs.errors import DataError, ItemError
from featnorm.inputs.loading import Extracted
from featnorm.inputs.source import SlicedSource, Source

# Caches of other formats are in other folders, and are not read.
_FORMAT = 3
_FLOAT_BYTES = 4


@dataclass(frozen=True)
class CachedFeatures:
    """The features of those items of a source that could be read.

    Attributes
    ----------
    stored : Tensor
        All features in the cache, (N, D) float32, memory-mapped from its file.
    stored_rows : Tensor
        Row of each item in `stored`, (n,) int64, in the order of the source.
    rows : Tensor
        Index of each item in the source, (n,) int64.
    digests : list of bytes
        `Source.digest` of each item, n of them.
    corrupt : list of tuple of str
        Name and reason of each item that could not be read.
    computed : int
        Number of items whose features were computed; those of the others were in the cache.
    changed : int
        Number of items whose content changed while the source was read. Their features and digests are those of
        the later content.
    damaged : int
        Number of batches that were damaged on disk and dropped. Their features were computed again if they were
        needed.
    several : int
        Number of images that are the first of several frames or pages of their file.
    engine : str
        What computed the features.
    """

    stored: Tensor
    stored_rows: Tensor
    rows: Tensor
    digests: list[bytes]
    corrupt: list[tuple[str, str]]
    computed: int
    changed: int
    damaged: int
    several: int
    engine: str = "PyTorch"

    @cached_property
    def values(self) -> Tensor:
        """The features (n, D); memory-mapped if their rows are consecutive, as after a single pass."""
        first, n = int(self.stored_rows[0]), len(self.stored_rows)
        if torch.equal(self.stored_rows, torch.arange(first, first + n)):
            return self.stored[first : first + n]
        return self.stored[self.stored_rows]

    def batches(self, size: int) -> Iterator[Tensor]:
        """Yield the features in order, at most ``size`` at a time, read from disk each time."""
        for rows in self.stored_rows.split(size):
            yield self.stored[rows]


class FeatureCache:
    """The features of one backbone with one transform, by the content of the items.

    Every batch is on disk before the next one is computed, so that a process that is killed loses at most one
    batch, and the same call resumes with the batches that an uninterrupted one would have had. An item is
    identified by a digest of the content that it was decoded from: a changed item is computed again, a moved or
    copied one is not. Every batch has a checksum, which is verified each time the cache is opened; a batch that
    differs is dropped and computed again. Only one process at a time may use the cache.

    Parameters
    ----------
    folder : str or Path
        Folder of the caches of all backbones.
    key : str
        What the features depend on besides the items. The cache's own folder is named by its digest.
    """

    def __init__(self, folder: str | Path, key: str) -> None:
        self.folder = Path(folder).expanduser() / f"{_FORMAT}-{hashlib.sha256(key.encode()).hexdigest()[:32]}"

    def features(
        self,
        source: Source[Any],
        extract: Callable[[Source[Any]], Iterator[Extracted]],
        *,
        progress: bool | None = None,
    ) -> CachedFeatures:
        """Return the features of a source, and compute those that are not in the cache.

        Parameters
        ----------
        source : Source
            The items.
        extract : callable
            Computes the features of items; see `extract_features`.
        progress : bool, optional
            Whether to show a progress bar. Default: on a terminal; elsewhere a line every 30 seconds.

        Raises
        ------
        DataError
            If no item can be read, another process uses the cache, the backbone does not return (n, D), a
            feature is not finite, or a file of the cache cannot be read.
        WriteError
            If a file of the cache cannot be written. The batches that were written before stay usable.
        """
        with self._locked(), _Store(self.folder, progress) as store:
            noun = source.kind.noun
            digests, unread = _digests(source, progress)
            tried: set[int] = set()
            changed: set[int] = set()
            cached = len(store.rows)
            # A second round is needed only if an item has changed, but not its copies, which were to share its
            # features.
            while missing := _missing(store, digests, tried):
                tried.update(missing)
                items = SlicedSource(source, missing, source.title)
                with progress_bar(total=len(missing), unit=noun, desc="features", progress=progress) as bar:
                    for part in extract(items):
                        values = None if part.values is None else _checked(part.values, part.indices, items)
                        good: list[bytes] = []
                        corrupt: list[tuple[bytes, str]] = []
                        several: set[bytes] = set()
                        for i in part.rows:
                            row, digest = missing[i], part.digests.get(i)
                            if digest is None:  # it could be read for its digest, but not again
                                unread[row] = part.unread[i]
                                del digests[row]
                                continue
                            if digest != digests[row]:
                                changed.add(row)
                                digests[row] = digest
                            if i in part.unread:
                                corrupt.append((digest, part.unread[i]))
                            else:
                                good.append(digest)
                            if i in part.several:
                                several.add(digest)
                        store.add(values, good, corrupt, several)
                        bar.update(len(part.rows))
            return _gather(store, source, digests, unread, len(store.rows) - cached, len(changed))

    @contextmanager
    def _locked(self) -> Iterator[None]:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = acquire_lock(self.folder / "lock", timeout=1)
        except Timeout:
            raise DataError(f"another process uses the cache {self.folder}: wait until it has finished") from None
        except WriteError:
            raise
        except OSError as error:
            raise WriteError(self.folder, error) from None
        try:
            yield
        finally:
            lock.release()


@dataclass(frozen=True)
class _Batch:
    """A line of the index.

    Parameters
    ----------
    start : int
        Its first row in the file of features.
    width : int
        Number of features per row.
    sha256 : str
        Checksum of the bytes of its rows.
    digests : list of bytes
        Digest of the item of each row.
    corrupt : list of tuple
        Digest and reason of each item that could not be read.
    several : list of bytes
        Digests of the images that are the first of several frames or pages.
    """

    start: int
    width: int
    sha256: str
    digests: list[bytes]
    corrupt: list[tuple[bytes, str]]
    several: list[bytes]

    @property
    def end(self) -> int:
        return self.start + len(self.digests)

    def line(self, cache: str) -> bytes:
        """Return the batch as a sealed line of the index of a cache."""
        entry = {
            "cache": cache,
            "start": self.start,
            "width": self.width,
            "features": self.sha256,
            "digests": [digest.hex() for digest in self.digests],
            "corrupt": [(digest.hex(), why) for digest, why in self.corrupt],
            "several": [digest.hex() for digest in self.several],
        }
        return f"{seal(entry)}\n".encode()

    @classmethod
    def from_line(cls, cache: str, line: bytes) -> Self | None:
        """Return the batch of a line; None if the line is damaged or of another cache."""
        try:
            entry = unseal(line)
        except ValueError:
            return None
        if entry["cache"] != cache:
            return None
        corrupt = [(bytes.fromhex(digest), why) for digest, why in entry["corrupt"]]
        digests = [bytes.fromhex(digest) for digest in entry["digests"]]
        several = [bytes.fromhex(digest) for digest in entry["several"]]
        return cls(entry["start"], entry["width"], entry["features"], digests, corrupt, several)


class _Store(AbstractContextManager["_Store"]):
    """The files of a cache, of which only one may be open at a time.

    ``features.f32`` holds rows of float32. ``index.jsonl`` has one line per batch, with its rows, the digests of
    their items, and their checksum. Rows that no line names are free. A line is written after its rows are on the
    disk.

    Parameters
    ----------
    folder : Path
        Folder of the cache.
    progress : bool, optional
        Whether to show a progress bar. Default: on a terminal; elsewhere a line every 30 seconds.

    Raises
    ------
    WriteError
        If a file cannot be opened for writing.
    DataError
        If a file cannot be read.
    """

    def __init__(self, folder: Path, progress: bool | None) -> None:
        self.width = 0
        self.rows: dict[bytes, int] = {}
        self.corrupt: dict[bytes, str] = {}
        self.several: set[bytes] = set()
        self.damaged = 0
        self.features = folder / "features.f32"
        self._index_path = folder / "index.jsonl"
        self._name = folder.name
        self._free: list[tuple[int, float]] = []
        new = not self._index_path.exists()
        self._file = _opened(self.features)
        try:
            self._index = _opened(self._index_path)
            try:
                if new:
                    sync_folder(folder)
                    sync_folder(folder.parent)
                self._read(progress)
            except BaseException:
                self._index.close()
                raise
        except BaseException:
            self._file.close()
            raise

    def __exit__(self, *_: object) -> None:
        self._index.close()
        self._file.close()

    def __contains__(self, digest: bytes) -> bool:
        return digest in self.rows or digest in self.corrupt

    def add(
        self,
        values: Tensor | None,
        digests: Sequence[bytes],
        corrupt: Iterable[tuple[bytes, str]],
        several: Set[bytes],
    ) -> None:
        """Write the features (n, D) of items by their digests, and why other items could not be read.

        ``several`` are the digests of images that are the first of several frames or pages.
        """
        # The new content of a changed item may be in the cache already.
        rows = {digest: i for i, digest in reversed(list(enumerate(digests))) if digest not in self.rows}
        new = sorted(rows, key=rows.__getitem__)
        corrupt = [
            (digest, why)
            for digest, why in corrupt
            if digest not in self.rows and digest not in rows and self.corrupt.get(digest) != why
        ]
        if not new and not corrupt:
            return
        content, start = b"", 0
        if values is not None and new:
            if self.width not in (0, values.shape[1]):
                raise DataError(
                    f"the backbone returned {values.shape[1]} features per input, but {self.width} before"
                )
            self.width = values.shape[1]
            content = values[[rows[digest] for digest in new]].numpy().tobytes()
            start = self._allocate(len(new))
            self._write(self._file, start * self._row_bytes, content)
        frames = [digest for digest in new if digest in several]
        batch = _Batch(start, self.width, hashlib.sha256(content).hexdigest(), new, corrupt, frames)
        self._write(self._index, self._index.seek(0, os.SEEK_END), batch.line(self._name))
        self._index_batch(batch)

    @property
    def _row_bytes(self) -> int:
        return _FLOAT_BYTES * self.width

    def _index_batch(self, batch: _Batch) -> None:
        for row, digest in enumerate(batch.digests, batch.start):
            self.rows[digest] = row
            self.corrupt.pop(digest, None)
        self.corrupt.update(batch.corrupt)
        self.several.update(batch.several)

    def _allocate(self, rows: int) -> int:
        """Allocate consecutive free rows, and return the first."""
        number = next(i for i, (start, end) in enumerate(self._free) if end - start >= rows)
        start, end = self._free[number]
        self._free[number] = (start + rows, end)
        return start

    def _write(self, file: FileIO, offset: int, content: bytes) -> None:
        try:
            file.seek(offset)
            left = memoryview(content)
            while left:
                left = left[file.write(left) :]
            flush_to_disk(file)
        except OSError as error:
            raise WriteError(Path(str(file.name)), error) from None

    def _read(self, progress: bool | None) -> None:
        """Read the index, and remove damaged batches from it."""
        batches: list[_Batch | None] = []
        try:
            end = 0
            with self._index_path.open("rb") as lines:
                for line in lines:
                    if not line.endswith(b"\n"):
                        # The process was killed, or the disk was full, while the line was written.
                        self._index.truncate(end)
                        break
                    end += len(line)
                    batches.append(_Batch.from_line(self._name, line))
            self._verify(batches, progress)
        except OSError as error:
            raise DataError(f"cannot read the cache {self._index_path.parent}: {error.strerror}") from None
        self.damaged = batches.count(None)
        if self.damaged:
            self._rewrite(batches)
        good = [batch for batch in batches if batch is not None]
        for batch in good:
            self._index_batch(batch)
        end = 0
        for batch in sorted(good, key=lambda batch: batch.start):
            if batch.digests:
                self._free.append((end, batch.start))
                end = max(end, batch.end)
        self._free.append((end, np.inf))

    def _verify(self, batches: list[_Batch | None], progress: bool | None) -> None:
        """Compare the features with their checksums in one pass; replace batches that differ by None."""
        order = sorted((batch.start, i) for i, batch in enumerate(batches) if batch is not None and batch.digests)
        rows = sum(len(batch.digests) for batch in batches if batch is not None)
        with progress_bar(total=rows, unit="row", desc="checking the cache", progress=progress) as bar:
            for _, i in order:
                batch = batches[i]
                assert batch is not None
                self._file.seek(_FLOAT_BYTES * batch.width * batch.start)
                content = self._file.read(_FLOAT_BYTES * batch.width * len(batch.digests))
                if hashlib.sha256(content).hexdigest() != batch.sha256:
                    batches[i] = None
                else:
                    self.width = batch.width
                bar.update(len(batch.digests))

    def _rewrite(self, batches: Sequence[_Batch | None]) -> None:
        """Rewrite the index without the damaged lines."""
        self._index.close()
        try:
            with (
                replacing(self._index_path) as temporary,
                self._index_path.open("rb") as lines,
                temporary.open("wb") as kept,
            ):
                kept.writelines(line for line, batch in zip(lines, batches, strict=True) if batch is not None)
        finally:
            self._index = _opened(self._index_path)


def _opened(path: Path) -> FileIO:
    """Open a file for reading and writing, and create it if it does not exist."""
    try:
        return open(path, "r+b", buffering=0, opener=lambda name, flags: os.open(name, flags | os.O_CREAT, 0o666))
    except OSError as error:
        raise WriteError(path, error) from None


def _missing(store: _Store, digests: dict[int, bytes], tried: set[int]) -> list[int]:
    """Return the rows of the items whose features must be computed."""
    first: dict[bytes, int] = {}
    for row, digest in digests.items():
        first.setdefault(digest, row)
    # One row per content, in order: after a killed process, the rest begins at a whole batch.
    wanted = [(row, digest) for digest, row in first.items() if row not in tried]
    missing = [row for row, digest in wanted if digest not in store]
    # Last, the items that could not be read before: the cause may have been the disk.
    return missing + [row for row, digest in wanted if digest in store.corrupt]


def _gather(
    store: _Store,
    source: Source[Any],
    digests: dict[int, bytes],
    unread: dict[int, str],
    computed: int,
    changed: int,
) -> CachedFeatures:
    reasons = unread | {row: why for row, d in digests.items() if (why := store.corrupt.get(d)) is not None}
    corrupt = [(source.name(row), reasons[row]) for row in sorted(reasons)]
    rows = [row for row, digest in digests.items() if digest in store.rows]
    if not rows:
        name, why = corrupt[0]
        raise DataError(
            f"none of the {len(corrupt)} {source.kind.name} of {source.title} can be read; {name}: {why}"
        )
    # Copy-on-write, so that changes to the features do not change the file.
    shape = max(store.rows.values()) + 1, store.width
    stored = torch.from_numpy(np.memmap(store.features, np.float32, "c", shape=shape))
    kept = [digests[row] for row in rows]
    stored_rows = torch.tensor([store.rows[digest] for digest in kept])
    several = sum(digest in store.several for digest in kept)
    return CachedFeatures(
        stored, stored_rows, torch.tensor(rows), kept, corrupt, computed, changed, store.damaged, several
    )


def _digests(source: Source[Any], progress: bool | None) -> tuple[dict[int, bytes], dict[int, str]]:
    """Return the digest of each item by its row, and the reason for each item that cannot be read."""
    digests, unread = {}, {}
    for row in progress_bar(
        range(len(source)), unit=source.kind.noun, desc="looking for changes", progress=progress
    ):
        try:
            digests[row] = source.digest(row)
        except ItemError as error:
            unread[row] = error.reason
    return digests, unread


def _checked(values: Tensor, indices: Sequence[int], items: Source[Any]) -> Tensor:
    """Return the features of a batch as float32 on the CPU."""
    if not isinstance(values, Tensor) or values.ndim != 2 or len(values) != len(indices):
        what = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise DataError(f"the backbone returned {what} for {len(indices)} {items.kind.name}, not features (n, D)")
    values = values.float().cpu()
    if not torch.isfinite(values).all():
        row = int((~torch.isfinite(values)).any(1).nonzero()[0])
        raise DataError(f"the backbone's feature of {items.name(indices[row])} is not finite")
    return values
