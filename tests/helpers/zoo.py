"""Models of timm and torchvision with random weights, and what `FeatureTap` finds in them beside what they say."""

import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from featnorm.tap import FeatureTap

CLASSES = 10
SIZE = 64  # of the images, if the model accepts it


def build(library: str, name: str, **options: Any) -> nn.Module:
    """Return a model in evaluation mode, none of whose parameters or statistics is constant."""
    if library == "timm":
        import timm

        model = timm.create_model(name, pretrained=False, num_classes=CLASSES, **options)
    else:
        import torchvision

        model = torchvision.models.get_model(name, weights=None, num_classes=CLASSES, **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        # Zero heads, equal heads and norms that do nothing would hide errors.
        for parameter in model.parameters():
            if parameter.ndim < 2 or not parameter.any():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.normal_(0, 0.1, generator=generator)
                module.running_var.uniform_(0.5, 1.5, generator=generator)
    return model.eval()


def sizes(library: str, model: nn.Module) -> Iterator[int]:
    config = getattr(model, "default_cfg", {})
    usual = config.get("input_size", (3, 299 if type(model).__name__.startswith("Inception") else 224))[1]
    if library == "torchvision" or not config.get("fixed_input_size"):
        yield max(SIZE, config.get("min_input_size", (3, 0))[1])
    yield usual


def images(size: int) -> Tensor:
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(2))


def error(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference, relative to the largest value."""
    if found.shape != expected.shape:
        return float("inf")
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30))


def check(library: str, name: str) -> dict[str, Any]:
    """Return a row of the table of models."""
    begin = time.perf_counter()
    model = build(library, name)
    for size in sizes(library, model):
        x = images(size)
        try:
            with torch.no_grad():
                logits = model(x)
        except (RuntimeError, AssertionError, ValueError, TypeError, IndexError):
            continue
        break
    tap = FeatureTap(model)
    features = tap(x)
    row: dict[str, Any] = {"library": library, "name": name, "size": size}
    row["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    row["logits"] = None if features.logits is None else error(features.logits, logits)
    row["width"] = None if features.pooled is None else features.pooled.shape[1]
    if library == "timm" and features.pooled is not None:
        with torch.no_grad():
            expected = model.forward_head(model.forward_features(x), pre_logits=True)
        if isinstance(expected, tuple):
            expected = torch.cat(expected, 1)
        row["expected_width"] = expected.flatten(1).shape[1]
        row["pooled"] = error(features.pooled, expected.flatten(1))
    row["activation"] = None if features.activation is None else features.activation.shape[1]
    row["classifier"] = None
    if features.classifier is not None:
        read = features.pooled if features.activation is None else features.activation
        weight, bias = features.classifier
        row["classifier"] = error(read @ weight.T + (0 if bias is None else bias), logits)
    row["words"] = tap.describe()
    row["absent"] = dict(features.absent)
    row["seconds"] = time.perf_counter() - begin
    return row
