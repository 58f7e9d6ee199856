"""What a source of items is: items by index, with names, labels and digests; and parts and unions of sources."""

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Any, Generic, TypeAlias, TypeVar

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from featnorm.inputs.errors import DataError
from featnorm.inputs.formats import PassedOver
from featnorm.inputs.kinds import IMAGES, Kind

T = TypeVar("T")


class Source(Dataset[tuple[T, int | None]], ABC, Generic[T]):
    """Items with names and, perhaps, labels: a map-style data set without a transform.

    ``source[i]`` is ``(source.item(i), source.label(i))``. Indices run from 0 to ``len(source) - 1``. Several
    threads may read a source at the same time.

    Parameters
    ----------
    title : str
        A short name for tables, such as ``"textures"`` or ``"cifar10:train[:500]"``.
    labels : sequence of int or None
        Label of each item; None or a negative number, as Hugging Face and torchvision have it, for no label.
    class_names : list of str or None
        Name of every label, if the source knows them.

    Attributes
    ----------
    kind : Kind
        What the items are. Default: images.
    names_are_paths : bool
        Whether `name` is the path of a file, which also distinguishes the item from those of other sources.
    passed_over : PassedOver
        Files that were found beside the items but are not items.
    label_columns : tuple of str
        Columns of an unlabeled table that could hold its labels.
    columns : tuple of str
        Columns of a table that hold single values; empty for other sources.
    text_column : str or None
        Column of a table that holds the texts.
    width : int or None
        Number of numbers per row, if the items are vectors.
    max_readers : int or None
        Number of threads with which the items are read fastest, if there is a maximum.
    fps : float or None
        Number of frames per second that are read of videos, 0 for all; None for other items.
    """

    kind: Kind = IMAGES
    names_are_paths = False
    passed_over = PassedOver()
    label_columns: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    text_column: str | None = None
    width: int | None = None
    max_readers: int | None = None
    fps: float | None = None

    def __init__(self, title: str, labels: Sequence[int | None], class_names: list[str] | None) -> None:
        self.title = title
        self.class_names = class_names
        self._labels = [None if label is None or label < 0 else label for label in labels]

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, i: int) -> tuple[T, int | None]:
        return self.item(i), self.label(i)

    def item(self, i: int) -> T:
        """Return item `i`, fully decoded: a text, or an image in RGB and upright.

        Raises
        ------
        ItemError
            If the item is corrupt, truncated or unreadable.
        IndexError
            If there is no item `i`.
        """
        return self.read(i)[0]

    def label(self, i: int) -> int | None:
        """Return the class of item `i`, or None if it has none."""
        return self._labels[self._checked(i)]

    def name(self, i: int) -> str:
        """Return the name of item `i` for messages: its file, or its row."""
        return self._name(self._checked(i))

    def time(self, i: int) -> float | None:
        """Return the time of item `i` in its clip, in seconds; None if it has none."""
        return None

    def unit(self, i: int) -> str | None:
        """Return what item `i` is a part of, such as the clip of a frame; None if it stands for itself.

        The items of one unit depend on each other, and units do not.
        """
        return None

    def units(self) -> list[str] | None:
        """Return the unit of every item; None if they stand for themselves."""
        found = [self.unit(i) for i in range(len(self))]
        return None if None in found else found  # type: ignore[return-value]

    def column(self, name: str) -> list[Any]:
        """Return the values of a column, one per item; null is None.

        Raises
        ------
        DataError
            There is no such column, or it cannot be read.
        """
        has = f"it has {', '.join(self.columns)}" if self.columns else "it is not a table"
        raise DataError(f"no column {name!r} in {self.title}: {has}")

    def digest(self, i: int) -> bytes:
        """Return a digest of 32 bytes of the content of item `i`: of its file, its pixels or its text.

        Raises
        ------
        ItemError
            If it cannot be read.
        IndexError
            If there is no item `i`.
        """
        return self._digest(self._checked(i))

    def read(self, i: int) -> tuple[T, bytes]:
        """Return item `i` as `item` does, and the `digest` of the content that it was decoded from.

        The content is read once, so that item and digest match even if the file is being replaced.

        Raises
        ------
        ItemError
            If the item is corrupt, truncated or unreadable; the error holds the digest of what was read.
        IndexError
            If there is no item `i`.
        """
        return self._read(self._checked(i))

    def identity(self, i: int) -> str:
        """Return what identifies item `i` without reading its content: name, size and modification time."""
        return self._identity(self._checked(i))

    def require(self, kind: Kind, taker: str, preprocess: Any = None) -> None:
        """Check that the items are of a kind, and have the columns that a preprocess takes.

        Parameters
        ----------
        kind : Kind
            The kind.
        taker : str
            What takes only these, for the message.
        preprocess : callable, optional
            The preprocess.

        Raises
        ------
        DataError
            If they are of another kind, or have other columns.
        """
        # Frames are images.
        if not isinstance(self.kind, type(kind)):
            raise DataError(f"{self.title} holds {self.kind.name}, and {taker} takes {kind.name}")
        kind.check_source(self, preprocess)

    def _checked(self, i: int) -> int:
        if not 0 <= i < len(self):
            raise IndexError(f"no item {i} in {self.title}, whose length is {len(self)}")
        return i

    @abstractmethod
    def _read(self, i: int) -> tuple[T, bytes]: ...

    @abstractmethod
    def _name(self, i: int) -> str: ...

    def _digest(self, i: int) -> bytes:
        return self._read(i)[1]

    def _identity(self, i: int) -> str:
        return self._name(i)


