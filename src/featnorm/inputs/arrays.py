"""Rows of arrays and tables as sources: outputs of any encoder, or records with named columns."""

import hashlib
import io
from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Mapping, Sequence, Set
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from featnorm._utils.errors import first_line
from featnorm._utils.extras import import_extra
from featnorm.inputs.cache import CachedFeatures
from featnorm.inputs.errors import DataError, ItemError
from featnorm.inputs.files import Folder, LocalFolder
from featnorm.inputs.kinds import ROWS
from featnorm.inputs.openers import Opener, Options
from featnorm.inputs.parquet import (
    PIECE,
    Group,
    LastGroups,
    PieceReader,
    open_parquet,
    other_columns,
    row_name,
)
from featnorm.inputs.rows import Rows
from featnorm.inputs.source import SlicedSource, Source, class_labels
from featnorm.inputs.texts import FORMATS, RowFile, is_number

# Rows of a table in memory that are converted at a time.
_BLOCK = 1024
#: Names of the arrays of an .npz file that hold its labels.
_LABELS = ("labels", "label", "targets", "y")


class ArrayRows(Source[Any]):
    """Rows of an array, in single precision.

    Parameters
    ----------
    values : (n, D) numbers of any real type, in memory or mapped from a file.
    title : name for tables.
    labels, class_names : see `Source`.
    place : what identifies the file of the array, with its size and modification time. Default: no file.

    Raises
    ------
    DataError
        The values have another shape or type, or there is no row or no column.
    """

    kind = ROWS

    def __init__(
        self,
        values: npt.NDArray[Any],
        title: str,
        labels: Sequence[int | None] | None = None,
        class_names: list[str] | None = None,
        place: str = "",
    ) -> None:
        if values.ndim != 2 or values.dtype.kind not in "fiub" or 0 in values.shape:
            raise DataError(
                f"{title} has shape {values.shape} and type {values.dtype}: expected real numbers of shape "
                "(n, D), one row per input"
            )
        super().__init__(title, [None] * len(values) if labels is None else labels, class_names)
        self.width = int(values.shape[1])
        self._values = values
        self._place = place

    def _read(self, i: int) -> tuple[Any, bytes]:
        with np.errstate(over="ignore"):
            # -0.0 and 0.0 are one value, and have one digest.
            row = self._values[i].astype(np.float32) + np.float32(0)
        return row, hashlib.sha256(row.tobytes()).digest()

    def _name(self, i: int) -> str:
        return f"row {i}"

    def _identity(self, i: int) -> str:
        return f"{self._place} {i}" if self._place else self._digest(i).hex()


class TableRows(Source[Any]):
    """Rows of tables with named columns, which are read block by block.

    If one column holds vectors, each row is its vector. Otherwise a row is a mapping of the names of the columns,
    without that of the labels, to values; None for missing.

    Parameters
    ----------
    title : name for tables.
    schema : `pyarrow.Schema` of the tables.
    sizes : number of rows of each block.
    options : how labels are read.

    Raises
    ------
    DataError
        There is no row, several columns hold vectors, or there is no column for the labels.
    """

    kind = ROWS

    def __init__(self, title: str, schema: Any, sizes: Sequence[int], options: Options) -> None:
        self.title = title
        names = schema.names
        if len(set(names)) < len(names):
            raise DataError(f"{title} has several columns named {max(names, key=names.count)!r}")
        vectors = vector_columns(schema)
        if len(vectors) > 1:
            raise DataError(f"{title} holds several columns of vectors ({', '.join(vectors)}): keep one")
        self._vector = vectors[0] if vectors else None
        label = options.label_of(names, title)
        nested = import_extra("pyarrow").types.is_nested
        self.columns = tuple(f.name for f in schema if not nested(f.type) and f.name not in ("", options.label))
        self._ends = list(accumulate(sizes))
        if not self._ends or not self._ends[-1]:
            raise DataError(f"no rows in {title}")
        self._tables, self._rows = LastGroups(), LastGroups()
        super().__init__(title, *class_labels([None] * self._ends[-1] if label is None else self.column(label)))
        self.width = None if self._vector is None else len(self._first_vector())

    @abstractmethod
    def _table(self, number: int, columns: Sequence[str]) -> Any:
        """Return columns of a table as a `pyarrow.Table`; raise a `DataError` if it cannot be read."""

    def _locate(self, i: int) -> tuple[int, int]:
        """Return the table of row `i`, and its row there."""
        number = bisect_right(self._ends, i)
        return number, i - (self._ends[number - 1] if number else 0)

    def column(self, name: str) -> list[Any]:
        """See `Source`."""
        return [
            value for number in range(len(self._ends)) for value in self._table(number, [name])[name].to_pylist()
        ]

    def _first_vector(self) -> npt.NDArray[Any]:
        for i in range(self._ends[-1]):
            try:
                return self._read(i)[0]
            except ItemError:
                continue
        raise DataError(f"no row of {self.title} has a vector")

    def _read(self, i: int) -> tuple[Any, bytes]:
        number, row = self._locate(i)
        columns = self.columns if self._vector is None else [self._vector]
        table = self._tables.find(number, lambda: self._table(number, columns))
        if self._vector is not None:
            vector = _array_of(table[self._vector][row])
            if vector is None:
                raise ItemError(self._name(i), "no vector in this row")
            return vector, hashlib.sha256(vector.tobytes()).digest()
        # Values in Python take many times the memory of the table.
        block = row // _BLOCK
        rows = self._rows.find((number, block), lambda: Group(table.slice(block * _BLOCK, _BLOCK).to_pylist()))
        item = rows[row % _BLOCK]
        return item, hashlib.sha256("\0".join(map(str, item.values())).encode()).digest()

    def _name(self, i: int) -> str:
        return f"row {i}"


