"""Finds the last hidden layer, pooled feature, embedding and logits in the trace of a forward pass.

The search walks back from the logits through the values they were computed from. Names and the order of
registration of modules do not matter, and function calls are found like modules.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from featnorm.tap.trace import Node, Trace

Kind = Literal["hidden", "pooled", "none", "chosen"]

_RESHAPES = {
    "view", "_unsafe_view", "reshape", "_reshape_alias", "flatten", "squeeze", "unsqueeze", "alias", "detach",
    "clone", "contiguous", "_to_copy", "permute", "transpose", "t", "dropout", "native_dropout", "expand",
    "select", "slice", "lift_fresh", "as_strided",
}  # fmt: skip
_RECTIFIERS = {
    "relu", "gelu", "silu", "leaky_relu", "hardswish", "elu", "celu", "selu", "mish", "threshold", "hardtanh",
    "prelu", "_prelu_kernel", "rrelu_with_noise", "rrelu", "softplus", "clamp_min", "clamp", "relu6",
}  # fmt: skip
_POOLS = {
    "mean", "amax", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "_adaptive_avg_pool2d", "avg_pool1d",
    "avg_pool2d", "_adaptive_avg_pool3d", "avg_pool3d", "adaptive_max_pool2d", "max_pool2d_with_indices",
    "max_pool2d", "max", "sum",
}  # fmt: skip
_LINEARS = {"mm", "addmm", "linear", "matmul", "convolution", "conv2d"}
_BATCH_NORMS = {"native_batch_norm", "_native_batch_norm_legit_no_training", "cudnn_batch_norm", "batch_norm"}
_LAYER_NORMS = {"native_layer_norm", "layer_norm", "rms_norm", "_fused_rms_norm", "native_group_norm"}
_LENGTHS = {"linalg_vector_norm", "norm", "sum", "mean"}
_AROUND_A_LENGTH = {"expand", "clamp_min", "clamp", "sqrt", "rsqrt", "reciprocal", "add", "pow"} | (
    _RESHAPES - {"select", "slice"}
)
_PROBABILITIES = {"_softmax", "_log_softmax", "softmax", "log_softmax", "sigmoid", "log_sigmoid"}
_GATES = {"sigmoid", "hardsigmoid", "hardtanh"}


@dataclass(frozen=True)
class WeightRef:
    """Path to the weights of a linear layer in the model, from which the current weights are read."""

    weight: str  # dotted path of a parameter, buffer or attribute
    transposed: bool
    unit_rows: bool  # whether each class vector is normalized to unit length (cosine classifier)
    bias: str | None

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "WeightRef":
        """Create a reference from its attributes.

        Raises
        ------
        TypeError, ValueError
            The data are invalid.
        """
        ref = cls(**data)
        if not (
            isinstance(ref.weight, str)
            and isinstance(ref.transposed, bool)
            and isinstance(ref.unit_rows, bool)
            and (ref.bias is None or isinstance(ref.bias, str))
        ):
            raise ValueError(f"{dict(data)} does not refer to weights")
        return ref


@dataclass
class Anatomy:
    """The layers found in a trace."""

    kind: Kind
    activation: Node | None
    pooled: Node | None
    embedding: Node | None
    logits: Node | None
    classifier: list[WeightRef] = field(default_factory=list)  # ordered from the logits back
    absent: dict[str, str] = field(default_factory=dict)


def find(trace: Trace, model: nn.Module, layer: str | None = None) -> Anatomy:
    """Find the layers in a model's trace; ``layer`` names the module whose output is the last hidden layer."""
    walk = _Walk()
    output = _choose_output(trace)
    beside = _embedding_beside(trace, output)
    walk.back(beside or output)
    anatomy = _anatomy(walk, beside or output, model)
    if beside is not None:
        anatomy.embedding, anatomy.logits, anatomy.classifier = beside, output, []
        anatomy.absent.pop("embedding", None)
        anatomy.absent["classifier"] = "the logits come from another head than the embedding and its hidden layer"
    if layer is not None:
        _choose_layer(anatomy, trace, layer, walk.read_by_first)
    return anatomy


def same_vector(node: Node) -> Node:
    """Return the earliest value with the same numbers per input, in whatever shape."""
    while base_op(node) in _RESHAPES and node.data:
        parent = node.data[0]
        if (
            parent.value.numel() != node.value.numel()
            or len(parent.value) != len(node.value)
            or not _is_vector(parent)
        ):
            break
        node = parent
    return node


