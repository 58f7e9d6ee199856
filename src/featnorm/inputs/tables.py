"""Openers of tables (parquet, CSV and JSON Lines), whose columns tell what they hold, and of lines of text."""

from collections import Counter
from collections.abc import Sequence
from itertools import islice
from typing import Any

from featnorm._utils.errors import first_line
from featnorm._utils.extras import vision_module
from featnorm.inputs.errors import DataError
from featnorm.inputs.files import Folder
from featnorm.inputs.formats import PassedOver
from featnorm.inputs.openers import Location, Opener, Options
from featnorm.inputs.parquet import ParquetImages, ParquetTable, open_parquet
from featnorm.inputs.source import Source
from featnorm.inputs.texts import FORMATS, SAMPLE, ParquetTexts, TextRows, require_text_column


class ParquetOpener(Opener):
    """A parquet file, or a folder that holds some and no images: the shards of one data set.

    It holds images if it has a column ``image`` and no other column of texts is chosen, and else texts.
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

    def _open(self, folder: Folder, files: Sequence[str], title: str, options: Options) -> ParquetTable[Any]:
        path = folder.name(files[0])
        pa = vision_module("pyarrow")
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
        return ParquetTexts(folder, files, title, require_text_column(path, values, options, "image"), **labels)


class RowOpener(Opener):
    """A CSV or JSON Lines file with a column of texts, or a file with one text per line."""

    endings = tuple(FORMATS)

    def open(self, location: Any, title: str, options: Options) -> Source[Any]:
        """See `Opener`."""
        (path,) = location.paths
        file = next(kind for ending, kind in FORMATS.items() if path.endswith(ending))(location.folder, path)
        sample = [row.values for _, row in islice(file.rows(), SAMPLE)]
        values = {name: [row.get(name) for row in sample] for name in file.columns}
        column = require_text_column(file.name, values, options)
        return TextRows(file, title, column, labels=options.labels, label_column=options.label_column)


def _value(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        return ""