#: A source of images, as PIL images in RGB.
ImageSource: TypeAlias = Source[Image.Image]


class SlicedSource(Source[T]):
    """Some of the items of another source.

    Parameters
    ----------
    source : Source
        The other source.
    rows : sequence of int
        Indices of the items in it, in the order of this one.
    title : str
        Name for tables.
    """

    def __init__(self, source: Source[T], rows: Sequence[int], title: str) -> None:
        super().__init__(title, [source.label(row) for row in rows], source.class_names)
        self.kind = source.kind
        self.names_are_paths = source.names_are_paths
        self.passed_over = source.passed_over
        self.label_columns = source.label_columns
        self.columns = source.columns
        self.text_column = source.text_column
        self.width = source.width
        self.max_readers, self.fps = source.max_readers, source.fps
        self._source = source
        self._rows = rows

    def time(self, i: int) -> float | None:
        """See `Source`."""
        return self._source.time(self._rows[i])

    def unit(self, i: int) -> str | None:
        """See `Source`."""
        return self._source.unit(self._rows[i])

    def column(self, name: str) -> list[Any]:
        """See `Source`."""
        values = self._source.column(name)
        return [values[row] for row in self._rows]

    def _read(self, i: int) -> tuple[T, bytes]:
        return self._source.read(self._rows[i])

    def _name(self, i: int) -> str:
        return self._source.name(self._rows[i])

    def _digest(self, i: int) -> bytes:
        return self._source.digest(self._rows[i])

    def _identity(self, i: int) -> str:
        return self._source.identity(self._rows[i])


class JoinedSource(Source[T]):
    """The items of several sources, one source after the other; with labels if all have the same class names.

    Parameters
    ----------
    sources : sequence of Source
        The sources.

    Raises
    ------
    DataError
        If the sources hold different kinds of items.
    """

    def __init__(self, sources: Sequence[Source[T]]) -> None:
        self.kind, self.width = sources[0].kind, sources[0].width
        self.max_readers, self.fps = sources[0].max_readers, sources[0].fps
        for source in sources:
            if source.width != sources[0].width:
                raise DataError(
                    f"the rows of {sources[0].title} and {source.title} have different columns: open them one by "
                    "one"
                )
            if source.kind is not self.kind:
                raise DataError(
                    f"{sources[0].title} holds {self.kind.name}, and {source.title} {source.kind.name}: open them "
                    "one by one"
                )
        self._ends = list(accumulate(len(source) for source in sources))
        classes = sources[0].class_names
        labels: list[int | None] = [None] * self._ends[-1]
        if classes is not None and all(source.class_names == classes for source in sources):
            labels = [source.label(row) for source in sources for row in range(len(source))]
        else:
            classes = None
        super().__init__(" and ".join(source.title for source in sources), labels, classes)
        self._sources = sources
        self.passed_over = sum((source.passed_over for source in sources), PassedOver())
        self.columns = tuple(
            name for name in sources[0].columns if all(name in other.columns for other in sources)
        )

    def time(self, i: int) -> float | None:
        """See `Source`."""
        source, row = self._locate(i)
        return source.time(row)

    def unit(self, i: int) -> str | None:
        """See `Source`."""
        source, row = self._locate(i)
        return source.unit(row)

    def column(self, name: str) -> list[Any]:
        """See `Source`."""
        return [value for source in self._sources for value in source.column(name)]

    def _locate(self, i: int) -> tuple[Source[T], int]:
        number = bisect_right(self._ends, i)
        return self._sources[number], i - (self._ends[number - 1] if number else 0)

    def _read(self, i: int) -> tuple[T, bytes]:
        source, row = self._locate(i)
        return source.read(row)

    def _name(self, i: int) -> str:
        source, row = self._locate(i)
        return source.name(row) if source.names_are_paths else f"{source.title}: {source.name(row)}"

    def _digest(self, i: int) -> bytes:
        source, row = self._locate(i)
        return source.digest(row)

    def _identity(self, i: int) -> str:
        source, row = self._locate(i)
        return source.identity(row)


def class_indices(names: Iterable[str] | None, classes: Iterable[str] | None) -> list[int] | None:
    """Return the index of each name among the classes of a model; None if one is not among them.

    Names are compared exactly or, if that fails, without regard to case.
    """
    names, classes = list(names or ()), list(classes or ())
    for fold in (str, str.casefold):
        indices = {fold(name): i for i, name in enumerate(classes)}
        found = [indices[fold(name)] for name in names if fold(name) in indices]
        if names and len({*found}) == len(names) and len(indices) == len(classes):
            return found
    return None


def class_labels(values: Any) -> tuple[list[int | None], list[str] | None]:
    """Return labels as class indices, and the names of the classes, or None if the labels are integers.

    Parameters
    ----------
    values
        One label per item, a sequence or an array (n,): integers, also as strings, of which negative ones mean no
        label; or anything else, whose sorted strings are the classes. None, NaN and "" mean no label.

    Raises
    ------
    DataError
        The array has another shape.
    """
    if not isinstance(values, list):
        values = np.asarray(values)
        if values.ndim != 1:
            raise DataError(f"labels have shape {values.shape}: expected one label per item")
        values = values.tolist()
    words = [None if value is None or value != value or value == "" else str(value) for value in values]
    if all(word is None or word.lstrip("-").isdecimal() for word in words):
        return [None if word is None else int(word) for word in words], None
    names = sorted({word for word in words if word is not None})
    numbers = {name: number for number, name in enumerate(names)}
    return [None if word is None else numbers[word] for word in words], names
