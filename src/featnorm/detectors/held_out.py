"""One pass over training inputs, some of which are held out for detectors that need it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from operator import methodcaller
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from featnorm.detectors.statistics import row_keys
from featnorm.features import Features

if TYPE_CHECKING:
    from featnorm.detectors.base import Detector

#: One input in this number is held out.
HELD_OUT = 5
#: Minimum and maximum number of inputs that are held out.
MIN_HELD_OUT, MAX_HELD_OUT = 5, 1024


def fit_in_batches(
    detectors: Iterable[Detector], batches: Iterable[Features], held_out: Iterable[Features] | None = None
) -> dict[Detector, ValueError]:
    """Fit detectors in one pass over batches of features.

    Parameters
    ----------
    detectors : detectors to fit. An earlier fit is continued; `Detector.refit` discards it.
    batches : features of in-distribution inputs, read until no detector is left that can be fitted.
    held_out
        Features of other in-distribution inputs, for `Detector.fit_held_out`. Default: one input in five of
        ``batches`` is held out of the fit of the detectors that need it, at least 5 and at most 1024. Which ones
        depends on the features of all inputs, and not on their order.

    Returns
    -------
    dict
        Detectors that cannot be fitted, and the error of each.
    """
    failed: dict[Detector, ValueError] = {}

    def fitted(chosen: Iterable[Detector], fit: Callable[[Detector], Any]) -> list[Detector]:
        """Return the detectors that can be fitted."""
        for detector in chosen:
            try:
                fit(detector)
            except ValueError as error:
                failed[detector] = error
        return [detector for detector in chosen if detector not in failed]

    whole = list(detectors)
    split = [detector for detector in whole if detector.needs_held_out and held_out is None]
    whole = [detector for detector in whole if detector not in split]
    split = fitted(split, _require_rows_suffice)
    rows = _LowestRows()
    for features in batches:
        whole = fitted(whole, methodcaller("partial_fit", features))
        # Before the rows are split, so that an error names the row of the batch.
        split = fitted(split, methodcaller("_check_fit", features))
        if split:
            for part in rows.update(features):
                split = fitted(split, methodcaller("partial_fit", part))
        if not whole and not split:
            return failed
    if held_out is not None:
        given = list(held_out)
        fitted(whole, methodcaller("fit_held_out", given))
    if split:
        try:
            rest, lowest = rows.halves()
        except ValueError as error:
            return failed | dict.fromkeys(split, error)
        split = fitted(split, methodcaller("partial_fit", rest))
        fitted(split, methodcaller("fit_held_out", lowest))
    return failed


def _require_rows_suffice(detector: Detector) -> None:
    if detector.needs_model:
        raise ValueError(
            f"{detector!r} runs the model again, so no inputs can be held out by their features alone: pass "
            "held_out, batches of in-distribution inputs that are not fitted to"
        )


class _LowestRows:
    """The rows with the lowest pseudo-random keys, at most `MAX_HELD_OUT`; a key depends on the row's content."""

    def __init__(self) -> None:
        # Twice as many rows are kept, so that they are seldom sorted.
        self._parts: list[Features] = []
        self._keys: list[Tensor] = []
        self._bound = 2**63 - 1
        self._seen = 0

    def update(self, features: Features) -> list[Features]:
        """Add rows; return those that are no longer, or not, among the lowest."""
        keys = _keys(features)
        low = keys < self._bound
        self._seen += len(keys)
        if not low.any():
            return [features]
        self._parts.append(features[low])
        self._keys.append(keys[low])
        rest = [features[~low]]
        if sum(map(len, self._keys)) > 2 * MAX_HELD_OUT:
            rest.append(self._keep(MAX_HELD_OUT))
            self._bound = int(self._keys[0][-1])
        return [part for part in rest if len(part)]

    def _keep(self, count: int) -> Features:
        """Keep the rows with the lowest keys, and return the others."""
        rows, keys = Features.cat(self._parts), torch.cat(self._keys)
        order = keys.argsort(stable=True)
        self._parts, self._keys = [rows[order[:count]]], [keys[order[:count]]]
        return rows[order[count:]]

    def halves(self) -> tuple[Features, Features]:
        """Return the rows that are left to fit to, and those that are held out."""
        if self._seen < 2 * MIN_HELD_OUT:
            raise ValueError(
                f"at least {2 * MIN_HELD_OUT} inputs are needed to hold {MIN_HELD_OUT} of them out, got "
                f"{self._seen}: add inputs, or pass held_out"
            )
        rest = self._keep(min(max(self._seen // HELD_OUT, MIN_HELD_OUT), MAX_HELD_OUT))
        return rest, self._parts[0]


def _keys(features: Features) -> Tensor:
    value = next(value for name, value in features.fields() if name != "labels")
    return row_keys(value.detach().float().contiguous()).cpu()
