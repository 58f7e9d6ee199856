"""From a short text to the images it means: ``"photos/"``, ``"cifar10:test"``, ``"s3://bucket/x.parquet[:500]"``."""

import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from featnorm.inputs.formats import PassedOver
from featnorm.inputs.images import (
    DataError,
    FolderImages,
    ImageError,
    ImageFiles,
    ImageSource,
    JoinedImages,
    SlicedImages,
    TorchvisionImages,
    first_line,
    image_files,
    vision_module,
)
from featnorm.inputs.parquet import ParquetImages
from featnorm.inputs.stores import StoredFile, StoredFolder, StoredImages, is_address, look_up

__all__ = ["DataError", "ImageError", "ImageSource", "open_images", "open_to_score"]

_TRAIN_TEST: dict[str, dict[str, Any]] = {"train": {"train": True}, "test": {"train": False}}


def _splits(*names: str, **options: Any) -> dict[str, dict[str, Any]]:
    return {name: {"split": name, **options} for name in names}


# torchvision's data sets with one image and one label a sample: the arguments which choose each split.
_TORCHVISION: dict[str, dict[str, dict[str, Any]]] = {
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

_SPLIT_NAMES = {"train", "training", "trainval", "val", "valid", "validation", "dev", "test", "testing"}
_SLICE = re.compile(r"(?P<spec>.+)\[(?P<slice>[^\[\]]*)\]", re.DOTALL)
_PART = re.compile(r"(?P<number>[+-]?\d+)(?P<percent>%?)")


def open_images(
    spec: str, *, root: str | Path | None = None, labels: bool = True, label_column: str | None = None
) -> ImageSource:
    """Open images by path or by name.

    Parameters
    ----------
    spec : str
        One of

        - a folder of images; if all lie in sub-folders, the first-level sub-folders are the classes;
        - a ``.parquet`` file in the Hugging Face layout (``image``: a struct of ``bytes`` and ``path``;
          perhaps a column of labels), or a folder of such files, the shards of one data set;
        - the address of either in an object store, as pyarrow's file systems take it: ``s3://bucket/photos``,
          ``gs://...``, ``abfs://...``, ``hdfs://...``, settings in a query (``?region=eu-west-1``);
        - ``NAME`` or ``NAME:SPLIT``, split "test" unless told. Looked for under the data root as
          ``NAME/SPLIT.parquet``, ``NAME.parquet``, ``NAME/SPLIT/`` and ``NAME/`` (those without a split for
          "test" only), else downloaded there as torchvision's data set of that name, in upper or lower case;

        and perhaps a slice at the end: ``data[:500]``, ``cifar10:train[50%:]``, ``data[1::2]``. Percentages
        are of the images, rounded to the nearest one; bounds outside the data are clamped, as in Python.
        A path which exists is a path, whatever it looks like.
    root : str or Path, optional
        The data root. Without it the environment variable ``FEATNORM_DATA``; without either, downloads go to
        ``~/.cache/featnorm``.
    labels : bool
        Read the labels of a parquet file; images alone are wanted without.
    label_column : str, optional
        The column of a parquet file that holds the labels: integers, strings or booleans, dictionary-encoded or
        not. Default: ``label``, if there is one.

    Returns
    -------
    ImageSource
        The images, none of them read yet.

    Raises
    ------
    DataError
        If the data cannot be found, read or downloaded, if there is no image in it or in the slice, or if there
        is no column of that name or no labels in it.
    ImportError
        If ``featnorm[vision]`` is needed and not installed.
    """
    return _open(spec, root, _Labels(labels, label_column))


@dataclass(frozen=True)
class _Labels:
    """Which column of a table holds the labels; None for the default, and whether they are wanted at all."""

    wanted: bool = True
    column: str | None = None

    def table(self, files: Sequence[Path | StoredFile], title: str, beside: PassedOver) -> ParquetImages:
        """Open the shards of a table; what else lies in their folder is passed over."""
        images = ParquetImages(files, title, labels=self.wanted, label_column=self.column)
        kinds = Counter(beside.kinds)
        kinds[".parquet"] -= len(files)
        images.passed_over = PassedOver(+kinds, beside.hidden, beside.closed)
        return images

    def require_none(self, place: object) -> None:
        if self.column is not None:
            raise DataError(
                f"{place} is no parquet file and has no column {self.column!r}: the classes of images in folders "
                "are the folders"
            )


def _open(spec: str, root: str | Path | None, labels: _Labels) -> ImageSource:
    path = Path(os.path.expanduser(spec))
    if spec and os.path.exists(path):
        return _open_path(path, _title(path), labels)
    if match := _SLICE.fullmatch(spec):
        return _sliced(_open(match["spec"], root, labels), match["slice"])
    if is_address(spec):
        return _open_stored(look_up(spec), labels)
    if not spec or path.is_absolute() or spec[0] in ".~" or path.suffix == ".parquet":
        raise DataError(f"no file or folder {spec!r}: check the path")
    root = root or os.environ.get("FEATNORM_DATA")
    return _open_name(spec, None if root is None else Path(root).expanduser(), labels)


def open_to_score(specs: Sequence[str], *, root: str | Path | None = None) -> ImageSource:
    """Open what a user wants scored: image files, and all that `open_images` takes, one after the other.

    A file that is named is taken, whatever it is. A folder may hold several splits.

    Parameters
    ----------
    specs : sequence of str
        One or more of them.
    root : str or Path, optional
        See `open_images`.

    Raises
    ------
    DataError
        As `open_images`.
    """
    sources: list[ImageSource] = []
    files: list[Path] = []
    for spec in specs:
        path = Path(spec).expanduser()
        if path.is_file() and path.suffix != ".parquet":
            files.append(path)
            continue
        if files:
            sources.append(ImageFiles(files, _file_title(files)))
            files = []
        sources.append(_opened_to_score(spec, path, root))
    if files:
        sources.append(ImageFiles(files, _file_title(files)))
    return sources[0] if len(sources) == 1 else JoinedImages(sources)


def _opened_to_score(spec: str, path: Path, root: str | Path | None) -> ImageSource:
    if path.is_dir():
        return _open_folder(path, _title(path), _Labels(False), mixed=True)
    if is_address(spec) and not _SLICE.fullmatch(spec):
        return _open_stored(look_up(spec), _Labels(False), mixed=True)
    return open_images(spec, root=root, labels=False)


def _file_title(files: Sequence[Path]) -> str:
    return files[0].name if len(files) == 1 else f"{len(files)} files"


def _open_path(path: Path, title: str, labels: _Labels) -> ImageSource:
    if path.is_dir():
        return _open_folder(path, title, labels)
    if path.suffix != ".parquet":
        raise DataError(f"{path} is neither a folder nor a .parquet file: name the folder it lies in")
    return labels.table([path], title, PassedOver())


def _open_folder(path: Path, title: str, labels: _Labels, *, mixed: bool = False) -> ImageSource:
    """Open a folder of images, or of the shards of a table; of several splits only if they may be mixed."""
    try:
        if not mixed:
            _refuse_splits(path, _splits_in(path))
        shards = _shards(path)
        found = image_files(path)
        if shards and not found[0]:
            return labels.table(shards, title, found[1])
        labels.require_none(path)
        return FolderImages(path, title, found)
    except OSError as error:
        raise DataError(f"cannot read the folder {path}: {first_line(error)}") from error


def _open_stored(folder: StoredFolder, labels: _Labels, *, mixed: bool = False) -> ImageSource:
    place = folder.place
    path = PurePosixPath(place.path)
    title = _name_of(path.parent.name, path.stem if folder.is_file else path.name)
    if folder.is_file:
        if path.suffix == ".parquet":
            return labels.table(folder.files, title, PassedOver())
        if not mixed:
            raise DataError(f"{place} is neither a folder nor a .parquet file: name the folder it lies in")
        return StoredImages(folder.files, path.name)
    shards = folder.parquet_files()
    if not mixed:
        _refuse_splits(place, _named_splits([shard.name for shard in shards], folder.folders))
    found = folder.image_files()
    if shards and not found[0]:
        return labels.table(shards, title, found[1])
    labels.require_none(place)
    return folder.images(title, found)


def _refuse_splits(place: object, splits: list[str]) -> None:
    if len(splits) > 1:
        raise DataError(f"{place} holds several splits, which must not be mixed: name one of {', '.join(splits)}")


def _shards(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("*.parquet") if p.is_file() and p.name[0] != ".")


def _splits_in(folder: Path) -> list[str]:
    """Return the splits of a folder: those its parquet files, or all its sub-folders, are named after."""
    folders = [p.name for p in folder.iterdir() if p.is_dir() and p.name[0] != "."]
    return _named_splits([shard.name for shard in _shards(folder)], folders)


def _named_splits(shards: Iterable[str], folders: Iterable[str]) -> list[str]:
    stems = {re.split(r"[-._]", shard)[0].lower() for shard in shards} & _SPLIT_NAMES
    names = {folder.lower() for folder in folders}
    return sorted(stems | (names if names <= _SPLIT_NAMES else set()))


def _title(path: Path) -> str:
    path = path.resolve()
    return _name_of(path.parent.name, path.stem if path.is_file() else path.name)


def _name_of(parent: str, own: str) -> str:
    return f"{parent}:{own}" if own.lower() in _SPLIT_NAMES else own


def _open_name(spec: str, root: Path | None, labels: _Labels) -> ImageSource:
    name, colon, split = spec.partition(":")
    title = name.rpartition("/")[2] + colon + split
    if root is not None and (place := _find(root, name, split or "test")):
        return _open_path(place, title, labels)
    known = next((known for known in _TORCHVISION if known.lower() == name.lower()), None)
    if known is None:
        places = "no data root is set (FEATNORM_DATA)"
        if root is not None:
            places = f"not under the data root {root} (it has {', '.join(_names_under(root)) or 'nothing'})"
        raise DataError(
            f"cannot find {spec!r}: no such path, {places}, "
            f"and torchvision downloads only {', '.join(_TORCHVISION)}: check the spelling"
        )
    labels.require_none(f"torchvision's {known}")
    return _open_torchvision(known, split, root, title)


def _find(root: Path, name: str, split: str) -> Path | None:
    folder = root / name
    places = [folder / f"{split}.parquet", folder / split]
    if split == "test":  # data without splits must not be "test" and also "train"
        places.insert(1, root / f"{name}.parquet")
        # torchvision downloads to <root>/dtd/dtd and <root>/MNIST/raw, which is its own to read.
        if not (folder / "dtd").is_dir() and not (folder / "raw").is_dir():
            places += [folder] if folder.is_dir() and not _splits_in(folder) else []
    return next((place for place in places if place.exists()), None)


def _names_under(root: Path) -> list[str]:
    names = set()
    for file in [*root.glob("*.parquet"), *root.glob("*/*.parquet")]:
        own = file.relative_to(root).with_suffix("")
        names.add(f"{own.parent}:{own.name}" if own.name in _SPLIT_NAMES else own.as_posix())
    names.update(p.name for p in root.glob("[!.]*/") if p.is_dir() and not _shards(p))
    return sorted(names)


def _open_torchvision(name: str, split: str, root: Path | None, title: str) -> ImageSource:
    splits = _TORCHVISION[name]
    if (split or "test") not in splits:
        raise DataError(f"torchvision's {name} has no split {split!r}: it has {', '.join(splits)}")
    target = root or Path("~/.cache/featnorm").expanduser()
    make = getattr(vision_module("torchvision.datasets"), name)
    try:
        target.mkdir(parents=True, exist_ok=True)
        dataset = make(target, download=True, **splits[split or "test"])
    # Besides the network's and the disk's errors, a download fails with those of every archive format.
    except Exception as error:
        wanted = f"{name.lower()}/{split or 'test'}"
        place = "no data root is set (FEATNORM_DATA)" if root is None else f"not under the data root {root}"
        raise DataError(
            f"cannot find {title!r}: no such path, {place}, and downloading {name} to {target} failed "
            f"({first_line(error)}): put it under a data root as {wanted}.parquet or as a folder {wanted}"
        ) from error
    return TorchvisionImages(dataset, title)


def _sliced(source: ImageSource, text: str) -> ImageSource:
    parts = text.split(":")
    if len(parts) not in (2, 3):
        raise DataError(f"cannot slice {source.title} by [{text}]: write [start:stop] or [start:stop:step]")
    start, stop = (_bound(part, text, len(source)) for part in parts[:2])
    step = _bound(parts[2], text, None) if len(parts) == 3 else None
    if step == 0:
        raise DataError(f"cannot slice {source.title} by [{text}]: the step must not be 0")
    rows = range(len(source))[start:stop:step]
    if not rows:
        raise DataError(f"[{text}] leaves nothing of {source.title}, which has {len(source)} images")
    return SlicedImages(source, rows, f"{source.title}[{text}]")


def _bound(part: str, text: str, size: int | None) -> int | None:
    """Return one number of a slice; `size`, of what a percentage counts, is None where there is none."""
    if not part.strip():
        return None
    match = _PART.fullmatch(part.strip())
    if not match or (match["percent"] and size is None):
        raise DataError(
            f"cannot read {part!r} in the slice [{text}]: write whole numbers, or 50% to start or stop at"
        )
    number = int(match["number"])
    if not match["percent"] or size is None:
        return number
    # Counted from the start, so that [:-10%] and [-10%:] meet, and -1% of few images is not -0, the first.
    return max(0, round(size * (100 + number if part.strip()[0] == "-" else number) / 100))
