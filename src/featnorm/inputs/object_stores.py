"""Folders in object stores and on other file systems, by their address: ``s3://bucket/photos``."""

import posixpath
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import quote

from featnorm._utils.errors import first_line
from featnorm._utils.extras import import_extra
from featnorm.inputs.errors import DataError
from featnorm.inputs.files import Files, Folder
from featnorm.inputs.formats import HEAD_BYTES

_ADDRESS = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]*)://.+", re.IGNORECASE | re.DOTALL)


def is_address(spec: str) -> bool:
    """Whether a specification begins as an address does, with a scheme and ``://``."""
    return _ADDRESS.fullmatch(spec) is not None


class Entry(NamedTuple):
    """A file or folder in the listing of a store.

    Attributes
    ----------
    kind : str
        See `Folder.entries`.
    size : int or None
        Size in bytes.
    modified : int or None
        Modification time in nanoseconds since 1970.
    """

    kind: str
    size: int | None = None
    modified: int | None = None


class StoredFolder(Folder):
    """A folder in a store, which was listed once.

    Parameters
    ----------
    address : str
        An address on its file system, by which the file system is reached; it may hold keys and settings.
    root : str
        Path of the folder on the file system.
    listing : mapping of str to mapping of str to Entry
        By the path of each folder from here: its entries by their names.
    """

    def __init__(self, address: str, root: str, listing: Mapping[str, Mapping[str, Entry]]) -> None:
        self._address = address
        self._root = root
        self._listing = listing

    def entries(self, path: str = "") -> Iterable[tuple[str, str]]:
        """See `Folder`."""
        return ((name, entry.kind) for name, entry in self._listing[path].items())

    def name(self, path: str = "") -> str:
        """See `Folder`."""
        return _shown(self._address, self._on_system(path))

    def full_path(self, path: str = "") -> PurePosixPath:
        """See `Folder`."""
        return PurePosixPath(self._on_system(path))

    def read(self, path: str) -> bytes:
        """See `Folder`."""
        with self.open(path) as file:
            return bytes(file.read())

    def head(self, path: str) -> bytes:
        """See `Folder`; no request is made for an empty file."""
        entry = self._entry(path)
        if entry is not None and entry.size == 0:
            return b""
        with self.open(path) as file:
            return bytes(file.read(HEAD_BYTES))

    def open(self, path: str) -> Any:
        """See `Folder`."""
        return _file_system(self._address)[0].open_input_file(self._on_system(path))

    def beside(self, path: str, other: str) -> str:
        """See `Folder`."""
        return posixpath.join(posixpath.dirname(path), other)

    def identity(self, path: str) -> str:
        """See `Folder`; size and time are those of the listing."""
        entry = self._entry(path) or Entry("file")
        return f"{self.name(path)} {entry.size} {entry.modified}"

    def _entry(self, path: str) -> Entry | None:
        folder, _, name = path.rpartition("/")
        return self._listing.get(folder, {}).get(name)

    def _on_system(self, path: str) -> str:
        return posixpath.normpath(posixpath.join(self._root, path))


def list_address(address: str) -> Folder | Files:
    """List a folder of a store, or find a file in it.

    Parameters
    ----------
    address : str
        An address as pyarrow's file systems take it, with their settings in a query.

    Raises
    ------
    DataError
        If the address is not understood, there is nothing, or the store returns an error.
    ImportError
        If pyarrow is not installed.
    """
    fs, pa = import_extra("pyarrow.fs"), import_extra("pyarrow")
    # Keys may stand before an @, and settings behind a question mark.
    shown = re.sub("//[^/]*@", "//", address.partition("?")[0])
    try:
        system, path = _file_system(address)
        path = path.rstrip("/") or path
        shown = _shown(address, path)
        found = system.get_file_info(path)
        if found.type == fs.FileType.NotFound:
            raise DataError(f"no file or folder {shown}: check the address, and that you may list it")
        if found.is_file:
            parent, name = posixpath.split(path)
            listing = {"": {name: Entry("file", found.size, found.mtime_ns)}}
            return Files(StoredFolder(address, parent, listing), (name,))
        below = system.get_file_info(fs.FileSelector(path, recursive=True))
    except DataError:
        raise
    # File systems that are written in Python report a bad address by a ValueError.
    except (pa.ArrowException, OSError, ValueError) as error:
        why = first_line(error).replace(_quoted(address), shown)
        # Without its cause, which may show the keys in the address.
        raise DataError(f"cannot list {shown}: {why}") from None
    kinds = {fs.FileType.File: "file", fs.FileType.Directory: "folder"}
    tree: dict[str, dict[str, Entry]] = {"": {}}
    for info in below:
        parts = PurePosixPath(info.path).relative_to(path).parts
        # A store has files only, and need not list the folders that their paths imply.
        for depth in range(1, len(parts)):
            _enter(tree, parts[:depth], Entry("folder"))
        if parts:
            _enter(tree, parts, Entry(kinds.get(info.type, ""), info.size, info.mtime_ns))
    return StoredFolder(address, path, tree)


def _enter(tree: dict[str, dict[str, Entry]], parts: tuple[str, ...], entry: Entry) -> None:
    path = "/".join(parts)
    tree["/".join(parts[:-1])].setdefault(parts[-1], entry)
    if entry.kind == "folder":
        tree.setdefault(path, {})


def _shown(address: str, path: str) -> str:
    """Return an address without what it may hold of keys and settings."""
    match = _ADDRESS.fullmatch(address)
    assert match is not None
    return f"{match['scheme']}://{path}"


@lru_cache(maxsize=16)
def _file_system(address: str) -> tuple[Any, str]:
    """Return the file system of an address, and the path on it."""
    return import_extra("pyarrow.fs").FileSystem.from_uri(_quoted(address))


def _quoted(address: str) -> str:
    """Return an address with its spaces, and what else no URI holds, written as a URI has them."""
    return quote(address, safe="%/:?#[]@!$&'()*+,;=~")
