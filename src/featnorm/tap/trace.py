"""The trace of one forward pass: which operation made which tensor, and where a hook can read it."""

import dataclasses
import inspect
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

if TYPE_CHECKING:
    from featnorm.tap.batch import Call

Slot = tuple[str | int, ...]
# Depth to which tensors are looked for in objects.
_MAX_DEPTH = 6


@dataclass(eq=False)
class Node:
    """One value: the result of an operation, an input of the model, or a constant such as a weight."""

    time: int
    op: str  # the ATen operation without its overload, "input" or "constant"
    call: int  # index among operations of this name, from 0
    args: tuple[Any, ...] = field(repr=False)  # arguments of the operation, with tensors replaced by their nodes
    module: str  # innermost module that was running
    value: Tensor = field(repr=False)
    from_input: bool  # whether the value depends on the input of the model
    func: Any = None  # the operation itself
    keywords: tuple[str, ...] = ()  # names of its last arguments

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the value."""
        return tuple(self.value.shape)

    @property
    def parents(self) -> list["Node"]:
        """The nodes among the arguments, in order."""
        return list(_nodes(self.args))

    @property
    def data(self) -> list["Node"]:
        """The parents that depend on the model's input."""
        return [parent for parent in self.parents if parent.from_input]

    def run(self, replaced: Mapping["Node", Tensor]) -> Tensor:
        """Run the operation again with other values for some of its arguments, and return its first result."""
        values = [_with_values(arg, replaced) for arg in self.args]
        count = len(values) - len(self.keywords)
        result = self.func(*values[:count], **dict(zip(self.keywords, values[count:], strict=True)))
        return next(tensor for _, tensor in tensors_in(result))


@dataclass(frozen=True)
class ModuleIO:
    """A value that a module received or returned."""

    module: str
    side: str  # "in" or "out"
    call: int  # index of the module's call, from 0
    slot: Slot  # keys that lead to the value in the arguments or the result
    node: Node
    time: int


@dataclass
class Trace:
    """The record of one forward pass."""

    nodes: list[Node] = field(default_factory=list)
    module_io: list[ModuleIO] = field(default_factory=list)
    outputs: list[tuple[Slot, Node]] = field(default_factory=list)
    batch: int = 0  # number of inputs

    def is_borrowed(self, node: Node) -> bool:
        """Return whether a value shares memory with the model's input, a weight or a buffer."""
        memory = _memory(node.value)
        return any(other.op in ("input", "constant") and _memory(other.value) == memory for other in self.nodes)

    def written_after(self, node: Node, time: int) -> bool:
        """Return whether an in-place operation wrote to the memory of the value at or after ``time``."""
        storage = _memory(node.value)
        return any(
            later.op.endswith("_") and _memory(later.value) == storage
            for later in self.nodes
            if later.time >= time
        )


def trace(model: nn.Module, call: "Call") -> Trace:
    """Run the model once and record its trace. The caller sets the mode and gradients."""
    call = call.clone()  # the model may write to its input, which is used again
    traced = Trace()
    me = object()
    recorder = _Recorder(traced, call.tensors, me)
    calls: dict[str, int] = {}
    running: list[tuple[str, int]] = []

    def entering(name: str) -> Callable[..., None]:
        # Another thread may call the hook before torch has noted that it takes keyword arguments.
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] = MappingProxyType({})) -> None:
            if not is_on_top(me):
                return
            call = calls[name] = calls.get(name, -1) + 1
            running.append((name, call))
            recorder.module = name
            for slot, tensor in tensors_in(args):
                recorder.record_io(name, "in", call, slot, tensor)
            for slot, tensor in tensors_in(kwargs):
                recorder.record_io(name, "in", call, slot, tensor)

        return hook

    def leaving(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not is_on_top(me):
            return
        name, call = running.pop()
        for slot, tensor in tensors_in(output):
            recorder.record_io(name, "out", call, slot, tensor)
        recorder.module = running[-1][0] if running else ""

    handles = []
    try:
        for name, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(entering(name), with_kwargs=True))
            handles.append(module.register_forward_hook(leaving))
        with on_top(me), recorder:
            output = call.run(model)
        traced.outputs = [(slot, recorder.node(tensor)) for slot, tensor in tensors_in(output)]
        traced.batch = call.inputs_of([node.value for _, node in traced.outputs])
    finally:
        for handle in handles:
            handle.remove()
    return traced


class _Listeners(threading.local):
    """The listeners in this thread, innermost last. Nested passes are ignored by the outer listener."""

    def __init__(self) -> None:
        self.stack: list[object] = []


_LISTENERS = _Listeners()


class on_top:
    """A context in which a listener is the innermost one of this thread."""

    __slots__ = ("_listener",)

    def __init__(self, listener: object) -> None:
        self._listener = listener

    def __enter__(self) -> None:
        _LISTENERS.stack.append(self._listener)

    def __exit__(self, *_: object) -> None:
        _LISTENERS.stack.pop()


