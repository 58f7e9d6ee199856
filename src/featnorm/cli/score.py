"""``featnorm score``: the verdicts of a fitted detector on images."""

from __future__ import annotations

import contextlib
import hashlib
import heapq
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from featnorm._utils.progress import progress_bar
from featnorm.cli.console import (
    console,
    counted,
    environment,
    print_reading,
    print_skipped,
    printable,
    require_file_place,
)
from featnorm.cli.options import (
    DATA,
    BatchSize,
    DataRoot,
    Device,
    OwnModel,
    Precision,
    Ray,
    ScorerFile,
    Workers,
)

if TYPE_CHECKING:
    from PIL import Image
    from torch import nn

    from featnorm.image_scorer import ImageScorer, ImageVerdict
    from featnorm.inputs import ImageSource
    from featnorm.records import Journal

    # Imported where a page is drawn, for matplotlib takes half a second.
    from featnorm.report.scores import ScoredImage

#: Numbers and verdicts of batches.
_Judged: TypeAlias = "Iterator[tuple[int, list[ImageVerdict]]]"

_MAX_SHOWN = 100  # images on the page
_EXPLAINED = 16


class _Tally:
    """Counts of a run, and its lowest scores."""

    def __init__(self) -> None:
        self.scores = array("d")
        self.flagged = 0
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
            if self.unread <= _MAX_SHOWN:
                self.first_unread.append((verdict.name, str(verdict.error)))
            return
        self.scores.append(verdict.score)
        self.flagged += verdict.is_id is False
        self.several += verdict.several
        entry = (-verdict.score, -row, verdict)
        if len(self._lowest) < _MAX_SHOWN:
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
    """Measures how long the model itself works."""

    def __init__(self, model: nn.Module) -> None:
        self.seconds = 0.0
        self._began = 0.0
        model.register_forward_pre_hook(self._start)
        model.register_forward_hook(self._stop)

    def _start(self, *_: object) -> None:
        self._began = time.perf_counter()

    def _stop(self, *_: object) -> None:
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds += time.perf_counter() - self._began


