"""Run the user's model and capture values inside it, without leaving anything behind."""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from itertools import chain, islice
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.hooks import RemovableHandle

from featnorm._utils.errors import RefusalError
from featnorm._utils.layout import safe_gradients
from featnorm.tap.batch import Call
from featnorm.tap.contents import Contents
from featnorm.tap.find import Part, Pooling
from featnorm.tap.ops import same_vector
from featnorm.tap.trace import ModuleIO, Node, Slot, Trace, is_on_top, on_top, tensor_at, tensors_in


class PathError(RefusalError, RuntimeError):
    """The model took a different path than when it was traced."""


TRACE_AGAIN = "create a new FeatureTap"
"""Advice in a `PathError` if the model was traced in this process."""


_MODES_LOCK = threading.RLock()
_MODES: dict[nn.Module, list[int]] = {}  # number of listeners of a module, and its mode before the first one


# Compared by identity: a hash of all fields would take a microsecond each time.
@dataclass(frozen=True, eq=False)
class HookPoint:
    """A point in a forward pass at which a value can be captured.

    ``side`` is "in" or "out" for an argument or a result of the ``call``-th call of a module, at keys ``slot``. It
    is "op" for a value that no module receives or returns: the result of the ``call``-th ATen operation of a kind,
    which ``module`` names as "module/operation". Only operations in the forward pass of the module itself count:
    other parts of a model may run others, as a model of text does for a batch without padding.
    """

    side: str
    module: str
    call: int
    slot: Slot
    total: int  # number of operations of this kind in a pass; a pass with another number is rejected
    copy: bool  # whether its memory is the model's or the caller's, or is overwritten later
    chain: tuple[tuple[str, int, int, int], ...] = ()
    """Later operations that are applied to the value too: kind, call, total, and position of the argument."""
    axis: int | None = None  # axis of the units, if the others are positions
    inputs: int = 0  # axis of the inputs, of which there may be positions before
    pooling: Pooling | None = "mean"  # how positions are pooled at once; None: they are kept

    def to_dict(self) -> dict[str, Any]:
        """Return the point as plain data, for a file."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "HookPoint":
        """Create a point from the plain data that `to_dict` returned.

        Raises
        ------
        KeyError, TypeError, ValueError
            The data are invalid.
        """
        chain = tuple((str(op), *counts) for op, *counts in data["chain"])
        point = cls(**{**data, "slot": tuple(data["slot"]), "chain": chain})
        counts = [point.call, point.total, *(count for step in chain for count in step[1:])]
        if (
            point.side not in ("in", "out", "op")
            or not isinstance(point.module, str)
            or not all(type(key) in (str, int) for key in point.slot)
            or not all(type(count) is int and count >= 0 for count in counts)
            or (point.side == "op" and point.call >= point.total)
            or not isinstance(point.copy, bool)
            or any(len(step) != 4 for step in chain)
            or (chain and point.side != "op")
            or any(
                "/" not in kind for kind in ([point.module] * (point.side == "op") + [step[0] for step in chain])
            )
            or not (point.axis is None or (type(point.axis) is int and point.axis > point.inputs))
            or not (type(point.inputs) is int and 0 <= point.inputs <= 1)
            or (point.pooling not in get_args(Pooling) and (point.pooling is not None or point.axis is None))
        ):
            raise ValueError(f"{dict(data)} is not a hook point")
        return point


def locate(trace: Trace, node: Node, *, exact: bool = False) -> HookPoint:
    """Choose the point at which to capture a value.

    It is preferably what the model returns, or else at a module that runs once, as late as possible. Unless it is
    to be ``exact``, a vector may have another shape there.
    """
    seen = [io for io in trace.module_io if io.node is node or (not exact and same_vector(io.node) is node)]
    if not seen:
        return _operation(trace, node)
    calls = {io.module: io.call for io in trace.module_io}
    io = max(seen, key=lambda io: (_is_returned(io), calls[io.module] == 0, io.side == "in", io.time))
    copy = trace.is_borrowed(io.node) or trace.written_after(io.node, io.time)
    return HookPoint(io.side, io.module, io.call, io.slot, 0, copy)


def _is_returned(at: ModuleIO | HookPoint) -> bool:
    return at.side == "out" and not at.module and not at.call


def locate_part(trace: Trace, part: Part) -> HookPoint:
    """Choose the point at which to capture a part of a field."""
    if not part.chain:
        point = locate(trace, part.node, exact=part.axis is not None)
        return replace(point, axis=part.axis, inputs=part.inputs, pooling=part.pooling)
    steps = ((*_counted(trace, node), node.args.index(node.data[0])) for node in part.chain)
    return replace(_operation(trace, part.node), chain=tuple(steps))


def _operation(trace: Trace, node: Node) -> HookPoint:
    copy = trace.is_borrowed(node) or trace.written_after(node, node.time + 1)
    kind, call, total = _counted(trace, node)
    return HookPoint("op", kind, call, (), total, copy)


def _counted(trace: Trace, node: Node) -> tuple[str, int, int]:
    """Return the kind of an operation, its index among those of the kind, and their number."""
    calls = sorted({other.call for other in trace.nodes if (other.op, other.module) == (node.op, node.module)})
    return f"{node.module}/{node.op}", calls.index(node.call), len(calls)


def made(trace: Trace, node: Node) -> HookPoint:
    """Return the point of the operation that makes a value, before anything has read it."""
    kind, call, _ = _counted(trace, node)
    return HookPoint("op", kind, call, (), 0, False)


def capture(
    model: nn.Module,
    points: Mapping[str, HookPoint],
    call: Call,
    *,
    fresh: list[HookPoint] | None = None,
    advice: str = TRACE_AGAIN,
) -> dict[str, Tensor]:
    """Run the model on a batch and return the value at each hook point.

    Parameters
    ----------
    model, points, call : the model, the points by name, and the call of the model.
    fresh
        List to which the point of each captured operation is appended when it has run, so that a function mode can
        replace its result. The number of operations is then not compared with that of the trace.
    advice : advice for the error message if a point is not reached.

    Raises
    ------
    PathError
        A point was not reached, because the model took a different path than when it was traced.
    """
    caught: dict[HookPoint, Tensor] = {}
    call = call.clone()  # the model may write to its input
    operations: list[HookPoint] = []
    hooked: list[HookPoint] = []
    returned: list[HookPoint] = []  # they take no hook, which would cost a small model a third of its time
    for point in (wanted := dict.fromkeys(points.values())):
        (operations if point.side == "op" else returned if _is_returned(point) else hooked).append(point)
    me = object()
    handles: list[RemovableHandle] = []
    try:
        handles.extend(_hook(model, point, caught, me) for point in hooked)
        with on_top(me):
            if operations:
                kinds = chain.from_iterable(
                    (point.module, *(step[0] for step in point.chain)) for point in operations
                )
                with (
                    _running(model, {kind.rpartition("/")[0] for kind in kinds}, me) as running,
                    _Operations(operations, caught, me, fresh, running) as seen,
                ):
                    output = call.run(model)
                for point in operations if fresh is None else ():
                    totals = [(point.module, point.total), *((op, total) for op, _, total, _ in point.chain)]
                    if any(seen.calls.get(op, -1) + 1 != total for op, total in totals):
                        caught.pop(point, None)
            else:
                output = call.run(model)
    finally:
        for handle in handles:
            handle.remove()
    for point in returned:
        _keep(point, output, caught)
    if len(caught) < len(wanted):
        missed = next(point for point in wanted if point not in caught)
        raise PathError(
            f"the model took a different path than when it was traced ({missed.module or 'its output'!r} was "
            f"not reached); {advice}"
        )
    return {name: caught[point] for name, point in points.items()}


def is_eval(contents: Contents) -> bool:
    """Whether `eval_mode` without gradients would change nothing for a model with these contents."""
    with _MODES_LOCK:
        if _MODES or contents.training():
            return False
    return not (torch.is_grad_enabled() or contents.is_compiled())


@contextmanager
def eval_mode(model: nn.Module, *, gradients: bool = False, contents: Contents | None = None) -> Iterator[None]:
    """Run a block in evaluation mode, and restore the mode of every module afterwards, also after an error.

    Gradients are disabled by default. If they are enabled, `safe_gradients` applies to the model.

    Parameters
    ----------
    model : the model.
    gradients : whether to enable gradients.
    contents : contents of the model. Default: they are listed.
    """
    contents = contents or Contents(model)
    if not gradients and is_eval(contents):
        yield
        return
    entered: list[nn.Module] = []
    try:
        with _MODES_LOCK:
            # A module that is in evaluation mode already, and not because another thread set it, is left alone.
            # For most models, nothing remains to be done.
            for module in contents.modules if _MODES else contents.training():
                if module.training or module in _MODES:
                    _MODES.setdefault(module, [0, module.training])[0] += 1
                    entered.append(module)
                    module.training = False
        # Code was compiled without our hooks.
        eager = torch.compiler.set_stance("force_eager") if contents.is_compiled() else nullcontext()
        with torch.set_grad_enabled(gradients), eager, safe_gradients(model) if gradients else nullcontext():
            yield
    finally:
        with _MODES_LOCK:
            for module in entered:
                entry = _MODES[module]
                entry[0] -= 1
                if not entry[0]:  # the last listener of all threads restores the mode
                    module.training = bool(entry[1])
                    del _MODES[module]


@contextmanager
def _running(model: nn.Module, names: set[str], me: object) -> Iterator[list[str]]:
    """Provide a list whose last item is the innermost module that runs, as far as these and their parts are."""
    running = [""]
    # Without hooks, torch's encoder layers run other operations than in the trace.
    parts = {id(part) for name in names for part in model.get_submodule(name).modules()}
    hooked = {
        name: module
        for name, module in model.named_modules()
        if name and (id(module) in parts or isinstance(module, nn.TransformerEncoderLayer))
    }

    def enter(name: str) -> Callable[..., None]:
        return lambda *_: running.append(name) if is_on_top(me) else None

    def leave(*_: Any) -> None:
        if is_on_top(me):
            running.pop()

    handles = []
    try:
        for name, module in hooked.items():
            handles.append(module.register_forward_pre_hook(enter(name)))
            handles.append(module.register_forward_hook(leave))
        yield running
    finally:
        for handle in handles:
            handle.remove()


def _hook(model: nn.Module, point: HookPoint, caught: dict[HookPoint, Tensor], me: object) -> RemovableHandle:
    """Register a hook that catches the value at a point, and return its handle."""
    calls = 0

    # Another thread may call the hook before torch has noted that it takes keyword arguments.
    def catch(_: nn.Module, args: Any, rest: Any = None) -> None:
        nonlocal calls
        # Other threads, or another tap inside this pass, may run the same model; their values are ignored.
        if not is_on_top(me):
            return
        if calls == point.call:
            if rest is not None:
                _keep(point, rest, caught)
            if point.side == "in":
                _keep(point, args, caught)
        calls += 1

    module = model.get_submodule(point.module)
    if point.side == "out":
        return module.register_forward_hook(catch)
    by_name = isinstance(next(iter(point.slot), None), str)
    return module.register_forward_pre_hook(catch, with_kwargs=by_name)


def _keep(point: HookPoint, value: Any, caught: dict[HookPoint, Tensor]) -> None:
    tensor = tensor_at(value, point.slot)
    if tensor is not None:
        caught[point] = _kept(point, tensor)


def _kept(point: HookPoint, value: Tensor) -> Tensor:
    """Return a value with its positions pooled, or its units last, or a copy where the model may overwrite it."""
    if point.axis is None:
        return value.clone() if point.copy else value
    if value.ndim <= max(point.axis, 2):
        raise PathError(
            f"the model took a different path than when it was traced (its layer has the shape "
            f"{tuple(value.shape)}, without an axis {point.axis}); {TRACE_AGAIN}"
        )
    with on_top(point):  # so that these operations are not taken for the model's
        positions = value.dequantize() if value.is_quantized else value
        if point.pooling is None:
            return positions.movedim(point.axis, -1).clone(memory_format=torch.contiguous_format)
        positions = positions.movedim((point.inputs, point.axis), (0, 1)).flatten(2)
        if point.pooling == "mean":
            return positions.mean(2)
        return torch.linalg.vector_norm(positions.relu(), dim=2)


class _Operations(TorchDispatchMode):
    """Captures results of operations, for values that no module receives or returns; slower than hooks."""

    def __init__(
        self,
        points: list[HookPoint],
        caught: dict[HookPoint, Tensor],
        owner: object,
        fresh: list[HookPoint] | None,
        running: list[str],
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.owner = owner
        self.fresh = fresh
        self.running = running
        self.points: dict[tuple[str, int], list[HookPoint]] = {}
        self.steps: dict[tuple[str, int], list[tuple[HookPoint, int]]] = {}
        for point in points:
            self.points.setdefault((point.module, point.call), []).append(point)
            for op, call, _, position in point.chain:
                self.steps.setdefault((op, call), []).append((point, position))
        self.caught = caught
        self.calls: dict[str, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if not is_on_top(self.owner):
            return func(*args, **(kwargs or {}))
        op = f"{self.running[-1]}/{func._schema.name.removeprefix('aten::')}"
        call = self.calls[op] = self.calls.get(op, -1) + 1
        for step, position in self.steps.get((op, call), ()):
            if step in self.caught:
                given = (*args[:position], self.caught[step], *args[position + 1 :])
                self.caught[step] = next(tensor for _, tensor in tensors_in(func(*given, **(kwargs or {}))))
        result = func(*args, **(kwargs or {}))
        for point in self.points.get((op, call), ()):
            for _, value in islice(tensors_in(result), 1):
                self.caught[point] = value if self.fresh is not None else _kept(point, value)
                if self.fresh is not None:
                    self.fresh.append(point)
        return result
