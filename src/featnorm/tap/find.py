"""Finds the last hidden layer, pooled feature, embedding and logits in the trace of a forward pass.

The search walks back from the logits through the values they were computed from. Names and the order of
registration of modules do not matter, and function calls are found like modules.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor, nn

from featnorm.models import ProjectionHead
from featnorm.tap.ops import (
    BATCH_NORMS,
    LAYER_NORMS,
    LINEARS,
    POOLS,
    RESHAPES,
    affine_source,
    affine_sources,
    ancestors,
    base_op,
    common_source,
    is_mask,
    is_rectified,
    is_rectifier,
    is_squared_rectifier,
    is_vector,
    linear_layer,
    linear_source,
    normalized_source,
    rms_source,
    same_value,
    same_vector,
    stacked_terms,
    unrectified,
)
from featnorm.tap.trace import Node, Trace
from featnorm.tap.weights import NotLinearError, Step, linear_map

Kind = Literal["hidden", "pooled", "none", "chosen", "positions"]
Per = Literal["input", "position", "box"]
"""What a row of features is of."""
Pooling = Literal["mean", "norm"]
"""How the positions of a unit become one number: their mean, or the L2 norm of their positive parts."""

PROBABILITIES = {"_softmax", "_log_softmax", "softmax", "log_softmax", "sigmoid", "log_sigmoid"}
_AVERAGES = {
    "mean", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d",
    "avg_pool1d", "avg_pool2d", "avg_pool3d",
}  # fmt: skip
_SELECTIONS = {"select", "slice", "index", "index_select", "gather"}
# Operations over positions that do the same to the input of a linear layer as to its output.
_REPLAYED = {
    "mean",
    "sum",
    "squeeze",
    "unsqueeze",
    "transpose",
    "permute",
    "clone",
    "alias",
    "detach",
} | _SELECTIONS
_BOUNDS = {"tanh", "softplus", "softsign", "exp", "log", "clamp", "clamp_max", "minimum"}
ARITHMETIC = {"add", "sub", "rsub", "mul", "div", "neg"}
_NEVER_RECTIFIED = (
    LINEARS | BATCH_NORMS | ARITHMETIC | _BOUNDS | {"input", "sin", "cos", "abs", "sigmoid", "_softmax"}
)


@dataclass(frozen=True, eq=False)
class Part:
    """A value in a trace that is, alone or beside others, a field of the features.

    ``chain`` holds the operations over positions by which the model reduces its class scores, and which reduce the
    value too. Otherwise, ``axis`` is the axis of the units if the others are pooled, except ``inputs``, that of
    the inputs. Without ``pooling``, every position is kept.
    """

    node: Node
    chain: tuple[Node, ...] = ()
    axis: int | None = None
    inputs: int = 0
    pooling: Pooling | None = "mean"


@dataclass
class Anatomy:
    """The layers found in a trace. The parts of a field are concatenated; a field without parts is absent."""

    kind: Kind
    activation: list[Part]
    pooled: list[Part]
    embedding: list[Part]
    logits: list[Part]
    classifier: list[Step] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)
    norm: str = ""  # normalization between the last hidden layer and the classifier
    output: str = ""  # path of the logits in what the model returns
    others: list[str] = field(default_factory=list)  # paths of the model's other heads


def find(
    trace: Trace,
    model: nn.Module,
    layer: str | None = None,
    channel_axis: int | None = None,
    pooling: Pooling = "mean",
) -> Anatomy:
    """Find the layers in a model's trace.

    Parameters
    ----------
    trace, model : the trace of the model.
    layer : name of the module whose output is the last hidden layer. Default: found.
    channel_axis : axis of the units in the output of ``layer``. Default: found.
    pooling : how the positions of the output of ``layer`` become one number per unit.
    """
    output, named, paths = _choose_output(trace, model)
    beside = _embedding_beside(trace, output)
    anatomy = _anatomy(beside or output, named and beside is None, model)
    anatomy.output, *anatomy.others = paths
    if beside is not None:
        anatomy.embedding, anatomy.logits, anatomy.classifier = [Part(beside)], [Part(output)], []
        anatomy.absent.pop("embedding", None)
        anatomy.absent["classifier"] = "the logits come from another head than the embedding and its hidden layer"
    if layer is not None:
        _choose_layer(anatomy, trace, model, layer, channel_axis, pooling)
    return anatomy


@dataclass(eq=False)
class _Head:
    """A linear layer whose output, or whose class scores over positions, are added up in the logits."""

    output: Node
    source: Node
    chain: tuple[Node, ...]  # operations between its output and the sum, in the order of execution

    def part(self, n: int) -> tuple[Part, list[Node]]:
        """Return the input of the head for n inputs, reduced as the class scores are, and these reductions."""
        source = self.source
        if is_vector(source) and len(source.value) == n:
            return Part(source), []
        layer = linear_layer(self.output) or self.output
        axis = 1 if base_op(layer) == "convolution" else source.value.ndim - 1
        inputs = _inputs_axis(self.chain, source, axis, n)
        averaged = Part(source, axis=axis, inputs=inputs)
        names = {base_op(node) for node in self.chain} - ARITHMETIC
        # A sum needs the weights and the division that make it a mean.
        weights = {
            n for n in self.chain if base_op(n) in ("mul", "div") and (len(n.data) > 1 and not is_vector(n))
        }
        weights |= {n for n in self.chain if base_op(n) in ("mul", "div") and "sum" in names}
        averages = [node for node in self.chain if base_op(node) in _AVERAGES | (RESHAPES - _SELECTIONS)]
        classes = self.output.shape[1 if axis == 1 else -1]
        if any(len(v.value) == n and v.value.numel() != n * classes for v in self.chain if is_vector(v)):
            return averaged, []  # some classes are selected
        if names <= set(map(base_op, averages)) and not weights and inputs == 0:
            return averaged, averages
        chain = [node for node in self.chain if base_op(node) in names or node in weights]
        if names <= _REPLAYED and (weight := _total_weight(chain, source, n * source.shape[axis])) is not None:
            return Part(source, tuple(chain)), chain if abs(weight - 1) < 1e-2 else []
        return averaged, averages


class _Heads:
    """The search for the linear layers whose outputs are added up in the logits."""

    def __init__(self, n: int, named: bool) -> None:
        self.n = n  # number of inputs
        self.named = named  # whether the output is known to be logits, whatever operation makes it
        self.stopped: Node | None = None
        self._failed: set[Node] = set()

    def of(self, node: Node, chain: tuple[Node, ...] = ()) -> list[_Head] | None:
        """Return the heads, or None if the value is no sum of their outputs."""
        node = same_value(node)
        op, data = base_op(node), node.data
        if (source := linear_source(node)) is not None:
            return [_Head(node, source, chain)]
        if op == "convolution" and not is_vector(node) and chain:  # of more than one pixel
            return [_Head(node, same_value(data[0]), chain)]
        if data and node not in self._failed and normalized_source(node) is None:
            terms = data if op in ("add", "sub") and len(data) > 1 else stacked_terms(node)
            if terms is not None:
                found = [self.of(term, chain) for term in terms]
                if any(found) and not _is_residual(terms, found):
                    return [head for heads in found for head in heads or ()]
            elif op == "cat" and is_vector(node):
                parts = [self.of(part, chain) for part in data]
                if all(parts):
                    return [head for heads in parts for head in heads or ()]
            elif (scores := self._scores(node)) is not None:
                return self.of(scores, (node, *chain))
        self.stopped = self.stopped or node
        self.named = self.named or _is_distance(node)
        self._failed.add(node)
        return None

    def _scores(self, node: Node) -> Node | None:
        """Return the class scores that an operation scales, shifts, masks, or reduces over positions, or None."""
        op, data = base_op(node), node.data
        if op in ARITHMETIC and len(data) == 1:
            return data[0]
        if op in ("mul", "div") and len(data) == 2:  # by one number per input or position
            large, small = sorted(data, key=lambda parent: -parent.value.numel())
            classes = large.value.numel() // max(small.value.numel(), 1)
            return large if classes > 1 and classes in large.shape and (op == "mul" or large is data[0]) else None
        if op in POOLS | _SELECTIONS | RESHAPES:
            shape = data[0].shape
            has_positions = (
                not is_vector(data[0]) or shape[0] != self.n or node.value.numel() == torch.Size(shape).numel()
            )
            return data[0] if has_positions or op in _SELECTIONS else None
        if op in ("masked_fill", "where"):
            return next((parent for parent in data if parent.value.is_floating_point()), None)
        return data[0] if self.named and (op in _BOUNDS or is_rectifier(node)) else None


def _is_residual(terms: list[Node], found: list[list[_Head] | None]) -> bool:
    """Return whether one term of a sum is read to make another: a residual connection and not a sum of heads."""
    ends = [{head.source for head in heads} if heads else {term} for term, heads in zip(terms, found, strict=True)]
    read = [{id(node) for end in group for node in ancestors(end)} for group in ends]
    return any(id(same_value(a)) in read[j] for i, a in enumerate(terms) for j in range(len(terms)) if i != j)


def _is_distance(node: Node) -> bool:
    """Return whether a value is a distance of every input from every prototype, which is a parameter's row."""
    if base_op(node) in ("_cdist_forward", "_euclidean_dist"):
        return len(node.data) == 1
    while (
        base_op(node) in {"linalg_vector_norm", "sum", "mean", "sqrt", "pow", "abs", "square", "mul"} and node.data
    ):
        node = node.data[0]
    shape = node.shape
    others = [parent for parent in node.parents if not parent.from_input]
    return base_op(node) == "sub" and len(shape) == 3 and any(other.shape[-2:] == shape[1:] for other in others)


