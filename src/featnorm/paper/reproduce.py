"""``featnorm reproduce``: the tables and figures of the paper, with our numbers beside the paper's."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.table import Table as Grid

from featnorm._utils.files import write_text
from featnorm.cli.console import console, environment, prepare_folder
from featnorm.cli.options import DataRoot, Device, Precision

if TYPE_CHECKING:
    from featnorm.paper.study import Context, Study
    from featnorm.paper.tables import Table

_ALL = "all"


def _complete(incomplete: str) -> list[str]:
    from featnorm.paper.study import studies

    return [name for name in (_ALL, *studies()) if name.startswith(incomplete)]


def reproduce(
    name: Annotated[
        str | None,
        typer.Argument(
            help="Name of a table, figure or study, such as `table3` (see `--list`), or `all`: everything for "
            "which you have the data sets, with one page of results.",
            autocompletion=_complete,
        ),
    ] = None,
    list_: Annotated[
        bool,
        typer.Option("--list", help="List the names, each with its title, its scales and how long it takes."),
    ] = False,
    scale: Annotated[
        Literal["laptop", "workstation", "gpu", "paper"],
        typer.Option(
            help="`paper`: the paper's protocol. `laptop`: a smaller one, for two CPU cores. Some studies have "
            "more: `workstation`, several hours on two CPU cores; `gpu`, ten minutes of a current GPU, with "
            "`--precision bf16-mixed --compile`."
        ),
    ] = "laptop",
    data_root: DataRoot = None,
    weights: Annotated[
        Path | None,
        typer.Option(help="Folder of the authors' checkpoints, for the ImageNet-1k tables at scale `paper`."),
    ] = None,
    out: Annotated[
        Path,
        typer.Option(
            "--out", "-o", help="Output folder for networks and tables; an interrupted run is resumed from it."
        ),
    ] = Path("featnorm-reproduction"),
    device: Device = "auto",
    precision: Precision = "32-true",
    compiled: Annotated[
        bool,
        typer.Option(
            "--compile",
            help="Compile the networks before training: a sixth faster on a CPU, after half a minute per network "
            "and crop size. Requires a C++ compiler.",
        ),
    ] = False,
) -> None:
    """Reproduce a table or figure of the paper, with our numbers beside the paper's.

    Trains the networks it needs. Rerun the same command to resume an interrupted run.
    """
    if list_:
        _print_list()
        return
    if name is None:
        raise ValueError("NAME is missing: `featnorm reproduce --list` lists the names")
    from featnorm.cli.runtime import runtime_of
    from featnorm.inputs import DataError
    from featnorm.paper.study import Context, MissingError, studies

    available = studies()
    if name not in (_ALL, *available):
        raise ValueError(f"unknown name {name!r}: choose {_ALL}, or one of {', '.join(available)}")
    out = out / scale
    files = ["results.html"] if name == _ALL else [f"{name}.json", f"{name}.md"]
    prepare_folder(out, [out / file for file in files])
    runtime = runtime_of(device, precision, compiled=compiled)
    facts = {
        "device": f"{runtime.torch_device}, {precision}" + (", compiled" if compiled else ""),
        **environment(),
    }

    def note(line: str) -> None:
        console.print(line, style="dim", soft_wrap=True)

    context = Context(scale, data_root, weights, out, runtime, facts, note=note)
    if name == _ALL:
        _make_all(available, context)
        return
    try:
        _make(available[name], context)
    except MissingError as error:
        for line in error.lines:
            print(f"- {line}", file=sys.stderr)
        raise DataError(
            f"cannot run {name} at scale {scale}: {len(error.lines)} data sets or checkpoints are "
            "missing (listed above)"
        ) from None
    console.print(f"Wrote {out / name}.md.", soft_wrap=True)


def _print_list() -> None:
    """Print the studies: name, title, scales, and roughly how long they take."""
    from featnorm.paper.study import studies

    grid = _grid(["Name", "What it is", "Scales", "Laptop, one core"], left=4)
    for name, study in studies().items():
        duration = study.duration or (f"as {study.shares}" if study.shares else "")
        grid.add_row(name, study.title, ", ".join(study.scales), duration)
    console.print(grid)


def _make_all(available: Mapping[str, Study[Any, Any, Any]], context: Context) -> None:
    """Make every study that can be made; the page grows with each result, and names the ones that are missing."""
    from featnorm.paper.page import Section, write_results_page

    page, sections, missing = context.out / "results.html", list[Section](), dict[str, str]()
    for name, study in available.items():
        console.print(name, style="bold")
        try:
            tables, pictures = _make(study, context)
        except (ValueError, OSError) as error:
            missing[name] = str(error)
            context.note(f"not made: {error}")
        else:
            for i, (key, table) in enumerate(tables.items()):
                drawn = list(pictures.values()) if i == 0 else []
                sections.append(Section(key, table, drawn))
        write_results_page(
            page,
            sections,
            title=f"The paper's results, at {context.scale} scale",
            summary="Every table and figure that could be made here, the paper's numbers beside ours.",
            facts=context.environment,
            missing=missing,
        )
    console.print(f"Wrote {page}.", soft_wrap=True)


def _make(study: Study[Any, Any, Any], context: Context) -> tuple[dict[str, Table], dict[str, str]]:
    """Make a study, write its files and print its tables; return its tables and pictures by name."""
    for content in study.make(context):
        tables = study.tables(content)
        write_text(context.out / f"{study.name}.json", json.dumps(content, indent=1) + "\n")
        write_text(context.out / f"{study.name}.md", "\n".join(table.markdown() for table in tables.values()))
    pictures = study.pictures(content)
    for key, picture in pictures.items():
        write_text(context.out / f"{key}.svg", picture)
    for table in tables.values():
        _print(table)
    return tables, pictures


def _print(table: Table) -> None:
    grid = _grid(table.headers)
    for row in table.rows:
        grid.add_row(*row)
    console.print(table.title, style="bold")
    console.print(grid)
    for line in table.notes:
        console.print(f"- {line}", soft_wrap=True)


def _grid(headers: list[str], left: int = 1) -> Grid:
    """Return an empty table; its first columns are aligned left, as many as ``left``."""
    grid = Grid(box=None, pad_edge=False, header_style="bold")
    for i, header in enumerate(headers):
        grid.add_column(header, justify="left" if i < left else "right", no_wrap=i == 0)
    return grid
