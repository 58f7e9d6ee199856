"""Checks of arguments: of scores, for every function of scores, and of constructor arguments, by a table."""

import math
import operator
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, TypeGuard, Union

import numpy as np
import numpy.typing as npt

from featnorm._utils.errors import NotFiniteError

if TYPE_CHECKING:
    from torch import Tensor

# This module and those that use it for arrays only do not import torch, which takes seconds.
ScoreLike = Union["Tensor", npt.ArrayLike]
"""Scores as users pass them: a tensor, a numpy array or a sequence of numbers."""

_WANTED = "must be a 1-D tensor, array or sequence of real numbers"
# Maximum length of a value's ``repr`` in an error message.
_MAX_SHOWN = 80


def as_score_tensor(x: ScoreLike, name: str, *, allow_empty: bool = False) -> "Tensor":
    """Return scores as a checked, detached tensor on their device, with every value kept exactly.

    Parameters
    ----------
    x
        (n,) scores of any integer or floating type. Infinite values are valid.
    name
        Name of the argument, for the error message.
    allow_empty
        Whether n = 0 is valid: for a batch to score it is, for a sample to fit on or to measure it is not.

    Returns
    -------
    Tensor
        (n,) float32 or float64; integers become float64, half precision and bfloat16 become float32.

    Raises
    ------
    TypeError
        The values are not numbers, or they are booleans, complex or extended-precision numbers.
    ValueError
        The scores are not one-dimensional, are empty, contain NaN, or are integers that float64 cannot tell apart.
    """
    import torch

    if not is_tensor(x):
        return torch.from_numpy(as_score_array(x, name, allow_empty=allow_empty))
    if x.dtype == torch.bool or x.is_complex():
        raise TypeError(f"{name} {_WANTED}, got {x.dtype}")
    _check_shape(x, name, allow_empty)
    x = x.detach()
    if not x.is_floating_point():
        x = x.to(torch.float64)
        _check_exact(x, name)
    elif x.dtype not in (torch.float32, torch.float64):
        x = x.to(torch.float32)
    # The sum needs one read and no temporary; infinities of both signs make it NaN too.
    if math.isnan(x.sum().item()):
        _check_nan(x, name)
    return x


def as_score_array(x: ScoreLike, name: str, *, allow_empty: bool = False) -> npt.NDArray[Any]:
    """Return scores as a checked (n,) float32 or float64 numpy array, without torch; see `as_score_tensor`."""
    if is_tensor(x):
        of_tensor: npt.NDArray[Any] = as_score_tensor(x, name, allow_empty=allow_empty).cpu().numpy()
        return of_tensor
    try:
        # torch accepts neither read-only memory nor negative strides; a copy has neither.
        array = np.array(x, order="C")
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} {_WANTED}: {error}") from error
    if array.dtype.kind not in "iuf" or array.dtype.itemsize > 8:
        raise TypeError(f"{name} {_WANTED}, got {array.dtype}")
    _check_shape(array, name, allow_empty)
    if array.dtype.kind == "f":
        array = array.astype(np.float64 if array.dtype.itemsize == 8 else np.float32, copy=False)
    else:
        array = array.astype(np.float64)
        _check_exact(array, name)
    if np.isnan(array).any():
        _check_nan(array, name)
    return array


