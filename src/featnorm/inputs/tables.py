"""Openers of tables (parquet, CSV and JSON Lines), whose columns tell what they hold, and of lines of text."""

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

from featnorm._utils.errors import first_line
from featnorm._utils.extras import import_extra
from featnorm.inputs.arrays import ArrowRows, ParquetRows, table_of
from featnorm.inputs.errors import DataError
from featnorm.inputs.files import Folder
from featnorm.inputs.formats import PassedOver
from featnorm.inputs.openers import Location, Opener, Options
from featnorm.inputs.parquet import ParquetImages, open_parquet
from featnorm.inputs.source import Source
from featnorm.inputs.texts import (
    FORMATS,
    SAMPLE,
    ParquetTexts,
    TextRows,
    has_words,
    require_text_column,
    text_column,
)


class ParquetOpener(Opener):
    """A parquet file, or a folder that holds some and no images: the shards of one data set.

    Unless a column of texts is chosen, it holds images if it has a column ``image``, and rows if it has a column
    of lists of numbers. It holds texts if it has a column of texts, see `text_column`, and otherwise rows if no
    column of strings has three words or more on average, which could be texts.
    """

    endings = (".parquet",)
    shards = True

    def accepts(self, location: Location) -> bool:
        """See `Opener`."""
        if isinstance(location, Folder):
            return bool(location.top_level(self.endings)[1]) and not location.images[0]
        return super().accepts(location)

    def open(self, location: Any, title: str, options: Options) -> Source[Any]:
        """See `Opener`; the other files of the folder are ignored."""
        if not isinstance(location, Folder):
            return self._open(location.folder, location.paths, title, options)
        _, shards = location.top_level(self.endings)
        source = self._open(location, shards, title, options)
        _, beside = location.images
        kinds = Counter(beside.kinds)
        kinds[".parquet"] -= len(shards)
        source.passed_over = PassedOver(+kinds, beside.hidden, beside.closed)
        return source

    def _open(self, folder: Folder, files: Sequence[str], title: str, options: Options) -> Source[Any]:
        path = folder.name(files[0])
        pa = import_extra("pyarrow")
        labels: dict[str, Any] = {"labels": options.labels, "label_column": options.label_column}
        try:
            with open_parquet(folder, files[0]) as opened:
                if "image" in opened.schema_arrow.names and options.text_column is None:
                    return ParquetImages(folder, files, title, "image", **labels)
                first = next(opened.iter_batches(SAMPLE), None)
                names = opened.schema_arrow.names
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"cannot read {path} as parquet: {first_line(error)}") from error
        values = {name: [] if first is None else list(map(_value, first[name])) for name in names}
        if _are_rows(values, options):
            return ParquetRows(folder, files, title, options)
        return ParquetTexts(folder, files, title, require_text_column(path, values, options, "image"), **labels)


class RowOpener(Opener):
    """A CSV or JSON Lines file of texts or rows, as a parquet file without images; or a file of lines of text."""

    endings = tuple(FORMATS)

    def open(self, location: Any, title: str, options: Options) -> Source[Any]:
        """See `Opener`."""
        (path,) = location.paths
        file = next(kind for ending, kind in FORMATS.items() if path.endswith(ending))(location.folder, path)
        sample = [row.values for _, row in islice(file.rows(), SAMPLE)]
        values = {name: [row.get(name) for row in sample] for name in file.columns}
        if _are_rows(values, options):
            return ArrowRows(*table_of(file), title, options)
        column = require_text_column(file.name, values, options)
        return TextRows(file, title, column, labels=options.labels, label_column=options.label_column)


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
