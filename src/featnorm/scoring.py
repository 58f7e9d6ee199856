"""`score_source`: verdicts on any number of items, in a table or on a page; an interrupted run is resumed."""

import heapq
import os
import re
import time
from array import array
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, nullcontext, suppress
from dataclasses import replace
from datetime import date
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from featnorm._utils.files import replacing
from featnorm._utils.progress import progress_bar
from featnorm.calibration import Calibration
from featnorm.engine import FeatureEngine
from featnorm.inputs import DataError, ItemError, Kind, SlicedSource, Source
from featnorm.inputs.decoding import DECODING
from featnorm.inputs.kinds import IMAGES
from featnorm.inputs.loading import rows_of
from featnorm.parts import PartCalibration, drawn_parts
from featnorm.records import CLIP_COLUMNS, FORMATS, Journal, kept_columns, source_digest, word_of, write_table
from featnorm.runtime import Runtime
from featnorm.scorer import Scorer
from featnorm.verdict import ItemVerdict, Verdict

if TYPE_CHECKING:
    # Imported where a page is drawn, because matplotlib takes half a second.
    from featnorm.hidden import Why
    from featnorm.report.scores import ScoredItem

MAX_SHOWN = 100  # items on the page
_OTHERS = 5  # items on the page that are not flagged, those with the lowest scores
_EXPLAINED_BATCH = 16
_ON_CLIPS = "calibrate it on clips (featnorm calibrate SCORER CLIPS)"
_MAX_STEM = 80  # characters of a picture's name that are those of the image's
# The end of the name of an item of a table or a data set.
_ROW = re.compile(r"(^|:? )(row|image) \d+$| (at|after) \d+\.\d{3} s$")


class ClipVerdict(NamedTuple):
    """Prediction of a `Scorer` for a clip.

    Attributes
    ----------
    clip : str
        Name of the clip.
    score : float or None
        Mean of the lowest scores of its frames, see `featnorm.parts.unit_scores`; None if no frame can be read.
    p_value : float or None
        Conformal p-value, small for OOD.
    is_id : bool or None
        Whether the score is at or above the threshold of clips.
    frames, flagged, unreadable : int
        Number of frames that were scored, that were flagged, and that could not be read.
    """

    clip: str
    score: float | None
    p_value: float | None
    is_id: bool | None
    frames: int
    flagged: int
    unreadable: int


