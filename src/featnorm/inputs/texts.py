"""Texts in the rows of CSV, JSON Lines, parquet and plain text files, as a source."""

import csv
import hashlib
import json
from abc import ABC, abstractmethod
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, BinaryIO

from featnorm.inputs.decoding import reason_of
from featnorm.inputs.errors import DataError, ItemError
from featnorm.inputs.files import Folder
from featnorm.inputs.kinds import TEXTS
from featnorm.inputs.openers import Options
from featnorm.inputs.parquet import Group, LastGroups, ParquetTable, kind_of_labels, other_columns, row_name
from featnorm.inputs.source import Source, class_labels

#: Maximum number of bytes of a row. It bounds the memory that a quote or a line without an end takes.
MAX_ROW = 1 << 26
# Rows and bytes that are read together, at which a group of rows ends.
_GROUP_ROWS, _GROUP_BYTES = 1024, 1 << 20
#: Rows from which the column of texts is chosen, and the average number of words from which strings are texts.
SAMPLE, _WORDS = 100, 3
_DELIMITERS = (",", ";", "\t")
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_BOM = "\ufeff"


@dataclass(frozen=True)
class Row:
    """A row of a file: its values by column, or why it cannot be read."""

    values: dict[str, Any]
    error: str | None = None


class RowFile(ABC):
    """The rows of one file of lines, read in one pass, or from the beginning of a group of rows.

    Parameters
    ----------
    folder, path : Folder, str
        The file, in its folder.

    Raises
    ------
    DataError
        If it is not a file of its format.
    """

    def __init__(self, folder: Folder, path: str) -> None:
        self.folder, self.path = folder, path
        self.name = folder.name(path)
        self.columns: list[str] = []

    def rows(self, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, Row]]:
        """Yield the offset behind each row, and the row, from the bytes ``start`` to ``stop`` of the file."""
        with self.folder.stream(self.path) as file:
            file.seek(start)
            lines = _Lines(file, self.name, stop)
            yield from self._parsed(lines, start)

    @abstractmethod
    def _parsed(self, lines: "_Lines", start: int) -> Iterator[tuple[int, Row]]: ...


class _Lines:
    """The decoded lines of a file; an undecodable byte is a lone surrogate. ``offset`` is behind the last one."""

    def __init__(self, file: BinaryIO, name: str, stop: int | None) -> None:
        self._file, self._name, self._stop = file, name, stop
        self.offset = file.tell()
        self.ended = False

    def __iter__(self) -> Iterator[str]:
        while self._stop is None or self.offset < self._stop:
            line = self._file.readline(MAX_ROW + 1)
            if len(line) > MAX_ROW:
                raise DataError(
                    f"{self._name} has a line of more than {MAX_ROW:,} bytes at byte {self.offset:,}: it is not a "
                    "text file, or lacks line breaks"
                )
            if not line:
                self.ended = True
                return
            if self.offset == 0 and line.startswith(_UTF16):
                raise DataError(f"{self._name} is encoded in UTF-16: save it in UTF-8")
            text = line.decode("utf-8", "surrogateescape")
            text = text.removeprefix(_BOM) if self.offset == 0 else text
            self.offset += len(line)
            yield text


