"""``featnorm score``: which images do not belong, by a fitted detector."""

import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from featnorm.cli.evaluate import fabric_of
from featnorm.cli.show import SKIPPED_SHOWN, console, print_skipped, require_file_place
from featnorm.data import ImageSource, SlicedImages, open_to_score
from featnorm.deploy import ImageScorer, ImageVerdict
from featnorm.deploy.records import FORMATS, Journal, images_digest
from featnorm.scorer import Scorer


@dataclass(frozen=True)
class Options:
    """The command's options."""

    detector: Path
    images: list[str]
    out: Path | None
    model: str | None
    data_root: Path | None
    device: str
    precision: str
    batch_size: int
    workers: int | None


class _Tally:
    """What a run amounts to."""

    def __init__(self) -> None:
        self.judged = 0
        self.foreign = 0
        self.unread = 0
        self.first_unread: list[tuple[str, str]] = []

    def add(self, verdict: ImageVerdict) -> None:
        if verdict.error is not None:
            self.unread += 1
            if self.unread <= SKIPPED_SHOWN:
                self.first_unread.append((verdict.name, verdict.error))
            return
        self.judged += 1
        self.foreign += verdict.is_id is False


class _Watch:
    """How long the model itself works, of all the time."""

    def __init__(self, scorer: Scorer) -> None:
        self.seconds = 0.0
        self._began = 0.0
        scorer.register_forward_pre_hook(self._start)
        scorer.register_forward_hook(self._stop)

    def _start(self, *_: object) -> None:
        self._began = time.perf_counter()

    def _stop(self, *_: object) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds += time.perf_counter() - self._began


def run(options: Options) -> None:
    """Judge the images; print or write a row each, and say how fast it went."""
    if options.out is not None and options.out.suffix not in FORMATS:
        raise ValueError(f"--out {options.out} must end in {', '.join(FORMATS)}")
    if options.out is not None:
        require_file_place(options.out, [options.detector, *map(Path, options.images)])
    fabric = fabric_of(options.device, options.precision)
    scorer = ImageScorer.load(options.detector, model=options.model)
    scorer.scorer = fabric.to_device(scorer.scorer)
    source = open_to_score(options.images, root=options.data_root)
    fitted_in = scorer.facts.get("precision", options.precision)
    if fitted_in != options.precision:
        console.print(f"fitted in {fitted_in}: scores in {options.precision} differ a little", style="dim")
    watch = _Watch(scorer.scorer)
    began = time.perf_counter()
    tally = _Tally()

    def stream(images: ImageSource) -> Iterator[list[ImageVerdict]]:
        return scorer.stream(images, batch_size=options.batch_size, workers=options.workers, fabric=fabric)

    judged = _print(stream(source), tally) if options.out is None else _write(stream, source, options, tally)
    seconds = time.perf_counter() - began
    print_skipped(source.title, tally.first_unread, tally.unread)
    console.print(f"{tally.foreign} of {tally.judged} images do not belong ({_share(tally)}).")
    if judged:
        share = watch.seconds / seconds
        console.print(f"{judged / seconds:.0f} images a second, {share:.0%} of the time in the model itself.")
    if options.out is not None:
        console.print(f"Wrote {options.out}.", soft_wrap=True)


def _share(tally: _Tally) -> str:
    return f"{tally.foreign / tally.judged:.1%}" if tally.judged else "none could be read"


def _print(batches: Iterator[list[ImageVerdict]], tally: _Tally) -> int:
    console.print(f"{'score':>10}  {'p-value':>8}  {'verdict':7}  image")
    count = 0
    for batch in batches:
        for verdict in batch:
            tally.add(verdict)
            count += 1
            if verdict.score is None:
                continue
            word = {True: "ID", False: "OOD", None: ""}[verdict.is_id]
            p_value = "" if verdict.p_value is None else f"{verdict.p_value:.4f}"
            predicted = "" if verdict.predicted is None else f"  ({verdict.predicted})"
            console.print(
                f"{verdict.score:10.4g}  {p_value:>8}  {word:7}  {verdict.name}{predicted}", soft_wrap=True
            )
    return count


def _write(
    stream: Callable[[ImageSource], Iterator[list[ImageVerdict]]],
    source: ImageSource,
    options: Options,
    tally: _Tally,
) -> int:
    assert options.out is not None
    with options.detector.open("rb") as file:
        detector = hashlib.file_digest(file, "sha256").hexdigest()
    settings = {
        "detector": detector,
        "model": options.model,
        "device": options.device,
        "precision": options.precision,
        "images": images_digest(source),
    }
    journal = Journal(options.out, settings, options.batch_size)
    if journal.done:
        console.print(f"going on after {journal.done} of {len(source)} images", style="dim")
    rest = SlicedImages(source, range(journal.done, len(source)), source.title)
    with tqdm(total=len(source), initial=journal.done, unit="image", disable=None, leave=False) as bar:
        for batch in stream(rest) if len(rest) else ():
            journal.add(batch)
            bar.update(len(batch))
    for verdict in journal:
        tally.add(verdict)
    journal.finish(options.out)
    return len(rest)
