"""Heat maps: where in an image a score comes from, by changing one position of the last maps at a time."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from featnorm.features import Features
from featnorm.tap.tap import FeatureTap
from featnorm.tap.trace import tensors_in

# Largest difference, relative to the largest mean, at which values count as the means of maps.
_TOLERANCE = 0.01


class NoHeatError(ValueError):
    """There is no heat map; the message says why."""


@torch.no_grad()
def heat_maps(
    tap: FeatureTap, inputs: Tensor, score: Callable[[Features], Tensor], reference: Tensor | None = None
) -> Tensor:
    """Return how much each position of the last maps adds to the score of each input.

    A model with global average pooling reads the mean of its last maps over their positions. The heat of a
    position is the score minus the score with the features of that position replaced by the reference. If the
    score is linear in the pooled features, the heat sums to the score minus that of the reference. This is the
    ablation of Zeiler and Fergus (ECCV 2014) on the last maps instead of the pixels. It needs no gradients, so
    that it works for any detector, and costs one forward pass on all inputs and one on the first. In the former,
    the pool returns one row per position.

    Parameters
    ----------
    tap : tap of the model.
    inputs : batch of n inputs.
    score : function from features to scores, which does not run the model again.
    reference
        Pooled features (n, D) to compare with, such as those of similar in-distribution inputs. Default: for each
        input its own pooled features, with which the heat of a linear score sums to 0. These are also used if the
        model changes the means before it returns them as pooled features.

    Returns
    -------
    Heat (n, height, width): positive where the input raises the score, negative where it lowers it.

    Raises
    ------
    NoHeatError
        The model does not average maps, its layers after the pool do not take another number of inputs, or a score
        is not finite.
    """
    if tap._plan is None:
        tap.trace(inputs)
    with _FindPool() as found:
        features = tap.capture(inputs[:1], classifier=False)
    if found.pool is None:
        raise NoHeatError("the model does not average maps over their positions before its last layers")
    if reference is not None:
        pooled, mean = features.pooled, found.mean
        if pooled is None or pooled.shape != mean.shape or not _close(pooled.float(), mean):
            reference = None
    try:
        with _ChangedPool(found.pool, reference) as changed:
            scores = score(tap.capture(inputs, classifier=True))
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise NoHeatError("the layers after the pool do not take another number of inputs") from error
    n, height, width = changed.shape
    if len(scores) != n * (height * width + 1):
        raise NoHeatError("the detector does not read what the pool returns")
    scores = scores.double().reshape(n, -1)
    heat = scores[:, -1:] - scores[:, :-1]
    if not heat.isfinite().all():
        raise NoHeatError("the score is not finite")
    return heat.float().reshape(n, height, width)


def _maps_of(args: Any, result: Any) -> tuple[Tensor, tuple[int, int]] | None:
    """Return the maps whose means over their positions a result is, and the axes of the positions; or None."""
    if not isinstance(result, Tensor) or not result.is_floating_point() or result.ndim < 2:
        return None
    for _, maps in tensors_in(args):
        if not _is_map(maps) or not maps.is_floating_point():
            continue
        for axes in ((2, 3), (1, 2)):
            channels = 1 if axes == (2, 3) else 3
            if result.numel() == maps.shape[0] * maps.shape[channels] and result.numel() < maps.numel():
                mean = maps.float().mean(axes)
                if _close(result.float().reshape(mean.shape), mean):
                    return maps, axes
    return None


def _is_map(value: Tensor) -> bool:
    return value.ndim == 4 and sum(size > 1 for size in value.shape[1:]) > 1


def _close(values: Tensor, mean: Tensor) -> bool:
    return bool((values - mean).abs().max() <= _TOLERANCE * mean.abs().max())


class _Counting(TorchDispatchMode):
    """Counts the operations of a forward pass by name."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: dict[str, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name
        self.calls[name] = self.calls.get(name, -1) + 1
        return self.after((name, self.calls[name]), args, result)

    def after(self, point: tuple[str, int], args: Any, result: Any) -> Any:
        """Return what the operation returns to the model."""
        raise NotImplementedError


class _FindPool(_Counting):
    """Finds the operation that averages maps over their positions, after which the model makes no more maps.

    The pools of squeeze-and-excitation do not count, because maps are scaled by what they return.
    """

    def __init__(self) -> None:
        super().__init__()
        self.pool: tuple[str, int] | None = None
        self.mean = torch.empty(0)

    def after(self, point: tuple[str, int], args: Any, result: Any) -> Any:
        if (found := _maps_of(args, result)) is not None:
            maps, axes = found
            self.pool, self.mean = point, maps.float().mean(axes)
        elif any(_is_map(tensor) for _, tensor in tensors_in(result)):
            self.pool = None
        return result


class _ChangedPool(_Counting):
    """Makes a pool return one row per position, with that position replaced, and then the true row, per input."""

    def __init__(self, pool: tuple[str, int], reference: Tensor | None) -> None:
        super().__init__()
        self.pool = pool
        self.reference = reference
        self.shape = (0, 0, 0)
        self.rows: Tensor | None = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        # Torch's adaptive pool lays out its result again, for the number of inputs.
        if self.rows is not None and func._schema.name.startswith("aten::as_strided") and args[0] is self.rows:
            return self.rows
        return super().__torch_dispatch__(func, types, args, kwargs)

    def after(self, point: tuple[str, int], args: Any, result: Any) -> Any:
        if point != self.pool or (found := _maps_of(args, result)) is None:
            return result
        maps, axes = found
        maps = maps.movedim(axes, (2, 3))
        self.shape = maps.shape[0], *maps.shape[2:]
        mean = maps.mean((2, 3))
        reference = mean if self.reference is None else self.reference.to(mean)
        values = maps.flatten(2).movedim(1, 2)
        changed = mean[:, None] + (reference[:, None] - values) / values.shape[1]
        rows = torch.cat([changed, mean[:, None]], 1).flatten(0, 1)
        self.rows = rows.to(result.dtype).reshape(len(rows), *result.shape[1:])
        return self.rows
