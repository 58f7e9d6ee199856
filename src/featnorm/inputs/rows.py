"""Preprocess of rows: of vectors, which are used as they are, and of tables, whose columns are encoded."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence, Set
from itertools import compress
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from featnorm._utils.checks import check_text
from featnorm.inputs.errors import DataError, ItemError
from featnorm.inputs.source import Source

#: Categories of a column that get a unit each, together with one for all rarer ones.
MAX_CATEGORIES = 32
_SHOWN = 5


class Rows(ABC):
    """Preprocess of rows. A row that does not fit raises an `ItemError`: it is an unreadable item.

    Attributes
    ----------
    width : int
        Width D of the tensors that it returns.
    embeds : bool
        Whether rows are outputs of an encoder, whose direction counts. Then rows that are equal or nearly equal
        are copies. Otherwise they are records: columns have units, and equal rows are independent.
    """

    kind = "rows"
    embeds: bool

    @property
    @abstractmethod
    def width(self) -> int:
        """Width D of the tensors that it returns."""

    @abstractmethod
    def __call__(self, item: Any) -> Tensor:
        """Return the tensor (D,) of a row, in float32; raise an `ItemError` if it does not fit."""

    @abstractmethod
    def reference(self) -> Any:
        """Return a row to compare this preprocess with another one."""

    @abstractmethod
    def check(self, source: Source[Any]) -> None:
        """Check the columns of a source; raise a `DataError` that names those that do not fit."""

    @abstractmethod
    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return the settings as plain data, and the fitted tensors, for `rows_of`."""


class Vector(Rows):
    """Rows that are vectors of numbers, which are used as they are.

    Parameters
    ----------
    width : number of columns D.
    embeds : see `Rows`.
    """

    def __init__(self, width: int, embeds: bool = True) -> None:
        self._width = width
        self.embeds = embeds

    @property
    def width(self) -> int:
        """See `Rows`."""
        return self._width

    def __str__(self) -> str:
        return f"none, the rows are vectors of {self.width} numbers"

    def __call__(self, item: Any) -> Tensor:
        """See `Rows`."""
        if isinstance(item, Mapping):
            raise ItemError("", f"it has named columns: a vector of {self.width} numbers is needed")
        row = _numbers(item, range(len(item)), np.float32)
        if len(row) != self.width:
            raise ItemError("", f"it has {len(row)} numbers: {self.width} are needed")
        if not np.isfinite(row).all():
            column = int(np.flatnonzero(~np.isfinite(row))[0])
            raise ItemError("", f"column {column} is {row[column]} in float32, which is not finite")
        return torch.from_numpy(row)

    def reference(self) -> Any:
        """Return a ramp."""
        return np.linspace(-1, 1, self.width).tolist()

    def check(self, source: Source[Any]) -> None:
        """See `Rows`."""
        if source.width != self.width:
            has = "named columns" if source.width is None else f"{source.width} columns"
            raise DataError(f"{source.title} has {has}, and vectors of {self.width} numbers are needed")

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """See `Rows`."""
        return {"vector": self.width, "embeds": self.embeds}, {}


