"""Images in object stores and on other file systems, by their address: ``s3://bucket/photos``."""

import posixpath
import re
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import quote

from PIL import Image

from featnorm.inputs.formats import HEAD_BYTES, PassedOver, ending, looks_like_image, named_as_image
from featnorm.inputs.images import (
    DataError,
    ImageError,
    ImageSource,
    content_digest,
    decode,
    decode_with_digest,
    first_line,
    no_images,
    vision_module,
)

# Requests at once for the beginnings of files; each is an answer to wait for.
_LOOKERS = 32
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

    def begins_as_image(self) -> bool:
        """Whether its first bytes are an image's; true where they cannot be read, which is told later."""
        if self.size == 0:
            return False
        try:
            with self.open() as file:
                return looks_like_image(bytes(file.read(HEAD_BYTES)))
        except OSError:
            return True

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

    def _read(self, i: int) -> tuple[Image.Image, bytes]:
        return decode_with_digest(self._files[i].read(), self._name(i))


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
    hidden : int
        How many hidden files and folders it holds.
    """

    place: StoredFile
    files: tuple[StoredFile, ...]
    folders: tuple[str, ...]
    is_file: bool
    hidden: int = 0

    def parts(self, file: StoredFile) -> tuple[str, ...]:
        """Return the path of a file in it, from here."""
        return PurePosixPath(file.path).relative_to(self.place.path).parts

    def parquet_files(self) -> list[StoredFile]:
        """Return the parquet files that lie in it directly."""
        return [f for f in self.files if f.name.endswith(".parquet") and len(self.parts(f)) == 1]

    def image_files(self) -> tuple[list[StoredFile], PassedOver]:
        """Return the image files in it and below, and what else there is, as `featnorm.inputs.images.image_files`.

        A file whose name does not end as image files' do costs two short requests, of which many run at once.
        """
        looks = [file for file in self.files if named_as_image(file.name) is None]
        with ThreadPoolExecutor(_LOOKERS, "featnorm-look") as lookers:
            looked = dict(zip(looks, lookers.map(StoredFile.begins_as_image, looks), strict=True))
        files: list[StoredFile] = []
        kinds: Counter[str] = Counter()
        for file in self.files:
            if named_as_image(file.name) or looked.get(file):
                files.append(file)
            else:
                kinds[ending(file.name)] += 1
        return files, PassedOver(kinds, self.hidden)

    def images(self, title: str, found: tuple[list[StoredFile], PassedOver]) -> StoredImages:
        """Return the images that `image_files` found; see `FolderImages`.

        Raises
        ------
        DataError
            There is none.
        """
        files, passed_over = found
        if not files:
            raise no_images(self.place, passed_over)
        parts = [self.parts(file) for file in files]
        labels = classes = None
        if all(len(of_file) > 1 for of_file in parts):
            classes = sorted({*self.folders, *(of_file[0] for of_file in parts)})
            numbers = {name: number for number, name in enumerate(classes)}
            labels = [numbers[of_file[0]] for of_file in parts]
        images = StoredImages(files, title, labels, classes)
        images.passed_over = passed_over
        return images


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
    # The topmost of each, whatever is in it.
    tops = (next((i for i, part in enumerate(parts) if part[0] == "."), None) for _, parts in seen)
    hidden = {parts[: top + 1] for (_, parts), top in zip(seen, tops, strict=True) if top is not None}
    seen = [(info, parts) for info, parts in seen if parts and not any(part[0] == "." for part in parts)]
    files = [StoredFile(address, info.path, info.size, info.mtime_ns) for info, _ in seen if info.is_file]
    folders = {parts[0] for info, parts in seen if len(parts) > 1 or info.type == fs.FileType.Directory}
    by_parts = sorted(files, key=lambda file: PurePosixPath(file.path).parts)
    return StoredFolder(place, tuple(by_parts), tuple(sorted(folders)), False, len(hidden))


@lru_cache(maxsize=16)
def _reached(address: str) -> tuple[Any, str]:
    """Return the file system of an address, and the path on it."""
    return vision_module("pyarrow.fs").FileSystem.from_uri(_quoted(address))


def _quoted(address: str) -> str:
    """Return an address with its spaces, and what else no URI holds, written as a URI has them."""
    return quote(address, safe="%/:?#[]@!$&'()*+,;=~")
