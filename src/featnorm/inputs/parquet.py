"""Parquet files in the Hugging Face layout as a source of images."""

import json
import threading
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import PurePath
from typing import Any
from weakref import WeakValueDictionary

from featnorm._utils.errors import first_line
from featnorm._utils.extras import vision_module
from featnorm.inputs.decoding import reason_of
from featnorm.inputs.errors import DataError, ItemError
from featnorm.inputs.files import Folder, LocalFolder
from featnorm.inputs.formats import PassedOver
from featnorm.inputs.images import EncodedImages
from featnorm.inputs.openers import Location, Opener, Options


class ParquetImages(EncodedImages):
    """Images in parquet files, read one row group at a time.

    The row group that a thread has read last stays in memory, encoded as in the file, so that reading in order
    reads each row group once; threads that are at the same one share it. No file is kept open between reads: a
    copy in another process never shares a file's position.

    Parameters
    ----------
    folder : Folder
        The folder of the files.
    files : sequence of str
        One file, or the shards of one data set, in order.
    title : str
        Name for tables.
    labels : bool
        Whether to read the labels.
    label_column : str, optional
        The column that holds them: integers, of which negative ones mean no label; strings or booleans, whose
        sorted values are the classes; any of them dictionary-encoded. A null means no label. Default: ``label``,
        if there is one.

    Raises
    ------
    DataError
        If a file cannot be read, has no usable ``image`` column, has labels of an unsupported type or of another
        type than the first file, or if there is no row in any of them.
    ImportError
        If pyarrow is not installed.
    """

    def __init__(
        self,
        folder: Folder,
        files: Sequence[str],
        title: str,
        *,
        labels: bool = True,
        label_column: str | None = None,
    ) -> None:
        indices = [_Index(folder, file, (label_column or "label") if labels else None) for file in files]
        if not sum(index.rows for index in indices):
            raise DataError(f"no rows in {', '.join(map(folder.name, files))}")
        super().__init__(title, *_labels(indices, label_column))
        if labels and all(index.labels is None for index in indices):
            self.label_columns = indices[0].candidates
        self.columns = indices[0].scalars
        self._folder = folder
        self._files = list(files)
        self._paths = [path for index in indices for path in index.paths]
        self._first_rows = [0, *accumulate(index.rows for index in indices)]
        # For each row group: its file and its number there, and the number of rows up to its end in all files.
        self._groups = [(f, g) for f, index in enumerate(indices) for g in range(len(index.group_sizes))]
        self._ends = list(accumulate(size for index in indices for size in index.group_sizes))
        self._row_groups = _RowGroups()

    def column(self, name: str) -> list[Any]:
        """See `Source`."""
        pa = vision_module("pyarrow")
        values = []
        for file in self._files:
            path = self._folder.name(file)
            try:
                with _opened(self._folder, file) as opened:
                    if name not in opened.schema_arrow.names:
                        raise DataError(
                            f"no column {name!r} in {path}: it has {', '.join(opened.schema_arrow.names)}"
                        )
                    values += opened.read(columns=[name])[name].to_pylist()
            except (pa.ArrowException, OSError) as error:
                raise DataError(f"cannot read column {name!r} of {path}: {first_line(error)}") from error
        return values

    def _content(self, i: int) -> bytes:
        """Return an image as its row holds it, or the content of the file that the row names."""
        group = bisect_right(self._ends, i)
        images = self._row_groups.find(group, lambda: self._row_group(*self._groups[group]))
        entry = images[i - (self._ends[group - 1] if group else 0)].as_py() or {}
        if entry.get("bytes") is not None:
            return bytes(entry["bytes"])
        if not entry.get("path"):
            raise ItemError(self._name(i), "no image in this row")
        try:
            return self._folder.read(self._folder.beside(self._files[self._groups[group][0]], entry["path"]))
        except OSError as error:
            raise ItemError(self._name(i), reason_of(error)) from error

    def _row_group(self, file: int, group: int) -> Any:
        pa = vision_module("pyarrow")
        try:
            # Without pyarrow's own threads: images are read by several threads already.
            with _opened(self._folder, self._files[file]) as opened:
                return opened.read_row_group(group, columns=["image"], use_threads=False)["image"]
        except (pa.ArrowException, OSError) as error:
            raise DataError(
                f"cannot read row group {group} of {self._folder.name(self._files[file])}: {first_line(error)}"
            ) from error

    def _name(self, i: int) -> str:
        if path := self._paths[i]:
            return path
        file = bisect_right(self._first_rows, i) - 1
        row = f"row {i - self._first_rows[file]}"
        return row if len(self._files) == 1 else f"{PurePath(self._files[file]).name} {row}"

    def _identity(self, i: int) -> str:
        file, _ = self._groups[bisect_right(self._ends, i)]
        return f"{self._folder.absolute().identity(self._files[file])} {i}"


