"""Verdicts on disk: a journal that survives a killed process, the table made from it, and its scores read back."""

from __future__ import annotations

import csv
import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from decimal import Decimal
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from filelock import Timeout

from featnorm._utils.errors import first_line
from featnorm._utils.extras import import_extra
from featnorm._utils.files import acquire_lock, append, replacing, require_no_folder, write_text
from featnorm._utils.sealed import seal, unseal
from featnorm.verdict import BoxVerdict, ItemVerdict

# `featnorm monitor` reads scores, and does not wait for torch.
if TYPE_CHECKING:
    from featnorm.inputs import Source


COLUMNS = ("path", "score", "p_value", "verdict", "predicted", "error", "group")
#: Columns of a table of frames after these, and of a table of clips.
FRAME_COLUMNS, CLIP_COLUMNS = (
    ("clip", "time"),
    ("clip", "score", "p_value", "verdict", "frames", "flagged", "unreadable"),
)
#: Columns of a table of images that have verdicts per position, after these.
PART_COLUMNS = ("flagged_share",)
#: Columns of a table with one row per box, after `COLUMNS`.
BOX_COLUMNS = ("x1", "y1", "x2", "y2", "confidence", "image_p_value", "image_verdict")
FORMATS = (".csv", ".jsonl", ".parquet")
_NUMBERS = ("score", "p_value")
_FLOATS = (*_NUMBERS, "time", *PART_COLUMNS, *BOX_COLUMNS[:-1])
_COUNTS = ("frames", "flagged", "unreadable")
_SCORED = ("path", *_NUMBERS)
_ROWS = 10_000
_INT64 = 1 << 63
# Largest cell of a CSV file: a kept text may be as long as `featnorm.inputs.texts.MAX_ROW`.
_MAX_CELL = 1 << 26
# Characters at which a spreadsheet starts a formula.
_FORMULAS = ("=", "+", "-", "@", "\t", "\r", "\n")
# Number of fields of a verdict that a journal keeps: all but its explanation and its parts.
_FIELDS = 10


class Journal:
    """The verdicts of a run so far, one line per batch, in a hidden file beside the output file.

    Each batch is on disk before the next one is awaited, in any order of batches. A run with the same settings
    resumes an interrupted one at whole batches, so that it scores the same batches as an uninterrupted run. Every
    line has a checksum; batches after a damaged line are scored again.

    Parameters
    ----------
    out : output file.
    run : settings that the verdicts depend on, as plain data. A journal with other settings is started over.
    batch_size : number of items per batch.

    Attributes
    ----------
    done : int
        Number of verdicts of the interrupted run.
    restarted : bool
        Whether there was a journal with other settings.
    damaged : int or None
        Number of the first damaged line, from 1; that line and all after it were dropped.

    Raises
    ------
    ValueError
        Another process is writing the same output file, or a folder is in the journal's place.
    OSError
        The journal or its lock cannot be written.
    """

    def __init__(self, out: Path, run: Mapping[str, Any], batch_size: int) -> None:
        self.path = out.with_name(f".{out.name}.part")
        self.done = 0
        self.restarted = False
        self.damaged: int | None = None
        self._starts: dict[int, int] = {}  # offset of the line of each batch, in bytes
        require_no_folder(self.path)
        try:
            self._lock = acquire_lock(out.with_name(f".{out.name}.lock"))
        except Timeout:
            raise ValueError(f"another process is writing {out}: wait for it, or choose another file") from None
        first = _line({"run": {**run, "batch_size": batch_size}})
        if not self.path.exists() or not self._resume(first):
            write_text(self.path, first.decode())

    def _resume(self, first: bytes) -> bool:
        """Read the batches of an interrupted run, truncate an incomplete line, and return whether to resume."""
        with self.path.open("rb+") as file:
            line = file.readline()
            if line != first:
                try:
                    unseal(line)
                    self.restarted = True
                except ValueError:
                    # A run that was killed at its start has left no line at all.
                    self.damaged = 1 if line else None
                return False
            end = file.tell()
            for number, line in enumerate(file, start=2):
                if not line.endswith(b"\n"):
                    break  # the run was killed while it wrote the line
                try:
                    batch, verdicts = _batch(line)
                except ValueError:
                    self.damaged = number
                    break
                self._starts[batch] = end
                self.done += len(verdicts)
                end += len(line)
            file.truncate(end)
        return True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        # An interrupted run may be resumed in the same process.
        self._lock.release()

    def missing(self, batches: int) -> list[int]:
        """Return the numbers of the batches, out of ``batches``, that are not in the journal."""
        return [number for number in range(batches) if number not in self._starts]

    def add(self, number: int, verdicts: Sequence[ItemVerdict]) -> None:
        """Append a batch."""
        start = self.path.stat().st_size
        append(self.path, _line({"batch": number, "verdicts": [verdict[:_FIELDS] for verdict in verdicts]}))
        self._starts[number] = start

    def __iter__(self) -> Iterator[ItemVerdict]:
        with self.path.open("rb") as file:
            for number, start in sorted(self._starts.items()):
                file.seek(start)
                try:
                    yield from _batch(file.readline())[1]
                except ValueError:
                    raise ValueError(
                        f"{self.path} was damaged during the run, at batch {number}: rerun the same command to "
                        "score that batch again"
                    ) from None

    def write(
        self,
        out: Path,
        source: Source[Any] | None = None,
        per: str = "input",
        kept: Mapping[str, Sequence[Any]] | None = None,
    ) -> None:
        """Write the table, in the format of the file's ending.

        Parameters
        ----------
        out : the file.
        source : the items. Of frames, the rows also have the columns `FRAME_COLUMNS`.
        per
            What has a verdict: for each "position", the rows also have the columns `PART_COLUMNS`; for each "box",
            there is one row per box, with the columns `BOX_COLUMNS`.
        kept : further columns, with one value per item.
        """
        others: Mapping[str, Sequence[Any]] = kept or {}

        def rows(i: int, verdict: ItemVerdict) -> list[dict[str, Any]]:
            if per == "box":
                return box_rows(verdict)
            row = row_of(verdict)
            if per == "position":
                row["flagged_share"] = verdict.flagged_share
            elif source is not None and source.fps is not None:
                row |= {"clip": source.unit(i), "time": source.time(i)}
            return [row]

        columns: tuple[str, ...] = {"box": BOX_COLUMNS, "position": PART_COLUMNS}.get(per, ())
        if per == "input" and source is not None and source.fps is not None:
            columns = FRAME_COLUMNS
        every = (
            row | {name: values[i] for name, values in others.items()}
            for i, verdict in enumerate(self)
            for row in rows(i, verdict)
        )
        write_table(out, every, (*COLUMNS, *columns), others)

    def remove(self) -> None:
        """Remove the journal, once everything made from it is written."""
        self.path.unlink()
        self._lock.release()
        Path(self._lock.lock_file).unlink(missing_ok=True)


