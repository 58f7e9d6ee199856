"""What a source of images is; and folders, torchvision's data sets, and slices as sources."""

import hashlib
import importlib
import os
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from io import BytesIO
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, TiffImagePlugin, UnidentifiedImageError
from torch.utils.data import Dataset

from featnorm.inputs.formats import (
    FORMATS,
    HEAD_BYTES,
    PassedOver,
    ending,
    looks_like_image,
    named_as_image,
    reason_not_read,
    register_format,
)

#: Version of the rule by which a file becomes RGB pixels. Whatever is kept of decoded images depends on it.
DECODING = 2
# Where Pillow refuses an image as a decompression bomb: twice the size at which it warns.
MOST_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 0)

_LONGEST = 100  # times the short side
# Passes of a JPEG over its pixels. Encoders make some ten; each costs as much as the image, however few its bytes.
_MOST_SCANS = 100
_START_OF_SCAN = b"\xff\xda"
_CHUNK = 2**20
# Files are looked at by threads: on a network disk each has to be waited for.
_LOOKERS = 16
_LOOKS = 64
# What an EXIF orientation asks of whoever shows the stored pixels.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Bits of TIFF's NewSubfileType: a smaller copy of another page, and a mask of one.
_NEW_SUBFILE_TYPE, _SMALLER, _MASK = 254, 1, 4
# TIFF's PhotometricInterpretation of a sensor's values, and the tag that every DNG has.
_PHOTOMETRIC, _SENSOR, _DNG_VERSION = 262, 32803, 50706
_FIRST_OF_SEVERAL = "first of several"


class DataError(ValueError):
    """A specification of images, or the data behind it, that cannot be used; the message is one line."""


class ImageError(DataError):
    """One image that is corrupt or unreadable.

    Parameters
    ----------
    name : str
        What the source calls the image: its file, or its row.
    reason : str
        What is wrong with it, one line.

    Attributes
    ----------
    digest : bytes or None
        `ImageSource.digest` of the content that cannot be decoded; None if no content was read.
    """

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)
        self.name = name
        self.reason = reason
        self.digest: bytes | None = None

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


def first_line(error: BaseException) -> str:
    """Return what an exception says, cut to one line; its type where it says nothing."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def vision_module(name: str) -> Any:
    """Import a module of the optional extra ``featnorm[vision]``.

    Raises
    ------
    ImportError
        If it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise ImportError(f"{package} is needed here ({error}): pip install '.[vision]' in a checkout") from error


