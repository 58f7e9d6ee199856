"""Parquet files as a source, such as images in the Hugging Face layout."""

import json
import threading
from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import PurePath
from typing import Any
from weakref import WeakValueDictionary

from PIL import Image

from featnorm._utils.errors import first_line
from featnorm._utils.extras import import_extra
from featnorm.inputs.decoding import reason_of
from featnorm.inputs.errors import DataError, ItemError
from featnorm.inputs.files import Folder, LocalFolder
from featnorm.inputs.images import EncodedImages
from featnorm.inputs.kinds import TEXTS
from featnorm.inputs.openers import Options
from featnorm.inputs.source import Source, T

#: Maximum number of rows that a `PieceReader` decodes together.
PIECE = 8192
# Bytes of a local file that are read at once.
_BUFFER = 2**20


class ParquetTable(Source[T]):
    """A column of parquet files as a source, read one row group at a time.

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
    item_column : str
        The column of the items.
    options : Options
        How to read the labels: integers, of which negative ones mean no label; strings or booleans, whose sorted
        values are the classes; any of them dictionary-encoded. A null means no label.

    Raises
    ------
    DataError
        If a file cannot be read, has no usable column of items, has labels of an unsupported type or of another
        type than the first file, or if there is no row in any of them.
    ImportError
        If pyarrow is not installed.
    """

    def __init__(
        self, folder: Folder, files: Sequence[str], title: str, item_column: str, options: Options
    ) -> None:
        indices = [_Index(folder, file, item_column, options, self._check) for file in files]
        if not sum(index.rows for index in indices):
            raise DataError(f"no rows in {', '.join(map(folder.name, files))}")
        super().__init__(title, *_labels(indices))
        if options.labels and all(index.labels is None for index in indices):
            self.label_columns = tuple(name for name in indices[0].candidates if name != item_column)
        self.columns = indices[0].scalars
        self.text_column = item_column if self.kind is TEXTS else None
        self._folder = folder
        self._files = list(files)
        self._item_column = item_column
        self._paths = [path for index in indices for path in index.paths]
        self._first_rows = [0, *accumulate(index.rows for index in indices)]
        # For each row group: its file and its number there, and the number of rows up to its end in all files.
        self._groups = [(f, g) for f, index in enumerate(indices) for g in range(len(index.group_sizes))]
        self._ends = list(accumulate(size for index in indices for size in index.group_sizes))
        self._last_groups = LastGroups()

    @staticmethod
    @abstractmethod
    def _check(kind: Any, column: str, path: str) -> None:
        """Raise a DataError if the items of a file cannot be in a column of that Arrow type."""

    def column(self, name: str) -> list[Any]:
        """See `Source`."""
        pa = import_extra("pyarrow")
        values = []
        for file in self._files:
            path = self._folder.name(file)
            try:
                with open_parquet(self._folder, file) as opened:
                    if name not in opened.schema_arrow.names:
                        raise DataError(
                            f"no column {name!r} in {path}: it has {', '.join(opened.schema_arrow.names)}"
                        )
                    values += opened.read(columns=[name])[name].to_pylist()
            except (pa.ArrowException, OSError) as error:
                raise DataError(f"cannot read column {name!r} of {path}: {first_line(error)}") from error
        return values

    def _cell(self, i: int) -> Any:
        """Return the value of a row in the column of the items."""
        group = bisect_right(self._ends, i)
        values = self._last_groups.find(group, lambda: self._row_group(*self._groups[group]))
        return values[i - (self._ends[group - 1] if group else 0)].as_py()

    def _row_group(self, file: int, group: int) -> Any:
        pa = import_extra("pyarrow")
        try:
            # Without pyarrow's own threads: items are read by several threads already.
            with open_parquet(self._folder, self._files[file]) as opened:
                return opened.read_row_group(group, columns=[self._item_column], use_threads=False)[
                    self._item_column
                ]
        except (pa.ArrowException, OSError) as error:
            raise DataError(
                f"cannot read row group {group} of {self._folder.name(self._files[file])}: {first_line(error)}"
            ) from error

    def _name(self, i: int) -> str:
        if path := self._paths[i]:
            return path
        return row_name(self._files, self._first_rows, i)

    def _identity(self, i: int) -> str:
        file, _ = self._groups[bisect_right(self._ends, i)]
        return f"{self._folder.absolute().identity(self._files[file])} {self._item_column} {i}"


