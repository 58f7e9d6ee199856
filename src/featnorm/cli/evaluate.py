"""``featnorm evaluate``: detectors side by side on the user's model and images."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from featnorm.cli.machine import fabric_of
from featnorm.cli.show import console, environment, prepare_folder, print_skipped, print_table
from featnorm.data import DataError, ImageSource, image_loader, open_images
from featnorm.data.loading import named
from featnorm.detectors import parse_detector
from featnorm.evaluation import compare, standard_detectors
from featnorm.features import Features
from featnorm.models import create_model, users_forward
from featnorm.report import markdown_page
from featnorm.report.comparison import write_page
from featnorm.tap import FeatureTap

# What the images to fit on are called where sets are named; a set of that name goes by its specification.
_FIT = "fit"


@dataclass(frozen=True)
class Options:
    """The command's options."""

    model: str
    weights: Path | None
    id_data: str
    ood: list[str]
    fit: str | None
    detectors: list[str] | None
    layer: str | None
    out: Path
    data_root: Path | None
    device: str
    precision: str
    batch_size: int
    workers: int | None


class _Reader:
    """The features of a set of images, batch by batch, and which images they are."""

    def __init__(self, tap: FeatureTap, transform: Any, fabric: Any, options: Options) -> None:
        self.tap = tap
        self.transform = transform
        self.fabric = fabric
        self.options = options
        self.skipped: dict[str, list[tuple[str, str]]] = {}
        self.rows: dict[str, list[int]] = {}

    def stream(self, name: str, source: ImageSource) -> Iterator[Features]:
        """Yield the features of a source, skipping what cannot be read."""
        loader = image_loader(
            source,
            self.transform,
            batch_size=self.options.batch_size,
            workers=self.options.workers,
            on_corrupt=lambda file, why: self.skipped.setdefault(name, []).append((file, why)),
        )
        rows = self.rows.setdefault(name, [])
        classes = source.class_names
        why = None
        if classes is None and source.label(0) is None:
            why = "the images have no classes (SSD and KNN need none)"
        elif classes is not None and len(classes) == 1:
            why = f"the images are of a single class, {classes[0]} (SSD and KNN need none)"
        for batch in tqdm(loader, desc=name, unit="batch", disable=None, leave=False):
            rows.extend(batch.indices.tolist())
            images = batch.images.contiguous(memory_format=torch.channels_last)
            where = users_forward(self.options.model, self.tap.model, named(source, batch.indices.tolist()))
            with where, self.fabric.autocast():
                features = self.tap(images)
            # Labels of other classes than the model's own say nothing of its accuracy.
            foreign = name != _FIT and classes is not None and _classes_of(features) != len(classes)
            if why is None and not foreign:
                yield features.replace(labels=batch.labels.to(self.tap.device))
            else:
                yield features.replace(absent={**features.absent, "labels": why or "its classes are others"})


def run(options: Options) -> None:
    """Compare detectors; write a page and a Markdown document, print a table."""
    prepare_folder(options.out)
    detectors = (
        [parse_detector(expression) for expression in options.detectors]
        if options.detectors
        else standard_detectors()
    )
    _refuse_twice(options)
    fit = None if options.fit is None else open_images(options.fit, root=options.data_root)
    sources = _named([options.id_data, *options.ood], options.data_root)
    id_name, *ood_names = sources
    loaded = create_model(options.model, weights=options.weights)
    fabric = fabric_of(options.device, options.precision)
    # Convolutions read channels last: three times as fast on a CPU, and faster on a GPU.
    model = fabric.to_device(loaded.model).to(memory_format=torch.channels_last)
    tap = FeatureTap(model, options.layer)
    reader = _Reader(tap, loaded.transform, fabric, options)

    evaluation = compare(
        detectors,
        fit=None if fit is None else reader.stream(_FIT, fit),
        id_set=(id_name, reader.stream(id_name, sources[id_name])),
        ood_sets={name: reader.stream(name, sources[name]) for name in ood_names},
    )
    evaluation.skipped = reader.skipped
    evaluation.facts = {
        "model": loaded.name + "".join(f"; {note}" for note in loaded.notes),
        "last hidden layer": tap.describe().splitlines()[0].removeprefix("Last hidden layer: "),
        "in-distribution": f"{options.id_data}, {len(reader.rows[id_name])} inputs",
        **{
            f"OOD, {name}": f"{spec}, {len(reader.rows[name])} inputs"
            for name, spec in zip(ood_names, options.ood, strict=True)
        },
        "fit": "nothing" if fit is None else f"{options.fit}, {len(reader.rows[_FIT])} inputs",
        "device": f"{tap.device}, {options.precision}",
        **environment(),
    }

    def image(name: str, index: int) -> Image.Image:
        return sources[name].image(reader.rows[name][index])

    page, document = options.out / "index.html", options.out / "results.md"
    title = f"What does {options.model} know?"
    summary = f"Which detectors tell {', '.join(ood_names)} from {id_name}?"
    write_page(evaluation, page, title=title, summary=summary, image=image)
    document.write_text(markdown_page(evaluation, title=title, summary=summary), encoding="utf-8")

    print_table(evaluation)
    if evaluation.accuracy is not None:
        console.print(f"The model classifies {evaluation.accuracy:.1%} of {id_name} correctly.")
    for name, files in evaluation.skipped.items():
        print_skipped(name, files)
    console.print(f"Wrote {page} and {document}.", soft_wrap=True)


def _classes_of(features: Features) -> int | None:
    return None if features.logits is None else features.logits.shape[1]


def _named(specs: list[str], root: Path | None) -> dict[str, ImageSource]:
    """Return each set by a short name or, where two would share it, by what the user called it."""
    opened = [(spec, open_images(spec, root=root)) for spec in specs]
    titles = [source.title for _, source in opened]
    return {
        source.title if titles.count(source.title) == 1 and source.title != _FIT else spec: source
        for spec, source in opened
    }


def _refuse_twice(options: Options) -> None:
    seen: dict[object, str] = {}
    for spec in filter(None, (options.fit, options.id_data, *options.ood)):
        base, bracket, rows = spec.partition("[")
        path = Path(base)
        key = (path.resolve() if path.exists() else base, bracket + rows)
        if key in seen:
            raise DataError(f"{spec} is given twice: --fit, --id and every --ood must be different inputs")
        seen[key] = spec
