"""``featnorm reproduce``: the paper's tables with our numbers beside its own, and its figures."""

import functools
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table as Grid

from featnorm._utils.files import write_text
from featnorm.cli.console import console, environment, prepare_folder
from featnorm.cli.runtime import runtime_of
from featnorm.inputs import DataError
from featnorm.paper import (
    cifar10,
    explanations,
    heads,
    imagenet,
    label_free,
    moco_length,
    one_class,
    own_images,
    theory,
)
from featnorm.paper.figures import make_figure
from featnorm.paper.imagenet_data import MissingError
from featnorm.paper.imagenet_tables import make_tables
from featnorm.paper.page import Section, write_results_page
from featnorm.paper.tables import Table, make_table, width_figure

ALL = "all"


@dataclass(frozen=True)
class _Setting:
    """What every result of a command is made with."""

    scale: str
    data_root: Path | None
    weights: Path | None
    out: Path
    fabric: Any
    facts: dict[str, str]


@dataclass(frozen=True)
class _Result:
    """A table or figure as it was made."""

    table: Table
    pictures: tuple[str, ...] = ()


_Results = dict[str, _Result]


def run(
    name: str,
    scale: str,
    data_root: Path | None,
    weights: Path | None,
    out: Path,
    device: str,
    precision: str,
    compiled: bool,
) -> None:
    """Train what a table or figure needs, or go on where that was left; write and print it."""
    every = (
        *cifar10.TABLES,
        *label_free.TABLES,
        *imagenet.TABLES,
        *theory.FIGURES,
        *_STUDIES,
        *one_class.TABLES,
    )
    if name not in (ALL, *every):
        raise ValueError(f"there is no {name!r} to reproduce: choose {ALL}, or one of {', '.join(every)}")
    if scale not in cifar10.SCALES:
        raise ValueError(f"there is no scale {scale!r}: choose one of {', '.join(cifar10.SCALES)}")
    out = out / scale
    made = ["results.html"] if name == ALL else [f"{name}.json", f"{name}.md"]
    prepare_folder(out, [out / file for file in made])
    fabric = runtime_of(device, precision, compiled=compiled).fabric
    how = f"{fabric.device}, {precision}" + (", compiled" if compiled else "")
    facts = {"device": how, **environment()}
    setting = _Setting(scale, data_root, weights, out, fabric, facts)
    if name == ALL:
        _all(every, setting)
        return
    try:
        _make(name, setting)
    except MissingError as error:
        for line in error.lines:
            print(f"- {line}", file=sys.stderr)
        raise DataError(f"{name} at scale {scale} lacks what is listed above: {len(error.lines)} things") from None
    console.print(f"Wrote {out / name}.md.", soft_wrap=True)


def _all(names: Sequence[str], setting: _Setting) -> None:
    """Make everything that can be made here; the page grows with every result, and says what is not on it."""
    page, sections, missing = setting.out / "results.html", list[Section](), dict[str, str]()
    for name in names:
        console.print(name, style="bold")
        try:
            made = _make(name, setting)
        except (ValueError, OSError) as error:
            missing[name] = str(error)
            console.print(f"not made: {error}", style="dim", soft_wrap=True)
        else:
            for key, result in made.items():
                table = result.table
                sections.append(Section(key, table.title, table.headers, table.rows, table.notes, result.pictures))
        write_results_page(
            page,
            sections,
            title=f"The paper's results, at {setting.scale} scale",
            summary="Every table and figure that could be made here, the paper's numbers beside ours.",
            facts=setting.facts,
            missing=missing,
        )
    console.print(f"Wrote {page}.", soft_wrap=True)


def _make(name: str, setting: _Setting) -> _Results:
    """Make one result, write it and print it; return what it consists of, by name."""
    if name in cifar10.TABLES:
        content, made = _table(name, setting)
    elif name in one_class.TABLES:
        content, made = _one_class(name, setting)
    elif name in label_free.TABLES:
        content, made = _frameworks(name, setting)
    elif name in imagenet.TABLES:
        content, made = _imagenet_table(name, setting)
    elif name in _STUDIES:
        content, made = _STUDIES[name](setting)
    else:
        content, made = _figure(name, setting)
    out = setting.out
    _write(name, out, content, made)
    for key, result in made.items():
        for i, picture in enumerate(result.pictures):
            number = f"-{i + 1}" if len(result.pictures) > 1 else ""
            write_text(out / f"{key}{number}.svg", picture)
        _print(result.table)
    return made


def _write(name: str, out: Path, content: Any, made: _Results) -> None:
    write_text(out / f"{name}.json", json.dumps(content, indent=1) + "\n")
    text = "\n".join(result.table.markdown() for result in made.values())
    write_text(out / f"{name}.md", text)


def _table(name: str, setting: _Setting) -> tuple[Any, _Results]:
    scale, fabric, facts = cifar10.SCALES[setting.scale], setting.fabric, setting.facts
    images = _images("cifar10", setting.data_root)
    _name_missing(images.missing)
    jobs = cifar10.jobs(name, scale)
    known = heads.pooled(images) if any(job.frozen for job in jobs) else None
    results: list[dict[str, Any]] = []
    for i, job in enumerate(jobs):
        folder = _begin(setting.out, job.folder, i, len(jobs))
        if known is None:
            result = cifar10.run(job, scale, images, folder, fabric=fabric, environment=facts)
        else:
            result = heads.run(job, known, folder, environment=facts)
        results.append(result)
    pictures = (width_figure(results),) if name == "figure7" else ()
    return results, {name: _Result(make_table(name, results), pictures)}