class ParquetImages(ParquetTable[Image.Image], EncodedImages):
    """Images in the column ``image`` of parquet files, structs of ``bytes`` and ``path``; see `ParquetTable`."""

    @staticmethod
    def _check(kind: Any, column: str, path: str) -> None:
        if not import_extra("pyarrow").types.is_struct(kind) or kind.get_field_index("bytes") < 0:
            raise DataError(f"column {column!r} of {path} is {kind}: it must be a struct of bytes and path")

    def _content(self, i: int) -> bytes:
        """Return an image as its row holds it, or the content of the file that the row names."""
        entry = self._cell(i) or {}
        if entry.get("bytes") is not None:
            return bytes(entry["bytes"])
        if not entry.get("path"):
            raise ItemError(self._name(i), "no image in this row")
        file, _ = self._groups[bisect_right(self._ends, i)]
        try:
            return self._folder.read(self._folder.beside(self._files[file], entry["path"]))
        except OSError as error:
            raise ItemError(self._name(i), reason_of(error)) from error


class Group(list[T]):
    """Rows that are read together, to which weak references are possible."""

    __slots__ = ("__weakref__",)


class LastGroups:
    """The groups of rows that threads have read last, by their numbers. A pickled copy holds none."""

    def __init__(self) -> None:
        self._own = threading.local()
        self._all: WeakValueDictionary[Hashable, Any] = WeakValueDictionary()

    def __reduce__(self) -> tuple[type["LastGroups"], tuple[()]]:
        return LastGroups, ()

    def find(self, group: Hashable, read: Callable[[], Any]) -> Any:
        """Return a group; it is read only if no thread holds it."""
        if getattr(self._own, "group", None) != group:
            self._own.group = self._own.rows = None  # lets the old group go before the new one comes
            self._own.rows = self._all.get(group)
            if self._own.rows is None:
                self._all[group] = self._own.rows = read()
            self._own.group = group
        return self._own.rows


