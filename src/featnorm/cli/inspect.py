"""``featnorm inspect``: what a fitted file holds, or the last hidden layer of a model."""

import json
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer

from featnorm.cli.console import console
from featnorm.cli.options import DATA, ChannelAxis, DataRoot, Layer, LayerPooling, TextColumn, Weights

_INPUTS = 64


def inspect(
    scorer_file: Annotated[
        Path | None, typer.Argument(metavar="[SCORER]", help="File written by `featnorm fit` or `Scorer.save`.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="SPEC",
            help="Model to inspect: `timm:NAME`, `torchvision:NAME`, `featnorm:NAME`, `hf:FOLDER` or "
            "`MODULE:FUNCTION`.",
        ),
    ] = None,
    weights: Weights = None,
    data: Annotated[
        str | None, typer.Option(metavar="DATA", help=f"Inputs to trace the model on: {DATA}. Default: noise.")
    ] = None,
    layer: Layer = None,
    channel_axis: ChannelAxis = None,
    pooling: LayerPooling = "mean",
    text_column: TextColumn = None,
    data_root: DataRoot = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what SCORER holds as JSON.")] = False,
) -> None:
    """Show what a fitted file holds, or find the last hidden layer of a model.

    For a model, it reports whether the negative-aware norm works on its last hidden layer. A file is read without
    its model.
    """
    if (scorer_file is None) == (model is None):
        raise ValueError("pass either a file SCORER or a model with --model")
    if scorer_file is not None:
        if (data, weights, layer, channel_axis, pooling) != (None, None, None, None, "mean"):
            raise ValueError(
                "--data, --weights, --layer, --channel-axis and --pooling are for --model, not for a file"
            )
        from featnorm.scorer_file import summarize

        summary = summarize(scorer_file)
        if as_json:
            console.print(json.dumps(summary, indent=2), soft_wrap=True)
        else:
            tensors = len(summary.pop("tensors"))
            _print_summary({**summary, "tensors": f"{tensors}, which --json lists"})
        return
    if as_json:
        raise ValueError("--json is for a file SCORER, not for --model")
    assert model is not None
    _inspect_model(model, weights, data, (layer, channel_axis, pooling), data_root, text_column)


def _print_summary(summary: dict[str, Any]) -> None:
    """Print a summary, one line per entry, and those of nested entries indented."""
    for name, value in summary.items():
        if isinstance(value, dict):
            console.print(f"{name}:")
            for inner, text in value.items():
                console.print(f"  {inner}: {_text(text)}", soft_wrap=True)
        else:
            console.print(f"{name}: {_text(value)}", soft_wrap=True)


def _text(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _inspect_model(
    model: str,
    weights: Path | None,
    data: str | None,
    captured: tuple[Any, ...],
    data_root: Path | None,
    text_column: str | None,
) -> None:
    import torch

    from featnorm.inputs import IMAGES, open_source, source_loader
    from featnorm.inputs.loading import named
    from featnorm.models import create_model
    from featnorm.models.loading import brings_weights, users_forward
    from featnorm.tap import FeatureTap

    # Pretrained weights would have to be downloaded, and the layers do not depend on them.
    needed = data is not None or brings_weights(model)
    loaded = create_model(model, weights=weights, pretrained=weights is None and needed)
    layer, channel_axis, pooling = captured
    tap = FeatureTap(loaded.model, layer, channel_axis=channel_axis, pooling=pooling)
    if data is not None:
        source = open_source(data, root=data_root, labels=False, text_column=text_column)
        source.require(loaded.kind, model)
        # One batch of readable images is enough.
        loader = source_loader(source, loaded.transform, batch_size=_INPUTS, workers=0)
        batch = next(islice(loader, 1), None)
        if batch is None:
            raise ValueError(f"none of the first {_INPUTS} {source.kind.name} of {data} can be read")
        with users_forward(model, tap.model, named(source, batch.indices.tolist())):
            tap.trace(batch.inputs)
        console.print(tap.describe(), soft_wrap=True)
        return
    if loaded.kind is IMAGES:
        on = "noise"
        inputs: Any = torch.randn(2, *loaded.input_size, generator=torch.Generator().manual_seed(0))
        what = f"noise of shape (2, {', '.join(map(str, loaded.input_size))})"
    else:
        on = what = f"{loaded.kind.one} of reference"
        inputs = loaded.kind.collate([loaded.transform(loaded.kind.reference())] * 2, loaded.transform)
    with users_forward(model, tap.model, what):
        tap.trace(inputs)
    console.print(tap.describe(), soft_wrap=True)
    how = "" if weights is not None or needed else ", with random weights instead of the pretrained ones"
    console.print(
        f"Traced on {on}{how}. Use --data to measure the share of inactive units on real inputs.", style="dim"
    )
