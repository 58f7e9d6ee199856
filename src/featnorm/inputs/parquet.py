"""Parquet files in the Hugging Face layout as a source of images."""

import json
import threading
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from PIL import Image

from featnorm.inputs.images import (
    DataError,
    ImageError,
    ImageSource,
    content_digest,
    decode,
    decode_with_digest,
    file_identity,
    first_line,
    vision_module,
)
from featnorm.inputs.stores import StoredFile


class ParquetImages(ImageSource):
    """Images in parquet files, read one row group at a time.

    The row group that a thread has read last stays in memory, encoded as in the file, so that reading in order
    touches each row group once; threads that are at the same one share it. No file is kept open between reads: a
    copy in another process never shares a file's position.

    Parameters
    ----------
    files : sequence of Path or StoredFile
        One file, or the shards of one data set, in order.
    title : str
        Name for tables.
    labels : bool
        Read the labels.
    label_column : str, optional
        The column that holds them: integers, of which negative ones mean none; strings or booleans, whose sorted
        values are the classes; any of them dictionary-encoded. A null is an image without a label. Default:
        ``label``, if there is one.

    Raises
    ------
    DataError
        If a file cannot be read, has no usable ``image`` column, has labels of another type or of another than the
        first file, or there is not one row in all of them.
    ImportError
        If pyarrow is not installed.
    """

    def __init__(
        self,
        files: Sequence[Path | StoredFile],
        title: str,
        *,
        labels: bool = True,
        label_column: str | None = None,
    ) -> None:
        indices = [_Index(path, (label_column or "label") if labels else None) for path in files]
        if not sum(index.rows for index in indices):
            raise DataError(f"no rows in {', '.join(map(str, files))}")
        super().__init__(title, *_labels(indices, label_column))
        if labels and all(index.labels is None for index in indices):
            self.label_columns = indices[0].candidates
        self._files = list(files)
        self._paths = [path for index in indices for path in index.paths]
        self._first_rows = [0, *accumulate(index.rows for index in indices)]
        # Of every row group: its file and its number there, and the rows of all files up to its end.
        self._groups = [(f, g) for f, index in enumerate(indices) for g in range(len(index.group_sizes))]
        self._ends = list(accumulate(size for index in indices for size in index.group_sizes))
        self._held = _RowGroups()

    def _image(self, i: int) -> Image.Image:
        return decode(self._encoded(i), self._name(i))

    def _digest(self, i: int) -> bytes:
        return content_digest(self._encoded(i), self._name(i))

    def _read(self, i: int) -> tuple[Image.Image, bytes]:
        return decode_with_digest(self._encoded(i), self._name(i))

    def _identity(self, i: int) -> str:
        file, _ = self._groups[bisect_right(self._ends, i)]
        of_file = self._files[file]
        return f"{of_file.identity if isinstance(of_file, StoredFile) else file_identity(of_file.resolve())} {i}"

    def _encoded(self, i: int) -> bytes | Path:
        """Return an image as the row holds it, or the file that it names."""
        group = bisect_right(self._ends, i)
        images = self._held.find(group, lambda: self._row_group(*self._groups[group]))
        entry = images[i - (self._ends[group - 1] if group else 0)].as_py() or {}
        if entry.get("bytes") is not None:
            return bytes(entry["bytes"])
        if entry.get("path"):
            of_group = self._files[self._groups[group][0]]
            if isinstance(of_group, StoredFile):
                return of_group.beside(entry["path"]).read()
            return of_group.parent / entry["path"]
        raise ImageError(self._name(i), "no image in this row")

    def _row_group(self, file: int, group: int) -> Any:
        pa = vision_module("pyarrow")
        try:
            # Without pyarrow's own threads: images are read by several threads already.
            with _opened(self._files[file]) as opened:
                return opened.read_row_group(group, columns=["image"], use_threads=False)["image"]
        except (pa.ArrowException, OSError) as error:
            raise DataError(
                f"cannot read row group {group} of {self._files[file]}: {first_line(error)}"
            ) from error

    def _name(self, i: int) -> str:
        if path := self._paths[i]:
            return path
        file = bisect_right(self._first_rows, i) - 1
        row = f"row {i - self._first_rows[file]}"
        return row if len(self._files) == 1 else f"{self._files[file].name} {row}"


class _RowGroups:
    """The row groups that threads have read last, by their numbers; a copy holds none."""

    def __init__(self) -> None:
        self._own = threading.local()
        self._all: WeakValueDictionary[int, Any] = WeakValueDictionary()

    def __reduce__(self) -> tuple[type["_RowGroups"], tuple[()]]:
        return _RowGroups, ()

    def find(self, group: int, read: Callable[[], Any]) -> Any:
        """Return a row group, which is read only if no thread holds it."""
        if getattr(self._own, "group", None) != group:
            self._own.group = self._own.images = None  # lets the old row group go before the new one comes
            self._own.images = self._all.get(group)
            if self._own.images is None:
                self._all[group] = self._own.images = read()
            self._own.group = group
        return self._own.images