class ParquetOpener(Opener):
    """A parquet file, or a folder that holds some and no images: the shards of one data set."""

    endings = (".parquet",)

    def accepts(self, location: Location) -> bool:
        """See `Opener`."""
        if isinstance(location, Folder):
            return bool(location.top_level(self.endings)[1]) and not location.images[0]
        return super().accepts(location)

    def open(self, location: Any, title: str, options: Options) -> ParquetImages:
        """See `Opener`; the other files of the folder are ignored."""
        if not isinstance(location, Folder):
            return self._open(location.folder, location.paths, title, options)
        _, shards = location.top_level(self.endings)
        images = self._open(location, shards, title, options)
        _, beside = location.images
        kinds = Counter(beside.kinds)
        kinds[".parquet"] -= len(shards)
        images.passed_over = PassedOver(+kinds, beside.hidden, beside.closed)
        return images

    def _open(self, folder: Folder, files: Sequence[str], title: str, options: Options) -> ParquetImages:
        return ParquetImages(folder, files, title, labels=options.labels, label_column=options.label_column)


class _RowGroups:
    """The row groups that threads have read last, by their numbers. A pickled copy holds none."""

    def __init__(self) -> None:
        self._own = threading.local()
        self._all: WeakValueDictionary[int, Any] = WeakValueDictionary()

    def __reduce__(self) -> tuple[type["_RowGroups"], tuple[()]]:
        return _RowGroups, ()

    def find(self, group: int, read: Callable[[], Any]) -> Any:
        """Return a row group; it is read only if no thread holds it."""
        if getattr(self._own, "group", None) != group:
            self._own.group = self._own.images = None  # lets the old row group go before the new one comes
            self._own.images = self._all.get(group)
            if self._own.images is None:
                self._all[group] = self._own.images = read()
            self._own.group = group
        return self._own.images


class _Index:
    """Everything in a parquet file but the images.

    Parameters
    ----------
    folder, file : Folder, str
        The file, in its folder.
    label_column : str or None
        The column of the labels; None if they are not needed.
    """

    def __init__(self, folder: Folder, file: str, label_column: str | None) -> None:
        pa = vision_module("pyarrow")
        self.path = folder.name(file)
        self.labels: list[Any] | None = None
        self.label_kind = "missing"
        self.class_names: list[str] | None = None
        try:
            with _opened(folder, file) as opened:
                schema = opened.schema_arrow
                _check_image_column(schema, self.path)
                self.columns = list(schema.names)
                nested = vision_module("pyarrow").types.is_nested
                self.scalars = tuple(field.name for field in schema if not nested(field.type))
                self.candidates = tuple(field.name for field in schema if _kind_of_labels(field.type))
                metadata = opened.metadata
                self.rows = metadata.num_rows
                self.group_sizes = [metadata.row_group(g).num_rows for g in range(metadata.num_row_groups)]
                if label_column is not None and label_column in schema.names:
                    self._read_labels(opened, label_column)
                self.paths: list[str | None] = [None] * self.rows
                if schema.field("image").type.get_field_index("path") >= 0:
                    images = opened.read(columns=["image.path"])["image"].to_pylist()
                    self.paths = [None if image is None else image["path"] for image in images]
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"cannot read {self.path} as parquet: {first_line(error)}") from error

    def _read_labels(self, opened: Any, column: str) -> None:
        type_ = opened.schema_arrow.field(column).type
        # A column without a single label has no type of its own.
        kind = "integers" if vision_module("pyarrow").types.is_null(type_) else _kind_of_labels(type_)
        if kind is None:
            raise DataError(
                f"column {column!r} of {self.path} is {type_}: labels are integers, strings or booleans"
                + (f"; {', '.join(self.candidates)} could be" if self.candidates else "")
            )
        self.label_kind = kind
        self.labels = opened.read(columns=[column])[column].to_pylist()
        if kind == "integers":
            self.class_names = _class_names(opened.schema_arrow.metadata or {}, column)


def _labels(indices: Sequence[_Index], column: str | None) -> tuple[list[int | None], list[str] | None]:
    """Return the labels of all files, and the names of their classes.

    Raises
    ------
    DataError
        If the files do not agree, or do not have the column.
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
    """Return what the labels of an Arrow type are; None if it cannot hold labels."""
    types = vision_module("pyarrow").types
    if types.is_dictionary(type_):
        return _kind_of_labels(type_.value_type)
    if types.is_integer(type_):
        return "integers"
    if types.is_string(type_) or types.is_large_string(type_) or types.is_string_view(type_):
        return "strings"
    return "booleans" if types.is_boolean(type_) else None


@contextmanager
def _opened(folder: Folder, file: str) -> Iterator[Any]:
    # In a store, the bytes of a row group are fetched at once, and not column by column.
    pre_buffer = not isinstance(folder, LocalFolder)
    parquet = vision_module("pyarrow.parquet")
    with folder.open(file) as stream, parquet.ParquetFile(stream, pre_buffer=pre_buffer) as opened:
        yield opened


def _check_image_column(schema: Any, path: str) -> None:
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
