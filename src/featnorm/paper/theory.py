"""The networks behind the paper's figures: why the norm detects (paper sec. 3 and 4, supplements A and B).

A network is trained once, with a probe at every epoch, and serves every figure that asks for it.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from featnorm._utils.files import replacing
from featnorm._utils.sealed import read_sealed, write_sealed
from featnorm.inputs import open_source
from featnorm.models import Normalize, cifar_network
from featnorm.models.cifar import CIFAR10_MEAN, CIFAR10_STD
from featnorm.models.heads import Activation
from featnorm.norms import l0_norm, l1_norm
from featnorm.paper import cifar10
from featnorm.paper.networks import MLP
from featnorm.paper.probe import LAST, Probe, spaced
from featnorm.paper.recipe import PRESETS, PaperRecipe, Scheme
from featnorm.paper.recipe import scheme_labels as targets_of
from featnorm.tap import FeatureTap
from featnorm.training import train

Data = Literal["cifar10", "svhn", "mnist"]

SCHEMES: tuple[Scheme, ...] = ("S", "I", "Is", "R", "O")
ACTIVATIONS: tuple[Activation, ...] = ("relu", "leaky_relu", "gelu")
#: The hidden layers of the MLP, and the stages of the ResNet, each with what a figure calls it.
MLP_LAYERS = {f"1.body.{2 * k}": f"layer {k}" for k in range(1, 5)} | {LAST: "layer 5"}
RESNET_LAYERS = {"1.stem": "stem"} | {f"1.stages.{2 * k - 1}": f"stage {k}" for k in range(1, 5)} | {LAST: "head"}
HIDDEN = 512
_WEIGHT_DECAY = 5e-4
_PATTERNS = 50


@dataclass(frozen=True)
class Scale:
    """How large the convolutional networks are and how long they are trained; the MLPs are the paper's own.

    Parameters
    ----------
    name : "laptop" or "paper".
    width : channels of the first stage of the ResNet-18.
    images : of CIFAR-10 that it is trained on, evenly spaced over the training images; None for all.
    recipe : of the ResNet-18.
    mlp : of the MLP.
    """

    name: str
    width: int
    images: int | None
    recipe: PaperRecipe
    mlp: PaperRecipe


SCALES = {
    "laptop": Scale("laptop", 16, 2500, replace(PRESETS["B"], epochs=60, batch_size=64), PRESETS["A.3.1"]),
    "paper": Scale("paper", 64, None, PRESETS["B"], PRESETS["A.3.1"]),
}


@dataclass(frozen=True)
class Job:
    """A network to train.

    Parameters
    ----------
    network : "mlp" or "resnet".
    data : what it is trained on.
    activation : of the hidden layers of an MLP, or of the head's.
    scheme : the labels, see `featnorm.training.scheme_labels`.
    decay : whether its weights decay.
    """

    network: Literal["mlp", "resnet"]
    data: Data = "cifar10"
    activation: Activation = "relu"
    scheme: Scheme = "S"
    decay: bool = False

    @property
    def folder(self) -> str:
        """A name for its folder."""
        return f"{self.network}-{self.data}-{self.activation}-{self.scheme}" + ("-decay" if self.decay else "")

    def recipe(self, scale: Scale) -> PaperRecipe:
        """Return the settings of its training."""
        recipe = scale.mlp if self.network == "mlp" else scale.recipe
        recipe = recipe.under(self.scheme)
        return replace(recipe, weight_decay=_WEIGHT_DECAY) if self.decay else recipe


def _mlps(data: Data) -> list[Job]:
    return [Job("mlp", data, activation) for activation in ACTIVATIONS]


_SCHEMES = [Job("resnet", scheme=scheme) for scheme in SCHEMES]
#: What each figure is made from.
FIGURES: dict[str, list[Job]] = {
    "figure1": [_SCHEMES[0], Job("resnet", decay=True)],
    "figure2": [Job("mlp")],
    "figure3": _SCHEMES,
    "figure4": _SCHEMES,
    "figure5": _SCHEMES,
    "figure6": [_SCHEMES[0]],
    "figure8": [job for job in _SCHEMES if job.scheme in ("I", "S", "R")],
    "figure9": _SCHEMES,
    "figure10": _SCHEMES,
    "figure11": _SCHEMES,
    "figure12": _mlps("cifar10"),
    "figure13": _mlps("svhn"),
    "figure14": _mlps("mnist"),
}


def load_images(data: Data, root: Path | None, *, progress: bool | None = None) -> cifar10.Images:
    """Decode a data set; with CIFAR-10 come the OOD sets of its benchmark.

    Raises
    ------
    featnorm.inputs.DataError
        It cannot be had, or an image cannot be read.
    """
    if data == "cifar10":
        return cifar10.load_images(root, progress=progress)
    side = 28 if data == "mnist" else 32
    folds = []
    for split in ("train", "test"):
        source = open_source(f"{data}:{split}", root=root)
        pixels, labels = cifar10.labelled(source, side, progress=progress)
        folds.append((pixels[:, :1].contiguous() if data == "mnist" else pixels, labels))
    facts = {"training images": f"{data}:train, {len(folds[0][0])}", "in-distribution": f"{data}:test"}
    return cifar10.Images(folds[0], folds[1], {}, facts)


def build(job: Job, scale: Scale, shape: torch.Size, classes: int, seed: int = 0) -> nn.Sequential:
    """Return a network for pixels (c, h, w) of that shape in [0, 1], with the initial weights of a seed."""
    if job.network == "resnet":
        return cifar_network(scale.width, classes, hidden=HIDDEN, activation=job.activation, seed=seed)
    # The caller's random state is theirs.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        mean, std = ((0.1307,), (0.3081,)) if job.data == "mnist" else (CIFAR10_MEAN, CIFAR10_STD)
        return nn.Sequential(Normalize(mean, std), MLP(shape.numel(), classes, activation=job.activation))


def run(
    job: Job,
    scale: Scale,
    images: cifar10.Images,
    folder: Path,
    *,
    fabric: Any,
    environment: Mapping[str, str],
    progress: bool | None = None,
) -> dict[str, Any]:
    """Train a network with a probe, or go on where its training was left.

    Parameters
    ----------
    job, scale : what to train.
    images : see `load_images`.
    folder
        Of this run; it holds ``checkpoint.pt``, ``log.jsonl``, ``probe.jsonl``, ``run.json``, and
        ``end.safetensors`` with what `end` returns.
    fabric : a launched `lightning_fabric.Fabric`, of one process.
    environment : facts of versions, machine and date, which are kept.
    progress : show progress bars; None for where there is a terminal.

    Returns
    -------
    ``made_with``, ``environment``, the probe's ``records``, and ``end``.

    Raises
    ------
    ValueError
        The folder holds a run of other settings.
    """
    inputs, labels = images.train
    if job.network == "resnet":
        inputs, labels = spaced(inputs, scale.images), spaced(labels, scale.images)
    recipe = job.recipe(scale)
    made_with = {
        "scale": scale.name,
        "job": asdict(job),
        "width": scale.width,
        "recipe": recipe.to_dict(),
        "inputs": len(inputs),
        "images": images.facts,
    }
    facts_file, end_file = folder / "run.json", folder / "end.safetensors"
    targets, classes = targets_of(job.scheme, labels)
    model = build(job, scale, inputs.shape[1:], classes)
    # The test images have the labels of the data; under the other schemes there is nothing to tell of them.
    test_targets = images.test[1] if job.scheme == "S" else None
    # Figure 6 alone looks inside a ResNet, and its maps are most of what a probe costs.
    layers: Mapping[str, str] = {LAST: "head"}
    if job.network == "mlp":
        layers = MLP_LAYERS
    elif job in FIGURES["figure6"]:
        layers = RESNET_LAYERS
    probe = Probe(
        {"train": (inputs, targets), "test": (images.test[0], test_targets)},
        images.ood if job.network == "resnet" else {},
        layers=[layer for layer in layers if layer != LAST],
        hidden=list(layers) if job.network == "mlp" else [LAST],
        pre_activation="2.hidden" if job.network == "resnet" else None,
        file=folder / "probe.jsonl",
    )
    if facts_file.exists():
        kept = read_sealed(facts_file)
        if other := [key for key, value in made_with.items() if kept["made_with"].get(key) != value]:
            raise ValueError(f"{folder} holds a run of other {' and '.join(other)}: choose another with --out")
        if kept.pop("end") != _digest_of(end_file):
            raise ValueError(f"{end_file} is damaged: delete {facts_file} to make it again")
        return {**kept, "records": probe.records, "end": load_file(end_file)}
    train(model, inputs, targets, recipe, folder=folder, fabric=fabric, progress=progress, on_epoch=probe)
    with replacing(end_file) as temporary:
        save_file(end(model, probe), temporary)
    kept = {"made_with": made_with, "environment": dict(environment)}
    write_sealed(facts_file, {**kept, "end": _digest_of(end_file)})
    return {**kept, "records": probe.records, "end": load_file(end_file)}


def _digest_of(file: Path) -> str | None:
    """Return the SHA-256 of a file, or None where there is none."""
    if not file.is_file():
        return None
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def end(model: nn.Module, probe: Probe) -> dict[str, Tensor]:
    """Return, by set of a probe, what figures show of the trained network's last hidden layer.

    Returns
    -------
    ``norm:SET`` and ``l0:SET`` (n,), and ``pattern:SET`` (k, d) uint8, the units that are on for 50 of its inputs.
    """
    tap = FeatureTap(model.eval())
    found: dict[str, Tensor] = {}
    for name, pixels in ({fold: values[0] for fold, values in probe.folds.items()} | probe.ood).items():
        a = tap(pixels.float().div(255)).tensor("activation").cpu()
        found[f"norm:{name}"] = l1_norm(a)
        found[f"l0:{name}"] = l0_norm(a)
        chosen = np.linspace(0, len(a) - 1, min(_PATTERNS, len(a))).round().astype(int)
        found[f"pattern:{name}"] = (a[chosen] > 0).to(torch.uint8)
    return found
