"""``featnorm evaluate``: a comparison of detectors on the user's model and data."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.table import Table

from featnorm._utils.files import write_text
from featnorm.cli.console import (
    console,
    counted,
    environment,
    prepare_folder,
    print_label_columns,
    print_reading,
    print_remarks,
    print_skipped,
    print_table,
)
from featnorm.cli.options import (
    DATA,
    FPS,
    BatchSize,
    DataRoot,
    Detectors,
    Device,
    Engine,
    Fps,
    LabelColumn,
    Layer,
    OutFolder,
    PerPart,
    Precision,
    TextColumn,
    Weights,
    Workers,
)

if TYPE_CHECKING:
    from PIL import Image

    from featnorm.evaluation import Comparison
    from featnorm.inputs import Source
    from featnorm.scorer import Scorer

# Name of the set to fit on. Another set of that name is called by its specification.
_FIT = "fit"
_NAME = re.compile(r"((?:near|far):)?([\w .+-]+)")


def evaluate(
    scorer_file: Annotated[
        Path | None,
        typer.Argument(
            metavar="[SCORER]", help="File written by `featnorm fit`, whose detector is evaluated beside others."
        ),
    ] = None,
    id_data: Annotated[
        str | None,
        typer.Option(
            "--id",
            metavar="[NAME=]DATA",
            help=f"In-distribution inputs, after a name for the table if you like: {DATA}.",
        ),
    ] = None,
    ood: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[[near:|far:]NAME=]DATA",
            help="Out-of-distribution inputs, specified as for --id. Repeat for several. Sets whose names begin "
            "with `near:` or `far:` are also averaged as a group.",
        ),
    ] = None,
    protocol: Annotated[
        Literal["openood-v1.5"] | None,
        typer.Option(
            help="Protocol that defines the inputs instead of --id and --ood, and whose result files are written "
            "too; its lists and images are in --data-root."
        ),
    ] = None,
    benchmark: Annotated[
        Literal["cifar10", "cifar100", "imagenet200", "imagenet"] | None,
        typer.Option(help="Benchmark of --protocol, by its in-distribution data set."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="SPEC",
            help="Model: `timm:NAME`, `torchvision:NAME`, `featnorm:NAME`, `hf:FOLDER` or `MODULE:FUNCTION`. "
            "Required without SCORER, or if SCORER does not contain its model, or if the model is your own.",
        ),
    ] = None,
    fit: Annotated[
        str | None,
        typer.Option(
            metavar="DATA",
            help="In-distribution inputs on which to fit the detectors that need a fit. Default: the training "
            "images of --protocol, or skip those detectors.",
        ),
    ] = None,
    weights: Weights = None,
    detector: Detectors = None,
    reference: Annotated[
        str | None,
        typer.Option(
            metavar="EXPR",
            help="Detector from which differences in AUROC are taken; it is compared too. Default: the best one.",
        ),
    ] = None,
    layer: Layer = None,
    per: PerPart = "input",
    label_column: LabelColumn = None,
    text_column: TextColumn = None,
    fps: Fps = FPS,
    out: OutFolder = Path("featnorm-evaluation"),
    data_root: DataRoot = None,
    device: Device = "auto",
    precision: Precision = "32-true",
    engine: Engine = "auto",
    batch_size: BatchSize = None,
    workers: Workers = None,
) -> None:
    """Compare detectors on your model and data.

    The folder gets a page (index.html), the table (results.md, .csv, .json, .tex), a plot (results.svg, .pdf) and
    the scores of every input (scores.parquet); with --protocol also openood.csv, with the measures by OpenOOD's
    conventions, and leaderboard.csv, rows for its leaderboard.
    """
    from featnorm import openood
    from featnorm._utils.layout import fast_layout
    from featnorm.cli.runtime import runtime_of
    from featnorm.detectors import parse_detector
    from featnorm.evaluation import FILES, compare, standard_detectors
    from featnorm.inputs import FRAMES, IMAGES, open_source
    from featnorm.inputs.formats import PassedOver
    from featnorm.models import create_model
    from featnorm.models.loading import import_users_module
    from featnorm.report.comparison import write_page
    from featnorm.report.tables import markdown_page
    from featnorm.scorer_file import load
    from featnorm.tap import FeatureTap

    written = [*FILES, *(openood.FILES if protocol else ())]
    page, document = out / "index.html", out / "results.md"
    prepare_folder(out, [page, document, *(out / file for file in written)])
    if scorer_file is None and model is None:
        raise ValueError("pass a file SCORER, or a model with --model")
    if model is not None:
        # The module of the user's own model may define detectors.
        import_users_module(model)
    detectors = [parse_detector(expression) for expression in detector] if detector else standard_detectors()
    if reference is not None:
        detectors.append(parse_detector(reference))

    def labeled(spec: str) -> Source[Any]:
        return open_source(spec, root=data_root, label_column=label_column, text_column=text_column, fps=fps)

    fit_source = None if fit is None else labeled(fit)
    if protocol is None:
        if id_data is None or not ood or benchmark is not None:
            raise ValueError("pass --id and --ood, or --protocol with --benchmark and --data-root")
        given_names, groups, specs = _split_names([id_data, *ood])
        _refuse_twice([*([] if fit is None else [fit]), *specs])
        options: dict[str, Any] = {"labels": False, "text_column": text_column, "fps": fps}
        others = (open_source(spec, root=data_root, **options) for spec in specs[1:])
        opened = [labeled(specs[0]), *others]
        sources = _named(list(zip(specs, opened, strict=True)), given_names)
        grouped = [groups.get(spec, "") + name for spec, name in zip(specs, sources, strict=True)]
    else:
        if id_data is not None or ood or benchmark is None or data_root is None:
            raise ValueError(f"--protocol {protocol} takes --benchmark and --data-root, and no --id and --ood")
        sets = openood.benchmark_sets(benchmark, data_root)
        grouped = [benchmark, *sets["ood_sets"]]
        sources = {name.rpartition(":")[2]: source for name, source in (sets["id_set"], *sets["ood_sets"].items())}
        specs = [f"test_{name}.txt" for name in sources]
        if fit_source is None:
            fit, fit_source = f"train_{benchmark}.txt", sets["fit"]
            if fit_source is None:
                console.print(f"No image of {fit} exists: detectors that need a fit are skipped without --fit.")
    id_name, *ood_names = sources
    kind = sources[id_name].kind
    for source in [sources[id_name], *([] if fit_source is None else [fit_source])]:
        print_label_columns(source, "there are no classes")
    runtime = runtime_of(device, precision, batch_size, workers, engine=engine)
    subject: Any
    scorer = None
    if scorer_file is None:
        assert model is not None
        loaded = create_model(model, weights=weights)
        subject = tap = FeatureTap(fast_layout(loaded.model.to(runtime.torch_device)), layer, per=per)
        classes = loaded.classes
        name, transform, about = model, loaded.transform, loaded.name + "".join(f"; {n}" for n in loaded.notes)
    else:
        if layer is not None or per != "input":
            raise ValueError("--layer and --per are for a model without SCORER, in whose file they are")
        subject = scorer = load(scorer_file, model, weights=weights).to(runtime.torch_device)
        tap, transform, name = scorer.tap, scorer.require_preprocess(), scorer.spec or ""
        classes = scorer.classes
        about = "; ".join(scorer.facts.get(fact, "") for fact in ("model", "backbone", "head")).strip("; ")
        about = about or name

    comparison = compare(
        detectors,
        model=subject,
        preprocess=transform,
        classes=classes,
        spec=name,
        fit=fit_source,
        id_set=(id_name, sources[id_name]),
        ood_sets=dict(zip(grouped[1:], [sources[name] for name in ood_names], strict=True)),
        reference=reference,
        runtime=runtime,
    )
    rows = comparison.rows
    comparison.facts = {
        "model": about,
        "last hidden layer": tap.describe().splitlines()[0].removeprefix("Last hidden layer: "),
        "in-distribution": f"{specs[0]}, {len(rows[id_name])} inputs",
        **{
            f"OOD, {name}": f"{spec}, {len(rows[name])} inputs"
            for name, spec in zip(ood_names, specs[1:], strict=True)
        },
        "fit": "none" if fit is None or _FIT not in rows else f"{fit}, {len(rows[_FIT])} inputs",
        "device": f"{tap.device}, {precision}",
        "engine": comparison.facts.get("engine", "PyTorch"),
        **environment(),
    }

    if protocol is not None:
        unread = sum(map(len, comparison.skipped.values()))
        missing = f"; {counted(unread, 'listed image')} could not be read" if unread else ""
        comparison.facts = {"protocol": f"{protocol}, {benchmark}{missing}"} | comparison.facts

    def image(name: str, index: int) -> Image.Image:
        return sources[name].item(rows[name][index])

    flagged = {} if scorer is None else _flagged(scorer, comparison, sources)
    comparison.facts |= flagged
    title = f"OOD detection with {name or scorer_file}"
    summary = f"How well do detectors separate {', '.join(ood_names)} from {id_name}?"
    write_page(comparison, page, title=title, summary=summary, image=image if kind in (IMAGES, FRAMES) else None)
    write_text(document, markdown_page(comparison, title=title, summary=summary), errors="backslashreplace")
    comparison.save(out)
    if protocol is not None:
        openood.save(comparison, out)

    if protocol is None:
        print_table(comparison)
    else:
        _print_openood(openood.results(comparison))
        print_remarks(comparison)
    for label, value in flagged.items():
        console.print(f"{label}: {value}.", soft_wrap=True)
    if kind is FRAMES:
        console.print("The confidence intervals take frames as independent; those of a clip are not.")
    if comparison.accuracy is not None:
        console.print(f"The model classifies {100 * comparison.accuracy:.1f} % of {id_name} correctly.")
    for name, files in comparison.skipped.items():
        print_skipped(name, kind, files)
    every = [*zip(specs, sources.values(), strict=True)]
    if fit is not None and fit_source is not None:
        every.append((fit, fit_source))
    # Sets may be slices of one folder.
    beside = {spec.partition("[")[0]: source.passed_over for spec, source in every}
    print_reading(
        kind,
        sum(map(len, rows.values())),
        sum(map(len, comparison.skipped.values())),
        comparison.several,
        sum(beside.values(), PassedOver()),
    )
    console.print(f"Wrote {page}, {document}, {', '.join(written)}.", soft_wrap=True)


def _named(opened: list[tuple[str, Source[Any]]], given: dict[str, str]) -> dict[str, Source[Any]]:
    """Return the sets by their given or short names or, where two share one, by their specifications."""
    titles = [given.get(spec, _short(spec, source.title)) for spec, source in opened]
    return {
        title if titles.count(title) == 1 and title != _FIT else spec: source
        for title, (spec, source) in zip(titles, opened, strict=True)
    }


def _short(spec: str, title: str) -> str:
    """Return the title of a set, without the name of the working directory if the set lies there."""
    base = spec.partition("[")[0]
    lies_here = Path(base).exists() and Path(base).parent == Path()
    return title.removeprefix(f"{Path.cwd().name}:") if lies_here else title


def _split_names(specs: list[str]) -> tuple[dict[str, str], dict[str, str], list[str]]:
    """Split ``near:NAME=DATA``; return names and groups ("near:") by specification, and the specifications."""
    names: dict[str, str] = {}
    groups: dict[str, str] = {}
    plain = []
    for spec in specs:
        name, _, data = spec.partition("=")
        match = _NAME.fullmatch(name)
        if not data or match is None or Path(spec).exists():
            plain.append(spec)
            continue
        groups[data], names[data] = match[1] or "", match[2]
        plain.append(data)
    return names, groups, plain


def _flagged(scorer: Scorer, comparison: Comparison, sources: dict[str, Source[Any]]) -> dict[str, str]:
    """Return which shares of the sets the fitted detector flags at its threshold, or thresholds, as a fact."""
    import torch

    from featnorm.inputs import DataError, group_items

    found = [result for result in comparison.results if result.detector == repr(scorer.detector)]
    calibration = scorer.item_calibration
    if not found or calibration is None:
        return {}
    shares = []
    for name, scores in {comparison.id_name: found[0].id_scores, **found[0].ood_scores}.items():
        members: Any = None
        try:
            if calibration.group_names and scorer.thresholds_by == "class":
                members = torch.from_numpy(comparison.predicted[name])
            elif calibration.group_names and scorer.thresholds_by is not None:
                groups = group_items(sources[name], scorer.thresholds_by)
                members = [groups[row] for row in comparison.rows[name]]
            is_id = calibration.is_id(torch.from_numpy(scores), members)
        except DataError as error:
            shares.append(f"unknown for {name} ({error})")
        except ValueError:
            shares.append(f"unknown for {name} (it has groups without a threshold)")
        else:
            shares.append(f"{100 * (1 - is_id.double().mean()):.1f} % of {name}")
    rate = f"accepting at least {100 * calibration.tpr:g} % of in-distribution inputs"
    by = f", with thresholds by {scorer.thresholds_by}" if calibration.group_names else ""
    return {f"flagged by the fitted {scorer.detector!r}, {rate}{by}": ", ".join(shares)}


def _print_openood(results: dict[str, dict[str, dict[str, float]]]) -> None:
    table = Table(
        box=None, pad_edge=False, header_style="bold", title="By OpenOOD's conventions", title_justify="left"
    )
    table.add_column("Detector", no_wrap=True)
    for group in ("near", "far"):
        for measure in ("FPR@95", "AUROC"):
            table.add_column(f"{group}ood {measure}", justify="right")
    for detector, rows in results.items():
        means = [rows[name][measure] for name in ("nearood", "farood") for measure in ("FPR@95", "AUROC")]
        table.add_row(detector, *(f"{mean:.2f}" for mean in means))
    console.print(table)


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
