"""Norms of the last hidden layer (paper sec. 5 and A.2.1): pure functions on tensors.

Every function takes activations ``a`` (n, d) after the non-linearity and returns one value per input, (n,), in the
dtype of ``a`` but at least float32. NaN is not checked here: a NaN unit makes ``l1_norm``, ``lp_norm`` and
``negative_aware_norm`` NaN; the detectors raise an error.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from featnorm._utils.checks import Interval, check_type

# Number of elements per CPU core in a block. At this size, the result of the elementwise map is still in the cache
# when it is summed; for the whole array, it would be written to memory and read back. On a GPU, every operation on
# a block has a fixed cost, so blocks only limit the memory.
_BLOCK_ELEMENTS = 1 << 17
_DEVICE_ELEMENTS = 1 << 26
_POWER = Interval(0, math.inf, closed="right")


def l1_norm(a: Tensor) -> Tensor:
    """Sum of magnitudes, ``sum_i |a_i|``, the confidence of the hidden classifier (paper Thm. 3).

    Parameters
    ----------
    a : (n, d) activations after the non-linearity.

    Returns
    -------
    (n,) norms. Negative units (GELU, leaky ReLU) count with their magnitude.

    Raises
    ------
    ValueError
        ``a`` is not a floating-point matrix.

    Examples
    --------
    >>> a = torch.tensor([[3.0, 0.0, 1.0], [0.5, 0.5, 0.5]])
    >>> l1_norm(a)
    tensor([4.0000, 1.5000])
    """
    _require_matrix(a)
    if _differentiated(a) or torch.compiler.is_compiling():
        return torch.linalg.vector_norm(a, 1, dim=1, dtype=_wide(a))
    return _row_sums(a, _magnitudes)[0]


def l0_norm(a: Tensor) -> Tensor:
    """Number of active units, ``d - #{i : a_i <= 0}`` (paper eq. 9).

    Negative units are *deactivated*, so this is not the number of non-zeros.

    Parameters
    ----------
    a : (n, d) activations after the non-linearity.

    Returns
    -------
    (n,) counts, as floating point.

    Raises
    ------
    ValueError
        ``a`` is not a floating-point matrix.

    Examples
    --------
    >>> a = torch.tensor([[3.0, 0.0, 1.0], [0.5, 0.5, 0.5]])
    >>> l0_norm(a)
    tensor([2., 3.])
    """
    _require_matrix(a)
    a = a.detach()
    if torch.compiler.is_compiling():
        return (a > 0).to(_wide(a)).sum(1)
    return _row_sums(a, _active)[0]


def lp_norm(a: Tensor, p: float) -> Tensor:
    """``(sum_i |a_i|^p)^(1/p)`` for ``p > 0``, infinity included (paper A.2.1, Thm. 5).

    Parameters
    ----------
    a : (n, d) activations after the non-linearity.
    p : the exponent.

    Returns
    -------
    (n,) norms.

    Raises
    ------
    ValueError
        ``a`` is not a floating-point matrix, or ``p`` is not a positive number (for ``p = 0`` see `l0_norm`).

    Examples
    --------
    >>> a = torch.tensor([[3.0, 0.0, 1.0], [0.5, 0.5, 0.5]])
    >>> lp_norm(a, 2)
    tensor([3.1623, 0.8660])
    """
    _require_matrix(a)
    p = _POWER.check(p, "p", "lp_norm")
    if p == 1:
        return l1_norm(a)
    if a.shape[1] == 0:
        return a.new_zeros(a.shape[0], dtype=_wide(a))
    largest = torch.linalg.vector_norm(a, math.inf, dim=1, dtype=_wide(a))
    if p == math.inf:
        return largest
    # Dividing by the largest unit prevents overflow and underflow of the powers.
    scale = torch.where(largest > 0, largest, torch.ones_like(largest))
    return scale * torch.linalg.vector_norm(a / scale[:, None], p, dim=1)


def negative_aware_norm(a: Tensor) -> Tensor:
    """The negative-aware norm, ``||a||_1 / ||a||_0`` (paper eq. 10).

    ``||a||_0`` is the number of units above zero (eq. 9). The paper does not define 0/0; here the count is at
    least 1, so that an all-zero vector scores 0.

    Parameters
    ----------
    a : (n, d) activations of the last hidden layer, after the non-linearity.

    Returns
    -------
    (n,) norms; higher is more in-distribution.

    Raises
    ------
    ValueError
        ``a`` is not a floating-point matrix.

    Examples
    --------
    >>> a = torch.tensor([[3.0, 0.0, 1.0], [0.5, 0.5, 0.5]])
    >>> negative_aware_norm(a)
    tensor([2.0000, 0.5000])
    """
    _require_matrix(a)
    if _differentiated(a) or torch.compiler.is_compiling():
        return l1_norm(a) / l0_norm(a).clamp_min(1)
    magnitude, count = _row_sums(a, _magnitudes, _active)
    return magnitude / count.clamp_min(1)


def _row_sums(a: Tensor, *maps: Callable[[Tensor, Tensor | None], Tensor]) -> list[Tensor]:
    """Return the sums (n,) over the units of each elementwise map of ``a``, in one pass over memory."""
    elements = torch.get_num_threads() * _BLOCK_ELEMENTS if a.is_cpu else _DEVICE_ELEMENTS
    rows = max(1, elements // max(a.shape[1], 1))
    wide = _wide(a)
    if a.requires_grad:
        a = a.detach()
    if a.shape[0] <= rows:
        # For one input, creating views of a block would cost more than its sums.
        a = a if a.dtype == wide else a.to(wide)
        return [torch.sum(fill(a, None), 1, dtype=wide) for fill in maps]
    made = a.new_empty((rows, a.shape[1]), dtype=wide)
    sums = [a.new_empty(len(a), dtype=wide) for _ in maps]
    # All views are created at once: one by one, they would cost as much as the sums.
    for block, *totals in zip(a.split(rows), *(total.split(rows) for total in sums), strict=True):
        made = made[: len(block)]
        for fill, total in zip(maps, totals, strict=True):
            torch.sum(fill(block, made), 1, out=total)
    return sums


def _magnitudes(block: Tensor, out: Tensor | None) -> Tensor:
    if out is None or block.dtype == out.dtype:
        return torch.abs(block, out=out)
    return out.copy_(block).abs_()


def _active(block: Tensor, out: Tensor | None) -> Tensor:
    return torch.gt(block, 0, out=out)


def _differentiated(a: Tensor) -> bool:
    return a.requires_grad and torch.is_grad_enabled()


def _wide(a: Tensor) -> torch.dtype:
    return a.dtype if a.dtype in (torch.float32, torch.float64) else torch.promote_types(a.dtype, torch.float32)


def _require_matrix(a: Tensor) -> None:
    check_type(a, Tensor, "the activations", "a tensor")
    if a.ndim != 2 or not a.is_floating_point():
        raise ValueError(
            f"expected floating-point activations of shape (n, d), got {a.dtype} of shape {tuple(a.shape)}; "
            "pool or flatten each input to one vector first"
        )
