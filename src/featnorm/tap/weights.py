"""The linear map from features to logits: found in a trace, and computed from the model's current weights."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from featnorm.features import Classifier
from featnorm.tap.ops import (
    BATCH_NORMS,
    RESHAPES,
    base_op,
    linear_layer,
    linear_source,
    normalized_source,
    numbers,
    same_value,
    stacked_terms,
)
from featnorm.tap.trace import Node

Step = tuple[Any, ...]
"""One instruction of a stack machine whose values are linear maps, as plain data; see `classifier`."""


class NotLinearError(Exception):
    """The logits are not a linear map of the features; the message is what lies between them."""


def linear_map(
    logits: Node, sources: Sequence[Node], chain: Collection[Node], cosine: bool, model: nn.Module
) -> list[Step]:
    """Return the steps that make the logits from the sources.

    Parameters
    ----------
    logits, sources : values in a trace; the sources are concatenated.
    chain : operations that average the class scores over positions, which do not change the map.
    cosine : whether vectors of unit length are compared, whose length and temperature are left out of the map.

    Raises
    ------
    NotLinearError
        There is anything but linear layers, batch normalizations and constant factors between them.
    """
    steps: list[Step] = []

    def visit(node: Node, crossed: bool, cosine: bool, bias: Node | None = None) -> None:
        node = same_value(node)
        op = base_op(node)
        source = linear_source(node)
        if bias is not None and (source is None or node in sources or _own_bias(node) is not None):
            raise NotLinearError("a shift of its units" if crossed else _ARITHMETIC)
        if node in sources:
            steps.append(("source", sources.index(node)))
        elif source is not None:
            visit(source, True, cosine)
            steps.append(("linear", *_reference(node, bias, model)))
        elif op in ("add", "sub") and len(node.data) > 1:
            for i, term in enumerate(node.data):
                visit(term, crossed, cosine)
                if i:
                    alpha = next(iter(numbers(node)), 1.0)
                    steps.append(("scale", -alpha if op == "sub" else alpha))
            steps.append(("sum", len(node.data)))
        elif (terms := stacked_terms(node)) is not None:
            for term in terms:
                visit(term, crossed, cosine)
            steps.append(("sum", len(terms)))
            if op == "mean":
                steps.append(("scale", 1 / len(terms)))
        elif op == "cat":
            for part in node.data:
                visit(part, crossed, cosine)
            steps.append(("cat", len(node.data)))
        elif cosine and (source := normalized_source(node)) is not None:
            visit(source, crossed, False)
        elif node in chain:
            visit(node.data[0], crossed, cosine)
        elif op in ("add", "sub", "rsub", "mul", "div", "neg") and len(node.data) == 1:
            factor = _factor(node)
            shift = next((parent for parent in node.parents if not parent.from_input), None)
            if op == "add" and shift is not None and shift.value.ndim >= 1 and not numbers(node):
                visit(node.data[0], crossed, cosine, shift)
            elif cosine or factor == 1:
                visit(node.data[0], crossed, cosine)
            elif factor is not None:
                visit(node.data[0], crossed, cosine)
                steps.append(("scale", factor))
            else:
                raise NotLinearError("a scaling of its units" if crossed else _ARITHMETIC)
        elif op in BATCH_NORMS and not cosine:
            visit(node.data[0], crossed, cosine)
            steps.append(("norm", *_norm_reference(node, model)))
        else:
            raise NotLinearError(_words(node))

    visit(logits, False, cosine)
    return steps


_ARITHMETIC = "arithmetic on the logits (a temperature, a prior)"


def classifier(steps: Sequence[Step], model: nn.Module) -> Classifier | None:
    """Return ``(W, b)`` of the linear map from the model's current weights, or None if there are no steps.

    A value on the stack is a matrix, or a vector or number for a diagonal one, per source, with an offset. The
    steps are: ``("source", index)``; ``("linear", weight, transposed, unit_rows, bias)``; ``("norm", mean,
    variance, weight, bias, eps)`` with the paths of the tensors in the model; ``("scale", factor)``;
    ``("sum", count)`` and ``("cat", count)`` of the last values.

    Raises
    ------
    ValueError
        The steps are malformed, or do not fit the model.
    """
    if not steps:
        return None
    stack: list[tuple[dict[int, Tensor], Tensor | None]] = []
    try:
        for step in steps:
            _APPLY[step[0]](stack, model, *step[1:])
        ((maps, offset),) = stack
        weight = torch.cat([maps[i] for i in range(len(maps))], 1)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"the classifier cannot be computed from the model's weights: {error}") from error
    # Copies: features must neither change with the user's weights nor change them.
    return weight.clone(), None if offset is None else offset.clone()


_Stack = list[tuple[dict[int, Tensor], Tensor | None]]


def _source(stack: _Stack, model: nn.Module, index: int) -> None:
    stack.append(({index: torch.ones(())}, None))


def _linear(
    stack: _Stack, model: nn.Module, path: str, transposed: bool, unit_rows: bool, bias_path: str | None
) -> None:
    weight = tensor_at(model, path)
    weight = weight.T if transposed else weight.flatten(1)
    weight = nn.functional.normalize(weight, dim=1) if unit_rows else weight
    maps, offset = stack.pop()
    bias = None if bias_path is None else tensor_at(model, bias_path).reshape(-1)
    if offset is not None:
        bias = weight @ offset if bias is None else weight @ offset + bias
    # A diagonal matrix is a number or a vector, a number that of the identity being 1.
    product = {i: weight @ m if m.ndim == 2 else weight if m.ndim == 0 and m == 1 else weight * m.to(weight)
               for i, m in maps.items()}  # fmt: skip
    stack.append((product, bias))


def _norm(
    stack: _Stack, model: nn.Module, mean: str, variance: str, weight: str | None, bias: str | None, eps: float
) -> None:
    gain = (tensor_at(model, variance) + eps).rsqrt()
    if weight is not None:
        gain = gain * tensor_at(model, weight)
    maps, offset = stack.pop()
    shift = -tensor_at(model, mean) if offset is None else offset - tensor_at(model, mean)
    shift = shift * gain if bias is None else shift * gain + tensor_at(model, bias)
    stack.append(({i: gain[:, None] * m if m.ndim == 2 else gain * m.to(gain) for i, m in maps.items()}, shift))


def _scale(stack: _Stack, model: nn.Module, factor: float) -> None:
    maps, offset = stack.pop()
    stack.append(({i: m * factor for i, m in maps.items()}, None if offset is None else offset * factor))


def _sum(stack: _Stack, model: nn.Module, count: int) -> None:
    terms = [stack.pop() for _ in range(count)]
    maps: dict[int, Tensor] = {}
    for term, _ in terms:
        for i, matrix in term.items():
            maps[i] = maps[i] + matrix if i in maps else matrix
    offsets = [offset for _, offset in terms if offset is not None]
    stack.append((maps, torch.stack(offsets).sum(0) if offsets else None))


def _cat(stack: _Stack, model: nn.Module, count: int) -> None:
    parts = [stack.pop() for _ in range(count)][::-1]
    if any(part.keys() != parts[0][0].keys() for part, _ in parts):
        raise ValueError("the parts of the logits are made from different features")
    maps = {i: torch.cat([part[i] for part, _ in parts]) for i in parts[0][0]}
    offset = None
    if any(one is not None for _, one in parts):
        first = next(iter(maps))
        offset = torch.cat(
            [part[first].new_zeros(len(part[first])) if one is None else one for part, one in parts]
        )
    stack.append((maps, offset))


_APPLY: Mapping[str, Callable[..., None]] = {
    "source": _source, "linear": _linear, "norm": _norm, "scale": _scale, "sum": _sum, "cat": _cat
}  # fmt: skip


_ARGUMENTS: Mapping[str, tuple[Any, ...]] = {
    "source": (int,),
    "linear": (str, bool, bool, str | None),
    "norm": (str, str, str | None, str | None, float),
    "scale": (float,),
    "sum": (int,),
    "cat": (int,),
}


def checked_step(data: Any) -> Step:
    """Return a step from the plain data of a file; raise a ValueError if it is malformed."""
    name, *arguments = data
    kinds = _ARGUMENTS.get(name) if isinstance(name, str) else None
    if kinds is None or len(kinds) != len(arguments) or not all(map(isinstance, arguments, kinds)):
        raise ValueError(f"{data} is not a step from features to logits")
    return (name, *arguments)


def paths(steps: Sequence[Step]) -> list[str]:
    """Return the paths of the tensors that the steps read."""
    places = {"linear": (1, 4), "norm": (1, 2, 3, 4)}
    return [step[i] for step in steps for i in places.get(step[0], ()) if step[i] is not None]


def tensor_at(model: nn.Module, path: str) -> Tensor:
    """Return the tensor at a path of attributes; a quantized layer returns its weights from a method."""
    value: Any = model
    for part in path.split("."):
        value = getattr(value, part)
    value = value() if callable(value) else value
    return (value.dequantize() if value.is_quantized else value).detach()


def _factor(node: Node) -> float | None:
    """Return the number by which a value is multiplied, or None."""
    op = base_op(node)
    given = numbers(node)
    if op == "neg":
        return -1.0
    if op in ("add", "sub") and given[:1] == [0]:
        return 1.0
    if op not in ("mul", "div") or len(node.parents) > 1 or len(given) != 1 or len(node.args) > 2:
        return None
    return given[0] if op == "mul" else 1 / given[0] if given[0] else None


def _words(node: Node) -> str:
    kind = base_op(node)
    name = "a layer normalization" if "layer_norm" in kind or "rms_norm" in kind else f"`{kind}`"
    name = "a batch normalization" if kind in BATCH_NORMS else name
    return f"{name} in `{node.module}`" if node.module else name


def _own_bias(node: Node) -> Node | None:
    layer = linear_layer(node)
    assert layer is not None
    if base_op(layer) == "addmm":
        return layer.parents[0]
    constants = [parent for parent in layer.parents if not parent.from_input]
    return constants[1] if len(constants) > 1 else None


def _reference(node: Node, bias: Node | None, model: nn.Module) -> tuple[str, bool, bool, str | None]:
    """Return the paths of a linear layer's weight and bias, and how the weight is read."""
    layer = linear_layer(node)
    assert layer is not None
    op = base_op(layer)
    if op.startswith("quantized"):
        if bias is not None:
            raise NotLinearError(_ARITHMETIC)
        has_bias = model.get_submodule(layer.module).bias() is not None  # type: ignore[operator]
        return f"{layer.module}.weight", False, False, f"{layer.module}.bias" if has_bias else None
    constants = [parent for parent in layer.parents if not parent.from_input]
    root = constants[-1] if op == "addmm" else constants[0]
    bias = bias or _own_bias(node)
    if op == "addmm" and any(number != 1 for number in numbers(layer)):
        raise NotLinearError("a linear layer that is scaled")
    if op == "convolution":
        matrix = root.value.flatten(1)
    elif op == "linear" or layer.parents[0] is root:  # W x
        matrix = root.value.reshape(root.shape[-2:])
    else:
        matrix = root.value.reshape(root.shape[-2:]).T
    candidates = tensors_of(model, layer.module)
    # The tensor that was read itself takes precedence over others of equal values.
    tensor, normalized = _root(root)
    held = {_pointer(tensor)} if tensor is not None else set()
    if bias is not None and (tensor := _root(bias)[0]) is not None:
        held.add(_pointer(tensor))
    candidates = dict(sorted(candidates.items(), key=lambda item: _pointer(item[1]) not in held))
    bias_path = None
    if bias is not None:
        wanted = bias.value.reshape(-1)
        bias_path = next((name for name, t in candidates.items() if _equal(t.reshape(-1), wanted)), None)
        if bias_path is None:
            raise NotLinearError(_NO_WEIGHT)
    for name, tensor in candidates.items():
        for transposed in (False, True):
            if tensor.ndim < 2 or (transposed and tensor.ndim != 2):
                continue
            rows = tensor.T if transposed else tensor.flatten(1)
            if rows.shape != matrix.shape:
                continue
            for unit_rows in (True, False) if normalized else (False, True):
                if _equal(nn.functional.normalize(rows, dim=1) if unit_rows else rows, matrix):
                    return name, transposed, unit_rows, bias_path
    raise NotLinearError(_NO_WEIGHT)


