"""Verdicts on disk: a journal that a killed process leaves usable, the table that it becomes, its scores again."""

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
from featnorm._utils.extras import vision_module
from featnorm._utils.files import acquire_lock, append, replacing, require_no_folder, write_text
from featnorm._utils.sealed import seal, unseal

# `featnorm monitor` reads scores, and does not wait for torch.
if TYPE_CHECKING:
    from featnorm.image_scorer import ImageVerdict
    from featnorm.inputs import ImageSource

COLUMNS = ("path", "score", "p_value", "verdict", "predicted", "error")
FORMATS = (".csv", ".jsonl", ".parquet")
_NUMBERS = ("score", "p_value")
_SCORED = ("path", *_NUMBERS)
_ROWS = 10_000
# What a spreadsheet takes for the beginning of a formula.
_FORMULAS = ("=", "+", "-", "@", "\t", "\r", "\n")
# Of a verdict, without its explanation: what a journal keeps.
_FIELDS = 7


class Journal:
    """The verdicts of a run so far, one line per batch, beside the file that they are for.

    Every batch is on the disk before the next one is waited for, in whatever order batches come. A run of the same
    images by the same detector resumes where an earlier one was killed, at whole batches, so that it judges the
    batches that an unbroken one would. Every line has a checksum: what follows a damaged one is judged again.

    Parameters
    ----------
    out : the file that the verdicts are for.
    run : what the verdicts depend on, as plain data; a journal of anything else is started over.
    batch_size : images per batch.

    Attributes
    ----------
    done : int
        How many verdicts it holds from before.
    restarted : bool
        Whether there was a journal of anything else.
    damaged : int or None
        The number of the first line that was damaged, from 1; it and what follows was dropped.

    Raises
    ------
    ValueError
        Another process is writing the verdicts for this file, or there is a folder in the journal's place.
    OSError
        The journal or its lock cannot be written.
    """

    def __init__(self, out: Path, run: Mapping[str, Any], batch_size: int) -> None:
        self.path = out.with_name(f".{out.name}.part")
        self.done = 0
        self.restarted = False
        self.damaged: int | None = None
        self._starts: dict[int, int] = {}  # of the line of each batch, in bytes
        require_no_folder(self.path)
        try:
            self._lock = acquire_lock(out.with_name(f".{out.name}.lock"))
        except Timeout:
            raise ValueError(f"another process is writing {out}: wait for it, or name another file") from None
        first = _line({"run": {**run, "batch_size": batch_size}})
        if not self.path.exists() or not self._resume(first):
            write_text(self.path, first.decode())

    def _resume(self, first: bytes) -> bool:
        """Read the batches that are there, cut off what is not whole, and tell whether it is this run's."""
        with self.path.open("rb+") as file:
            line = file.readline()
            if line != first:
                try:
                    unseal(line)
                    self.restarted = True
                except ValueError:
                    # A run that was killed as it began has left no line at all.
                    self.damaged = 1 if line else None
                return False
            end = file.tell()
            for number, line in enumerate(file, start=2):
                if not line.endswith(b"\n"):
                    break  # a run that was killed as it wrote
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
        # Whoever goes on after a run that was broken off may do so in the same process.
        self._lock.release()

    def missing(self, batches: int) -> list[int]:
        """Return the numbers of the batches, of so many, that it does not hold."""
        return [number for number in range(batches) if number not in self._starts]

    def add(self, number: int, verdicts: Sequence[ImageVerdict]) -> None:
        """Write a batch by its number."""
        start = self.path.stat().st_size
        append(self.path, _line({"batch": number, "verdicts": [verdict[:_FIELDS] for verdict in verdicts]}))
        self._starts[number] = start

    def __iter__(self) -> Iterator[ImageVerdict]:
        with self.path.open("rb") as file:
            for number, start in sorted(self._starts.items()):
                file.seek(start)
                try:
                    yield from _batch(file.readline())[1]
                except ValueError:
                    raise ValueError(
                        f"{self.path} was damaged while it was written, at batch {number}: rerun the same command "
                        "to judge that batch again"
                    ) from None

    def write(self, out: Path) -> None:
        """Write the table that the file's ending names."""
        with replacing(out) as temporary:
            _WRITERS[out.suffix](self, temporary)

    def remove(self) -> None:
        """Remove the journal: what was made of it is written."""
        self.path.unlink()
        self._lock.release()
        Path(self._lock.lock_file).unlink(missing_ok=True)


def _line(entry: Mapping[str, Any]) -> bytes:
    return f"{seal(entry)}\n".encode()


def _batch(line: bytes) -> tuple[int, list[ImageVerdict]]:
    """Return the number and the verdicts of a journal's line, or raise a ValueError where it holds none."""
    entry = unseal(line)
    number, rows = entry.get("batch"), entry.get("verdicts")
    if type(number) is not int or number < 0 or not isinstance(rows, list):
        raise ValueError("it is no batch")
    return number, [_verdict(row) for row in rows]


def _verdict(row: Any) -> ImageVerdict:
    from featnorm.image_scorer import ImageVerdict

    match row:
        case [str(), float() | None, float() | None, bool() | None, str() | None, str() | None, bool()]:
            return ImageVerdict(*row)
    raise ValueError("it holds no verdict")


class ScoredImage(NamedTuple):
    """A row of a table as far as its score goes; without one where the image could not be read.

    The errors are how far score and p-value may be from what was computed, by the digits that are written of them.
    """

    path: str
    score: float | None
    p_value: float | None
    score_error: float = 0.0
    p_value_error: float = 0.0