def base_op(node: Node) -> str:
    """Return the name of the operation, without the suffix of in-place operations."""
    return node.op.removesuffix("_")


def is_rectifier(node: Node) -> bool:
    """Return whether a value is the output of a rectifier."""
    op = base_op(node)
    if op == "clamp":
        return len(node.args) > 1 and node.args[1] == 0
    if op == "clamp_min":
        return node.args[1] == 0
    if op == "hardtanh":  # ReLU6
        return len(node.args) > 1 and node.args[1] == 0
    if op == "mul" and len(node.data) == 2:  # x * sigmoid(x), written out
        return any(_is_gate(gate, other) for gate, other in (node.data, node.data[::-1]))
    if op in ("div", "mul") and len(node.data) == 1 and base_op(node.data[0]) == "mul":  # ... / 6
        return len(node.parents) == 1 and is_rectifier(node.data[0])
    if op == "maximum" and len(node.data) == 1:
        return any(not bool(p.value.any()) for p in node.parents if not p.from_input)
    if op == "where" and len(node.data) == 2:  # where(x > 0, x, 0)
        test, x = node.data
        return base_op(test) in ("gt", "ge") and test.data == [x] and test.args[1] == 0
    return op in _RECTIFIERS


def _is_gate(gate: Node, x: Node) -> bool:
    """Return whether a factor is a sigmoid of x, or relu6(x + 3) / 6."""
    while base_op(gate) in ("div", "mul") and len(gate.data) == 1:
        gate = gate.data[0]
    if base_op(gate) not in _GATES or not gate.data:
        return False
    source = gate.data[0]
    return source is x or (base_op(source) == "add" and source.data == [x])


def is_rectified(node: Node) -> bool:
    """Return whether every unit of a value comes from a rectifier through pooling and concatenation alone."""
    results: dict[int, bool] = {}

    def of(node: Node) -> bool:
        if id(node) not in results:
            results[id(node)] = rectified(node)
        return results[id(node)]

    def rectified(node: Node) -> bool:
        op = base_op(node)
        if is_rectifier(node):
            return True
        if op in ("mul", "div") and len(node.data) == 1:  # by one positive number
            return all(
                a > 0 if isinstance(a, (int, float)) else a.value.numel() == 1 and bool(a.value > 0)
                for a in node.args
                if a is not node.data[0]
            ) and of(node.data[0])
        if op == "mul" and len(node.data) == 2:  # squeeze-excite: a positive gate
            return any(_is_positive(gate) and of(x) for gate, x in (node.data, node.data[::-1]))
        if op in _RESHAPES | _POOLS | {"cat", "add"} and node.data:
            return len(node.data) == len(node.parents) and all(of(parent) for parent in node.data)
        return False

    return of(node)


def _is_positive(gate: Node) -> bool:
    while base_op(gate) in _RESHAPES and gate.data:
        gate = gate.data[0]
    return base_op(gate) in ("sigmoid", "hardsigmoid")


