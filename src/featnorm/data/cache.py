"""Features on disk: what a frozen backbone says of an image is asked once, whatever it is asked for later."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import Tensor
from tqdm import tqdm

from featnorm.data.images import DataError, ImageError, ImageSource, SlicedImages
from featnorm.data.loading import Extracted


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
    """

    stored: Tensor
    places: Tensor
    rows: Tensor
    digests: list[bytes]
    corrupt: list[tuple[str, str]]
    computed: int

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
    of its content: a changed one is computed anew, one that was moved or copied is not. One process at a time
    may use it.

    Parameters
    ----------
    folder : where the caches of all backbones lie.
    key : whatever the features depend on besides the images; the cache's own folder is named by its digest.
    """

    def __init__(self, folder: str | Path, key: str) -> None:
        self.folder = Path(folder).expanduser() / hashlib.sha256(key.encode()).hexdigest()[:32]
        self._features = self.folder / "features.f32"
        # A line a batch: what is not named here in a whole line does not count.
        self._index = self.folder / "index.jsonl"

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
            than (n, D), or a feature is not finite.
        """
        hide = None if progress is None else not progress
        digests, unread = _digests(source, hide)
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(self.folder / "lock", timeout=1):
                state = self._open()
                known = len(state.places)
                # Once each, in order: what a killed process has left begins at a whole batch.
                first = {digest: row for row, digest in reversed(digests.items())}
                wanted = [row for row, digest in digests.items() if first[digest] == row]
                missing = [row for row in wanted if not state.knows(digests[row])]
                # Last, those that could not be read before: what ailed them may have been the disk.
                missing += [row for row in wanted if digests[row] in state.corrupt]
                images = SlicedImages(source, missing, source.title)
                with tqdm(total=len(missing), unit="image", desc="features", disable=hide, leave=False) as bar:
                    for part in extract(images):
                        corrupt = [(digests[missing[i]], why) for i, why in part.unread.items()]
                        good = [digests[missing[i]] for i in part.indices]
                        values = None if part.values is None else _checked(part.values, part.indices, images)
                        self._append(state, values, good, corrupt)
                        bar.update(len(part.rows))
                return self._gather(state, source, digests, unread, len(state.places) - known)
        except Timeout:
            raise DataError(f"another process is at work in {self.folder}: wait for it") from None

    def _gather(
        self, state: "_State", source: ImageSource, digests: dict[int, bytes], unread: dict[int, str], asked: int
    ) -> CachedFeatures:
        reasons = unread | {row: why for row, d in digests.items() if (why := state.corrupt.get(d)) is not None}
        corrupt = [(source.name(row), reasons[row]) for row in sorted(reasons)]
        rows = [row for row, digest in digests.items() if digest in state.places]
        if not rows:
            name, why = corrupt[0]
            raise DataError(f"none of the {len(corrupt)} images of {source.title} can be read; {name}: {why}")
        # Copied on writing, so that whoever changes the features does not change the file.
        stored = torch.from_numpy(np.memmap(self._features, np.float32, "c").reshape(-1, state.width))
        kept = [digests[row] for row in rows]
        places = torch.tensor([state.places[digest] for digest in kept])
        return CachedFeatures(stored, places, torch.tensor(rows), kept, corrupt, asked)

    def _open(self) -> "_State":
        """Read the index; cut off what a killed process left of a batch."""
        state = _State()
        if self._index.exists():
            whole, newline, _ = self._index.read_bytes().rpartition(b"\n")
            _truncate(self._index, len(whole) + len(newline))
            try:
                for line in whole.splitlines():
                    entry = json.loads(line)
                    corrupt = [(bytes.fromhex(digest), why) for digest, why in entry["corrupt"]]
                    state.add(entry["width"], map(bytes.fromhex, entry["digests"]), corrupt)
            except (ValueError, KeyError, TypeError):
                raise DataError(f"the cache {self.folder} is damaged: delete it") from None
        held = self._features.stat().st_size if self._features.exists() else 0
        wanted = 4 * state.width * len(state.places)
        if held < wanted:
            raise DataError(f"the cache {self.folder} is damaged, with features missing: delete it")
        if held:
            _truncate(self._features, wanted)
        return state

    def _append(
        self, state: "_State", values: Tensor | None, digests: list[bytes], corrupt: list[tuple[bytes, str]]
    ) -> None:
        corrupt = [(digest, why) for digest, why in corrupt if state.corrupt.get(digest) != why]
        if not digests and not corrupt:
            return
        if values is not None:
            if state.width not in (0, values.shape[1]):
                raise DataError(
                    f"the backbone returned {values.shape[1]} features an image, and {state.width} before"
                )
            state.width = values.shape[1]
            with self._features.open("ab") as file:
                file.write(values.numpy().tobytes())
        entry = {
            "width": state.width,
            "digests": [digest.hex() for digest in digests],
            "corrupt": [(digest.hex(), why) for digest, why in corrupt],
        }
        with self._index.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        state.add(state.width, digests, corrupt)


class _State:
    """What a cache holds: the place of the features of every content, and why others could not be read."""

    def __init__(self) -> None:
        self.width = 0
        self.places: dict[bytes, int] = {}
        self.corrupt: dict[bytes, str] = {}

    def knows(self, digest: bytes) -> bool:
        return digest in self.places or digest in self.corrupt

    def add(self, width: int, digests: Iterable[bytes], corrupt: Iterable[tuple[bytes, str]]) -> None:
        self.width = width
        for digest in digests:
            self.places[digest] = len(self.places)
            self.corrupt.pop(digest, None)
        self.corrupt.update(corrupt)


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


def _truncate(file: Path, size: int) -> None:
    if file.stat().st_size > size:
        os.truncate(file, size)
