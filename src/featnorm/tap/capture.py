"""Run the user's model and catch a few values, leaving nothing behind."""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from featnorm._utils.errors import RefusalError
from featnorm._utils.layout import safe_gradients
from featnorm.tap.find import same_vector
from featnorm.tap.trace import Node, Record, Slot, is_on_top, on_top, tensors_in


class PathError(RefusalError, RuntimeError):
    """A model that took another path than when it was traced."""


TRACE_AGAIN = "make a new FeatureTap for it"
"""What to do about a `PathError` where the model was traced in this process."""


_MODES_LOCK = threading.RLock()
_MODES: dict[nn.Module, list[int]] = {}  # how many listen to a module now, and the mode it had before the first


@dataclass(frozen=True)
class Point:
    """Where a value can be caught.

    ``side`` is "in" or "out" of a module's ``call``-th call (``slot`` finds it in the arguments or the
    result), or "op": the ``call``-th ATen operation of a forward pass that is called ``module``, where no
    module ever receives or returns the value.
    """

    side: str
    module: str
    call: int
    slot: Slot
    total: int  # how many calls a pass makes in all; a pass with another number cannot be followed
    copy: bool  # its memory is the model's or the caller's, or is overwritten later

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for a file."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Point":
        """Make it again from plain data.

        Raises
        ------
        KeyError, TypeError, ValueError
            The data are none that `to_dict` gave.
        """
        point = cls(data["side"], data["module"], data["call"], tuple(data["slot"]), data["total"], data["copy"])
        counts = (point.call, point.total)
        if (
            point.side not in ("in", "out", "op")
            or not isinstance(point.module, str)
            or not all(type(key) in (str, int) for key in point.slot)
            or not all(type(count) is int and count >= 0 for count in counts)
            or (point.side == "op" and point.call >= point.total)
            or not isinstance(point.copy, bool)
        ):
            raise ValueError(f"{dict(data)} is no place to listen at")
        return point


def locate(record: Record, node: Node) -> Point:
    """Choose where to catch a value: preferably at a module that runs once, as late as possible."""
    seen = [sight for sight in record.sights if sight.node is node or same_vector(sight.node) is node]
    if not seen:
        copy = record.is_borrowed(node) or record.written_after(node, node.time + 1)
        total = max(other.call for other in record.nodes if other.op == node.op) + 1
        return Point("op", node.op, node.call, (), total, copy)
    calls = {sight.module: sight.call for sight in record.sights}
    sight = max(seen, key=lambda s: (calls[s.module] == 0, s.side == "in", s.time))
    copy = record.is_borrowed(sight.node) or record.written_after(sight.node, sight.time)
    return Point(sight.side, sight.module, sight.call, sight.slot, 0, copy)


def made(node: Node) -> Point:
    """Return the operation that makes a value: before it nothing has read it."""
    return Point("op", node.op, node.call, (), 0, False)


def capture(
    model: nn.Module,
    points: Mapping[str, Point],
    inputs: Tensor,
    *,
    fresh: list[Point] | None = None,
    advice: str = TRACE_AGAIN,
) -> dict[str, Tensor]:
    """Run the model on a batch and return the value at each point.

    Parameters
    ----------
    model, points, inputs : what to run, where to listen, and on what.
    fresh
        Takes the point of each operation that has just run, for who sees the function that asked for it, and may
        ask for more operations than when the model was traced.
    advice : what to do where a point is not reached, for the error message.

    Raises
    ------
    PathError
        A point was not reached: the model took another path than when it was traced.
    """
    caught: dict[Point, Tensor] = {}
    wanted = set(points.values())
    inputs = inputs.clone()  # a model may begin by writing to it
    operations = [point for point in wanted if point.side == "op"]
    me = object()
    with on_top(me), _hooks(model, [point for point in wanted if point.side != "op"], caught, me):
        if operations:
            # Hooks on every module, as when traced: some of torch's take another path where there is none.
            with _idle_hooks(model), _Operations(operations, caught, me, fresh) as seen:
                model(inputs)
            for point in operations if fresh is None else ():
                if seen.calls.get(point.module, -1) + 1 != point.total:
                    caught.pop(point, None)
        else:
            model(inputs)
    missed = [point for point in wanted if point not in caught]
    if missed:
        raise PathError(
            f"the model did not pass through {missed[0].module or 'its output'!r} as it did when it was "
            f"traced; {advice}"
        )
    return {name: caught[point] for name, point in points.items()}


