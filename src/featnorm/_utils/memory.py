"""Memory: kept where the system would take it back, and batches that are larger than it."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

_Result = TypeVar("_Result")


def keep_freed_memory() -> None:
    """Let the C library keep the memory of freed tensors, for this process.

    Without this glibc gives every large tensor back to the system and asks for it anew, page by page: more than
    half the time of a convolutional network on a CPU goes there (benchmarks/test_process.py).
    """
    if platform.libc_ver()[0] != "glibc":
        return
    mmap_max, trim_threshold = -4, -1  # M_MMAP_MAX and M_TRIM_THRESHOLD of malloc.h
    libc = ctypes.CDLL(None)
    libc.mallopt(mmap_max, 0)
    libc.mallopt(trim_threshold, 2**31 - 1)


def in_parts(ask: Callable[[Tensor], _Result], inputs: Tensor) -> list[_Result]:
    """Return what is said of inputs at once or, where the device has no memory for that, of halves of them.

    Parameters
    ----------
    ask : what says it, of inputs (n, ...); what it says of one does not depend on the others.
    inputs : (n, ...).

    Raises
    ------
    torch.OutOfMemoryError
        There is none for a single one.
    """
    import torch  # not above: the command line keeps memory before it imports anything large

    try:
        return [ask(inputs)]
    except torch.OutOfMemoryError:
        if len(inputs) < 2:
            raise
    # Not within the handler, whose traceback holds the tensors that did not fit.
    half = len(inputs) // 2
    return in_parts(ask, inputs[:half]) + in_parts(ask, inputs[half:])