def is_on_top(listener: object) -> bool:
    """Return whether a listener is the innermost one of this thread."""
    return bool(_LISTENERS.stack) and _LISTENERS.stack[-1] is listener


def _memory(tensor: Tensor) -> int:
    # Sparse tensors have no single storage.
    return tensor.untyped_storage().data_ptr() if tensor.layout == torch.strided else id(tensor)


def tensors_in(value: Any, slot: Slot = (), seen: set[int] | None = None) -> Iterator[tuple[Slot, Tensor]]:
    """Yield the tensors in nested tuples, lists, mappings and objects, with the keys that lead to them."""
    if isinstance(value, Tensor):
        yield slot, value
        return
    if is_record(value):  # objects may refer to each other
        seen = set() if seen is None else seen
        if id(value) in seen or len(slot) > _MAX_DEPTH:
            return
        seen.add(id(value))
    for key, item in _items(value):
        yield from tensors_in(item, (*slot, key), seen)


def tensor_at(value: Any, slot: Slot) -> Tensor | None:
    """Return the tensor to which the keys lead, or None if there is none."""
    for key in slot:
        if type(value) is tuple and type(key) is int and key < len(value):  # the arguments of a module
            value = value[key]
            continue
        value = next((item for name, item in _items(value) if name == key), None)
    return value if isinstance(value, Tensor) else None


def is_record(value: object) -> bool:
    """Return whether a value is an object that may hold tensors in its attributes, such as a graph."""
    return (hasattr(value, "__dict__") or dataclasses.is_dataclass(value)) and not (
        isinstance(value, (Tensor, nn.Module, Mapping, tuple, list))
        or inspect.isroutine(value)
        or inspect.isclass(value)
        or inspect.ismodule(value)
    )


def _items(value: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(value, Mapping):
        yield from value.items()
    elif isinstance(value, (tuple, list)):
        yield from enumerate(value)
    elif dataclasses.is_dataclass(value):
        yield from ((field.name, getattr(value, field.name, None)) for field in dataclasses.fields(value))
    elif is_record(value):
        yield from vars(value).items()


class _Recorder(TorchDispatchMode):
    """Records every ATen operation, whether a module, a function or a method calls it."""

    def __init__(self, traced: Trace, inputs: Iterable[Tensor], owner: object) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.owner = owner
        self.trace = traced
        self.module = ""
        self._calls: dict[str, int] = {}
        # Nodes keep their tensors alive, so that no id and no memory is reused while tracing.
        self._made: dict[int, Node] = {}
        self._written: dict[int, Node] = {}
        for tensor in inputs:
            self._add("input", (), tensor, from_input=True)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if not is_on_top(self.owner):
            return func(*args, **(kwargs or {}))
        given = (*args, *(kwargs or {}).values())
        arguments = self._with_nodes(given)
        if (
            torch.Tag.inplace_view in func.tags
        ):  # `transpose_` and others would change the shape of the recorded value
            self.node(args[0]).value = args[0].detach()
        result = func(*args, **(kwargs or {}))
        op = func._schema.name.removeprefix("aten::")
        depends = any(node.from_input for node in _nodes(arguments))
        for _, tensor in tensors_in(result):
            node = self._add(op, arguments, tensor, depends)
            node.func, node.keywords = func, tuple(kwargs or ())
            if func._schema.is_mutable:
                self._written[_memory(tensor)] = node
        self._calls[op] = self._calls.get(op, -1) + 1
        return result

    def node(self, tensor: Tensor) -> Node:
        """Return the node of the value that a tensor holds now."""
        made = self._made.get(id(tensor))
        written = self._written.get(_memory(tensor))
        if made is None:
            # A weight, a buffer, or a Python alias of the memory of a recorded tensor.
            return written or self._add("constant", (), tensor, from_input=False)
        return written if written is not None and written.time > made.time else made

    def record_io(self, module: str, side: str, call: int, slot: Slot, tensor: Tensor) -> None:
        """Record that a module received or returned a tensor."""
        time = len(self.trace.nodes)
        self.trace.module_io.append(ModuleIO(module, side, call, slot, self.node(tensor), time))

    def _add(self, op: str, args: tuple[Any, ...], value: Tensor, from_input: bool) -> Node:
        call = self._calls.get(op, -1) + 1
        node = Node(len(self.trace.nodes), op, call, args, self.module, value, from_input)
        self.trace.nodes.append(node)
        self._made[id(value)] = node
        return node

    def _with_nodes(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self.node(value)
        if isinstance(value, (tuple, list)):
            return tuple(self._with_nodes(item) for item in value)
        return value


def _with_values(value: Any, replaced: Mapping[Node, Tensor]) -> Any:
    if isinstance(value, Node):
        return replaced.get(value, value.value)
    return [_with_values(item, replaced) for item in value] if isinstance(value, tuple) else value


def _nodes(value: Any) -> Iterator[Node]:
    if isinstance(value, Node):
        yield value
    elif isinstance(value, tuple):
        for item in value:
            yield from _nodes(item)
