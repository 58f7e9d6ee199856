"""The images of the reproduction at 32 x 32: CIFAR-10 and its OOD sets."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from featnorm._utils.layout import fast_layout
from featnorm.inputs import DataError, ImageSource, image_tensor, open_source
from featnorm.paper.study import Context

SIDE = 32
_CPU = torch.device("cpu")
#: CIFAR-10's, in the order of their labels.
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

#: The paper's OOD sets, with the name under which each is found in the data root or downloaded. CSI's two "fix"
#: sets are in no registry: they must be in the data root.
PAPER_SETS = {
    "LSUN-fix": "lsun_fix",
    "ImageNet-fix": "imagenet_fix",
    "CIFAR-100": "cifar100:test",
    "SVHN": "svhn:test",
    "Places365": "places365:val",
}
#: A folder of the data root with other OOD sets at 32 x 32, which replace those of the paper that are not in the
#: root.
OWN_FOLDER = "ood32"


@dataclass
class Images:
    """The decoded images of a benchmark, and where they came from."""

    train: tuple[Tensor, Tensor]  # (n, c, h, w) uint8, (n,)
    test: tuple[Tensor, Tensor]
    ood: dict[str, Tensor] = field(default_factory=dict)
    facts: dict[str, str] = field(default_factory=dict)  # set -> where it is from, and number of images
    missing: dict[str, str] = field(default_factory=dict)  # OOD set -> why it is missing


def cifar10_images(context: Context) -> Images:
    """Decode CIFAR-10 and the OOD sets of its benchmark, see `load_images`; note the missing ones."""
    images = load_images(context.root, progress=context.progress)
    note_missing(images.missing, context)
    return images


def note_missing(missing: Mapping[str, str], context: Context) -> None:
    """Tell the user which data sets are missing, and why."""
    for name, why in missing.items():
        context.note(f"without {name}: {why}")


def load_images(
    root: Path | None, paper_sets: Mapping[str, str] = PAPER_SETS, *, progress: bool | None = None
) -> Images:
    """Decode CIFAR-10 and OOD sets.

    The OOD sets are the paper's for a table, from the data root or downloaded. If the data root has a folder
    ``ood32``, they are the parquet files and folders in it, and those of the paper's that are in the root.

    Raises
    ------
    DataError
        CIFAR-10, or every OOD set, is missing; or an image cannot be read.
    """
    train, test = (open_source(f"cifar10:{split}", root=root) for split in ("train", "test"))
    sets, missing = _ood_sources(root, paper_sets)
    if not sets:
        raise DataError(
            "every OOD set is missing: " + "; ".join(f"{name}: {why}" for name, why in missing.items())
        )
    images = Images(
        labeled(train, SIDE, progress=progress),
        labeled(test, SIDE, progress=progress),
        {name: image_tensor(source, SIDE, progress=progress) for name, source in sets.items()},
        missing=missing,
    )
    images.facts = {
        "training images": f"cifar10:train, {len(train)}",
        "in-distribution": f"cifar10:test, {len(test)}",
        **{f"OOD, {name}": f"{source.title}, {len(source)}" for name, source in sets.items()},
    }
    return images


def labeled(
    source: ImageSource, side: int, *, classes: int = len(CLASSES), progress: bool | None = None
) -> tuple[Tensor, Tensor]:
    """Decode images, and return them with their labels.

    Parameters
    ----------
    source : images with labels.
    side : side of the squares that the images are resized to, in pixels.
    classes : number of classes; labels are below it.
    progress : whether to show a progress bar. Default: yes.

    Returns
    -------
    (n, 3, side, side) uint8 and (n,).

    Raises
    ------
    DataError
        An image has no such label, or cannot be read.
    """
    labels = [source.label(i) for i in range(len(source))]
    wrong = next((i for i, label in enumerate(labels) if label is None or label >= classes), None)
    if wrong is not None:
        raise DataError(f"{source.name(wrong)} of {source.title} has no label below {classes}")
    return image_tensor(source, side, progress=progress), torch.tensor(labels)


def as_pixels(images: Tensor, device: torch.device = _CPU) -> Tensor:
    """Return uint8 images as pixels in [0, 1] on a device, in the layout of `fast_layout`."""
    return fast_layout(images.to(device)).float().div_(255)


def spaced(values: Tensor, count: int | None) -> Tensor:
    """Return ``count`` rows, evenly spaced, since the images of a folder are sorted by class.

    All of them, not copied, if there are no more, or ``count`` is None.
    """
    if count is None or len(values) <= count:
        return values
    return values[torch.linspace(0, len(values) - 1, count).round().long()]


def _ood_sources(
    root: Path | None, paper_sets: Mapping[str, str]
) -> tuple[dict[str, ImageSource], dict[str, str]]:
    own: dict[str, str] = {}
    if root is not None and (root / OWN_FOLDER).is_dir():
        paths = sorted(path for path in (root / OWN_FOLDER).iterdir() if path.name[0] != ".")
        own = {path.stem: str(path) for path in paths if path.is_dir() or path.suffix == ".parquet"}
    sets: dict[str, ImageSource] = {}
    missing: dict[str, str] = {}
    for name, spec in {**paper_sets, **own}.items():
        folder = spec.partition(":")[0]
        if own and name not in own and not any((root or Path()).glob(f"{folder}*")):
            missing[name] = f"not in the data root, whose folder {OWN_FOLDER} replaces it"
            continue
        try:
            sets[name] = open_source(spec, root=root)
        except DataError as error:
            missing[name] = str(error)
    return sets, missing
