"""Image files as a source: those of a folder, or named one by one."""

import hashlib
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

from PIL import Image

from featnorm.inputs.decoding import decode_with_digest, reason_of
from featnorm.inputs.files import Files, Folder
from featnorm.inputs.openers import Opener, Options, Place
from featnorm.inputs.source import DataError, ImageSource, ItemError


class EncodedImages(ImageSource):
    """Images that are kept encoded, as bytes. A subclass says where the bytes of each are, and its name."""

    @abstractmethod
    def _content(self, i: int) -> bytes:
        """Return the bytes of image `i`; raise `ItemError` if they cannot be read."""

    def _read(self, i: int) -> tuple[Image.Image, bytes]:
        return decode_with_digest(self._content(i), self._name(i))

    def _digest(self, i: int) -> bytes:
        return hashlib.sha256(self._content(i)).digest()


class ImageFiles(EncodedImages):
    """Image files of a folder.

    Parameters
    ----------
    folder : Folder
        The folder.
    files : sequence of str
        Paths of the files in it.
    title, labels, class_names
        See `Source`.
    """

    names_are_paths = True

    def __init__(
        self,
        folder: Folder,
        files: Sequence[str],
        title: str,
        labels: Sequence[int | None] | None = None,
        class_names: list[str] | None = None,
    ) -> None:
        super().__init__(title, [None] * len(files) if labels is None else labels, class_names)
        self._folder = folder
        self._files = files

    def _content(self, i: int) -> bytes:
        try:
            return self._folder.read(self._files[i])
        except OSError as error:
            raise ItemError(self._name(i), reason_of(error)) from error

    def _name(self, i: int) -> str:
        return self._folder.name(self._files[i])

    def _identity(self, i: int) -> str:
        return self._folder.identity(self._files[i])


class ImageFolderOpener(Opener):
    """A folder of image files.

    If all images lie in sub-folders, the first-level sub-folders, sorted, are the classes. Empty ones are classes
    too: a missing class must not shift the labels of those after it.
    """

    def takes(self, place: Place) -> bool:
        """See `Opener`."""
        return isinstance(place, Folder)

    def open(self, place: Any, title: str, options: Options) -> ImageFiles:
        """See `Opener`."""
        options.require_no_column(place)
        files, passed_over = place.images
        if not files:
            beside = str(passed_over)
            raise DataError(f"no images in {place}" + (f": {beside}" if beside else ""))
        labels = classes = None
        if all("/" in file for file in files):
            classes, _ = place.top_level(())
            numbers = {name: number for number, name in enumerate(classes)}
            labels = [numbers[file.partition("/")[0]] for file in files]
        images = ImageFiles(place, files, title, labels, classes)
        images.passed_over = passed_over
        return images


class ImageFileOpener(Opener):
    """Image files that the user named: each is taken, whatever it is called, and reported if it is no image."""

    merges = True

    def takes(self, place: Place) -> bool:
        """See `Opener`."""
        return isinstance(place, Files)

    def open(self, place: Any, title: str, options: Options) -> ImageFiles:
        """See `Opener`."""
        options.require_no_column(place)
        paths = place.paths
        title = PurePath(place.folder.name(paths[0])).name if len(paths) == 1 else f"{len(paths)} files"
        return ImageFiles(place.folder, paths, title)