class ArrowRows(TableRows):
    """Rows of a table in memory.

    Parameters
    ----------
    table : `pyarrow.Table`.
    unread : rows of the source that are not in the table because they cannot be read, and the reasons.
    title, options : see `TableRows`.
    """

    def __init__(self, table: Any, unread: Mapping[int, str], title: str, options: Options) -> None:
        self._whole = table
        self._unread = unread
        # Row of the table of each row of the source that can be read.
        taken = np.ones(table.num_rows + len(unread), bool)
        taken[list(unread)] = False
        self._places = np.cumsum(taken) - 1
        super().__init__(title, table.schema, [len(taken)], options)

    def _table(self, number: int, columns: Sequence[str]) -> Any:
        return self._whole.select(columns)

    def _locate(self, i: int) -> tuple[int, int]:
        return 0, int(self._places[i])

    def column(self, name: str) -> list[Any]:
        """See `Source`."""
        values = super().column(name)
        return [None if i in self._unread else values[place] for i, place in enumerate(self._places.tolist())]

    def _read(self, i: int) -> tuple[Any, bytes]:
        if i in self._unread:
            raise ItemError(self._name(i), self._unread[i])
        return super()._read(i)

    def _identity(self, i: int) -> str:
        try:
            return self._digest(i).hex()
        except ItemError as error:
            return error.reason


class FileRows(ArrowRows):
    """Rows of CSV or JSON Lines files, in memory.

    Words for missing values, such as ``NA`` and ``nan``, are null. Columns of JSON values of several types are
    those of their strings.

    Parameters
    ----------
    files : one file, or the shards of one data set, in order, see `featnorm.inputs.texts.row_files`.
    title, options : see `TableRows`.

    Raises
    ------
    DataError
        See `TableRows`; or a file cannot be read, or its first row holds numbers in place of the names of the
        columns.
    """

    def __init__(self, files: Sequence[RowFile], title: str, options: Options) -> None:
        self._paths = [file.path for file in files]
        self._first_rows: list[int] = []
        table, unread = self._table_of(files)
        super().__init__(table, unread, title, options)

    def _table_of(self, files: Sequence[RowFile]) -> tuple[Any, dict[int, str]]:
        pa = import_extra("pyarrow")
        missing = frozenset(import_extra("pyarrow.csv").ConvertOptions().null_values)
        unread: dict[int, str] = {}
        tables = []
        count = 0
        for file in files:
            if all(map(is_number, file.columns)) and not all(map(str.isdecimal, file.columns)):
                raise DataError(
                    f"the first row of {file.name} holds numbers: add a row with the names of the columns"
                )
            self._first_rows.append(count)
            rows = (row for _, row in file.rows())
            while block := list(islice(rows, _BLOCK)):
                read = []
                for number, row in enumerate(block, count):
                    error = row.error
                    if not _is_utf8("".join(value for value in row.values.values() if isinstance(value, str))):
                        error = "it is not valid UTF-8"
                    if error is None:
                        read.append(row.values)
                    else:
                        unread[number] = error
                count += len(block)
                columns = {name: [row.get(name) for row in read] for name in files[0].columns}
                tables.append(pa.table({name: _column(values, missing) for name, values in columns.items()}))
        if not tables:
            raise DataError(f"no rows in {', '.join(file.name for file in files)}")
        try:
            return pa.concat_tables(tables, promote_options="permissive"), unread
        except (pa.ArrowInvalid, pa.ArrowTypeError):
            words = [pa.table({n: _words(t[n].to_pylist()) for n in t.column_names}) for t in tables]
            return pa.concat_tables(words, promote_options="permissive"), unread

    def _name(self, i: int) -> str:
        return row_name(self._paths, self._first_rows, i)