class _Walk:
    """The walk back from the logits to the trunk."""

    def __init__(self) -> None:
        self.linears: list[tuple[Node, Node | None]] = []  # with the bias that is added after it, if any
        self.read_by_first: Node | None = None  # input of the linear layer next to the trunk
        self.normalized: Node | None = None  # vector that is divided by its length
        self.normalized_output = False
        self.arithmetic = False  # whether the logits are changed after the last linear layer
        self.broken = ""  # operation between linear layers that their product does not contain
        self.interrupted = ""  # such an operation between the trunk and the linear layers
        self.hidden: Node | None = None
        self.boundary: Node | None = None  # vector at which the trunk ends
        self.layer_norm: Node | None = None

    def back(self, node: Node) -> None:
        """Walk from the output to the first rectified vector, or to the end of the vectors."""
        bias: Node | None = None
        while True:
            node = same_vector(node)
            op = base_op(node)
            following: Node | None = None
            if bias is not None and op not in _LINEARS:
                self.interrupted, bias = "a shift of its units", None
            if is_rectifier(node) and _is_vector(node):
                self.hidden = node
                return
            if (source := _linear_source(node)) is not None:
                own = base_op(node) == "addmm" or len(node.parents) > 2
                self.arithmetic = self.arithmetic or (own and bias is not None)
                self.linears.append((node, bias))
                self.broken = self.broken or self.interrupted
                self.read_by_first, bias, self.interrupted = source, None, ""
                following = source
            elif (source := _normalized_source(node)) is not None:
                if self.linears:
                    self.normalized = self.normalized or source
                else:
                    self.normalized_output, self.normalized = True, source
                self.interrupted = ""  # a factor on the unit vector is a temperature
                following = source
            elif op in ("add", "sub", "rsub", "div", "mul", "neg") and len(node.data) == 1:
                constants = [parent for parent in node.parents if not parent.from_input]
                if op == "add" and constants and constants[0].value.ndim >= 1:
                    bias = constants[0]
                elif not self.linears:
                    self.arithmetic = True
                elif is_rectified(node) and not is_rectifier(same_vector(node.data[0])):
                    self.boundary = node  # the classifier reads a scaled pool of rectified maps
                    return
                else:
                    self.interrupted = "a scaling of its units"
                following = node.data[0]
            elif op in _BATCH_NORMS and _is_vector(node.data[0]):
                self.interrupted, following = "a batch normalization", node.data[0]
            elif op in _LAYER_NORMS:
                self.layer_norm = node
                if _is_vector(node.data[0]):
                    self.interrupted, following = "a layer normalization", node.data[0]
            if following is None or not _is_vector(following):
                self.boundary = node
                return
            node = following


def _anatomy(walk: _Walk, output: Node, model: nn.Module) -> Anatomy:
    logits: Node | None = output
    absent: dict[str, str] = {}
    if walk.normalized_output or not (walk.linears or _is_linear(output)):
        logits = None
        why = "embeddings of unit length" if walk.normalized_output else "features without a classifier"
        absent["logits"] = absent["classifier"] = f"the model returns {why}"
    embedding = walk.normalized
    if embedding is None and len(walk.linears) > 1:
        embedding = _linear_source(walk.linears[0][0])
    if embedding is None:
        absent["embedding"] = "the model has no embedding between its last hidden layer and its classifier"
    read = walk.read_by_first or walk.hidden or walk.boundary
    assert read is not None
    if walk.normalized is not None and _normalized_source(read) is walk.normalized:
        read = walk.normalized
    activation: Node | None = None
    if walk.hidden is not None:
        activation = same_vector(walk.hidden)
        kind: Kind = "hidden" if walk.linears else "pooled"
        pooled = _head_input(walk.hidden) or same_vector(read)
    else:
        assert walk.boundary is not None
        kind, pooled = "none", same_vector(read)
        if is_rectified(walk.boundary) and walk.layer_norm is None and (walk.linears or logits is None):
            kind, activation = "pooled", same_vector(walk.boundary)
        else:
            absent["activation"] = _why_not_rectified(walk.boundary, walk.layer_norm)
    classifier: list[WeightRef] = []
    if logits is not None:
        arithmetic = "arithmetic on the logits (a temperature, a prior)" if walk.arithmetic else ""
        between = (
            (arithmetic if walk.normalized is None else "")
            or walk.broken
            or (walk.interrupted if activation is not None else "")
        )
        if between:
            absent["classifier"] = (
                f"there is {between} between the last hidden layer and the logits, "
                "so the classifier's weights do not apply to the hidden layer"
            )
        else:
            refs = [_weight_ref(node, bias, model) for node, bias in walk.linears]
            if refs and all(ref is not None for ref in refs):
                classifier = [ref for ref in refs if ref is not None]
            else:
                absent["classifier"] = "its weights are neither parameters nor buffers of the model"
    return Anatomy(kind, activation, pooled, embedding, logits, classifier, absent)


def _choose_layer(anatomy: Anatomy, trace: Trace, layer: str, read: Node | None) -> None:
    seen = [io for io in trace.module_io if io.module == layer and io.side == "out"]
    if not seen:
        raise ValueError(f"layer {layer!r} did not run, or returned no tensor, in the model's forward pass")
    last = seen[-1].node
    shape = last.shape
    if not (_is_vector(last) or (len(shape) == 4 and shape[0] == trace.batch)):
        raise ValueError(
            f"layer {layer!r} returns a tensor of shape {shape}; the last hidden layer must be one vector per "
            "input, (n, d), or maps (n, d, height, width), which are averaged over space"
        )
    anatomy.activation = same_vector(last) if _is_vector(last) else last
    anatomy.kind = "chosen"
    anatomy.absent.pop("activation", None)
    if read is None or same_vector(read) is not anatomy.activation:
        anatomy.classifier = []
        anatomy.absent["classifier"] = f"the classifier does not read {layer!r}, the layer that was chosen"


