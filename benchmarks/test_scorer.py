"""A Scorer with NAN compared with the bare ResNet-18 at 32 x 32: at most 2 % more, at batch 1 at most 50 µs."""

import pytest
import torch
from torchvision.models import resnet18

import featnorm as fn

SECONDS = 50e-6


@pytest.mark.parametrize("batch", [1, 256])
def test_forward(compare, size, batch):
    model = resnet18(num_classes=10).eval()
    inputs = torch.randn(batch, 3, 32, 32)
    scorer = fn.Scorer(model, fn.NAN()).calibrate([torch.randn(64, 3, 32, 32)])
    rounds = size(500, 30) if batch == 1 else size(15, 3)
    work, sizes = f"Scorer with NAN, batch {batch}", f"({batch}, 3, 32, 32)"
    with torch.no_grad():
        medians = compare.time(
            work, lambda: scorer(inputs), {"the model": (lambda: model(inputs), 1.02)}, rounds=rounds, sizes=sizes
        )
    if batch == 1 and medians:
        more = medians["ours"] - medians["the model"]
        compare.record(
            f"{work}, more than the model", more, "50 µs", SECONDS, 1, unit="s", rounds=rounds, sizes=sizes
        )
