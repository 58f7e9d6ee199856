"""Files that are written completely or not at all, also after a power cut or on a full disk."""

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

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_DISK_ERRORS = (*_DISK_FULL, errno.EIO, errno.EROFS)
# Part of the final name in that of the temporary file, which must be valid wherever the final name is.
_PREFIX_CHARACTERS = 32


class WriteError(OSError):
    """A file cannot be written.

    Parameters
    ----------
    path : Path
        The file that was to be written.
    cause : OSError
        The error of the operating system.
    """

    def __init__(self, path: Path, cause: OSError) -> None:
        text = f"cannot write {path}: {cause.strerror or cause}"
        if cause.errno in _DISK_FULL:
            free = shutil.disk_usage(path.parent).free
            text += f" ({free / 1e6:,.1f} MB are free): free some space, or choose another path"
        super().__init__(cause.errno, text)

    def __str__(self) -> str:
        return str(self.strerror)


def flush_to_disk(file: IO[Any]) -> None:
    """Flush the buffer of an open file, and wait until the content is on the disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(path: str | Path) -> None:
    """Wait until the entries of a folder are on the disk. Otherwise a power cut may undo a rename."""
    if os.name == "nt":
        return  # Windows cannot flush a folder; NTFS has a journal of renames.
    try:
        handle = os.open(path, os.O_RDONLY)
    except PermissionError:
        return  # The folder is writable but not readable, and a flush needs to open it for reading.
    try:
        os.fsync(handle)
    except OSError as error:
        # Some network file systems cannot flush a folder.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield the path of a temporary file to write, which replaces the file at `path` when the block ends.

    If the block raises, an existing file at `path` stays as it is. After the block, the new file is on the disk.

    Raises
    ------
    FileNotFoundError
        If the folder of `path` does not exist.
    WriteError
        If the file cannot be written, for example because the disk is full.
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
        # The permissions of any new file, by the umask: mkstemp makes files private.
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
    """Write a text file in UTF-8 with Unix line endings; see `replacing`."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors=errors, newline="\n")


def append(path: Path, content: bytes) -> None:
    """Append to a file, and create it if it does not exist. When this returns, the content is on the disk.

    Raises
    ------
    WriteError
        If the content cannot be written. The file may then end in a part of it.
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


def check_folder_writable(path: Path) -> None:
    """Raise an OSError if no file can be created in a folder."""
    # A file with a name: some systems and full disks have room for a nameless file only.
    with tempfile.NamedTemporaryFile(dir=path, prefix="."):
        pass


def check_writable(path: Path) -> None:
    """Check that a file can be written or replaced, without changing it.

    Raises
    ------
    ValueError
        If it cannot; the message says why.
    """
    try:
        _require_folder(path)
    except FileNotFoundError as error:
        raise ValueError(str(error)) from None
    existing = None
    try:
        check_folder_writable(path.parent)
        with suppress(FileNotFoundError):
            existing = path.stat()
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror}") from None
    if existing is None:
        return
    if stat.S_ISDIR(existing.st_mode):
        raise ValueError(f"{path} is a folder: name a file")
    if not stat.S_ISREG(existing.st_mode):
        raise ValueError(f"{path} is not a regular file: choose another path")
    if not _is_replaceable(path):
        raise ValueError(f"{path} already exists and cannot be replaced: choose another path, or remove it")


def acquire_lock(path: Path, timeout: float = 0) -> FileLock:
    """Acquire a lock file for this process.

    Parameters
    ----------
    path : Path
        The lock file.
    timeout : float
        Seconds to wait while another process holds the lock.

    Raises
    ------
    Timeout
        If another process holds the lock.
    WriteError
        If the lock file cannot be written.
    """
    lock = FileLock(path)
    try:
        lock.acquire(timeout=timeout)
    except Timeout:
        # On some systems, a lock file that cannot be written looks like a lock that is held.
        try:
            with path.open("ab"):
                pass
        except OSError as error:
            raise WriteError(path, error) from None
        raise
    except OSError as error:
        raise WriteError(path, error) from None
    return lock


def require_no_folder(path: Path) -> None:
    """Raise a ValueError if the path of a file to read or write is a folder."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder, but must be a file: move or remove the folder")


def _require_folder(path: Path) -> None:
    if not path.parent.is_dir():
        raise FileNotFoundError(f"cannot write {path.name}: there is no folder {path.parent}")


def _is_replaceable(path: Path) -> bool:
    """Whether the system lets an existing file in a writable folder be replaced."""
    try:
        with path.open("rb+"):
            pass
    except OSError as error:
        # A file without write permission can be replaced, unless it is immutable or, on Windows, read-only or in
        # use.
        if os.name == "nt" or error.errno != errno.EACCES:
            return False
    if os.name == "nt":
        return True
    folder, user = path.parent.stat(), os.geteuid()
    # In a folder such as /tmp every user may write, but replace only their own files.
    return not folder.st_mode & stat.S_ISVTX or user in (0, folder.st_uid, path.lstat().st_uid)


def _cause(error: BaseException, temporary: Path) -> OSError | None:
    """Return the system's error, if that is why a file could not be written."""
    if isinstance(error, OSError):
        return error if error.errno in _DISK_ERRORS or error.filename == str(temporary) else None
    # safetensors raises its own type of error, with the number of the system's error in the message.
    number = re.search(r"\(os error (\d+)\)", str(error)) if isinstance(error, Exception) else None
    return None if number is None else OSError(int(number[1]), os.strerror(int(number[1])))


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
