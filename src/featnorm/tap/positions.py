"""Finds the classifier of every position in the trace of a model that returns maps, such as a segmentation model.

The search walks back from the maps that the model returns, through interpolations, to the class scores as the
classifier made them. What the classifier reads is the last hidden layer of each position.
"""

import torch
from torch import nn

from featnorm.tap.find import ARITHMETIC, PROBABILITIES, Anatomy, Part, place, replayed, why_not_rectified
from featnorm.tap.ops import (
    BATCH_NORMS,
    RESHAPES,
    base_op,
    is_vector,
    linear_layer,
    linear_source,
    same_value,
    unrectified,
)
from featnorm.tap.trace import Node, Trace
from featnorm.tap.weights import NotLinearError, linear_map

_INTERPOLATIONS = {
    "upsample_nearest2d", "_upsample_nearest_exact2d", "upsample_bilinear2d", "_upsample_bilinear2d_aa",
    "upsample_bicubic2d", "_upsample_bicubic2d_aa",
}  # fmt: skip
# Names of the logits among several outputs, in models of transformers and torchvision.
_LOGITS = ("logits", "out")

_ADVICE = (
    "NAN and the other norms of the last hidden layer do not apply. Train the model with a ReLU before its "
    "classifier, or use a detector that reads the pooled feature or the logits (KNN, SSD, Energy)"
)


def find_positions(trace: Trace, model: nn.Module) -> Anatomy:
    """Find what the classifier reads at every position, and the logits at the same resolution.

    Every part keeps its positions: those of the logits are maps (n, C, h, w); the others are maps or tokens with
    the same positions in the same order.

    Parameters
    ----------
    trace, model : the trace of the model.

    Raises
    ------
    ValueError
        The model returns no maps, or maps without several rows and columns.
    """
    maps = {
        slot: node
        for slot, node in trace.outputs
        if node.value.is_floating_point() and node.value.ndim == 4 and len(node.value) == trace.batch
    }
    if not maps:
        shapes = [node.shape for _, node in trace.outputs]
        raise ValueError(
            f"the model returns no maps of logits of shape (n, C, height, width), but {shapes}: omit "
            "per='position' (--per position)"
        )
    chosen = next((slot for slot in maps if slot and slot[-1] in _LOGITS), next(iter(maps)))
    node = _before_interpolation(maps[chosen])
    anatomy = Anatomy("none", [], [], [], [Part(node, axis=1, pooling=None)])
    anatomy.output, *anatomy.others = [
        ".".join(map(str, slot)) for slot in (chosen, *(slot for slot in maps if slot != chosen))
    ]
    anatomy.absent["embedding"] = "positions have none"
    scores, axis = _before_layout(node)
    sources = _sources(scores, axis, _positions(scores, axis))
    if sources is None:
        why = f"the logits of a position are not made by a linear layer, but by {place(scores)}"
        anatomy.absent.update(activation=why, pooled=why, classifier=why)
        return anatomy
    sources = list(dict.fromkeys(sources))
    anatomy.pooled = [Part(source, axis=axis, pooling=None) for source in sources]
    blocking = [bad for source in sources if (bad := unrectified(source)) is not None]
    if blocking:
        anatomy.absent["activation"] = why_not_rectified(blocking[0], advice=_ADVICE)
    else:
        anatomy.kind, anatomy.activation = "positions", anatomy.pooled
    try:
        anatomy.classifier = linear_map(scores, sources, [], False, model)
    except NotLinearError as error:
        anatomy.absent["classifier"] = (
            f"there is {error} between the last hidden layer and the logits, "
            "so the logits of a position are not a linear map of its features"
        )
    return anatomy


def _before_interpolation(output: Node) -> Node:
    """Return the logits that the model's output is interpolated from, or a softmax of."""
    node = output
    while not _is_single(node):
        node = same_value(node)
        if base_op(node) not in _INTERPOLATIONS | PROBABILITIES:
            return node
        node = node.data[0]
    raise ValueError(
        f"the model's map of logits has the shape {node.shape}, and at least 2 x 2 positions are needed to trace "
        "it: trace it on larger inputs"
    )


def _is_single(node: Node) -> bool:
    return is_vector(node) or min(node.shape[2:]) < 2


def _before_layout(maps: Node) -> tuple[Node, int]:
    """Return the class scores that maps (n, C, h, w) are laid out from, and the axis of the classes."""
    n, classes, *size = maps.shape
    scores, chain = maps, list[Node]()
    while base_op(scores) in RESHAPES and scores.data and scores.data[0].value.ndim >= 3:
        chain.insert(0, scores)
        scores = scores.data[0]
    order = torch.arange(float(n * size[0] * size[1]), device=maps.value.device)
    expected = order.reshape(n, 1, *size).expand(maps.shape)
    for axis in {1, scores.value.ndim - 1}:
        shape = list(scores.shape)
        if shape.pop(axis) == classes and torch.Size(shape).numel() == len(order):
            positions = order.reshape(shape).unsqueeze(axis).expand(scores.shape)
            if (found := replayed(chain, positions)) is not None and torch.equal(found, expected):
                return scores, axis
    return maps, 1


def _sources(node: Node, axis: int, positions: int) -> list[Node] | None:
    """Return what the linear layers read whose outputs are added up in class scores, or None."""
    node = same_value(node)
    op, data = base_op(node), node.data
    source = linear_source(node)
    if source is None and op == "convolution":  # of a neighborhood
        source = same_value(data[0])
    if source is not None:
        own_axis = 1 if base_op(linear_layer(node) or node) == "convolution" else node.value.ndim - 1
        return [source] if own_axis == axis and _positions(source, axis) == positions else None
    if op in ("add", "sub") and len(data) > 1:
        terms = [_sources(term, axis, positions) for term in data]
        return None if None in terms else [source for found in terms for source in found or ()]
    return _sources(data[0], axis, positions) if op in ARITHMETIC | BATCH_NORMS and len(data) == 1 else None


def _positions(node: Node, axis: int) -> int:
    return node.value.numel() // max(node.shape[axis] if axis < node.value.ndim else node.value.numel(), 1)