class ScoringSummary:
    """Counts of a scoring run, and its lowest scores.

    Parameters
    ----------
    kind : Kind
        What the items are.
    clip_of : callable, optional
        Returns the clip of an item by its row, see `Source.unit`. Default: there are no clips.

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
    clips : list of ClipVerdict
        Verdicts on the clips of frames, lowest p-value first, if the scorer is calibrated on clips.
    computed : int
        Number of items scored by this run; an earlier run that was interrupted scored the others.
    seconds : float
        Time this run took to score them.
    model_seconds : float or None
        Time the model itself took; None on a cluster.

    Examples
    --------
    >>> from featnorm.inputs import open_source
    >>> np.save("new.npy", np.random.rand(10, 16))
    >>> summary = score_source(fit(torch.rand(200, 16)), open_source("new.npy"))
    >>> len(summary.scores), summary.flagged <= 10
    (10, True)
    """

    def __init__(self, kind: Kind = IMAGES, clip_of: Callable[[int], str | None] | None = None) -> None:
        self.kind = kind
        self._clip_of = clip_of
        self._frames: dict[str, _Frames] = {}
        self.scores = array("d")
        self.flagged = 0
        self.unread = 0
        self.first_unread: list[tuple[str, str]] = []
        self.several = 0
        self.folders: dict[str, list[int]] = {}
        self.clips: list[ClipVerdict] = []
        self.computed = 0
        self.seconds = 0.0
        self.model_seconds: float | None = None
        self._rows = 0
        # A heap of the lowest scores, the highest of them on top; among equal ones the first items stay.
        self._lowest: list[tuple[float, int, ItemVerdict]] = []

    def update(self, verdicts: Iterable[ItemVerdict], start: int | None = None) -> None:
        """Count the verdicts on items from row ``start`` on. Default: the next items."""
        self._rows = self._rows if start is None else start
        for verdict in verdicts:
            row = self._rows
            self._rows += 1
            if self._clip_of is not None and (clip := self._clip_of(row)) is not None:
                self._frames.setdefault(clip, _Frames()).update(verdict)
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

    def frame_scores(self) -> tuple[Tensor, Tensor]:
        """Return the scores of all frames (n,), clip by clip, and the index of the clip of each (n,)."""
        frames = [one.scores for one in self._frames.values()]
        owners = torch.arange(len(frames)).repeat_interleave(torch.tensor([*map(len, frames)]))
        return torch.from_numpy(np.concatenate([np.empty(0), *frames], dtype=np.float64)), owners

    def predict_clips(self, calibration: PartCalibration) -> None:
        """Set `clips`, by a calibration on clips."""
        device = calibration.scores.device
        scores, owners = (values.to(device) for values in self.frame_scores())
        verdict: Any = calibration.predict_units(scores, owners, len(self._frames))[:3]
        columns = (self._frames.items(), *(values.tolist() for values in verdict))
        for (name, one), *predicted in zip(*columns, strict=True):
            score, p_value, is_id = predicted if one.scores else (None, None, None)
            counts = len(one.scores), one.flagged, one.unreadable
            self.clips.append(ClipVerdict(name, score, p_value, is_id, *counts))
        self.clips.sort(key=lambda clip: 1.0 if clip.p_value is None else clip.p_value)

    def __str__(self) -> str:
        scored = len(self.scores)
        share = f"{100 * self.flagged / scored:.1f} %" if scored else "none could be read"
        return f"{self.flagged:,} of {self.kind.counted(scored)} flagged as OOD ({share})."


class _Frames:
    """The frames of a clip."""

    def __init__(self) -> None:
        self.scores = array("d")
        self.flagged = self.unreadable = 0

    def update(self, verdict: ItemVerdict) -> None:
        if verdict.score is None:
            self.unreadable += 1
        else:
            self.scores.append(verdict.score)
            self.flagged += verdict.is_id is False


def folder_of(item: str) -> str:
    """Return the folder of an item by its name; of a row, the table; of a frame, the clip; or an empty string."""
    if (row := _ROW.search(item)) is not None:
        return item[: row.start()]
    return item[: max(item.rfind("/"), item.rfind(os.sep)) + 1].rstrip("/" + os.sep)


