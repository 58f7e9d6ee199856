"""``featnorm inspect``: the last hidden layer of a model."""

from itertools import islice
from typing import Annotated

import typer

from featnorm.cli.console import console
from featnorm.cli.options import DATA, DataRoot, Layer, Model, Weights

_INPUTS = 64


def inspect(
    model: Model,
    weights: Weights = None,
    data: Annotated[
        str | None, typer.Option(metavar="DATA", help=f"Inputs to trace the model on: {DATA}. Default: noise.")
    ] = None,
    layer: Layer = None,
    data_root: DataRoot = None,
) -> None:
    """Find the last hidden layer of a model, and report whether the negative-aware norm works there."""
    import torch

    from featnorm.inputs import image_loader, open_source
    from featnorm.inputs.loading import named
    from featnorm.models import create_model
    from featnorm.models.loading import brings_weights, users_forward
    from featnorm.tap import FeatureTap

    # Pretrained weights would have to be downloaded, and the layers do not depend on them.
    needed = data is not None or brings_weights(model)
    loaded = create_model(model, weights=weights, pretrained=weights is None and needed)
    tap = FeatureTap(loaded.model, layer)
    if data is not None:
        source = open_source(data, root=data_root, labels=False)
        # One batch of readable images is enough.
        loader = image_loader(source, loaded.transform, batch_size=_INPUTS, workers=0)
        batch = next(islice(loader, 1), None)
        if batch is None:
            raise ValueError(f"none of the first {_INPUTS} images of {data} can be read")
        with users_forward(model, tap.model, named(source, batch.indices.tolist())):
            tap.trace(batch.images)
        console.print(tap.describe(), soft_wrap=True)
        return
    with users_forward(model, tap.model, f"noise of shape (2, {', '.join(map(str, loaded.input_size))})"):
        tap.trace(torch.randn(2, *loaded.input_size, generator=torch.Generator().manual_seed(0)))
    console.print(tap.describe(), soft_wrap=True)
    console.print(
        "Traced on noise. Use --data to measure the share of inactive units on real inputs.", style="dim"
    )