class ImageSource(Dataset[tuple[Image.Image, int | None]], ABC):
    """Images with names and, perhaps, labels; a map-style data set without a transform.

    ``source[i]`` is ``(source.image(i), source.label(i))``. Indices run from 0 to ``len(source) - 1``. Several
    threads may read it at a time.

    Attributes
    ----------
    title : str
        A short name for tables, such as ``"textures"`` or ``"cifar10:train[:500]"``.
    class_names : list of str or None
        Name of every label, where the source knows them.
    names_are_paths : bool
        Whether `name` is the path of a file, which tells it from the images of other sources too.
    passed_over : PassedOver
        Files that were found beside the images and are none.
    label_columns : tuple of str
        Columns of an unlabelled table that could hold its labels.
    """

    names_are_paths = False
    passed_over = PassedOver()
    label_columns: tuple[str, ...] = ()

    def __init__(self, title: str, labels: Sequence[int | None], class_names: list[str] | None) -> None:
        self.title = title
        self.class_names = class_names
        # Hugging Face and torchvision mark an unlabelled image with -1.
        self._labels = [None if label is None or label < 0 else label for label in labels]

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, i: int) -> tuple[Image.Image, int | None]:
        return self.image(i), self.label(i)

    def image(self, i: int) -> Image.Image:
        """Return image `i` in RGB, fully decoded and upright; see `decode`.

        Raises
        ------
        ImageError
            If the image is corrupt, truncated or unreadable.
        IndexError
            If there is no image `i`.
        """
        return self._image(self._checked(i))

    def label(self, i: int) -> int | None:
        """Return the class of image `i`, or None where it has none."""
        return self._labels[self._checked(i)]

    def name(self, i: int) -> str:
        """Return what to call image `i` in messages: its file, or its row."""
        return self._name(self._checked(i))

    def digest(self, i: int) -> bytes:
        """Return what tells the content of image `i` from any other: 32 bytes, of the file or of its pixels.

        Raises
        ------
        ImageError
            If it cannot be read.
        IndexError
            If there is no image `i`.
        """
        return self._digest(self._checked(i))

    def read(self, i: int) -> tuple[Image.Image, bytes]:
        """Return image `i` as `image` does, and the `digest` of the content that it was decoded from.

        The content is read once, so that image and digest belong together even if a file is being replaced.

        Raises
        ------
        ImageError
            If the image is corrupt, truncated or unreadable; the error holds the digest of what was read.
        IndexError
            If there is no image `i`.
        """
        return self._read(self._checked(i))

    def identity(self, i: int) -> str:
        """Return what tells image `i` from others without its content being read: name, size, time of change."""
        return self._identity(self._checked(i))

    def _identity(self, i: int) -> str:
        return self._name(i)

    def _checked(self, i: int) -> int:
        if not 0 <= i < len(self):
            raise IndexError(f"{self.title} has {len(self)} images, and no image {i}")
        return i

    @abstractmethod
    def _image(self, i: int) -> Image.Image: ...

    @abstractmethod
    def _name(self, i: int) -> str: ...

    @abstractmethod
    def _digest(self, i: int) -> bytes: ...

    @abstractmethod
    def _read(self, i: int) -> tuple[Image.Image, bytes]: ...


class FolderImages(ImageSource):
    """Image files found in a folder and below it.

    If all images lie in sub-folders, the first-level sub-folders, sorted, are the classes, empty ones too: a
    missing class must not shift the labels of those after it. Which files are images is `image_files`' to say.

    Parameters
    ----------
    folder : Path
        Where to look.
    title : str
        Name for tables.
    found : tuple of list of str and PassedOver, optional
        What `image_files` returned for the folder, if it has been asked already.

    Raises
    ------
    DataError
        If there is no image.
    """

    names_are_paths = True

    def __init__(self, folder: Path, title: str, found: tuple[list[str], PassedOver] | None = None) -> None:
        files, passed_over = image_files(folder) if found is None else found
        if not files:
            raise no_images(folder, passed_over)
        labels: list[int | None] = [None] * len(files)
        classes = None
        if all(os.sep in file for file in files):
            classes = sorted(p.name for p in folder.iterdir() if p.is_dir() and p.name[0] != ".")
            numbers = {name: number for number, name in enumerate(classes)}
            labels = [numbers[file.partition(os.sep)[0]] for file in files]
        super().__init__(title, labels, classes)
        self.passed_over = passed_over
        self._folder = str(folder)
        self._files = files

    def _image(self, i: int) -> Image.Image:
        return decode(self._name(i), self._name(i))

    def _name(self, i: int) -> str:
        return os.path.join(self._folder, self._files[i])

    def _identity(self, i: int) -> str:
        return file_identity(self._name(i))

    def _digest(self, i: int) -> bytes:
        return content_digest(self._name(i), self._name(i))

    def _read(self, i: int) -> tuple[Image.Image, bytes]:
        return decode_with_digest(self._name(i), self._name(i))


class ImageFiles(ImageSource):
    """Image files, one by one, without labels.

    Parameters
    ----------
    files : sequence of Path
        The files, whatever their names end in.
    title : str
        Name for tables.
    """

    names_are_paths = True

    def __init__(self, files: Sequence[Path], title: str) -> None:
        super().__init__(title, [None] * len(files), None)
        self._files = [str(file) for file in files]

    def _image(self, i: int) -> Image.Image:
        return decode(self._files[i], self._files[i])

    def _name(self, i: int) -> str:
        return self._files[i]

    def _identity(self, i: int) -> str:
        return file_identity(self._files[i])

    def _digest(self, i: int) -> bytes:
        return content_digest(self._files[i], self._files[i])

    def _read(self, i: int) -> tuple[Image.Image, bytes]:
        return decode_with_digest(self._files[i], self._files[i])


