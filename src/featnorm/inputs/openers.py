"""Opening of data by path, address or name, with a registry of openers: one for each kind of data."""

import difflib
import math
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

from featnorm._utils.errors import first_line
from featnorm.inputs.errors import DataError
from featnorm.inputs.files import SPLIT_NAMES, Files, Folder, LocalFolder, title_of
from featnorm.inputs.object_stores import is_address, list_address
from featnorm.inputs.source import JoinedSource, SlicedSource, Source

_SLICE = re.compile(r"(?P<spec>.+)\[(?P<slice>[^\[\]]*)\]", re.DOTALL)
_BOUND = re.compile(r"(?P<number>[+-]?\d+)(?P<percent>%?)")


@dataclass(frozen=True)
class Name:
    """The name of a data set that is not under the data root.

    Parameters
    ----------
    name, split : str
        The data set, and its split; "" for no split.
    root : Path or None
        The data root, if one is set.
    """

    name: str
    split: str
    root: Path | None

    def __str__(self) -> str:
        spec = f"{self.name}:{self.split}" if self.split else self.name
        if self.root is None:
            return f"{spec!r}: no such path"
        others = ", ".join(_names_under(self.root)) or "nothing"
        return f"{spec!r}: no such path, and none of this name under the data root {self.root} (it has {others})"


Location: TypeAlias = Folder | Files | Name


@dataclass(frozen=True)
class Options:
    """How to open data.

    Parameters
    ----------
    labels : bool
        Whether to read the labels of a table.
    label_column, text_column : str or None
        The columns of a table that hold the labels and the texts; None for the default.
    fps : float
        Number of frames per second of a video to read; 0 for all of them.

    Raises
    ------
    ValueError
        If `fps` is negative or not finite.
    """

    labels: bool
    label_column: str | None
    text_column: str | None
    fps: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.fps < math.inf:
            raise ValueError(f"fps is {self.fps}: pass a number of frames per second, or 0 for all frames")

    @property
    def label(self) -> str:
        """Name of the column of the labels."""
        return self.label_column or "label"

    def label_of(self, columns: Sequence[str], where: str) -> str | None:
        """Return the column of a table that holds the labels; None if there is none, or if they are not read.

        Raises
        ------
        DataError
            The table, which ``where`` names, lacks the column that the user chose.
        """
        if self.label_column is not None and self.label_column not in columns:
            raise DataError(f"no column {self.label_column!r} in {where}: it has {', '.join(columns) or 'none'}")
        return self.label if self.labels and self.label in columns else None

    def require_no_column(self, location: object) -> None:
        """Check that no column is given, for data without columns.

        Raises
        ------
        DataError
            If one is given.
        """
        if (column := self.label_column or self.text_column) is not None:
            raise DataError(
                f"{location} is not a table and has no column {column!r}: the classes of images in folders are "
                "the names of the folders"
            )


class Opener(ABC):
    """Opens one kind of data. Defining a subclass registers it; `featnorm.inputs` imports the modules that do.

    The first opener that accepts a location opens it. Those with `endings` come first, ordered by their names,
    then those that accept any file or folder.

    Attributes
    ----------
    endings : tuple of str
        Endings of the files that it opens, such as ``".parquet"``; they are also looked for under the data root.
    names : tuple of str
        Names of the data sets that it opens, in upper or lower case.
    shards : tuple of str
        Endings of the files that, in a folder without images, are the shards of one data set, or its splits.
    merges : bool
        Whether neighboring files of one folder are opened as one source.
    """

    endings: ClassVar[tuple[str, ...]] = ()
    names: ClassVar[tuple[str, ...]] = ()
    shards: ClassVar[tuple[str, ...]] = ()
    merges: ClassVar[bool] = False

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        _OPENERS.append(cls())
        _OPENERS.sort(key=lambda opener: (not opener.endings, type(opener).__name__))

    def accepts(self, location: Location) -> bool:
        """Whether it opens a location; by default a file with one of its endings, shards, or one of its names."""
        if isinstance(location, Files):
            return location.paths[0].endswith(self.endings)
        if isinstance(location, Folder):
            return bool(location.top_level(self.shards)[1]) and not location.images[0]
        return location.name.lower() in map(str.lower, self.names)

    @abstractmethod
    def open(self, location: Any, title: str, options: Options) -> Source[Any]:
        """Open a location that it accepts.

        Parameters
        ----------
        location : Folder, Files or Name
            The location. There are several files only if `merges` is true.
        title : str
            The source's name for tables.
        options : Options
            How to open it.

        Raises
        ------
        DataError
            If the data cannot be used.
        OSError
            If it cannot be read.
        ImportError
            If a package is needed and not installed.
        """


