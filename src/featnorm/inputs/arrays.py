"""Rows of arrays as a source: features that any encoder has computed."""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from featnorm.inputs.cache import CachedFeatures
from featnorm.inputs.source import DataError, ItemError, Source

#: A source of rows, as float32 tensors (D,).
RowSource = Source[Tensor]


class ArrayRows(Source[Tensor]):
    """Rows of an array, in single precision. A row that is not finite is an unreadable item.

    Parameters
    ----------
    values : (n, D) numbers of any real type, in memory or mapped from a file.
    title : name for tables.
    labels, class_names : see `Source`.

    Raises
    ------
    DataError
        The values have another shape or type, or there is no row or no column.
    """

    def __init__(
        self,
        values: npt.NDArray[Any],
        title: str,
        labels: Sequence[int | None] | None = None,
        class_names: list[str] | None = None,
    ) -> None:
        if values.ndim != 2 or values.dtype.kind not in "fiub" or 0 in values.shape:
            raise DataError(
                f"{title} has shape {values.shape} and type {values.dtype}: expected real numbers of shape "
                "(n, D), one row per input"
            )
        super().__init__(title, [None] * len(values) if labels is None else labels, class_names)
        self._values = values

    @property
    def width(self) -> int:
        """Number of columns."""
        return int(self._values.shape[1])

    def _read(self, i: int) -> tuple[Tensor, bytes]:
        with np.errstate(over="ignore"):
            # -0.0 and 0.0 are one value, and have one digest.
            row = self._values[i].astype(np.float32) + np.float32(0)
        digest = hashlib.sha256(row.tobytes()).digest()
        if not np.isfinite(row).all():
            column = int(np.flatnonzero(~np.isfinite(row))[0])
            error = ItemError(self._name(i), f"column {column} is {self._values[i, column]}, not a finite float32")
            error.digest = digest
            raise error
        return torch.from_numpy(row), digest

    def _name(self, i: int) -> str:
        return f"row {i}"


def row_features(source: RowSource) -> CachedFeatures:
    """Return the rows of a source as features, in memory.

    Raises
    ------
    DataError
        No row can be read.
    """
    rows, values, digests = [], [], []
    corrupt = []
    for i in range(len(source)):
        try:
            row, digest = source.read(i)
        except ItemError as error:
            corrupt.append((source.name(i), error.reason))
            continue
        rows.append(i)
        values.append(row)
        digests.append(digest)
    if not rows:
        raise DataError(f"none of the {len(source):,} rows of {source.title} can be read: {corrupt[0][1]}")
    return CachedFeatures(
        stored=torch.stack(values),
        stored_rows=torch.arange(len(rows)),
        rows=torch.tensor(rows),
        digests=digests,
        corrupt=corrupt,
        computed=0,
        changed=0,
        damaged=0,
        several=0,
    )


def class_labels(values: Sequence[Any] | npt.NDArray[Any]) -> tuple[list[int | None], list[str] | None]:
    """Return labels as class indices, and the names of the classes.

    Parameters
    ----------
    values
        One label per row: integers, of which negative ones mean no label, or anything else whose sorted strings
        are the classes. None and NaN mean no label.

    Returns
    -------
    labels : list of int or None
    class_names : list of str, or None if the labels are integers
    """
    given = [None if value is None or value != value else value for value in np.asarray(values).tolist()]
    if all(value is None or (isinstance(value, int) and not isinstance(value, bool)) for value in given):
        return given, None
    names = sorted({str(value) for value in given if value is not None})
    numbers = {name: number for number, name in enumerate(names)}
    return [None if value is None else numbers[str(value)] for value in given], names