def replayed(chain: Iterable[Node], value: Tensor) -> Tensor | None:
    """Return a value after the operations of a chain, or None if they fail on it."""
    try:
        for node in chain:
            value = node.run({node.data[0]: value})
    except (RuntimeError, IndexError):
        return None
    return value


def _total_weight(chain: Iterable[Node], source: Node, numbers: int) -> float | None:
    """Return the total weight with which a chain adds up positions, or None unless so many numbers remain."""
    value = replayed(chain, torch.ones_like(source.value))
    return None if value is None or value.numel() != numbers else float(value.mean())


def _inputs_axis(chain: Iterable[Node], source: Node, axis: int, n: int) -> int:
    """Return the axis of the n inputs in what a head reads: 1 if its positions come first, or else 0.

    Sequences may have as many positions as there are inputs. Numbers that differ along the axis of the inputs
    alone are, after the chain, in the order of the inputs.
    """
    if axis != 2 or source.value.ndim != 3 or source.shape[1] != n:
        return 0
    reductions = [node for node in chain if base_op(node) in POOLS | _SELECTIONS | RESHAPES]
    order = torch.arange(1.0, n + 1, device=source.value.device)
    numbers = torch.zeros_like(source.value, dtype=order.dtype) + order[:, None]
    ends = [replayed(reductions, value) for value in (numbers, torch.ones_like(numbers))]
    if ends[0] is None or ends[1] is None or len(ends[0]) != n:
        return 0
    by_input = (ends[0] / ends[1]).reshape(n, -1)
    return int(torch.allclose(by_input, order[:, None].expand_as(by_input)))


