"""What a source of images is; and folders, torchvision's data sets, and slices as sources."""

import hashlib
import importlib
import os
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from io import BytesIO
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, TiffImagePlugin, UnidentifiedImageError
from torch.utils.data import Dataset

# torchvision.datasets.folder.IMG_EXTENSIONS, repeated so that a folder can be read without torchvision.
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
# Where Pillow refuses an image as a decompression bomb: twice the size at which it warns.
MOST_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 0)

_LONGEST = 100  # times the short side
# Passes of a JPEG over its pixels. Encoders make some ten; each costs as much as the image, however few its bytes.
_MOST_SCANS = 100
_START_OF_SCAN = b"\xff\xda"
_CHUNK = 2**20


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
    """

    names_are_paths = False

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
        """Return image `i` in RGB, fully decoded.

        Sixteen bits a channel are scaled to eight; an alpha channel is dropped and an EXIF orientation not
        applied, as in torchvision's data sets.

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
    missing class must not shift the labels of those after it. Hidden files and folders are skipped.

    Parameters
    ----------
    folder : Path
        Where to look.
    title : str
        Name for tables.
    every : bool
        Take every file for an image, whatever its name ends in; those that are none are corrupt.

    Raises
    ------
    DataError
        If there is no image.
    """

    names_are_paths = True

    def __init__(self, folder: Path, title: str, *, every: bool = False) -> None:
        files = image_files(folder, every=every)
        if not files:
            expected = "" if every else f": expected files ending in {', '.join(EXTENSIONS)}"
            raise DataError(f"no {'files' if every else 'images'} in {folder}{expected}")
        labels: list[int | None] = [None] * len(files)
        classes = None
        if all(os.sep in file for file in files):
            classes = sorted(p.name for p in folder.iterdir() if p.is_dir() and p.name[0] != ".")
            numbers = {name: number for number, name in enumerate(classes)}
            labels = [numbers[file.partition(os.sep)[0]] for file in files]
        super().__init__(title, labels, classes)
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


def image_files(folder: Path, *, every: bool = False) -> list[str]:
    """Return the image files, or every file, in a folder and below it, relative to it; no hidden ones.

    They are sorted, folder by folder. Links are followed, and every folder is read once: links that lead to each
    other have no end.
    """
    return list(_walk(str(folder), "", every, folder.resolve(), set()))


def _walk(place: str, prefix: str, every: bool, root: Path, seen: set[Path]) -> Iterator[str]:
    here = Path(place).resolve()
    if here in seen:
        return
    seen.add(here)
    try:
        with os.scandir(place) as entries:
            # In the order of their names, so that it does not depend on the disk which of two links is followed.
            # An entry itself takes several times the memory of its name, and a folder may have millions.
            kinds = sorted((entry.name, _kind(entry)) for entry in entries if entry.name[0] != ".")
    except OSError:
        return
    for name, kind in kinds:
        path = os.path.join(place, name)
        if kind == "folder":
            if not _leads_back(Path(path), root):
                yield from _walk(path, os.path.join(prefix, name), every, root, seen)
        elif kind == "file" and (every or name.lower().endswith(EXTENSIONS)):
            yield os.path.join(prefix, name)


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


def decode(
    data: bytes | str | Path,
    name: str,
    *,
    formats: tuple[str, ...] | None = None,
    most_pixels: int | None = None,
) -> Image.Image:
    """Decode an image from memory or from a file into RGB.

    Parameters
    ----------
    data : bytes, str or Path
        The encoded image, or its file.
    name : str
        What errors call it.
    formats : tuple of str, optional
        What it may be, as Pillow names formats; without it all that Pillow knows.
    most_pixels : int, optional
        Refuse a larger image before it is decoded; `MOST_PIXELS` holds without it, and above it too.

    Raises
    ------
    ImageError
        If it cannot be read or decoded.
    """
    return _decoded(
        lambda: Image.open(BytesIO(data) if isinstance(data, bytes) else data, formats=formats), name, most_pixels
    )


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
            if image.format == "EPS":
                raise ValueError("PostScript is a program, and not run here: save it as PNG")
            _check_scans(image)
            image.load()
            return _to_rgb(image)
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
    parts = 1
    if image.format == "TIFF" and image.info.get("compression") == "jpeg":
        # A JPEG each.
        offsets = image.tag_v2.get(TiffImagePlugin.STRIPOFFSETS) or image.tag_v2.get(TiffImagePlugin.TILEOFFSETS)
        parts = len(offsets or ())
    elif image.format not in ("JPEG", "MPO"):
        return
    file, scans, last = image.fp, 0, b""
    if file is None:  # decoded already, by whoever made it
        return
    at = file.tell()
    file.seek(0)
    while chunk := file.read(_CHUNK):
        # Between the marks of a JPEG a byte of ones is followed by zeros, so that none is met by chance.
        scans += (last + chunk).count(_START_OF_SCAN)
        last = chunk[-1:]
    file.seek(at)
    if scans > parts * _MOST_SCANS:
        raise ValueError(f"a JPEG of {scans:,} scans, more than {parts * _MOST_SCANS:,}: save it anew")


def _to_rgb(image: Image.Image) -> Image.Image:
    # Pillow cuts off values above 255 where it should scale them: a 16-bit image would turn white.
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("32-bit integer pixels outside the range of 16 bits: save it with 8 or 16 bits")
        image = Image.fromarray(((values.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("floating-point pixels have no agreed range: save it with 8 or 16 bits")
    elif "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):  # its own text names the file, or a buffer's address
        return "not an image in a format Pillow knows"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return first_line(error)