class JoinedImages(ImageSource):
    """The images of several sources, one after the other, without their labels.

    Parameters
    ----------
    sources : sequence of ImageSource
        Where they come from.
    """

    def __init__(self, sources: Sequence[ImageSource]) -> None:
        self._ends = list(accumulate(len(source) for source in sources))
        super().__init__(" and ".join(source.title for source in sources), [None] * self._ends[-1], None)
        self._sources = sources
        self.passed_over = sum((source.passed_over for source in sources), PassedOver())

    def _place(self, i: int) -> tuple[ImageSource, int]:
        number = bisect_right(self._ends, i)
        return self._sources[number], i - (self._ends[number - 1] if number else 0)

    def _image(self, i: int) -> Image.Image:
        source, row = self._place(i)
        return source.image(row)

    def _name(self, i: int) -> str:
        source, row = self._place(i)
        return source.name(row) if source.names_are_paths else f"{source.title}: {source.name(row)}"

    def _identity(self, i: int) -> str:
        source, row = self._place(i)
        return source.identity(row)

    def _digest(self, i: int) -> bytes:
        source, row = self._place(i)
        return source.digest(row)

    def _read(self, i: int) -> tuple[Image.Image, bytes]:
        source, row = self._place(i)
        return source.read(row)


class TorchvisionImages(ImageSource):
    """A data set of torchvision, without transforms.

    Parameters
    ----------
    dataset : torchvision.datasets.VisionDataset
        One whose labels are in memory.
    title : str
        Name for tables.
    """

    def __init__(self, dataset: Any, title: str) -> None:
        # torchvision has no one name for the labels, and asking for a sample would decode its image.
        labels = next(getattr(dataset, a) for a in ("targets", "labels", "_labels") if hasattr(dataset, a))
        classes = getattr(dataset, "classes", None)
        super().__init__(
            title,
            [None if label is None else int(label) for label in labels],
            None if classes is None else list(classes),
        )
        self._dataset = dataset

    def _image(self, i: int) -> Image.Image:
        return _decoded(lambda: self._dataset[i][0], self._name(i))

    def _name(self, i: int) -> str:
        return f"{self.title} image {i}"

    def _digest(self, i: int) -> bytes:
        return self._read(i)[1]

    def _read(self, i: int) -> tuple[Image.Image, bytes]:
        # torchvision hands out images, and no file: what they show tells them apart as well.
        image = self._image(i)
        return image, hashlib.sha256(f"{image.size}".encode() + image.tobytes()).digest()


class SlicedImages(ImageSource):
    """Some of the images of another source, in the order of `rows`.

    Parameters
    ----------
    source : ImageSource
        Where they come from.
    rows : sequence of int
        Which ones.
    title : str
        Name for tables.
    """

    def __init__(self, source: ImageSource, rows: Sequence[int], title: str) -> None:
        super().__init__(title, [source.label(row) for row in rows], source.class_names)
        self.names_are_paths = source.names_are_paths
        self.passed_over = source.passed_over
        self.label_columns = source.label_columns
        self._source = source
        self._rows = rows

    def _image(self, i: int) -> Image.Image:
        return self._source.image(self._rows[i])

    def _name(self, i: int) -> str:
        return self._source.name(self._rows[i])

    def _identity(self, i: int) -> str:
        return self._source.identity(self._rows[i])

    def _digest(self, i: int) -> bytes:
        return self._source.digest(self._rows[i])

    def _read(self, i: int) -> tuple[Image.Image, bytes]:
        return self._source.read(self._rows[i])