class _Walk:
    """The walk back through vectors, from the input of the classifier or from the features, to the trunk."""

    def __init__(self, node: Node) -> None:
        self.linears = 0
        self.read: Node | None = None  # input of the linear layer next to the trunk
        self.normalized: Node | None = None  # vector that is divided by its length
        self.hidden: Node | None = None
        self.boundary: Node | None = None  # vector at which the trunk ends
        self.layer_norm: Node | None = None
        self.norm: Node | None = None  # last normalization before the classifier
        while True:
            node = same_vector(node)
            op = base_op(node)
            following: Node | None = None
            if is_vector(node) and (is_rectifier(node) or is_squared_rectifier(node)):
                self.hidden = node
                return
            if (source := affine_source(node)) is not None:
                self.linears += 1
                self.read = following = source
            elif (source := normalized_source(node)) is not None:
                self.normalized = self.normalized or source
                following = source
            elif (source := rms_source(node)) is not None:
                self.layer_norm = self.norm = node
                following = source
            elif is_mask(node) and is_rectifier(same_vector(node.data[0])):
                self.hidden = node
                return
            elif op in ARITHMETIC and len(node.data) == 1:
                if is_rectified(node) and not is_rectifier(same_vector(node.data[0])):
                    self.boundary = node  # the classifier reads a scaled pool of rectified maps
                    return
                following = node.data[0]
            elif op in BATCH_NORMS | LAYER_NORMS:
                if op in LAYER_NORMS:
                    self.layer_norm = node
                if is_vector(node.data[0]):
                    self.norm, following = node, node.data[0]
            if following is None or not is_vector(following):
                self.boundary = node
                return
            node = following