def _frameworks(name: str, setting: _Setting) -> tuple[Any, _Results]:
    sets, scale = label_free.TABLES[name], label_free.SCALES[setting.scale]
    same = sets is cifar10.PAPER_SETS
    root = setting.data_root
    images = _images("cifar10", root) if same else cifar10.load_images(root, sets)
    _name_missing(images.missing)
    jobs = label_free.jobs(name, scale)
    results = []
    for i, job in enumerate(jobs):
        folder = _begin(setting.out, job.folder, i, len(jobs))
        results.append(
            label_free.run(job, scale, images, folder, fabric=setting.fabric, environment=setting.facts)
        )
    return results, {name: _Result(make_table(name, results))}


def _name_missing(missing: Mapping[str, str]) -> None:
    for name, why in missing.items():
        console.print(f"without {name}: {why}", style="dim", soft_wrap=True)


def _imagenet_table(name: str, setting: _Setting) -> tuple[Any, _Results]:
    scale, where = imagenet.SCALES[setting.scale], (setting.data_root, setting.weights)
    imagenet.require(name, scale, *where)
    jobs = imagenet.jobs(name, scale)
    results = []
    for i, job in enumerate(jobs):
        folder = _begin(setting.out, job.folder, i, len(jobs))
        made: dict[str, Any] = {"fabric": setting.fabric, "environment": setting.facts}
        results.append(imagenet.run(job, scale, *where, folder, cache=setting.out / "features", **made))
    return results, {key: _Result(table) for key, table in make_tables(name, results).items()}


def _figure(name: str, setting: _Setting) -> tuple[Any, _Results]:
    scale, fabric, facts = theory.SCALES[setting.scale], setting.fabric, setting.facts
    jobs = theory.FIGURES[name]
    images = _images(jobs[0].data, setting.data_root)
    runs = []
    for i, job in enumerate(jobs):
        folder = _begin(setting.out, job.folder, i, len(jobs))
        runs.append(theory.run(job, scale, images, folder, fabric=fabric, environment=facts))
    figure = make_figure(name, runs)
    return figure.to_dict(), {name: _Result(figure.table, (figure.svg,))}


def _one_class(name: str, setting: _Setting) -> tuple[Any, _Results]:
    images = one_class.load_images(setting.data_root)
    _name_missing(images.missing)
    scale = one_class.SCALES[setting.scale]
    planned = one_class.tasks(scale, images)
    results: list[dict[str, Any]] = []
    for i, task in enumerate(planned):
        folder = _begin(setting.out, task.folder, i, len(planned))
        results.append(
            one_class.run(task, scale, images, folder, fabric=setting.fabric, environment=setting.facts)
        )
        content = one_class.summary(results, planned, images)
        made = {key: _Result(table) for key, table in one_class.tables(content).items()}
        # An hour or more lies between the first and the last: what there is can be read in the meantime.
        _write(name, setting.out, content, made)
    return content, made


def _own_images(setting: _Setting) -> tuple[Any, _Results]:
    content = own_images.run(setting.data_root, fabric=setting.fabric, environment=setting.facts)
    return content, {name: _Result(table) for name, table in own_images.tables(content).items()}


def _head_study(setting: _Setting) -> tuple[Any, _Results]:
    content = heads.study(_images("cifar10", setting.data_root), environment=setting.facts)
    return content, {name: _Result(table) for name, table in heads.tables(content).items()}


def _explanation(setting: _Setting) -> tuple[Any, _Results]:
    content = explanations.run(_images("cifar10", setting.data_root), environment=setting.facts)
    pictures = tuple(explanations.pictures(content).values())
    return content, {name: _Result(table, pictures) for name, table in explanations.tables(content).items()}


def _moco_length(setting: _Setting) -> tuple[Any, _Results]:
    images = one_class.load_images(setting.data_root)
    scale = moco_length.SCALES[setting.scale]
    results = []
    for i, name in enumerate(scale.classes):
        folder = _begin(setting.out, f"{moco_length.NAME}-{name}", i, len(scale.classes))
        results.append(
            moco_length.run(name, scale, images, folder, fabric=setting.fabric, environment=setting.facts)
        )
    made = {key: _Result(table) for key, table in moco_length.tables(results).items()}
    made[moco_length.NAME] = _Result(made[moco_length.NAME].table, (moco_length.picture(results),))
    return results, made


_STUDIES = {
    "own-images": _own_images,
    "head-study": _head_study,
    "explanation": _explanation,
    moco_length.NAME: _moco_length,
}


@functools.cache
def _images(data: theory.Data, root: Path | None) -> cifar10.Images:
    """Decode a data set once, however many results are made from it."""
    return theory.load_images(data, root)


def _begin(out: Path, name: str, i: int, of: int) -> Path:
    console.print(f"network {i + 1} of {of}: {name}", style="dim")
    folder = out / name
    folder.mkdir(exist_ok=True)
    return folder


def _print(table: Table) -> None:
    grid = Grid(box=None, pad_edge=False, header_style="bold")
    for i, header in enumerate(table.headers):
        grid.add_column(header, justify="left" if i == 0 else "right", no_wrap=i == 0)
    for row in table.rows:
        grid.add_row(*row)
    console.print(table.title, style="bold")
    console.print(grid)
    for note in table.notes:
        console.print(f"- {note}", soft_wrap=True)
