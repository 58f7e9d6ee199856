"""The commands and their options."""

import io
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core

from featnorm._utils.memory import keep_freed_memory
from featnorm.cli.faults import STATUSES


class Escaped(BaseException):
    """Carries an error past typer, which would make an ending of its own of it."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(error)
        self.error = error


class _Commands(typer.core.TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (KeyboardInterrupt, EOFError) as error:
            raise Escaped(error) from None


app = typer.Typer(
    cls=_Commands,
    name="featnorm",
    help="Does your PyTorch model know this input? Out-of-distribution detection by the negative-aware norm.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    epilog="Exit status: " + ", ".join(f"{status} {meaning}" for status, meaning in STATUSES.items()) + ".",
)

_DATA = (
    "an image folder, a parquet file, either in an object store (`s3://bucket/photos`), "
    "or a data set by name such as `cifar10:test`; "
    "a slice may follow, as in `DATA[:500]` or `DATA[1::2]`"
)
Model = Annotated[
    str, typer.Option(help="The model: `timm:NAME`, `torchvision:NAME`, `featnorm:NAME` or `MODULE:FUNCTION`.")
]
UsersModel = Annotated[
    str | None, typer.Option(help="`MODULE:FUNCTION`, again, of a detector that was fitted on a model of yours.")
]
Weights = Annotated[
    Path | None, typer.Option(help="Local weights (.pth, .safetensors); the library's own without it.")
]
Layer = Annotated[
    str | None, typer.Option(help="The module that puts out the last hidden layer; found without it.")
]
LabelColumn = Annotated[
    str | None,
    typer.Option(
        help="Column of a parquet file that holds the labels: integers, strings or booleans. Default: `label`, if "
        "there is one."
    ),
]
UseRay = Annotated[
    bool,
    typer.Option(
        "--ray",
        help="On the Ray cluster that RAY_ADDRESS names, or on one of all this machine's processors; its machines "
        "must be able to read the images.",
    ),
]
DataRoot = Annotated[
    Path | None,
    typer.Option(envvar="FEATNORM_DATA", help="Where data sets by name are looked for first, and loaded to."),
]
Device = Annotated[str, typer.Option(help="Where the model runs: `auto`, `cpu`, `cuda`, `mps`.")]
Precision = Annotated[
    str, typer.Option(help="As Lightning Fabric names it: `32-true`, `bf16-mixed` or `16-mixed`.")
]
BatchSize = Annotated[int, typer.Option(min=1, help="Images a batch.")]
Workers = Annotated[
    int | None, typer.Option(min=0, help="Number of threads that decode images. Default: one per CPU, at most 8.")
]


def _version(wanted: bool) -> None:
    if wanted:
        import featnorm

        typer.echo(f"featnorm {featnorm.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    # `featnorm.cli.entry` acts on it, wherever in the command it stands.
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of any error; may stand at the end of a command.")
    ] = False,
) -> None:
    """Take the options that belong to no command."""


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="The folder to write the page to.")] = Path("featnorm-demo"),
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of the split and the training.")] = 0,
) -> None:
    """Train a small network on handwritten digits and see which detectors tell what it does not know.

    No download, under a minute: digits and photographs that scikit-learn ships.
    """
    from featnorm.cli.demo import run

    run(out, seed)


@app.command()
def evaluate(
    model: Model,
    id_data: Annotated[str, typer.Option("--id", help=f"In-distribution inputs: {_DATA}.")],
    ood: Annotated[list[str], typer.Option(help="Out-of-distribution inputs, likewise; may be repeated.")],
    fit: Annotated[
        str | None, typer.Option(help="In-distribution inputs to fit on, for the detectors that learn.")
    ] = None,
    weights: Weights = None,
    detector: Annotated[
        list[str] | None,
        typer.Option(help="A detector, such as `NAN` or `KNN(k=50)/NAN`; may be repeated. All without it."),
    ] = None,
    layer: Layer = None,
    label_column: LabelColumn = None,
    out: Annotated[Path, typer.Option(help="The folder to write the page and the table to.")] = Path(
        "featnorm-evaluation"
    ),
    data_root: DataRoot = None,
    device: Device = "auto",
    precision: Precision = "32-true",
    batch_size: BatchSize = 64,
    workers: Workers = None,
) -> None:
    """Compare detectors on your model and data: a table and a page."""
    from featnorm.cli.evaluate import Options, run

    run(
        Options(
            model=model,
            weights=weights,
            id_data=id_data,
            ood=ood,
            fit=fit,
            detectors=detector,
            layer=layer,
            label_column=label_column,
            out=out,
            data_root=data_root,
            device=device,
            precision=precision,
            batch_size=batch_size,
            workers=workers,
        )
    )


@app.command()
def fit(
    data: Annotated[str, typer.Argument(help=f"Images of what belongs: {_DATA}.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The file to write.")] = Path("detector.featnorm"),
    model: Annotated[
        str,
        typer.Option(
            help="The backbone: `timm:NAME`, `torchvision:NAME`, `featnorm:NAME`, or `MODULE:FUNCTION`, a "
            "function of yours that returns a model, which without its classifier gives features, and its "
            "transform."
        ),
    ] = "featnorm:efficientnet-lite0",
    weights: Weights = None,
    detector: Annotated[str, typer.Option(help="A detector, such as `NAN` or `KNN(k=50)/NAN`.")] = "KLUniform",
    targets: Annotated[
        str,
        typer.Option(help="What the head learns: `labels`, `clusters` of the features, or `auto`, labels if any."),
    ] = "auto",
    label_column: LabelColumn = None,
    tpr: Annotated[float, typer.Option(help="The share of images like these to accept.")] = 0.95,
    cache: Annotated[
        Path | None, typer.Option(help="The folder to keep features in; `~/.cache/featnorm/features` without it.")
    ] = None,
    data_root: DataRoot = None,
    device: Device = "auto",
    precision: Precision = "32-true",
    batch_size: BatchSize = 64,
    workers: Workers = None,
    ray: UseRay = False,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of the head's training.")] = 0,
) -> None:
    """Learn what belongs to your images, and write a detector of what does not.

    Labels are used where there are any, and not needed. The features of a frozen backbone are kept on disk; the
    same command again, after a kill too, starts from them.
    """
    from featnorm.cli.fit import Options, run

    run(
        Options(
            data=data,
            out=out,
            model=model,
            weights=weights,
            detector=detector,
            targets=targets,
            tpr=tpr,
            cache=cache,
            label_column=label_column,
            data_root=data_root,
            device=device,
            precision=precision,
            batch_size=batch_size,
            workers=workers,
            ray=ray,
            seed=seed,
        )
    )


@app.command()
def score(
    detector: Annotated[Path, typer.Argument(help="A file that `featnorm fit` wrote.")],
    images: Annotated[list[str], typer.Argument(help=f"Image files, or {_DATA}.")],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="A .csv, .jsonl or .parquet file for a row an image; the terminal without it."
        ),
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(help="A page to write: the most foreign images first, where each lies, and why."),
    ] = None,
    model: UsersModel = None,
    data_root: DataRoot = None,
    device: Device = "auto",
    precision: Precision = "32-true",
    batch_size: BatchSize = 64,
    workers: Workers = None,
    ray: UseRay = False,
) -> None:
    """Say of every image whether it belongs: score, p-value, verdict, predicted class.

    With `--out` or `--html` the same command goes on after a kill.
    """
    from featnorm.cli.score import Options, run

    run(
        Options(
            detector=detector,
            images=images,
            out=out,
            html=html,
            model=model,
            data_root=data_root,
            device=device,
            precision=precision,
            batch_size=batch_size,
            workers=workers,
            ray=ray,
        )
    )


@app.command()
def monitor(
    detector: Annotated[Path, typer.Argument(help="A file that `featnorm fit` wrote.")],
    scores: Annotated[
        Path,
        typer.Argument(
            help="A .csv, .jsonl or .parquet file that `featnorm score --out` wrote, its rows in order of time."
        ),
    ],
    false_alarm: Annotated[
        float, typer.Option(help="The chance that a stream without drift ever raises the alarm.")
    ] = 0.01,
    html: Annotated[Path | None, typer.Option(help="A .html file for a page with the plots.")] = None,
) -> None:
    """Say whether images as a whole have drifted, though no single one may be extreme.

    For images that come in no order; neighboring frames of a video raise alarms without drift.
    The exit status is 0 without drift and 3 with drift.
    """
    from featnorm.cli.monitor import DRIFT, Options, run

    if run(Options(detector=detector, scores=scores, false_alarm=false_alarm, html=html)):
        raise typer.Exit(DRIFT)


@app.command()
def serve(
    detector: Annotated[Path, typer.Argument(help="A file that `featnorm fit` wrote.")],
    model: UsersModel = None,
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port; 0 for any that is free.")] = 8000,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(
            help="Host name under which clients reach the service, beside --host; `*` for any. Repeat for "
            "several. With --host 0.0.0.0 or ::, any IP address and `localhost` are allowed by themselves."
        ),
    ] = None,
    token_file: Annotated[
        Path | None,
        typer.Option(
            help="A file with the token that clients must send as `Authorization: Bearer TOKEN`; else what the "
            "variable FEATNORM_TOKEN holds. Anybody is served without either."
        ),
    ] = None,
    device: Device = "auto",
    precision: Precision = "32-true",
    batch_size: BatchSize = 32,
    max_body_bytes: Annotated[int, typer.Option(min=1, help="Maximum request size in bytes.")] = 16 * 2**20,
    max_images: Annotated[int, typer.Option(min=1, help="Maximum images per request.")] = 64,
    max_pixels: Annotated[int, typer.Option(min=1, help="Maximum pixels per image.")] = 50_000_000,
    max_queue: Annotated[
        int, typer.Option(min=1, help="Maximum images waiting for the model; above this, clients get 503.")
    ] = 256,
    max_queue_pixels: Annotated[
        int, typer.Option(min=1, help="Maximum pixels waiting to be decoded; above this, clients get 503.")
    ] = 800_000_000,
    max_seconds: Annotated[
        float,
        typer.Option(
            help="Request timeout in seconds, including upload. Clients get the same time to read the response."
        ),
    ] = 30.0,
    max_connections: Annotated[
        int, typer.Option(min=1, help="Maximum open connections; beyond, the longest idle one is closed.")
    ] = 512,
    grace_seconds: Annotated[float, typer.Option(help="Maximum seconds from SIGTERM or Ctrl+C to exit.")] = 10.0,
) -> None:
    """Judge images over HTTP, and on a page to drop them on.

    `POST /v1/score` takes an image, or several as a form or as base64 in JSON; `/openapi.json` says it all. A line
    of JSON a request goes to standard error, and counters for Prometheus are at `/metrics`.
    """
    from featnorm.cli.serve import Options, run
    from featnorm.serve import Limits

    run(
        Options(
            detector=detector,
            model=model,
            host=host,
            port=port,
            allowed_hosts=allowed_host or [],
            token_file=token_file,
            device=device,
            precision=precision,
            limits=Limits(
                body_bytes=max_body_bytes,
                images=max_images,
                pixels=max_pixels,
                queue=max_queue,
                queue_pixels=max_queue_pixels,
                seconds=max_seconds,
                batch_size=batch_size,
                connections=max_connections,
                grace=grace_seconds,
            ),
        )
    )


@app.command()
def export(
    detector: Annotated[Path, typer.Argument(help="A file that `featnorm fit` wrote.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The file to write.")] = Path("detector.onnx"),
    model: UsersModel = None,
) -> None:
    """Write one ONNX graph from image tensor to logits, score, p-value and verdict, and check it."""
    from featnorm.cli.export import run

    run(detector, out, model)


@app.command()
def inspect(
    model: Model,
    weights: Weights = None,
    data: Annotated[str | None, typer.Option(help=f"Inputs to trace the model on: {_DATA}.")] = None,
    layer: Layer = None,
    data_root: DataRoot = None,
) -> None:
    """Say where in a model its last hidden layer is, and what that means for the negative-aware norm."""
    from featnorm.cli.inspect import run

    run(model, weights, data, layer, data_root)


# By name: the command line lies below the reproduction, and imports nothing of it.
app.command()(import_module("featnorm.paper.command").reproduce)


def run(arguments: Sequence[str]) -> None:
    """Run the command that the arguments name; it ends by a SystemExit, or by whatever error it raised."""
    keep_freed_memory()
    # What Pillow remarks on a file is said, where it matters, by the error that names the file.
    warnings.filterwarnings("ignore", module="PIL")
    # A terminal that cannot show an arrow must not cost the result.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        app(arguments, prog_name="featnorm")
    except Escaped as escaped:
        raise escaped.error from None
