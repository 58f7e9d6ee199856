"""Argument checks: of scores, which every function of scores shares, and of the settings of detectors."""

import math
import operator
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeGuard, Union

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from torch import Tensor

# Neither this module nor those that use it for arrays alone need torch, which takes seconds to import.
ScoreLike = Union["Tensor", npt.ArrayLike]
"""Scores as users hold them: a tensor, a numpy array or a sequence of numbers."""

_WANTED = "must be a 1-D tensor, array or sequence of real numbers"
# Characters of a value's own words in an error message.
_SHOWN = 80


def as_score_tensor(x: ScoreLike, name: str, *, allow_empty: bool = False) -> "Tensor":
    """Scores as a checked, detached tensor on their own device, every value kept exactly.

    Parameters
    ----------
    x
        (n,) scores of any integer or floating type. Infinite values are scores like any other.
    name
        The argument's name, for the error message.
    allow_empty
        Whether n = 0 is valid: it is for a batch to judge, not for a sample to learn or measure from.

    Returns
    -------
    Tensor
        (n,) float32 or float64; integers become float64, half precision and bfloat16 become float32.

    Raises
    ------
    TypeError
        Not numbers, or booleans, complex or extended-precision numbers.
    ValueError
        Not one-dimensional, empty, NaN, or integers that float64 cannot tell apart.
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
    # The sum tells in one read without a temporary; infinities of both signs make it NaN too.
    if math.isnan(x.sum().item()):
        _check_nan(x, name)
    return x


def as_score_array(x: ScoreLike, name: str, *, allow_empty: bool = False) -> npt.NDArray[Any]:
    """Scores as a checked (n,) float32 or float64 numpy array, without torch; see `as_score_tensor`."""
    if is_tensor(x):
        of_tensor: npt.NDArray[Any] = as_score_tensor(x, name, allow_empty=allow_empty).cpu().numpy()
        return of_tensor
    try:
        # The copy frees torch from read-only memory and negative strides, neither of which it takes.
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
    """Whether a value is a tensor. Where torch was not imported there is none, and this does not import it."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def as_p_values(x: ScoreLike, name: str) -> "Tensor":
    """P-values as a checked (n,) float64 tensor of values in [0, 1], n >= 0; see `as_score_tensor`."""
    p = as_score_tensor(x, name, allow_empty=True).double()
    _refuse((p < 0) | (p > 1), name, "outside [0, 1]", "pass p-values, not scores")
    return p


def check_share(value: float, name: str, *, one_allowed: bool = False) -> None:
    """Refuse, by a ValueError, what is not in (0, 1), or in (0, 1] where ``one_allowed``."""
    if not isinstance(value, Real) or not (0 < value < 1 or (one_allowed and value == 1)):
        raise ValueError(f"{name} must be in (0, 1{']' if one_allowed else ')'}, got {value!r}")


def count_for_share(share: float, n: int) -> int:
    """Smallest k >= 1 with k / n >= share, for a share in (0, 1] meant as a decimal.

    0.9 * 10 and (1 - 0.7) * 10 are 9 and 3 here, although neither 0.9 nor 1 - 0.7 is so in binary: the
    share counts as reached 1e-15 below it, more than the rounding of both and less than 1 / n ever is.
    """
    return max(math.ceil(n * (share - 1e-15)), 1)


def threshold_rank(n: int, tpr: float) -> int:
    """Rank k of the threshold among n scores, 1 the smallest: floor((1 - tpr) (n + 1))."""
    check_share(tpr, "tpr")
    k = n + 1 - count_for_share(tpr, n + 1)
    if k == 0:
        least = math.ceil(1 / (1 - tpr + 1e-15)) - 1
        raise ValueError(
            f"{n} calibration scores are too few for tpr={tpr}: at least {least} are needed; "
            "add calibration inputs or lower tpr"
        )
    return k


@dataclass(frozen=True)
class Setting:
    """What a constructor argument may be, as one row of a class's table of settings.

    Attributes
    ----------
    wanted : str
        What is allowed, for the error message: "must be ``wanted``".
    read : callable
        From what was passed to the plain Python value that is kept, of which ``repr`` makes the same value again;
        raises TypeError or ValueError for anything that is not allowed.
    """

    wanted: str
    read: Callable[[Any], Any]

    def check(self, value: object, name: str, owner: str) -> Any:
        """Return the value to keep.

        Parameters
        ----------
        value : what was passed.
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

    def __or__(self, other: "Setting") -> "Setting":
        """Return a setting that allows what either of two allows."""

        def read(value: Any) -> Any:
            try:
                return self.read(value)
            except (TypeError, ValueError):
                return other.read(value)

        return Setting(f"{self.wanted} or {other.wanted}", read)


def table(**settings: Setting) -> Mapping[str, Setting]:
    """Return the settings of a class by the names of its constructor's arguments."""
    return MappingProxyType(settings)