def _choose_output(trace: Trace) -> Node:
    """Return the logits among the outputs of the model."""
    vectors = [
        (slot, node)
        for slot, node in trace.outputs
        if node.value.is_floating_point() and node.value.ndim and len(node.value) == trace.batch
    ]
    # Of all outputs, matrices come first; (n,) is one logit, (n, 1, C) has an axis too many.
    matrices = [(slot, node) for slot, node in vectors if node.value.ndim == 2]
    others = [(slot, same_vector(node)) for slot, node in vectors if node.value.ndim == 1 or _is_vector(node)]
    vectors = matrices or others
    if not vectors:
        shapes = [node.shape for _, node in trace.outputs]
        raise ValueError(f"the model returns no logits or features of shape (n, width), but {shapes}")
    named = [node for slot, node in vectors if slot and slot[-1] == "logits"]
    # If the outputs hold features and the logits made from them, choose the logits.
    ancestors = {id(a) for _, node in vectors for a in _ancestors(node) if a is not node}
    last = [node for _, node in vectors if id(node) not in ancestors]
    plain = [node for node in last if _normalized_source(node) is None and id(same_vector(node)) not in ancestors]
    node = (named or plain or last or [vectors[0][1]])[0]
    while base_op(node) in _PROBABILITIES:
        node = node.data[0]
    return node


def _embedding_beside(trace: Trace, logits: Node) -> Node | None:
    """Return an output named "embedding" from which the logits are not made, if there is one."""
    for slot, node in trace.outputs:
        if slot and slot[-1] == "embedding" and _is_vector(node):
            return None if any(node is other for other in _ancestors(logits)) else node
    return None


def _ancestors(node: Node) -> list[Node]:
    seen: dict[int, Node] = {}
    todo = [node]
    while todo:
        current = todo.pop()
        if id(current) not in seen:
            seen[id(current)] = current
            todo.extend(current.data)
    return list(seen.values())


def _is_vector(node: Node) -> bool:
    """Return whether a value is one vector per input: (n, d), with any number of axes of length 1."""
    shape = node.shape
    return len(shape) >= 2 and max(shape[1:], default=0) * shape[0] == node.value.numel() and shape[1] > 0


def _linear_source(node: Node) -> Node | None:
    """Return the input of the linear layer on vectors whose output the value is, or None."""
    op = base_op(node)
    if op not in _LINEARS or len(node.data) != 1 or not _is_vector(node):
        return None
    data = node.data[0]
    if op in ("convolution", "conv2d"):
        weight = node.parents[1]
        kernel = weight.shape[2:]
        pointwise = all(k == 1 for k in kernel) and weight.shape[1] == data.shape[1]
        return data if pointwise and _is_vector(data) else None
    position = 1 if op == "addmm" else 0
    reads_rows = node.args[position] is data and _is_vector(data)
    return data if reads_rows else None


def _normalized_source(node: Node) -> Node | None:
    """Return x if the value is x divided by its length."""
    if base_op(node) not in ("div", "mul") or len(node.data) != 2:
        return None
    for x, length in (node.data, node.data[::-1]) if base_op(node) == "mul" else (node.data,):
        while base_op(length) in _AROUND_A_LENGTH and length.data:
            length = length.data[0]
        one_per_input = length.value.numel() == len(node.value)
        if base_op(length) in _LENGTHS and one_per_input and x in _ancestors(length):
            return x
    return None


def _is_linear(node: Node) -> bool:
    """Return whether a value comes from linear layers through arithmetic and pooling alone."""
    if base_op(node) in _LINEARS | {"bmm"}:
        return True
    passing = _RESHAPES | _POOLS | {"add", "sub", "mul", "div", "neg"}
    return base_op(node) in passing and bool(node.data) and all(_is_linear(parent) for parent in node.data)