@contextmanager
def undisturbed(model: nn.Module, *, gradients: bool = False) -> Iterator[None]:
    """Evaluation mode, and every module's own mode back at the end, whatever happens.

    With gradients, they are safe for every convolution, see `safe_gradients`.
    """
    entered: list[nn.Module] = []
    compiled = False
    try:
        with _MODES_LOCK:
            for module in _modules(model):
                compiled = compiled or module._compiled_call_impl is not None or "_orig_mod" in module._modules
                # A module that is in evaluation mode of itself, and not because another thread listens to it, is
                # left alone: most models are, and then nothing is done for each module.
                if module.training or module in _MODES:
                    _MODES.setdefault(module, [0, module.training])[0] += 1
                    entered.append(module)
                    module.training = False
        # Compiled code was traced without the hooks that listen.
        eager = torch.compiler.set_stance("force_eager") if compiled else nullcontext()
        with torch.set_grad_enabled(gradients), eager, safe_gradients(model) if gradients else nullcontext():
            yield
    finally:
        with _MODES_LOCK:
            for module in entered:
                entry = _MODES[module]
                entry[0] -= 1
                if not entry[0]:  # the last listener, of whatever thread, turns the mode back
                    module.training = bool(entry[1])
                    del _MODES[module]


def _modules(model: nn.Module) -> Iterator[nn.Module]:
    """Yield every module once.

    `torch.nn.Module.modules` makes names on its way and drops them, for which a batch of one input would wait.
    """
    waiting, seen = [model], {id(model)}
    while waiting:
        module = waiting.pop()
        yield module
        for child in module._modules.values():
            if child is not None and id(child) not in seen:
                seen.add(id(child))
                waiting.append(child)


@contextmanager
def _idle_hooks(model: nn.Module) -> Iterator[None]:
    handles = [module.register_forward_hook(_idle) for module in model.modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _idle(*_: Any) -> None:
    """See a module run, and do nothing."""


@contextmanager
def _hooks(model: nn.Module, points: list[Point], caught: dict[Point, Tensor], me: object) -> Iterator[None]:
    # The same model may serve other threads, or another tap inside this pass: their values are not ours.
    handles = []

    def catcher(point: Point) -> Callable[..., None]:
        calls = 0

        def catch(_: nn.Module, args: Any, rest: Any) -> None:
            nonlocal calls
            if not is_on_top(me):
                return
            if calls == point.call:
                where = (args, rest) if point.side == "in" else (rest,)
                value = next((t for part in where for slot, t in tensors_in(part) if slot == point.slot), None)
                if value is not None:
                    caught[point] = value.clone() if point.copy else value
            calls += 1

        return catch

    try:
        for point in points:
            module = model.get_submodule(point.module)
            if point.side == "in":
                handles.append(module.register_forward_pre_hook(catcher(point), with_kwargs=True))
            else:
                handles.append(module.register_forward_hook(catcher(point)))
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Operations(TorchDispatchMode):
    """Catches the results of given operations; slower than hooks, for values that no module sees."""

    def __init__(
        self, points: list[Point], caught: dict[Point, Tensor], owner: object, fresh: list[Point] | None
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.owner = owner
        self.fresh = fresh
        self.points = {(point.module, point.call): point for point in points}
        self.caught = caught
        self.calls: dict[str, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if not is_on_top(self.owner):
            return result
        op = func._schema.name.removeprefix("aten::")
        call = self.calls[op] = self.calls.get(op, -1) + 1
        point = self.points.get((op, call))
        value = None if point is None else next((tensor for _, tensor in tensors_in(result)), None)
        if point is not None and value is not None:
            self.caught[point] = value.clone() if point.copy and self.fresh is None else value
            if self.fresh is not None:
                self.fresh.append(point)
        return result
