"""Folders and files, on this machine or in a store, behind one interface; and the walk that finds the images."""

import io
import os
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import compress
from pathlib import Path, PurePath
from typing import Any, BinaryIO, cast

from featnorm._utils.extras import import_extra
from featnorm.inputs.formats import (
    HEAD_BYTES,
    VIDEO_ENDINGS,
    PassedOver,
    ending,
    looks_like_image,
    named_as_image,
)

SPLIT_NAMES = {"train", "training", "trainval", "val", "valid", "validation", "dev", "test", "testing"}

# Threads that read the first bytes of files: on a network disk and in a store, each file is an answer to wait for.
_SNIFFERS = 32
# Files per task of such a thread: on a local disk, handing over a file takes longer than reading its first bytes.
_SNIFFED_PER_TASK = 64


class Folder(ABC):
    """A folder, and the files in it and below it by their paths relative to it, with ``/`` between their parts.

    The path ``""`` is the folder itself. Methods that read raise OSError if they cannot.
    """

    @abstractmethod
    def entries(self, path: str = "") -> Iterable[tuple[str, str]]:
        """Yield the name and the kind of each entry of a folder: "file", "folder", or "" for a pipe or device."""

    @abstractmethod
    def name(self, path: str = "") -> str:
        """Return the full name of a file or folder for messages, without keys and settings."""

    @abstractmethod
    def full_path(self, path: str = "") -> PurePath:
        """Return the absolute path of a file or folder."""

    @abstractmethod
    def read(self, path: str) -> bytes:
        """Return the content of a file."""

    @abstractmethod
    def head(self, path: str) -> bytes:
        """Return the first `HEAD_BYTES` of a file."""

    @abstractmethod
    def open(self, path: str) -> Any:
        """Open a file for random access, as a `pyarrow.NativeFile`."""

    def stream(self, path: str) -> BinaryIO:
        """Open a file for reading bytes and lines."""
        return cast(BinaryIO, io.BufferedReader(self.open(path)))

    @abstractmethod
    def beside(self, path: str, other: str) -> str:
        """Return the path of a file that is named relative to the folder of the file `path`."""

    @abstractmethod
    def identity(self, path: str) -> str:
        """Return the name, size and modification time of a file."""

    def absolute(self) -> "Folder":
        """Return the same folder, independent of the working directory."""
        return self

    def walk_key(self, path: str) -> str:
        """Return a string that is the same for all paths that lead to the same folder."""
        return path

    def walk_enters(self, path: str) -> bool:
        """Whether the walk enters a sub-folder."""
        return True

    def __str__(self) -> str:
        return self.name()

    def top_level(self, endings: tuple[str, ...]) -> tuple[list[str], list[str]]:
        """Return the sorted names of the visible sub-folders, and of the visible files with one of the endings."""
        found = sorted((name, kind) for name, kind in self.entries() if name[0] != ".")
        folders = [name for name, kind in found if kind == "folder"]
        return folders, [name for name, kind in found if kind == "file" and name.endswith(endings)]

    def splits(self, endings: tuple[str, ...]) -> list[str]:
        """Return the splits in it: those that its tables, or all its sub-folders, are named after."""
        folders, tables = self.top_level(endings)
        stems = {re.split(r"[-._]", table)[0].lower() for table in tables} & SPLIT_NAMES
        names = {folder.lower() for folder in folders}
        return sorted(stems | (names if names <= SPLIT_NAMES else set()))

    @cached_property
    def _walk(self) -> "_Walk":
        return _Walk(self)

    @property
    def images(self) -> tuple[list[str], PassedOver]:
        """The image files in it and below it, relative to it, and what else is there.

        A file is an image if its name ends as those of image files do, or if it begins as an image; only files
        with other names are opened, to read their first bytes. A file that cannot be opened counts as an image, so
        that the error is reported when it is read. Hidden files and folders are ignored.

        The files are sorted, folder by folder. Links are followed, and every folder is read once, because links
        may form a cycle.
        """
        walk = self._walk
        return walk.files, PassedOver(walk.kinds, walk.hidden, tuple(walk.closed))

    @property
    def videos(self) -> tuple[list[str], PassedOver]:
        """The files in it and below it that are videos by the ending of their names, as `images`."""
        walk = self._walk
        kinds = walk.kinds - Counter(map(_kind_of_file, walk.videos)) + Counter(map(_kind_of_file, walk.files))
        return walk.videos, PassedOver(kinds, walk.hidden, tuple(walk.closed), "a video")


