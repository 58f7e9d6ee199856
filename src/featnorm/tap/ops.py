"""What one operation of a trace does: a reshape, a rectifier, a linear layer, a division by a length."""

from torch import nn

from featnorm.tap.trace import Node

RESHAPES = {
    "view", "_unsafe_view", "reshape", "_reshape_alias", "flatten", "squeeze", "unsqueeze", "alias", "detach",
    "clone", "contiguous", "_to_copy", "permute", "transpose", "t", "dropout", "native_dropout", "expand",
    "select", "slice", "lift_fresh", "as_strided", "quantize_per_tensor", "dequantize",
}  # fmt: skip
_RECTIFIERS = {
    "relu", "gelu", "silu", "leaky_relu", "hardswish", "elu", "celu", "selu", "mish", "threshold", "hardtanh",
    "prelu", "_prelu_kernel", "rrelu_with_noise", "rrelu", "softplus", "clamp_min", "clamp", "relu6",
    "quantized::linear_relu",
}  # fmt: skip
# Rectifiers whose output is never negative.
_NONNEGATIVE_RECTIFIERS = {"relu", "relu6", "hardtanh", "clamp", "clamp_min", "softplus", "quantized::linear_relu"}
POOLS = {
    "mean", "amax", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "_adaptive_avg_pool2d", "avg_pool1d",
    "avg_pool2d", "_adaptive_avg_pool3d", "avg_pool3d", "adaptive_max_pool2d", "adaptive_max_pool3d",
    "max_pool2d_with_indices", "max_pool3d_with_indices", "max_pool2d", "max", "sum",
}  # fmt: skip
_TRANSPOSES = {"permute", "transpose", "t"}
# Operations that move, select, repeat or interpolate units, and so keep their signs.
_SELECTIONS = {
    "index", "index_select", "gather", "topk", "sort", "median", "kthvalue", "flip", "roll", "repeat",
    "constant_pad_nd", "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "upsample_linear1d",
    "upsample_bilinear2d", "upsample_trilinear3d", "_upsample_bilinear2d_aa",
}  # fmt: skip
QUANTIZED = {"quantized::linear", "quantized::linear_dynamic", "quantized::linear_relu"}
LINEARS = {"mm", "addmm", "bmm", "linear", "matmul", "convolution"} | QUANTIZED
BATCH_NORMS = {
    "native_batch_norm", "_native_batch_norm_legit_no_training", "_native_batch_norm_legit", "cudnn_batch_norm",
    "miopen_batch_norm", "batch_norm",
}  # fmt: skip
LAYER_NORMS = {"native_layer_norm", "layer_norm", "rms_norm", "_fused_rms_norm", "native_group_norm"}
_LENGTHS = {"linalg_vector_norm", "norm", "sum"}
_AROUND_A_LENGTH = {"expand", "clamp_min", "clamp", "sqrt", "rsqrt", "reciprocal", "add", "pow"} | (
    RESHAPES - {"select", "slice"}
)
_GATES = {"sigmoid", "hardsigmoid", "hardtanh"}
_POSITIVE = {"sigmoid", "hardsigmoid", "_softmax", "softmax", "exp", "softplus", "relu", "relu6", "abs", "square"}
_KEEP_A_SIGN = {"add", "mul", "div", "pow", "sqrt", "rsqrt", "reciprocal", "cumsum", "masked_fill", "cat"}
# A floor or an offset this small counts as zero.
_NEARLY_ZERO = 1e-3


def base_op(node: Node) -> str:
    """Return the name of the operation, without the suffix of in-place operations."""
    return node.op.removesuffix("_")


def ancestors(node: Node) -> list[Node]:
    """Return a value and all values it was made from that depend on the input."""
    seen: dict[int, Node] = {}
    todo = [node]
    while todo:
        current = todo.pop()
        if id(current) not in seen:
            seen[id(current)] = current
            todo.extend(current.data)
    return list(seen.values())


def is_vector(node: Node) -> bool:
    """Return whether a value is one vector per input: (n, d), with any number of axes of length 1."""
    shape = node.shape
    return len(shape) >= 2 and max(shape[1:], default=0) * shape[0] == node.value.numel() and shape[1] > 0


