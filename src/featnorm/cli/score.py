"""``featnorm score``: which images are OOD, by a fitted detector."""

import contextlib
import hashlib
import heapq
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from tqdm import tqdm

from featnorm.cli.machine import cluster_of, fabric_of
from featnorm.cli.show import (
    console,
    counted,
    environment,
    print_reading,
    print_skipped,
    printable,
    require_file_place,
)
from featnorm.image_scorer import ImageScorer, ImageVerdict
from featnorm.inputs import DataError, ImageSource, ItemError, SlicedSource, open_source
from featnorm.inputs.decoding import DECODING
from featnorm.inputs.loading import rows_of
from featnorm.records import FORMATS, Journal, images_digest

if TYPE_CHECKING:
    # Imported where a page is drawn, for matplotlib takes half a second.
    from featnorm.report.scores import Shown

#: Numbers and verdicts of batches.
_Judged = Iterator[tuple[int, list[ImageVerdict]]]

_MOST_SHOWN = 100  # images on the page
_EXPLAINED = 16


@dataclass(frozen=True)
class Options:
    """The command's options."""

    detector: Path
    images: list[str]
    out: Path | None
    html: Path | None
    model: str | None
    data_root: Path | None
    device: str
    precision: str
    batch_size: int
    workers: int | None
    ray: bool


class _Tally:
    """What a run amounts to, and the images that are the most foreign."""

    def __init__(self) -> None:
        self.scores = array("d")
        self.foreign = 0
        self.unread = 0
        self.several = 0
        self.first_unread: list[tuple[str, str]] = []
        self._rows = 0
        # A heap of the lowest scores, the highest of them on top; among equal ones the first images stay.
        self._lowest: list[tuple[float, int, ImageVerdict]] = []

    def add(self, verdict: ImageVerdict) -> None:
        row = self._rows
        self._rows += 1
        if verdict.score is None:
            self.unread += 1
            if self.unread <= _MOST_SHOWN:
                self.first_unread.append((verdict.name, str(verdict.error)))
            return
        self.scores.append(verdict.score)
        self.foreign += verdict.is_id is False
        self.several += verdict.several
        entry = (-verdict.score, -row, verdict)
        if len(self._lowest) < _MOST_SHOWN:
            heapq.heappush(self._lowest, entry)
        else:
            heapq.heappushpop(self._lowest, entry)

    @property
    def judged(self) -> int:
        return len(self.scores)

    @property
    def lowest(self) -> list[tuple[int, ImageVerdict]]:
        """Rows and verdicts of the lowest scores, the lowest first."""
        return [(-row, verdict) for _, row, verdict in sorted(self._lowest, reverse=True)]


class _Watch:
    """How long the model itself works, of all the time."""

    def __init__(self, model: nn.Module) -> None:
        self.seconds = 0.0
        self._began = 0.0
        model.register_forward_pre_hook(self._start)
        model.register_forward_hook(self._stop)

    def _start(self, *_: object) -> None:
        self._began = time.perf_counter()

    def _stop(self, *_: object) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds += time.perf_counter() - self._began


