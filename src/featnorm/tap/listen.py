"""Run the user's model and catch a few values, leaving nothing behind."""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from featnorm.tap.find import same_vector
from featnorm.tap.watch import Node, Record, Slot, tensors_in


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
    copy: bool  # the model overwrites it in place later

    def to_json(self) -> dict[str, Any]:
        """Return plain data for a file."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Point":
        """Make it again from plain data."""
        return cls(data["side"], data["module"], data["call"], tuple(data["slot"]), data["copy"])


def locate(record: Record, node: Node) -> Point:
    """Choose where to catch a value: preferably at a module that runs once, as late as possible."""
    seen = [sight for sight in record.sights if sight.node is node or same_vector(sight.node) is node]
    if not seen:
        copy = record.written_after(node, node.time)
        return Point("op", node.op, node.call, (), copy)
    calls = {sight.module: sight.call for sight in record.sights}
    sight = max(seen, key=lambda s: (calls[s.module] == 0, s.side == "in", s.time))
    copy = record.written_after(sight.node, sight.time)
    return Point(sight.side, sight.module, sight.call, sight.slot, copy)


def listen(model: nn.Module, points: Mapping[str, Point], inputs: Tensor) -> dict[str, Tensor]:
    """Run the model on a batch and return the value at each point.

    Raises
    ------
    RuntimeError
        A point was not reached: the model took another path than when it was watched.
    """
    caught: dict[Point, Tensor] = {}
    wanted = set(points.values())
    operations = [point for point in wanted if point.side == "op"]
    with _hooks(model, [point for point in wanted if point.side != "op"], caught):
        if operations:
            with _Operations(operations, caught):
                model(inputs)
        else:
            model(inputs)
    missed = [point for point in wanted if point not in caught]
    if missed:
        raise RuntimeError(
            f"the model did not pass through {missed[0].module or 'its output'!r} as it did when it was "
            "watched; make a new FeatureTap for it"
        )
    return {name: caught[point] for name, point in points.items()}


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients, and every module's own mode back at the end, whatever happens."""
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _hooks(model: nn.Module, points: list[Point], caught: dict[Point, Tensor]) -> Iterator[None]:
    # The same model may serve other threads at this moment: their values are not ours.
    thread = threading.get_ident()
    handles = []

    def catcher(point: Point) -> Callable[..., None]:
        calls = 0

        def catch(_: nn.Module, args: Any, rest: Any) -> None:
            nonlocal calls
            if threading.get_ident() != thread:
                return
            if calls == point.call:
                where = (args, rest) if point.side == "in" else (rest,)
                value = next(t for part in where for slot, t in tensors_in(part) if slot == point.slot)
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

    def __init__(self, points: list[Point], caught: dict[Point, Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.points = {(point.module, point.call): point for point in points}
        self.caught = caught
        self.calls: dict[str, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        op = func._schema.name.removeprefix("aten::")
        call = self.calls[op] = self.calls.get(op, -1) + 1
        point = self.points.get((op, call))
        if point is not None:
            value = next(tensor for _, tensor in tensors_in(result))
            self.caught[point] = value.clone() if point.copy else value
        return result