_OPENERS: list[Opener] = []


def open_source(
    *specs: str,
    root: str | Path | None = None,
    labels: bool = True,
    label_column: str | None = None,
    text_column: str | None = None,
    mix_splits: bool = False,
    fps: float = 1.0,
) -> Source[Any]:
    """Open data by path, address or name. None of it is decoded yet.

    Parameters
    ----------
    *specs : str
        What to open. Several specifications are one source, one after the other. Each is one of

        - a folder of images; if all lie in sub-folders, the first-level sub-folders are the classes;
        - an image file, whatever it is called;
        - a video (``.mp4``, ``.mov``, ``.mkv``, ``.webm``, ``.avi`` and others), or a folder that holds more
          videos than images: its frames are the items, see `featnorm.inputs.video.VideoFrames`;
        - a ``.parquet`` file in the Hugging Face layout (``image``: a struct of ``bytes`` and ``path``;
          perhaps a column of labels), or a folder of such files, the shards of one data set;
        - texts: a ``.csv``, ``.jsonl`` or ``.parquet`` file, or a folder of such files with the same columns, the
          shards of one data set, with a column of texts and perhaps one of labels; or a ``.txt`` file with one
          text per line; all in UTF-8. The first row of a CSV file names its columns;
        - rows: a ``.npy`` or ``.npz`` file with an array (n, D), such as the outputs of an encoder, the latter
          perhaps with an array ``labels``; or a ``.csv``, ``.jsonl`` or ``.parquet`` file, or a folder of shards,
          with a column of vectors, or with columns of numbers, strings and booleans;
        - the address of one of these in an object store, as pyarrow's file systems take it:
          ``s3://bucket/photos``, ``gs://...``, ``abfs://...``, ``hdfs://...``, settings in a query
          (``?region=eu-west-1``);
        - ``NAME`` or ``NAME:SPLIT``, with "test" as the default split. It is looked for under the data root as
          ``NAME/SPLIT.parquet``, ``NAME.parquet``, ``NAME/SPLIT/`` and ``NAME/`` (those without a split for
          "test" only), else downloaded there as torchvision's data set of that name, in upper or lower case;

        and perhaps a slice at the end: ``data[:500]``, ``cifar10:train[50%:]``, ``data[1::2]``. Percentages
        are of the number of items, rounded to the nearest one; bounds outside the data are clamped, as in Python.
        A path that exists is a path, whatever it looks like.
    root : str or Path, optional
        The data root. Default: the environment variable ``FEATNORM_DATA``; if it is not set, downloads go to
        ``~/.cache/featnorm``.
    labels : bool
        Whether to read the labels of a table.
    label_column : str, optional
        The column of a table that holds the labels: integers, strings or booleans, dictionary-encoded or not.
        Default: ``label``, if there is one.
    text_column : str, optional
        The column of a table that holds the texts. Default: ``text``, if there is one; or else the only column of
        strings beside the labels, if it is the only other column or has three words or more per row on average.
        Unless it is given, a parquet file with a column ``image`` holds images, and a table with a column of
        vectors, or without a column of texts, holds rows.
    mix_splits : bool
        Whether a folder may hold several splits, such as ``train`` and ``test``.
    fps : float
        Number of frames per second of a video to read; 0 for all of them.

    Returns
    -------
    Source
        The items.

    Raises
    ------
    DataError
        If the data cannot be found, read or downloaded, if there is no item in it or in the slice, if it holds
        several splits, or if there is no column of that name or no labels in it.
    ValueError
        If there is no specification, or `fps` is negative.
    ImportError
        If ``featnorm[images]`` or ``featnorm[video]`` is needed and not installed.
    """
    if not specs:
        raise ValueError("no data is given: name a folder, a file, an address or a data set")
    options = Options(labels, label_column, text_column, fps)
    root = root or os.environ.get("FEATNORM_DATA")
    found = [_resolve(spec, None if root is None else Path(root).expanduser(), mix_splits) for spec in specs]
    if several := [one.opener for one in found if one.opener.merges and not one.opener.endings]:
        # Beside image files, as a shell lists a folder, any other file is one that is not an image.
        found = [
            replace(one, opener=several[0]) if one.opener.endings and ".parquet" not in one.opener.endings else one
            for one in found
        ]
    sources = [one.open(options) for one in _merged(found)]
    return sources[0] if len(sources) == 1 else JoinedSource(sources)


