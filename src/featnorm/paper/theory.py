"""The networks behind the paper's figures: why the norm detects (paper sec. 3 and 4, supplements A and B).

A network is trained once, with a probe at every epoch, and serves every figure that needs it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from featnorm.inputs import open_source
from featnorm.models import Normalize, cifar_network
from featnorm.models.cifar import CIFAR10_MEAN, CIFAR10_STD
from featnorm.models.heads import Activation
from featnorm.norms import l0_norm, l1_norm
from featnorm.paper.images import Images, as_pixels, cifar10_images, labeled, spaced
from featnorm.paper.networks import MLP
from featnorm.paper.probe import LAST, Probe
from featnorm.paper.recipe import PRESETS, PaperRecipe, Scheme, scheme_labels
from featnorm.paper.study import Context
from featnorm.tap import FeatureTap
from featnorm.training import train

Data = Literal["cifar10", "svhn", "mnist"]

SCHEMES: tuple[Scheme, ...] = ("S", "I", "Is", "R", "O")
ACTIVATIONS: tuple[Activation, ...] = ("relu", "leaky_relu", "gelu")
#: The hidden layers of the MLP, and the stages of the ResNet, with their names in figures.
MLP_LAYERS = {f"1.body.{2 * k}": f"layer {k}" for k in range(1, 5)} | {LAST: "layer 5"}
RESNET_LAYERS = {"1.stem": "stem"} | {f"1.stages.{2 * k - 1}": f"stage {k}" for k in range(1, 5)} | {LAST: "head"}
HIDDEN = 512
_WEIGHT_DECAY = 5e-4
_PATTERNS = 50
_BATCH = 250


@dataclass(frozen=True)
class Scale:
    """How large the convolutional networks are, and how long they are trained; the MLPs are the paper's own.

    Parameters
    ----------
    width : channels of the first stage of the ResNet-18.
    images : number of CIFAR-10's training images that the ResNet-18 is trained on, evenly spaced. None: all.
    recipe : settings of the ResNet-18.
    mlp : settings of the MLP.
    probed : number of inputs of each set that the probe reads, evenly spaced.
    others : number of images and number of epochs, by label scheme, where they differ from the above.
    variants : networks that the figure of the label schemes compares with those of the schemes.
    """

    width: int
    images: int | None
    recipe: PaperRecipe
    mlp: PaperRecipe
    probed: int = 500
    others: Mapping[Scheme, tuple[int, int]] = field(default_factory=dict)
    variants: Sequence["Job"] = ()


@dataclass(frozen=True)
class Job:
    """A network to train.

    Parameters
    ----------
    network : "mlp" or "resnet".
    data : data set that it is trained on.
    activation : activation of the hidden layers of an MLP, or of the head's hidden layer.
    scheme : label scheme, see `featnorm.paper.recipe.scheme_labels`.
    decay : whether to train with weight decay.
    augment : whether S is augmented if the settings of the scale are.
    width : channels of the first stage of the ResNet-18, where they are not those of the scale.
    seed : seed of the initial weights, the order and the augmentation.
    """

    network: Literal["mlp", "resnet"]
    data: Data = "cifar10"
    activation: Activation = "relu"
    scheme: Scheme = "S"
    decay: bool = False
    augment: bool = True
    width: int | None = None
    seed: int = 0

    @property
    def folder(self) -> str:
        """Name of its folder."""
        name = f"{self.network}-{self.data}-{self.activation}-{self.scheme}"
        name += ("-decay" if self.decay else "") + ("" if self.augment else "-plain")
        return name + (f"-width{self.width}" if self.width else "") + (f"-seed{self.seed}" if self.seed else "")

    def recipe(self, scale: Scale) -> PaperRecipe:
        """Return the settings of its training."""
        if self.network == "mlp":
            recipe = scale.mlp
        elif self.scheme in scale.others:
            recipe = replace(scale.recipe, epochs=scale.others[self.scheme][1])
        else:
            recipe = scale.recipe
        recipe = recipe.under(self.scheme)
        if self.scheme == "S" and not self.augment:
            recipe = replace(recipe, augment=False, crop=None)
        return replace(recipe, weight_decay=_WEIGHT_DECAY) if self.decay else recipe


#: Random bits and instances are memorized one by one: with all images, the loss of random bits did not decrease in
#: five epochs. The loss of a single class has no gradient, so more epochs change nothing.
_MEMORIZED: Mapping[Scheme, tuple[int, int]] = {
    "I": (10_000, 100),
    "Is": (10_000, 100),
    "R": (10_000, 100),
    "O": (10_000, 5),
}
#: They change one thing each: another draw, weight decay, no augmentation, and a wider network.
_VARIANTS = (
    Job("resnet", seed=1),
    Job("resnet", decay=True),
    Job("resnet", augment=False),
    Job("resnet", width=24),
)
_LONGER = replace(PRESETS["B"], epochs=40, batch_size=128, augment=True, crop=24)
SCALES = {
    "laptop": Scale(
        16, 2500, replace(PRESETS["B"], epochs=60, batch_size=64), PRESETS["A.3.1"], variants=_VARIANTS[:2]
    ),
    "workstation": Scale(16, None, _LONGER, PRESETS["A.3.1"], probed=1000, others=_MEMORIZED, variants=_VARIANTS),
    "paper": Scale(64, None, PRESETS["B"], PRESETS["A.3.1"], variants=_VARIANTS[:2]),
}


def _digits(data: Data, context: Context) -> Images:
    side = 28 if data == "mnist" else 32
    splits = []
    for split in ("train", "test"):
        source = open_source(f"{data}:{split}", root=context.root)
        pixels, labels = labeled(source, side, progress=context.progress)
        splits.append((pixels[:, :1].contiguous() if data == "mnist" else pixels, labels))
    facts = {"training images": f"{data}:train, {len(splits[0][0])}", "in-distribution": f"{data}:test"}
    return Images(splits[0], splits[1], facts=facts)


#: Functions that decode each data set, and for CIFAR-10 the OOD sets of its benchmark too.
LOADERS: Mapping[Data, Callable[[Context], Images]] = {
    "cifar10": cifar10_images,
    "svhn": partial(_digits, "svhn"),
    "mnist": partial(_digits, "mnist"),
}


def build(job: Job, scale: Scale, shape: torch.Size, classes: int, seed: int = 0) -> nn.Sequential:
    """Return a network for pixels in [0, 1] of shape (c, h, w), with the initial weights of a seed."""
    if job.network == "resnet":
        return cifar_network(
            job.width or scale.width, classes, hidden=HIDDEN, activation=job.activation, seed=seed
        )
    # The caller's random state is restored.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        mean, std = ((0.1307,), (0.3081,)) if job.data == "mnist" else (CIFAR10_MEAN, CIFAR10_STD)
        return nn.Sequential(Normalize(mean, std), MLP(shape.numel(), classes, activation=job.activation))


def training_images(job: Job, scale: Scale, images: Images) -> tuple[Tensor, Tensor]:
    """Return the images that a network is trained on, and the labels of the data set."""
    count = None
    if job.network == "resnet":
        count = scale.others[job.scheme][0] if job.scheme in scale.others else scale.images
    inputs, labels = images.train
    return spaced(inputs, count), spaced(labels, count)


def train_with_probe(
    job: Job, scale: Scale, images: Images, layers: Mapping[str, str], folder: Path, context: Context
) -> dict[str, Any]:
    """Train a network with a probe, or resume its training.

    Parameters
    ----------
    job, scale, images : what to train.
    layers : the layers to probe.
    folder : folder of the run; it holds ``checkpoint.pt``, ``log.jsonl`` and ``probe.jsonl``.
    context : device and progress bars.

    Returns
    -------
    The probe's ``records``; ``accuracy``, that of the network on all images of each split that has targets; and as
    ``tensors`` what `end` returns.
    """
    inputs, labels = training_images(job, scale, images)
    targets, classes = scheme_labels(job.scheme, labels)
    model = build(job, scale, inputs.shape[1:], classes, job.seed)
    # The test images have the labels of the data set, which mean nothing under the other schemes.
    test_targets = images.test[1] if job.scheme == "S" else None
    probe = Probe(
        {"train": (inputs, targets), "test": (images.test[0], test_targets)},
        images.ood if job.network == "resnet" else {},
        layers=[layer for layer in layers if layer != LAST],
        hidden=list(layers) if job.network == "mlp" else [LAST],
        pre_activation="2.hidden" if job.network == "resnet" else None,
        max_inputs=scale.probed,
        file=folder / "probe.jsonl",
    )
    train(
        model,
        inputs,
        targets,
        job.recipe(scale),
        folder=folder,
        runtime=context.runtime,
        seed=job.seed,
        on_epoch=probe,
    )
    accuracy = {"train": _accuracy(model, inputs, targets)}
    if test_targets is not None:
        accuracy["test"] = _accuracy(model, images.test[0], test_targets)
    return {"records": probe.records, "accuracy": accuracy, "tensors": end(model, probe)}


@torch.inference_mode()
def _accuracy(model: nn.Module, inputs: Tensor, targets: Tensor) -> float:
    device = next(model.parameters()).device
    predicted = torch.cat([model(as_pixels(batch, device)).argmax(1).cpu() for batch in inputs.split(_BATCH)])
    return float((predicted == targets).double().mean())


def end(model: nn.Module, probe: Probe) -> dict[str, Tensor]:
    """Return what figures show of the trained network's last hidden layer, by set of a probe.

    Returns
    -------
    ``norm:SET`` and ``l0:SET`` (n,), and ``pattern:SET`` (k, d) uint8, which units are on for 50 of its inputs.
    """
    tap = FeatureTap(model.eval())
    found: dict[str, Tensor] = {}
    for name, pixels in ({split: values[0] for split, values in probe.splits.items()} | probe.ood).items():
        a = tap(pixels.float().div(255)).tensor("activation").cpu()
        found[f"norm:{name}"] = l1_norm(a)
        found[f"l0:{name}"] = l0_norm(a)
        chosen = np.linspace(0, len(a) - 1, min(_PATTERNS, len(a))).round().astype(int)
        found[f"pattern:{name}"] = (a[chosen] > 0).to(torch.uint8)
    return found