_NO_WEIGHT = "a weight that is neither a parameter nor a buffer of the model"


def _norm_reference(node: Node, model: nn.Module) -> tuple[str | None, ...]:
    """Return the paths of the mean, variance, weight and bias of a batch normalization, and its epsilon."""
    tensors = [arg for arg in node.args[1:5]]
    candidates = tensors_of(model, node.module)
    found: list[str | None] = []
    for arg in (tensors[2], tensors[3], tensors[0], tensors[1]):
        path = None
        if isinstance(arg, Node):
            path = next((n for n, t in candidates.items() if _pointer(t) == _pointer(arg.value)), None)
            if path is None:
                raise NotLinearError(_NO_WEIGHT)
        found.append(path)
    if found[0] is None or found[1] is None:
        raise NotLinearError("a batch normalization without running statistics")
    return (*found, node.args[-1])


def _pointer(tensor: Tensor) -> int:
    return tensor.data_ptr() if tensor.layout == torch.strided else id(tensor)


def _root(constant: Node) -> tuple[Tensor | None, bool]:
    """Return the model's tensor that a weight was reshaped or normalized from, and whether it was normalized."""
    node, normalized = constant, False
    while node.op != "constant":
        if base_op(node) in ("div", "mul"):
            normalized = True
        elif base_op(node) not in RESHAPES:
            return None, False
        node = node.parents[0]
    return node.value, normalized


def tensors_of(model: nn.Module, owner: str) -> dict[str, Tensor]:
    """Return the parameters and buffers of the model by path, starting with those of the module that ran."""
    found: dict[str, Tensor] = {}
    module = model.get_submodule(owner)
    for attribute in ("weight", "bias"):
        # Read as an attribute: a parametrized weight (weight norm, spectral norm) is not a parameter.
        value = getattr(module, attribute, None)
        if isinstance(value, Tensor):
            found[f"{owner}.{attribute}" if owner else attribute] = value.detach()
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        found.setdefault(name, value.detach())
    return found


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(torch.allclose(a.to(b.dtype), b, rtol=1e-3, atol=1e-6))
