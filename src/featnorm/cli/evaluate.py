"""``featnorm evaluate``: compare detectors on the user's model and images."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from featnorm._utils.files import write_text
from featnorm._utils.layout import fast_layout
from featnorm.cli.machine import runtime_of
from featnorm.cli.show import (
    console,
    environment,
    prepare_folder,
    print_label_columns,
    print_reading,
    print_skipped,
    print_table,
)
from featnorm.detectors import parse_detector
from featnorm.evaluation import compare, standard_detectors
from featnorm.features import Features
from featnorm.inputs import DataError, ImageSource, image_loader, open_images
from featnorm.inputs.formats import PassedOver
from featnorm.inputs.loading import named
from featnorm.models import create_model
from featnorm.models.loading import users_forward
from featnorm.report import markdown_page
from featnorm.report.comparison import write_page
from featnorm.runtime import Runtime
from featnorm.tap import FeatureTap

# Name of the set to fit on. Another set with this title is named by its specification.
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
    label_column: str | None
    out: Path
    data_root: Path | None
    device: str
    precision: str
    batch_size: int
    workers: int | None


class _Reader:
    """Reads sets of images: yields their features batch by batch, and keeps the rows they are of."""

    def __init__(self, tap: FeatureTap, transform: Any, runtime: Runtime, options: Options) -> None:
        self.tap = tap
        self.transform = transform
        self.runtime = runtime
        self.options = options
        self.skipped: dict[str, list[tuple[str, str]]] = {}
        self.rows: dict[str, list[int]] = {}
        self.several = 0

    def stream(self, name: str, source: ImageSource) -> Iterator[Features]:
        """Yield the features of a source, skipping unreadable images."""
        loader = image_loader(
            source,
            self.transform,
            batch_size=self.runtime.batch_size,
            workers=self.runtime.workers,
            on_corrupt=lambda file, why: self.skipped.setdefault(name, []).append((file, why)),
        )
        rows = self.rows.setdefault(name, [])
        classes = source.class_names
        no_labels = None
        if classes is None and source.label(0) is None:
            no_labels = "the images have no classes (SSD and KNN need none)"
        elif classes is not None and len(classes) == 1:
            no_labels = f"the images are of a single class, {classes[0]} (SSD and KNN need none)"
        for part in tqdm(loader.parts(), total=len(loader), desc=name, unit="batch", disable=None, leave=False):
            batch = part.batch
            if batch is None:
                continue
            self.several += len(part.several)
            rows.extend(batch.indices.tolist())
            images = fast_layout(batch.images)
            where = users_forward(self.options.model, self.tap.model, named(source, batch.indices.tolist()))
            with where, self.runtime.autocast():
                features = self.tap(images)
            # Labels of other classes than the model's own do not measure its accuracy.
            if name != _FIT and classes is not None and _class_count(features) != len(classes):
                no_labels = no_labels or "its classes are not those of the model"
            if no_labels is None:
                yield features.replace(labels=batch.labels.to(self.tap.device))
            else:
                yield features.replace(absent={**features.absent, "labels": no_labels})


def run(options: Options) -> None:
    """Compare detectors, write a page and a Markdown document, and print a table."""
    page, document = options.out / "index.html", options.out / "results.md"
    prepare_folder(options.out, [page, document])
    detectors = (
        [parse_detector(expression) for expression in options.detectors]
        if options.detectors
        else standard_detectors()
    )
    _check_distinct(options)

    def labeled(spec: str) -> ImageSource:
        return open_images(spec, root=options.data_root, label_column=options.label_column)

    fit = None if options.fit is None else labeled(options.fit)
    opened = [(options.id_data, labeled(options.id_data))]
    opened += [(spec, open_images(spec, root=options.data_root, labels=False)) for spec in options.ood]
    sources = _named(opened)
    id_name, *ood_names = sources
    for source in [sources[id_name], *([] if fit is None else [fit])]:
        print_label_columns(source, "there are no classes")
    loaded = create_model(options.model, weights=options.weights)
    runtime = runtime_of(options.device, options.precision, options.batch_size, options.workers)
    model = fast_layout(loaded.model.to(runtime.torch_device))
    tap = FeatureTap(model, options.layer)
    reader = _Reader(tap, loaded.transform, runtime, options)

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

    title = f"What does {options.model} know?"
    summary = f"Which detectors tell {', '.join(ood_names)} from {id_name}?"
    write_page(evaluation, page, title=title, summary=summary, image=image)
    write_text(document, markdown_page(evaluation, title=title, summary=summary), errors="backslashreplace")

    print_table(evaluation)
    if evaluation.accuracy is not None:
        console.print(f"The model classifies {evaluation.accuracy:.1%} of {id_name} correctly.")
    for name, files in evaluation.skipped.items():
        print_skipped(name, files)
    every = opened if options.fit is None or fit is None else [(options.fit, fit), *opened]
    # Sets may be slices of one folder.
    beside = {spec.partition("[")[0]: source.passed_over for spec, source in every}
    print_reading(
        sum(map(len, reader.rows.values())),
        sum(map(len, reader.skipped.values())),
        reader.several,
        sum(beside.values(), PassedOver()),
    )
    console.print(f"Wrote {page} and {document}.", soft_wrap=True)


def _class_count(features: Features) -> int | None:
    return None if features.logits is None else features.logits.shape[1]


def _named(opened: list[tuple[str, ImageSource]]) -> dict[str, ImageSource]:
    """Return each set by its title or, if two would share it, by the specification."""
    titles = [source.title for _, source in opened]
    return {
        source.title if titles.count(source.title) == 1 and source.title != _FIT else spec: source
        for spec, source in opened
    }


def _check_distinct(options: Options) -> None:
    """Raise a DataError if the same inputs are given twice."""
    seen: dict[object, str] = {}
    for spec in filter(None, (options.fit, options.id_data, *options.ood)):
        base, bracket, rows = spec.partition("[")
        path = Path(base)
        key = (path.resolve() if path.exists() else base, bracket + rows)
        if key in seen:
            raise DataError(f"{spec} is given twice: --fit, --id and every --ood must be different inputs")
        seen[key] = spec