def image_files(folder: Path) -> tuple[list[str], PassedOver]:
    """Return the image files in a folder and below it, relative to it, and what else is there.

    A file is an image if its name ends as image files' do, or if it begins as one of the `FORMATS`; only files of
    other names are opened, to read their first bytes. One that cannot be opened counts as an image, so that it is
    reported when it is read. Hidden files and folders are passed over.

    The files are sorted, folder by folder. Links are followed, and every folder is read once: links that lead to
    each other have no end.
    """
    with ThreadPoolExecutor(_LOOKERS, "featnorm-look") as lookers:
        walk = _Walk(folder.resolve(), lookers)
        walk.enter(str(folder), "")
    return walk.files, PassedOver(walk.kinds, walk.hidden, tuple(walk.closed))


class _Walk:
    """The files of a folder and all below it."""

    def __init__(self, root: Path, lookers: Executor) -> None:
        self.files: list[str] = []
        self.kinds: Counter[str] = Counter()
        self.hidden = 0
        self.closed: list[str] = []
        self._root = root
        self._lookers = lookers
        self._seen: set[Path] = set()

    def enter(self, place: str, prefix: str) -> None:
        here = Path(place).resolve()
        if here in self._seen:
            return
        self._seen.add(here)
        try:
            with os.scandir(place) as entries:
                # In the order of their names, so that it does not depend on the disk which of two links is
                # followed. An entry itself takes several times the memory of its name, and a folder may have
                # millions.
                kinds = sorted((entry.name, _kind(entry)) for entry in entries)
        except OSError:
            self.closed.append(prefix or place)
            return
        files = [name for name, kind in kinds if kind == "file" and name[0] != "."]
        looks = [name for name in files if named_as_image(name) is None]
        # A task for a thread is some of them: on a local disk a file takes less time than to hand it over.
        share = min(_LOOKS, -(-len(looks) // _LOOKERS))
        shares = [looks[start : start + share] for start in range(0, len(looks), share or 1)]
        found = set().union(*self._lookers.map(partial(_images_in, place), shares))
        for name, kind in kinds:
            if name[0] == ".":
                self.hidden += 1
            elif kind == "folder":
                path = os.path.join(place, name)
                if not _leads_back(Path(path), self._root):
                    self.enter(path, os.path.join(prefix, name))
            elif kind == "file" and (name in found or named_as_image(name)):
                self.files.append(os.path.join(prefix, name))
            else:
                self.kinds[ending(name) if kind == "file" else "pipes and devices"] += 1


def no_images(place: object, passed_over: PassedOver) -> DataError:
    """Return the error that there is no image at a place, with what there is."""
    beside = str(passed_over)
    return DataError(f"no images in {place}" + (f": {beside}" if beside else ""))


def _images_in(place: str, names: list[str]) -> list[str]:
    """Return those of the files of a folder that begin as images, or cannot be opened."""
    return [name for name in names if _begins_as_image(os.path.join(place, name))]


def _begins_as_image(path: str) -> bool:
    try:
        with open(path, "rb", buffering=0) as file:
            return looks_like_image(file.read(HEAD_BYTES))
    except OSError:
        return True


def _kind(entry: os.DirEntry[str]) -> str:
    """Return "folder", "file", or "" for a pipe or device, which would be waited for."""
    try:
        if entry.is_dir():
            return "folder"
        # A broken link is told of when it is read.
        return "file" if entry.is_file() or (entry.is_symlink() and not os.path.exists(entry.path)) else ""
    except OSError:
        return "file"


def _leads_back(folder: Path, root: Path) -> bool:
    """Whether it is a link to a folder above, or to one that the walk comes to by itself."""
    if not folder.is_symlink():
        return False
    target = folder.resolve()
    if target.is_relative_to(root):
        return not any(part[0] == "." for part in target.relative_to(root).parts)
    return root.is_relative_to(target)


def decode(data: bytes | str | Path, name: str, *, most_pixels: int | None = None) -> Image.Image:
    """Decode an image from memory or from a file into RGB, as it is meant to be seen.

    Any of the `FORMATS` is read, whatever the file is called. An EXIF orientation is applied, transparent pixels
    are laid on white, sixteen bits per channel are scaled to eight, and of several frames or pages the first is
    returned (`is_first_of_several`). Color profiles are not applied.

    Parameters
    ----------
    data : bytes, str or Path
        The encoded image, or its file.
    name : str
        What errors call it.
    most_pixels : int, optional
        Refuse a larger image before it is decoded. `MOST_PIXELS` is the limit by default, and the highest.

    Raises
    ------
    ImageError
        If it cannot be read or decoded.
    """
    return _decoded(lambda: _opened(data), name, most_pixels)


def is_first_of_several(image: Image.Image) -> bool:
    """Whether a decoded image is the first of several frames or pages of its file."""
    return _FIRST_OF_SEVERAL in image.info


def _opened(data: bytes | str | Path) -> Image.Image:
    def opened(formats: tuple[str, ...]) -> Image.Image:
        return Image.open(BytesIO(data) if isinstance(data, bytes) else data, formats=formats)

    try:
        return opened(FORMATS)
    except UnidentifiedImageError:
        if isinstance(data, bytes):
            head = data[:HEAD_BYTES]
        else:
            with open(data, "rb") as file:
                head = file.read(HEAD_BYTES)
        if format_ := register_format(head):
            with suppress(UnidentifiedImageError):
                return opened((format_,))
        raise ValueError(reason_not_read(head)) from None


def file_identity(path: str | Path) -> str:
    """Return a file's name, size and time of change; its name alone where it is gone."""
    try:
        facts = os.stat(path)
    except OSError:
        return str(path)
    return f"{path} {facts.st_size} {facts.st_mtime_ns}"


def content_digest(data: bytes | str | Path, name: str) -> bytes:
    """Return the SHA-256 of an encoded image in memory or in a file.

    Raises
    ------
    ImageError
        If the file cannot be read; it calls the image `name`.
    """
    if isinstance(data, bytes):
        return hashlib.sha256(data).digest()
    try:
        with open(data, "rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError as error:
        raise ImageError(name, _reason(error)) from error


def decode_with_digest(data: bytes | str | Path, name: str) -> tuple[Image.Image, bytes]:
    """Decode an image as `decode` does, and return its `content_digest` too; a file is read once.

    Raises
    ------
    ImageError
        If it cannot be read or decoded; if it was read, the error holds its digest.
    """
    if not isinstance(data, bytes):
        try:
            with open(data, "rb") as file:
                data = file.read()
        except OSError as error:
            raise ImageError(name, _reason(error)) from error
    digest = content_digest(data, name)
    try:
        return decode(data, name), digest
    except ImageError as error:
        error.digest = digest
        raise


def _decoded(opened: Callable[[], Image.Image], name: str, most_pixels: int | None = None) -> Image.Image:
    try:
        with opened() as image:
            if most_pixels is not None and image.width * image.height > most_pixels:
                raise ValueError(f"{image.width} x {image.height} pixels are more than {most_pixels:,}")
            long, short = max(image.size), min(image.size)
            if long > _LONGEST * short:
                # Resized to a model's height it would take gigabytes, which Pillow's own guard does not foresee.
                raise ValueError(f"{image.width} x {image.height} pixels are too narrow for a model's input")
            _check_scans(image)
            _check_raw(image)
            key = _color_key(image)
            image.load()
            # What else a file tells of its pixels holds no longer for these.
            rgb = _to_rgb(image, key)
            profile = image.info.get("icc_profile")
            rgb.info = {} if profile is None else {"icc_profile": profile}
            if (turn := _TURNS.get(_orientation(image))) is not None:
                rgb = rgb.transpose(turn)
            if _has_several(image):
                rgb.info[_FIRST_OF_SEVERAL] = True
            return rgb
    # A broken file makes Pillow raise nearly anything: OSError, SyntaxError, struct.error, and more.
    except Exception as error:
        raise ImageError(name, _reason(error)) from error


def _check_scans(image: Any) -> None:
    """Refuse a JPEG that would be decoded for hours: its pixels are few, its passes over them are not.

    Raises
    ------
    ValueError
        It is one.
    """
    scans, parts = count_scans(image)
    if scans > parts * _MOST_SCANS:
        raise ValueError(f"a JPEG of {scans:,} scans, more than {parts * _MOST_SCANS:,}: save it again")


def count_scans(image: Any) -> tuple[int, int]:
    """Return how many scans the JPEGs in an open image have, and how many JPEGs these are; (0, 1) without any."""
    parts = 1
    if image.format == "TIFF" and image.info.get("compression") == "jpeg":
        # A JPEG each.
        offsets = image.tag_v2.get(TiffImagePlugin.STRIPOFFSETS) or image.tag_v2.get(TiffImagePlugin.TILEOFFSETS)
        parts = max(1, len(offsets or ()))
    elif image.format not in ("JPEG", "MPO"):
        return 0, 1
    file, scans, last = image.fp, 0, b""
    if file is None:  # decoded already, by whoever made it
        return 0, parts
    at = file.tell()
    file.seek(0)
    while chunk := file.read(_CHUNK):
        # Between the marks of a JPEG a byte of ones is followed by zeros, so that none is met by chance.
        scans += (last + chunk).count(_START_OF_SCAN)
        last = chunk[-1:]
    file.seek(at)
    return scans, parts


def _check_raw(image: Any) -> None:
    """Refuse a camera's raw file: it is a TIFF, whose first image is a thumbnail or no picture yet.

    Raises
    ------
    ValueError
        It is one.
    """
    if image.format != "TIFF":
        return
    tags = image.tag_v2
    kind = tags.get(_NEW_SUBFILE_TYPE)
    smaller = isinstance(kind, int) and kind & _SMALLER
    if smaller or _DNG_VERSION in tags or tags.get(_PHOTOMETRIC) == _SENSOR:
        raise ValueError("a camera's raw file, or a TIFF that begins with a thumbnail: convert it to JPEG or PNG")


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # broken metadata costs the turn, not the image
        return 1


def _has_several(image: Any) -> bool:
    # The other images of a camera's MPO are previews and maps of its one photograph.
    if image.format == "MPO":
        return False
    try:
        if image.format != "TIFF":
            return bool(getattr(image, "is_animated", False))
        if not image.is_animated:
            return False
        image.seek(1)
        return not image.tag_v2.get(_NEW_SUBFILE_TYPE, 0) & (_SMALLER | _MASK)
    except Exception:  # what follows the first frame is broken, and not read
        return False


def _color_key(image: Any) -> Any:
    """Return the one color that stands for transparency in an image without alpha, as its pixels will have it."""
    if image.mode not in ("1", "L", "RGB", "I;16", "I"):
        return None
    key = image.info.pop("transparency", None)
    tiles = getattr(image, "tile", None)
    if key is None or not tiles:
        return key
    # Pillow scales the pixels to eight bits, and leaves the key in the depth of the file.
    raw = tiles[0][3]
    if raw in ("L;2", "L;4"):
        return key * (85 if raw == "L;2" else 17)
    if raw == "RGB;16B":
        return tuple(value >> 8 for value in key)
    return key


def _to_rgb(image: Image.Image, key: Any) -> Image.Image:
    """Return an image in RGB, on white where it is transparent, or where its color is the key."""
    opaque = None
    if key is not None:
        pixels = np.asarray(image.convert("L") if image.mode == "1" else image)
        differs = pixels != np.asarray(key)
        opaque = Image.fromarray(np.uint8(255) * (differs if differs.ndim == 2 else differs.any(2)))
    # Pillow cuts off values above 255 where it should scale them: a 16-bit image would turn white.
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("32-bit integer pixels outside the range of 16 bits: save it with 8 or 16 bits")
        image = Image.fromarray(((values.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("floating-point pixels have no agreed range: save it with 8 or 16 bits")
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        opaque = image.getchannel("A")
    rgb = image.convert("RGB")
    if opaque is None or opaque.getextrema() == (255, 255):
        return rgb
    white = Image.new("RGB", rgb.size, "white")
    white.paste(rgb, mask=opaque)
    return white


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return first_line(error)
