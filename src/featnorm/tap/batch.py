"""How a batch is passed to a model, and where the labels are in it."""

import copy
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias, get_origin

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from featnorm._utils.errors import error_text
from featnorm.tap.trace import tensors_in

LabelsOf: TypeAlias = str | int | Callable[[Any], Any]
"""Where the labels of a batch are: a key or an attribute, an index, or a function of the batch."""

_LABEL_NAMES = ("label", "labels", "y", "target", "targets", "class")
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
# Errors of a model that reads a tensor as a mapping, or a mapping as a tensor.
_READS_MAPPING = re.compile(
    "too many indices for tensor|'Tensor' object (is not a mapping|has no attribute '(get|items|keys|values)')|"
    "__contains__ only supports Tensor"
)
# torch's errors of a layer that takes a batch of another width.
_CHANNELS = re.compile(r"expected input\[([\d, ]+)\] to have (\d+) channels")
_COLUMNS = re.compile(r"cannot be multiplied \((\d+x\d+) and (\d+)x")
_BY_MAPPING = (TypeError, AttributeError, LookupError)
_COLORS = (1, 3, 4)  # numbers of channels by which a list of tensors is known to hold images


class BatchError(TypeError, ValueError):
    """The batch, by its type or its values, is not what the model takes."""


@dataclass(frozen=True)
class Signature:
    """The arguments of a model's forward pass."""

    positional: tuple[str, ...] = ()
    required: tuple[str, ...] = ()  # without a default
    by_name: frozenset[str] = frozenset()
    any_positional: bool = True  # whether it takes ``*args``
    any_name: bool = True  # whether it takes ``**kwargs``
    takes_mapping: bool = False  # whether the first argument is annotated as a mapping

    @classmethod
    def of(cls, model: nn.Module) -> "Signature":
        """Read the signature of a model; one that cannot be read takes anything."""
        try:
            parameters = inspect.signature(model.forward).parameters
        except (TypeError, ValueError):
            return cls()
        with suppress(Exception):  # an annotation may be a string that names what is not defined
            parameters = inspect.signature(model.forward, eval_str=True).parameters
        first = next((parameter.annotation for parameter in parameters.values()), None)
        first = get_origin(first) or first
        kinds = {name: parameter.kind for name, parameter in parameters.items()}
        kind = inspect.Parameter
        variadic = (kind.VAR_POSITIONAL, kind.VAR_KEYWORD)
        return cls(
            tuple(n for n, k in kinds.items() if k in (kind.POSITIONAL_ONLY, kind.POSITIONAL_OR_KEYWORD)),
            tuple(n for n, p in parameters.items() if p.default is p.empty and p.kind not in variadic),
            frozenset(n for n, k in kinds.items() if k in (kind.POSITIONAL_OR_KEYWORD, kind.KEYWORD_ONLY)),
            kind.VAR_POSITIONAL in kinds.values(),
            kind.VAR_KEYWORD in kinds.values(),
            isinstance(first, type) and issubclass(first, Mapping),
        )

    def __str__(self) -> str:
        names = list(self.positional) + ["*args"] * self.any_positional + ["**kwargs"] * self.any_name
        return f"forward({', '.join(names)})"


