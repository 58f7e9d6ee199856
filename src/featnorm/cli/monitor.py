"""``featnorm monitor``: whether a stream of images has drifted, from their scores."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from featnorm import archive
from featnorm.calibration import Calibration
from featnorm.cli.show import console, environment, require_file_place
from featnorm.drift import DriftMonitor
from featnorm.records import ScoreRow, read_scores
from featnorm.report.drift import Course, odds, write_drift_page

DRIFT = 3
"""The exit status where there is drift."""

_ROWS = 10_000
# A p-value that was written as float32 is less exact than the one that is computed.
_P_VALUE_ERROR = 1e-6


@dataclass(frozen=True)
class Options:
    """The command's options."""

    detector: Path
    scores: Path
    false_alarm: float
    html: Path | None


@dataclass(frozen=True)
class _Row:
    """A row of the file, counted from 1."""

    number: int
    path: str


class _Stream:
    """What the scores of a file amount to, in order."""

    def __init__(self, options: Options, calibration: Calibration) -> None:
        self.monitor = DriftMonitor(calibration.scores, options.false_alarm)
        self.course = Course()
        self.left_out = 0
        self.alarm: _Row | None = None
        self._options = options
        self._calibration = calibration
        self._rows = 0

    def add(self, images: list[ScoreRow]) -> None:
        """Take the next rows."""
        rows = [_Row(number, image.path) for number, image in enumerate(images, start=self._rows + 1)]
        self._rows += len(rows)
        scored = [(row, image) for row, image in zip(rows, images, strict=True) if image.score is not None]
        self.left_out += len(rows) - len(scored)
        scores, errors = (
            torch.tensor([getattr(image, name) for _, image in scored], dtype=torch.float64)
            for name in ("score", "score_error")
        )
        self._require_same_detector(scored, scores, errors)
        p_values = self._calibration.p_value(scores)
        before, was_alarmed = self.monitor.count, self.monitor.alarmed_at is not None
        evidence = self.monitor.update(scores)
        self.course.add(scores.numpy(), evidence.numpy(), p_values.numpy())
        if self.monitor.alarmed_at is not None and not was_alarmed:
            self.alarm = scored[self.monitor.alarmed_at - before][0]

    def _require_same_detector(self, scored: list[tuple[_Row, ScoreRow]], scores: Tensor, errors: Tensor) -> None:
        """Refuse scores of another detector, which would look like drift."""
        stated, digits = (
            torch.tensor([getattr(image, name) for _, image in scored], dtype=torch.float64)
            for name in ("p_value", "p_value_error")
        )
        # What is written may be rounded: the p-value is one of those that the score has before it was.
        lowest, highest = self._calibration.p_value(scores - errors), self._calibration.p_value(scores + errors)
        digits = digits.clamp(min=_P_VALUE_ERROR)
        # Not the other way round, where a NaN would pass.
        other = ~((stated >= lowest - digits) & (stated <= highest + digits))
        if other.any():
            first = int(other.nonzero()[0])
            row, image = scored[first]
            low, high = float(lowest[first]), float(highest[first])
            wanted = f"{low:.9g}" if low == high else f"{low:.9g} to {high:.9g}"
            raise ValueError(
                f"row {row.number} of {self._options.scores} is of another detector: its score {image.score:.9g} "
                f"has the p-value {image.p_value:.9g} there and {wanted} by {self._options.detector}; name the "
                "detector that wrote the scores"
            )


def run(options: Options) -> bool:
    """Follow the scores, say what became of them, and return whether there is drift."""
    if options.html is not None:
        if options.html.suffix != ".html":
            raise ValueError(f"--html {options.html} must end in .html")
        require_file_place(options.html, [options.detector, options.scores])
    calibration = _calibration(options.detector)
    stream = _Stream(options, calibration)
    with tqdm(unit="image", disable=None, leave=False) as bar:
        for images in _batches(read_scores(options.scores)):
            stream.add(images)
            bar.update(len(images))
    monitor = stream.monitor
    if monitor.count == 0:
        raise ValueError(f"there is no score in {options.scores}: score images first, by featnorm score --out")
    left_out = f" ({stream.left_out:,} without a score left out)" if stream.left_out else ""
    console.print(
        f"{monitor.count:,} scores of {options.scores}{left_out}, against {len(calibration.scores):,} calibration "
        f"scores of {options.detector}.",
        soft_wrap=True,
    )
    finding = _finding(stream)
    for sentence in (f"{'No drift' if stream.alarm is None else 'Drift'}. {finding}", *_meaning(stream)):
        console.print(sentence, soft_wrap=True)
    if options.html is not None:
        facts = {
            "Scores": f"{monitor.count:,}{left_out}",
            "Calibration scores": f"{len(calibration.scores):,}",
            "Chance of a false alarm": f"{monitor.false_alarm:.4g}",
            "Highest evidence": odds(monitor.highest),
            "File": str(options.scores),
            "Detector": str(options.detector),
            **environment(),
        }
        write_drift_page(options.html, monitor, stream.course, calibration, summary=finding, facts=facts)
        console.print(f"Wrote {options.html}.", soft_wrap=True)
    return monitor.alarmed_at is not None


def _calibration(detector: Path) -> Calibration:
    """Return the calibration of a detector file; the model in it is not built."""
    calibration = archive.calibration(*archive.read(detector), detector)
    if calibration is None:
        raise archive.ArchiveError(f"{detector} holds no calibration scores: fit again, by featnorm fit")
    return calibration


def _batches(rows: Iterator[ScoreRow]) -> Iterator[list[ScoreRow]]:
    while batch := list(islice(rows, _ROWS)):
        yield batch


def _finding(stream: _Stream) -> str:
    monitor = stream.monitor
    level, most = odds(monitor.alarm_level), odds(monitor.highest)
    if stream.alarm is None or monitor.alarmed_at is None:
        return f"The evidence never reached the {level} of the alarm. The most was {most}."
    return (
        f"At image {monitor.alarmed_at + 1:,}, {stream.alarm.path} (row {stream.alarm.number:,}), the "
        f"evidence reached the {level} of the alarm. The most was {most}."
    )


def _meaning(stream: _Stream) -> Iterator[str]:
    monitor = stream.monitor
    yield (
        f"A stream of images like the calibration images, in no order, ever raises this alarm with a chance of "
        f"{100 * monitor.false_alarm:g} % at most."
    )
    if stream.alarm is None:
        yield (
            "That is no proof that nothing changed. Go on with all rows since the first, and the new ones after "
            "them: the chance is of one stream, however long."
        )
        return
    yield (
        "So the images as a whole have changed, some time before the alarm, though each may pass for itself; or "
        "neighbors in the file resemble each other, as frames of a video do."
    )
    yield (
        "Look at images before and after the alarm: what is new, the subject, the light, the camera? If they "
        "belong, fit again with images of now."
    )
