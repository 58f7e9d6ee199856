"""A linearized forward pass, whose gradients are the paper's coefficients (Prop. 1).

Each elementwise non-linearity s is replaced by ``z * gate`` with the constant gate ``s(z) / z`` of this input. The
values do not change, and the Jacobian of the logits with respect to a layer becomes C(x) of eq. 2, for any
architecture. Operations after the layer are read from the autograd graph, and an error names those that are not
known to be linear. A second pass, with the gates held fixed and the layer changed slightly, verifies the result.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from featnorm.hidden.classifier import HiddenClassifier
from featnorm.tap.batch import Call
from featnorm.tap.capture import HookPoint, capture, eval_mode

_LOGITS = "logits of the model"
_CLASSES_AT_ONCE = 64

# Elementwise functions with s(0) = 0, by name, called as a function, as a method, or in place.
_ELEMENTWISE = {
    "relu", "relu6", "leaky_relu", "prelu", "rrelu", "gelu", "silu", "mish", "hardswish", "elu", "celu", "selu",
    "hardtanh", "threshold", "tanh", "tanhshrink", "softsign", "hardshrink", "softshrink", "clamp", "clamp_min",
    "clamp_max", "clip",
}  # fmt: skip
_MAX_POOLS: dict[str, Callable[..., Any]] = {
    "max_pool1d": F.max_pool1d_with_indices,
    "max_pool2d": F.max_pool2d_with_indices,
    "max_pool3d": F.max_pool3d_with_indices,
    "adaptive_max_pool1d": F.adaptive_max_pool1d_with_indices,
    "adaptive_max_pool2d": F.adaptive_max_pool2d_with_indices,
    "adaptive_max_pool3d": F.adaptive_max_pool3d_with_indices,
}
_LENGTHS = {"norm", "vector_norm", "linalg_vector_norm", "linalg_norm"}

# Autograd nodes, without "Backward0", of maps that are linear, or select values and so are locally linear.
_LINEAR = {
    "Add", "Sub", "Rsub", "Neg", "Addmm", "Mm", "Bmm", "Baddbmm", "Addbmm", "Addmv", "Mv", "Dot", "Mul", "Div",
    "Convolution", "MkldnnConvolution", "ThnnConvDepthwise2D", "ConvDepthwise3D", "SlowConv2D",
    "NativeBatchNorm", "CudnnBatchNorm", "MiopenBatchNorm", "BatchNormImpl",
    "View", "UnsafeView", "Reshape", "ReshapeAlias", "Expand", "Permute", "Transpose", "T", "Squeeze", "Unsqueeze",
    "Select", "Slice", "Split", "SplitWithSizes", "UnsafeSplit", "Unbind", "Cat", "Stack", "Clone", "Alias",
    "ToCopy", "CopySlices", "Copy", "CopyBackwards", "AsStrided", "Index", "IndexSelect", "Gather", "Repeat",
    "Flip", "Roll",
    "Diagonal", "Unfold", "Im2Col", "Col2Im", "PixelShuffle", "PixelUnshuffle", "ChannelShuffle", "Contiguous",
    "ConstantPadNd", "ReflectionPad1D", "ReflectionPad2D", "ReplicationPad1D", "ReplicationPad2D",
    "Mean", "Sum", "Cumsum", "AvgPool2D", "AvgPool3D", "AdaptiveAvgPool2D", "AdaptiveAvgPool3D",
    "MkldnnAdaptiveAvgPool2D", "MaxPool2DWithIndices", "MaxPool3DWithIndices", "AdaptiveMaxPool2D",
    "AdaptiveMaxPool3D", "Max", "Amax", "Min", "Amin", "Topk", "Sort", "Median", "MaxUnpool2D",
    "UpsampleNearest1D", "UpsampleNearest2D", "UpsampleBilinear2D", "UpsampleBicubic2D", "Where", "MaskedFill",
    "Relu", "Identity",
}  # fmt: skip
# Products, and the positions of their factors: only one of these may depend on the layer.
_FACTORS = {
    "Mul": (0, 1), "Mm": (0, 1), "Bmm": (0, 1), "Addmm": (1, 2), "Baddbmm": (1, 2), "Addbmm": (1, 2),
    "Addmv": (1, 2), "Mv": (0, 1), "Dot": (0, 1), "Convolution": (0, 1),
}  # fmt: skip

# Size of the change of the layer, relative to its values, and tolerance of the second pass.
_STEP = 1e-3
_TOLERANCE = 0.1


class _Linearized(TorchFunctionMode):
    """Replaces every rectifier and every length that depends on a layer by a constant factor.

    Parameters
    ----------
    held : factors of an earlier pass, to be reused; None to compute them.
    put : function that maps a hook point and the result of its operation to the tensor that replaces the result.
    fresh : points whose operations have just run, see `capture`.
    start
        Index of the rectifier whose input is the layer, and the function that makes it the layer; None if the
        layer is no rectifier's input.
    """

    def __init__(
        self,
        held: Sequence[Tensor] | None,
        put: Callable[[HookPoint, Tensor], Tensor],
        fresh: list[HookPoint],
        start: tuple[int, Callable[[Tensor], Tensor]] | None = None,
    ) -> None:
        super().__init__()
        self.held = held
        self.put = put
        self.fresh = fresh
        self.start = start
        self.factors: list[Tensor] = []
        self.rectified = 0
        self.rectifiers: dict[HookPoint, int] = {}  # index of the rectifier whose output is a layer

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.fresh:
            raise ValueError(
                "the operation that makes the layer is hidden in compiled code or a custom autograd function"
            )
        name = getattr(func, "__name__", "")
        base = name.strip("_")
        z = args[0] if args else kwargs.get("input")
        result: Any
        if isinstance(z, Tensor) and z.is_floating_point() and base in _ELEMENTWISE:
            result = self._rectify(func, z, name, args, kwargs)
        elif isinstance(z, Tensor) and z.requires_grad and base in _MAX_POOLS:
            result = self._pool(z, base, args, kwargs)
        elif isinstance(z, Tensor) and z.requires_grad and base == "normalize":
            rest = {key: value for key, value in kwargs.items() if key != "input"}
            result = z * self._factor(lambda: _reciprocal_length(z, *args[1:], **rest))
        elif isinstance(z, Tensor) and z.requires_grad and base in _LENGTHS:
            result = self._factor(lambda: func(*args, **kwargs).detach())
        else:
            result = func(*args, **kwargs)
        if self.fresh:
            point = self.fresh.pop()
            self.fresh.clear()
            if not isinstance(result, Tensor):
                raise ValueError(f"the layer is one of several results of {base}, which is not supported")
            if base in _ELEMENTWISE:
                self.rectifiers[point] = self.rectified - 1
            there = self.put(point, result)
            # After an in-place operation, the model continues with the tensor that was written to.
            result = result.copy_(there) if _in_place(name, kwargs) else there
        return result

    def _rectify(
        self, func: Callable[..., Any], z: Tensor, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        start = self.start if self.start is not None and self.start[0] == self.rectified else None
        self.rectified += 1
        if not z.requires_grad and start is None:
            return func(*args, **kwargs)
        in_place = _in_place(name, kwargs)
        # An in-place rectifier overwrites its input, whose gradient would then be that of the output.
        source = z.clone() if in_place else z
        if start is not None:
            source = start[1](source)
        rest = {key: value for key, value in kwargs.items() if key != "input"}
        with torch.no_grad():
            output = func(source.detach().clone() if in_place else source.detach(), *args[1:], **rest)

        def factor() -> Tensor:
            if bool((output[source == 0] != 0).any()):
                raise ValueError(f"{name} is not 0 at 0, so it is not a multiple of its input (paper eq. 2)")
            return torch.where(source == 0, 0.0, output / source).to(source.dtype)

        y = source * self._factor(factor)
        return (args[0] if args else kwargs["input"]).copy_(y) if in_place else y

    def _pool(self, z: Tensor, base: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        # Selecting values is linear once the indices are fixed.
        rest = {key: value for key, value in kwargs.items() if key not in ("input", "return_indices")}
        indices = self._factor(lambda: _MAX_POOLS[base](z, *args[1:], **rest)[1])
        spatial = indices.ndim - 2
        return z.flatten(-spatial).gather(-1, indices.flatten(-spatial)).view(indices.shape)

    def _factor(self, make: Callable[[], Tensor]) -> Tensor:
        with torch.no_grad():
            value = make() if self.held is None else self.held[len(self.factors)]
        self.factors.append(value)
        return value


def hidden_classifiers(
    model: nn.Module,
    layers: Mapping[str, HookPoint],
    logits: HookPoint,
    call: Call,
    *,
    pre_activation: bool = False,
) -> dict[str, HiddenClassifier]:
    """Return the classifiers hidden in layers, from two linearized forward passes and one backward pass per class.

    Parameters
    ----------
    model, call : the model, and a call of it with tensors on its device; both are left unchanged.
    layers, logits : points of the operations that make the layers, see `made`, and the point of the logits.
    pre_activation : whether to use the input of the layer's rectifier; requires a single layer.

    Raises
    ------
    ValueError
        See `FeatureTap.hidden`.
    """
    if call.rows == 0:
        raise ValueError("there is no input in the batch")
    # Inference tensors cannot be differentiated, so the caller's inference mode is turned off.
    with torch.inference_mode(False), eval_mode(model, gradients=True), _frozen(model):
        call = call.detach().clone()
        rectifier = _rectifier(model, layers, logits, call) if pre_activation else None
        first = _Run(model, layers, logits, call, rectifier)
        for name, value in first.layers.items():
            _require_linear(first.logits, value, name)
        matrices = first.coefficients()
        _require_same(first, matrices, _Run(model, layers, logits, call, rectifier, earlier=first))
    found = {}
    for (name, value), matrix in zip(first.layers.items(), matrices, strict=True):
        bare = HiddenClassifier(value.detach().flatten(1), matrix)
        found[name] = HiddenClassifier(bare.activation, matrix, first.logits.detach() - bare.output_logits)
    return found


class _Run:
    """One linearized pass: the layers, as leaves of the autograd graph or within it, and the logits."""

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, HookPoint],
        logits: HookPoint,
        call: Call,
        rectifier: int | None,
        earlier: "_Run | None" = None,
    ) -> None:
        self.layers: dict[str, Tensor] = {}
        self.steps: dict[str, Tensor] = {}
        held = None if earlier is None else earlier.mode.factors
        names = {point: name for name, point in layers.items()}
        generator = torch.Generator().manual_seed(0)

        def put(point: HookPoint, value: Tensor) -> Tensor:
            if rectifier is not None:
                return value
            return self._open(names[point], value, earlier, generator)

        start = None
        if rectifier is not None:
            (name,) = layers
            start = (rectifier, lambda value: self._open(name, value, earlier, generator))
        fresh: list[HookPoint] = []
        self.mode: _Linearized = _Linearized(held, put, fresh, start)
        with self.mode:
            caught = capture(model, {**layers, _LOGITS: logits}, call, fresh=fresh)
        logits_of_run = caught[_LOGITS]
        self.logits = logits_of_run[:, None] if logits_of_run.ndim == 1 else logits_of_run.flatten(1)
        self.layers = {name: self.layers[name] for name in layers}
        if not self.logits.requires_grad:
            raise ValueError("the logits do not depend on the layer, or are computed without gradients")

    def _open(self, name: str, value: Tensor, earlier: "_Run | None", generator: torch.Generator) -> Tensor:
        """Make a value the layer, and return a copy that the model may write to."""
        if not value.requires_grad:
            value = value.detach()
            if earlier is not None:
                noise = torch.randn(value.shape, generator=generator).to(value)
                size = value.flatten(1).abs().amax(1).reshape(-1, *(1 for _ in value.shape[1:]))
                self.steps[name] = (_STEP**2 if value.dtype == torch.float64 else _STEP) * size * noise
                value = value + self.steps[name]
            value.requires_grad_()
        self.layers[name] = value
        return value.clone()

    def coefficients(self) -> list[Tensor]:
        """Return the Jacobian (n, K, d) of the logits with respect to each layer, which has d values per input."""
        n, classes = self.logits.shape
        rows: list[list[Tensor]] = [[] for _ in self.layers]
        # Activation checkpoints recompute parts in the backward pass, which must be linearized too.
        with self.mode:
            for begin in range(0, classes, _CLASSES_AT_ONCE):
                chosen = range(begin, min(begin + _CLASSES_AT_ONCE, classes))
                seeds = torch.zeros(len(chosen), n, classes, dtype=self.logits.dtype, device=self.logits.device)
                for row, k in enumerate(chosen):
                    seeds[row, :, k] = 1
                parts = torch.autograd.grad(
                    self.logits, list(self.layers.values()), seeds, retain_graph=True, is_grads_batched=True
                )
                for layer, part in zip(rows, parts, strict=True):
                    layer.append(part.flatten(2))
        return [torch.cat(parts).transpose(0, 1).contiguous() for parts in rows]


def _rectifier(model: nn.Module, layers: Mapping[str, HookPoint], logits: HookPoint, call: Call) -> int:
    """Return the index, among the rectifiers that run, of the one whose output is the layer."""
    ((_, point),) = layers.items()
    index = _Run(model, layers, logits, call, None).mode.rectifiers.get(point)
    if index is None:
        raise ValueError("this layer is not the output of a rectifier, so it has no pre-activation")
    return index


def _require_linear(logits: Tensor, layer: Tensor, name: str) -> None:
    """Raise a ValueError that names the operations between the two that are not known to be linear."""
    odd: list[str] = []
    reached = False
    seen = set()
    waiting = [logits.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node is layer.grad_fn or getattr(node, "variable", None) is layer:
            reached = True
            continue
        kind = re.sub(r"Backward\d*$", "", node.name().rpartition("::")[2])
        edges = [edge for edge, _ in node.next_functions]
        factors = [edges[i] for i in _FACTORS.get(kind, ()) if i < len(edges) and edges[i] is not None]
        if len(factors) > 1 or (kind == "Div" and len(edges) > 1 and edges[1] is not None):
            odd.append("a product of two values that depend on it")
        elif kind not in _LINEAR and kind != "AccumulateGrad":
            odd.append(_words(kind))
        waiting += edges
    if not reached:
        raise ValueError(f"the logits do not depend on {name}")
    if odd:
        raise ValueError(
            f"the model after {name} is not linear, even with its gates held fixed: it contains "
            + " and ".join(sorted(set(odd)))
        )


def _require_same(first: _Run, matrices: Sequence[Tensor], second: _Run) -> None:
    """Raise a ValueError if a small change of the layer does not change the logits as the gradients predict."""
    predicted = torch.zeros_like(first.logits)
    for name, matrix in zip(first.layers, matrices, strict=True):
        if name in second.steps:
            predicted = predicted + torch.linalg.vecdot(matrix, second.steps[name].flatten(1)[:, None])
    moved = (second.logits - first.logits).detach()
    noise = 64 * torch.finfo(moved.dtype).eps * float(first.logits.detach().abs().max())
    off = float((moved - predicted.detach()).abs().max())
    if not off <= _TOLERANCE * float(torch.maximum(moved.abs(), predicted.detach().abs()).max()) + noise:
        raise ValueError(
            "the gradients of the model after the layer do not predict its output, because it detaches a value, "
            "mixes the inputs of a batch, or has a custom non-linearity: C(x) would not be exact"
        )


def _words(kind: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", kind).lower().removeprefix("native_").strip("_")


def _in_place(name: str, kwargs: Mapping[str, Any]) -> bool:
    return (
        (name.endswith("_") and not name.endswith("__")) or name.startswith("__i") or bool(kwargs.get("inplace"))
    )


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Turn off the gradients of all parameters in a block, and restore them afterwards."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


def _reciprocal_length(z: Tensor, p: float = 2.0, dim: int = 1, eps: float = 1e-12, out: None = None) -> Tensor:
    """Return the reciprocal of the length by which `torch.nn.functional.normalize` divides."""
    return torch.linalg.vector_norm(z, p, dim=dim, keepdim=True).clamp_min(eps).reciprocal()