@dataclass(frozen=True)
class Call:
    """One call of a model: its arguments, and the labels of the inputs."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    labels: Any = None
    labels_given: bool = False  # whether the caller said where the labels are
    doubt: str = ""  # advice if the model does not take a mapping, or a part of it, in this way

    @property
    def tensors(self) -> Iterator[Tensor]:
        """The tensors among the arguments."""
        return (tensor for part in (self.args, self.kwargs) for _, tensor in tensors_in(part))

    @property
    def rows(self) -> int | None:
        """Number of inputs, that of the first argument; None if it is not known before the model runs."""
        return next((_rows(value) for value in (*self.args, *self.kwargs.values())), None)

    def to(self, device: torch.device) -> "Call":
        """Return the call with its tensors on a device."""
        if self._is_plain and self.args[0].device == device:
            return self
        if all(tensor.device == device for tensor in self.tensors):
            return self

        def move(value: Any) -> Any:
            # Objects move themselves, often in place: a shallow copy leaves the caller's as it is.
            return copy.copy(value).to(device) if hasattr(value, "to") else value

        return self._map(lambda tensor: tensor.to(device), move)

    def clone(self) -> "Call":
        """Return the call with copies of its tensors, as the model may write to them."""
        return self._map(
            Tensor.clone, lambda value: value.clone() if hasattr(value, "clone") else copy.deepcopy(value)
        )

    def head(self, rows: int) -> "Call":
        """Return the call with the first inputs alone, or the call itself where cutting it would not be safe."""
        sizes = {len(tensor) if tensor.ndim else -1 for tensor in self.tensors}
        cut = len(sizes) == 1 and rows < max(sizes) and not self._opaque
        return self._map(lambda tensor: tensor[:rows], lambda value: value) if cut else self

    def inputs_of(self, outputs: Sequence[Tensor]) -> int:
        """Return the number of inputs, given what the model returned for them."""
        tensors = sorted((t for t in outputs if t.is_floating_point() and t.ndim), key=lambda t: t.ndim != 2)
        sizes = [len(tensor) for tensor in tensors]
        rows = self.rows
        if len(given := list(self.tensors)) == 1 and given[0].ndim == 1 and all(t.ndim == 1 for t in tensors):
            raise BatchError(_one_input(given[0]))
        if not sizes or rows in sizes:
            return rows or 0
        if self._is_plain:
            # Sequences may lie along the first axis, as in torch's recurrent networks.
            x = self.args[0]
            sequences = x.ndim == 3 or (x.ndim == 2 and not x.is_floating_point())
            return x.shape[1] if sequences and x.shape[1] in sizes else len(x)
        return sizes[0]

    def detach(self) -> "Call":
        """Return the call with tensors that are not part of a graph of gradients."""
        return self._map(Tensor.detach, lambda value: value)

    @property
    def image(self) -> Tensor:
        """The one floating-point tensor among the arguments; a ValueError if there is none, or are several."""
        tensors: list[Tensor] = []
        self._map(lambda tensor: tensors.append(tensor), lambda value: value)
        found = [tensor for tensor in tensors if tensor.is_floating_point()]
        if len(found) != 1:
            given = (*self.args, *self.kwargs.values())
            raise ValueError(
                "a detector that changes the input needs one floating-point tensor in the batch, and the model "
                f"takes {' and '.join(map(_described, given))}"
            )
        return found[0]

    def with_image(self, image: Tensor) -> "Call":
        """Return the call with another tensor in the place of `image`."""
        old = self.image
        return self._map(lambda tensor: image if tensor is old else tensor, lambda value: value)

    def run(self, model: nn.Module) -> Any:
        """Call the model.

        Raises
        ------
        BatchError
            The model raised an error that the batch explains: its precision, width or axes, or a mapping.
        """
        try:
            return model(*self.args, **self.kwargs)
        except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
            advice = None if isinstance(error, torch.OutOfMemoryError) else self._advice(model, error)
            if advice is None:
                raise
            raise BatchError(f"{advice} ({error_text(error)})") from error

    def _advice(self, model: nn.Module, error: Exception) -> str | None:
        weights = {p.dtype for p in model.parameters() if p.is_floating_point()}
        held = " and ".join(sorted(str(dtype) for dtype in weights))
        tensors = list(self.tensors)
        for tensor in tensors:
            if weights and tensor.is_floating_point() and tensor.dtype not in weights:
                (wanted, *_) = sorted(weights, key=str)
                return f"the batch is {tensor.dtype} and the model {held}: convert it, x.to({wanted})"
            if weights and tensor.dtype == torch.uint8:
                return f"the batch is torch.uint8 and the model {held}: convert it, for example x.float() / 255"
        if len(tensors) == 1 and tensors[0].ndim == 3 and any(isinstance(m, nn.Conv2d) for m in model.modules()):
            return _one_input(tensors[0])
        for shape in (tuple(tensor.shape) for tensor in tensors):
            channels, columns = _CHANNELS.search(str(error)), _COLUMNS.search(str(error))
            if channels is not None and channels[1] == ", ".join(map(str, shape)):
                return (
                    f"the batch has shape {shape}, and the model takes {channels[2]} channels, not {shape[1]}: "
                    "preprocess it as the model's training images were"
                )
            if columns is not None and columns[1] == "x".join(map(str, shape)):
                return f"the batch has shape {shape}, and the model takes vectors of {columns[2]} numbers"
        if self.args and isinstance(self.args[0], Tensor) and _READS_MAPPING.search(str(error)):
            return self.doubt or (
                "the model takes a mapping, and the batch is a tensor: pass a mapping; for images, wrap the model "
                "in a module whose forward(x) calls it with the mapping, such as model({'image': x})"
            )
        of_mapping = bool(self.args) and isinstance(self.args[0], Mapping)
        return self.doubt or None if of_mapping and isinstance(error, _BY_MAPPING) else None

    @property
    def _is_plain(self) -> bool:
        """Whether the call is ``model(x)`` with a tensor, which takes the least time."""
        return not self.kwargs and len(self.args) == 1 and isinstance(self.args[0], Tensor)

    @property
    def _opaque(self) -> bool:
        """Whether an argument holds tensors that are not rows of a batch, such as a graph or packed sequences."""
        found: list[Any] = []
        self._map(lambda tensor: tensor, found.append)
        return bool(found)

    def _map(self, tensor: Callable[[Tensor], Any], thing: Callable[[Any], Any]) -> "Call":
        """Apply one function to every tensor, and another to every object that holds tensors."""
        if self._is_plain:
            return Call((tensor(self.args[0]),), {}, self.labels, self.labels_given, self.doubt)
        return replace(
            self,
            args=tuple(map_tensors(value, tensor, thing) for value in self.args),
            kwargs={name: map_tensors(value, tensor, thing) for name, value in self.kwargs.items()},
        )


def read_batch(batch: Any, signature: Signature, labels: LabelsOf | None = None, name: str = "the batch") -> Call:
    """Decide how a batch is passed to a model, and which part of it is the labels.

    - A tensor, a `torch.nn.utils.rnn.PackedSequence` and any other object, such as a graph of torch_geometric, is
      the first argument.
    - The items of a tuple or list are the positional arguments. If the model requires at most one argument, a list
      of floating-point tensors (c, h, w) is a list of images, which is the first argument. If one mapping remains
      beside the labels, and a name in it is an argument of the model, it is read as a mapping.
    - The items of a mapping are arguments by name. If the model requires at most one argument and has none of the
      names, that argument is the mapping itself, without the labels, if it is annotated as a mapping or if several
      items hold tensors. Otherwise, an item whose name the model does not know is its one required argument, if no
      other item can be.

    Labels are what ``labels`` points to. By default they are:

    - in a tuple or list, the item that the model has no argument for; or a last item of one integer per input,
      unless the model requires an argument there, or one whose name contains "len" or "batch";
    - in a mapping, the item named label, labels, y, target, targets or class, unless the model requires an
      argument of that name, or takes one and the item is not one integer per input;
    - in another object, the attribute of such a name, if it holds integers of shape (n,).

    Values without tensors, such as paths, are passed by name if the model takes them, and are dropped otherwise.

    Parameters
    ----------
    batch : see above.
    signature : arguments of the model.
    labels : key, attribute, index, or function of the batch that returns its labels. Default: see above.
    name : words for the batch, for errors.

    Raises
    ------
    BatchError
        The batch holds no tensor, a tensor that neither the model takes nor is the labels, or not what the model
        requires; or ``labels`` points to nothing.
    """
    if isinstance(batch, Tensor) and labels is None and batch.ndim:
        return Call((batch,))
    if not any(tensor.ndim for _, tensor in tensors_in(batch)):
        raise BatchError(
            f"{name} is {_kind(batch)}, without a tensor of inputs; expected a tensor, a tuple or a mapping "
            "of the model's arguments and, optionally, labels"
        )
    if isinstance(batch, Mapping):
        reader: Callable[..., tuple[Call, dict[str, Any]]] = _from_mapping
    elif isinstance(batch, (tuple, list)) and not isinstance(batch, PackedSequence):
        reader = _from_sequence
    else:
        reader = _from_object
    call, left = reader(batch, signature, labels, name)
    left = {key: value for key, value in left.items() if _has_tensors(value) and value is not call.labels}
    if left:
        raise BatchError(_not_taken(name, left, signature))
    missing = [arg for arg in signature.required[len(call.args) :] if arg not in call.kwargs]
    if missing:
        raise BatchError(f"the model's {signature} requires {' and '.join(missing)}, and {name} has none")
    return call


def class_labels(call: Call, n: int) -> tuple[Tensor | None, str]:
    """Return the labels (n,) of a call, or None and the reason.

    Raises
    ------
    ValueError
        The caller said where the labels are, and they are not one integer per input.
    """
    labels = call.labels
    if labels is None:
        return None, "the loader yields none"
    if isinstance(labels, (tuple, list)) and all(type(label) is int for label in labels):
        labels = torch.tensor(labels)
    if isinstance(labels, Tensor) and labels.dtype in _INTEGERS and labels.shape == (n,):
        return labels, ""
    why = f"{_described(labels)}, and must be one integer per input"
    if call.labels_given:
        raise ValueError(f"the labels are {why}")
    return None, f"the loader's are {why}"


def position_labels(call: Call, grid: tuple[int, ...], classes: int) -> tuple[Tensor | None, str]:
    """Return the labels (n * h * w,) of the positions of a grid (n, h, w), or None and the reason.

    A position takes the label of the nearest pixel of a mask (n, H, W); -1 if it is not the index of a logit.

    Raises
    ------
    ValueError
        The caller said where the labels are, and they are not masks of integers.
    """
    mask = call.labels
    if not isinstance(mask, Tensor) or mask.dtype not in _INTEGERS or mask.ndim != 3 or len(mask) != grid[0]:
        why = f"{_described(mask)}, and must be masks (n, height, width) of integers for {grid[0]} inputs"
        if call.labels_given:
            raise ValueError(f"the labels are {why}")
        return None, f"the loader's are {why}"
    # In float64 every integer label is exact enough to compare.
    nearest = nn.functional.interpolate(mask[:, None].double(), grid[1:], mode="nearest-exact")
    labels = nearest.flatten().to(torch.int64)
    return torch.where((labels >= 0) & (labels < classes), labels, -1), ""


def map_tensors(value: Any, tensor: Callable[[Tensor], Any], thing: Callable[[Any], Any]) -> Any:
    """Apply one function to every tensor in a batch, and another to every object that holds tensors."""
    if isinstance(value, Tensor):
        return tensor(value)
    if isinstance(value, Mapping):
        changed = {key: map_tensors(item, tensor, thing) for key, item in value.items()}
        if type(value) is dict or not isinstance(value, MutableMapping):
            return changed
        kept = copy.copy(value)  # of its own type, such as a BatchEncoding
        kept.update(changed)
        return kept
    if isinstance(value, (tuple, list)) and not isinstance(value, PackedSequence):
        items = [map_tensors(item, tensor, thing) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return thing(value) if _has_tensors(value) else value


def _from_sequence(
    batch: Sequence[Any], signature: Signature, labels: LabelsOf | None, name: str
) -> tuple[Call, dict[str, Any]]:
    required = len([arg for arg in signature.required if arg in signature.positional])
    items = list(batch)
    if labels is None and type(batch) is list and required <= 1 and all(_is_image(item) for item in items):
        return Call((items,)), {}
    target: Any = None
    if isinstance(labels, int):
        if not -len(items) <= labels < len(items):
            raise BatchError(f"labels={labels}, and {name} has {len(items)} items")
        target = items.pop(labels)
    elif isinstance(labels, str):
        if labels not in (fields := getattr(batch, "_fields", ())):
            raise BatchError(f"labels={labels!r}, and {name} is {_kind(batch)}, without such a name")
        target = items.pop(fields.index(labels))
    elif labels is not None:
        target = labels(batch)
        items = [item for item in items if item is not target]
    rows = next((_rows(item) for item in items), None)

    def is_last() -> bool:
        return len(items) > max(required, 1)

    while is_last() and not (_has_tensors(items[-1]) or _is_classes(items[-1], rows)):
        items.pop()
    if labels is None and is_last() and _is_classes(items[-1], rows):
        place = signature.positional[len(items) - 1 :][:1]
        if not any(part in arg for arg in place for part in ("len", "batch")):
            target = items.pop()
            while is_last() and not _has_tensors(items[-1]):
                items.pop()
    taken = len(items) if signature.any_positional else max(len(signature.positional), 1)
    over = items[taken:]
    # A second batch of inputs is no labels.
    if labels is None and target is None and len(over) == 1 and not _are_inputs(over[0], items[0]):
        (target,) = over
    if len(items) == 1 and isinstance(items[0], Mapping) and not signature.by_name.isdisjoint(items[0]):
        call, left = _from_mapping(items[0], signature, None, name)
        return (call if target is None else replace(call, labels=target, labels_given=labels is not None)), left
    call = Call(tuple(items[:taken]), labels=target, labels_given=labels is not None)
    return call, {f"item {i}": item for i, item in enumerate(batch) if any(item is other for other in over)}


def _are_inputs(item: Any, inputs: Any) -> bool:
    """Whether an item is a batch of numbers of the shape of the inputs, beyond a vector per input."""
    return (
        isinstance(item, Tensor)
        and isinstance(inputs, Tensor)
        and item.is_floating_point()
        and item.ndim > 2
        and item.shape == inputs.shape
    )


def _from_mapping(
    batch: Mapping[Any, Any], signature: Signature, labels: LabelsOf | None, name: str
) -> tuple[Call, dict[str, Any]]:
    items = {key: value for key, value in batch.items() if value is not None}
    target: Any = None
    if isinstance(labels, (str, int)):
        if labels not in items:
            raise BatchError(f"labels={labels!r}, and {name} has only {', '.join(map(str, items))}")
        target = items[labels] if labels in signature.required else items.pop(labels)
    elif labels is not None:
        target = labels(batch)
        items = {key: value for key, value in items.items() if value is not target}
    else:
        # The number of rows is read only if there may be labels: in an exported graph it would become a constant.
        for key in [key for key in _LABEL_NAMES if key in items]:
            rows = next((_rows(value) for key, value in items.items() if key not in _LABEL_NAMES), None)
            is_argument = key in signature.required or (
                key in signature.by_name and not _is_classes(items[key], rows)
            )
            if not is_argument:
                target = items.pop(key)
                break
    given = labels is not None
    kwargs = {key: value for key, value in items.items() if key in signature.by_name}
    others = {key: value for key, value in items.items() if key not in kwargs and _has_tensors(value)}
    open_args = [arg for arg in signature.required if arg not in kwargs]
    listed = {repr(key): value for key, value in others.items()}
    args: tuple[Any, ...] = ()
    doubt = ""
    takes_one = (
        open_args[:1] == list(signature.positional[:1]) if open_args else not (kwargs or signature.any_name)
    )
    if takes_one and not kwargs and len(open_args) <= 1 and (signature.takes_mapping or len(others) > 1):
        if not signature.takes_mapping:
            doubt = f"{_not_taken(name, listed, signature)}; the model was given the mapping itself"
        itself = batch if target is None else {key: v for key, v in batch.items() if v is not target}
        return Call((itself,), {}, target, given, doubt), {}
    if len(others) == 1 and takes_one:
        (key,) = listed
        doubt = (
            f"the model's {signature} was given item {key} of the mapping alone: if it takes the mapping itself, "
            "pass a tuple of one mapping, or annotate its argument as a dict"
        )
        args, listed = tuple(others.values()), {}
    elif signature.any_name:
        kwargs, listed = kwargs | others, {}
    return Call(args, kwargs, target, given, doubt), listed


def _from_object(
    batch: Any, signature: Signature, labels: LabelsOf | None, name: str
) -> tuple[Call, dict[str, Any]]:
    if labels is None:
        found = (getattr(batch, key, None) for key in _LABEL_NAMES if not isinstance(batch, Tensor))
        target = next((value for value in found if _is_classes(value, _rows(batch))), None)
    elif isinstance(labels, str) and not isinstance(batch, Tensor) and hasattr(batch, labels):
        target = getattr(batch, labels)
    elif callable(labels):
        target = labels(batch)
    else:
        raise BatchError(f"labels={labels!r}, and {name} is {_kind(batch)}, without such a part")
    return Call((batch,), labels=target, labels_given=labels is not None), {}


def _rows(value: Any) -> int | None:
    if isinstance(value, PackedSequence):
        return int(value.batch_sizes[0])
    if isinstance(value, Tensor):
        return len(value) if value.ndim else None
    if isinstance(value, list):
        return len(value)
    graphs = getattr(value, "num_graphs", None)
    return graphs if isinstance(graphs, int) else None


def _is_classes(value: Any, rows: int | None) -> bool:
    """Return whether a value is one integer per input, as far as the number of inputs is known."""
    if isinstance(value, (tuple, list)):
        return bool(value) and all(type(item) is int for item in value) and rows in (None, len(value))
    return (
        isinstance(value, Tensor)
        and value.dtype in _INTEGERS
        and value.ndim == 1
        and (rows is None or len(value) == rows)
    )


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _is_image(value: Any) -> bool:
    return _is_floating(value) and value.ndim == 3 and len(value) in _COLORS


def _has_tensors(value: Any) -> bool:
    return any(True for _ in tensors_in(value))


def _kind(value: Any) -> str:
    return f"a dict with keys {list(value)}" if isinstance(value, Mapping) else f"a {type(value).__name__}"


def _described(value: Any) -> str:
    return f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else _kind(value)


def _one_input(value: Tensor) -> str:
    return f"the batch has shape {tuple(value.shape)}: if it is one input, pass x[None]"


def _not_taken(name: str, items: Mapping[str, Any], signature: Signature) -> str:
    listed = " and ".join(f"{key} ({_described(value)})" for key, value in items.items())
    return (
        f"{name} holds {listed}, which the model's {signature} does not take: leave them out of the batch, or say "
        "with labels= which of them are the labels"
    )
