"""``featnorm monitor``: whether a stream of inputs has drifted, from their scores. It does not import torch."""

from __future__ import annotations

import hashlib
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from featnorm._utils.errors import first_line
from featnorm._utils.progress import progress_bar
from featnorm._utils.sealed import read_sealed, write_sealed
from featnorm.cli.console import console, counted, environment, require_file_place
from featnorm.cli.options import ScorerFile

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np
    import numpy.typing as npt

    from featnorm.archive import StoredCalibration
    from featnorm.records import ScoreRow

DRIFT = 3
"""The exit status where there is drift."""

_ROWS = 10_000
# What may have changed, by what an input is called.
_CAUSES = {
    "image": "the subject, the light or the camera",
    "text": "the source, the language or the topic",
    "row": "the source or the encoder of the rows, or the unit of a column",
}
# A p-value that was written as float32 is less exact than the one that is computed.
_P_VALUE_ERROR = 1e-6


def monitor(
    scorer_file: ScorerFile,
    scores: Annotated[
        Path,
        typer.Argument(
            metavar="SCORES",
            help="Table (.csv, .jsonl or .parquet) written by `featnorm score --out`, rows in order of time.",
        ),
    ],
    false_alarm: Annotated[
        float, typer.Option(help="Probability that a stream without drift ever raises the alarm.")
    ] = 0.01,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="HTML page to write, with plots.")] = None,
    state: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="JSON file that keeps the state of the stream. If it exists, the stream continues after the last "
            "row of SCORES that it has seen; rows may have been appended since.",
        ),
    ] = None,
) -> None:
    """Detect drift in a stream of scores, even if no single input looks unusual.

    The inputs must be exchangeable: rows sorted by class, or consecutive video frames, raise the alarm without
    drift. The exit status is 0 without drift and 3 with drift.
    """
    from featnorm.records import read_scores
    from featnorm.report.drift import format_evidence, write_drift_page

    for option, file, ending in (("--html", html, ".html"), ("--state", state, ".json")):
        if file is not None:
            if file.suffix != ending:
                raise ValueError(f"{option} {file} must end in {ending}")
            require_file_place(file, [scorer_file, scores])
    calibration = _read_calibration(scorer_file)
    stream = _Stream(scorer_file, scores, calibration, false_alarm)
    seen = 0
    with progress_bar(read_scores(scores), unit=" rows") as bar:
        rows = iter(bar)
        if state is not None and state.exists():
            seen = stream.resume(state, rows)
        while block := list(islice(rows, _ROWS)):
            stream.add(block)
    drift = stream.monitor
    if drift.count == 0:
        raise ValueError(f"there is no score in {scores}: score inputs first, with featnorm score --out")
    unscored = f" ({counted(stream.unscored, 'row')} without a score skipped)" if stream.unscored else ""
    if seen:
        console.print(f"Continued after row {seen:,}: {counted(stream.rows - seen, 'new row')}.", soft_wrap=True)
    console.print(
        f"{drift.count:,} scores from {scores}{unscored}, compared with {len(calibration.scores):,} "
        f"calibration scores in {scorer_file}.",
        soft_wrap=True,
    )
    finding = _finding(stream)
    for sentence in (f"{'No drift' if stream.alarm is None else 'Drift'}. {finding}", *_meaning(stream)):
        console.print(sentence, soft_wrap=True)
    if html is not None:
        facts = {
            "scores": f"{drift.count:,}{unscored}",
            "calibration scores": f"{len(calibration.scores):,}",
            "chance of a false alarm": f"{drift.false_alarm:.4g}",
            "highest evidence": format_evidence(drift.highest),
            "file": str(scores),
            "detector": str(scorer_file),
            **environment(),
        }
        write_drift_page(html, drift, stream.history, calibration, summary=finding, facts=facts)
        console.print(f"Wrote {html}.", soft_wrap=True)
    if state is not None:
        stream.save(state)
        console.print(f"Wrote {state}.", soft_wrap=True)
    if stream.alarm is not None:
        raise typer.Exit(DRIFT)


class _Row(NamedTuple):
    """A row of the table, counted from 1."""

    number: int
    path: str


