"""Classifiers of timm and torchvision with random weights, and what `FeatureTap` finds in them."""

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from torch import Tensor, nn

import featnorm as fn

CLASSES = 10
SIZE = 64  # of the images, if the model accepts it
TOLERANCE = 1e-5

# The smallest model of every family, and others with a head of their own.
TIMM = Path(__file__).with_suffix(".txt").read_text(encoding="utf-8").split()
TORCHVISION = torchvision.models.list_models(module=torchvision.models)

AVERAGED = "timm averages the two tokens; `pooled` is both of them, side by side"
MLP = "timm returns the hidden layer of the MLP head, which is `activation`; `pooled` is the input of the head"
MLP_NORM = "timm returns the normalized or scaled hidden layer of the MLP head; `pooled` is the input of the head"
DIFFERENCES = {
    r"deit.*_distilled.*|pit.*_distilled.*": (AVERAGED, ""),
    r"cpubone.*": (MLP, "head.pre_classifier"),
    r"lowformer.*": (MLP, "pre_classifier"),
    r"efficientvit_[bl].*": (MLP, "head.classifier"),
    r"(fasternet|ghostnet|hardcorenas|lcnet|fbnetv3|(tf_)?mobilenetv3|mobilenetv4|repghostnet).*": (
        MLP,
        "conv_head",
    ),
    r"hgnet_.*": (MLP, "head.last_conv"),
    r"test_mambaout": (MLP, "head.pre_logits"),
    r"hgnetv2.*": (MLP_NORM, "head.last_conv"),
    r"inception_next.*": (MLP_NORM, "head.fc1"),
    r"mambaout.*": (MLP_NORM, "head.pre_logits"),
}
"""Models in which ``pooled`` is not timm's pre-logits: the reason, and the module whose input it is."""

HEADS = {
    r"(googlenet|inception|regnet|resnet|resnext|shufflenet|wide_resnet).*": "fc",
    r"(alexnet|densenet|efficientnet|mnasnet|mobilenet|squeezenet|vgg).*": "classifier",
    r"convnext.*": "classifier.2",
    r"maxvit.*": "classifier.5",
    r"swin.*": "head",
    r"vit.*": "heads",
}
"""The module of torchvision's models whose input, averaged over space, is ``pooled``."""


@dataclass
class Row:
    """What was found in a model. Errors are the largest difference, relative to the largest value."""

    name: str
    size: int
    parameters: int
    logits: float  # error of the logits
    pooled: float  # error of the pooled feature
    width: int
    reason: str  # why timm's pre-logits are another value; "" if they are the same
    activation: int | None  # units of the last hidden layer
    classifier: float | None  # error of W f + b
    absent: dict[str, str]
    seconds: float

    def problems(self) -> list[str]:
        """Return what is wrong."""
        found = [f"{field} off by {error:.1e}" for field, error, bound in (
            ("logits", self.logits, 0), ("pooled", self.pooled, TOLERANCE),
            ("classifier", self.classifier or 0, 10 * TOLERANCE),
        ) if not error <= bound]  # fmt: skip
        missing = {"activation": self.activation, "classifier": self.classifier}
        return found + [f"{field} missing without a reason" for field, value in missing.items()
                        if value is None and not self.absent.get(field)]  # fmt: skip


def build(library: str, name: str) -> nn.Module:
    """Return a model in evaluation mode, none of whose parameters or statistics is constant."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if library == "timm":
            model = timm.create_model(name, pretrained=False, num_classes=CLASSES)
        else:
            model = torchvision.models.get_model(name, weights=None, num_classes=CLASSES)
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


def check(library: str, name: str) -> Row:
    """Compare what a tap finds in a model with the model's own output and pre-logits."""
    begin = time.perf_counter()
    model = build(library, name)
    x, logits = _run(library, model)
    patterns = HEADS if library == "torchvision" else DIFFERENCES
    found = next((value for pattern, value in patterns.items() if re.fullmatch(pattern, name)), ("", ""))
    reason, module = ("", found) if isinstance(found, str) else found
    read: list[Tensor] = []
    handle = None
    if module:
        handle = model.get_submodule(module).register_forward_pre_hook(lambda _, args: read.append(args[0]))
    with torch.no_grad():
        if module:
            model(x)
            handle.remove()
            expected = read[0].mean((2, 3)) if "squeezenet" in name else read[0].flatten(1)
        else:
            expected = model.forward_head(model.forward_features(x), pre_logits=True).flatten(1)
        hidden = model.forward_head(model.forward_features(x), pre_logits=True) if reason == MLP else None
    f = fn.FeatureTap(model)(x)
    assert f.pooled is not None, f.absent
    assert f.logits is not None, f.absent
    pooled = f.pooled.reshape(len(x), 2, -1).mean(1) if reason == AVERAGED else f.pooled
    classifier = None
    if f.classifier is not None:
        weight, bias = f.classifier
        features = f.pooled if f.activation is None else f.activation
        classifier = _error(features @ weight.T + (0 if bias is None else bias), logits)
    return Row(
        name=name,
        size=x.shape[-1],
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        logits=_error(f.logits, logits),
        pooled=max(_error(pooled, expected), 0 if hidden is None else _error(f.activation, hidden.flatten(1))),
        width=f.pooled.shape[1],
        reason=reason,
        activation=None if f.activation is None else f.activation.shape[1],
        classifier=classifier,
        absent=dict(f.absent),
        seconds=time.perf_counter() - begin,
    )


def _run(library: str, model: nn.Module) -> tuple[Tensor, Tensor]:
    """Return images of the smallest size that the model accepts, and its logits."""
    for size in _sizes(library, model):
        x = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(2))
        try:
            with torch.no_grad():
                return x, model(x)
        except (RuntimeError, AssertionError, ValueError, TypeError, IndexError):
            continue
    raise AssertionError("the model accepts no size that was tried")


def _sizes(library: str, model: nn.Module) -> Iterator[int]:
    config: dict[str, Any] = getattr(model, "default_cfg", {})
    if library == "torchvision":
        yield from (SIZE, 224, 299)
        return
    if not config["fixed_input_size"]:
        yield max(SIZE, config.get("min_input_size", (3, 0))[1])
    yield config["input_size"][1]


def _error(found: Tensor | None, expected: Tensor) -> float:
    if found is None or found.shape != expected.shape:
        return float("inf")
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
