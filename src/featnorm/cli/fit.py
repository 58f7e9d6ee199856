"""``featnorm fit``: fit a detector to the user's own images and save it to a file."""

import shlex
import time
from dataclasses import dataclass
from pathlib import Path
from typing import cast, get_args

from featnorm.cli.machine import runtime_of
from featnorm.cli.show import (
    console,
    counted,
    print_label_columns,
    print_reading,
    print_skipped,
    printable,
    require_file_place,
)
from featnorm.detectors import parse_detector
from featnorm.fitting import Targets, fit_images
from featnorm.inputs import ImageSource, open_images
from featnorm.models import create_model
from featnorm.models.loading import is_users

_CLUSTERS = "clusters of the features are used in place of classes"


@dataclass(frozen=True)
class Options:
    """The command's options."""

    data: str
    out: Path
    model: str
    weights: Path | None
    detector: str
    targets: str
    tpr: float
    cache: Path | None
    label_column: str | None
    data_root: Path | None
    device: str
    precision: str
    batch_size: int
    workers: int | None
    ray: bool
    seed: int


def run(options: Options) -> None:
    """Fit the detector, write the file, and print a summary and the next command."""
    if options.targets not in get_args(Targets):
        raise ValueError(f"--targets must be one of {', '.join(get_args(Targets))}, got {options.targets}")
    require_file_place(options.out, [Path(options.data)])
    began = time.perf_counter()
    detector = parse_detector(options.detector)
    source = open_images(
        options.data,
        root=options.data_root,
        labels=options.targets != "clusters" or options.label_column is not None,
        label_column=options.label_column,
    )
    loaded = create_model(options.model, weights=options.weights)
    console.print(f"{counted(len(source), 'image')} in {source.title}; backbone: {loaded.name}.", soft_wrap=True)
    _print_missing_labels(source, options.targets)
    with runtime_of(
        options.device, options.precision, options.batch_size, options.workers, ray=options.ray
    ) as runtime:
        fitted = fit_images(
            source,
            loaded,
            detector=detector,
            targets=cast(Targets, options.targets),
            tpr=options.tpr,
            cache=options.cache,
            seed=options.seed,
            runtime=runtime,
        )
    try:
        fitted.scorer.save(options.out)
    except OSError as error:
        raise OSError(f"{error}. The features are cached: rerun the same command to resume from them") from None
    print_skipped(source.title, fitted.corrupt)
    unread = len(fitted.corrupt)
    print_reading(len(source) - unread, unread, fitted.several, source.passed_over)
    facts = fitted.scorer.facts
    if fitted.changed:
        changed = counted(fitted.changed, "image")
        console.print(f"{changed} changed while being read: the later content was used.")
    if fitted.damaged:
        damaged = counted(fitted.damaged, "damaged batch", "damaged batches")
        them = "it" if fitted.damaged == 1 else "them"
        console.print(f"Removed {damaged} from the feature cache and recomputed {them}.")
    if fitted.computed:
        console.print(
            f"Computed the features of {counted(fitted.computed, 'image')}; the next fit on them takes seconds."
        )
    else:
        console.print("The features of all images were in the cache.")
    accuracy = (
        ""
        if fitted.accuracy is None
        else f"; its accuracy on the held-out images is {100 * fitted.accuracy:.1f} %"
    )
    console.print(f"Backbone: {facts['backbone']}.", soft_wrap=True)
    console.print(f"The head is {facts['head']}{accuracy}.", soft_wrap=True)
    calibration = fitted.scorer.scorer.calibration
    assert calibration is not None
    low, high = calibration.false_alarm_range()
    console.print(
        f"{detector!r} is calibrated on {fitted.held_out} held-out images. On average over such calibration sets "
        f"it flags at most {100 * (1 - options.tpr):.1f} % of images like these; for this one, between "
        f"{100 * low:.1f} % and {100 * high:.1f} % (90 % confidence).",
        soft_wrap=True,
    )
    size = options.out.stat().st_size / 1e6
    console.print(
        f"Wrote {options.out} ({size:.1f} MB) in {time.perf_counter() - began:.0f} s. Next:", soft_wrap=True
    )
    model = f" --model {options.model}" if is_users(options.model) else ""
    console.print(f"  featnorm score {shlex.quote(str(options.out))} IMAGES{model}", soft_wrap=True)


def _print_missing_labels(source: ImageSource, targets: str) -> None:
    """Print why labels are not used, if there are some or could be."""
    if targets != "auto":
        return
    print_label_columns(source, _CLUSTERS)
    without = [i for i in range(len(source)) if source.label(i) is None]
    if 0 < len(without) < len(source):
        first = printable(source.name(without[0]))
        missing = f"1 image has no label ({first})"
        if len(without) > 1:
            missing = f"{len(without):,} images have no label (the first is {first})"
        console.print(f"{missing}, so {_CLUSTERS}.", soft_wrap=True)