class _Stream:
    """The scores of a table as a stream, and what the drift monitor found in it."""

    def __init__(self, scorer_file: Path, table: Path, calibration: StoredCalibration, false_alarm: float) -> None:
        from featnorm.drift import DriftMonitor
        from featnorm.report.drift import StreamHistory

        self.monitor = DriftMonitor(calibration.scores, false_alarm)
        self.history = StreamHistory()
        self.noun = calibration.noun
        self.unscored = 0
        self.alarm: _Row | None = None
        self.rows = 0
        self._digest = hashlib.sha256()
        self._scorer_file = scorer_file
        self._table = table
        self._calibration = calibration

    def save(self, path: Path) -> None:
        """Write the state to a file, for `resume`."""
        content = {
            "made_with": self._made_with(),
            "monitor": self.monitor.state(),
            "history": self.history.state(),
            "unscored": self.unscored,
            "alarm": self.alarm,
            "rows": self.rows,
            "digest": self._digest.hexdigest(),
        }
        write_sealed(path, content)

    def resume(self, path: Path, rows: Iterator[ScoreRow]) -> int:
        """Continue from a state, after the rows of the table that it was made of; return their number.

        Raises
        ------
        ValueError
            The state is damaged, was made with another detector or false-alarm rate, or from other rows.
        """
        from featnorm.drift import DriftMonitor
        from featnorm.report.drift import StreamHistory

        state, made_with = read_sealed(path), self._made_with()
        try:
            self.monitor = DriftMonitor.from_state(state["monitor"])
            self.history = StreamHistory.from_state(state["history"])
            self.unscored, seen, digest = state["unscored"], state["rows"], state["digest"]
            self.alarm = None if state["alarm"] is None else _Row(*state["alarm"])
            other = [name for name, value in made_with.items() if state["made_with"][name] != value]
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(
                f"{path} is not a state that this version of featnorm monitor wrote ({first_line(error)}): choose "
                "another file"
            ) from None
        again = f"delete {path} to monitor {self._table} from its first row"
        if other:
            raise ValueError(f"{path} was made with another {' and '.join(other)}: use the same, or {again}")
        for row in islice(rows, seen):
            self._count(row)
        if self.rows < seen:
            raise ValueError(
                f"{self._table} has {counted(self.rows, 'row')}, but {path} was made of {seen:,}: restore the "
                f"missing rows, or {again}"
            )
        if self._digest.hexdigest() != digest:
            raise ValueError(
                f"the first {counted(seen, 'row')} of {self._table} are not those that {path} was made of: "
                f"restore them, also their order, or {again}"
            )
        return self.rows

    def _made_with(self) -> dict[str, str | float]:
        calibration = hashlib.sha256(self._calibration.scores.tobytes()).hexdigest()
        return {"detector": calibration, "false-alarm rate": self.monitor.false_alarm}

    def _count(self, row: ScoreRow) -> _Row:
        """Return the next row of the table, and add it to the digest of all rows."""
        self.rows += 1
        self._digest.update(repr(row[:4]).encode())
        return _Row(self.rows, row.path)

    def add(self, block: list[ScoreRow]) -> None:
        """Take the next rows."""
        rows = [(self._count(row), row) for row in block]
        scored = [(row, read) for row, read in rows if read.score is not None]
        self.unscored += len(rows) - len(scored)
        groups = self._groups(scored)
        self._require_same_detector(scored, groups)
        scores = _column(scored, "score")
        before, was_alarmed = self.monitor.count, self.monitor.alarmed_at is not None
        evidence = self.monitor.update(scores)
        self.history.add(scores, evidence, self._calibration.p_value(scores, groups))
        if self.monitor.alarmed_at is not None and not was_alarmed:
            self.alarm = scored[self.monitor.alarmed_at - before][0]

    def _groups(self, scored: list[tuple[_Row, ScoreRow]]) -> list[str] | None:
        """Return the group of each row, if the detector has thresholds by group."""
        if not self._calibration.group_names:
            return None
        groups = []
        for row, read in scored:
            if read.group not in self._calibration.group_names:
                what = "no group" if read.group is None else f"the group {read.group!r}"
                raise ValueError(
                    f"row {row.number} of {self._table} has {what}, but {self._scorer_file} has thresholds for "
                    f"{counted(len(self._calibration.group_names), 'group')}: name the detector that wrote the "
                    "scores"
                )
            groups.append(read.group)
        return groups

    def _require_same_detector(self, scored: list[tuple[_Row, ScoreRow]], groups: list[str] | None) -> None:
        """Check that the scores are from this detector: those of another one would look like drift."""
        scores, errors = _column(scored, "score"), _column(scored, "score_error")
        stated, digits = _column(scored, "p_value"), _column(scored, "p_value_error")
        # A score may have been rounded when it was written: its p-value lies between those of the bounds.
        lowest, highest = (
            self._calibration.p_value(bound, groups) for bound in (scores - errors, scores + errors)
        )
        digits = digits.clip(min=_P_VALUE_ERROR)
        # Not the other way round, where a NaN would pass.
        other = ~((stated >= lowest - digits) & (stated <= highest + digits))
        if other.any():
            first = int(other.argmax())
            row, read = scored[first]
            low, high = float(lowest[first]), float(highest[first])
            wanted = f"{low:.9g}" if low == high else f"{low:.9g} to {high:.9g}"
            raise ValueError(
                f"row {row.number} of {self._table} is from another detector: its score {read.score:.9g} "
                f"has the p-value {read.p_value:.9g} there and {wanted} in {self._scorer_file}; name the "
                "detector that wrote the scores"
            )