@dataclass(frozen=True)
class _Resolved:
    """A resolved specification: a location, its opener, and the slices to take, the innermost first."""

    location: Location
    title: str
    opener: Opener
    slices: tuple[str, ...] = ()

    def open(self, options: Options) -> Source[Any]:
        try:
            source = self.opener.open(self.location, self.title, options)
        except OSError as error:
            raise DataError(f"cannot read {self.location}: {first_line(error)}") from error
        for text in self.slices:
            source = _sliced(source, text)
        return source


def _merged(found: Sequence[_Resolved]) -> Iterator[_Resolved]:
    """Merge neighboring files, if their opener permits it."""

    def key(one: _Resolved) -> object:
        if isinstance(one.location, Files) and one.opener.merges and not one.slices:
            return id(one.opener), id(one.location.folder)
        return id(one)

    for _, group in groupby(found, key=key):
        members = list(group)
        files = [one.location for one in members if isinstance(one.location, Files)]
        if len(members) > 1:
            paths = tuple(path for of_one in files for path in of_one.paths)
            yield replace(members[0], location=Files(files[0].folder, paths))
        else:
            yield members[0]


# The folder of the files that a user names on this machine.
_HERE = LocalFolder("")


def _resolve(spec: str, root: Path | None, mix_splits: bool) -> _Resolved:
    path = Path(os.path.expanduser(spec))
    if spec and os.path.exists(path):
        return _resolved(_local(path), mix_splits)
    if match := _SLICE.fullmatch(spec):
        found = _resolve(match["spec"], root, mix_splits)
        return replace(found, slices=(*found.slices, match["slice"]))
    if is_address(spec):
        return _resolved(list_address(spec), mix_splits)
    if not spec or path.is_absolute() or spec[0] in ".~" or path.name.endswith(_endings()):
        raise DataError(f"no file or folder {spec!r}: check the path")
    name, colon, split = spec.partition(":")
    title = name.rpartition("/")[2] + colon + split
    if root is not None and (path_under := _find_under(root, name, split or "test")):
        return _resolved(_local(path_under), mix_splits, title)
    location = Name(name, split, root)
    return _Resolved(location, title, _opener_of(location))


def _local(path: Path) -> Folder | Files:
    return LocalFolder(path) if path.is_dir() else Files(_HERE, (str(path),))


def _resolved(location: Folder | Files, mix_splits: bool, title: str | None = None) -> _Resolved:
    """Find the opener of a folder, which may hold several splits only if they may be mixed, or of a file."""
    if isinstance(location, Files):
        return _Resolved(location, title or title_of(location.folder, location.paths[0]), _opener_of(location))
    try:
        opener = _opener_of(location)
        splits = [] if mix_splits else location.splits(opener.shards)
        if len(splits) > 1:
            raise DataError(
                f"{location} holds several splits, which must not be mixed: name one of {', '.join(splits)}"
            )
        return _Resolved(location, title or title_of(location), opener)
    except OSError as error:
        raise DataError(f"cannot read the folder {location}: {first_line(error)}") from error