class CsvFile(RowFile):
    """A CSV file whose first row names the columns; separated by commas, semicolons or tabs, as that row is."""

    def __init__(self, folder: Folder, path: str) -> None:
        super().__init__(folder, path)
        # The largest field of Python's parser is a setting of the process.
        csv.field_size_limit(max(csv.field_size_limit(), MAX_ROW))
        with folder.stream(path) as file:
            first = next(iter(_Lines(file, self.name, None)), "")
        self._delimiter = max(_DELIMITERS, key=first.count)
        with folder.stream(path) as file:
            header = next(self._records(_Lines(file, self.name, None)), [])
        self.columns = [name.strip() for name in header]
        if not self.columns or any(not name.isprintable() for name in self.columns):
            raise DataError(f"{self.name} does not begin with a row of column names: expected CSV in UTF-8")
        if twice := next((name for i, name in enumerate(self.columns) if name in self.columns[:i]), None):
            raise DataError(f"{self.name} has the column {twice!r} twice: rename one of them")

    def _records(self, lines: "_Lines") -> Iterator[list[str]]:
        record: list[str] = []

        def noted() -> Iterator[str]:
            for line in lines:
                record.append(line)
                yield line

        reader = csv.reader(noted(), delimiter=self._delimiter)
        try:
            for cells in reader:
                if lines.ended and _is_open(record, self._delimiter):
                    raise DataError(
                        f"{self.name} has a quote that is not closed, in the row that ends at line "
                        f"{reader.line_num}: {_shown(record[0])}"
                    )
                record.clear()
                if cells:  # the others are blank lines
                    yield cells
        except csv.Error as error:
            raise DataError(f"cannot read line {reader.line_num} of {self.name} as CSV: {error}") from None

    def _parsed(self, lines: _Lines, start: int) -> Iterator[tuple[int, Row]]:
        records = self._records(lines)
        if start == 0:
            next(records, None)
        for cells in records:
            error = None
            if len(cells) != len(self.columns):
                error = f"the row has {len(cells)} cells, but the header has {len(self.columns)}"
            yield lines.offset, Row(dict(zip(self.columns, cells, strict=False)), error)


class JsonLinesFile(RowFile):
    """A file with one JSON object per line, whose keys are the columns; blank lines are ignored."""

    def __init__(self, folder: Folder, path: str) -> None:
        super().__init__(folder, path)
        rows = [row for _, row in islice(self.rows(), SAMPLE)]
        self.columns = list({name: None for row in rows for name in row.values})
        if rows and not self.columns:
            raise DataError(f"{self.name} has no JSON object in its first lines: expected one per line")

    def _parsed(self, lines: _Lines, start: int) -> Iterator[tuple[int, Row]]:
        for line in lines:
            if not line.strip():
                continue
            values, error = None, "the line is not a JSON object"
            try:
                values = json.loads(line)
            except (ValueError, RecursionError) as problem:
                error = f"the line is not JSON ({problem})"
            yield lines.offset, Row(values) if isinstance(values, dict) else Row({}, error)


class LineFile(RowFile):
    """A file of plain text, with one text per line."""

    def __init__(self, folder: Folder, path: str) -> None:
        super().__init__(folder, path)
        self.columns = ["text"]

    def _parsed(self, lines: _Lines, start: int) -> Iterator[tuple[int, Row]]:
        for line in lines:
            yield lines.offset, Row({"text": line.removesuffix("\n").removesuffix("\r")})


class Texts(Source[str]):
    """Base of sources of texts. A subclass returns the value of a row, or raises `ItemError`."""

    kind = TEXTS

    @abstractmethod
    def _value(self, i: int) -> Any: ...

    def _read(self, i: int) -> tuple[str, bytes]:
        value = self._value(i)
        name = self._name(i)
        if value is None:
            raise ItemError(name, "no text in this row")
        if not isinstance(value, str):
            raise ItemError(name, f"its text is of type {type(value).__name__}, not a string")
        digest = hashlib.sha256(value.encode("utf-8", "surrogatepass")).digest()
        try:
            return TEXTS.item_of(value, name), digest
        except ItemError as error:
            error.digest = digest
            raise