def _read_calibration(scorer_file: Path) -> StoredCalibration:
    from featnorm.archive import ArchiveError, read_calibration

    calibration = read_calibration(scorer_file)
    if calibration is None:
        raise ArchiveError(f"{scorer_file} holds no calibration scores: fit again, with featnorm fit")
    from featnorm._utils.ranks import are_ranks

    if are_ranks(calibration.scores):
        raise ArchiveError(
            f"{scorer_file} was calibrated by leaving {calibration.noun}s out of the fit in turn, so it has no "
            "scores that a stream can be compared with: calibrate it on other in-distribution "
            f"{calibration.noun}s, with featnorm calibrate, and score the stream again"
        )
    return calibration


def _column(scored: list[tuple[_Row, ScoreRow]], name: str) -> npt.NDArray[np.float64]:
    import numpy as np

    return np.array([getattr(read, name) for _, read in scored], np.float64)


def _finding(stream: _Stream) -> str:
    from featnorm.report.drift import format_evidence

    monitor = stream.monitor
    level, highest = format_evidence(monitor.alarm_level), format_evidence(monitor.highest)
    if stream.alarm is None or monitor.alarmed_at is None:
        return f"The evidence never reached the alarm level of {level}. It was at most {highest}."
    return (
        f"At {stream.noun} {monitor.alarmed_at + 1:,}, {stream.alarm.path} (row {stream.alarm.number:,}), the "
        f"evidence reached the alarm level of {level}. It was at most {highest}."
    )


def _meaning(stream: _Stream) -> Iterator[str]:
    chance = f"{100 * stream.monitor.false_alarm:g} %"
    yield (
        f"If nothing drifts, the chance of ever raising this alarm is at most {chance}, however long the "
        "stream, provided the inputs are exchangeable (not sorted by class, not consecutive video frames)."
    )
    if stream.alarm is None:
        yield (
            "This does not prove that nothing changed. To continue the stream, append the new rows to these and "
            "run the command on all of them (with --state, it processes the new rows only): the chance above is "
            "for one stream, not for several."
        )
        return
    yield (
        f"Either the {stream.noun}s as a whole changed some time before the alarm, even if no single one is "
        "flagged, or neighboring rows resemble each other, as consecutive frames of a video do."
    )
    cause = _CAUSES.get(stream.noun, "their source")
    yield (
        f"Compare {stream.noun}s from before and after the alarm: did {cause} change? If the new {stream.noun}s "
        f"are in-distribution, fit again on current {stream.noun}s."
    )