class ParquetRows(TableRows):
    """Rows of parquet files, read a few thousand at a time, because a row group may hold all rows of a file.

    Parameters
    ----------
    folder : folder of the files.
    files : one file, or the shards of one data set, in order.
    title, options : see `TableRows`.
    """

    max_readers = 1  # rows are decoded in order

    def __init__(self, folder: Folder, files: Sequence[str], title: str, options: Options) -> None:
        self._folder, self._files = folder, list(files)
        self._pieces, self._reader = [], PieceReader()
        sizes, starts = [], [0]
        first = None
        for number, file in enumerate(files):
            with self._errors(file), open_parquet(folder, file) as table:
                first = first or table.schema_arrow
                if table.schema_arrow.names != first.names:
                    raise other_columns(folder.name(file), folder.name(files[0]))
                for group in range(table.metadata.num_row_groups):
                    rows = table.metadata.row_group(group).num_rows
                    self._pieces += [(number, group, i) for i in range(-(-rows // PIECE))]
                    sizes += [min(PIECE, rows - start) for start in range(0, rows, PIECE)]
                starts.append(starts[-1] + table.metadata.num_rows)
        self._starts = starts
        super().__init__(title, first, sizes, options)

    def _errors(self, file: str) -> "_Errors":
        return _Errors(self._folder.name(file))

    def _table(self, number: int, columns: Sequence[str]) -> Any:
        file, group, piece = self._pieces[number]
        with self._errors(self._files[file]):
            return self._reader.read(self._folder, self._files[file], group, piece, columns)

    def _name(self, i: int) -> str:
        return row_name(self._files, self._starts, i)

    def _identity(self, i: int) -> str:
        file = self._pieces[bisect_right(self._ends, i)][0]
        return f"{self._folder.absolute().identity(self._files[file])} {i}"


class ArrayOpener(Opener):
    """A .npy file, which is mapped into memory, or an .npz file. Python objects in them are not loaded."""

    endings = (".npy", ".npz")

    def open(self, location: Any, title: str, options: Options) -> ArrayRows:
        """See `Opener`."""
        folder, (path,) = location.folder, location.paths
        place = folder.absolute().identity(path)
        labels: Any = (None, None)
        try:
            if not path.endswith(".npz"):
                options.require_no_column(location)
                return ArrayRows(_array(folder, path), title, place=place)
            with np.load(io.BytesIO(folder.read(path)), allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
        except (ValueError, EOFError) as error:
            raise error if isinstance(error, DataError) else _not_an_array(folder.name(path), error) from None
        label = options.label_column or next((name for name in _LABELS if name in arrays), None)
        if label is not None and label not in arrays:
            raise DataError(f"no array {label!r} in {title}: it has {', '.join(arrays)}")
        if label is not None:
            given = arrays.pop(label)
            labels = class_labels(given) if options.labels else labels
        matrices = [name for name, array in arrays.items() if array.ndim == 2] if len(arrays) > 1 else [*arrays]
        if len(matrices) != 1:
            raise DataError(
                f"{title} holds {len(matrices)} arrays of shape (n, D) ({', '.join(arrays) or 'none'}): keep one, "
                f"and beside it one of labels, named {' or '.join(_LABELS)}"
            )
        values = arrays[matrices[0]]
        if labels[0] is not None and len(labels[0]) != len(values):
            raise DataError(f"{title} holds {len(values)} rows, and {len(labels[0])} labels")
        return ArrayRows(values, title, labels[0], labels[1], place)


def matrix_of(data: Any) -> npt.NDArray[Any]:
    """Return an array or a tensor, on any device, as an array."""
    if isinstance(data, Tensor):
        data = data.detach().cpu()
        data = data.float() if data.dtype == torch.bfloat16 else data
    return np.asarray(data)


def row_features(source: Source[Any], rows: Rows) -> CachedFeatures:
    """Return the rows of a source as features, in memory; see `Rows` for those that do not fit.

    Raises
    ------
    DataError
        No row can be read.
    """
    values = torch.empty(len(source), rows.width)
    kept: list[int] = []
    digests: list[bytes] = []
    corrupt: list[tuple[str, str]] = []
    copies: dict[bytes, int] = {}
    for i in range(len(source)):
        try:
            item, digest = source.read(i)
            values[len(kept)] = rows(item)
        except ItemError as error:
            corrupt.append((source.name(i), error.reason))
            continue
        if not rows.embeds:
            # Equal records are different inputs.
            copies[digest] = copy = copies.get(digest, -1) + 1
            digest = hashlib.sha256(digest + copy.to_bytes(8)).digest()
        kept.append(i)
        digests.append(digest)
    if not kept:
        raise DataError(f"none of the {len(source):,} rows of {source.title} can be read: {corrupt[0][1]}")
    places = torch.arange(len(kept))
    return CachedFeatures(values[: len(kept)], places, torch.tensor(kept), digests, corrupt, 0, 0, 0, 0)


class LabeledSource(SlicedSource[Any]):
    """All items of another source, with other labels.

    Parameters
    ----------
    source : the other source.
    labels
        One label per item: see `class_labels`; or a file with them: an array in a .npy file, a .csv file with one
        column and its name in the first line, or a .txt file with one label per line.

    Raises
    ------
    DataError
        The file cannot be read, or there is not one label per item.
    """

    def __init__(self, source: Source[Any], labels: Any) -> None:
        super().__init__(source, range(len(source)), source.title)
        where = "labels"
        if isinstance(labels, (str, Path)):
            where = str(labels)
            labels = _read_labels(Path(labels).expanduser())
        labels, self.class_names = class_labels(labels if isinstance(labels, list) else matrix_of(labels))
        if len(labels) != len(source):
            raise DataError(
                f"{where} has {len(labels):,} labels, and {source.title} has {len(source):,} {source.kind.name}"
            )
        self._labels = [None if label is None or label < 0 else label for label in labels]


def vector_columns(schema: Any) -> list[str]:
    """Return the names of the columns of a `pyarrow.Schema` that hold vectors: lists of numbers."""
    types = import_extra("pyarrow").types
    lists = [f for f in schema if types.is_list(f.type) or types.is_large_list(f.type)]
    lists += [f for f in schema if types.is_fixed_size_list(f.type)]
    return [f.name for f in lists if types.is_floating(f.type.value_type) or types.is_integer(f.type.value_type)]


def _column(values: list[Any], missing: Set[str]) -> Any:
    pa = import_extra("pyarrow")
    try:
        return pa.array([None if isinstance(value, str) and value in missing else value for value in values])
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        return _words(values)


def _words(values: list[Any]) -> Any:
    pa = import_extra("pyarrow")
    return pa.array([None if value is None else str(value) for value in values], pa.string())


def _is_utf8(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


class _Errors:
    """Names the file in errors of pyarrow."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: BaseException | None, _: object) -> None:
        if isinstance(error, (import_extra("pyarrow").ArrowException, OSError)):
            raise DataError(f"cannot read {self._name}: {first_line(error)}") from error


def _array_of(value: Any) -> npt.NDArray[Any] | None:
    """Return a scalar of a column of vectors as an array of float32; None for null."""
    if value.values is None:
        return None
    with np.errstate(over="ignore"):
        return value.values.to_numpy(zero_copy_only=False).astype(np.float32) + np.float32(0)


def _array(folder: Folder, path: str) -> npt.NDArray[Any]:
    if isinstance(folder, LocalFolder):
        return np.load(folder.full_path(path), mmap_mode="r", allow_pickle=False)
    return np.load(io.BytesIO(folder.read(path)), allow_pickle=False)


def _not_an_array(name: str, error: Exception) -> DataError:
    if "Python objects" in str(error) or "Object arrays" in str(error):
        return DataError(f"{name} holds Python objects, which are not loaded: save an array of numbers")
    if "pickled" in str(error):
        return DataError(f"cannot read {name}: it was not written by numpy.save or numpy.savez")
    return DataError(f"cannot read {name}: {first_line(error)}")


def _read_labels(path: Path) -> Any:
    try:
        if path.suffix == ".npy":
            return np.load(path, allow_pickle=False)
        if path.suffix not in (".csv", ".txt"):
            raise DataError(f"cannot read labels from {path}: name a .npy, .csv or .txt file")
        file = FORMATS[path.suffix](LocalFolder(""), str(path))
        if len(file.columns) != 1:
            raise DataError(f"{path} has {len(file.columns)} columns: expected one, with a label per row")
        return [row.values.get(file.columns[0]) for _, row in file.rows()]
    except OSError as error:
        raise DataError(f"cannot read {path}: {first_line(error)}") from None
    except ValueError as error:
        raise error if isinstance(error, DataError) else _not_an_array(str(path), error) from None
