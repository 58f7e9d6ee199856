"""A row of the results, and the measurement of memory in a separate process."""

import ctypes
import gc
import multiprocessing
import os
import platform
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from mmap import PAGESIZE
from pathlib import Path
from typing import Any

import pytest

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Row:
    """The result of one work, and its reference."""

    theme: str
    work: str
    reference: str
    unit: str  # "s" or "B"
    ours: float
    theirs: float
    at_most: float | None  # the target: maximum of ours / theirs
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
    """Return the peak memory of a work in bytes, beyond its initial memory.

    The work is a generator function. It is measured from its first ``yield`` to its second, in a separate process,
    by the peak of resident memory that the system reports; the result is at least one page.
    """
    return _in_process(_peak, work, args)


def command_peaks(runs: Sequence[Sequence[str]], home: Path) -> list[int]:
    """Return the peak memory of a process in each of several runs of `featnorm`, in bytes, with the libraries.

    Parameters
    ----------
    runs : arguments of the command line, of each run.
    home : folder of the caches.
    """
    return _in_process(_command_peaks, runs, home)


def _in_process(function: Callable[..., Any], *args: Any) -> Any:
    if platform.libc_ver()[0] != "glibc" or not _CLEAR.exists():
        pytest.skip("the peak memory of a process is read from /proc, which needs Linux with glibc")
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(function, *args).result()


def _peak(work: Callable[..., Generator[None, None, None]], args: tuple[Any, ...]) -> int:
    steps = work(*args)
    next(steps)
    _reset_peak()
    before = _resident("VmRSS")
    next(steps)
    return max(_resident("VmHWM") - before, PAGESIZE)


def _command_peaks(runs: Sequence[Sequence[str]], home: Path) -> list[int]:
    from featnorm.__main__ import COMMANDS
    from featnorm.cli.app import run_command

    os.environ["HOME"] = str(home)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    found = []
    for arguments in runs:
        gc.collect()
        _reset_peak()
        run_command(arguments, COMMANDS)
        found.append(_resident("VmHWM"))
    return found


def _reset_peak() -> None:
    ctypes.CDLL(None).malloc_trim(0)  # otherwise freed memory would be reused, and not be counted
    _CLEAR.write_text("5", "utf-8")


def _resident(name: str) -> int:
    line = next(line for line in _STATUS.read_text("utf-8").splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024
