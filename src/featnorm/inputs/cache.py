"""Features on disk: what a frozen backbone says of an image is asked once, whatever it is asked for later."""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from io import FileIO
from pathlib import Path
from typing import Self

import numpy as np
import torch
from filelock import Timeout
from torch import Tensor
from tqdm import tqdm

from featnorm._utils.files import WriteError, acquire_lock, flush_to_disk, replacing, sync_folder
from featnorm._utils.sealed import seal, unseal
from featnorm.inputs.images import DataError, ImageError, ImageSource, SlicedImages
from featnorm.inputs.loading import Extracted

# Caches of other formats lie in other folders, and are not read.
_FORMAT = 3
_ROW_UNIT = 4  # bytes of a float32


@dataclass(frozen=True)
class CachedFeatures:
    """What a backbone says of the images of a source that could be read.

    Attributes
    ----------
    stored : Tensor
        (N, D) float32, all that the cache holds, mapped from its file and not read until it is asked for.
    places : Tensor
        (n,) int64, where in it the features of each image are, in the order of the source.
    rows : Tensor
        (n,) int64, which images of the source they are of.
    digests : list of bytes
        (n,) what tells the content of each image from any other.
    corrupt : list of tuple of str
        Name and reason of each image that could not be read.
    computed : int
        For how many images the backbone was asked; the others were known.
    changed : int
        Number of images whose content changed while the source was read. Features and digest are those of the
        later content.
    damaged : int
        Number of batches that were found damaged on disk and dropped. Features that were in them and are needed
        here have been computed again.
    several : int
        Number of images that are the first of several frames or pages of their file.
    """

    stored: Tensor
    places: Tensor
    rows: Tensor
    digests: list[bytes]
    corrupt: list[tuple[str, str]]
    computed: int
    changed: int
    damaged: int
    several: int

    @cached_property
    def values(self) -> Tensor:
        """The features (n, D); still mapped where they lie one after the other, as those of one pass do."""
        first, n = int(self.places[0]), len(self.places)
        if torch.equal(self.places, torch.arange(first, first + n)):
            return self.stored[first : first + n]
        return self.stored[self.places]

    def batches(self, size: int) -> Iterator[Tensor]:
        """Yield the features in order, at most ``size`` at a time, each time read anew."""
        for places in self.places.split(size):
            yield self.stored[places]