def same_vector(node: Node) -> Node:
    """Return the earliest value with the same numbers per input, in whatever shape."""
    while (base_op(node) in RESHAPES or _is_own_abs(node)) and node.data:
        parent = node.data[0]
        if (
            parent.value.numel() != node.value.numel()
            or len(parent.value) != len(node.value)
            or not is_vector(parent)
        ):
            break
        node = parent
    return node


def same_value(node: Node) -> Node:
    """Return the earliest value with the same numbers, in whatever shape for a vector, else in the same shape."""
    if is_vector(node):
        return same_vector(node)
    while base_op(node) in RESHAPES - _TRANSPOSES and node.data and node.data[0].shape == node.shape:
        node = node.data[0]
    return node


def numbers(node: Node) -> list[float]:
    """Return the Python numbers among the arguments."""
    return [float(arg) for arg in node.args if isinstance(arg, (int, float)) and not isinstance(arg, bool)]


# --- rectifiers ------------------------------------------------------------------------------------------------


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
        return any(_is_own_gate(gate, other) for gate, other in (node.data, node.data[::-1]))
    if op in ("div", "mul") and len(node.data) == 1 and base_op(node.data[0]) == "mul":  # ... / 6
        return len(node.parents) == 1 and is_rectifier(node.data[0])
    if op == "maximum" and len(node.data) == 1:
        return any(not bool(p.value.any()) for p in node.parents if not p.from_input)
    if op == "where" and len(node.data) == 2:  # where(x > 0, x, 0)
        test, x = node.data
        return base_op(test) in ("gt", "ge") and test.data == [x] and test.args[1] == 0
    return op in _RECTIFIERS


def is_squared_rectifier(node: Node) -> bool:
    """Return whether a value is a power, such as the square, of the output of a rectifier that is not negative."""
    return bool(node.data) and _base_of_power(node) is not None and _is_nonnegative_rectifier(node.data[0])


def _base_of_power(node: Node) -> Node | None:
    op = base_op(node)
    if op in ("sqrt", "square") or (op == "pow" and len(node.parents) == 1 and all(p > 0 for p in numbers(node))):
        return node.data[0]
    return node.data[0] if op == "mul" and len(node.data) == 2 and node.data[0] is node.data[1] else None


def _is_nonnegative_rectifier(node: Node) -> bool:
    return is_rectifier(node) and base_op(node) in _NONNEGATIVE_RECTIFIERS


def _is_own_gate(gate: Node, x: Node) -> bool:
    """Return whether a factor is a sigmoid of x, or relu6(x + 3) / 6."""
    while base_op(gate) in ("div", "mul") and len(gate.data) == 1:
        gate = gate.data[0]
    if base_op(gate) not in _GATES or not gate.data:
        return False
    source = gate.data[0]
    return source is x or (base_op(source) == "add" and source.data == [x])


def is_rectified(node: Node) -> bool:
    """Return whether every unit of a value comes from a rectifier through operations that keep its sign."""
    return unrectified(node) is None


def unrectified(node: Node) -> Node | None:
    """Return the first value, going back, whose operation neither rectifies nor keeps signs, or None."""
    results: dict[int, Node | None] = {}

    def of(node: Node) -> Node | None:
        if id(node) not in results:
            results[id(node)] = search(node)
        return results[id(node)]

    def search(node: Node) -> Node | None:
        if is_rectifier(node):
            return None
        parents = _keeps_signs_of(node)
        return node if parents is None else next((bad for parent in parents if (bad := of(parent))), None)

    return of(node)