def _anatomy(output: Node, named: bool, model: nn.Module) -> Anatomy:
    search = _Heads(len(output.value), named)
    heads = search.of(output)
    named = search.named
    anatomy = Anatomy("none", [], [], [], [Part(output)])
    absent = anatomy.absent
    if heads is None and named:
        assert search.stopped is not None
        why = f"the search for the classifier's input stopped at {place(search.stopped)}, which it cannot follow"
        absent.update(activation=f"{why}. {_ADVICE}", pooled=why, embedding=why, classifier=why)
        return anatomy
    chain: list[Node] = []
    walk: _Walk | None = None
    if heads is None:
        normalized = normalized_source(output)
        why = "features without a classifier" if normalized is None else "embeddings of unit length"
        anatomy.logits = []
        stopped = "" if search.stopped is None else f" ({place(search.stopped)} is not a linear layer)"
        absent["logits"] = absent["classifier"] = f"the model returns {why}{stopped}"
        read, walk = output, _Walk(output)
    else:
        parts, chain = _parts(heads, search.n)
        if len(parts) > 1 or not is_vector(parts[0].node):
            anatomy.pooled = parts
        else:
            read = parts[0].node
            walk = _Walk(read)
    if walk is None:
        blocking = [node for part in anatomy.pooled if (node := unrectified(part.node)) is not None]
        if blocking:
            absent["activation"] = why_not_rectified(blocking[0], None)
        else:
            hidden = all(is_vector(part.node) and is_rectifier(part.node) for part in anatomy.pooled)
            anatomy.kind, anatomy.activation = "hidden" if hidden else "pooled", anatomy.pooled
        absent["embedding"] = _NO_EMBEDDING
    else:
        _fill(anatomy, walk, read, heads is not None, model)
    if anatomy.logits:
        sources = [part.node for part in anatomy.activation or anatomy.pooled]
        cosine = walk is not None and walk.normalized is not None
        _set_classifier(anatomy, output, sources, chain, cosine, model)
    return anatomy


_NO_EMBEDDING = "the model has no embedding between its last hidden layer and its classifier"
_ADVICE = (
    "NAN and the other norms of the last hidden layer do not apply. Train an MLP head with a ReLU on top of the "
    "model (paper D.4), choose a rectified layer with layer=, or use a detector that reads the pooled feature or "
    "the logits (KNN, SSD, Energy)"
)


def _parts(heads: list[_Head], n: int) -> tuple[list[Part], list[Node]]:
    """Return what the heads read, and the reductions over positions that the classifier may pass over.

    If all heads read one value, directly or through further linear layers, it is the only part.
    """
    parts: dict[tuple[Node, tuple[Node, ...]], Part] = {}
    chain: list[Node] = []
    for head in heads:
        part, reductions = head.part(n)
        chain += reductions
        node = part.node
        while len(heads) > 1 and base_op(node) in BATCH_NORMS and is_vector(node) and is_vector(node.data[0]):
            node = same_vector(node.data[0])
        parts.setdefault((node, part.chain), replace(part, node=node))
    found = list(parts.values())
    common = common_source([[part.node, *affine_sources(part.node)] for part in found])
    if common is not None and len({(part.chain, part.axis, part.inputs) for part in found}) == 1:
        return [replace(found[0], node=common)], chain
    # What a head reads at every position is left out beside heads that read one vector (token labeling of VOLO).
    return [part for part in found if is_vector(part.node)] or found, chain