class TextRows(Texts):
    """The texts of a column of files of lines. A group of rows is read at a time.

    Parameters
    ----------
    files : sequence of RowFile
        One file, or the shards of one data set, in order, see `row_files`.
    title : str
        Name for tables.
    text_column : str
        The column of the texts.
    options : Options
        How to read the labels: whole numbers, of which negative ones mean no label, or strings, whose sorted
        values are the classes. An empty cell or null means no label.

    Raises
    ------
    DataError
        If a file cannot be read, has no such column, or there are no rows.
    """

    def __init__(self, files: Sequence[RowFile], title: str, text_column: str, options: Options) -> None:
        self._files, self._text_column = files, text_column
        self._paths = [file.path for file in files]
        self.columns = tuple(files[0].columns)
        column = options.label_of(self.columns, files[0].name)
        given: list[Any] = []
        # The file and the offset at which each group begins, and the number of rows up to its end.
        self._starts: list[tuple[int, int]] = []
        self._ends = array("Q")
        self._first_rows = array("Q")
        for number, file in enumerate(files):
            self._starts.append((number, 0))
            self._first_rows.append(last := len(given))
            for offset, row in file.rows():
                given.append(None if column is None else row.values.get(column))
                if len(given) - last == _GROUP_ROWS or offset - self._starts[-1][1] >= _GROUP_BYTES:
                    self._starts.append((number, offset))
                    self._ends.append(last := len(given))
            self._ends.append(len(given))
        if not given:
            raise DataError(f"no rows in {', '.join(file.name for file in files)}")
        super().__init__(title, *class_labels(given))
        if options.labels and column is None:
            self.label_columns = tuple(name for name in self.columns if name != text_column)
        self.text_column = None if isinstance(files[0], LineFile) else text_column
        self._groups = LastGroups()

    def column(self, name: str) -> list[Any]:
        """See `Source`."""
        if name not in self.columns:
            raise DataError(f"no column {name!r} in {self._files[0].name}: it has {', '.join(self.columns)}")
        # As in a table of another format, an empty cell is no value.
        values = (row.values.get(name) for file in self._files for _, row in file.rows())
        return [None if value == "" else value for value in values]

    def _value(self, i: int) -> Any:
        group = bisect_right(self._ends, i)
        rows = self._groups.find(group, lambda: self._group(group))
        row = rows[i - (self._ends[group - 1] if group else 0)]
        if row.error is not None:
            raise ItemError(self._name(i), row.error)
        return row.values.get(self._text_column)

    def _group(self, group: int) -> Group[Row]:
        number, start = self._starts[group]
        file = self._files[number]
        after, stop = self._starts[group + 1] if group + 1 < len(self._starts) else (-1, 0)
        count = self._ends[group] - (self._ends[group - 1] if group else 0)
        try:
            rows = Group(row for _, row in file.rows(start, stop if after == number else None))
        except OSError as error:
            raise DataError(f"cannot read {file.name}: {reason_of(error)}") from error
        if len(rows) != count:
            raise DataError(f"{file.name} changed while it was read: run again")
        return rows

    def _name(self, i: int) -> str:
        # Editors count lines from 1.
        noun, first = ("line", 1) if isinstance(self._files[0], LineFile) else ("row", 0)
        return row_name(self._paths, self._first_rows, i, noun, first)

    def _identity(self, i: int) -> str:
        file = self._files[bisect_right(self._first_rows, i) - 1]
        return f"{file.folder.absolute().identity(file.path)} {self._text_column} {i}"


class TextList(Texts):
    """Texts in memory.

    Parameters
    ----------
    texts : sequence of str
        The texts.
    title : str
        Name for tables.
    table : mapping of str to sequence, optional
        Columns of the table that the texts are in, by name.
    text_column : str or None
        Name of the column of the texts.
    options : Options
        How to read the labels, see `TextRows`.

    Raises
    ------
    DataError
        There is no text, or there is no column for the labels.
    """

    def __init__(
        self,
        texts: Sequence[Any],
        title: str,
        options: Options,
        table: Mapping[str, Sequence[Any]] | None = None,
        text_column: str | None = None,
    ) -> None:
        if not texts:
            raise DataError(f"no rows in {title}")
        self._texts, self._table = texts, table or {}
        column = options.label_of([*self._table], title)
        super().__init__(title, *class_labels([None] * len(texts) if column is None else self.column(column)))
        self.columns, self.text_column = tuple(self._table), text_column

    def column(self, name: str) -> list[Any]:
        """See `Source`."""
        return list(self._table[name]) if name in self._table else super().column(name)

    def _value(self, i: int) -> Any:
        return self._texts[i]

    def _name(self, i: int) -> str:
        return f"row {i}"

    def _identity(self, i: int) -> str:
        return hashlib.sha256(repr(self._texts[i]).encode()).hexdigest()


