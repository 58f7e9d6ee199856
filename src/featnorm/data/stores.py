"""Images in object stores and on other file systems, by their address: ``s3://bucket/photos``."""

import posixpath
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import quote

from PIL import Image

from featnorm.data.images import (
    EXTENSIONS,
    DataError,
    ImageError,
    ImageSource,
    content_digest,
    decode,
    first_line,
    vision_module,
)

_ADDRESS = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]*)://.+", re.IGNORECASE | re.DOTALL)


def is_address(spec: str) -> bool:
    """Whether it begins as an address does, with a scheme and ``://``."""
    return _ADDRESS.fullmatch(spec) is not None


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file in a store; what it is called leaves out what an address may hold of keys and settings.

    Parameters
    ----------
    store : the address by which its file system is reached.
    path : of the file, on that file system.
    size : in bytes.
    changed : in nanoseconds since 1970; None where the store does not tell.
    """

    store: str
    path: str
    size: int | None = None
    changed: int | None = None

    def __str__(self) -> str:
        match = _ADDRESS.fullmatch(self.store)
        assert match is not None
        return f"{match['scheme']}://{self.path}"

    @property
    def name(self) -> str:
        """The last part of its path."""
        return PurePosixPath(self.path).name

    @property
    def identity(self) -> str:
        """What tells it from others without being read: address, size, time of change."""
        return f"{self} {self.size} {self.changed}"

    def open(self) -> Any:
        """Open it for reading at any place, as a `pyarrow.NativeFile`.

        Raises
        ------
        OSError
            It cannot be opened.
        """
        return _reached(self.store)[0].open_input_file(self.path)

    def read(self) -> bytes:
        """Return its content.

        Raises
        ------
        ImageError
            It cannot be read.
        """
        try:
            with self.open() as file:
                return bytes(file.read())
        except OSError as error:
            raise ImageError(str(self), first_line(error)) from error

    def beside(self, path: str) -> "StoredFile":
        """Return the file of that path relative to the folder that this one lies in."""
        return StoredFile(self.store, posixpath.normpath(PurePosixPath(self.path).parent / path))


class StoredImages(ImageSource):
    """Image files of a folder in a store, or single ones.

    Parameters
    ----------
    files : the files.
    title : str
        Name for tables.
    labels : of the files; None for none.
    class_names : of the labels.
    """

    names_are_paths = True
    may_fork = False

    def __init__(
        self,
        files: Sequence[StoredFile],
        title: str,
        labels: Sequence[int | None] | None = None,
        class_names: list[str] | None = None,
    ) -> None:
        super().__init__(title, [None] * len(files) if labels is None else labels, class_names)
        self._files = list(files)

    def _image(self, i: int) -> Image.Image:
        return decode(self._files[i].read(), self._name(i))

    def _name(self, i: int) -> str:
        return str(self._files[i])

    def _identity(self, i: int) -> str:
        return self._files[i].identity

    def _digest(self, i: int) -> bytes:
        return content_digest(self._files[i].read(), self._name(i))


@dataclass(frozen=True)
class StoredFolder:
    """What a store has at an address.

    Attributes
    ----------
    place : StoredFile
        Itself.
    files : tuple of StoredFile
        All files in it and below, by their paths; itself, where it is a file.
    folders : tuple of str
        The folders that lie in it directly.
    is_file : bool
        Whether it is a file.
    """

    place: StoredFile
    files: tuple[StoredFile, ...]
    folders: tuple[str, ...]
    is_file: bool

    def parts(self, file: StoredFile) -> tuple[str, ...]:
        """Return the path of a file in it, from here."""
        return PurePosixPath(file.path).relative_to(self.place.path).parts

    def parquet_files(self) -> list[StoredFile]:
        """Return the parquet files that lie in it directly."""
        return [f for f in self.files if f.name.endswith(".parquet") and len(self.parts(f)) == 1]

    def image_files(self) -> list[StoredFile]:
        """Return the image files in it and below."""
        return [file for file in self.files if file.name.lower().endswith(EXTENSIONS)]

    def images(self, title: str, *, every: bool = False) -> StoredImages:
        """Return the images in it, or every file; see `FolderImages`.

        Raises
        ------
        DataError
            There is none.
        """
        files = list(self.files) if every else self.image_files()
        if not files:
            expected = "" if every else f": expected files ending in {', '.join(EXTENSIONS)}"
            raise DataError(f"no {'files' if every else 'images'} in {self.place}{expected}")
        parts = [self.parts(file) for file in files]
        if not all(len(of_file) > 1 for of_file in parts):
            return StoredImages(files, title)
        classes = sorted({*self.folders, *(of_file[0] for of_file in parts)})
        numbers = {name: number for number, name in enumerate(classes)}
        return StoredImages(files, title, [numbers[of_file[0]] for of_file in parts], classes)


def look_up(address: str) -> StoredFolder:
    """List what a store has at an address: of pyarrow's file systems, with the settings that it takes in a query.

    Raises
    ------
    DataError
        The address is not understood, there is nothing, or the store refuses.
    ImportError
        pyarrow is not installed.
    """
    fs, pa = vision_module("pyarrow.fs"), vision_module("pyarrow")
    # Keys may stand before an @, and settings behind a question mark.
    shown = re.sub("//[^/]*@", "//", address.partition("?")[0])
    try:
        system, path = _reached(address)
        place = StoredFile(address, path.rstrip("/"))
        shown = str(place)
        found = system.get_file_info(path)
        if found.type == fs.FileType.NotFound:
            raise DataError(f"no file or folder {shown}: check the address, and that you may list it")
        if found.is_file:
            return StoredFolder(place, (StoredFile(address, path, found.size, found.mtime_ns),), (), True)
        below = system.get_file_info(fs.FileSelector(path, recursive=True))
    except DataError:
        raise
    # File systems that are written in Python refuse an address by a ValueError.
    except (pa.ArrowException, OSError, ValueError) as error:
        why = first_line(error).replace(_quoted(address), shown)
        # Without its cause, which may show the keys in the address.
        raise DataError(f"cannot list {shown}: {why}") from None
    seen = [(info, PurePosixPath(info.path).relative_to(place.path).parts) for info in below]
    seen = [(info, parts) for info, parts in seen if parts and not any(part[0] == "." for part in parts)]
    files = [StoredFile(address, info.path, info.size, info.mtime_ns) for info, _ in seen if info.is_file]
    folders = {parts[0] for info, parts in seen if len(parts) > 1 or info.type == fs.FileType.Directory}
    by_parts = sorted(files, key=lambda file: PurePosixPath(file.path).parts)
    return StoredFolder(place, tuple(by_parts), tuple(sorted(folders)), False)


@lru_cache(maxsize=16)
def _reached(address: str) -> tuple[Any, str]:
    """Return the file system of an address, and the path on it."""
    return vision_module("pyarrow.fs").FileSystem.from_uri(_quoted(address))


def _quoted(address: str) -> str:
    """Return an address with its spaces, and what else no URI holds, written as a URI has them."""
    return quote(address, safe="%/:?#[]@!$&'()*+,;=~")