def _fill(anatomy: Anatomy, walk: _Walk, read: Node, has_head: bool, model: nn.Module) -> None:
    """Set the fields of a model whose heads read one vector, or which returns features."""
    absent = anatomy.absent
    embedding = walk.normalized or (read if has_head and walk.linears else None)
    anatomy.embedding = [] if embedding is None else [Part(embedding)]
    if embedding is None:
        absent["embedding"] = _NO_EMBEDDING
    if walk.read is not None:
        read = walk.read
    elif walk.hidden is not None and walk.norm is None and not has_head:
        read = walk.hidden
    if walk.normalized is not None and normalized_source(read) is walk.normalized:
        read = walk.normalized
    while base_op(read) in BATCH_NORMS and is_vector(read.data[0]) and has_head:
        read = same_vector(read.data[0])
    anatomy.pooled = [Part(same_vector(read))]
    if walk.norm is not None:
        anatomy.norm = place(walk.norm)
    if walk.hidden is not None:
        anatomy.activation = [Part(same_vector(walk.hidden))]
        anatomy.kind = "hidden" if has_head or walk.linears else "pooled"
        head = _head_input(walk.hidden, model)
        anatomy.pooled = anatomy.pooled if head is None else [Part(head)]
        return
    assert walk.boundary is not None
    if is_rectified(walk.boundary) and walk.layer_norm is None:
        anatomy.kind, anatomy.activation = "pooled", [Part(same_vector(walk.boundary))]
    else:
        absent["activation"] = why_not_rectified(walk.boundary, walk.layer_norm)


def _set_classifier(
    anatomy: Anatomy, logits: Node, sources: list[Node], chain: list[Node], cosine: bool, model: nn.Module
) -> None:
    try:
        if len(set(sources)) < len(sources):
            raise NotLinearError("a sum over positions")
        anatomy.classifier = linear_map(logits, sources, chain, cosine, model)
    except NotLinearError as error:
        anatomy.absent["classifier"] = (
            f"there is {error} between the last hidden layer and the logits, "
            "so the classifier's weights do not apply to the hidden layer"
        )
    else:
        anatomy.absent.pop("classifier", None)


def _choose_layer(
    anatomy: Anatomy, trace: Trace, model: nn.Module, layer: str, channel_axis: int | None, pooling: Pooling
) -> None:
    seen = [io for io in trace.module_io if io.module == layer and io.side == "out"]
    if not seen:
        raise ValueError(f"layer {layer!r} did not run, or returned no tensor, in the model's forward pass")
    node = next(io.node for io in seen if io.call == seen[-1].call)  # of several, the first, as of `torch.nn.LSTM`
    shape = node.shape
    if len(shape) < 2 or shape[0] != trace.batch or not node.value.is_floating_point():
        raise ValueError(
            f"layer {layer!r} returns a tensor of shape {shape}; the last hidden layer must be one vector per "
            "input, (n, d), or tokens or maps, which are averaged over their positions"
        )
    axis = unit_axis(node, model.get_submodule(layer)) if channel_axis is None else channel_axis
    if axis is None and not is_vector(node):
        raise ValueError(
            f"layer {layer!r} returns a tensor of shape {shape}, and which axis holds its units is not known: "
            "pass channel_axis=1 for maps (n, d, ...), or channel_axis=-1 for tokens (n, ..., d)"
        )
    if axis is not None and (axis == 0 or not -len(shape) < axis < len(shape)):
        raise ValueError(f"channel_axis is {axis}, and layer {layer!r} returns a tensor of shape {shape}")
    if pooling == "norm" and (axis is None or len(shape) == 2):
        raise ValueError(
            f"layer {layer!r} returns a tensor of shape {shape}, without positions: pooling='norm' is for maps "
            "and tokens"
        )
    # Maps of one pixel are vectors, until a larger image comes.
    chosen = (
        Part(same_vector(node))
        if axis is None or len(shape) == 2
        else Part(node, axis=axis % len(shape), pooling=pooling)
    )
    anatomy.activation = [chosen]
    anatomy.kind = "chosen"
    anatomy.absent.pop("activation", None)
    anatomy.classifier = []
    if anatomy.logits and pooling == "mean":
        _set_classifier(anatomy, anatomy.logits[0].node, [same_value(node)], [], False, model)
    if not anatomy.classifier:
        anatomy.absent["classifier"] = f"the classifier does not read {layer!r}, the layer that was chosen"