def is_tensor(value: object) -> TypeGuard["Tensor"]:
    """Whether a value is a tensor. This does not import torch: before it is imported there are no tensors."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def as_p_values(x: ScoreLike, name: str) -> "Tensor":
    """Return p-values as a checked (n,) float64 tensor of values in [0, 1], n >= 0; see `as_score_tensor`."""
    p = as_score_tensor(x, name, allow_empty=True).double()
    _reject((p < 0) | (p > 1), name, "outside [0, 1]", "pass p-values, not scores")
    return p


def check_share(value: float, name: str, *, one_allowed: bool = False) -> None:
    """Raise a ValueError unless a value is in (0, 1), or in (0, 1] if ``one_allowed``."""
    if not isinstance(value, Real) or not (0 < value < 1 or (one_allowed and value == 1)):
        raise ValueError(f"{name} must be in (0, 1{']' if one_allowed else ')'}, got {value!r}")


def count_for_share(share: float, n: int) -> int:
    """Return the smallest k >= 1 with k / n >= share, for a share in (0, 1] meant as a decimal.

    0.9 * 10 and (1 - 0.7) * 10 count as 9 and 3, although they are not exact in binary: the share counts as
    reached 1e-15 below it, which is more than the rounding of both and less than 1 / n ever is.
    """
    return max(math.ceil(n * (share - 1e-15)), 1)


def threshold_rank(n: int, tpr: float) -> int:
    """Return the rank k of the threshold among n scores, 1 being the smallest: floor((1 - tpr) (n + 1))."""
    check_share(tpr, "tpr")
    k = n + 1 - count_for_share(tpr, n + 1)
    if k == 0:
        raise ValueError(
            f"{n} calibration scores are too few for tpr={tpr}: at least {min_scores(tpr)} are needed; "
            "add calibration inputs or lower tpr"
        )
    return k


def min_scores(tpr: float) -> int:
    """Return the smallest number of scores that have a threshold at ``tpr``: 19 at 0.95, 99 at 0.99."""
    check_share(tpr, "tpr")
    return max(math.ceil(1 / (1 - tpr + 1e-15)) - 1, 1)


class Constraint(ABC):
    """What a constructor argument may be, as one row of a class's table of settings."""

    @property
    @abstractmethod
    def wanted(self) -> str:
        """What is allowed, for the error message: "must be ``wanted``"."""

    @abstractmethod
    def read(self, value: Any) -> Any:
        """Return the plain Python value to keep, whose ``repr`` makes it again.

        Raises
        ------
        TypeError, ValueError
            The value is not allowed.
        """

    def check(self, value: object, name: str, owner: str) -> Any:
        """Return the value to keep.

        Parameters
        ----------
        value : the value that was passed.
        name, owner : the argument and its class, for the error message.

        Raises
        ------
        ValueError
            The value is not allowed.
        """
        try:
            return self.read(value)
        # A tensor without a value (of the device "meta") raises a RuntimeError.
        except (TypeError, ValueError, RuntimeError):
            raise ValueError(f"{owner}: {name} must be {self.wanted}, got {shown(value)}") from None

    def __or__(self, other: "Constraint") -> "Either":
        return Either(self, other)


@dataclass(frozen=True)
class Either(Constraint):
    """A value that one of two constraints allows."""

    first: Constraint
    second: Constraint

    @property
    def wanted(self) -> str:
        return f"{self.first.wanted} or {self.second.wanted}"

    def read(self, value: Any) -> Any:
        try:
            return self.first.read(value)
        except (TypeError, ValueError):
            return self.second.read(value)


@dataclass(frozen=True)
class Integer(Constraint):
    """An integer of any library, ``least`` or more; a bool is not an integer."""

    least: int

    @property
    def wanted(self) -> str:
        return f"an integer >= {self.least}"

    def read(self, value: Any) -> int:
        number = operator.index(_plain(value))
        if number < self.least:
            raise ValueError(number)
        return number


@dataclass(frozen=True)
class Interval(Constraint):
    """A real number of any library between ``low`` and ``high``; NaN lies in no interval.

    Parameters
    ----------
    low, high : ends of the interval.
    closed : the end that belongs to the interval, "left" or "right". Default: neither.
    """

    low: float
    high: float
    closed: Literal["left", "right", "neither"] = "neither"

    @property
    def wanted(self) -> str:
        left, right = "[" if self.closed == "left" else "(", "]" if self.closed == "right" else ")"
        return f"a number in {left}{self.low:g}, {self.high:g}{right}"

    def read(self, value: Any) -> float:
        number = _plain(value)
        if not isinstance(number, Real):
            raise TypeError(number)
        try:
            finite = float(number)
        except OverflowError:
            raise ValueError(number) from None
        number = number if isinstance(number, int) else finite
        ends = {"left": self.low, "right": self.high}
        if not self.low < number < self.high and number != ends.get(self.closed):
            raise ValueError(number)
        return number


