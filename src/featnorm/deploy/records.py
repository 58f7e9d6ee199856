"""Verdicts on disk: a journal that a killed process leaves usable, the table that it becomes, its scores again."""

import csv
import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

from filelock import FileLock, Timeout

from featnorm._files import replacing
from featnorm.data import ImageSource
from featnorm.data.images import first_line, vision_module
from featnorm.deploy.image_scorer import ImageVerdict

COLUMNS = ("path", "score", "p_value", "verdict", "predicted", "error")
FORMATS = (".csv", ".jsonl", ".parquet")
_ROWS = 10_000


class Journal:
    """The verdicts of a run so far, a line a batch, beside the file that they are for.

    Every batch is on disk before the next one is waited for, in whatever order batches come. A run of the same
    images by the same detector goes on where an earlier one was killed, at whole batches, so that it judges the
    batches that an unbroken one would.

    Parameters
    ----------
    out : the file that the verdicts are for.
    run : what the verdicts depend on, as plain data; a journal of anything else is begun anew.
    batch_size : verdicts a batch.

    Attributes
    ----------
    done : int
        How many verdicts it holds from before.
    begun_anew : bool
        Whether there was a journal of anything else.

    Raises
    ------
    ValueError
        Another process is writing the verdicts for this file.
    """

    def __init__(self, out: Path, run: Mapping[str, Any], batch_size: int) -> None:
        self.path = out.with_name(f".{out.name}.part")
        self.done = 0
        self.begun_anew = False
        self._starts: dict[int, int] = {}  # of the line of each batch, in bytes
        self._lock = FileLock(out.with_name(f".{out.name}.lock"))
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(f"another process is writing {out}: wait for it, or name another file") from None
        first = json.dumps({**run, "batch_size": batch_size}) + "\n"
        if self.path.exists():
            with self.path.open("rb+") as file:
                if file.readline() == first.encode():
                    end = file.tell()
                    for line in file:
                        if not line.endswith(b"\n"):
                            break
                        number, verdicts = json.loads(line)
                        self._starts[number] = end
                        self.done += len(verdicts)
                        end += len(line)
                    file.truncate(end)
                    return
            self.begun_anew = True
        self.path.write_text(first, encoding="utf-8")

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
        with self.path.open("a", encoding="utf-8") as file:
            file.seek(0, os.SEEK_END)
            self._starts[number] = file.tell()
            file.write(json.dumps([number, verdicts]) + "\n")

    def __iter__(self) -> Iterator[ImageVerdict]:
        with self.path.open("rb") as file:
            for _, start in sorted(self._starts.items()):
                file.seek(start)
                for verdict in json.loads(file.readline())[1]:
                    yield ImageVerdict(*verdict)

    def write(self, out: Path) -> None:
        """Write the table that the file's ending names."""
        with replacing(out) as temporary:
            _WRITERS[out.suffix](self, temporary)

    def remove(self) -> None:
        """Remove the journal: what was made of it is written."""
        self.path.unlink()
        self._lock.release()
        Path(self._lock.lock_file).unlink(missing_ok=True)


class ScoredImage(NamedTuple):
    """A row of a table as far as its score goes; without one where the image could not be read."""

    path: str
    score: float | None
    p_value: float | None


def read_scores(path: Path) -> Iterator[ScoredImage]:
    """Yield the rows of a table that `Journal.write` wrote, in its order; little of it is held at a time.

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
        writer.writerows(map(row_of, verdicts))


def _write_jsonl(verdicts: Iterable[ImageVerdict], path: Path) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row_of(verdict)) + "\n" for verdict in verdicts)


def _write_parquet(verdicts: Iterable[ImageVerdict], path: Path) -> None:
    pa, pq = vision_module("pyarrow"), vision_module("pyarrow.parquet")
    numbers = ("score", "p_value")
    schema = pa.schema([(name, pa.float64() if name in numbers else pa.string()) for name in COLUMNS])
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
    with path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        rows = csv.reader(file, strict=True)
        header = next(rows, [])
        for cells in rows:
            if len(cells) != len(header):
                raise ValueError(f"it has {len(cells)} of {len(header)} columns")
            yield dict(zip(header, cells, strict=True))


def _read_jsonl(path: Path) -> Iterator[Mapping[str, Any]]:
    with path.open("rb") as file:
        yield from map(json.loads, file)


def _read_parquet(path: Path) -> Iterator[Mapping[str, Any]]:
    pq = vision_module("pyarrow.parquet")
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(_ROWS, columns=list(ScoredImage._fields)):
            yield from batch.to_pylist()


def _scored(row: Mapping[str, Any]) -> ScoredImage:
    missing = [name for name in ScoredImage._fields if name not in row]
    if missing:
        raise ValueError(f"it has no {missing[0]}")
    path, score, p_value = (row[name] for name in ScoredImage._fields)
    if score is None or score == "":
        return ScoredImage(str(path), None, None)
    scored = ScoredImage(str(path), float(score), float(p_value))
    if math.isnan(float(score)):
        raise ValueError("its score is NaN")
    return scored


_READERS = {".csv": _read_csv, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