def _head_input(hidden: Node) -> Node | None:
    """Return the input of an MLP head, where its chain of vectors begins; None if that is the model's input."""
    first: Node | None = None
    node = hidden
    while True:
        node = same_vector(node)
        following: Node | None = None
        if (source := _linear_source(node)) is not None:
            first = following = source
        elif is_rectifier(node) or base_op(node) in _BATCH_NORMS | _LAYER_NORMS | {"add", "mul", "div"}:
            following = node.data[0] if len(node.data) == 1 or is_rectifier(node) else None
        if following is None or not _is_vector(following):
            break
        node = following
    while base_op(node) in _RESHAPES and node.data:
        node = node.data[0]
    return None if first is None or node.op == "input" else same_vector(first)


def _why_not_rectified(boundary: Node, layer_norm: Node | None) -> str:
    trunk = boundary
    while base_op(trunk) in _RESHAPES | _POOLS and len(trunk.data) == 1:
        trunk = trunk.data[0]
    if layer_norm is None and base_op(trunk) in _LAYER_NORMS:
        layer_norm = trunk
    if layer_norm is not None:
        where = f" (`{layer_norm.module}`)" if layer_norm.module else ""
        cause = f"a layer normalization{where} before the head cancels the norm"
    else:
        where = f" (from `{trunk.module}`)" if trunk.module else ""
        cause = f"the input of the classifier{where} is not rectified"
    return (
        f"the model has no rectified hidden layer: {cause}. NAN and the other norms of the last hidden layer "
        "do not apply. Train an MLP head with a ReLU on top of the model (paper D.4), choose a rectified layer "
        "with layer=, or use a detector that reads the pooled feature or the logits (KNN, SSD, Energy)"
    )


def _weight_ref(node: Node, bias: Node | None, model: nn.Module) -> WeightRef | None:
    op = base_op(node)
    constants = [parent for parent in node.parents if not parent.from_input]
    if op == "addmm":
        bias, matrix = node.args[0], node.args[2].value.T
    elif op in ("convolution", "conv2d"):
        matrix = constants[0].value.flatten(1)
        bias = constants[1] if len(constants) > 1 else bias
    elif op == "linear":
        matrix = constants[0].value
        bias = constants[1] if len(constants) > 1 else bias
    else:
        matrix = constants[0].value.T
    candidates = _tensors_of(model, node.module)
    # The tensor that was read itself takes precedence over others of equal values.
    root, normalized = _root(constants[-1] if op == "addmm" else constants[0])
    held = {_pointer(root)} if root is not None else set()
    if bias is not None:
        bias_root, _ = _root(bias)
        if bias_root is not None:
            held.add(_pointer(bias_root))
    candidates = dict(sorted(candidates.items(), key=lambda item: _pointer(item[1]) not in held))
    bias_path = None
    if bias is not None:
        wanted = bias.value.reshape(-1)
        bias_path = next((name for name, t in candidates.items() if _equal(t.reshape(-1), wanted)), None)
        if bias_path is None:
            return None
    for name, tensor in candidates.items():
        for transposed in (False, True):
            if tensor.ndim < 2 or (transposed and tensor.ndim != 2):
                continue
            rows = tensor.T if transposed else tensor.flatten(1)
            if rows.shape != matrix.shape:
                continue
            for unit_rows in (True, False) if normalized else (False, True):
                if _equal(_normalize(rows) if unit_rows else rows, matrix):
                    return WeightRef(name, transposed, unit_rows, bias_path)
    return None


def _pointer(tensor: Tensor) -> int:
    return tensor.data_ptr() if tensor.layout == torch.strided else id(tensor)


def _root(constant: Node) -> tuple[Tensor | None, bool]:
    """Return the model's tensor that a weight was reshaped or normalized from, and whether it was normalized."""
    node, normalized = constant, False
    while node.op != "constant":
        if base_op(node) in ("div", "mul"):
            normalized = True
        elif base_op(node) not in _RESHAPES:
            return None, False
        node = node.parents[0]
    return node.value, normalized


def _tensors_of(model: nn.Module, owner: str) -> dict[str, Tensor]:
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


def _normalize(rows: Tensor) -> Tensor:
    return torch.nn.functional.normalize(rows, dim=1)


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(torch.allclose(a.to(b.dtype), b, rtol=1e-3, atol=1e-6))