def _opener_of(location: Location) -> Opener:
    """Return the first opener that accepts a location.

    Raises
    ------
    DataError
        If none does.
    """
    for opener in _OPENERS:
        if opener.accepts(location):
            return opener
    names = [name for opener in _OPENERS for name in opener.names]
    # Most names that are not found are meant as those of folders.
    if isinstance(location, Name) and (
        location.split or difflib.get_close_matches(location.name.lower(), [*map(str.lower, names)], 1)
    ):
        root = ", no data root is set (FEATNORM_DATA)" if location.root is None else ""
        raise DataError(
            f"cannot find {location}{root}, and no data set of that name can be downloaded (only "
            f"{', '.join(names)}): check the spelling"
        )
    raise DataError(f"cannot find {location}; check the path")


def _endings() -> tuple[str, ...]:
    return tuple(ending for opener in _OPENERS for ending in opener.endings)


def _has_splits(path: Path) -> bool:
    folder = LocalFolder(path)
    return bool(folder.splits(_opener_of(folder).shards))


def _find_under(root: Path, name: str, split: str) -> Path | None:
    folder = root / name
    paths = [folder / f"{split}{ending}" for ending in _endings()]
    if split == "test":  # data without splits must not be "test" and also "train"
        paths += [root / f"{name}{ending}" for ending in _endings()]
    paths.append(folder / split)
    # torchvision downloads to <root>/dtd/dtd and <root>/MNIST/raw, and reads these folders itself.
    if split == "test" and not (folder / "dtd").is_dir() and not (folder / "raw").is_dir():
        paths += [folder] if folder.is_dir() and not _has_splits(folder) else []
    return next((path for path in paths if path.exists()), None)


def _names_under(root: Path) -> list[str]:
    names = set()
    for ending in _endings():
        for file in [*root.glob(f"*{ending}"), *root.glob(f"*/*{ending}")]:
            own = file.relative_to(root).as_posix().removesuffix(ending)
            folder, _, split = own.rpartition("/")
            names.add(f"{folder}:{split}" if split in SPLIT_NAMES else own)
    names.update(p.name for p in root.glob("[!.]*/") if p.is_dir() and not LocalFolder(p).top_level(_endings())[1])
    return sorted(names)


def _sliced(source: Source[Any], text: str) -> Source[Any]:
    parts = text.split(":")
    if len(parts) not in (2, 3):
        raise DataError(f"cannot slice {source.title} by [{text}]: write [start:stop] or [start:stop:step]")
    start, stop = (_bound(part, text, len(source)) for part in parts[:2])
    step = _bound(parts[2], text, None) if len(parts) == 3 else None
    if step == 0:
        raise DataError(f"cannot slice {source.title} by [{text}]: the step must not be 0")
    rows = range(len(source))[start:stop:step]
    if not rows:
        raise DataError(f"[{text}] selects nothing from {source.title}, whose length is {len(source)}")
    return SlicedSource(source, rows, f"{source.title}[{text}]")


def _bound(part: str, text: str, size: int | None) -> int | None:
    """Return one number of a slice; `size` is the number that a percentage refers to, None if there is none."""
    if not part.strip():
        return None
    match = _BOUND.fullmatch(part.strip())
    if not match or (match["percent"] and size is None):
        raise DataError(
            f"cannot read {part!r} in the slice [{text}]: write whole numbers, or 50% to start or stop at"
        )
    number = int(match["number"])
    if not match["percent"] or size is None:
        return number
    # Counted from the start, so that [:-10%] and [-10%:] meet, and -1% of few images is not -0, the first.
    return max(0, round(size * (100 + number if part.strip()[0] == "-" else number) / 100))
