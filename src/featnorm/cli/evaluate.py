"""``featnorm evaluate``: a comparison of detectors on the user's model and images."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from featnorm._utils.files import write_text
from featnorm._utils.progress import progress_bar
from featnorm.cli.console import (
    console,
    environment,
    prepare_folder,
    print_label_columns,
    print_reading,
    print_skipped,
    print_table,
)
from featnorm.cli.options import (
    DATA,
    BatchSize,
    DataRoot,
    Detectors,
    Device,
    LabelColumn,
    Layer,
    OutFolder,
    Precision,
    Weights,
    Workers,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from PIL import Image

    from featnorm.evaluation import Evaluation
    from featnorm.features import Features
    from featnorm.inputs import ImageSource
    from featnorm.runtime import Runtime
    from featnorm.scorer import Scorer
    from featnorm.tap import FeatureTap

# Name of the set to fit on. Another set of that name is called by its specification.
_FIT = "fit"
_NAME = re.compile(r"[\w .+-]+")


def evaluate(
    id_data: Annotated[str, typer.Option("--id", metavar="DATA", help=f"In-distribution inputs: {DATA}.")],
    ood: Annotated[
        list[str],
        typer.Option(
            metavar="[NAME=]DATA",
            help="Out-of-distribution inputs, specified as for --id, with a name for the table. Repeat for "
            "several.",
        ),
    ],
    scorer_file: Annotated[
        Path | None,
        typer.Argument(
            metavar="[SCORER]", help="File written by `featnorm fit`, whose detector is evaluated beside others."
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="SPEC",
            help="Model: `timm:NAME`, `torchvision:NAME`, `featnorm:NAME` or `MODULE:FUNCTION`. Required without "
            "SCORER, or if SCORER does not contain its model, or if the model is your own.",
        ),
    ] = None,
    fit: Annotated[
        str | None,
        typer.Option(
            metavar="DATA",
            help="In-distribution inputs on which to fit the detectors that need a fit. Default: skip those "
            "detectors.",
        ),
    ] = None,
    weights: Weights = None,
    detector: Detectors = None,
    layer: Layer = None,
    label_column: LabelColumn = None,
    out: OutFolder = Path("featnorm-evaluation"),
    data_root: DataRoot = None,
    device: Device = "auto",
    precision: Precision = "32-true",
    batch_size: BatchSize = 64,
    workers: Workers = None,
) -> None:
    """Compare detectors on your model and data, in a table and on a page."""
    page, document = out / "index.html", out / "results.md"
    prepare_folder(out, [page, document])
    from featnorm._utils.layout import fast_layout
    from featnorm.cli.runtime import runtime_of
    from featnorm.detectors import parse_detector
    from featnorm.evaluation import compare, standard_detectors
    from featnorm.inputs import open_source
    from featnorm.inputs.formats import PassedOver
    from featnorm.models import create_model
    from featnorm.models.loading import import_users_module
    from featnorm.report.comparison import write_page
    from featnorm.report.tables import markdown_page
    from featnorm.scorer_file import load
    from featnorm.tap import FeatureTap

    if scorer_file is None and model is None:
        raise ValueError("pass a file SCORER, or a model with --model")
    if model is not None:
        # The module of the user's own model may define detectors.
        import_users_module(model)
    detectors = [parse_detector(expression) for expression in detector] if detector else standard_detectors()
    given_names, ood = _split_names(ood)
    _refuse_twice([*([] if fit is None else [fit]), id_data, *ood])

    def labeled(spec: str) -> ImageSource:
        return open_source(spec, root=data_root, label_column=label_column)

    fit_source = None if fit is None else labeled(fit)
    opened = [(id_data, labeled(id_data))]
    opened += [(spec, open_source(spec, root=data_root, labels=False)) for spec in ood]
    sources = _named(opened, given_names)
    id_name, *ood_names = sources
    for source in [sources[id_name], *([] if fit_source is None else [fit_source])]:
        print_label_columns(source, "there are no classes")
    runtime = runtime_of(device, precision, batch_size, workers)
    scorer = None
    if scorer_file is None:
        assert model is not None
        loaded = create_model(model, weights=weights)
        tap = FeatureTap(fast_layout(loaded.model.to(runtime.torch_device)), layer)
        name, transform, about = model, loaded.transform, loaded.name + "".join(f"; {n}" for n in loaded.notes)
    else:
        if layer is not None:
            raise ValueError("--layer is for a model without SCORER, whose layer is in its file")
        scorer = load(scorer_file, model, weights=weights).to(runtime.torch_device)
        tap, transform, name = scorer.tap, scorer.require_preprocess(), scorer.spec or ""
        about = "; ".join(scorer.facts.get(fact, "") for fact in ("model", "backbone", "head")).strip("; ")
        about = about or name
        expression = repr(scorer.detector)
        detectors = [scorer.detector, *(other for other in detectors if repr(other) != expression)]
    reader = _Reader(name, tap, transform, runtime)

    evaluation = compare(
        detectors,
        fit=None if fit_source is None else reader.stream(_FIT, fit_source),
        id_set=(id_name, reader.stream(id_name, sources[id_name])),
        ood_sets={name: reader.stream(name, sources[name]) for name in ood_names},
    )
    evaluation.skipped = reader.skipped
    evaluation.facts = {
        "model": about,
        "last hidden layer": tap.describe().splitlines()[0].removeprefix("Last hidden layer: "),
        "in-distribution": f"{id_data}, {len(reader.rows[id_name])} inputs",
        **{
            f"OOD, {name}": f"{spec}, {len(reader.rows[name])} inputs"
            for name, spec in zip(ood_names, ood, strict=True)
        },
        "fit": "none" if fit is None else f"{fit}, {len(reader.rows[_FIT])} inputs",
        "device": f"{tap.device}, {precision}",
        **environment(),
    }

    def image(name: str, index: int) -> Image.Image:
        return sources[name].item(reader.rows[name][index])

    flagged = {} if scorer is None else _flagged(scorer, evaluation)
    evaluation.facts |= flagged
    title = f"What does {name or scorer_file} know?"
    summary = f"How well do detectors separate {', '.join(ood_names)} from {id_name}?"
    write_page(evaluation, page, title=title, summary=summary, image=image)
    write_text(document, markdown_page(evaluation, title=title, summary=summary), errors="backslashreplace")

    print_table(evaluation)
    for label, value in flagged.items():
        console.print(f"{label}: {value}.", soft_wrap=True)
    if evaluation.accuracy is not None:
        console.print(f"The model classifies {evaluation.accuracy:.1%} of {id_name} correctly.")
    for name, files in evaluation.skipped.items():
        print_skipped(name, files)
    every = opened if fit is None or fit_source is None else [(fit, fit_source), *opened]
    # Sets may be slices of one folder.
    beside = {spec.partition("[")[0]: source.passed_over for spec, source in every}
    print_reading(
        sum(map(len, reader.rows.values())),
        sum(map(len, reader.skipped.values())),
        reader.several,
        sum(beside.values(), PassedOver()),
    )
    console.print(f"Wrote {page} and {document}.", soft_wrap=True)


@dataclass
class _Reader:
    """Computes the features of sets of images, and keeps the rows of the images that could be read."""

    model: str
    tap: FeatureTap
    transform: Any
    runtime: Runtime
    skipped: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    rows: dict[str, list[int]] = field(default_factory=dict)
    several: int = 0

    def stream(self, name: str, source: ImageSource) -> Iterator[Features]:
        """Yield the features of a source in batches; images that cannot be read are skipped."""
        from featnorm._utils.layout import fast_layout
        from featnorm.inputs import image_loader
        from featnorm.inputs.loading import named
        from featnorm.models.loading import users_forward

        loader = image_loader(
            source,
            self.transform,
            batch_size=self.runtime.batch_size,
            workers=self.runtime.workers,
            on_corrupt=lambda file, why: self.skipped.setdefault(name, []).append((file, why)),
        )
        rows = self.rows.setdefault(name, [])
        classes = source.class_names
        why = None
        if classes is None and source.label(0) is None:
            why = "the images have no classes (SSD and KNN need none)"
        elif classes is not None and len(classes) == 1:
            why = f"the images are of a single class, {classes[0]} (SSD and KNN need none)"
        for part in progress_bar(loader.parts(), total=len(loader), desc=name, unit="batch"):
            batch = part.batch
            if batch is None:
                continue
            self.several += len(part.several)
            rows.extend(batch.indices.tolist())
            images = fast_layout(batch.images)
            where = users_forward(self.model, self.tap.model, named(source, batch.indices.tolist()))
            with where, self.runtime.autocast():
                features = self.tap(images)
            # The accuracy of the model is defined only for labels of its own classes.
            others = name != _FIT and classes is not None and _classes_of(features) != len(classes)
            if why is None and not others:
                yield features.replace(labels=batch.labels.to(self.tap.device))
            else:
                yield features.replace(
                    absent={**features.absent, "labels": why or "its classes are not the model's"}
                )


def _classes_of(features: Features) -> int | None:
    return None if features.logits is None else features.logits.shape[1]


def _named(opened: list[tuple[str, ImageSource]], given: dict[str, str]) -> dict[str, ImageSource]:
    """Return the sets by their given or short names or, where two share one, by their specifications."""
    titles = [given.get(spec, source.title) for spec, source in opened]
    return {
        title if titles.count(title) == 1 and title != _FIT else spec: source
        for title, (spec, source) in zip(titles, opened, strict=True)
    }


def _split_names(specs: list[str]) -> tuple[dict[str, str], list[str]]:
    """Split ``NAME=DATA`` specifications; return the names by specification, and the specifications."""
    names: dict[str, str] = {}
    plain = []
    for spec in specs:
        name, equals, data = spec.partition("=")
        if not equals or not data or not _NAME.fullmatch(name) or Path(spec).exists():
            plain.append(spec)
            continue
        names[data] = name
        plain.append(data)
    return names, plain


def _flagged(scorer: Scorer, evaluation: Evaluation) -> dict[str, str]:
    """Return which shares of the sets the fitted detector flags at its threshold, as a fact."""
    import torch

    found = [result for result in evaluation.results if result.detector == repr(scorer.detector)]
    if not found or scorer.calibration is None or scorer.thresholds_by is not None:
        return {}
    sets = {evaluation.id_name: found[0].id_scores, **found[0].ood_scores}
    shares = (
        f"{100 * (1 - scorer.calibration.is_id(torch.from_numpy(scores)).double().mean()):.1f} % of {name}"
        for name, scores in sets.items()
    )
    rate = f"accepting at least {100 * scorer.calibration.tpr:g} % of in-distribution images"
    return {f"flagged by the fitted {scorer.detector!r}, {rate}": ", ".join(shares)}


def _refuse_twice(specs: list[str]) -> None:
    from featnorm.inputs import DataError

    seen: dict[object, str] = {}
    for spec in specs:
        base, bracket, rows = spec.partition("[")
        path = Path(base)
        key = (path.resolve() if path.exists() else base, bracket + rows)
        if key in seen:
            raise DataError(f"{spec} is given twice: --fit, --id and every --ood must be different inputs")
        seen[key] = spec