def _line(entry: Mapping[str, Any]) -> bytes:
    return f"{seal(entry)}\n".encode()


def _batch(line: bytes) -> tuple[int, list[ItemVerdict]]:
    """Return the number and the verdicts of a line, or raise a ValueError if it is not a batch."""
    entry = unseal(line)
    number, rows = entry.get("batch"), entry.get("verdicts")
    if type(number) is not int or number < 0 or not isinstance(rows, list):
        raise ValueError("it is not a batch")
    return number, [_verdict(row) for row in rows]


def _verdict(row: Any) -> ItemVerdict:
    match row:
        case [
            str(), float() | None, float() | None, bool() | None, *texts, bool(), float() | None,
            list() | None as boxes,
        ] if _are_texts(texts):  # fmt: skip
            return ItemVerdict(*row[:9])._replace(boxes=None if boxes is None else tuple(map(_box, boxes)))
    raise ValueError("it is not a verdict")


def _box(row: Any) -> BoxVerdict:
    match row:
        case [
            [float(), float(), float(), float()], str(), float(), float(), float() | None, bool() | None
        ]:  # fmt: skip
            return BoxVerdict(tuple(row[0]), *row[1:])
    raise ValueError("it is not a box")


def _are_texts(values: list[Any]) -> bool:
    """Whether these are the predicted class, the error and the group of a verdict."""
    return len(values) == 3 and all(value is None or isinstance(value, str) for value in values)


class ScoreRow(NamedTuple):
    """Name, score, p-value and group of a row of a table; no score and p-value if the item could not be read.

    The errors bound how far score and p-value are from the computed ones, by the number of digits written.
    """

    path: str
    score: float | None
    p_value: float | None
    group: str | None = None
    score_error: float = 0.0
    p_value_error: float = 0.0