def _keeps_signs_of(node: Node) -> list[Node] | None:
    """Return the parents of which a value has the signs: a unit is off if it is off in all of them."""
    op = base_op(node)
    data = node.data
    if not data:
        return None
    constants = [parent for parent in node.parents if not parent.from_input]
    if op in RESHAPES | _SELECTIONS or _is_own_abs(node):
        return data[:1]
    if op in POOLS | {"cat", "stack"}:
        return data if not constants else None
    if op == "add":
        return data if not constants and all(0 <= a <= _NEARLY_ZERO for a in numbers(node)[:1]) else None
    if op in ("clamp", "clamp_min", "clamp_max", "minimum") and len(data) == 1:
        floor = node.args[1] if op in ("clamp", "clamp_min") else None
        return data if floor is None or (isinstance(floor, (int, float)) and 0 <= floor <= _NEARLY_ZERO) else None
    if (base := _base_of_power(node)) is not None:
        return [base] if _is_nonnegative(base) else None
    if op == "pow" and len(data) == 1 and all(_is_nonnegative(parent) for parent in node.parents):
        return data if node.args[0] is data[0] else None  # with a learned exponent
    if op in ("masked_fill", "where"):
        filling = [c for c in constants if c.value.is_floating_point()]
        low = all(number <= 0 for number in numbers(node)) and not any((c.value > 0).any() for c in filling)
        return [parent for parent in data if parent.value.is_floating_point()] if low else None
    if op in ("mul", "div", "bmm", "matmul") and len(node.parents) == 1:
        return data if all(number > 0 for number in numbers(node)) else None
    if op in ("mul", "div", "bmm", "matmul") and len(node.parents) == 2:
        a, b = node.parents
        pairs = ((a, b), (b, a)) if op != "div" else ((a, b),)
        # Weights of attention, a mask, a positive gate (squeeze-excite), one positive number.
        return next(([x] for x, gate in pairs if x.from_input and (_is_gate(gate) or is_mask(node))), None)
    if op in ("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_attention_math"):
        return data[2:3]  # weighted means of its values
    return None


def is_mask(node: Node) -> bool:
    """Return whether a value is another one times, or divided by, constants >= 0 that are not trained."""
    op, data, parents = base_op(node), node.data, node.parents
    if (
        op not in ("mul", "div")
        or len(data) != 1
        or len(parents) != 2
        or (op == "div" and data[0] is not parents[0])
    ):
        return False
    root = constant = parents[1] if data[0] is parents[0] else parents[0]
    while base_op(root) in RESHAPES and root.parents:
        root = root.parents[0]
    low = constant.value > 0 if op == "div" else constant.value >= 0
    return not isinstance(root.value, nn.Parameter) and bool(low.all() and constant.value.any())


def _is_own_abs(node: Node) -> bool:
    """Return whether a value is the absolute value of what is never negative."""
    return base_op(node) == "abs" and bool(node.data) and _is_nonnegative(node.data[0])


def _is_gate(node: Node) -> bool:
    if not node.from_input:
        return node.value.numel() == 1 and bool(node.value > 0)
    return _is_nonnegative(node) and not is_rectified(node)


def _is_nonnegative(node: Node) -> bool:
    """Return whether a value is never negative, whatever the input is."""
    op = base_op(node)
    if not node.from_input:
        return bool((node.value >= 0).all())
    if not node.value.is_floating_point():
        return not node.value.dtype.is_signed or bool((node.value >= 0).all())  # a mask, a length
    if op in _POSITIVE or _is_nonnegative_rectifier(node):
        return True
    if op in ("clamp", "clamp_min") and isinstance(node.args[1], (int, float)) and node.args[1] >= 0:
        return True
    if op == "pow" and numbers(node)[:1] == [2.0]:
        return True
    if op in RESHAPES | _SELECTIONS:
        return bool(node.data) and _is_nonnegative(node.data[0])
    passing = op in POOLS or (op in _KEEP_A_SIGN and all(number >= 0 for number in numbers(node)[:1]))
    return passing and all(map(_is_nonnegative, node.parents))


# --- linear layers -----------------------------------------------------------------------------------------------


def linear_layer(node: Node) -> Node | None:
    """Return the operation of the linear layer whose output a value is, for vectors or at every position, or None.

    Positions are tokens (n, ..., C) of a linear layer, or pixels (n, C, ...) of a 1x1 convolution.
    """
    vector = is_vector(node)
    layer = node
    while base_op(layer) in RESHAPES and (parent := _reshaped(layer)) is not None:
        if not vector and not _keeps_units_last(layer, parent):
            return None
        layer = parent
    return layer if base_op(layer) in LINEARS and len(layer.data) == 1 else None


def _reshaped(node: Node) -> Node | None:
    """Return the value whose numbers are reshaped, or None."""
    if base_op(node) not in RESHAPES or not node.data or node.data[0].value.numel() != node.value.numel():
        return None
    return node.data[0]


