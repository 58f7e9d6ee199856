"""Options and arguments that several commands share, each declared once, as the type of a parameter."""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from featnorm.inputs import Source

DATA = (
    "an image folder, a video or a folder of videos, a parquet file, a file of texts (.csv, .jsonl, .parquet, or "
    ".txt with one per line) or of rows of numbers (.npy, .npz, .csv, .jsonl, .parquet), local or in an object "
    "store (`s3://bucket/photos`), or a named data set, such as `cifar10:test`; append a slice to use a part of "
    "it: `DATA[:500]`, `DATA[1::2]`"
)
"""What a specification of data may be, for help texts."""


def _batch_size(text: str) -> int | None:
    if text == "auto":
        return None
    if not (text.isascii() and text.isdigit() and int(text)):
        raise typer.BadParameter(f"{text!r} is neither a positive integer nor auto")
    return int(text)


ScorerFile = Annotated[
    Path, typer.Argument(metavar="SCORER", help="File written by `featnorm fit`, or by `Scorer.save`.")
]
OwnModel = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="SPEC",
        help="Required if the file does not contain its model, or if the model is your own: `MODULE:FUNCTION`, or "
        "a library's model with `--weights`. If the file contains weights, the model gets these.",
    ),
]
OwnWeights = Annotated[
    Path | None,
    typer.Option(
        "--weights",
        metavar="FILE",
        help="Weights file of `--model`, for a SCORER that does not contain its model.",
    ),
]
Weights = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="Weights file (.pth or .safetensors). Default: the library's pretrained weights."
    ),
]
Detectors = Annotated[
    list[str] | None,
    typer.Option(
        "--detector",
        metavar="EXPR",
        help="Detector expression, such as `NAN`, `KNN(k=50)/NAN` or `KLUniform + KNN(k=10)`. Repeat for several. "
        "Default: the standard set.",
    ),
]
Layer = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", help="Module whose output is the last hidden layer. Detected automatically by default."
    ),
]
ChannelAxis = Annotated[
    int | None,
    typer.Option(
        metavar="AXIS",
        help="Axis of the units in the output of --layer: `1` for maps (n, d, ...), `-1` for tokens (n, ..., d). "
        "Default: inferred from the module.",
    ),
]
LayerPooling = Annotated[
    Literal["mean", "norm"],
    typer.Option(
        help="How the positions of a unit in the output of --layer become one number: their `mean`, or the `norm` "
        "of their positive parts."
    ),
]
PerPart = Annotated[
    Literal["input", "position", "box"],
    typer.Option(
        "--per",
        help="What gets a verdict: each `input`, each `position` of the maps that the model returns, such as a "
        "segmentation model, or each `box` that an R-CNN of torchvision finds.",
    ),
]
LabelColumn = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Column of a table that holds the labels: integers, strings or booleans. Default: `label`, if there "
        "is one.",
    ),
]
TextColumn = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Column of a table that holds the texts. Default: `text`, or else the only column of strings beside "
        "the labels.",
    ),
]
ScoredTextColumn = Annotated[
    str | None,
    typer.Option(
        "--text-column",
        metavar="NAME",
        help="Column of a table that holds the texts. Default: the column that SCORER was fitted to, if the "
        "table has it.",
    ),
]
KeptColumns = Annotated[
    list[str] | None,
    typer.Option(
        "--keep",
        metavar="NAME,...",
        help="Columns of the table of DATA, such as an ID and the text, to copy to --out. May be repeated.",
    ),
]
FPS = 1.0
"""Number of frames per second that are read of videos by default."""
_FPS_HELP = "Number of frames per second to read of videos; 0 for all frames."
Fps = Annotated[float, typer.Option(min=0, help=_FPS_HELP)]
ScoredFps = Annotated[
    float | None, typer.Option(min=0, help=f"{_FPS_HELP} Default: as for the fit of SCORER, or {FPS:g}.")
]
OutFile = Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="Output file.")]
OutFolder = Annotated[Path, typer.Option("--out", "-o", metavar="FOLDER", help="Output folder.")]
DataRoot = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER",
        envvar="FEATNORM_DATA",
        help="Folder in which named data sets are looked up first, and to which they are downloaded.",
    ),
]
Device = Annotated[
    Literal["auto", "cpu", "cuda", "mps"],
    typer.Option(
        help="Device to run the model on; `auto`: the accelerator of this machine, or the CPU if there is none."
    ),
]
# Those under which the weights stay as they are; Lightning Fabric would convert them for the others.
Precision = Annotated[
    Literal["32-true", "bf16-mixed", "16-mixed"],
    typer.Option(help="Precision of the forward pass, in Lightning Fabric's notation."),
]
Engine = Annotated[
    Literal["auto", "torch", "onnx"],
    typer.Option(
        help="What runs the model: `torch` (PyTorch), `onnx` (onnxruntime, about twice as fast on a CPU), or "
        "`auto`: onnxruntime for 1000 items or more, if it is installed and gives the same results."
    ),
]
BatchSize = Annotated[
    int | None,
    typer.Option(
        parser=_batch_size,
        metavar="N",
        help="Number of items per batch, or `auto`, the default: 64 images or texts, 1024 rows. PyTorch then runs "
        "8 images at a time on a CPU if the first batches take less time that way.",
    ),
]
Workers = Annotated[
    int | None, typer.Option(min=0, help="Number of threads that decode items. Default: one per CPU, at most 8.")
]
Ray = Annotated[
    bool,
    typer.Option(
        "--ray",
        help="Run on the Ray cluster at RAY_ADDRESS, or on a local one of all CPU cores if that is not set. Every "
        "machine of the cluster must be able to read the data.",
    ),
]
Tpr = Annotated[
    float | None,
    typer.Option(
        help="Share of in-distribution items to accept, by the stored calibration scores. Default: that of SCORER."
    ),
]
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of all random choices.")]


def open_for(
    facts: Mapping[str, str], *data: str, text_column: str | None, fps: float | None, **options: Any
) -> "Source[Any]":
    """Open data without labels, by default with the frames per second and the text column of a scorer's facts.

    Data without that column are opened as for a fit.
    """
    from featnorm.inputs import DataError, open_source

    options |= {"labels": False, "fps": float(facts.get("frames per second", FPS)) if fps is None else fps}
    if text_column is None and "text column" in facts:
        with suppress(DataError):
            return open_source(*data, text_column=facts["text column"], **options)
    return open_source(*data, text_column=text_column, **options)
