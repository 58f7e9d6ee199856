"""Files that are either whole or not there, also after a power cut and on a full disk."""

import errno
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from filelock import FileLock, Timeout

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_OF_THE_DISK = (*_FULL, errno.EIO, errno.EROFS)
# A temporary file's name has to be valid wherever the final one is.
_PREFIX_CHARACTERS = 32


class WriteError(OSError):
    """A file cannot be written.

    Parameters
    ----------
    path : the file that was to be written.
    cause : what the system said.
    """

    def __init__(self, path: Path, cause: OSError) -> None:
        text = f"cannot write {path}: {cause.strerror or cause}"
        if cause.errno in _FULL:
            free = shutil.disk_usage(path.parent).free
            text += f" ({free / 1e6:,.1f} MB are free): free some space, or choose another place"
        super().__init__(cause.errno, text)

    def __str__(self) -> str:
        return str(self.strerror)


def flush_to_disk(file: IO[Any]) -> None:
    """Write what an open file still buffers, and wait until it is on the disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(path: str | Path) -> None:
    """Wait until the entries of a folder are on the disk: a power cut may otherwise undo a rename."""
    if os.name == "nt":
        return  # Windows cannot flush a folder; NTFS keeps a journal of renames.
    try:
        handle = os.open(path, os.O_RDONLY)
    except PermissionError:
        return  # Files can be written to it, but it cannot be read, which a flush needs.
    try:
        os.fsync(handle)
    except OSError as error:
        # Some network file systems cannot flush a folder either.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a file to write; it takes its place at the end, and an earlier one stays there until then.

    When the block has ended, the file is on the disk.

    Raises
    ------
    FileNotFoundError
        There is no such folder to write to.
    WriteError
        The file cannot be written, because the disk is full, for example.
    """
    path = Path(path)
    _require_folder(path)
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:_PREFIX_CHARACTERS]}.")
    except OSError as error:
        raise WriteError(path, error) from None
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb+") as file:
            flush_to_disk(file)
        # The umask decides who may read it, as for any file; mkstemp had made it private.
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        cause = _cause(error, temporary)
        if cause is not None:
            raise WriteError(path, cause) from None
        raise


def write_text(path: str | Path, text: str, *, errors: str | None = None) -> None:
    """Write a text file in UTF-8 with Unix line ends, see `replacing`."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors=errors, newline="\n")


def append(path: Path, content: bytes) -> None:
    """Append to a file, which is made where there is none. When this returns, the content is on the disk.

    Raises
    ------
    WriteError
        The file cannot be written, or not whole; then it may end in a part of the content.
    """
    try:
        new = not path.exists()
        with path.open("ab") as file:
            file.write(content)
            flush_to_disk(file)
        if new:
            sync_folder(path.parent)
    except OSError as error:
        raise WriteError(path, error) from None


def try_folder(path: Path) -> None:
    """Raise an OSError where no file can be made in a folder."""
    # By a name, which not every system and disk that has room for a nameless file has room for.
    with tempfile.NamedTemporaryFile(dir=path, prefix="."):
        pass


def try_place(path: Path) -> None:
    """Find out whether a file can be written or replaced, without changing what is there.

    Raises
    ------
    ValueError
        It cannot, and why.
    """
    try:
        _require_folder(path)
    except FileNotFoundError as error:
        raise ValueError(str(error)) from None
    there = None
    try:
        try_folder(path.parent)
        with suppress(FileNotFoundError):
            there = path.stat()
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror}") from None
    if there is None:
        return
    if stat.S_ISDIR(there.st_mode):
        raise ValueError(f"{path} is a folder: name a file")
    if not stat.S_ISREG(there.st_mode):
        raise ValueError(f"{path} is no regular file: name another one")
    if not _is_replaceable(path):
        raise ValueError(f"{path} is there already and cannot be replaced: choose another place, or remove it")


def acquire_lock(path: Path, timeout: float = 0) -> FileLock:
    """Return a lock file that this process holds now.

    Raises
    ------
    Timeout
        Another process holds it.
    WriteError
        The lock file cannot be written.
    """
    lock = FileLock(path)
    try:
        lock.acquire(timeout=timeout)
    except Timeout:
        # Some systems refuse the file in a way that looks like a lock that is held.
        try:
            with path.open("ab"):
                pass
        except OSError as error:
            raise WriteError(path, error) from None
        raise
    except OSError as error:
        raise WriteError(path, error) from None
    return lock


def refuse_folder(path: Path) -> None:
    """Raise a ValueError where there is a folder in the place of a file that is to be read or written."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder where a file is expected: move it away, or remove it")


def _require_folder(path: Path) -> None:
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {path.parent} to write {path.name} to")


def _is_replaceable(path: Path) -> bool:
    """Tell whether the system would let a file be replaced that is there, in a folder that can be written to."""
    try:
        with path.open("rb+"):
            pass
    except OSError as error:
        # A file that may not be written to can be replaced all the same, but for one that is immutable or, on
        # Windows, read-only or in use.
        if os.name == "nt" or error.errno != errno.EACCES:
            return False
    if os.name == "nt":
        return True
    folder, user = path.parent.stat(), os.geteuid()
    # In a folder such as /tmp everybody may write, and replace files of their own.
    return not folder.st_mode & stat.S_ISVTX or user in (0, folder.st_uid, path.lstat().st_uid)


def _cause(error: BaseException, temporary: Path) -> OSError | None:
    """Return what the system said where that is why a file could not be written."""
    if isinstance(error, OSError):
        return error if error.errno in _OF_THE_DISK or error.filename == str(temporary) else None
    # The errors of safetensors are of no type of Python's, and say the system's number in words.
    number = re.search(r"\(os error (\d+)\)", str(error)) if isinstance(error, Exception) else None
    return None if number is None else OSError(int(number[1]), os.strerror(int(number[1])))


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
