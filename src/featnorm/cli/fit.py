"""``featnorm fit``: fits a detector to the user's own data, and saves it to a file."""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from featnorm.cli.console import (
    console,
    counted,
    print_label_columns,
    print_reading,
    print_skipped,
    printable,
    rate_words,
    require_file_place,
)
from featnorm.cli.options import (
    DATA,
    FPS,
    BatchSize,
    ChannelAxis,
    DataRoot,
    Device,
    Engine,
    Fps,
    LabelColumn,
    Layer,
    LayerPooling,
    OutFile,
    PerPart,
    Precision,
    Ray,
    Seed,
    TextColumn,
    Weights,
    Workers,
)

if TYPE_CHECKING:
    from featnorm.fitting import FitReport
    from featnorm.inputs import Source
    from featnorm.scorer import Scorer

_CLUSTERS = "clusters of the features are used instead of classes"


def fit(
    data: Annotated[str, typer.Argument(metavar="DATA", help=f"In-distribution images, texts or rows: {DATA}.")],
    out: OutFile = Path("detector.featnorm"),
    model: Annotated[
        str | None,
        typer.Option(
            metavar="SPEC",
            help="Model: `MODULE:FUNCTION`, your own function that returns a model and its transform, or "
            "`timm:NAME`, `torchvision:NAME`, `featnorm:NAME` or `hf:FOLDER`. Default: "
            "`featnorm:efficientnet-lite0` for images, `featnorm:minilm` for texts, none for rows.",
        ),
    ] = None,
    weights: Weights = None,
    detector: Annotated[
        str | None,
        typer.Option(
            metavar="EXPR",
            help="Detector expression, such as `NAN` or `KNN(k=50)/NAN`. Default: `KLUniform + KNN(k=10)`, or "
            "`KLUniform` for fewer than 100 items and with `--per`; without a classifier, `KNN(k=10)`, or "
            "`KNN(k=1)` for fewer than 100 items; for tables, KNN with `normalize=False`.",
        ),
    ] = None,
    head: Annotated[
        Literal["auto", "keep", "train", "none"],
        typer.Option(
            help="`keep`: the model's own classifier; `train`: a new head on its frozen features; `none`: the "
            "features alone. `auto`: keep it for a model or weights of your own, otherwise train a head if there "
            "are at least 100 items."
        ),
    ] = "auto",
    layer: Layer = None,
    channel_axis: ChannelAxis = None,
    pooling: LayerPooling = "mean",
    output: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Output of a model with several heads to use as logits: a key, an attribute or a path such as "
            "`heads.0`. Default: the one named `logits`, or the first.",
        ),
    ] = None,
    per: PerPart = "input",
    targets: Annotated[
        Literal["labels", "clusters", "auto"],
        typer.Option(
            help="Targets of the head: `labels`, `clusters` of the features, or `auto`: labels if all "
            "items have one, otherwise clusters."
        ),
    ] = "auto",
    label_column: LabelColumn = None,
    labels: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="File with one label per item of DATA: an array (.npy), a column with its name in the first line "
            "(.csv), or one label per line (.txt). Default: the labels in DATA.",
        ),
    ] = None,
    text_column: TextColumn = None,
    fps: Fps = FPS,
    tpr: Annotated[float, typer.Option(help="Share of in-distribution items to accept.")] = 0.95,
    thresholds_by: Annotated[
        str | None,
        typer.Option(
            metavar="GROUP",
            help="Groups with a threshold each, so that the rate holds in every group: `class` (the predicted "
            "one), `folder`, a column of the table, or a regular expression whose parentheses match the group in "
            "an item's name. Default: one threshold.",
        ),
    ] = None,
    group_by: Annotated[
        str | None,
        typer.Option(
            metavar="GROUP",
            help="Keep items that belong together, such as the frames of a clip, on one side of the split "
            "between fitting and calibration: `folder`, a column of the table, or a regular expression whose "
            "parentheses match the group. Default: only near-duplicates, and the frames of a video, are kept "
            "together.",
        ),
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Folder for cached features. Default: `~/.cache/featnorm/features`."),
    ] = None,
    data_root: DataRoot = None,
    device: Device = "auto",
    precision: Precision = "32-true",
    engine: Engine = "auto",
    batch_size: BatchSize = None,
    workers: Workers = None,
    ray: Ray = False,
    seed: Seed = 0,
    thumbnails: Annotated[
        bool,
        typer.Option(
            help="Store thumbnails (at most 64 x 64 pixels) of up to 512 of the images, or the first 200 "
            "characters of as many texts, to show similar ones on the page of `featnorm score --html`, and to the "
            "clients of `featnorm serve`."
        ),
    ] = True,
) -> None:
    """Fit a detector to images, videos or texts, with your own model or a pretrained one, and save both to a file.

    20 of them are enough. Labels are used if there are any. The features of the model are cached on disk: after an
    interruption, rerun the same command to resume.
    """
    require_file_place(out, [Path(data)])
    from featnorm.cli.runtime import runtime_of
    from featnorm.detectors import parse_detector
    from featnorm.fitting import fit_source, model_for
    from featnorm.inputs import ROWS, TEXTS, source_of
    from featnorm.models.loading import ROWS as ROWS_SPEC
    from featnorm.models.loading import import_users_module, is_users

    began = time.perf_counter()
    # The module of the user's own model may define the detector.
    if model is not None:
        import_users_module(model)
    parsed = None if detector is None else parse_detector(detector)
    source = source_of(
        data,
        labels,
        root=data_root,
        read_labels=targets != "clusters" or label_column is not None,
        label_column=label_column,
        text_column=text_column,
        fps=fps,
    )
    items = source.kind.name
    groups = {"group_by": group_by, "thresholds_by": thresholds_by}
    loaded = model_for(source, model, weights=weights, label_column=label_column, **groups)
    units = source.units()
    of_clips = "" if units is None else f" of {counted(len(set(units)), 'clip')}"
    column = "" if source.text_column is None else f", from column {source.text_column!r}"
    console.print(
        f"{source.kind.counted(len(source))}{of_clips} in {source.title}{column}; model: {loaded.name}.",
        soft_wrap=True,
    )
    _print_missing_labels(source, targets)
    with runtime_of(device, precision, batch_size, workers, ray=ray, engine=engine) as runtime:
        scorer, report = fit_source(
            source,
            loaded,
            detector=parsed,
            head=head,
            layer=layer,
            output=output,
            channel_axis=channel_axis,
            pooling=pooling,
            per=per,
            targets=targets,
            tpr=tpr,
            thresholds_by=thresholds_by,
            group_by=group_by,
            cache=cache,
            seed=seed,
            thumbnails=thumbnails,
            runtime=runtime,
        )
    try:
        scorer.save(out, weights=True)
    except OSError as error:
        raise OSError(f"{error}. The features are cached: rerun the same command to resume from them") from None
    print_skipped(source.title, source.kind, report.corrupt)
    unread = len(report.corrupt)
    print_reading(source.kind, len(source) - unread, unread, report.several, source.passed_over)
    if report.changed:
        changed = source.kind.counted(report.changed)
        console.print(f"{changed} changed while being read: the later content was used.")
    if report.damaged:
        damaged = counted(report.damaged, "damaged batch", "damaged batches")
        them = "it" if report.damaged == 1 else "them"
        console.print(f"Removed {damaged} from the feature cache and recomputed {them}.")
    if report.computed:
        cached = len(source) - unread - report.copies - report.computed
        others = [counted(report.copies, "exact copy", "exact copies")] if report.copies else []
        others += [f"{cached:,} in the cache"] if cached > 0 else []
        console.print(
            f"Computed the features of {source.kind.counted(report.computed)}"
            + (f" (besides {', '.join(others)})" if others else "")
            + "; the next fit on them with this model takes seconds.",
            soft_wrap=True,
        )
    elif loaded.name != ROWS_SPEC:
        console.print(f"The features of all {items} were in the cache.")
    _print_model(scorer, report)
    calibration = scorer.item_calibration
    assert calibration is not None
    how = f"on {report.held_out} held-out {items}{' with boxes' if scorer.per == 'box' else ''}"
    if not (report.head == "train" or scorer.detector.needs_fit):
        how = f"on {report.held_out} of {report.trained} {items}, none of them held out, because it needs no fit"
    if scorer.is_jackknife:
        how = f"by leaving out {report.held_out} of {report.trained} {items} in turn"
    if source.fps is not None:
        how += f" of {scorer.unit_count} clips"
    console.print(
        f"{scorer.detector!r} is calibrated {how}. Averaged over such calibration sets, it flags at most "
        f"{100 * (1 - tpr):.1f} % of {items} like these"
        f"{'' if scorer.is_jackknife else rate_words(calibration, items)}.",
        soft_wrap=True,
    )
    if scorer.per != "input":
        console.print(
            f"It flags at most {100 * (1 - tpr):.1f} % of the {'boxes' if scorer.per == 'box' else 'positions'} "
            f"of such {items}, averaged over {items} and calibration sets.",
            soft_wrap=True,
        )
    if report.head == "keep":
        console.print(
            f"This holds if the model was not trained on these {items}. If it was, fit to {items} that it has not "
            "seen.",
            soft_wrap=True,
        )
    if scorer.examples is not None and scorer.examples.thumbnails is not None:
        previews = "the beginnings" if source.kind in (TEXTS, ROWS) else "thumbnails"
        console.print(
            f"The file contains {previews} of {source.kind.counted(len(scorer.examples.thumbnails))}: "
            "--no-thumbnails leaves them out.",
            soft_wrap=True,
        )
    size = out.stat().st_size / 1e6
    console.print(f"Wrote {out} ({size:.1f} MB) in {time.perf_counter() - began:.0f} s. Next:", soft_wrap=True)
    again = f" --model {model}" if is_users(loaded.name) else ""
    given = items.upper() if source.fps is None else "VIDEOS"
    console.print(f"  featnorm score {shlex.quote(str(out))} {given}{again}", soft_wrap=True)


