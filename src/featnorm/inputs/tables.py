"""Openers of tables, whose columns tell what they hold, and of lines of text; and the source of any data."""

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import islice
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from featnorm._utils.errors import first_line
from featnorm._utils.extras import import_extra
from featnorm.inputs.arrays import ArrayRows, ArrowRows, FileRows, LabeledSource, ParquetRows, matrix_of
from featnorm.inputs.errors import DataError
from featnorm.inputs.files import Folder
from featnorm.inputs.formats import PassedOver, ending
from featnorm.inputs.kinds import is_data_frame
from featnorm.inputs.openers import Location, Opener, Options, open_source
from featnorm.inputs.parquet import ParquetImages, open_parquet
from featnorm.inputs.source import Source
from featnorm.inputs.texts import (
    FORMATS,
    SAMPLE,
    ParquetTexts,
    TextList,
    TextRows,
    has_words,
    require_text_column,
    row_files,
    text_column,
)


class ParquetOpener(Opener):
    """A parquet file, or the shards of one data set.

    Unless a column of texts is chosen, it holds images if it has a column ``image``, and rows if it has a column
    of lists of numbers. It holds texts if it has a column of texts, see `text_column`, and otherwise rows if no
    column of strings has three words or more on average, which could be texts.
    """

    endings = (".parquet",)
    shards = endings

    def open(self, location: Any, title: str, options: Options) -> Source[Any]:
        """See `Opener`; the other files of the folder are ignored."""
        folder, files, passed_over = _shards(self, location)
        source = self._open(folder, files, title, options)
        source.passed_over = passed_over
        return source

    def _open(self, folder: Folder, files: Sequence[str], title: str, options: Options) -> Source[Any]:
        path = folder.name(files[0])
        pa = import_extra("pyarrow")
        try:
            with open_parquet(folder, files[0]) as opened:
                if "image" in opened.schema_arrow.names and options.text_column is None:
                    return ParquetImages(folder, files, title, "image", options)
                first = next(opened.iter_batches(SAMPLE), None)
                names = opened.schema_arrow.names
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"cannot read {path} as parquet: {first_line(error)}") from error
        values = {name: [] if first is None else list(map(_value, first[name])) for name in names}
        if _are_rows(values, options):
            return ParquetRows(folder, files, title, options)
        return ParquetTexts(folder, files, title, require_text_column(path, values, options, "image"), options)


class RowOpener(Opener):
    """A CSV or JSON Lines file, or the shards of one data set, of texts or rows, as parquet files without images.

    Or a file of lines of text.
    """

    endings = tuple(FORMATS)
    shards = (".csv", ".jsonl")

    def accepts(self, location: Location) -> bool:
        """See `Opener`; beside videos, such files describe them."""
        return super().accepts(location) and not (isinstance(location, Folder) and location.videos[0])

    def open(self, location: Any, title: str, options: Options) -> Source[Any]:
        """See `Opener`; the other files of the folder are ignored."""
        folder, paths, passed_over = _shards(self, location)
        files = row_files(folder, paths)
        sample = [row.values for _, row in islice(files[0].rows(), SAMPLE)]
        values = {name: [row.get(name) for row in sample] for name in files[0].columns}
        source: Source[Any]
        if _are_rows(values, options):
            source = FileRows(files, title, options)
        else:
            source = TextRows(files, title, require_text_column(files[0].name, values, options), options)
        source.passed_over = passed_over
        return source


def source_of(
    data: Any,
    labels: Any = None,
    *,
    root: str | Path | None = None,
    read_labels: bool = True,
    label_column: str | None = None,
    text_column: str | None = None,
    fps: float = 1.0,
) -> Source[Any]:
    """Return any data as a source.

    Parameters
    ----------
    data
        A specification as `open_source` takes it; a source; a list or array of str, which are texts; an array,
        tensor or sequence (n, D) of numbers, which are rows; or a `pandas.DataFrame`, whose columns tell whether
        it holds texts or rows, as those of a CSV file do.
    labels
        One label per item, or a file with them, see `featnorm.inputs.arrays.LabeledSource`. Default: those of
        ``data``.
    root, label_column, text_column, fps : see `open_source`.
    read_labels : whether to read the labels of a table.

    Raises
    ------
    DataError
        The data have another shape or type, or see `open_source`.
    """
    options = Options(read_labels, label_column, text_column, fps)
    source: Source[Any]
    if isinstance(data, (str, PathLike)):
        how: dict[str, Any] = {"label_column": label_column, "text_column": text_column, "fps": fps}
        source = open_source(fspath(data), root=root, labels=read_labels, **how)
    elif isinstance(data, Source):
        source = data
    elif is_data_frame(data):
        source = _of_data_frame(data, options)
    elif (texts := texts_in(data)) is not None:
        source = TextList(texts, "the list", options)
    else:
        source = ArrayRows(matrix_of(data), "the array")
    return source if labels is None else LabeledSource(source, labels)


def texts_in(data: Any) -> list[Any] | None:
    """Return the items of a list, tuple, array or pandas Series, if the first that is not None is a str."""
    if not isinstance(data, (list, tuple)):
        if isinstance(data, Tensor) or getattr(data, "ndim", 0) != 1 or not hasattr(data, "tolist"):
            return None
        data = data.tolist()
    first = next((item for item in data if item is not None), None)
    return list(data) if isinstance(first, str) else None


def is_in_memory(data: Any) -> bool:
    """Return whether `source_of` takes data that are neither a source nor the specification of one."""
    if isinstance(data, (np.ndarray, Tensor)) or is_data_frame(data) or texts_in(data) is not None:
        return True
    first = data[0] if isinstance(data, (list, tuple)) and data else None
    return isinstance(first, (list, tuple)) and bool(first) and isinstance(first[0], (int, float))


def _of_data_frame(data: Any, options: Options) -> Source[Any]:
    pa = import_extra("pyarrow")
    name = "the DataFrame"
    try:
        table = pa.Table.from_pandas(data, preserve_index=False)
    except (pa.ArrowException, TypeError, ValueError) as error:
        raise DataError(f"cannot use the DataFrame: {first_line(error)}") from None
    values = table.slice(0, SAMPLE).to_pydict()
    if _are_rows(values, options):
        return ArrowRows(table, {}, name, options)
    column = require_text_column(name, values, options)
    columns = table.to_pydict()
    return TextList(columns[column], name, options, columns, column)


def _shards(opener: Opener, location: Any) -> tuple[Folder, Sequence[str], PassedOver]:
    """Return the files of a location that an opener accepts, in their folder, and the others beside them."""
    if not isinstance(location, Folder):
        return location.folder, location.paths, PassedOver()
    _, shards = location.top_level(opener.shards)
    _, beside = location.images
    kinds = Counter(beside.kinds) - Counter(map(ending, shards))
    return location, shards, PassedOver(kinds, beside.hidden, beside.closed)


def _are_rows(values: Mapping[str, Sequence[Any]], options: Options) -> bool:
    """Return whether a table without images holds rows and not texts, by the first values of its columns."""
    if options.text_column is not None:
        return False
    cells = [value for column in values.values() for value in column]
    if any(isinstance(value, list) for value in cells):
        return True
    others = any(isinstance(value, (dict, bytes)) for value in cells) or any(map(has_words, values.values()))
    return text_column(values, options) is None and not others


def _value(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        return ""