class Choice(Constraint):
    """One of a few strings, booleans or None."""

    def __init__(self, *options: str | bool | None) -> None:
        self.options = options

    @property
    def wanted(self) -> str:
        return " or ".join(map(repr, self.options))

    def read(self, value: Any) -> str | bool | None:
        plain = _plain(value, booleans=True)
        if not isinstance(plain, (str, bool, type(None))):
            raise TypeError(plain)
        # What is kept is the option itself, and not an equal value of another library.
        return self.options[self.options.index(plain)]


@dataclass(frozen=True)
class SequenceOf(Constraint):
    """A sequence of at least one value, kept as a tuple."""

    item: Constraint

    @property
    def wanted(self) -> str:
        return f"a sequence (each item {self.item.wanted})"

    def read(self, value: Any) -> tuple[Any, ...]:
        if not (isinstance(value, (Sequence, np.ndarray)) or is_tensor(value)) or isinstance(value, (str, bytes)):
            raise TypeError(value)
        if not len(value):
            raise ValueError(value)
        return tuple(self.item.read(part) for part in value)


def table(**constraints: Constraint) -> Mapping[str, Constraint]:
    """Return the constraints of a class by the names of its constructor's arguments."""
    return MappingProxyType(constraints)


def check_type(value: object, kind: type | tuple[type, ...], name: str, wanted: str) -> None:
    """Raise a TypeError unless a value has one of some types.

    Parameters
    ----------
    value : the value to check.
    kind : the type, or the types, that are allowed.
    name, wanted : name of the argument and what it must be, for the error message.
    """
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be {wanted}, got {type(value).__name__}")


def check_text(value: object) -> str:
    """Return a value from a file that must be a string; raise a TypeError if it is not."""
    if not isinstance(value, str):
        raise TypeError(f"{value!r} must be a string")
    return value


def shown(value: object) -> str:
    """Return a value for an error message: its ``repr`` or, if that is long, its type and shape."""
    if (isinstance(value, np.ndarray) or is_tensor(value)) and value.ndim:
        return f"{type(value).__name__} of shape {tuple(value.shape)}"
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN and "\n" not in text else f"a {type(value).__name__}"


def _plain(value: Any, *, booleans: bool = False) -> Any:
    """Return the Python number of a torch or numpy scalar, or any other value; raise for arrays and bools."""
    array = isinstance(value, np.ndarray) or is_tensor(value)
    if isinstance(value, np.generic) or (array and value.ndim == 0):
        value, array = value.item(), False
    if array or (isinstance(value, bool) and not booleans):
        raise TypeError(value)
    return value


def _check_shape(x: Any, name: str, allow_empty: bool) -> None:
    if x.ndim != 1:
        raise ValueError(f"{name} must be 1-D, one score per input, got shape {tuple(x.shape)}")
    if len(x) == 0 and not allow_empty:
        raise ValueError(f"{name} is empty: at least one score is needed")


def _check_exact(x: Any, name: str) -> None:
    _reject(
        abs(x) >= 2**53,
        name,
        "integers of magnitude 2**53 or more, which float64 cannot tell apart",
        "subtract an offset from all scores, or rank them first",
    )


def _check_nan(x: Any, name: str) -> None:
    _reject(x != x, name, "NaN", "a NaN has no rank: find out why this input has no score", NotFiniteError)


def _reject(bad: Any, name: str, what: str, remedy: str, error: type[ValueError] = ValueError) -> None:
    """Raise an error if entries are marked ``bad``, with their number and the index of the first."""
    if bad.any():
        raise error(
            f"{name}: {int(bad.sum())} of {len(bad)} values are {what}, the first at index "
            f"{bad.tolist().index(True)}; {remedy}"
        )
