"""``featnorm calibrate``: another rate or other calibration data for a fitted scorer, without fitting it again."""

from pathlib import Path
from typing import Annotated

import typer

from featnorm.cli.console import (
    console,
    counted,
    print_reading,
    print_skipped,
    rate_words,
    require_file_place,
)
from featnorm.cli.options import (
    DATA,
    BatchSize,
    DataRoot,
    Device,
    Engine,
    OutFile,
    OwnModel,
    OwnWeights,
    Precision,
    Ray,
    ScoredFps,
    ScoredTextColumn,
    ScorerFile,
    Workers,
    open_for,
)


def calibrate(
    scorer_file: ScorerFile,
    out: OutFile,
    data: Annotated[
        str | None,
        typer.Argument(
            metavar="[DATA]",
            help=f"In-distribution images, videos or texts that the model was not trained on: {DATA}. Default: "
            "the stored scores.",
        ),
    ] = None,
    tpr: Annotated[
        float | None,
        typer.Option(help="Share of in-distribution items to accept. Default: that of SCORER."),
    ] = None,
    update: Annotated[
        bool, typer.Option("--update", help="Add the items to the earlier calibration items of SCORER.")
    ] = False,
    model: OwnModel = None,
    weights: OwnWeights = None,
    text_column: ScoredTextColumn = None,
    fps: ScoredFps = None,
    data_root: DataRoot = None,
    device: Device = "auto",
    precision: Precision = "32-true",
    engine: Engine = "auto",
    batch_size: BatchSize = None,
    workers: Workers = None,
    ray: Ray = False,
) -> None:
    """Calibrate a fitted scorer again: for another rate, or on other in-distribution data.

    Without DATA the model is not needed, because the calibration scores are in the file.
    """
    require_file_place(out, [scorer_file, *([] if data is None else [Path(data)])])
    from featnorm import archive
    from featnorm.calibration import are_repeats
    from featnorm.inputs import FRAMES, kind_of
    from featnorm.parts import PartCalibration
    from featnorm.scorer_file import load, replace_calibration

    facts: dict[str, str] = {}
    if data is None:
        if tpr is None or update:
            raise ValueError("nothing to calibrate: pass DATA, or another rate with --tpr")
        tensors, header = archive.read(scorer_file)
        stored = archive.calibration(tensors, header, scorer_file)
        if stored is None:
            raise ValueError(f"{scorer_file} is not calibrated: pass DATA")
        calibration = stored.with_tpr(tpr)
        of_clips = isinstance(calibration, PartCalibration) and header["tap"]["per"] == "input"
        kind = FRAMES if of_clips else kind_of(header["scorer"]["kind"])
    else:
        from featnorm.cli.runtime import runtime_of
        from featnorm.scoring import calibrate_source

        scorer = load(scorer_file, model, weights=weights)
        source = open_for(scorer.facts, data, root=data_root, text_column=text_column, fps=fps)
        if source.fps is not None:
            facts["frames per second"] = f"{source.fps:g}"
        earlier = scorer.calibration
        before = () if earlier is None else earlier.group_names
        with runtime_of(device, precision, batch_size, workers, ray=ray, engine=engine) as runtime:
            summary = calibrate_source(scorer, source, tpr, update=update, runtime=runtime)
        print_skipped(source.title, source.kind, summary.first_unread, summary.unread)
        print_reading(source.kind, len(summary.scores), summary.unread, summary.several, source.passed_over)
        assert scorer.calibration is not None
        calibration, kind = scorer.calibration, source.kind
        if gone := [group for group in before if group not in calibration.group_names]:
            console.print(
                f"No {kind.name} of {counted(len(gone), 'group')} of {scorer_file} ({', '.join(gone[:5])}"
                f"{', ...' if len(gone) > 5 else ''}): {kind.name} of {'it' if len(gone) == 1 else 'them'} cannot "
                "be scored with the new file. Use --update to keep them.",
                soft_wrap=True,
            )
        if update and earlier is not None:
            if isinstance(earlier, PartCalibration) and isinstance(calibration, PartCalibration):
                repeated = are_repeats(known := earlier.unit_scores, calibration.unit_scores[len(known) :])
            else:
                repeated = are_repeats(earlier.scores, summary.scores)
            if repeated:
                items = "clips" if kind is FRAMES else kind.name
                console.print(
                    f"Note: all scores of {source.title} were in the calibration already. If these are the same "
                    f"{items}, they count twice now: calibrate without --update.",
                    soft_wrap=True,
                )
        fits = scorer.detector.needs_fit or scorer.head == "train"
        if fits and not update and scorer.facts.get(kind.name, "").startswith(f"{source.title}: "):
            console.print(
                f"Note: {scorer_file} was fitted to {kind.name} of {source.title}. If these are the same, more "
                f"than the stated share of new {kind.name} is flagged: calibrate on others.",
                soft_wrap=True,
            )
    replace_calibration(scorer_file, out, calibration, source=data, added=update, facts=facts)
    units = len(calibration.unit_scores) if isinstance(calibration, PartCalibration) else None
    if units is not None and kind is not FRAMES:
        counts = kind.counted(units)
    else:
        counts = kind.counted(len(calibration.scores)) + ("" if units is None else f" of {units} clips")
    console.print(
        f"Calibrated on {counts}. Averaged over such calibration sets, it flags at "
        f"most {100 * (1 - calibration.tpr):.1f} % of in-distribution {kind.name}"
        f"{rate_words(calibration, kind.name) if calibration.group_names or units is not None else ''}.",
        soft_wrap=True,
    )
    console.print(f"Wrote {out}.", soft_wrap=True)
