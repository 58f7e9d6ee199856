"""``featnorm score``: the verdicts of a fitted detector on images or texts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from featnorm.cli.console import (
    console,
    counted,
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
    Engine,
    KeptColumns,
    OwnModel,
    OwnWeights,
    Precision,
    Ray,
    ScoredFps,
    ScoredTextColumn,
    ScorerFile,
    Tpr,
    Workers,
    open_for,
)

MAX_CLIPS_SHOWN = 20
MAX_TEXT_SHOWN = 80

if TYPE_CHECKING:
    from featnorm.inputs import Source
    from featnorm.records import Journal
    from featnorm.runtime import Runtime
    from featnorm.scorer import Scorer
    from featnorm.scoring import ScoringSummary
    from featnorm.verdict import BoxVerdict, ItemVerdict


def score(
    scorer_file: ScorerFile,
    data: Annotated[list[str], typer.Argument(metavar="DATA...", help=f"Image files, or {DATA}.")],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            metavar="FILE",
            help="Output file (.csv, .jsonl or .parquet), one row per item, or per box. Default: print to the "
            "terminal.",
        ),
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="HTML page to write: the flagged items, each beside the most similar in-distribution ones, for "
            "images a heat map of where the score comes from, and the calibration scores.",
        ),
    ] = None,
    maps: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Folder for one picture per image, if the detector was fitted with `--per position` or `box`: "
            "the image beside the map of its p-values, with the flagged positions outlined, or with its boxes.",
        ),
    ] = None,
    model: OwnModel = None,
    weights: OwnWeights = None,
    text_column: ScoredTextColumn = None,
    keep: KeptColumns = None,
    clips: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Output file for videos (.csv, .jsonl or .parquet), one row per clip, for a SCORER that is "
            "calibrated on clips. The verdict on a clip accounts for the dependence of its frames.",
        ),
    ] = None,
    fps: ScoredFps = None,
    tpr: Tpr = None,
    data_root: DataRoot = None,
    device: Device = "auto",
    precision: Precision = "32-true",
    engine: Engine = "auto",
    batch_size: BatchSize = None,
    workers: Workers = None,
    ray: Ray = False,
) -> None:
    """Score images, videos or texts: score, p-value, verdict (ID or OOD) and predicted class, one row per item.

    Of a video, each frame that is read is an item, with its time in seconds, and the clips have verdicts of their
    own. With `--out` or `--html`, rerun the same command to resume after an interruption.
    """
    files = [file for file in (out, html, clips) if file is not None]
    for file in files:
        require_file_place(file, [scorer_file, *map(Path, data)])
    if keep and out is None:
        raise ValueError("--keep copies columns to the file of --out: pass --out FILE")
    from featnorm.cli.runtime import runtime_of
    from featnorm.inputs import TEXTS, DataError
    from featnorm.scorer_file import load
    from featnorm.scoring import score_source

    scorer = load(scorer_file, model, weights=weights)
    if tpr is not None:
        scorer.set_tpr(tpr)
    how: dict[str, Any] = {"root": data_root, "text_column": text_column, "fps": fps}
    source = open_for(scorer.facts, *data, mix_splits=True, **how)
    fitted_in = scorer.facts.get("precision", precision)
    if fitted_in != precision:
        console.print(
            f"the detector was fitted in {fitted_in}: scores in {precision} differ slightly", style="dim"
        )
    texts: dict[str, int] = {}
    if not files:
        names = [source.name(i) for i in range(len(source))] if source.kind is TEXTS else []
        # Files with the same name in different folders have rows with the same name.
        counts = Counter(names)
        texts = {name: i for i, name in enumerate(names) if counts[name] == 1}
        console.print(f"{'score':>10}  {'p-value':>8}  {'verdict':7}  {source.kind.noun}")
    with runtime_of(device, precision, batch_size, workers, ray=ray, engine=engine) as runtime:
        summary = score_source(
            scorer,
            source,
            out,
            page=html,
            clips=clips,
            maps=maps,
            keep=[name for names in keep or () for name in names.split(",")],
            made_with={"model": model, "weights": str(weights)},
            runtime=runtime,
            on_start=lambda journal: _print_start(journal, source),
            on_batch=None if files else partial(_print_batch, source=source, rows=texts),
        )
    print_skipped(source.title, source.kind, summary.first_unread, summary.unread)
    print_reading(source.kind, len(summary.scores), summary.unread, summary.several, source.passed_over)
    if summary.scores:
        console.print(str(summary))
        _print_clips(scorer, source, summary)
        if summary.computed:
            console.print(_pace(summary, runtime))
    for place in (*files, *([] if maps is None else [maps])):
        console.print(f"Wrote {place}.", soft_wrap=True)
    if not summary.scores:
        name, why = summary.first_unread[0]
        raise DataError(
            f"none of the {summary.unread:,} {source.kind.name} could be read; the first is {printable(name)}: "
            f"{why}"
        )


def _print_clips(scorer: Scorer, source: Source[Any], summary: ScoringSummary) -> None:
    """Print the verdicts on the clips with the lowest p-values."""
    if source.fps is None:
        return
    if not summary.clips:
        console.print(
            "There are no verdicts on clips, because the scorer is not calibrated on clips (featnorm calibrate).",
            soft_wrap=True,
        )
        return
    from featnorm.records import word_of

    unread = sum(clip.p_value is None for clip in summary.clips)
    flagged = sum(clip.is_id is False for clip in summary.clips)
    others = f" {counted(unread, 'clip')} could not be read." if unread else ""
    console.print(f"{flagged:,} of {counted(len(summary.clips) - unread, 'clip')} flagged as OOD.{others}")
    for clip in summary.clips[:MAX_CLIPS_SHOWN]:
        if clip.p_value is None:
            continue
        frames = f"{clip.flagged} of {counted(clip.frames, 'frame')} flagged"
        numbers = f"{clip.score:10.4g}  {clip.p_value:8.4f}  {word_of(clip.is_id):7}"
        console.print(f"{numbers}  {printable(clip.clip)}  ({frames})", soft_wrap=True)
    if len(summary.clips) > MAX_CLIPS_SHOWN:
        console.print("... (--clips FILE writes all)")


def _pace(summary: ScoringSummary, runtime: Runtime) -> str:
    if summary.model_seconds is not None:
        where = f"{summary.model_seconds / summary.seconds:.0%} of the time in the model"
    else:
        where = f"on at most {runtime.cluster.actors.count} actors ({runtime.cluster.actors.device})"
    return f"{summary.computed / summary.seconds:.0f} {summary.kind.name} per second, {where}."


def _print_start(journal: Journal, source: Source[Any]) -> None:
    items = source.kind.name
    if journal.restarted:
        console.print(f"the previous run used different {items}, detector or options; starting over", style="dim")
    if journal.damaged is not None:
        console.print(
            f"line {journal.damaged} of {journal.path} is damaged: scoring the {items} from there on again",
            style="dim",
            soft_wrap=True,
        )
    if journal.done:
        console.print(f"resuming after {journal.done:,} of {source.kind.counted(len(source))}", style="dim")


def _print_batch(verdicts: Sequence[ItemVerdict], source: Source[Any], rows: Mapping[str, int]) -> None:
    """Print verdicts, and the beginnings of texts, whose rows are given by their names if those are unique."""
    for verdict in verdicts:
        if verdict.score is None:
            continue
        words = "" if verdict.predicted is None else f"  ({verdict.predicted})"
        if verdict.item in rows:
            text = " ".join(source.item(rows[verdict.item]).split())
            words += f"  {text if len(text) <= MAX_TEXT_SHOWN else text[: MAX_TEXT_SHOWN - 1] + '…'}"
        _print_verdict(verdict, printable(f"{verdict.item}{words}"))
        for box in verdict.boxes or ():
            corners = ", ".join(f"{corner:.0f}" for corner in box.corners)
            _print_verdict(box, f"  box ({corners}), {printable(box.label)} with confidence {box.confidence:.2f}")


def _print_verdict(verdict: ItemVerdict | BoxVerdict, words: str) -> None:
    from featnorm.records import word_of

    word = word_of(verdict.is_id) or ""
    p_value = "" if verdict.p_value is None else f"{verdict.p_value:.4f}"
    console.print(f"{verdict.score:10.4g}  {p_value:>8}  {word:7}  {words}", soft_wrap=True)