class FeatureCache:
    """The features of one backbone under one transform, by the content of the images.

    Every batch is on disk before the next one is asked for, so that a process that is killed loses one at most,
    and the same call goes on with the batches that an unbroken one would have had. An image is known by a digest
    of the content that it was decoded from: a changed one is computed again, one that was moved or copied is not.
    Every batch has a checksum, which is compared each time the cache is opened; a batch that differs is dropped
    and computed again. One process at a time may use it.

    Parameters
    ----------
    folder : where the caches of all backbones lie.
    key : whatever the features depend on besides the images; the cache's own folder is named by its digest.
    """

    def __init__(self, folder: str | Path, key: str) -> None:
        self.folder = Path(folder).expanduser() / f"{_FORMAT}-{hashlib.sha256(key.encode()).hexdigest()[:32]}"

    def features(
        self,
        source: ImageSource,
        extract: Callable[[ImageSource], Iterator[Extracted]],
        *,
        progress: bool | None = None,
    ) -> CachedFeatures:
        """Return the features of a source; the backbone is asked for those that are not known yet.

        Parameters
        ----------
        source : the images.
        extract : asks the backbone about images, see `extract_images`.
        progress : show a progress bar; None for where there is a terminal.

        Raises
        ------
        DataError
            No image could be read, another process is at work in this cache, the backbone returns something else
            than (n, D), a feature is not finite, or a file of the cache cannot be read.
        WriteError
            A file of the cache cannot be written. The batches that were written before stay usable.
        """
        hide = None if progress is None else not progress
        with self._locked(), _Store(self.folder, hide) as store:
            digests, unread = _digests(source, hide)
            tried: set[int] = set()
            changed: set[int] = set()
            known = len(store.places)
            # A second round is needed only where an image has changed and its copies, which were to share its
            # features, have not.
            while missing := _missing(store, digests, tried):
                tried.update(missing)
                images = SlicedImages(source, missing, source.title)
                with tqdm(total=len(missing), unit="image", desc="features", disable=hide, leave=False) as bar:
                    for part in extract(images):
                        values = None if part.values is None else _checked(part.values, part.indices, images)
                        good: list[bytes] = []
                        corrupt: list[tuple[bytes, str]] = []
                        several: set[bytes] = set()
                        for i in part.rows:
                            row, digest = missing[i], part.digests.get(i)
                            if digest is None:  # it could be read a moment ago
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
            return _gather(store, source, digests, unread, len(store.places) - known, len(changed))

    @contextmanager
    def _locked(self) -> Iterator[None]:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = acquire_lock(self.folder / "lock", timeout=1)
        except Timeout:
            raise DataError(f"another process is at work in {self.folder}: wait for it") from None
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
    start : the first of its rows in the file of features.
    width : numbers in a row.
    sha256 : of the bytes of its rows.
    digests : of the images of its rows.
    corrupt : digests and reasons of those that could not be read.
    several : digests of those that are the first of several frames or pages.
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
        """Return it as a sealed line of the index of a cache."""
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
    def of_line(cls, cache: str, line: bytes) -> Self | None:
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

    ``features.f32`` holds rows of float32. ``index.jsonl`` has one line per batch: where its rows are, which
    images they are of, and their checksum. Rows that no line names are free. A line is written when its rows are
    on the disk, so that no line is ever ahead of them.

    Parameters
    ----------
    folder : of the cache.
    hide : no progress bar, see tqdm.

    Raises
    ------
    WriteError
        A file cannot be opened for writing.
    DataError
        A file cannot be read.
    """

    def __init__(self, folder: Path, hide: bool | None) -> None:
        self.width = 0
        self.places: dict[bytes, int] = {}
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
                self._read(hide)
            except BaseException:
                self._index.close()
                raise
        except BaseException:
            self._file.close()
            raise

    def __exit__(self, *_: object) -> None:
        self._index.close()
        self._file.close()

    def knows(self, digest: bytes) -> bool:
        return digest in self.places or digest in self.corrupt

    def add(
        self,
        values: Tensor | None,
        digests: Sequence[bytes],
        corrupt: Iterable[tuple[bytes, str]],
        several: Set[bytes],
    ) -> None:
        """Write the features (n, D) of images by their digests, and why others could not be read.

        Those of the digests that are in ``several`` are of first frames.
        """
        # An image that has changed may be one that is known by now.
        rows = {digest: i for i, digest in reversed(list(enumerate(digests))) if digest not in self.places}
        new = sorted(rows, key=rows.__getitem__)
        corrupt = [
            (digest, why)
            for digest, why in corrupt
            if digest not in self.places and digest not in rows and self.corrupt.get(digest) != why
        ]
        if not new and not corrupt:
            return
        content, start = b"", 0
        if values is not None and new:
            if self.width not in (0, values.shape[1]):
                raise DataError(
                    f"the backbone returned {values.shape[1]} features per image, but {self.width} before"
                )
            self.width = values.shape[1]
            content = values[[rows[digest] for digest in new]].numpy().tobytes()
            start = self._room(len(new))
            self._write(self._file, start * self._row_bytes, content)
        frames = [digest for digest in new if digest in several]
        batch = _Batch(start, self.width, hashlib.sha256(content).hexdigest(), new, corrupt, frames)
        self._write(self._index, self._index.seek(0, os.SEEK_END), batch.line(self._name))
        self._take(batch)

    @property
    def _row_bytes(self) -> int:
        return _ROW_UNIT * self.width

    def _take(self, batch: _Batch) -> None:
        for row, digest in enumerate(batch.digests, batch.start):
            self.places[digest] = row
            self.corrupt.pop(digest, None)
        self.corrupt.update(batch.corrupt)
        self.several.update(batch.several)

    def _room(self, rows: int) -> int:
        """Take so many free rows that lie one after the other; return the first."""
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

    def _read(self, hide: bool | None) -> None:
        """Read the index, leave out what is damaged, and remove it from the index."""
        batches: list[_Batch | None] = []
        try:
            end = 0
            with self._index_path.open("rb") as lines:
                for line in lines:
                    if not line.endswith(b"\n"):
                        # A process was killed, or the disk was full, while it wrote the line.
                        self._index.truncate(end)
                        break
                    end += len(line)
                    batches.append(_Batch.of_line(self._name, line))
            self._verify(batches, hide)
        except OSError as error:
            raise DataError(f"cannot read the cache {self._index_path.parent}: {error.strerror}") from None
        self.damaged = batches.count(None)
        if self.damaged:
            self._rewrite(batches)
        good = [batch for batch in batches if batch is not None]
        for batch in good:
            self._take(batch)
        end = 0
        for batch in sorted(good, key=lambda batch: batch.start):
            if batch.digests:
                self._free.append((end, batch.start))
                end = max(end, batch.end)
        self._free.append((end, np.inf))

    def _verify(self, batches: list[_Batch | None], hide: bool | None) -> None:
        """Compare the features with their checksums in one pass; put None in the place of batches that differ."""
        order = sorted((batch.start, i) for i, batch in enumerate(batches) if batch is not None and batch.digests)
        rows = sum(len(batch.digests) for batch in batches if batch is not None)
        with tqdm(total=rows, unit="image", desc="checking the cache", disable=hide, leave=False) as bar:
            for _, i in order:
                batch = batches[i]
                assert batch is not None
                self._file.seek(_ROW_UNIT * batch.width * batch.start)
                content = self._file.read(_ROW_UNIT * batch.width * len(batch.digests))
                if hashlib.sha256(content).hexdigest() != batch.sha256:
                    batches[i] = None
                else:
                    self.width = batch.width
                bar.update(len(batch.digests))

    def _rewrite(self, batches: Sequence[_Batch | None]) -> None:
        """Replace the index by one of the lines that are not damaged."""
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
    """Open a file to read and to write anywhere, which is made where there is none."""
    try:
        return open(path, "r+b", buffering=0, opener=lambda name, flags: os.open(name, flags | os.O_CREAT, 0o666))
    except OSError as error:
        raise WriteError(path, error) from None


def _missing(store: _Store, digests: dict[int, bytes], tried: set[int]) -> list[int]:
    """Return the images that the backbone is to be asked for, by their rows."""
    first: dict[bytes, int] = {}
    for row, digest in digests.items():
        first.setdefault(digest, row)
    # Once each, in order: what a killed process has left begins at a whole batch.
    wanted = [(row, digest) for digest, row in first.items() if row not in tried]
    missing = [row for row, digest in wanted if not store.knows(digest)]
    # Last, those that could not be read before: what ailed them may have been the disk.
    return missing + [row for row, digest in wanted if digest in store.corrupt]


def _gather(
    store: _Store, source: ImageSource, digests: dict[int, bytes], unread: dict[int, str], asked: int, changed: int
) -> CachedFeatures:
    reasons = unread | {row: why for row, d in digests.items() if (why := store.corrupt.get(d)) is not None}
    corrupt = [(source.name(row), reasons[row]) for row in sorted(reasons)]
    rows = [row for row, digest in digests.items() if digest in store.places]
    if not rows:
        name, why = corrupt[0]
        raise DataError(f"none of the {len(corrupt)} images of {source.title} can be read; {name}: {why}")
    # Copied on writing, so that whoever changes the features does not change the file.
    shape = max(store.places.values()) + 1, store.width
    stored = torch.from_numpy(np.memmap(store.features, np.float32, "c", shape=shape))
    kept = [digests[row] for row in rows]
    places = torch.tensor([store.places[digest] for digest in kept])
    several = sum(digest in store.several for digest in kept)
    return CachedFeatures(
        stored, places, torch.tensor(rows), kept, corrupt, asked, changed, store.damaged, several
    )


def _digests(source: ImageSource, hide: bool | None) -> tuple[dict[int, bytes], dict[int, str]]:
    """Return the digest of every image by its row, and of those that cannot be read the reason."""
    digests, unread = {}, {}
    for row in tqdm(range(len(source)), unit="image", desc="looking for changes", disable=hide, leave=False):
        try:
            digests[row] = source.digest(row)
        except ImageError as error:
            unread[row] = error.reason
    return digests, unread


def _checked(values: Tensor, indices: Sequence[int], images: ImageSource) -> Tensor:
    """Return the features of a batch as float32 on the CPU."""
    if not isinstance(values, Tensor) or values.ndim != 2 or len(values) != len(indices):
        what = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise DataError(f"the backbone returned {what} for {len(indices)} images, not features (n, D)")
    values = values.float().cpu()
    if not torch.isfinite(values).all():
        row = int((~torch.isfinite(values)).any(1).nonzero()[0])
        raise DataError(f"the backbone's feature of {images.name(indices[row])} is not finite")
    return values