class Table(Rows):
    """Rows of a table with named columns, of numbers or of categories.

    Numbers are standardized by `sklearn.preprocessing.StandardScaler`: minus the mean, divided by the population
    standard deviation (1 where it is 0), of the values that are not missing. A missing number becomes the mean, 0;
    a column with missing numbers in the fit gets a further unit, which is 1 where the number is missing and 0
    elsewhere. Categories are one-hot encoded by `sklearn.preprocessing.OneHotEncoder`: a unit for each of the 31
    most frequent, and one for all others, in columns with more than 32. A missing category is a category of its
    own. A category that was not in the fit is 0 in all units of its column. The units are those of the numbers,
    of the missing numbers, and of the categories, each in the order of the columns.

    Parameters
    ----------
    numbers : names of the columns of numbers.
    mean, scale : (len(numbers),) float64.
    gaps : (len(numbers),) bool, the columns with missing numbers in the fit.
    categories : for each column of categories, those of each unit; None for missing.
    left_out : columns that are not used.
    """

    embeds = False

    def __init__(
        self,
        numbers: Sequence[str],
        mean: Tensor,
        scale: Tensor,
        gaps: Tensor,
        categories: Mapping[str, Sequence[Sequence[str | None]]],
        left_out: Sequence[str] = (),
    ) -> None:
        self.numbers, self.categories, self.left_out = list(numbers), dict(categories), list(left_out)
        #: Columns that `fit` left out because they seem to name the rows, and those without a value.
        self.naming: list[str] = []
        self.empty: list[str] = []
        self.mean, self.scale, self.gaps = mean.numpy(), scale.numpy(), gaps.numpy()
        self._names = {*self.numbers, *self.categories}
        self._width = len(self.numbers) + int(self.gaps.sum())
        self._units: dict[str, dict[str | None, int]] = {}
        for name, units in self.categories.items():
            self._units[name] = {category: self._width + i for i, unit in enumerate(units) for category in unit}
            self._width += len(units)

    @classmethod
    def fit(cls, source: Source[Any], left_out: Set[str] = frozenset()) -> Self:
        """Fit to the columns of a source.

        A column is one of numbers if all its values read as numbers, also strings, as those of a CSV file;
        booleans are categories. A column of strings with more than 32 different values, and more than half as many
        as rows, names the rows, and is left out, as is a column without any value.

        Parameters
        ----------
        source : rows of a table.
        left_out : columns that are not used, such as the labels.

        Raises
        ------
        DataError
            No column can be used, or one holds other values than numbers, strings and booleans.
        """
        from sklearn.preprocessing import OneHotEncoder, StandardScaler

        numbers, categories = [], {}
        means, scales, gaps = [], [], []
        naming, without = [], []
        used = [name for name in source.columns if name not in left_out]
        # Rows without any value, such as those that cannot be read, say nothing about the columns.
        empty = np.ones(len(source), bool)
        for name in used:
            if not empty.any():
                break
            empty &= [value is None for value in source.column(name)]
        for name in used:
            values = list(compress(source.column(name), ~empty))
            column = _as_numbers(values)
            if column is not None:
                missing = np.isnan(column)
                if missing.all():
                    without.append(name)
                    continue
                column[~np.isfinite(column)] = np.nan
                scaler = StandardScaler().fit(column[:, None]) if not np.isnan(column).all() else None
                numbers.append(name)
                means.append(0.0 if scaler is None else float(scaler.mean_[0]))
                scales.append(1.0 if scaler is None else float(scaler.scale_[0]))
                gaps.append(bool(missing.any()))
                continue
            if (odd := next((value for value in values if not _is_category(value)), None)) is not None:
                raise DataError(
                    f"column {name!r} of {source.title} holds values of type {type(odd).__name__}: convert it to "
                    "numbers, strings or booleans, or leave it out"
                )
            words = np.array([[_category(value)] for value in values], object)
            different = len({word for (word,) in words})
            if different > max(MAX_CATEGORIES, len(values) / 2):
                naming.append(name)
                continue
            encoder = OneHotEncoder(handle_unknown="ignore", max_categories=MAX_CATEGORIES).fit(words)
            rare = [] if (found := encoder.infrequent_categories_[0]) is None else found.tolist()
            frequent = [[word] for word in encoder.categories_[0].tolist() if word not in rare]
            categories[name] = [*frequent, rare] if rare else frequent
        unused = [*sorted(left_out), *naming, *without]
        if not numbers and not categories:
            raise DataError(
                f"no column of {source.title} can be used ({listed(unused)} left out); if one holds texts, "
                "choose it with text_column (--text-column)"
            )
        mean, scale = (torch.tensor(values, dtype=torch.float64) for values in (means, scales))
        table = cls(numbers, mean, scale, torch.tensor(gaps, dtype=torch.bool), categories, unused)
        table.naming, table.empty = naming, without
        return table

    @property
    def columns(self) -> list[str]:
        """Names of the columns that are used."""
        return [*self.numbers, *self.categories]

    @property
    def width(self) -> int:
        """See `Rows`."""
        return self._width

    def __str__(self) -> str:
        encoded = f"{self.width} features of {listed(self.columns)}"
        unused = f"; {listed(self.left_out)} left out" if self.left_out else ""
        return f"none, the rows are {encoded}{unused}"

    def __call__(self, item: Any) -> Tensor:
        """See `Rows`."""
        if not isinstance(item, Mapping):
            if len(item) != len(self.columns):
                raise ItemError("", f"it has {len(item)} values: {len(self.columns)} are needed, one per column")
            item = dict(zip(self.columns, item, strict=True))
        if item.keys() != self._names and (why := self._misfit(item.keys())):
            raise ItemError("", why)
        numbers = _numbers([item[name] for name in self.numbers], self.numbers, np.float64)
        if np.isinf(numbers).any():
            raise ItemError("", f"column {self.numbers[int(np.isinf(numbers).argmax())]!r} is infinite")
        row = np.zeros(self.width, np.float32)
        missing = np.isnan(numbers)
        row[: len(numbers)] = np.where(missing, 0, (numbers - self.mean) / self.scale)
        row[len(numbers) : len(numbers) + int(self.gaps.sum())] = missing[self.gaps]
        for name, units in self._units.items():
            unit = units.get(_category(item[name]))
            if unit is not None:
                row[unit] = 1
        if not np.isfinite(row).all():
            raise ItemError("", f"column {self.numbers[int((~np.isfinite(row)).argmax())]!r} is too large")
        return torch.from_numpy(row)

    def reference(self) -> Any:
        """Return one standard deviation above the mean, and the first category, of each column."""
        return {
            **dict(zip(self.numbers, (self.mean + self.scale).tolist(), strict=True)),
            **{name: units[0][0] for name, units in self.categories.items()},
        }

    def check(self, source: Source[Any]) -> None:
        """See `Rows`."""
        if source.width is not None and source.width != len(self.columns):
            raise DataError(
                f"{source.title} has {source.width} columns without names, and a table is needed with the columns "
                f"{listed(self.columns)}"
            )
        if source.width is None and (why := self._misfit(set(source.columns))):
            raise DataError(f"{source.title}: {why}")

    def _misfit(self, names: Set[str]) -> str:
        """Return which columns are missing or unknown; an empty string if the names fit."""
        missing = [name for name in self.columns if name not in names]
        unknown = sorted(str(name) for name in names - self._names - set(self.left_out))
        return "; ".join(
            f"{what} {listed(found)}"
            for what, found in (("missing columns", missing), ("unknown columns", unknown))
            if found
        )

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """See `Rows`."""
        settings = {"numbers": self.numbers, "categories": self.categories, "left out": self.left_out}
        fitted = {"mean": self.mean, "scale": self.scale, "gaps": self.gaps}
        return settings, {name: torch.from_numpy(value) for name, value in fitted.items()}


