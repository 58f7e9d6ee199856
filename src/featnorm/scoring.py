"""`score_source`: verdicts on any number of items, in a table or on a page; an interrupted run is resumed."""

import heapq
import os
import re
import time
from array import array
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, nullcontext, suppress
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from featnorm._utils.progress import progress_bar
from featnorm.engine import FeatureEngine
from featnorm.inputs import DataError, ItemError, Kind, SlicedSource, Source
from featnorm.inputs.decoding import DECODING
from featnorm.inputs.kinds import IMAGES
from featnorm.inputs.loading import rows_of
from featnorm.records import FORMATS, Journal, source_digest
from featnorm.runtime import Runtime
from featnorm.scorer import Scorer
from featnorm.verdict import ItemVerdict

if TYPE_CHECKING:
    # Imported where a page is drawn, because matplotlib takes half a second.
    from featnorm.hidden import Why
    from featnorm.report.scores import ScoredItem

MAX_SHOWN = 100  # items on the page
_OTHERS = 5  # items on the page that are not flagged, those with the lowest scores
_EXPLAINED_BATCH = 16
# The end of the name of an item of a table or a data set.
_ROW = re.compile(r"(^|:? )(row|image) \d+$")


class ScoringSummary:
    """Counts of a scoring run, and its lowest scores.

    Parameters
    ----------
    kind : Kind
        What the items are.

    Attributes
    ----------
    scores : array of float
        Score of every item that could be read, in the order of the source.
    flagged : int
        Number of items flagged as OOD.
    unread : int
        Number of items that could not be read.
    first_unread : list of tuple of str
        Name and reason of the first 100 of them.
    several : int
        Number of images that are the first of several frames or pages of their file.
    folders : dict of str to list of int
        Number of items scored, and of items flagged, by `folder_of` their name.
    computed : int
        Number of items scored by this run; an earlier run that was interrupted scored the others.
    seconds : float
        Time this run took to score them.
    model_seconds : float or None
        Time the model itself took; None on a cluster.
    """

    def __init__(self, kind: Kind = IMAGES) -> None:
        self.kind = kind
        self.scores = array("d")
        self.flagged = 0
        self.unread = 0
        self.first_unread: list[tuple[str, str]] = []
        self.several = 0
        self.folders: dict[str, list[int]] = {}
        self.computed = 0
        self.seconds = 0.0
        self.model_seconds: float | None = None
        self._rows = 0
        # A heap of the lowest scores, the highest of them on top; among equal ones the first items stay.
        self._lowest: list[tuple[float, int, ItemVerdict]] = []

    def update(self, verdicts: Iterable[ItemVerdict]) -> None:
        """Count the verdicts on the next items."""
        for verdict in verdicts:
            row = self._rows
            self._rows += 1
            if verdict.score is None:
                self.unread += 1
                if self.unread <= MAX_SHOWN:
                    self.first_unread.append((verdict.item, str(verdict.error)))
                continue
            self.scores.append(verdict.score)
            self.flagged += verdict.is_id is False
            counts = self.folders.setdefault(folder_of(verdict.item), [0, 0])
            counts[0] += 1
            counts[1] += verdict.is_id is False
            self.several += verdict.first_of_several
            entry = (-verdict.score, -row, verdict)
            if len(self._lowest) < MAX_SHOWN:
                heapq.heappush(self._lowest, entry)
            else:
                heapq.heappushpop(self._lowest, entry)

    @property
    def lowest(self) -> list[tuple[int, ItemVerdict]]:
        """Rows and verdicts of the 100 lowest scores, the lowest first."""
        return [(-row, verdict) for _, row, verdict in sorted(self._lowest, reverse=True)]

    def __str__(self) -> str:
        scored = len(self.scores)
        share = f"{100 * self.flagged / scored:.1f} %" if scored else "none could be read"
        return f"{self.flagged:,} of {self.kind.counted(scored)} flagged as OOD ({share})."


def folder_of(item: str) -> str:
    """Return the folder of an item by its name; of a row, the table; an empty string if the name has neither."""
    if (row := _ROW.search(item)) is not None:
        return item[: row.start()]
    return item[: max(item.rfind("/"), item.rfind(os.sep)) + 1].rstrip("/" + os.sep)