class LocalFolder(Folder):
    """A folder on this machine.

    Parameters
    ----------
    root : str or Path
        The folder; "" for the working directory, whose files have the names that the user gave them.
    """

    def __init__(self, root: str | Path) -> None:
        self._root = str(root)

    def entries(self, path: str = "") -> Iterable[tuple[str, str]]:
        """See `Folder`."""
        # An entry takes several times the memory of its name, and a folder may have millions.
        with os.scandir(self.name(path)) as entries:
            for entry in entries:
                yield entry.name, _kind(entry)

    def name(self, path: str = "") -> str:
        """See `Folder`."""
        return os.path.join(self._root, path.replace("/", os.sep)) if path else self._root

    def full_path(self, path: str = "") -> PurePath:
        """See `Folder`."""
        return Path(self.name(path)).resolve()

    def read(self, path: str) -> bytes:
        """See `Folder`."""
        with open(self.name(path), "rb") as file:
            return file.read()

    def head(self, path: str) -> bytes:
        """See `Folder`."""
        with open(self.name(path), "rb", buffering=0) as file:
            return file.read(HEAD_BYTES)

    def open(self, path: str) -> Any:
        """See `Folder`."""
        return import_extra("pyarrow").OSFile(self.name(path))

    def stream(self, path: str) -> BinaryIO:
        """See `Folder`."""
        return open(self.name(path), "rb")

    def beside(self, path: str, other: str) -> str:
        """See `Folder`."""
        return os.path.join(os.path.dirname(path), other)

    def identity(self, path: str) -> str:
        """See `Folder`; the name alone if the file is gone."""
        name = self.name(path)
        try:
            facts = os.stat(name)
        except OSError:
            return name
        return f"{name} {facts.st_size} {facts.st_mtime_ns}"

    def absolute(self) -> "LocalFolder":
        """See `Folder`."""
        return LocalFolder(os.path.realpath(self._root))

    def walk_key(self, path: str) -> str:
        """See `Folder`; links to one folder have the same."""
        return os.path.realpath(self.name(path))

    def walk_enters(self, path: str) -> bool:
        """See `Folder`; not a link to a folder above, or to one that the walk reaches by itself."""
        name = self.name(path)
        if not os.path.islink(name):
            return True
        root, target = Path(self._root).resolve(), Path(name).resolve()
        if target.is_relative_to(root):
            return any(part[0] == "." for part in target.relative_to(root).parts)
        return not root.is_relative_to(target)


def _kind(entry: os.DirEntry[str]) -> str:
    try:
        if entry.is_dir():
            return "folder"
        # A broken link is reported when it is read; reading a pipe or device would wait.
        return "file" if entry.is_file() or (entry.is_symlink() and not os.path.exists(entry.path)) else ""
    except OSError:
        return "file"


@dataclass(frozen=True)
class Files:
    """Files of a folder that the user named one by one.

    Parameters
    ----------
    folder : Folder
        The folder. Files on this machine are relative to the working directory.
    paths : tuple of str
        Their paths relative to it.
    """

    folder: Folder
    paths: tuple[str, ...]

    def __str__(self) -> str:
        return ", ".join(map(self.folder.name, self.paths))


def title_of(folder: Folder, path: str = "") -> str:
    """Return a short name of a folder, or of a file in it, for tables; a split is named with its data set."""
    full = folder.full_path(path)
    own = full.stem if path else full.name
    return f"{full.parent.name}:{own}" if own.lower() in SPLIT_NAMES else own


def _kind_of_file(path: str) -> str:
    return ending(path.rpartition("/")[2])


class _Walk:
    """The images and videos of a folder and of all folders below it; see `Folder.images`."""

    def __init__(self, folder: Folder) -> None:
        self.files: list[str] = []
        self.videos: list[str] = []
        self.kinds: Counter[str] = Counter()
        self.hidden = 0
        self.closed: list[str] = []
        self._folder = folder
        self._seen: set[str] = set()
        # Indices of the files whose names do not tell whether they are images.
        self._unnamed: list[int] = []
        self._enter("")
        self._sniff()

    def _enter(self, path: str) -> None:
        key = self._folder.walk_key(path)
        if key in self._seen:
            return
        self._seen.add(key)
        try:
            # Sorted, so that it does not depend on the disk which of two links is followed.
            entries = sorted(self._folder.entries(path))
        except OSError:
            self.closed.append(path or self._folder.name())
            return
        for name, kind in entries:
            below = f"{path}/{name}" if path else name
            if name[0] == ".":
                self.hidden += 1
            elif kind == "folder":
                if self._folder.walk_enters(below):
                    self._enter(below)
            elif kind != "file":
                self.kinds["pipes and devices"] += 1
            elif (named := named_as_image(name)) is False:
                self.kinds[ending(name)] += 1
            else:
                if named is None:
                    self._unnamed.append(len(self.files))
                self.files.append(below)

    def _sniff(self) -> None:
        """Remove the files that are not images by their first bytes."""
        share = min(_SNIFFED_PER_TASK, -(-len(self._unnamed) // _SNIFFERS)) or 1
        tasks = [self._unnamed[start : start + share] for start in range(0, len(self._unnamed), share)]
        with ThreadPoolExecutor(_SNIFFERS, "featnorm-sniff") as sniffers:
            others = [i for found in sniffers.map(self._others, tasks) for i in found]
        if others:
            kept = bytearray(b"\1") * len(self.files)
            for i in others:
                kept[i] = 0
                self.kinds[_kind_of_file(self.files[i])] += 1
                if self.files[i].lower().endswith(VIDEO_ENDINGS):
                    self.videos.append(self.files[i])
            self.files = list(compress(self.files, kept))

    def _others(self, indices: list[int]) -> list[int]:
        return [i for i in indices if not self._begins_as_image(self.files[i])]

    def _begins_as_image(self, path: str) -> bool:
        try:
            return looks_like_image(self._folder.head(path))
        except OSError:
            return True