def fit_rows(source: Source[Any], left_out: Set[str] = frozenset()) -> Rows:
    """Return the preprocess of a source's rows: a `Vector`, or a `Table` that is fitted to them.

    Parameters
    ----------
    source : rows.
    left_out : columns that are not used.
    """
    return Table.fit(source, left_out) if source.width is None else Vector(source.width)


def rows_of(settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Rows:
    """Return the preprocess whose `Rows.state` is given.

    Raises
    ------
    LookupError, TypeError, ValueError
        It is not the state of one.
    """
    if "vector" in settings:
        width, embeds = settings["vector"], settings["embeds"]
        if type(width) is not int or width < 1 or type(embeds) is not bool:
            raise ValueError(f"its rows have the settings {dict(settings)}")
        return Vector(width, embeds)
    numbers = [check_text(name) for name in settings["numbers"]]
    categories = {
        check_text(name): [[None if word is None else check_text(word) for word in unit] for unit in units]
        for name, units in settings["categories"].items()
    }
    mean, scale, gaps = (tensors[name] for name in ("mean", "scale", "gaps"))
    types = torch.float64, torch.float64, torch.bool
    for value, dtype in zip((mean, scale, gaps), types, strict=True):
        if value.dtype != dtype or value.shape != (len(numbers),) or not value.isfinite().all():
            raise ValueError("the fitted numbers of its columns do not fit their names")
    if not (scale > 0).all() or not all(unit for units in categories.values() for unit in units):
        raise ValueError("a column has a scale that is not positive, or a unit without categories")
    return Table(numbers, mean, scale, gaps, categories, [check_text(name) for name in settings["left out"]])


def _numbers(values: Any, names: Sequence[Any], dtype: Any) -> np.ndarray[Any, Any]:
    """Return values as an array; raise an `ItemError` that names the first that is not a number."""
    try:
        with np.errstate(over="ignore"):
            found = np.asarray(values, dtype)
        if found.ndim == 1 and (isinstance(values, np.ndarray) or bool not in map(type, values)):
            return found
    except (TypeError, ValueError, OverflowError):
        pass
    for name, value in zip(names, values, strict=True):
        if _as_numbers([value]) is None:
            raise ItemError("", f"column {name!r} is {_shortened(value)}, not a number")
    return np.array([_as_numbers([value])[0] for value in values], dtype)  # type: ignore[index]


def _as_numbers(values: Sequence[Any]) -> np.ndarray[Any, Any] | None:
    """Return values as float64, NaN for those that are missing; None if one is not a number."""
    if not {bool, np.bool_}.isdisjoint(map(type, values)):
        return None
    try:
        found = np.array([math.nan if value is None else float(value) for value in values], np.float64)
    except (TypeError, ValueError, OverflowError):
        return None
    return found


def _is_category(value: Any) -> bool:
    missing = value is None or (isinstance(value, float) and math.isnan(value))
    return missing or isinstance(value, (str, bool, int, float, np.bool_))


def _category(value: Any) -> str | None:
    return None if value is None or value != value else str(value)


def listed(names: Sequence[str]) -> str:
    """Return names in quotes, at most five of them."""
    shown = ", ".join(map(repr, names[:_SHOWN]))
    return shown + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 50 else f"{text[:49]}…"
