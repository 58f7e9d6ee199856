"""Image files as a source: those of a folder, or named one by one."""

import hashlib
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

from PIL import Image

from featnorm.inputs.decoding import decode_with_digest, reason_of
from featnorm.inputs.errors import DataError, ItemError
from featnorm.inputs.files import Files, Folder
from featnorm.inputs.openers import Location, Opener, Options
from featnorm.inputs.source import ImageSource


class EncodedImages(ImageSource):
    """Base of sources whose images are stored encoded. A subclass returns the bytes and the name of each image."""

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


def classes_by_folder(folder: Folder, files: Sequence[str]) -> tuple[list[int | None] | None, list[str] | None]:
    """Return the labels of files and the names of the classes; None if a file lies outside sub-folders.

    The first-level sub-folders, sorted, are the classes. Empty ones are classes too: a missing class must not
    shift the labels of those after it.
    """
    if not all("/" in file for file in files):
        return None, None
    classes, _ = folder.top_level(())
    numbers = {name: number for number, name in enumerate(classes)}
    return [numbers[file.partition("/")[0]] for file in files], classes


class ImageFolderOpener(Opener):
    """A folder of image files; see `classes_by_folder`."""

    def accepts(self, location: Location) -> bool:
        """See `Opener`."""
        return isinstance(location, Folder)

    def open(self, location: Any, title: str, options: Options) -> ImageFiles:
        """See `Opener`."""
        options.require_no_column(location)
        files, passed_over = location.images
        if not files:
            beside = str(passed_over)
            raise DataError(
                f"no images or videos in {location}"
                + (f": {beside}" if beside else ", which holds no files: check the path")
            )
        images = ImageFiles(location, files, title, *classes_by_folder(location, files))
        images.passed_over = passed_over
        return images


class ImageFileOpener(Opener):
    """Image files that the user named, whatever their endings; one that is not an image fails when it is read."""

    merges = True

    def accepts(self, location: Location) -> bool:
        """See `Opener`."""
        return isinstance(location, Files)

    def open(self, location: Any, title: str, options: Options) -> ImageFiles:
        """See `Opener`."""
        options.require_no_column(location)
        paths = location.paths
        title = PurePath(location.folder.name(paths[0])).name if len(paths) == 1 else f"{len(paths)} files"
        return ImageFiles(location.folder, paths, title)
