"""``featnorm inspect``: where a model's last hidden layer is."""

from itertools import islice
from pathlib import Path

import torch

from featnorm.cli.show import console
from featnorm.inputs import image_loader, open_source
from featnorm.inputs.loading import named
from featnorm.models import create_model
from featnorm.models.loading import brings_weights, users_forward
from featnorm.tap import FeatureTap

_INPUTS = 64


def run(model: str, weights: Path | None, data: str | None, layer: str | None, data_root: Path | None) -> None:
    """Watch the model on a batch, of data or of noise, and describe what was found."""
    # The library's weights would have to be downloaded, and where the layers are does not depend on them.
    needed = data is not None or brings_weights(model)
    loaded = create_model(model, weights=weights, pretrained=weights is None and needed)
    tap = FeatureTap(loaded.model, layer)
    if data is not None:
        source = open_source(data, root=data_root, labels=False)
        # One batch of readable images is enough to look at the model.
        loader = image_loader(source, loaded.transform, batch_size=_INPUTS, workers=0)
        batch = next(islice(loader, 1), None)
        if batch is None:
            raise ValueError(f"there is no readable image in the first {_INPUTS} of {data}")
        with users_forward(model, tap.model, named(source, batch.indices.tolist())):
            tap.trace(batch.images)
        console.print(tap.describe(), soft_wrap=True)
        return
    with users_forward(model, tap.model, f"noise of shape (2, {', '.join(map(str, loaded.input_size))})"):
        tap.trace(torch.randn(2, *loaded.input_size, generator=torch.Generator().manual_seed(0)))
    console.print(tap.describe(), soft_wrap=True)
    console.print("Watched on noise; with --data the share of inactive units is that of real inputs.", style="dim")
