"""torchvision's data sets as sources, by their names; they are downloaded if needed."""

import hashlib
from pathlib import Path
from typing import Any

from PIL import Image

from featnorm._utils.errors import first_line
from featnorm._utils.extras import import_extra
from featnorm.inputs.decoding import to_rgb
from featnorm.inputs.errors import DataError
from featnorm.inputs.openers import Opener, Options
from featnorm.inputs.source import ImageSource

_TRAIN_TEST: dict[str, dict[str, Any]] = {"train": {"train": True}, "test": {"train": False}}


def _splits(*names: str, **options: Any) -> dict[str, dict[str, Any]]:
    return {name: {"split": name, **options} for name in names}


# The data sets with one image and one label per sample: the arguments that choose each split.
_SETS: dict[str, dict[str, dict[str, Any]]] = {
    "CIFAR10": _TRAIN_TEST,
    "CIFAR100": _TRAIN_TEST,
    "DTD": _splits("train", "val", "test"),
    "FashionMNIST": _TRAIN_TEST,
    "Flowers102": _splits("train", "val", "test"),
    "Food101": _splits("train", "test"),
    "KMNIST": _TRAIN_TEST,
    "MNIST": _TRAIN_TEST,
    "OxfordIIITPet": _splits("trainval", "test"),
    # 256 pixels wide and high, the size that benchmarks use; the full size is 100 GB.
    "Places365": _splits("train-standard", "train-challenge", "val", "test", small=True),
    "STL10": _splits("train", "test", "unlabeled"),
    "SVHN": _splits("train", "test", "extra"),
}


class TorchvisionImages(ImageSource):
    """A data set of torchvision, without transforms.

    Parameters
    ----------
    dataset : torchvision.datasets.VisionDataset
        A data set whose labels are in memory.
    title : str
        Name for tables.
    """

    def __init__(self, dataset: Any, title: str) -> None:
        # torchvision has no single name for the labels, and reading a sample would decode its image.
        labels = next(getattr(dataset, a) for a in ("targets", "labels", "_labels") if hasattr(dataset, a))
        classes = getattr(dataset, "classes", None)
        super().__init__(
            title,
            [None if label is None else int(label) for label in labels],
            None if classes is None else list(classes),
        )
        self._dataset = dataset

    def _read(self, i: int) -> tuple[Image.Image, bytes]:
        # torchvision returns images and no files: their pixels identify them as well.
        image = to_rgb(lambda: self._dataset[i][0], self._name(i))
        return image, hashlib.sha256(f"{image.size}".encode() + image.tobytes()).digest()

    def _name(self, i: int) -> str:
        return f"{self.title} image {i}"


class TorchvisionOpener(Opener):
    """A data set of torchvision, by its name in upper or lower case; downloaded to the data root."""

    names = tuple(_SETS)

    def open(self, location: Any, title: str, options: Options) -> TorchvisionImages:
        """See `Opener`."""
        name = next(name for name in _SETS if name.lower() == location.name.lower())
        options.require_no_column(f"torchvision's {name}")
        splits = _SETS[name]
        split = location.split or "test"
        if split not in splits:
            raise DataError(f"torchvision's {name} has no split {split!r}: it has {', '.join(splits)}")
        target = location.root or Path("~/.cache/featnorm").expanduser()
        make = getattr(import_extra("torchvision.datasets"), name)
        try:
            target.mkdir(parents=True, exist_ok=True)
            dataset = make(target, download=True, **splits[split])
        # Besides the network's and the disk's errors, a download fails with those of every archive format.
        except Exception as error:
            wanted = f"{name.lower()}/{split}"
            raise DataError(
                f"cannot find {location}, and downloading {name} to {target} failed "
                f"({first_line(error)}): put it under a data root as {wanted}.parquet or as a folder {wanted}"
            ) from error
        return TorchvisionImages(dataset, title)