_FIRST = (
    nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.modules.pooling._AdaptiveAvgPoolNd,
    nn.modules.pooling._AdaptiveMaxPoolNd, nn.modules.pooling._AvgPoolNd, nn.modules.pooling._MaxPoolNd,
)  # fmt: skip
_LAST = (
    nn.Linear, nn.Embedding, nn.RNNBase, nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerEncoder,
)  # fmt: skip


def unit_axis(node: Node, module: nn.Module | None = None) -> int | None:
    """Return the axis of the units of tokens or maps, as the module or the operations before it imply, or None."""
    if isinstance(module, _FIRST):
        return 1
    if isinstance(module, _LAST):
        return node.value.ndim - 1
    op, shape = base_op(node), node.shape
    if op in ("bmm", "_softmax") or op.startswith("_scaled_dot_product"):
        return None
    if op in ("convolution", "native_group_norm") or op in BATCH_NORMS:
        return 1
    last = ("embedding", "mkldnn_rnn_layer", "mm", "addmm", "linear")
    if op in last or (op in LAYER_NORMS and len(node.args[1]) == 1):
        return len(shape) - 1
    parents = [parent for parent in node.data if parent.value.is_floating_point() and parent.value.ndim >= 2]
    for parent in parents:
        axis = unit_axis(parent)
        if axis is not None:
            return _moved(node, parent, axis)
    return None


def _moved(node: Node, parent: Node, axis: int) -> int | None:
    """Return the axis at which an operation puts an axis of its argument, or None."""
    op, shape, old = base_op(node), node.shape, parent.shape
    if op == "permute":
        return [dim % len(old) for dim in node.args[1]].index(axis)
    if op in ("transpose", "t"):
        a, b = (dim % len(old) for dim in (node.args[1:3] if op == "transpose" else (0, 1)))
        return {a: b, b: a}.get(axis, axis)
    if op == "select":
        dim = node.args[1] % len(old)
        return None if dim == axis else axis - (dim < axis)
    if len(shape) == len(old) and op not in RESHAPES:
        return axis
    if node.value.numel() == parent.value.numel():
        # The axis of the same length with as many numbers before it.
        before = _product(old[:axis])
        return next(
            (i for i in range(len(shape)) if _product(shape[:i]) == before and shape[i] == old[axis]), None
        )
    return axis if len(shape) == len(old) and shape[axis] == old[axis] else None


def _product(lengths: Iterable[int]) -> int:
    return torch.Size(lengths).numel()


