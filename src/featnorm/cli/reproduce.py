"""``featnorm reproduce``: the paper's tables with our numbers beside its own."""

import json
from pathlib import Path
from typing import Any

from rich.table import Table as Grid

from featnorm.cli.evaluate import fabric_of
from featnorm.cli.show import console, environment, prepare_folder
from featnorm.protocols import cifar10
from featnorm.protocols.tables import Table, make_table, width_figure


def run(table: str, scale_name: str, data_root: Path | None, out: Path, device: str, precision: str) -> None:
    """Train what a table needs, or go on where that was left, and write and print the table."""
    if table not in cifar10.TABLES:
        raise ValueError(f"there is no {table!r} to reproduce: choose one of {', '.join(cifar10.TABLES)}")
    if scale_name not in cifar10.SCALES:
        raise ValueError(f"there is no scale {scale_name!r}: choose one of {', '.join(cifar10.SCALES)}")
    scale = cifar10.SCALES[scale_name]
    out = out / scale.name
    prepare_folder(out)
    fabric = fabric_of(device, precision)
    jobs = cifar10.jobs(table, scale)
    images = cifar10.load_images(data_root)
    for name, why in images.missing.items():
        console.print(f"without {name}: {why}", style="dim", soft_wrap=True)
    results: list[dict[str, Any]] = []
    for i, job in enumerate(jobs):
        console.print(f"network {i + 1} of {len(jobs)}: {job.folder}", style="dim")
        folder = out / job.folder
        folder.mkdir(exist_ok=True)
        facts = {"device": f"{fabric.device}, {precision}", **environment()}
        results.append(cifar10.run(job, scale, images, folder, fabric=fabric, environment=facts))
    write(table, results, out)
    _print(make_table(table, results))
    console.print(f"Wrote {out / table}.md.", soft_wrap=True)


def write(table: str, results: list[dict[str, Any]], out: Path) -> None:
    """Write a table, the results that it was made from, and for the figure its picture."""
    (out / f"{table}.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (out / f"{table}.md").write_text(make_table(table, results).markdown(), encoding="utf-8")
    if table == "figure7":
        (out / "figure7.svg").write_text(width_figure(results), encoding="utf-8")


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
