"""What the ImageNet-1k benchmark is made of: data sets and weights, where they are looked for, how to get them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from featnorm.inputs import DataError, ImageSource, SlicedImages, open_images
from featnorm.inputs.images import vision_module
from featnorm.paper.checkpoints import CLASSES

_WISC = "http://pages.cs.wisc.edu/~huangrui/imagenet_ood_dataset"
_OPENOOD = "OpenOOD (github.com/Jingkang50/OpenOOD, scripts/download/download.py"
_ILSVRC = "ILSVRC 2012 from image-net.org, in a folder a class (WordNet number)"


@dataclass(frozen=True)
class ImageSet:
    """A data set of the benchmark.

    Parameters
    ----------
    places : where it may lie under the data root, as `featnorm.inputs.open_images` takes them; the first is named.
    get : where it comes from.
    count : how many images there must be; None for any number.
    classes : how many classes there must be; None for those without labels.
    """

    places: tuple[str, ...]
    get: str
    count: int | None = None
    classes: int | None = None

    def find(self, root: Path | None) -> ImageSource:
        """Open it.

        Raises
        ------
        DataError
            It is not there, or not whole; the message says where it is looked for and how to get it.
        """
        if root is None:
            raise DataError(f"{self.places[0]}: no data root is set (--data-root, FEATNORM_DATA). {self.get}")
        where = root / self.places[0].replace(":", "/")
        place = next((place for place in self.places if _there(root, place)), None)
        if place is None:
            raise DataError(f"{where}: no such folder, nor {where}.parquet. {self.get}")
        try:
            source = open_images(place, root=root)
        except DataError as error:
            raise DataError(f"{error}. {self.get}") from error
        if self.count is not None and len(source) != self.count:
            raise DataError(f"{where} has {len(source):,} images where {self.count:,} belong: {self.get}")
        if self.classes is not None:
            found = len({source.label(i) for i in range(len(source))} - {None})
            if found != self.classes:
                raise DataError(f"{where} has {found:,} classes where {self.classes:,} belong: {self.get}")
        return source


#: The OOD sets of the paper's Tables 1, 2, 6 and 9, as Huang and Li cut them (MOS, CVPR 2021): no class of
#: ImageNet-1k is in them. Textures is the whole of DTD.
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
#: What Table 12 adds to them.
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
    f"Unpack ILSVRC2012_img_val.tar of {_ILSVRC}: its files come without folders, which valprep.sh of "
    "github.com/soumith/imagenetloader.torch makes",
    50_000,
    CLASSES,
)
_SAMPLE = ImageSet(
    ("imagenet1k_sample",),
    "Take one image of each class of ILSVRC 2012's validation set, in the order of the classes, with "
    "labels: a parquet file, or a folder a class",
    CLASSES,
    CLASSES,
)
_TINY = {
    split: ImageSet(
        (f"tiny_imagenet:{split}",),
        "Unpack http://cs231n.stanford.edu/tiny-imagenet-200.zip, in a folder a class",
        classes=200,
    )
    for split in ("train", "val")
}
_SOME_TEXTURES = ImageSet(("ood224/textures",), "Take the folders of some or all categories of DTD's images/")
#: So many of Tiny ImageNet's images two cores ask for in minutes; of the OOD sets beside it, every second one.
TINY_TRAIN, TINY_TEST = 4_000, 500
#: Of the images of Tiny ImageNet; others are shrunk to it, or their sharpness alone would tell them apart.
TINY_SIDE = 64


@dataclass(frozen=True)
class Data:
    """The images of a benchmark, none of them read yet.

    Parameters
    ----------
    train, test : in-distribution.
    ood : by name.
    classes : of each label of ``train``, its class of ImageNet-1k.
    side : to shrink every image to before the network's own transform; None for images as they are.
    """

    train: ImageSource
    test: ImageSource
    ood: Mapping[str, ImageSource]
    classes: Tensor
    side: int | None = None

    @property
    def facts(self) -> dict[str, str]:
        """Where the images came from, and how many there are."""
        facts = {
            "training images": f"{self.train.title}, {len(self.train)}",
            "in-distribution": f"{self.test.title}, {len(self.test)}",
            **{f"OOD, {name}": f"{source.title}, {len(source)}" for name, source in self.ood.items()},
        }
        return facts if self.side is None else {**facts, "resolution": f"all shrunk to {self.side} pixels"}


def _imagenet(ood: Mapping[str, ImageSet]) -> Callable[["_Finder"], Data | None]:
    def open_all(find: "_Finder") -> Data | None:
        train, test = find(_TRAIN), find(_VAL)
        found = {name: find(each) for name, each in ood.items()}
        if train is None or test is None:
            return None
        return Data(train, test, _present(found), torch.arange(CLASSES))

    return open_all


def _sample(find: "_Finder") -> Data | None:
    """One image a class: those of even classes to fit on, the others to test."""
    sample, textures = find(_SAMPLE), find(_SOME_TEXTURES)
    if sample is None or textures is None:
        return None
    halves = [
        SlicedImages(sample, range(first, len(sample), 2), f"{sample.title}[{first}::2]") for first in range(2)
    ]
    return Data(halves[0], halves[1], {"textures": textures}, torch.arange(CLASSES))


def _tiny(find: "_Finder") -> Data | None:
    """The 200 classes of Tiny ImageNet; what ImageNet-1k has besides them, and textures, as small as they are."""
    train, test = find(_TINY["train"]), find(_TINY["val"])
    sample, textures = find(_SAMPLE), find(_SOME_TEXTURES)
    if train is None or test is None or sample is None or textures is None:
        return None
    numbers = {synset: i for i, synset in enumerate(vision_module("timm.data").ImageNetInfo().label_names())}
    if train.class_names is None or not set(train.class_names) <= set(numbers):
        raise DataError(f"the classes of {train.title} are not called by their WordNet numbers, as n01443537")
    known = [numbers[synset] for synset in train.class_names]
    rows = [i for i in range(len(sample)) if sample.label(i) not in known]
    others = SlicedImages(sample, rows[::2], f"{sample.title}, every second class that is not in Tiny ImageNet")
    some = SlicedImages(textures, range(0, len(textures), 2), f"{textures.title}[::2]")
    ood = {"other classes": others, "textures": some}
    return Data(_first(train, TINY_TRAIN), _first(test, TINY_TEST), ood, torch.tensor(known), TINY_SIDE)


#: The data of each benchmark, by name.
DATA: dict[str, Callable[["_Finder"], Data | None]] = {
    "four OOD sets": _imagenet(OOD_SETS),
    "seven OOD sets": _imagenet({**OOD_SETS, **MORE_OOD_SETS}),
    "imagenet1k_sample": _sample,
    "tiny_imagenet": _tiny,
}


class _Finder:
    """Opens data sets; writes down what is missing of them, once each."""

    def __init__(self, root: Path | None) -> None:
        self.root = root
        self.problems: dict[ImageSet, str] = {}
        self.found: dict[ImageSet, ImageSource] = {}

    def __call__(self, wanted: ImageSet) -> ImageSource | None:
        if wanted not in self.found and wanted not in self.problems:
            try:
                self.found[wanted] = wanted.find(self.root)
            except DataError as error:
                self.problems[wanted] = str(error)
        return self.found.get(wanted)


def open_data(name: str, root: Path | None) -> tuple[Data | None, list[str]]:
    """Return the data of a benchmark, one of `DATA`, and all that is missing of it; either is empty."""
    find = _Finder(root)
    data = DATA[name](find)
    problems = list(find.problems.values())
    return (None if problems else data), problems


def _first(source: ImageSource, count: int) -> ImageSource:
    if len(source) <= count:
        return source
    return SlicedImages(source, range(count), f"{source.title}[:{count}]")


def _present(found: Mapping[str, ImageSource | None]) -> dict[str, ImageSource]:
    return {name: source for name, source in found.items() if source is not None}


def _there(root: Path, place: str) -> bool:
    path = root / place.replace(":", "/")
    return path.is_dir() or path.with_name(f"{path.name}.parquet").is_file()


@dataclass(frozen=True)
class Weights:
    """A checkpoint, and where it comes from."""

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
#: SupCon's classifier, where its checkpoint has none.
LINEAR = "supcon_linear.pth"


@dataclass(frozen=True)
class Shrunk:
    """A transform of the middle square of an image, shrunk before.

    Parameters
    ----------
    transform : of the shrunk image.
    side : to shrink it to, in pixels.
    """

    transform: Callable[[Image.Image], Tensor]
    side: int

    def __call__(self, image: Image.Image) -> Tensor:
        """Return what the transform makes of the shrunk image."""
        if image.size != (self.side, self.side):
            short = min(image.size)
            left, top = ((length - short) // 2 for length in image.size)
            box = (left, top, left + short, top + short)
            image = image.resize((self.side, self.side), Image.Resampling.BOX, box=box)
        return self.transform(image)


def missing_weights(name: str, folder: Path | None) -> list[str]:
    """Say which checkpoint of a network is missing and how to get it; nothing where none is."""
    wanted = WEIGHTS.get(name)
    if wanted is None or (folder is not None and (folder / wanted.file).is_file()):
        return []
    if folder is None:
        return [f"{wanted.file}: no folder of weights is set (--weights). {wanted.get}"]
    return [f"{folder / wanted.file}: no such file. {wanted.get}"]