def run(options: Options) -> None:
    """Judge the images; print or write a row each, or a page of them, and say how fast it went."""
    if options.out is not None and options.out.suffix not in FORMATS:
        raise ValueError(f"--out {options.out} must end in {', '.join(FORMATS)}")
    if options.html is not None and options.html.suffix != ".html":
        raise ValueError(f"--html {options.html} must end in .html")
    for file in (options.out, options.html):
        if file is not None:
            require_file_place(file, [options.detector, *map(Path, options.images)])
    fabric = fabric_of(options.device, options.precision)
    scorer = ImageScorer.load(options.detector, model=options.model)
    if options.html is not None and scorer.scorer.calibration is None:
        raise ValueError(f"{options.detector} is not calibrated: there are no known scores to show others among")
    source = open_source(*options.images, root=options.data_root, labels=False, mix_splits=True)
    fitted_in = scorer.facts.get("precision", options.precision)
    if fitted_in != options.precision:
        console.print(f"fitted in {fitted_in}: scores in {options.precision} differ a little", style="dim")
    cluster, trace = cluster_of(options.device, options.ray), None
    if cluster is None:
        scorer.scorer = fabric.to_device(scorer.scorer)
        trace = _Watch(scorer.scorer.model)
    began = time.perf_counter()
    tally = _Tally()

    def judge(batches: Sequence[int]) -> _Judged:
        settings: dict[str, Any] = {"batch_size": options.batch_size}
        if cluster is not None:
            return cluster.score(scorer, source, batches, precision=options.precision, **settings)
        rest = source
        if len(batches) < len(every):
            rows = [row for number in batches for row in rows_of(number, options.batch_size, len(source))]
            rest = SlicedSource(source, rows, source.title)
        verdicts = scorer.stream(rest, workers=options.workers, fabric=fabric, **settings)
        return zip(batches, verdicts, strict=True)

    every = range(-(-len(source) // options.batch_size))
    place = options.out or options.html
    if place is None:
        judged = _print(judge(every), tally)
        pace = _pace(judged, time.perf_counter() - began, trace, cluster)
    else:
        with _journal(options, place, source) as journal:
            judged = _judge(judge, journal.missing(len(every)), len(source), journal)
            # Before the page, which asks the model again.
            pace = _pace(judged, time.perf_counter() - began, trace, cluster)
            for verdict in journal:
                tally.add(verdict)
            if options.out is not None:
                journal.write(options.out)
            if options.html is not None:
                _write_page(options.html, scorer, source, tally, fabric)
            journal.remove()
    print_skipped(source.title, tally.first_unread, tally.unread)
    print_reading(tally.judged, tally.unread, tally.several, source.passed_over)
    if tally.judged:
        console.print(_summary(tally))
    if judged and tally.judged:
        console.print(pace)
    for file in (options.out, options.html):
        if file is not None:
            console.print(f"Wrote {file}.", soft_wrap=True)
    if not tally.judged:
        name, why = tally.first_unread[0]
        raise DataError(
            f"none of the {tally.unread:,} images could be read; the first is {printable(name)}: {why}"
        )


def _pace(judged: int, seconds: float, trace: _Watch | None, cluster: Any) -> str:
    if trace is not None:
        where = f"{trace.seconds / seconds:.0%} of the time in the model itself"
    else:
        where = f"by at most {cluster.actors.count} actors of {cluster.actors.device}"
    return f"{judged / seconds:.0f} images per second, {where}."


def _summary(tally: _Tally) -> str:
    share = f"{100 * tally.foreign / tally.judged:.1f} %" if tally.judged else "none could be read"
    return f"{tally.foreign:,} of {counted(tally.judged, 'image')} flagged as OOD ({share})."


def _print(batches: _Judged, tally: _Tally) -> int:
    console.print(f"{'score':>10}  {'p-value':>8}  {'verdict':7}  image")
    count = 0
    for _, batch in batches:
        for verdict in batch:
            tally.add(verdict)
            count += 1
            if verdict.score is None:
                continue
            word = {True: "ID", False: "OOD", None: ""}[verdict.is_id]
            p_value = "" if verdict.p_value is None else f"{verdict.p_value:.4f}"
            predicted = "" if verdict.predicted is None else f"  ({verdict.predicted})"
            name = printable(verdict.name)
            console.print(f"{verdict.score:10.4g}  {p_value:>8}  {word:7}  {name}{predicted}", soft_wrap=True)
    return count


def _journal(options: Options, place: Path, source: ImageSource) -> Journal:
    with options.detector.open("rb") as file:
        detector = hashlib.file_digest(file, "sha256").hexdigest()
    settings = {
        "detector": detector,
        "model": options.model,
        "device": options.device,
        "precision": options.precision,
        "decoding": DECODING,
        "images": images_digest(source),
    }
    journal = Journal(place, settings, options.batch_size)
    if journal.restarted:
        console.print("the previous run used different images, detector or options; starting over", style="dim")
    if journal.damaged is not None:
        console.print(
            f"line {journal.damaged} of {journal.path} is damaged: images are scored again from there on",
            style="dim",
            soft_wrap=True,
        )
    return journal


def _judge(judge: Callable[[Sequence[int]], _Judged], missing: Sequence[int], total: int, journal: Journal) -> int:
    """Judge the batches that are not in the journal yet; return how many images."""
    if journal.done:
        console.print(f"resuming after {journal.done:,} of {counted(total, 'image')}", style="dim")
    judged = 0
    with tqdm(total=total, initial=journal.done, unit="image", disable=None, leave=False) as bar:
        for number, batch in judge(missing):
            journal.add(number, batch)
            judged += len(batch)
            bar.update(len(batch))
    return judged


def _write_page(path: Path, scorer: ImageScorer, source: ImageSource, tally: _Tally, fabric: Any) -> None:
    from featnorm.report.scores import write_scores_page

    calibration = scorer.scorer.calibration
    assert calibration is not None
    write_scores_page(
        path,
        title=f"{source.title}: what does not belong",
        summary=f"{_summary(tally)} {scorer.scorer.detector!r} is calibrated to flag at most "
        f"{100 * (1 - calibration.tpr):.1f} % of in-distribution images.",
        facts={**scorer.facts, "date": environment()["date"]},
        known=calibration.scores.cpu().numpy(),
        scores=np.asarray(tally.scores, np.float64),
        threshold=float(calibration.threshold),
        shown=_shown(scorer, source, tally.lowest, fabric),
        unread=tally.first_unread,
        unread_count=tally.unread,
    )


def _shown(
    scorer: ImageScorer, source: ImageSource, lowest: Sequence[tuple[int, ImageVerdict]], fabric: Any
) -> "Iterator[Shown]":
    """Yield the images again with what explains them; few at a time, as they may be large."""
    from featnorm.report.scores import Shown

    for start in range(0, len(lowest), _EXPLAINED):
        images: dict[int, Image.Image] = {}
        for row, _ in lowest[start : start + _EXPLAINED]:
            # A file that went away meanwhile costs its picture, not the page.
            with contextlib.suppress(ItemError):
                images[row] = source.item(row)
        again: dict[int, ImageVerdict] = {}
        if images and scorer.statistics is not None:
            batch = torch.stack([scorer.transform(image) for image in images.values()])
            names = [source.name(row) for row in images]
            judged = scorer.judge(batch, names, explain=range(len(images)), fabric=fabric)
            again = dict(zip(images, judged, strict=True))
        for row, verdict in lowest[start : start + _EXPLAINED]:
            # In another batch a score may differ in its last digits: the page shows the one of the table.
            yield Shown(verdict._replace(why=again[row].why) if row in again else verdict, images.get(row))