def score_source(
    scorer: Scorer,
    source: Source[Any],
    out: str | Path | None = None,
    *,
    page: str | Path | None = None,
    made_with: Mapping[str, Any] | None = None,
    runtime: Runtime | None = None,
    on_start: Callable[[Journal], None] | None = None,
    on_batch: Callable[[Sequence[ItemVerdict]], None] | None = None,
) -> ScoringSummary:
    """Score all items of a source, and write one row per item to a table, or a page of the lowest scores.

    If a file is written, a journal next to it keeps every batch that has been scored. After an interruption the
    same call resumes, and writes what an uninterrupted run would have written.

    Parameters
    ----------
    scorer : scorer with a preprocess.
    source : items to score.
    out : table to write, a .csv, .jsonl or .parquet file with the columns of `featnorm.records.COLUMNS`.
    page
        .html file with the flagged items among the 100 with the lowest scores, and the 5 others with the lowest
        scores. Each is explained, and compared with the calibration scores.
    made_with
        Anything else that the scores depend on, as plain data. An interrupted run is resumed only if this, the
        scorer, the items, the device, the precision and the batch size are the same.
    runtime
        Where and how to score; the scorer is moved to its device. Default: on the scorer's device, in 32-true.
    on_start : called with the journal before the first item is scored, if a file is written.
    on_batch : called with the verdicts of each batch that this run has scored, on a cluster in any order.

    Raises
    ------
    ValueError
        The name of a file has a wrong ending, the scorer is not calibrated and a page is requested, another
        process is writing the file, or an output of the model is not finite.
    DataError
        The transform fails on an item, or the source holds items of another kind.
    OSError
        A file cannot be written. The journal is kept.
    """
    out, page = (None if file is None else Path(file) for file in (out, page))
    if out is not None and out.suffix not in FORMATS:
        raise ValueError(f"{out} must end in {', '.join(FORMATS[:-1])} or {FORMATS[-1]}")
    if page is not None and page.suffix != ".html":
        raise ValueError(f"{page} must end in .html")
    if page is not None and scorer.calibration is None:
        raise ValueError("the scorer is not calibrated: a page has no calibration scores to compare others with")
    runtime = runtime or Runtime(scorer.tap.device.type)
    if runtime.cluster is None and scorer.tap.device.type != runtime.torch_device.type:
        scorer.to(runtime.torch_device)
    place = out or page
    source.require(scorer.kind, "this scorer", scorer.preprocess)
    summary = ScoringSummary(scorer.kind)
    engine = scorer.engine(runtime, len(source))
    made_with = {**(made_with or {}), **({} if engine is None else {"engine": "onnx"})}
    with nullcontext() if place is None else _journal(place, scorer, source, made_with, runtime) as journal:
        if journal is not None and on_start is not None:
            on_start(journal)
        total = -(-len(source) // runtime.batch_size)
        numbers = range(total) if journal is None else journal.missing(total)
        done = 0 if journal is None else journal.done
        # Without a file, the caller prints the verdicts as they come, which shows the progress.
        progress = False if journal is None else runtime.progress
        with (
            progress_bar(total=len(source), initial=done, unit=source.kind.noun, progress=progress) as bar,
            closing(_scored(scorer, source, numbers, runtime, summary, engine)) as batches,
        ):
            for number, verdicts in batches:
                if journal is None:
                    summary.update(verdicts)
                else:
                    journal.add(number, verdicts)
                if on_batch is not None:
                    on_batch(verdicts)
                bar.update(len(verdicts))
        if journal is None:
            return summary
        summary.update(journal)
        if out is not None:
            journal.write(out)
        if page is not None:
            _write_page(page, scorer, source, summary, runtime)
        journal.remove()
    return summary


def calibrate_source(
    scorer: Scorer,
    source: Source[Any],
    tpr: float | None = None,
    *,
    update: bool = False,
    runtime: Runtime | None = None,
) -> ScoringSummary:
    """Calibrate a scorer on the items of a source; see `Scorer.calibrate`.

    Parameters
    ----------
    scorer : fitted scorer with a preprocess. It is left as it was if an error is raised.
    source : in-distribution items that were used neither to train the model nor to fit the detector.
    tpr, update : see `Scorer.calibrate`.
    runtime : see `score_source`.

    Returns
    -------
    ScoringSummary
        Counts of the items.

    Raises
    ------
    ValueError, DataError
        See `Scorer.calibrate` and `score_source`; or no item can be read.
    """
    found: list[ItemVerdict] = []
    earlier, scorer.calibration = scorer.calibration, None
    try:
        summary = score_source(scorer, source, runtime=runtime, on_batch=found.extend)
    finally:
        scorer.calibration = earlier
    scored = [verdict for verdict in found if verdict.score is not None]
    if not scored:
        raise DataError(f"none of the {len(source):,} {source.kind.name} of {source.title} can be read")
    groups = None if scorer.thresholds_by is None else [str(verdict.group) for verdict in scored]
    names = scorer.class_words() if scorer.thresholds_by == "class" else None
    scores = torch.tensor([verdict.score for verdict in scored], dtype=torch.float64)
    scorer.use_scores(scores, groups, names, tpr, update=update)
    return summary


def _journal(
    place: Path, scorer: Scorer, source: Source[Any], made_with: Mapping[str, Any], runtime: Runtime
) -> Journal:
    settings = {
        **made_with,
        "scorer": scorer.digest(),
        "device": runtime.device,
        "precision": runtime.precision,
        "decoding": DECODING,
        source.kind.name: source_digest(source),
    }
    return Journal(place, settings, runtime.batch_size)


def _scored(
    scorer: Scorer,
    source: Source[Any],
    batches: Sequence[int],
    runtime: Runtime,
    summary: ScoringSummary,
    engine: FeatureEngine | None,
) -> Generator[tuple[int, list[ItemVerdict]]]:
    """Yield number and verdicts of some batches, in any order; count and time them."""
    began = time.perf_counter()
    if runtime.cluster is not None:
        for number, verdicts in runtime.cluster.score(scorer, source, batches, runtime=runtime):
            summary.computed += len(verdicts)
            yield number, verdicts
    elif batches:
        part = source
        if len(batches) < -(-len(source) // runtime.batch_size):
            rows = [row for number in batches for row in rows_of(number, runtime.batch_size, len(source))]
            part = SlicedSource(source, rows, source.title)
        with _ModelClock(scorer.model) as clock:
            for number, verdicts in zip(batches, scorer.stream(part, runtime=runtime, engine=engine), strict=True):
                summary.computed += len(verdicts)
                yield number, verdicts
        summary.model_seconds = clock.seconds + (0.0 if engine is None else engine.seconds)
    summary.seconds = time.perf_counter() - began


class _ModelClock:
    """Measures how long a model works, by hooks that it removes again."""

    def __init__(self, model: nn.Module) -> None:
        self.seconds = 0.0
        self._model = model
        self._began = 0.0

    def __enter__(self) -> "_ModelClock":
        self._hooks = [
            self._model.register_forward_pre_hook(self._start),
            self._model.register_forward_hook(self._stop),
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _start(self, *_: object) -> None:
        self._began = time.perf_counter()

    def _stop(self, *_: object) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds += time.perf_counter() - self._began


def _write_page(
    path: Path, scorer: Scorer, source: Source[Any], summary: ScoringSummary, runtime: Runtime
) -> None:
    from featnorm.report.scores import write_scores_page

    calibration = scorer.calibration
    assert calibration is not None
    lowest = summary.lowest
    shown = [item for item in lowest if item[1].is_id is False]
    shown += [item for item in lowest if item[1].is_id][:_OTHERS]
    write_scores_page(
        path,
        kind=source.kind,
        title=source.title,
        summary=f"{summary} {scorer.detector!r} is calibrated to flag at most "
        f"{100 * (1 - calibration.tpr):.1f} % of in-distribution {source.kind.name}.",
        facts={**scorer.facts, "date": date.today().isoformat()},
        calibration_scores=calibration.scores.cpu().numpy(),
        scores=np.asarray(summary.scores, np.float64),
        threshold=float(calibration.threshold),
        flagged=summary.flagged,
        folders=summary.folders,
        shown=_shown(scorer, source, shown, runtime),
        unread=summary.first_unread,
        unread_count=summary.unread,
    )


def _shown(
    scorer: Scorer, source: Source[Any], chosen: Sequence[tuple[int, ItemVerdict]], runtime: Runtime
) -> "Iterator[ScoredItem]":
    """Yield the items with their explanations; few at a time, as they may be large."""
    from featnorm.report.explanation import grayscale
    from featnorm.report.scores import ScoredItem

    preprocess = scorer.require_preprocess()
    for start in range(0, len(chosen), _EXPLAINED_BATCH):
        part = chosen[start : start + _EXPLAINED_BATCH]
        items: dict[int, Any] = {}
        for row, _ in part:
            # A file that was removed meanwhile costs its picture, not the page.
            with suppress(ItemError):
                items[row] = source.item(row)
        whys: dict[int, Why | None] = {}
        inputs: dict[int, npt.NDArray[np.float32]] = {}
        if items and scorer.explains:
            batch = source.kind.collate([preprocess(item) for item in items.values()], preprocess)
            names, rows = [source.name(row) for row in items], range(len(items))
            given = scorer.thresholds_by not in (None, "class")
            groups = [str(verdict.group) for row, verdict in part if row in items] if given else None
            verdicts = scorer.predict_batch(batch, names, groups=groups, explain=rows, heat=True, runtime=runtime)
            whys = {row: verdict.why for row, verdict in zip(items, verdicts, strict=True)}
            if isinstance(batch, Tensor) and batch.ndim == 4:
                inputs = dict(zip(items, grayscale(batch, preprocess), strict=True))
        for row, verdict in part:
            # In another batch a score may differ in its last digits: the page shows the one of the table.
            verdict = verdict._replace(why=whys.get(row))
            shown = source.kind.shown(items[row]) if row in items else None
            yield ScoredItem(verdict, folder_of(verdict.item), shown, inputs.get(row))