def read_scores(path: Path) -> Iterator[ScoredImage]:
    """Yield the rows of a table that `Journal.write` wrote, in its order; little of it is held at a time.

    A CSV file may have been through other hands: a byte-order mark, blank lines, further header lines where files
    were joined, numbers with fewer digits, and semicolons as separators, with decimal commas or points, are read
    too.

    Raises
    ------
    FileNotFoundError
        There is no such file.
    ValueError
        The file's ending is none of `FORMATS`, or a row cannot be read or holds a NaN: which, and why.
    """
    if path.suffix not in FORMATS:
        raise ValueError(f"{path} must end in {', '.join(FORMATS)}, as featnorm score --out writes them")
    if not path.is_file():
        raise FileNotFoundError(f"there is no file of scores {path}")
    number = 1
    try:
        for row in map(_scored, _READERS[path.suffix](path)):
            yield row
            number += 1
    except (csv.Error, OSError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise ValueError(
            f"row {number} of {path} cannot be read ({first_line(error)}): the file is damaged, or is none "
            "that featnorm score wrote"
        ) from None


def images_digest(source: ImageSource) -> str:
    """Return what tells a list of images from another, by their names, sizes and times of change."""
    digest = hashlib.sha256()
    for i in range(len(source)):
        digest.update(source.identity(i).encode("utf-8", "surrogateescape") + b"\0")
    return digest.hexdigest()


def row_of(verdict: ImageVerdict) -> dict[str, Any]:
    """Return a verdict as a row, by `COLUMNS`."""
    called = {True: "ID", False: "OOD", None: None}[verdict.is_id]
    return dict(
        zip(
            COLUMNS,
            (verdict.name, verdict.score, verdict.p_value, called, verdict.predicted, verdict.error),
            strict=True,
        )
    )


def _write_csv(verdicts: Iterable[ImageVerdict], path: Path) -> None:
    # File names need not be text in any encoding.
    with path.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(map(_without_formulas, map(row_of, verdicts)))


def _without_formulas(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row whose texts no spreadsheet takes for formulas: file names come from anywhere.

    A path gets a "./", which names the same file; another text gets the apostrophe that spreadsheets know.
    """
    marks = {"path": "./", "predicted": "'", "error": "'"}
    return {
        name: f"{marks[name]}{value}" if name in marks and str(value).startswith(_FORMULAS) else value
        for name, value in row.items()
    }


def _write_jsonl(verdicts: Iterable[ImageVerdict], path: Path) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row_of(verdict)) + "\n" for verdict in verdicts)


def _write_parquet(verdicts: Iterable[ImageVerdict], path: Path) -> None:
    pa, pq = vision_module("pyarrow"), vision_module("pyarrow.parquet")
    schema = pa.schema([(name, pa.float64() if name in _NUMBERS else pa.string()) for name in COLUMNS])
    with pq.ParquetWriter(path, schema) as writer:
        rows: list[dict[str, Any]] = []
        for verdict in verdicts:
            row = row_of(verdict)
            row["path"] = row["path"].encode("utf-8", "replace").decode()
            rows.append(row)
            if len(rows) == _ROWS:
                writer.write_table(pa.Table.from_pylist(rows, schema))
                rows = []
        writer.write_table(pa.Table.from_pylist(rows, schema))


_WRITERS = {".csv": _write_csv, ".jsonl": _write_jsonl, ".parquet": _write_parquet}


def _read_csv(path: Path) -> Iterator[Mapping[str, Any]]:
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        first = next((line for line in file if line.strip("\ufeff\r\n,;")), "")
        # As spreadsheets write it where the comma is the decimal sign.
        semicolons = set(_SCORED) <= {name.strip('\ufeff"') for name in first.rstrip().split(";")}
        rows = csv.reader(chain([first], file), strict=True, delimiter=";" if semicolons else ",")
        header: list[str] | None = None
        for cells in rows:
            if not any(cells):
                continue
            # A file that was joined to another brings its header, and a byte-order mark.
            cells[0] = cells[0].removeprefix("\ufeff")
            if header is None or set(_SCORED) <= set(cells):
                header = cells
                continue
            if len(cells) != len(header):
                raise ValueError(f"it has {len(cells)} of {len(header)} columns")
            row = dict(zip(header, cells, strict=True))
            yield {**row, **{name: row[name].replace(",", ".") for name in _NUMBERS}} if semicolons else row


def _read_jsonl(path: Path) -> Iterator[Mapping[str, Any]]:
    with path.open("rb") as file:
        for line in file:
            if line.strip():
                yield json.loads(line)


def _read_parquet(path: Path) -> Iterator[Mapping[str, Any]]:
    pq = vision_module("pyarrow.parquet")
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(_ROWS, columns=list(_SCORED)):
            yield from batch.to_pylist()


def _scored(row: Mapping[str, Any]) -> ScoredImage:
    missing = [name for name in _SCORED if name not in row]
    if missing:
        raise ValueError(f"it has no {missing[0]}")
    path, score, p_value = (row[name] for name in _SCORED)
    if score is None or score == "":
        return ScoredImage(str(path), None, None)
    if math.isnan(float(score)):
        raise ValueError("its score is NaN")
    return ScoredImage(str(path), float(score), float(p_value), _rounding(score), _rounding(p_value))


def _rounding(number: str | float) -> float:
    """Return how far a number may be from what it was before it was written with so many digits."""
    exponent = Decimal(str(number)).as_tuple().exponent
    # An infinity is not rounded. A little more than half a digit, for the rounding of the comparison.
    return 0.0 if isinstance(exponent, str) else 0.500001 * 10.0**exponent


_READERS = {".csv": _read_csv, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