class ParquetTexts(ParquetTable[str], Texts):
    """Texts in a column of strings of parquet files; see `ParquetTable`."""

    @staticmethod
    def _check(kind: Any, column: str, path: str) -> None:
        if kind_of_labels(kind) != "strings":
            raise DataError(f"column {column!r} of {path} is {kind}: texts are strings")

    def _value(self, i: int) -> Any:
        try:
            return self._cell(i)
        except UnicodeDecodeError:
            raise ItemError(self._name(i), "it is not valid UTF-8") from None


#: The format of the files with an ending.
FORMATS: dict[str, type[RowFile]] = {".csv": CsvFile, ".jsonl": JsonLinesFile, ".txt": LineFile}


def row_files(folder: Folder, paths: Sequence[str]) -> list[RowFile]:
    """Return files of lines by their endings; raise a `DataError` unless all have the same columns."""
    files = [next(kind for end, kind in FORMATS.items() if path.endswith(end))(folder, path) for path in paths]
    for file in files:
        if {*file.columns} != {*files[0].columns}:
            raise other_columns(file.name, files[0].name)
    return files


def text_column(values: Mapping[str, Sequence[Any]], options: Options) -> str | None:
    """Return the column of a table that holds its texts; None if there is none, or if several could.

    It is the one that the user chose, or else ``text``, or else the only column of strings beside that of the
    labels if it is the only other column, or if its values have on average three words or more.

    Parameters
    ----------
    values : mapping of str to sequence
        The first values of each column.
    options : Options
        How to open the table.
    """
    if options.text_column is not None:
        return options.text_column
    if "text" in values:
        return "text"
    others = [name for name in values if name != options.label]
    strings = [name for name in others if any(isinstance(v, str) and not is_number(v) for v in values[name])]
    if len(strings) != 1:
        return None
    return strings[0] if len(others) == 1 or has_words(values[strings[0]]) else None


def has_words(values: Sequence[Any]) -> bool:
    """Return whether strings are texts: whether they have on average three words or more."""
    words = [len(value.split()) for value in values if isinstance(value, str)]
    return bool(words) and sum(words) >= _WORDS * len(words)


def require_text_column(name: str, values: Mapping[str, Sequence[Any]], options: Options, *other: str) -> str:
    """Return the column of a table that holds its texts, see `text_column`.

    Parameters
    ----------
    name : str
        The table.
    values, options
        See `text_column`.
    *other : str
        Columns of other items, which it lacks too.

    Raises
    ------
    DataError
        If there is no such column, or none can be chosen.
    """
    column = text_column(values, options)
    if column is None or column not in values:
        wanted = " or ".join(map(repr, (*other, "text") if column is None else (column,)))
        choose = "choose that of the texts with text_column (--text-column)"
        advice = choose if column is None else "check its name"
        raise DataError(f"no column {wanted} in {name}: it has {', '.join(values) or 'none'}; {advice}")
    return column


def is_number(value: str) -> bool:
    """Return whether a value reads as a number, or is blank."""
    try:
        float(value)
    except ValueError:
        return not value.strip()
    return True


def _is_open(record: Sequence[str], delimiter: str) -> bool:
    try:
        next(csv.reader(record, delimiter=delimiter, strict=True), None)
    except csv.Error as error:
        return "end of data" in str(error)
    return False


def _shown(line: str) -> str:
    return line[:60].strip().encode(errors="backslashreplace").decode()
