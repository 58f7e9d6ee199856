"""Heat maps: where in an image a score comes from, by changing one position of the last maps at a time."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from featnorm.features import Features
from featnorm.tap.tap import FeatureTap
from featnorm.tap.trace import tensors_in

# Largest difference, relative to the largest mean, at which values count as the means of maps.
_TOLERANCE = 0.01
# Height and width from which maps are fine enough to prefer them to later ones.
_FINE = 4
# Largest cost of the changed pass, in passes of the whole model per input.
_MAX_PASSES = 16

_Point = tuple[str, int]  # name of an operation, and its index among those of that name


class NoHeatError(ValueError):
    """There is no heat map; the message says why."""


@torch.no_grad()
def heat_maps(
    tap: FeatureTap, inputs: Tensor, score: Callable[[Features], Tensor], reference: Tensor | None = None
) -> tuple[Tensor, bool]:
    """Return how much each position of the last maps adds to the score of each input.

    The heat of a position is the score minus the score with the features of that position replaced by the
    reference. This is the ablation of Zeiler and Fergus (ECCV 2014) on the last maps instead of the pixels. It
    needs no gradients, so that it works for any detector.

    For a model with global average pooling, only the layers after the pool run once per position: the pool returns
    one row per position. If the score is linear in the pooled features, the heat then sums to the score minus that
    of the reference. For other convolutional networks, the last maps that all later layers depend on are copied,
    one copy per position.

    Parameters
    ----------
    tap : tap of the model.
    inputs : batch of n inputs.
    score : function from features to scores, which does not run the model again.
    reference
        Pooled features (n, D) to compare with, such as those of similar in-distribution inputs. Default: the mean
        of each input's maps over their positions, which is also used if the pooled features are not this mean.

    Returns
    -------
    Heat (n, height, width), positive where the input raises the score and negative where it lowers it; and whether
    the reference was used.

    Raises
    ------
    NoHeatError
        The model has no such maps, its layers after them do not take another number of inputs, or a score is not
        finite.
    """
    inputs = inputs.to(tap.device)
    if tap._plan is None:
        tap.trace(inputs)
    one = inputs[:1]
    with _FindMaps(one) as found:
        features = tap.capture(one, classifier=False)
    point, mean = found.choose()
    if reference is not None and (mean is None or features.pooled is None or not _close(features.pooled, mean)):
        reference = None
    try:
        with _ChangedMaps(point, mean is not None, reference) as changed:
            scores = score(tap.capture(inputs, classifier=True))
        n, height, width = changed.shape
        scores = scores.double().reshape(n, height * width + 1)
    except torch.OutOfMemoryError:
        raise  # the caller may try fewer inputs
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise NoHeatError("the layers after the model's maps do not take another number of inputs") from error
    heat = scores[:, -1:] - scores[:, :-1]
    if not heat.isfinite().all():
        raise NoHeatError("the score is not finite")
    return heat.float().reshape(n, height, width), reference is not None


def _pooled_maps(args: Any, result: Tensor) -> tuple[Tensor, tuple[int, int]] | None:
    """Return the maps whose means over their positions a result is, and the axes of the positions; or None."""
    for _, maps in tensors_in(args):
        for axes, channels in (((2, 3), 1), ((1, 2), 3)):
            fits = _is_map(maps) and result.numel() == maps.shape[0] * maps.shape[channels] < maps.numel()
            if fits and _close(result, maps.float().mean(axes)):
                return maps, axes
    return None


def _is_map(value: Tensor) -> bool:
    return value.ndim == 4 and value.is_floating_point() and min(value.shape[2:]) > 1


def _close(values: Tensor, mean: Tensor) -> bool:
    if values.numel() != mean.numel():
        return False
    return bool((values.float().reshape(mean.shape) - mean).abs().max() <= _TOLERANCE * mean.abs().max())


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

    def after(self, point: _Point, args: Any, result: Any) -> Any:
        """Return what the operation returns to the model."""
        raise NotImplementedError


class _FindMaps(_Counting):
    """Finds maps that everything after them depends on: no later operation reads what was made before them.

    Parameters
    ----------
    inputs : batch that the model is run on.
    """

    def __init__(self, inputs: Tensor) -> None:
        super().__init__()
        # Tensors that depend on the inputs are kept, so that no id is used again.
        self._made = {id(inputs): (0, inputs)}
        self._shape = inputs.shape
        self._time = 0
        self._found: list[tuple[int, _Point, int, Tensor | None]] = []  # time, point, positions, means of a pool

    def after(self, point: _Point, args: Any, result: Any) -> Any:
        times = [self._made[id(tensor)][0] for _, tensor in tensors_in(args) if id(tensor) in self._made]
        if not times:
            return result
        self._time += 1
        self._found = [found for found in self._found if found[0] <= min(times)]
        tensors = [tensor for _, tensor in tensors_in(result)]
        for tensor in tensors:
            self._made[id(tensor)] = self._time, tensor
        if len(tensors) == 1 and tensors[0].is_floating_point():
            pooled = _pooled_maps(args, tensors[0])
            if pooled is not None:
                self._found.append((self._time, point, 0, pooled[0].float().mean(pooled[1])))
            elif _is_map(tensors[0]) and tensors[0].shape != self._shape:
                self._found.append((self._time, point, min(tensors[0].shape[2:]), None))
        return result

    def choose(self) -> tuple[_Point, Tensor | None]:
        """Return the point of the last pool and its means, or else that of the last maps that are fine enough."""
        pools = [found for found in self._found if found[3] is not None]
        maps = [found for found in self._found if found[3] is None]
        fine = [found for found in maps if found[2] >= _FINE]
        for time, point, size, mean in (*pools[-1:], *fine[-1:], *maps[-1:]):
            if mean is not None or size**2 * (self._time - time) <= _MAX_PASSES * self._time:
                return point, mean
        raise NoHeatError("the model has no maps that all of its last layers depend on")


class _ChangedMaps(_Counting):
    """Makes the model continue, per input, with one row per position, with it replaced, and with the true row.

    Parameters
    ----------
    point : operation that makes the maps, or averages them.
    is_pool : whether it averages them.
    reference : features (n, c) that replace those of a position. Default: their mean.
    """

    def __init__(self, point: _Point, is_pool: bool, reference: Tensor | None) -> None:
        super().__init__()
        self.point = point
        self.is_pool = is_pool
        self.reference = reference
        self.shape = (0, 0, 0)
        self._old: Any = None
        self._new: Any = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if self._new is not None:
            # What an operation in place returns is not what the model continues with.
            args = tree_map(lambda value: self._new if value is self._old else value, args)
            # Torch's adaptive pool lays out its result again, for the number of inputs.
            if func._schema.name.startswith("aten::as_strided") and args[0] is self._new:
                return self._new
        return super().__torch_dispatch__(func, types, args, kwargs)

    def after(self, point: _Point, args: Any, result: Any) -> Any:
        if point != self.point:
            return result
        maps, axes = (_pooled_maps(args, result) if self.is_pool else None) or (result, (2, 3))
        values = maps.movedim(axes, (2, 3))
        n, channels, *size = values.shape
        self.shape = n, *size
        values = values.flatten(2)
        mean = values.mean(2)
        reference = mean if self.reference is None else self.reference.to(mean)
        difference = reference[:, :, None] - values
        count = values.shape[2]
        if self.is_pool:
            changed = mean[:, None] + difference.mT / count
            rows = torch.cat([changed, mean[:, None]], 1).flatten(0, 1)
            self._new = rows.to(result.dtype).reshape(len(rows), *result.shape[1:])
        else:
            where = torch.eye(count, device=maps.device, dtype=maps.dtype)
            changed = values[:, None] + where[:, None] * difference[:, None]
            self._new = torch.cat([changed, values[:, None]], 1).reshape(-1, channels, *size)
        self._old = result
        return self._new
