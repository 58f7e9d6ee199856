"""``featnorm reproduce``: the tables and figures of the paper, with our numbers beside the paper's."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from featnorm.cli.options import DataRoot, Device, Precision

# What is large is imported when the command runs: `featnorm --help` reads the options alone.


def _complete(incomplete: str) -> list[str]:
    from featnorm.paper.reproduce import ALL
    from featnorm.paper.study import studies

    return [name for name in (ALL, *studies()) if name.startswith(incomplete)]


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
        Literal["laptop", "paper"],
        typer.Option(help="`paper`: the paper's protocol. `laptop`: a smaller one, for two CPU cores."),
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
    from featnorm.paper.reproduce import print_list, run

    if list_:
        print_list()
    elif name is None:
        raise ValueError("NAME is missing: `featnorm reproduce --list` lists the names")
    else:
        run(name, scale, data_root, weights, out, device, precision, compiled)
