"""One measurement as a row of the results, and the memory of a work in a process of its own."""

import ctypes
import multiprocessing
import platform
from collections.abc import Callable, Generator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from mmap import PAGESIZE
from pathlib import Path
from typing import Any

import pytest

#: What `python -c` takes to be `featnorm`, in a process that may have no script of that name on its path.
COMMAND = "import sys; from featnorm.cli import main; sys.argv[0] = 'featnorm'; main()"

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Row:
    """What one work took, and what it is held against."""

    theme: str
    work: str
    reference: str
    unit: str  # "s" or "B"
    ours: float
    theirs: float
    at_most: float | None  # the mark: ours / theirs is this or less
    rounds: int
    sizes: str

    @property
    def ratio(self) -> float:
        return self.ours / self.theirs

    @property
    def met(self) -> bool | None:
        return None if self.at_most is None else self.ratio <= self.at_most

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "ratio": self.ratio, "met": self.met}


def peak_memory(work: Callable[..., Generator[None, None, None]], *args: Any) -> int:
    """Return the bytes that a work takes at most beyond what it starts from.

    The work is a generator function: what it does up to its first ``yield`` is what it starts from, and what it
    does up to its second is measured. It runs in a process of its own, whose peak of resident memory the system
    keeps; a page is the least that it tells.
    """
    if platform.libc_ver()[0] != "glibc" or not _CLEAR.exists():
        pytest.skip("the peak of a process's memory is read from /proc: Linux with glibc has it")
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(_peak, work, args).result()


def _peak(work: Callable[..., Generator[None, None, None]], args: tuple[Any, ...]) -> int:
    steps = work(*args)
    next(steps)
    ctypes.CDLL(None).malloc_trim(0)  # what was freed would be used again, and not be seen
    _CLEAR.write_text("5")  # the peak begins anew
    before = _resident("VmRSS")
    next(steps)
    return max(_resident("VmHWM") - before, PAGESIZE)


def _resident(name: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024
