"""A Scorer with NAN against the bare model (ResNet-18 at 32 x 32)."""

import pytest
import torch
from torchvision.models import resnet18

import featnorm as fn


@pytest.mark.parametrize("what", ["model", "scorer"])
@pytest.mark.parametrize("batch", [1, 256])
def test_forward(benchmark, what, batch):
    benchmark.group = f"batch {batch}"
    model = resnet18(num_classes=10).eval()
    inputs = torch.randn(batch, 3, 32, 32)
    run = fn.Scorer(model, fn.NAN()).calibrate([torch.randn(64, 3, 32, 32)]) if what == "scorer" else model
    with torch.no_grad():
        run(inputs)
        benchmark.pedantic(run, (inputs,), rounds=200 if batch == 1 else 10)
