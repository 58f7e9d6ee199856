"""Files that are either whole or not there."""

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


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


def flush_to_disk(file: Any) -> None:
    """Write what an open file still buffers, and wait until it is on the disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(path: str | Path) -> None:
    """Wait until the entries of a folder are on the disk: a power cut may otherwise undo a rename."""
    if os.name == "nt":
        return  # Windows cannot flush a folder; NTFS keeps a journal of renames.
    handle = os.open(path, os.O_RDONLY)
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

    Raises
    ------
    FileNotFoundError
        There is no such folder to write to.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {path.parent} to write {path.name} to")
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        yield Path(temporary)
        # The umask decides who may read it, as for any file; mkstemp had made it private.
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


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


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
