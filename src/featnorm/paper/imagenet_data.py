"""Data sets and weights of the ImageNet-1k benchmark: where they are looked for, and how to get them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from featnorm._utils.extras import import_extra
from featnorm.inputs import DataError, ImageSource, SlicedSource, open_source
from featnorm.paper.checkpoints import CLASSES
from featnorm.paper.study import MissingError

_WISC = "http://pages.cs.wisc.edu/~huangrui/imagenet_ood_dataset"
_OPENOOD = "OpenOOD (github.com/Jingkang50/OpenOOD, scripts/download/download.py"
_ILSVRC = "ILSVRC 2012 from image-net.org, in one folder per class (WordNet number)"


@dataclass(frozen=True)
class ImageSet:
    """A data set of the benchmark.

    Parameters
    ----------
    specs : specifications under the data root, see `featnorm.inputs.open_source`; messages name the first.
    get : how to get it, for messages.
    count : required number of images. Default: any.
    classes : required number of classes. Default: labels are not needed.
    """

    specs: tuple[str, ...]
    get: str
    count: int | None = None
    classes: int | None = None

    def find(self, root: Path | None) -> ImageSource:
        """Open it.

        Raises
        ------
        DataError
            It is missing or incomplete; the message names where it is looked for, and how to get it.
        """
        if root is None:
            raise DataError(f"{self.specs[0]}: no data root is set (--data-root, FEATNORM_DATA). {self.get}")
        where = root / self.specs[0].replace(":", "/")
        spec = next((spec for spec in self.specs if _exists(root, spec)), None)
        if spec is None:
            raise DataError(f"{where}: no such folder, nor {where}.parquet. {self.get}")
        try:
            source = open_source(spec, root=root)
        except DataError as error:
            raise DataError(f"{error}. {self.get}") from error
        if self.count is not None and len(source) != self.count:
            raise DataError(f"{where} has {len(source):,} images, not {self.count:,}: {self.get}")
        if self.classes is not None:
            found = len({source.label(i) for i in range(len(source))} - {None})
            if found != self.classes:
                raise DataError(f"{where} has {found:,} classes, not {self.classes:,}: {self.get}")
        return source


#: The OOD sets of the paper's Tables 1, 2, 6 and 9, as selected by Huang and Li (MOS, CVPR 2021): they have no
#: class of ImageNet-1k. Textures is all of DTD.
OOD_SETS = {
    "iNaturalist": ImageSet(("iNaturalist",), f"Unpack {_WISC}/iNaturalist.tar.gz", 10_000),
    "SUN": ImageSet(("SUN",), f"Unpack {_WISC}/SUN.tar.gz", 10_000),
    "Places": ImageSet(("Places",), f"Unpack {_WISC}/Places.tar.gz", 10_000),
    "Textures": ImageSet(
        ("dtd/images", "dtd/dtd/images"),
        "Unpack dtd-r1.0.1.tar.gz of https://www.robots.ox.ac.uk/~vgg/data/dtd/",
        5_640,
    ),
}
#: The other OOD sets of Table 12.
MORE_OOD_SETS = {
    "ImageNet-O": ImageSet(
        ("imagenet-o",), "Unpack https://people.eecs.berkeley.edu/~hendrycks/imagenet-o.tar", 2_000
    ),
    "OpenImage-O": ImageSet(
        ("openimage_o",), f"Unpack openimage_o of {_OPENOOD}), the list of github.com/haoqiwang/vim", 17_632
    ),
    "Species": ImageSet(("species_sub", "species"), f"Unpack species_sub of {_OPENOOD})"),
}
_TRAIN = ImageSet(("imagenet:train",), f"Unpack ILSVRC2012_img_train.tar of {_ILSVRC}", 1_281_167, CLASSES)
_VAL = ImageSet(
    ("imagenet:val",),
    f"Unpack ILSVRC2012_img_val.tar of {_ILSVRC}: its files have no folders; valprep.sh of "
    "github.com/soumith/imagenetloader.torch makes them",
    50_000,
    CLASSES,
)
_SAMPLE = ImageSet(
    ("imagenet1k_sample",),
    "Take one image of each class of ILSVRC 2012's validation set, in the order of the classes, with "
    "labels: a parquet file, or one folder per class",
    CLASSES,
    CLASSES,
)
_TINY = {
    split: ImageSet(
        (f"tiny_imagenet:{split}",),
        "Unpack http://cs231n.stanford.edu/tiny-imagenet-200.zip, in one folder per class",
        classes=200,
    )
    for split in ("train", "val")
}
_SOME_TEXTURES = ImageSet(("ood224/textures",), "Take the folders of some or all categories of DTD's images/")
#: Numbers of Tiny ImageNet's images that take minutes on two cores; of its OOD sets every second image is used.
TINY_TRAIN, TINY_TEST = 4_000, 500
#: Side of Tiny ImageNet's images; others are shrunk to it, or their sharpness alone would give them away.
TINY_SIDE = 64


@dataclass(frozen=True)
class Data:
    """The images of a benchmark, not decoded yet.

    Parameters
    ----------
    train, test : in-distribution images.
    ood : OOD sets by name.
    classes : class of ImageNet-1k for each label of ``train``.
    side : side in pixels that images are shrunk to before the network's own transform. Default: not shrunk.
    """

    train: ImageSource
    test: ImageSource
    ood: Mapping[str, ImageSource]
    classes: Tensor
    side: int | None = None

    @property
    def facts(self) -> dict[str, str]:
        """Where the images are from, and how many there are."""
        facts = {
            "training images": f"{self.train.title}, {len(self.train)}",
            "in-distribution": f"{self.test.title}, {len(self.test)}",
            **{f"OOD, {name}": f"{source.title}, {len(source)}" for name, source in self.ood.items()},
        }
        return facts if self.side is None else {**facts, "resolution": f"all shrunk to {self.side} pixels"}


def _open(root: Path | None, *wanted: ImageSet) -> list[ImageSource]:
    """Open data sets; a `MissingError` names all that are missing."""
    found, missing = [], []
    for data_set in wanted:
        try:
            found.append(data_set.find(root))
        except DataError as error:
            missing.append(str(error))
    if missing:
        raise MissingError(missing)
    return found


def _imagenet(ood: Mapping[str, ImageSet]) -> Callable[[Path | None], Data]:
    def open_all(root: Path | None) -> Data:
        train, test, *sets = _open(root, _TRAIN, _VAL, *ood.values())
        return Data(train, test, dict(zip(ood, sets, strict=True)), torch.arange(CLASSES))

    return open_all


def _sample(root: Path | None) -> Data:
    """One image per class: those of even classes to fit on, the others to test."""
    sample, textures = _open(root, _SAMPLE, _SOME_TEXTURES)
    halves = [
        SlicedSource(sample, range(first, len(sample), 2), f"{sample.title}[{first}::2]") for first in range(2)
    ]
    return Data(halves[0], halves[1], {"textures": textures}, torch.arange(CLASSES))


def _tiny(root: Path | None) -> Data:
    """The 200 classes of Tiny ImageNet; OOD are the other classes of ImageNet-1k, and textures, shrunk alike."""
    train, test, sample, textures = _open(root, _TINY["train"], _TINY["val"], _SAMPLE, _SOME_TEXTURES)
    numbers = {synset: i for i, synset in enumerate(import_extra("timm.data").ImageNetInfo().label_names())}
    if train.class_names is None or not set(train.class_names) <= set(numbers):
        raise DataError(
            f"the classes of {train.title} are not WordNet numbers such as n01443537: rename the folders"
        )
    tiny = [numbers[synset] for synset in train.class_names]
    rows = [i for i in range(len(sample)) if sample.label(i) not in tiny]
    others = SlicedSource(sample, rows[::2], f"{sample.title}, every second class that is not in Tiny ImageNet")
    some = SlicedSource(textures, range(0, len(textures), 2), f"{textures.title}[::2]")
    ood = {"other classes": others, "textures": some}
    return Data(_first(train, TINY_TRAIN), _first(test, TINY_TEST), ood, torch.tensor(tiny), TINY_SIDE)


#: Functions that open the data of each benchmark, by name; a `MissingError` names all missing data sets.
DATA: dict[str, Callable[[Path | None], Data]] = {
    "four OOD sets": _imagenet(OOD_SETS),
    "seven OOD sets": _imagenet({**OOD_SETS, **MORE_OOD_SETS}),
    "imagenet1k_sample": _sample,
    "tiny_imagenet": _tiny,
}


def _first(source: ImageSource, count: int) -> ImageSource:
    if len(source) <= count:
        return source
    return SlicedSource(source, range(count), f"{source.title}[:{count}]")


def _exists(root: Path, spec: str) -> bool:
    path = root / spec.replace(":", "/")
    return path.is_dir() or path.with_name(f"{path.name}.parquet").is_file()


@dataclass(frozen=True)
class Weights:
    """A checkpoint, and how to get it."""

    file: str
    get: str


_TORCH_HUB = "https://download.pytorch.org/models"
WEIGHTS = {
    "resnet50": Weights("resnet50-0676ba61.pth", f"Download {_TORCH_HUB}/resnet50-0676ba61.pth"),
    "supcon": Weights(
        "supcon.pth",
        "Unpack checkpoints/imagenet/pytorch_resnet50-supcon_imagenet/supcon.pth of the pre-trained models that "
        "the readme of github.com/deeplearning-wisc/knn-ood links",
    ),
    "moco": Weights(
        "moco_v2_800ep_pretrain.pth.tar",
        "Download https://dl.fbaipublicfiles.com/moco/moco_checkpoints/moco_v2_800ep/moco_v2_800ep_pretrain.pth.tar",
    ),
    "vit": Weights("vit_b_16-c867db91.pth", f"Download {_TORCH_HUB}/vit_b_16-c867db91.pth"),
}
#: File of SupCon's classifier, if its checkpoint has none.
LINEAR = "supcon_linear.pth"


@dataclass(frozen=True)
class Shrunk:
    """A transform that shrinks the central square of an image first.

    Parameters
    ----------
    transform : transform of the shrunk image.
    side : side of the shrunk image, in pixels.
    """

    transform: Callable[[Image.Image], Tensor]
    side: int

    def __call__(self, image: Image.Image) -> Tensor:
        """Return the transformed image."""
        if image.size != (self.side, self.side):
            short = min(image.size)
            left, top = ((length - short) // 2 for length in image.size)
            box = (left, top, left + short, top + short)
            image = image.resize((self.side, self.side), Image.Resampling.BOX, box=box)
        return self.transform(image)


def missing_weights(name: str, folder: Path | None) -> list[str]:
    """Return a line that names a network's missing checkpoint and how to get it, or nothing."""
    wanted = WEIGHTS.get(name)
    if wanted is None or (folder is not None and (folder / wanted.file).is_file()):
        return []
    if folder is None:
        return [f"{wanted.file}: no folder of weights is set (--weights). {wanted.get}"]
    return [f"{folder / wanted.file}: no such file. {wanted.get}"]