def score(
    scorer_file: ScorerFile,
    images: Annotated[list[str], typer.Argument(metavar="IMAGES...", help=f"Image files, or {DATA}.")],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            metavar="FILE",
            help="Output file (.csv, .jsonl or .parquet), one row per image. Default: print to the terminal.",
        ),
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Page to write (.html): the images with the lowest scores, where each lies, and why.",
        ),
    ] = None,
    model: OwnModel = None,
    data_root: DataRoot = None,
    device: Device = "auto",
    precision: Precision = "32-true",
    batch_size: BatchSize = 64,
    workers: Workers = None,
    ray: Ray = False,
) -> None:
    """Score images: score, p-value, verdict (ID or OOD) and predicted class, one row per image.

    With `--out` or `--html`, rerun the same command to resume after an interruption.
    """
    from featnorm.records import FORMATS

    if out is not None and out.suffix not in FORMATS:
        raise ValueError(f"--out {out} must end in {', '.join(FORMATS)}")
    if html is not None and html.suffix != ".html":
        raise ValueError(f"--html {html} must end in .html")
    for file in (out, html):
        if file is not None:
            require_file_place(file, [scorer_file, *map(Path, images)])
    from featnorm.cli.runtime import cluster_of, fabric_of
    from featnorm.image_scorer import ImageScorer
    from featnorm.inputs import DataError, SlicedSource, open_source
    from featnorm.inputs.loading import rows_of

    fabric = fabric_of(device, precision)
    scorer = ImageScorer.load(scorer_file, model=model)
    if html is not None and scorer.scorer.calibration is None:
        raise ValueError(f"{scorer_file} is not calibrated: a page needs calibration scores")
    source = open_source(*images, root=data_root, labels=False, mix_splits=True)
    fitted_in = scorer.facts.get("precision", precision)
    if fitted_in != precision:
        console.print(f"fitted in {fitted_in}: scores in {precision} differ a little", style="dim")
    watch, tally = None, _Tally()
    with cluster_of(device, ray) as cluster:
        if cluster is None:
            scorer.scorer = fabric.to_device(scorer.scorer)
            watch = _Watch(scorer.scorer.model)
        began = time.perf_counter()

        def judge(batches: Sequence[int]) -> _Judged:
            settings: dict[str, Any] = {"batch_size": batch_size}
            if cluster is not None:
                return cluster.score(scorer, source, batches, precision=precision, **settings)
            rest = source
            if len(batches) < len(every):
                rows = [row for number in batches for row in rows_of(number, batch_size, len(source))]
                rest = SlicedSource(source, rows, source.title)
            verdicts = scorer.stream(rest, workers=workers, fabric=fabric, **settings)
            return zip(batches, verdicts, strict=True)

        every = range(-(-len(source) // batch_size))
        place = out or html
        if place is None:
            judged = _print(judge(every), tally)
            pace = _pace(judged, time.perf_counter() - began, watch, cluster)
        else:
            settings = {"model": model, "device": device, "precision": precision}
            with _journal(place, source, scorer_file, batch_size, settings) as journal:
                judged = _judge(judge, journal.missing(len(every)), len(source), journal)
                # Before the page is drawn, which runs the model again.
                pace = _pace(judged, time.perf_counter() - began, watch, cluster)
                for verdict in journal:
                    tally.add(verdict)
                if out is not None:
                    journal.write(out)
                if html is not None:
                    _write_page(html, scorer, source, tally, fabric)
                journal.remove()
    print_skipped(source.title, tally.first_unread, tally.unread)
    print_reading(tally.judged, tally.unread, tally.several, source.passed_over)
    if tally.judged:
        console.print(_summary(tally))
    if judged and tally.judged:
        console.print(pace)
    for file in (out, html):
        if file is not None:
            console.print(f"Wrote {file}.", soft_wrap=True)
    if not tally.judged:
        name, why = tally.first_unread[0]
        raise DataError(
            f"none of the {tally.unread:,} images could be read; the first is {printable(name)}: {why}"
        )


def _pace(judged: int, seconds: float, watch: _Watch | None, cluster: Any) -> str:
    if watch is not None:
        where = f"{watch.seconds / seconds:.0%} of the time in the model itself"
    else:
        where = f"by at most {cluster.actors.count} actors of {cluster.actors.device}"
    return f"{judged / seconds:.0f} images per second, {where}."


def _summary(tally: _Tally) -> str:
    share = f"{100 * tally.flagged / tally.judged:.1f} %" if tally.judged else "none could be read"
    return f"{tally.flagged:,} of {counted(tally.judged, 'image')} flagged as OOD ({share})."


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


def _journal(
    place: Path, source: ImageSource, scorer_file: Path, batch_size: int, settings: dict[str, str | None]
) -> Journal:
    from featnorm.inputs.decoding import DECODING
    from featnorm.records import Journal, images_digest

    with scorer_file.open("rb") as file:
        detector = hashlib.file_digest(file, "sha256").hexdigest()
    run = {"detector": detector, **settings, "decoding": DECODING, "images": images_digest(source)}
    journal = Journal(place, run, batch_size)
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
    """Score the batches that are not in the journal yet; return the number of images."""
    if journal.done:
        console.print(f"resuming after {journal.done:,} of {counted(total, 'image')}", style="dim")
    judged = 0
    with progress_bar(total=total, initial=journal.done, unit="image") as bar:
        for number, batch in judge(missing):
            journal.add(number, batch)
            judged += len(batch)
            bar.update(len(batch))
    return judged


def _write_page(path: Path, scorer: ImageScorer, source: ImageSource, tally: _Tally, fabric: Any) -> None:
    import numpy as np

    from featnorm.report.scores import write_scores_page

    calibration = scorer.scorer.calibration
    assert calibration is not None
    write_scores_page(
        path,
        title=f"{source.title}: images with the lowest scores",
        summary=f"{_summary(tally)} {scorer.scorer.detector!r} is calibrated to flag at most "
        f"{100 * (1 - calibration.tpr):.1f} % of in-distribution images.",
        facts={**scorer.facts, "date": environment()["date"]},
        calibration_scores=calibration.scores.cpu().numpy(),
        scores=np.asarray(tally.scores, np.float64),
        threshold=float(calibration.threshold),
        shown=_shown(scorer, source, tally.lowest, fabric),
        unread=tally.first_unread,
        unread_count=tally.unread,
    )


def _shown(
    scorer: ImageScorer, source: ImageSource, lowest: Sequence[tuple[int, ImageVerdict]], fabric: Any
) -> Iterator[ScoredImage]:
    """Yield the images with the explanations of their scores; a few at a time, as they may be large."""
    import torch

    from featnorm.inputs import ItemError
    from featnorm.report.scores import ScoredImage

    for start in range(0, len(lowest), _EXPLAINED):
        images: dict[int, Image.Image] = {}
        for row, _ in lowest[start : start + _EXPLAINED]:
            # A file that has been removed is shown without its picture.
            with contextlib.suppress(ItemError):
                images[row] = source.item(row)
        again: dict[int, ImageVerdict] = {}
        if images and scorer.statistics is not None:
            batch = torch.stack([scorer.transform(image) for image in images.values()])
            names = [source.name(row) for row in images]
            judged = scorer.judge(batch, names, explain=range(len(images)), fabric=fabric)
            again = dict(zip(images, judged, strict=True))
        for row, verdict in lowest[start : start + _EXPLAINED]:
            # In another batch a score may differ in its last digits: the page shows the score in the table.
            yield ScoredImage(verdict._replace(why=again[row].why) if row in again else verdict, images.get(row))