def score_source(
    scorer: Scorer,
    source: Source[Any],
    out: str | Path | None = None,
    *,
    page: str | Path | None = None,
    clips: str | Path | None = None,
    maps: str | Path | None = None,
    keep: str | Sequence[str] = (),
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
    clips
        Table to write with one row per clip, with the columns of `featnorm.records.CLIP_COLUMNS`. The source holds
        frames, and the scorer is calibrated on clips.
    maps
        Folder for one picture per image, for a scorer per position or box: the image beside the map of its
        positions, see `featnorm.report.maps.map_picture`, or with its boxes, see
        `featnorm.report.boxes.draw_boxes`.
    keep : name or names of columns of the source, if it is a table, to copy to ``out`` after the others.
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
        The name of a file has a wrong ending, a column to keep has the name of another one, a page is requested
        and the scorer is not calibrated, a table of clips is requested and it is not calibrated on clips, maps are
        requested and it scores whole inputs, another process is writing the file, or an output of the model is not
        finite.
    DataError
        The transform fails on an item, or the source holds items of another kind, or lacks a column to keep.
    OSError
        A file cannot be written. The journal is kept.

    Examples
    --------
    >>> from featnorm.inputs import open_source
    >>> np.save("new.npy", np.random.rand(10, 16))
    >>> summary = score_source(fit(torch.rand(200, 16)), open_source("new.npy"), "scores.csv")
    >>> len(summary.scores), summary.unread
    (10, 0)
    """
    out, page, clips = (None if file is None else Path(file) for file in (out, page, clips))
    for table in (out, clips):
        if table is not None and table.suffix not in FORMATS:
            raise ValueError(f"{table} must end in {', '.join(FORMATS[:-1])} or {FORMATS[-1]}")
    if page is not None and page.suffix != ".html":
        raise ValueError(f"{page} must end in .html")
    if page is not None and scorer.calibration is None:
        raise ValueError("the scorer is not calibrated: a page has no calibration scores to compare others with")
    if maps is not None:
        if scorer.per == "input":
            raise ValueError(
                "the scorer scores whole inputs, so there are no maps: fit with --per position or box"
            )
        maps = Path(maps)
        maps.mkdir(parents=True, exist_ok=True)
        made_with = {**(made_with or {}), "maps": str(maps)}
    runtime = runtime or Runtime(scorer.tap.device.type)
    if runtime.cluster is None and scorer.tap.device.type != runtime.torch_device.type:
        scorer.to(runtime.torch_device)
    place = out or page or clips
    source.require(scorer.kind, "this scorer", scorer.preprocess)
    if source.fps is not None and scorer.per != "input":
        raise DataError(
            f"{source.title} holds videos, whose frames a scorer per {scorer.per} does not take: pass images"
        )
    if clips is not None and source.fps is None:
        raise ValueError(
            f"{source.title} holds {source.kind.name}, not videos: it has no clips to write to {clips}"
        )
    if clips is not None and not isinstance(scorer.calibration, PartCalibration):
        raise ValueError(f"the scorer is not calibrated on clips, so that it has no verdicts on them: {_ON_CLIPS}")
    kept = kept_columns(source, keep)
    summary = ScoringSummary(source.kind, None if source.fps is None else source.unit)
    engine = scorer.engine(runtime, len(source))
    made_with = {**(made_with or {}), **({} if engine is None else {"engine": "onnx"})}
    with nullcontext() if place is None else _journal(place, scorer, source, made_with, runtime) as journal:
        if journal is not None and on_start is not None:
            on_start(journal)
        size = runtime.batch_of(source.kind)
        total = -(-len(source) // size)
        numbers = range(total) if journal is None else journal.missing(total)
        done = 0 if journal is None else journal.done
        # Without a file, the caller prints the verdicts as they come, which shows the progress.
        progress = False if journal is None else runtime.progress
        with (
            progress_bar(total=len(source), initial=done, unit=source.kind.noun, progress=progress) as bar,
            closing(_scored(scorer, source, numbers, runtime, summary, engine)) as batches,
        ):
            for number, verdicts in batches:
                if maps is not None:
                    # Before the batch counts as done, so that an interrupted run leaves no picture out.
                    _draw_maps(maps, scorer, source, number * size, verdicts)
                if journal is None:
                    summary.update(verdicts, number * size)
                else:
                    journal.add(number, verdicts)
                if on_batch is not None:
                    on_batch(verdicts)
                bar.update(len(verdicts))
        if journal is not None:
            summary.update(journal)
        if isinstance(scorer.calibration, PartCalibration) and source.fps is not None:
            summary.predict_clips(scorer.calibration)
        if journal is None:
            return summary
        if out is not None:
            journal.write(out, source, scorer.per, kept)
        if clips is not None:
            rows = (clip._asdict() | {"verdict": word_of(clip.is_id)} for clip in summary.clips)
            write_table(clips, ({name: row[name] for name in CLIP_COLUMNS} for row in rows), CLIP_COLUMNS)
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
    if source.fps is not None:
        if scorer.thresholds_by is not None:
            raise ValueError(f"this scorer has thresholds by {scorer.thresholds_by!r}, which frames cannot have")
        if update and not scorer.unit_count:
            raise ValueError("the earlier calibration is of independent inputs: omit update (--update)")
    before = scorer.unit_count if update else 0
    found: list[ItemVerdict] = []
    parts: list[tuple[Tensor, Tensor, Tensor]] = []

    def keep(verdicts: Sequence[ItemVerdict]) -> None:
        if scorer.per == "input":
            found.extend(verdicts)
            return
        scores = [verdict.parts.score for verdict in verdicts if verdict.parts is not None]
        if any(map(len, scores)):
            owners = torch.arange(len(scores)).repeat_interleave(torch.tensor([*map(len, scores)]))
            drawn_before = before + sum(len(of_units) for _, _, of_units in parts)
            parts.append(drawn_parts(torch.cat(scores), owners, scorer.lowest, drawn_before))

    earlier, scorer.calibration = scorer.calibration, None
    try:
        summary = score_source(scorer, source, runtime=runtime, on_batch=keep)
    finally:
        scorer.calibration = earlier
    if not summary.scores:
        raise DataError(f"none of the {len(source):,} {source.kind.name} of {source.title} can be read")
    if source.fps is not None:
        scorer.use_parts(drawn_parts(*summary.frame_scores(), scorer.lowest, before), tpr, update=update)
        return summary
    if scorer.per != "input":
        if not parts:
            raise DataError(f"there is no {scorer.per} in the {source.kind.name} of {source.title}")
        starts = torch.tensor([0, *(len(of_units) for _, _, of_units in parts)]).cumsum(0).tolist()
        scores, owners, of_units = map(torch.cat, zip(*parts, strict=True))
        owners = torch.cat([owner + start for (_, owner, _), start in zip(parts, starts, strict=False)])
        scorer.use_parts((scores, owners, of_units), tpr, update=update)
        return summary
    scored = [verdict for verdict in found if verdict.score is not None]
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
    return Journal(place, settings, runtime.batch_of(source.kind))


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
        # This process has already built the engine, so an actor that cannot build it raises an error.
        there = replace(runtime, engine="torch" if engine is None else "onnx")
        for number, verdicts in runtime.cluster.score(scorer, source, batches, runtime=there):
            summary.computed += len(verdicts)
            yield number, verdicts
    elif batches:
        part = source
        size = runtime.batch_of(source.kind)
        if len(batches) < -(-len(source) // size):
            rows = [row for number in batches for row in rows_of(number, size, len(source))]
            part = SlicedSource(source, rows, source.title)
        before = 0.0 if engine is None else engine.seconds
        with _ModelClock(scorer.model) as clock:
            for number, verdicts in zip(batches, scorer.stream(part, runtime=runtime, engine=engine), strict=True):
                summary.computed += len(verdicts)
                yield number, verdicts
        summary.model_seconds = clock.seconds + (0.0 if engine is None else engine.seconds - before)
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


def _draw_maps(
    folder: Path, scorer: Scorer, source: Source[Any], start: int, verdicts: Sequence[ItemVerdict]
) -> None:
    """Write one picture per image, whose name begins with its row."""
    from featnorm.report.boxes import draw_boxes
    from featnorm.report.explanation import image_of, visible
    from featnorm.report.maps import map_picture

    preprocess = scorer.require_preprocess()
    for row, verdict in enumerate(verdicts, start):
        if verdict.parts is not None:
            with suppress(ItemError):  # a file that was removed meanwhile costs its picture
                pixels = visible(preprocess(source.item(row))[None], preprocess)[0]
                if verdict.boxes is None:
                    picture = map_picture(pixels, verdict.parts)
                else:
                    picture = draw_boxes(image_of(pixels), verdict.boxes)
                stem = re.sub(r"[^\w.-]+", "-", PurePath(re.split(r"[/\\]", verdict.item)[-1]).stem)[-_MAX_STEM:]
                with replacing(folder / f"{row:06}-{stem}.png") as temporary:
                    picture.save(temporary, "PNG")


def _write_page(
    path: Path, scorer: Scorer, source: Source[Any], summary: ScoringSummary, runtime: Runtime
) -> None:
    from featnorm.report.scores import write_scores_page

    calibration = scorer.item_calibration
    assert calibration is not None
    bounds = ""
    if isinstance(calibration, Calibration) and not calibration.group_names and not scorer.is_jackknife:
        low, high = calibration.false_alarm_range()
        bounds = (
            f", averaged over calibration sets; with this one, between {100 * low:.1f} % and {100 * high:.1f} % "
            "(90 % confidence)"
        )
    lowest = summary.lowest
    shown = [item for item in lowest if item[1].is_id is False]
    shown += [item for item in lowest if item[1].is_id][:_OTHERS]
    write_scores_page(
        path,
        kind=source.kind,
        title=source.title,
        summary=_in_words(scorer, summary),
        detail=f"{summary}{_of_clips(summary)} {scorer.detector!r} is calibrated to flag at most "
        f"{100 * (1 - calibration.tpr):.1f} % of in-distribution {source.kind.name}{bounds}. The smaller the "
        f"p-value of {source.kind.one}, the fewer of the calibration {source.kind.name} score as low.",
        facts={**scorer.facts, "date": date.today().isoformat()},
        calibration_scores=calibration.scores.cpu().numpy(),
        # An image without boxes has an infinite score.
        scores=np.asarray([score for score in summary.scores if score < np.inf], np.float64),
        threshold=float(calibration.threshold),
        flagged=summary.flagged,
        folders=summary.folders,
        clips=None
        if source.fps is None
        else {clip.clip: (clip.p_value, word_of(clip.is_id) or "") for clip in summary.clips},
        shown=_shown(scorer, source, shown, runtime),
        unread=summary.first_unread,
        unread_count=summary.unread,
    )


def _in_words(scorer: Scorer, summary: ScoringSummary) -> str:
    """Return how many items are flagged, and how many of those like the fitted ones are, without terms."""
    calibration, kind = scorer.item_calibration, summary.kind
    assert calibration is not None
    rate = 1 - calibration.tpr
    alarms = f"1 in {round(1 / rate):,}" if rate < 0.3 else f"{100 * rate:.0f} %"
    looks = "looks" if summary.flagged == 1 else "look"
    return (
        f"{summary.flagged:,} of {kind.counted(len(summary.scores))} {looks} unlike yours (flagged as "
        f"out-of-distribution, OOD). Of {kind.name} like yours, about {alarms} is flagged by mistake."
    )


def _of_clips(summary: ScoringSummary) -> str:
    """Return how many clips are flagged, as a sentence after the one on frames."""
    judged = [clip for clip in summary.clips if clip.p_value is not None]
    if not judged:
        return ""
    flagged = sum(clip.is_id is False for clip in judged)
    return f" {flagged:,} of {len(judged):,} clip{'s' * (len(judged) > 1)} flagged as OOD."


def _shown(
    scorer: Scorer, source: Source[Any], chosen: Sequence[tuple[int, ItemVerdict]], runtime: Runtime
) -> "Iterator[ScoredItem]":
    """Yield the items with their explanations; few at a time, as they may be large."""
    from featnorm.report.boxes import draw_boxes
    from featnorm.report.explanation import grayscale, image_of, visible
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
        maps: dict[int, Verdict | None] = {}
        if items and scorer.per == "position":
            batch = source.kind.collate([preprocess(item) for item in items.values()], preprocess)
            verdicts = scorer.predict_batch(batch, [source.name(row) for row in items], runtime=runtime)
            maps = {row: verdict.parts for row, verdict in zip(items, verdicts, strict=True)}
        elif items and scorer.explains:
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
            if shown is not None and verdict.boxes is not None:
                pixels = visible(preprocess(items[row])[None], preprocess)[0]
                shown = draw_boxes(image_of(pixels), verdict.boxes)
            yield ScoredItem(verdict, folder_of(verdict.item), shown, inputs.get(row), maps.get(row))
