"""Memory: keeping freed memory in the process, and splitting batches that do not fit."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

_Result = TypeVar("_Result")


def keep_freed_memory() -> None:
    """Let the C library keep the memory of freed tensors, for the rest of this process.

    By default, glibc returns the memory of every large tensor to the system and requests it again, page by page.
    That takes more than half the time of a convolutional network on a CPU (benchmarks/test_process.py). The
    commands call this function; a Python program that runs models by PyTorch on a CPU can do so at its start. The
    process then keeps the most memory that it has needed. With another C library, nothing changes.

    Examples
    --------
    >>> import featnorm as fn
    >>> fn.keep_freed_memory()
    """
    if platform.libc_ver()[0] != "glibc":
        return
    mmap_max, trim_threshold = -4, -1  # M_MMAP_MAX and M_TRIM_THRESHOLD of malloc.h
    libc = ctypes.CDLL(None)
    libc.mallopt(mmap_max, 0)
    libc.mallopt(trim_threshold, 2**31 - 1)


def in_parts(
    function: Callable[..., _Result], *inputs: Tensor | Mapping[str, Tensor] | list[Tensor]
) -> list[_Result]:
    """Apply a function to a batch, or to halves of it if the device runs out of memory.

    Parameters
    ----------
    function : callable
        A function of inputs (n, ...), whose result for one input does not depend on the others.
    *inputs : Tensor, mapping of str to Tensor, or list of Tensor
        The batch: one or more tensors (n, ...), mappings of such tensors, or lists of n tensors.

    Returns
    -------
    list
        The results of the parts, in order; one if the batch fits.

    Raises
    ------
    torch.OutOfMemoryError
        If a single input does not fit.
    """
    # Not above: the command line calls keep_freed_memory before it imports anything large.
    import torch
    from torch.utils._pytree import tree_leaves, tree_map

    def is_list(value: object) -> bool:
        return isinstance(value, list)

    try:
        return [function(*inputs)]
    except torch.OutOfMemoryError:
        if (n := len(tree_leaves(inputs[0], is_leaf=is_list)[0])) < 2:
            raise
    # Outside the handler, whose traceback holds the tensors that did not fit.
    first, second = (
        tree_map(lambda values, rows=rows: values[rows], inputs, is_leaf=is_list)
        for rows in (slice(n // 2), slice(n // 2, None))
    )
    return in_parts(function, *first) + in_parts(function, *second)