def whole(least: int) -> Setting:
    """Return a setting for integers of any library, ``least`` or more; a bool is no integer."""

    def read(value: Any) -> int:
        number = operator.index(_plain(value))
        if number < least:
            raise ValueError(number)
        return number

    return Setting(f"an integer >= {least}", read)


def real(above: float, below: float, *, closed: str = "") -> Setting:
    """Return a setting for real numbers of any library in an interval.

    Parameters
    ----------
    above, below : the ends of the interval; NaN lies in none.
    closed : which ends belong to it: "left", "right", or by default neither.
    """
    left, right = closed == "left", closed == "right"

    def read(value: Any) -> float:
        number = _plain(value)
        if not isinstance(number, Real):
            raise TypeError(number)
        try:
            finite = float(number)
        except OverflowError:
            raise ValueError(number) from None
        number = number if isinstance(number, int) else finite
        if not (above < number < below or (left and number == above) or (right and number == below)):
            raise ValueError(number)
        return number

    return Setting(f"a number in {'[' if left else '('}{above:g}, {below:g}{']' if right else ')'}", read)


def choice(*allowed: str | bool | None) -> Setting:
    """Return a setting for one of a few strings, booleans or None."""

    def read(value: Any) -> str | bool | None:
        plain = _plain(value, booleans=True)
        if not isinstance(plain, (str, bool, type(None))):
            raise TypeError(plain)
        # What is kept is the choice itself, and not an equal value of another library.
        return allowed[allowed.index(plain)]

    return Setting(" or ".join(map(repr, allowed)), read)


def several(item: Setting) -> Setting:
    """Return a setting for a sequence of one value or more, kept as a tuple."""

    def read(value: Any) -> tuple[Any, ...]:
        if not (isinstance(value, (Sequence, np.ndarray)) or is_tensor(value)) or isinstance(value, (str, bytes)):
            raise TypeError(value)
        if not len(value):
            raise ValueError(value)
        return tuple(item.read(part) for part in value)

    return Setting(f"a sequence (each item {item.wanted})", read)


def check_type(value: object, kind: type | tuple[type, ...], name: str, wanted: str) -> None:
    """Refuse, by a TypeError, a value of another type.

    Parameters
    ----------
    value : what was passed.
    kind : the type, or one of the types, that it must have.
    name, wanted : what it is called, and what must be passed, for the error message.
    """
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be {wanted}, got {type(value).__name__}")


def check_text(value: object) -> str:
    """Return a value that was read from a file and must be a string; refuse any other by a TypeError."""
    if not isinstance(value, str):
        raise TypeError(f"{value!r} stands where a text belongs")
    return value


def shown(value: object) -> str:
    """Return a value as an error message has it: its ``repr``, or kind and size where that is long."""
    if (isinstance(value, np.ndarray) or is_tensor(value)) and value.ndim:
        return f"{type(value).__name__} of shape {tuple(value.shape)}"
    text = repr(value)
    return text if len(text) <= _SHOWN and "\n" not in text else f"a {type(value).__name__}"


def _plain(value: Any, *, booleans: bool = False) -> Any:
    """Return the Python number in a scalar of torch or numpy, and all else as it is; refuse arrays and a bool."""
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
    _refuse(
        abs(x) >= 2**53,
        name,
        "integers of magnitude 2**53 or more, which float64 cannot tell apart",
        "subtract an offset from all scores, or rank them first",
    )


def _check_nan(x: Any, name: str) -> None:
    _refuse(x != x, name, "NaN", "a NaN has no rank: find out why this input has no score")


def _refuse(bad: Any, name: str, what: str, remedy: str) -> None:
    """Raise a ValueError that counts the entries marked ``bad``, of an array or a tensor, and names the first."""
    if bad.any():
        raise ValueError(
            f"{name}: {int(bad.sum())} of {len(bad)} values are {what}, the first at index "
            f"{bad.tolist().index(True)}; {remedy}"
        )
