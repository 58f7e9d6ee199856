"""``featnorm reproduce``: the paper's tables with our numbers beside its own, and its figures."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table as Grid

from featnorm.cli.evaluate import fabric_of
from featnorm.cli.show import console, environment, prepare_folder
from featnorm.protocols import cifar10, explanations, heads, label_free, own_images, theory
from featnorm.protocols.figures import make_figure
from featnorm.protocols.tables import Table, make_table, width_figure

_Made = tuple[dict[str, Any], dict[str, Table]]


def run(name: str, scale: str, data_root: Path | None, out: Path, device: str, precision: str) -> None:
    """Train what a table or figure needs, or go on where that was left; write and print it."""
    every = (*cifar10.TABLES, *label_free.TABLES, *theory.FIGURES, *_STUDIES)
    if name not in every:
        raise ValueError(f"there is no {name!r} to reproduce: choose one of {', '.join(every)}")
    if scale not in cifar10.SCALES:
        raise ValueError(f"there is no scale {scale!r}: choose one of {', '.join(cifar10.SCALES)}")
    out = out / scale
    prepare_folder(out)
    fabric = fabric_of(device, precision)
    facts = {"device": f"{fabric.device}, {precision}", **environment()}
    if name in cifar10.TABLES:
        _table(name, scale, data_root, out, fabric, facts)
    elif name in label_free.TABLES:
        _frameworks(name, scale, data_root, out, fabric, facts)
    elif name in _STUDIES:
        _study(name, data_root, out, fabric, facts)
    else:
        _figure(name, scale, data_root, out, fabric, facts)
    console.print(f"Wrote {out / name}.md.", soft_wrap=True)


def _table(name: str, scale: str, data_root: Path | None, out: Path, fabric: Any, facts: dict[str, str]) -> None:
    images = _images(data_root, cifar10.PAPER_SETS)
    jobs = cifar10.jobs(name, cifar10.SCALES[scale])
    known = heads.pooled(images) if any(job.frozen for job in jobs) else None
    results: list[dict[str, Any]] = []
    for i, job in enumerate(jobs):
        folder = _begin(out, job.folder, i, len(jobs))
        if known is None:
            result = cifar10.run(job, cifar10.SCALES[scale], images, folder, fabric=fabric, environment=facts)
        else:
            result = heads.run(job, known, folder, environment=facts)
        results.append(result)
    _keep(name, results, out)
    if name == "figure7":
        (out / "figure7.svg").write_text(width_figure(results), encoding="utf-8")


def _frameworks(
    name: str, scale: str, data_root: Path | None, out: Path, fabric: Any, facts: dict[str, str]
) -> None:
    images = _images(data_root, label_free.TABLES[name])
    size = label_free.SCALES[scale]
    jobs = label_free.jobs(name, size)
    results = []
    for i, job in enumerate(jobs):
        folder = _begin(out, job.folder, i, len(jobs))
        results.append(label_free.run(job, size, images, folder, fabric=fabric, environment=facts))
    _keep(name, results, out)


def _images(data_root: Path | None, paper_sets: Mapping[str, str]) -> cifar10.Images:
    images = cifar10.load_images(data_root, paper_sets)
    for missing, why in images.missing.items():
        console.print(f"without {missing}: {why}", style="dim", soft_wrap=True)
    return images


def _keep(name: str, results: list[dict[str, Any]], out: Path) -> None:
    table = make_table(name, results)
    (out / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (out / f"{name}.md").write_text(table.markdown(), encoding="utf-8")
    _print(table)


def _study(name: str, data_root: Path | None, out: Path, fabric: Any, facts: dict[str, str]) -> None:
    result, made = _STUDIES[name](data_root, fabric, facts)
    (out / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    text = "\n".join(table.markdown() for table in made.values())
    (out / f"{name}.md").write_text(text, encoding="utf-8")
    for table in made.values():
        _print(table)


def _own_images(data_root: Path | None, fabric: Any, facts: dict[str, str]) -> _Made:
    result = own_images.run(data_root, fabric=fabric, environment=facts)
    return result, own_images.tables(result)


def _head_study(data_root: Path | None, fabric: Any, facts: dict[str, str]) -> _Made:
    result = heads.study(cifar10.load_images(data_root), environment=facts)
    return result, heads.tables(result)


def _explanation(data_root: Path | None, fabric: Any, facts: dict[str, str]) -> _Made:
    result = explanations.run(cifar10.load_images(data_root), environment=facts)
    return result, explanations.tables(result)


_STUDIES = {"own-images": _own_images, "head-study": _head_study, "explanation": _explanation}


def _figure(name: str, scale: str, data_root: Path | None, out: Path, fabric: Any, facts: dict[str, str]) -> None:
    jobs = theory.FIGURES[name]
    images = theory.load_images(jobs[0].data, data_root)
    runs = []
    for i, job in enumerate(jobs):
        folder = _begin(out, job.folder, i, len(jobs))
        runs.append(theory.run(job, theory.SCALES[scale], images, folder, fabric=fabric, environment=facts))
    figure = make_figure(name, runs)
    (out / f"{name}.svg").write_text(figure.svg, encoding="utf-8")
    (out / f"{name}.json").write_text(json.dumps(figure.to_json()) + "\n", encoding="utf-8")
    (out / f"{name}.md").write_text(figure.table.markdown(), encoding="utf-8")
    _print(figure.table)


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