def read_scores(path: Path) -> Iterator[ScoreRow]:
    """Yield the rows of a table that `Journal.write` wrote, in its order, a few at a time.

    A CSV file may have been edited: a byte-order mark, blank lines, repeated header lines (from concatenated
    files), numbers with fewer digits, and semicolons as separators, with decimal commas or points, are accepted.

    Raises
    ------
    FileNotFoundError
        The file does not exist.
    ValueError
        The file's ending is not one of `FORMATS`, or a row cannot be read or contains a NaN; the row is named.
    """
    if path.suffix not in FORMATS:
        raise ValueError(
            f"{path} must end in {', '.join(FORMATS[:-1])} or {FORMATS[-1]}, the formats of featnorm score --out"
        )
    if not path.is_file():
        raise FileNotFoundError(f"cannot find the scores file {path}: check the path")
    number = 1
    try:
        for row in map(_scored, _READERS[path.suffix](path)):
            yield row
            number += 1
    except (csv.Error, OSError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise ValueError(
            f"row {number} of {path} cannot be read ({first_line(error)}): the file is damaged, or was not "
            "written by featnorm score"
        ) from None


def source_digest(source: Source[Any]) -> str:
    """Return a SHA-256 of the names, sizes and modification times of a source's items."""
    digest = hashlib.sha256()
    for i in range(len(source)):
        digest.update(source.identity(i).encode("utf-8", "surrogateescape") + b"\0")
    return digest.hexdigest()


def kept_columns(source: Source[Any], names: str | Sequence[str]) -> dict[str, list[Any]]:
    """Return columns of a source to keep in a table of its verdicts.

    A column whose values are all booleans, all integers of 64 bits, all floats or all strings keeps its type; any
    other becomes text. In text, what UTF-8 cannot encode becomes a question mark.

    Raises
    ------
    DataError, ValueError
        There is no such column, or the table has one of that name already.
    """
    names = [names] if isinstance(names, str) else names
    taken = {*COLUMNS, *FRAME_COLUMNS, *PART_COLUMNS, *BOX_COLUMNS}
    if name := next((name for name in names if name in taken), None):
        raise ValueError(f"cannot keep the column {name!r}: the table of verdicts has a column of that name")
    found = {}
    for name in names:
        values = source.column(name)
        types = {type(value) for value in values if value is not None}
        plain = len(types) == 1 and types <= {bool, int, float}
        if types == {int}:
            plain = all(value is None or -_INT64 <= value < _INT64 for value in values)
        found[name] = values if plain else [None if value is None else _encodable(str(value)) for value in values]
    return found


def _encodable(text: str) -> str:
    """Return a text with a question mark for each lone surrogate."""
    return text.encode("utf-8", "replace").decode()


def write_table(
    out: Path,
    rows: Iterable[dict[str, Any]],
    columns: Sequence[str],
    kept: Mapping[str, Sequence[Any]] | None = None,
) -> None:
    """Write rows with the keys `columns` and those of ``kept``, in the format of the file's ending."""
    with replacing(out) as temporary:
        _WRITERS[out.suffix](rows, columns, kept or {}, temporary)


def word_of(is_id: bool | None) -> str | None:
    """Return a verdict in a word: "ID" or "OOD"; None if there is none."""
    return {True: "ID", False: "OOD", None: None}[is_id]


def row_of(verdict: ItemVerdict) -> dict[str, Any]:
    """Return a verdict as a row with the keys `COLUMNS`."""
    return dict(
        zip(
            COLUMNS,
            (
                verdict.item,
                verdict.score,
                verdict.p_value,
                word_of(verdict.is_id),
                verdict.predicted,
                verdict.error,
                verdict.group,
            ),
            strict=True,
        )
    )


def box_rows(verdict: ItemVerdict) -> list[dict[str, Any]]:
    """Return the rows of an image with the keys `COLUMNS` and `BOX_COLUMNS`: one per box, or one without a box."""
    empty = row_of(verdict) | {"score": None, "p_value": None, "verdict": None} | dict.fromkeys(BOX_COLUMNS)
    empty |= {"image_p_value": verdict.p_value, "image_verdict": word_of(verdict.is_id)}
    return [
        empty
        | dict(zip(BOX_COLUMNS, (*box.corners, box.confidence), strict=False))
        | {"predicted": box.label, "score": box.score, "p_value": box.p_value, "verdict": word_of(box.is_id)}
        for box in verdict.boxes or ()
    ] or [empty]


def _write_csv(
    rows: Iterable[dict[str, Any]], columns: Sequence[str], kept: Mapping[str, Any], path: Path
) -> None:
    # File names need not be valid in any encoding.
    with path.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        writer = csv.DictWriter(file, (*columns, *kept))
        writer.writeheader()
        marks = _MARKS | dict.fromkeys(kept, "'")
        writer.writerows(
            {name: _without_formula(value, marks.get(name)) for name, value in row.items()} for row in rows
        )


# A path is prefixed with "./", which names the same file, and any other text with an apostrophe.
_MARKS = {"path": "./", "clip": "./", "predicted": "'", "error": "'", "group": "'"}


def _without_formula(value: Any, mark: str | None) -> Any:
    """Return a value, with a mark before a text that a spreadsheet would run: it may come from anywhere."""
    if mark is None or not isinstance(value, str) or not value.startswith(_FORMULAS):
        return value
    try:
        float(value)
    except ValueError:
        return f"{mark}{value}"
    return value


def _write_jsonl(rows: Iterable[dict[str, Any]], columns: Any, kept: Any, path: Path) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def _write_parquet(
    rows: Iterable[dict[str, Any]], columns: Sequence[str], kept: Mapping[str, Sequence[Any]], path: Path
) -> None:
    pa, pq = import_extra("pyarrow"), import_extra("pyarrow.parquet")
    types = (
        dict.fromkeys(columns, pa.string())
        | dict.fromkeys(_FLOATS, pa.float64())
        | dict.fromkeys(_COUNTS, pa.int64())
    )
    others = [(name, pa.array(values).type) for name, values in kept.items()]
    schema = pa.schema([*((name, types[name]) for name in columns), *others])
    with pq.ParquetWriter(path, schema) as writer:
        part: list[dict[str, Any]] = []
        for row in rows:
            names = {name: _encodable(row[name]) for name in ("path", "clip") if name in row}
            part.append(row | names)
            if len(part) == _ROWS:
                writer.write_table(pa.Table.from_pylist(part, schema))
                part = []
        writer.write_table(pa.Table.from_pylist(part, schema))


_WRITERS = {".csv": _write_csv, ".jsonl": _write_jsonl, ".parquet": _write_parquet}


def _read_csv(path: Path) -> Iterator[Mapping[str, Any]]:
    csv.field_size_limit(max(csv.field_size_limit(), _MAX_CELL))
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        first = next((line for line in file if line.strip("\ufeff\r\n,;")), "")
        # Spreadsheets write semicolons where the comma is the decimal separator.
        semicolons = set(_SCORED) <= {name.strip('\ufeff"') for name in first.rstrip().split(";")}
        rows = csv.reader(chain([first], file), strict=True, delimiter=";" if semicolons else ",")
        header: list[str] | None = None
        for cells in rows:
            if not any(cells):
                continue
            # A concatenated file brings its own header, and a byte-order mark.
            cells[0] = cells[0].removeprefix("\ufeff")
            if header is None or set(_SCORED) <= set(cells):
                header = cells
                continue
            if len(cells) != len(header):
                raise ValueError(f"it has {len(cells)} instead of {len(header)} columns")
            row = dict(zip(header, cells, strict=True))
            if row.get("group", "").startswith("'") and row["group"][1:].startswith(_FORMULAS):
                row["group"] = row["group"][1:]
            yield {**row, **{name: row[name].replace(",", ".") for name in _NUMBERS}} if semicolons else row


def _read_jsonl(path: Path) -> Iterator[Mapping[str, Any]]:
    with path.open("rb") as file:
        for line in file:
            if line.strip():
                yield json.loads(line)


def _read_parquet(path: Path) -> Iterator[Mapping[str, Any]]:
    pq = import_extra("pyarrow.parquet")
    with pq.ParquetFile(path) as file:
        columns = [name for name in (*_SCORED, "group") if name in file.schema_arrow.names]
        for batch in file.iter_batches(_ROWS, columns=columns):
            yield from batch.to_pylist()


def _scored(row: Mapping[str, Any]) -> ScoreRow:
    missing = [name for name in _SCORED if name not in row]
    if missing:
        raise ValueError(f"it has no {missing[0]}")
    path, score, p_value = (row[name] for name in _SCORED)
    group = row.get("group") or None
    if score is None or score == "":
        return ScoreRow(str(path), None, None, group)
    if math.isnan(float(score)):
        raise ValueError("its score is NaN")
    return ScoreRow(str(path), float(score), float(p_value), group, _rounding(score), _rounding(p_value))


def _rounding(number: str | float) -> float:
    """Return the largest rounding error of a number written with this many digits."""
    exponent = Decimal(str(number)).as_tuple().exponent
    # Infinities are not rounded. Slightly more than half a digit, for the rounding of the comparison itself.
    return 0.0 if isinstance(exponent, str) else 0.500001 * 10.0**exponent


_READERS = {".csv": _read_csv, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