def _keeps_units_last(node: Node, parent: Node) -> bool:
    # `einsum` moves an axis of length 1 past the last one.
    if base_op(node) == "permute":
        order = [dim for dim in node.args[1] if parent.shape[dim] != 1]
        return order == sorted(order)
    lengths = [[length for length in value.shape if length != 1] for value in (node, parent)]
    return base_op(node) not in ("transpose", "t") and lengths[0][-1:] == lengths[1][-1:]


def linear_source(node: Node) -> Node | None:
    """Return the input of the linear layer whose output a value is, for vectors or at every position, or None."""
    layer = linear_layer(node)
    if layer is None:
        return None
    op, vector = base_op(layer), is_vector(node)
    data: Node | None = layer.data[0]
    assert data is not None
    if op == "convolution":
        weight = layer.parents[1]
        transposed = layer.args[6]
        pointwise = all(k == 1 for k in weight.shape[2:]) and weight.shape[1] == data.shape[1] and not transposed
        return same_value(data) if pointwise and (is_vector(data) if vector else layer is node) else None
    at = layer.args.index(data) - (op == "addmm")
    if at == 1 and vector and base_op(data) in ("t", "transpose", "permute"):  # W x: the inputs are columns
        data = data.data[0]
    elif at != 0:
        return None
    shape = (*node.shape[:-1], data.shape[-1])
    while data is not None and not (
        is_vector(data) and len(data.value) == len(node.value) if vector else data.shape == shape
    ):
        data = _reshaped(data)
    return None if data is None else same_value(data)


def affine_source(node: Node) -> Node | None:
    """Return the nearest vector of which a vector is a linear map: by a linear layer, or one with adapters."""
    node = same_value(node)
    if (source := linear_source(node)) is not None:
        return source
    op, data = base_op(node), node.data
    if op in ("mul", "div") and len(node.parents) == 1:
        return affine_source(data[0]) if data and numbers(node) else None
    if op in ("add", "sub") and len(data) == 1 and len(node.parents) == 2:
        return affine_source(data[0])  # a bias
    if op in ("add", "sub") and len(data) > 1:
        return common_source([affine_sources(term) for term in data])
    return None


def affine_sources(node: Node) -> list[Node]:
    """Return the vectors of which a vector is a linear map, nearest first, also through batch normalization."""
    found: list[Node] = []
    while True:
        source = affine_source(node)
        if source is None and base_op(node) in BATCH_NORMS and is_vector(node):
            source = same_value(node.data[0])
        if source is None:
            return found
        found.append(source)
        node = source


def common_source(lists: list[list[Node]]) -> Node | None:
    """Return the first of the vectors that are in all lists, or None."""
    return next((node for node in lists[0] if all(node in other for other in lists)), None)


def stacked_terms(node: Node) -> list[Node] | None:
    """Return the values that are stacked and then summed or averaged, or None."""
    stack = node.data[0] if base_op(node) in ("sum", "mean") and node.data else node
    if base_op(stack) != "stack" or len(node.args) < 2:
        return None
    dim = stack.args[1] if len(stack.args) > 1 else 0
    own = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    return stack.data if own in ((dim,), (dim - stack.value.ndim,), (dim + stack.value.ndim,)) else None


def normalized_source(node: Node) -> Node | None:
    """Return x if the value is x divided by its length."""
    return _divided_by(node, _LENGTHS)


def rms_source(node: Node) -> Node | None:
    """Return x if the value is x divided by the root of the mean of its squares (RMSNorm)."""
    return _divided_by(node, {"mean"})


def _divided_by(node: Node, lengths: set[str]) -> Node | None:
    if base_op(node) not in ("div", "mul") or len(node.data) != 2:
        return None
    for x, length in (node.data, node.data[::-1]) if base_op(node) == "mul" else (node.data,):
        while base_op(length) in _AROUND_A_LENGTH and length.data:
            length = length.data[0]
        units = node.value.numel() // max(length.value.numel(), 1)
        one_per_input = units > 1 and (units in node.shape or length.value.numel() == len(node.value))
        if base_op(length) in lengths and one_per_input and x in ancestors(length):
            return x
    return None