class _Index:
    """What a parquet file says without its images being read.

    Parameters
    ----------
    path : Path or StoredFile
        The file.
    label_column : str or None
        The column of the labels; None if they are not wanted.
    """

    def __init__(self, path: Path | StoredFile, label_column: str | None) -> None:
        pa = vision_module("pyarrow")
        self.path = path
        self.labels: list[Any] | None = None
        self.label_kind = "missing"
        self.class_names: list[str] | None = None
        try:
            with _opened(path) as file:
                schema = file.schema_arrow
                _check_image_column(schema, path)
                self.columns = list(schema.names)
                self.candidates = tuple(field.name for field in schema if _kind_of_labels(field.type))
                self.rows = file.metadata.num_rows
                self.group_sizes = [
                    file.metadata.row_group(g).num_rows for g in range(file.metadata.num_row_groups)
                ]
                if label_column is not None and label_column in schema.names:
                    self._read_labels(file, label_column)
                self.paths: list[str | None] = [None] * self.rows
                if schema.field("image").type.get_field_index("path") >= 0:
                    images = file.read(columns=["image.path"])["image"].to_pylist()
                    self.paths = [None if image is None else image["path"] for image in images]
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"cannot read {path} as parquet: {first_line(error)}") from error

    def _read_labels(self, file: Any, column: str) -> None:
        type_ = file.schema_arrow.field(column).type
        # Without a single label, whoever wrote the file could not know what they are.
        kind = "integers" if vision_module("pyarrow").types.is_null(type_) else _kind_of_labels(type_)
        if kind is None:
            raise DataError(
                f"column {column!r} of {self.path} is {type_}: labels are integers, strings or booleans"
                + (f"; {', '.join(self.candidates)} could be" if self.candidates else "")
            )
        self.label_kind = kind
        self.labels = file.read(columns=[column])[column].to_pylist()
        if kind == "integers":
            self.class_names = _class_names(file.schema_arrow.metadata or {}, column)


def _labels(indices: Sequence[_Index], column: str | None) -> tuple[list[int | None], list[str] | None]:
    """Return the labels of all files, and the names of their classes.

    Raises
    ------
    DataError
        The files do not agree, or do not have the column.
    """
    without = next((index for index in indices if index.labels is None), None)
    if without is not None and column is not None:
        raise DataError(f"no column {column!r} in {without.path}: it has {', '.join(without.columns)}")
    first = indices[0]
    for index in indices:
        if index.label_kind != first.label_kind:
            raise DataError(
                f"the labels of {index.path} are {index.label_kind}, those of {first.path} {first.label_kind}: "
                "the shards of a data set must agree"
            )
        if index.class_names != first.class_names:
            raise DataError(
                f"{index.path} and {first.path} name their classes differently: the shards of a data set must "
                "agree"
            )
    given = [label for index in indices for label in index.labels or [None] * index.rows]
    if first.label_kind in ("integers", "missing"):
        return given, first.class_names
    named = [None if label is None else str(label) for label in given]
    names = sorted({label for label in named if label is not None})
    numbers = {name: number for number, name in enumerate(names)}
    return [None if label is None else numbers[label] for label in named], names or None


def _kind_of_labels(type_: Any) -> str | None:
    """Return what labels of an Arrow type are; None where it cannot hold labels."""
    types = vision_module("pyarrow").types
    if types.is_dictionary(type_):
        return _kind_of_labels(type_.value_type)
    if types.is_integer(type_):
        return "integers"
    if types.is_string(type_) or types.is_large_string(type_) or types.is_string_view(type_):
        return "strings"
    return "booleans" if types.is_boolean(type_) else None


@contextmanager
def _opened(file: Path | StoredFile) -> Iterator[Any]:
    pq = vision_module("pyarrow.parquet")
    if isinstance(file, Path):
        with pq.ParquetFile(file, pre_buffer=False) as opened:
            yield opened
        return
    # Of a store the bytes of a row group are fetched at once, and not column by column.
    with file.open() as stream, pq.ParquetFile(stream, pre_buffer=True) as opened:
        yield opened


def _check_image_column(schema: Any, path: Path | StoredFile) -> None:
    if "image" not in schema.names:
        raise DataError(f"no column 'image' in {path}: it has {', '.join(schema.names) or 'none'}")
    kind = schema.field("image").type
    if not vision_module("pyarrow").types.is_struct(kind) or kind.get_field_index("bytes") < 0:
        raise DataError(f"column 'image' of {path} is {kind}: it must be a struct of bytes and path")


def _class_names(metadata: dict[bytes, bytes], column: str) -> list[str] | None:
    try:
        names = json.loads(metadata[b"huggingface"])["info"]["features"][column]["names"]
    except (KeyError, TypeError, ValueError):
        return None
    return [str(name) for name in names]