def _print_model(scorer: Scorer, report: FitReport) -> None:
    """Print how the scorer's model was made, and why."""
    facts = scorer.facts
    where = "model" if report.head == "keep" else "backbone"
    console.print(f"{where.capitalize()}: {facts[where]}.", soft_wrap=True)
    which = "the held-out" if report.head == "train" or scorer.detector.needs_fit else "these"
    accuracy = (
        ""
        if report.accuracy is None
        else f"; its accuracy on {which} {scorer.kind.name} is {100 * report.accuracy:.1f} %"
    )
    why = f" (--head auto: {report.why})" if report.why else ""
    console.print(f"Head: {facts['head']}{accuracy}{why}.", soft_wrap=True)
    for note in report.notes:
        console.print(f"Note: {note}.", soft_wrap=True)


def _print_missing_labels(source: Source[Any], targets: str) -> None:
    """Print why labels are not used, if there are some or could be."""
    if targets != "auto":
        return
    print_label_columns(source, _CLUSTERS)
    without = [i for i in range(len(source)) if source.label(i) is None]
    if 0 < len(without) < len(source):
        first = printable(source.name(without[0]))
        missing = f"1 {source.kind.noun} has no label ({first})"
        if len(without) > 1:
            missing = f"{len(without):,} {source.kind.name} have no label (the first is {first})"
        console.print(f"{missing}, so {_CLUSTERS}.", soft_wrap=True)
