"""Argument checks that every function of scores shares."""

import math
from numbers import Real
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

ScoreLike = Tensor | npt.ArrayLike
"""Scores as users hold them: a tensor, a numpy array or a sequence of numbers."""

_WANTED = "must be a 1-D tensor, array or sequence of real numbers"


def as_score_tensor(x: ScoreLike, name: str, *, allow_empty: bool = False) -> Tensor:
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
    if not isinstance(x, Tensor):
        try:
            # The copy frees torch from read-only memory and negative strides, neither of which it takes.
            x = torch.from_numpy(np.array(x, order="C"))
        except (TypeError, ValueError) as error:
            raise TypeError(f"{name} {_WANTED}: {error}") from error
    if x.dtype == torch.bool or x.is_complex():
        raise TypeError(f"{name} {_WANTED}, got {x.dtype}")
    if x.ndim != 1:
        raise ValueError(f"{name} must be 1-D, one score per input, got shape {tuple(x.shape)}")
    if x.numel() == 0 and not allow_empty:
        raise ValueError(f"{name} is empty: at least one score is needed")
    x = x.detach()
    if not x.is_floating_point():
        x = x.to(torch.float64)
        _refuse(
            x.abs() >= 2**53,
            name,
            "integers of magnitude 2**53 or more, which float64 cannot tell apart",
            "subtract an offset from all scores, or rank them first",
        )
    elif x.dtype not in (torch.float32, torch.float64):
        x = x.to(torch.float32)
    # The sum tells in one read without a temporary; infinities of both signs make it NaN too.
    if math.isnan(x.sum().item()):
        _refuse(x.isnan(), name, "NaN", "a NaN has no rank: find out why this input has no score")
    return x


def as_score_array(x: ScoreLike, name: str) -> npt.NDArray[Any]:
    """Scores as a checked (n,) float32 or float64 numpy array, n >= 1; see `as_score_tensor`."""
    array: npt.NDArray[Any] = as_score_tensor(x, name).cpu().numpy()
    return array


def as_p_values(x: ScoreLike, name: str) -> Tensor:
    """P-values as a checked (n,) float64 tensor of values in [0, 1], n >= 0; see `as_score_tensor`."""
    p = as_score_tensor(x, name, allow_empty=True).to(torch.float64)
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


def _refuse(bad: Tensor, name: str, what: str, remedy: str) -> None:
    """Raise a ValueError that counts the entries marked ``bad`` and points to the first."""
    if bad.any():
        index = int(bad.nonzero()[0])
        raise ValueError(
            f"{name}: {int(bad.sum())} of {len(bad)} values are {what}, the first at index {index}; {remedy}"
        )