class PieceReader:
    """Reads pieces of row groups; the next piece of the last row group is decoded without those before it.

    A pickled copy has no file open.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._group: Hashable = None
        self._pieces: Iterator[tuple[int, Any]] = iter(())
        self._last = -1

    def __reduce__(self) -> tuple[type["PieceReader"], tuple[()]]:
        return PieceReader, ()

    def read(self, folder: Folder, file: str, group: int, piece: int, columns: Sequence[str]) -> Any:
        """Return columns of one piece of a row group, at most `PIECE` rows, as a `pyarrow.Table`."""
        with self._lock:
            if self._group != (wanted := (file, group, *columns)) or piece <= self._last:
                self._pieces = enumerate(_pieces(folder, file, group, columns))
            self._group = None  # after an error the pieces end, so the next read begins again
            found = next((batch for number, batch in self._pieces if number == piece), None)
            self._group, self._last = wanted, piece
        if found is None:
            raise OSError(f"row group {group} has fewer rows than when the file was opened")
        return import_extra("pyarrow").Table.from_batches([found])


def _pieces(folder: Folder, file: str, group: int, columns: Sequence[str]) -> Iterator[Any]:
    with open_parquet(folder, file) as opened:
        yield from opened.iter_batches(PIECE, row_groups=[group], columns=list(columns), use_threads=False)


def other_columns(name: str, first: str) -> DataError:
    """Return the error that a shard of a data set has other columns than the first one."""
    return DataError(f"{name} has other columns than {first}: the shards of a data set must agree")


def row_name(files: Sequence[str], first_rows: Sequence[int], i: int, noun: str = "row", first: int = 0) -> str:
    """Return the name of row `i` of a file, or of shards; `first_rows` has the number of rows before each."""
    file = bisect_right(first_rows, i, hi=len(files)) - 1
    row = f"{noun} {first + i - first_rows[file]}"
    return row if len(files) == 1 else f"{PurePath(files[file]).name} {row}"


class _Index:
    """Everything in a parquet file but the items.

    Parameters
    ----------
    folder, file : Folder, str
        The file, in its folder.
    item_column : str
        The column of the items.
    options : Options
        How to read the labels.
    check : callable
        Raises an error if the items cannot be in a column; called with its Arrow type, its name and the file.
    """

    def __init__(
        self,
        folder: Folder,
        file: str,
        item_column: str,
        options: Options,
        check: Callable[[Any, str, str], None],
    ) -> None:
        pa = import_extra("pyarrow")
        self.path = folder.name(file)
        self.labels: list[Any] | None = None
        self.label_kind = "missing"
        self.class_names: list[str] | None = None
        try:
            with open_parquet(folder, file) as opened:
                schema = opened.schema_arrow
                if item_column not in schema.names:
                    raise DataError(
                        f"no column {item_column!r} in {self.path}: it has {', '.join(schema.names) or 'none'}"
                    )
                item_type = schema.field(item_column).type
                check(item_type, item_column, self.path)
                nested = import_extra("pyarrow").types.is_nested
                self.scalars = tuple(field.name for field in schema if not nested(field.type))
                self.candidates = tuple(field.name for field in schema if kind_of_labels(field.type))
                metadata = opened.metadata
                self.rows = metadata.num_rows
                self.group_sizes = [metadata.row_group(g).num_rows for g in range(metadata.num_row_groups)]
                if (label_column := options.label_of(schema.names, self.path)) is not None:
                    self._read_labels(opened, label_column)
                self.paths: list[str | None] = [None] * self.rows
                if pa.types.is_struct(item_type) and item_type.get_field_index("path") >= 0:
                    items = opened.read(columns=[f"{item_column}.path"])[item_column].to_pylist()
                    self.paths = [None if item is None else item["path"] for item in items]
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"cannot read {self.path} as parquet: {first_line(error)}") from error

    def _read_labels(self, opened: Any, column: str) -> None:
        type_ = opened.schema_arrow.field(column).type
        # A column without a single label has no type of its own.
        kind = "integers" if import_extra("pyarrow").types.is_null(type_) else kind_of_labels(type_)
        if kind is None:
            raise DataError(
                f"column {column!r} of {self.path} is {type_}: labels are integers, strings or booleans"
                + (f"; {', '.join(self.candidates)} could be" if self.candidates else "")
            )
        self.label_kind = kind
        self.labels = opened.read(columns=[column])[column].to_pylist()
        if kind == "integers":
            self.class_names = _class_names(opened.schema_arrow.metadata or {}, column)


def _labels(indices: Sequence[_Index]) -> tuple[list[int | None], list[str] | None]:
    """Return the labels of all files, and the names of their classes.

    Raises
    ------
    DataError
        If the files do not agree.
    """
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


def kind_of_labels(type_: Any) -> str | None:
    """Return what the labels of an Arrow type are; None if it cannot hold labels."""
    types = import_extra("pyarrow").types
    if types.is_dictionary(type_):
        return kind_of_labels(type_.value_type)
    if types.is_integer(type_):
        return "integers"
    if types.is_string(type_) or types.is_large_string(type_) or types.is_string_view(type_):
        return "strings"
    return "booleans" if types.is_boolean(type_) else None


@contextmanager
def open_parquet(folder: Folder, file: str) -> Iterator[Any]:
    """Open a parquet file as a `pyarrow.parquet.ParquetFile`."""
    # In a store, the bytes of a row group are fetched at once, and not column by column or bit by bit.
    local = isinstance(folder, LocalFolder)
    options = {"pre_buffer": not local, "buffer_size": _BUFFER if local else 0}
    with folder.open(file) as stream, import_extra("pyarrow.parquet").ParquetFile(stream, **options) as opened:
        yield opened


def _class_names(metadata: dict[bytes, bytes], column: str) -> list[str] | None:
    try:
        names = json.loads(metadata[b"huggingface"])["info"]["features"][column]["names"]
    except (KeyError, TypeError, ValueError):
        return None
    return [str(name) for name in names]