def _choose_output(trace: Trace, model: nn.Module) -> tuple[Node, bool, list[str]]:
    """Return the logits among the outputs of the model, whether they are so called, and paths of all heads.

    The path of the logits comes first. They are so called by their name, or by their width, if it is the number of
    classes that the model holds.
    """
    vectors = [
        (slot, node)
        for slot, node in trace.outputs
        if node.value.is_floating_point() and node.value.ndim and len(node.value) == trace.batch
    ]
    # Of all outputs, matrices come first; (n,) is one logit, (n, 1, C) has an axis too many.
    matrices = [(slot, node) for slot, node in vectors if node.value.ndim == 2]
    columns = [(slot, same_vector(node)) for slot, node in vectors if node.value.ndim == 1 or is_vector(node)]
    vectors = matrices or columns
    if not vectors:
        shapes = [node.shape for _, node in trace.outputs]
        maps = any(isinstance(shape, tuple) and len(shape) == 4 for shape in shapes)
        advice = ": for a verdict per position use per='position' (--per position)" if maps else ""
        raise ValueError(f"the model returns no logits or features of shape (n, width), but {shapes}{advice}")
    named = [node for slot, node in vectors if slot and slot[-1] == "logits"]
    # If the outputs hold features and the logits made from them, choose the logits.
    made_from = {id(a) for _, node in vectors for a in ancestors(node) if a is not node}
    last = [node for _, node in vectors if id(node) not in made_from]
    plain = [node for node in last if normalized_source(node) is None and id(same_vector(node)) not in made_from]
    node = (named or plain or last or [vectors[0][1]])[0]
    chosen = next(slot for slot, other in vectors if other is node)
    heads = [slot for slot, other in vectors if other in plain and other is not node and "embedding" not in slot]
    classes = getattr(model, "num_classes", None)
    is_named = bool(named) or (isinstance(classes, int) and classes > 1 and classes == node.shape[1])
    while base_op(node) in PROBABILITIES:
        node = node.data[0]
    return node, is_named, [".".join(map(str, slot)) for slot in (chosen, *heads)]


def _embedding_beside(trace: Trace, logits: Node) -> Node | None:
    """Return an output named "embedding" from which the logits are not made, if there is one."""
    for slot, node in trace.outputs:
        if slot and slot[-1] == "embedding" and is_vector(node):
            return None if any(node is other for other in ancestors(logits)) else node
    return None


def _head_input(hidden: Node, model: nn.Module) -> Node | None:
    """Return the input of an MLP head, where its chain of vectors begins.

    None if that is the model's input, unless the head is a `ProjectionHead`: its input is a pooled feature,
    wherever that was computed.
    """
    sources: list[Node] = []
    node = hidden
    scaling = BATCH_NORMS | LAYER_NORMS | {"add", "mul", "div"}
    while True:
        node = same_vector(node)
        following: Node | None = None
        if (source := affine_source(node)) is not None:
            following = source
            sources.append(source)
        elif (
            is_rectifier(node) or is_squared_rectifier(node) or (len(node.data) == 1 and base_op(node) in scaling)
        ):
            following = node.data[0]
        if following is None or not is_vector(following):
            break
        node = following
    while base_op(node) in RESHAPES and node.data:
        node = node.data[0]
    if node.op == "input":
        head = model.get_submodule(hidden.module.rpartition(".")[0])
        sources = sources[:1] if isinstance(head, ProjectionHead) else []
    return same_vector(sources[-1]) if sources else None


def place(node: Node) -> str:
    """Describe where a value was made."""
    return f"{base_op(node)} in `{node.module}`" if node.module else f"{base_op(node)} in the model's forward"


def _scaled(node: Node) -> Node:
    """Return the value that a constant multiplies, as the weight of a normalization."""
    return node.data[0] if base_op(node) == "mul" and len(node.data) == 1 else node


def why_not_rectified(boundary: Node, layer_norm: Node | None = None, advice: str = _ADVICE) -> str:
    """Explain why a value from which the classifier reads is not a rectified hidden layer."""
    blocking = unrectified(boundary) or boundary
    if base_op(blocking) in LAYER_NORMS or rms_source(_scaled(blocking)) is not None:
        layer_norm = layer_norm or blocking
    if layer_norm is not None:
        where = f" (`{layer_norm.module}`)" if layer_norm.module else ""
        cause = f"a layer normalization{where} before the head cancels the norm"
    else:
        cause = f"the input of the classifier (from {place(blocking)}) is not rectified"
        if base_op(blocking) not in _NEVER_RECTIFIED:
            cause = f"the input of the classifier comes from {place(blocking)}, which is not known to keep signs"
    return f"the model has no rectified hidden layer: {cause}. {advice}"
