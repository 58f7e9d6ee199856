"""``featnorm score``: which images are OOD, by a fitted detector."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from featnorm.cli.machine import runtime_of
from featnorm.cli.show import (
    console,
    counted,
    print_reading,
    print_skipped,
    printable,
    require_file_place,
)
from featnorm.image_scorer import ImageScorer, ImageVerdict
from featnorm.inputs import DataError, open_to_score
from featnorm.records import Journal
from featnorm.runtime import Runtime
from featnorm.scoring import ScoringSummary, score_images


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


def run(options: Options) -> None:
    """Score the images; print or write one row per image, or write a page, and print a summary."""
    files = [file for file in (options.out, options.html) if file is not None]
    for file in files:
        require_file_place(file, [options.detector, *map(Path, options.images)])
    scorer = ImageScorer.load(options.detector, model=options.model)
    source = open_to_score(options.images, root=options.data_root)
    fitted_in = scorer.facts.get("precision", options.precision)
    if fitted_in != options.precision:
        console.print(f"fitted in {fitted_in}: scores in {options.precision} differ slightly", style="dim")
    if not files:
        console.print(f"{'score':>10}  {'p-value':>8}  {'verdict':7}  image")
    with runtime_of(
        options.device, options.precision, options.batch_size, options.workers, ray=options.ray
    ) as runtime:
        summary = score_images(
            scorer,
            source,
            options.out,
            page=options.html,
            made_with={"model": options.model},
            runtime=runtime,
            on_start=lambda journal: _print_start(journal, len(source)),
            on_batch=None if files else _print_batch,
        )
    print_skipped(source.title, summary.first_unread, summary.unread)
    print_reading(len(summary.scores), summary.unread, summary.several, source.passed_over)
    if summary.scores:
        console.print(str(summary))
        if summary.computed:
            console.print(_pace(summary, runtime))
    for file in files:
        console.print(f"Wrote {file}.", soft_wrap=True)
    if not summary.scores:
        name, why = summary.first_unread[0]
        raise DataError(
            f"none of the {summary.unread:,} images could be read; the first is {printable(name)}: {why}"
        )


def _pace(summary: ScoringSummary, runtime: Runtime) -> str:
    if summary.model_seconds is not None:
        where = f"{summary.model_seconds / summary.seconds:.0%} of the time in the model itself"
    else:
        where = f"by at most {runtime.cluster.actors.count} actors of {runtime.cluster.actors.device}"
    return f"{summary.computed / summary.seconds:.0f} images per second, {where}."


def _print_start(journal: Journal, total: int) -> None:
    if journal.restarted:
        console.print("the previous run used different images, detector or options; starting over", style="dim")
    if journal.damaged is not None:
        console.print(
            f"line {journal.damaged} of {journal.path} is damaged: images are scored again from there on",
            style="dim",
            soft_wrap=True,
        )
    if journal.done:
        console.print(f"resuming after {journal.done:,} of {counted(total, 'image')}", style="dim")


def _print_batch(verdicts: Sequence[ImageVerdict]) -> None:
    for verdict in verdicts:
        if verdict.score is None:
            continue
        word = {True: "ID", False: "OOD", None: ""}[verdict.is_id]
        p_value = "" if verdict.p_value is None else f"{verdict.p_value:.4f}"
        predicted = "" if verdict.predicted is None else f"  ({verdict.predicted})"
        name = printable(verdict.name)
        console.print(f"{verdict.score:10.4g}  {p_value:>8}  {word:7}  {name}{predicted}", soft_wrap=True)
