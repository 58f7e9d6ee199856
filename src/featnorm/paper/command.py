"""``featnorm reproduce``."""

from pathlib import Path
from typing import Annotated

import typer

from featnorm.cli.options import DataRoot, Device, Precision


def reproduce(
    name: Annotated[
        str,
        typer.Argument(
            help="Of the paper: `table1` to `table12`, `table3-label-free`, `table6-imagenet`, `figure1` to "
            "`figure14`; "
            "`own-images` and `head-study`, what its heads are worth elsewhere and what moves them; "
            "`moco-length`, whether and when NAN comes to work without labels; "
            "`explanation`, why inputs score as they do; and `all`, which makes what can be made here and one "
            "page of it."
        ),
    ],
    scale: Annotated[
        str, typer.Option(help="`paper`: its protocol, to the letter. `laptop`: what two cores do.")
    ] = "laptop",
    data_root: DataRoot = None,
    weights: Annotated[
        Path | None,
        typer.Option(help="The folder of the authors' checkpoints, for ImageNet-1k's tables at scale `paper`."),
    ] = None,
    out: Annotated[
        Path,
        typer.Option(
            "--out", "-o", help="The folder of the networks and tables; a run that was broken off goes on there."
        ),
    ] = Path("featnorm-reproduction"),
    device: Device = "auto",
    precision: Precision = "32-true",
    compiled: Annotated[
        bool,
        typer.Option(
            "--compile",
            help="Compile the networks that are trained: on a CPU a sixth faster, after half a minute for each "
            "network and size of crop. Needs a C++ compiler.",
        ),
    ] = False,
) -> None:
    """Train what a table or figure of the paper needs, and print our numbers beside the paper's."""
    from featnorm.paper.reproduce import run

    run(name, scale, data_root, weights, out, device, precision, compiled)
