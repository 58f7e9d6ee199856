"""Verdicts on disk: a journal that a killed process leaves usable, and the table that it becomes."""

import csv
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from featnorm._files import replacing
from featnorm.data import ImageSource
from featnorm.data.images import vision_module
from featnorm.deploy.image_scorer import ImageVerdict

COLUMNS = ("path", "score", "p_value", "verdict", "predicted", "error")
FORMATS = (".csv", ".jsonl", ".parquet")
_ROWS = 10_000


class Journal:
    """The verdicts of a run so far, a line each, beside the file that they are for.

    Every batch is written before the next one is judged. A run of the same images by the same detector goes on
    where an earlier one was killed, at a whole batch, so that it judges the batches that an unbroken one would.

    Parameters
    ----------
    out : the file that the verdicts are for.
    run : what the verdicts depend on, as plain data; a journal of anything else is begun anew.
    batch_size : verdicts a batch.

    Raises
    ------
    ValueError
        Another process is writing the verdicts for this file.
    """

    def __init__(self, out: Path, run: Mapping[str, Any], batch_size: int) -> None:
        self.path = out.with_name(f".{out.name}.part")
        self.done = 0
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
                    for count, line in enumerate(file, start=1):
                        if not line.endswith(b"\n"):
                            break
                        if count % batch_size == 0:
                            self.done, end = count, file.tell()
                    file.truncate(end)
                    return
        self.path.write_text(first, encoding="utf-8")

    def add(self, verdicts: Sequence[ImageVerdict]) -> None:
        """Write a batch."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(verdict) + "\n" for verdict in verdicts))

    def __iter__(self) -> Iterator[ImageVerdict]:
        with self.path.open(encoding="utf-8") as file:
            next(file)
            for line in file:
                yield ImageVerdict(*json.loads(line))

    def write(self, out: Path) -> None:
        """Write the table that the file's ending names."""
        with replacing(out) as temporary:
            _WRITERS[out.suffix](self, temporary)

    def remove(self) -> None:
        """Remove the journal: what was made of it is written."""
        self.path.unlink()
        self._lock.release()
        Path(self._lock.lock_file).unlink(missing_ok=True)


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
