"""A forward pass whose rectifiers are linear maps, so that its gradients are the paper's coefficients (Prop. 1).

Each elementwise non-linearity s is replaced by ``z * constant`` with the constant ``s(z) / z`` of this input. The
values stay what they were, and the Jacobian of the logits in a layer becomes C(x) of eq. 2, for any architecture.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from featnorm.hidden import HiddenClassifier
from featnorm.tap.listen import Point, listen, undisturbed

_LOGITS = "logits of the model"
_CLASSES_AT_ONCE = 64

# Elementwise functions with s(0) = 0, by name, whether called from torch, as a method, or in place.
_ELEMENTWISE = {
    "relu", "relu6", "leaky_relu", "prelu", "rrelu", "gelu", "silu", "mish", "hardswish", "elu", "celu", "selu",
    "hardtanh", "threshold", "tanh", "tanhshrink", "softsign", "hardshrink", "softshrink", "clamp", "clamp_min",
    "clamp_max", "clip",
}  # fmt: skip
_LENGTHS = {"norm", "vector_norm", "linalg_vector_norm"}
# What no factor of the input's makes linear; they are named where a pass turns out not to be.
_REFUSED = {
    "softmax", "log_softmax", "layer_norm", "group_norm", "instance_norm", "rms_norm", "sigmoid", "hardsigmoid",
    "scaled_dot_product_attention", "multi_head_attention_forward", "softplus", "exp", "glu", "cosine_similarity",
    "local_response_norm",
}  # fmt: skip


class Rectified(NamedTuple):
    """One rectifier of a pass."""

    before: Tensor
    after: Tensor
    output: Tensor  # what the function itself put out, of the same values


class Linearised(TorchFunctionMode):
    """Runs what is inside with every rectifier as a multiplication by a constant.

    Attributes
    ----------
    rectified : what went into every rectifier and came out, in order.
    seen : names of the functions that cannot be made linear, in order, each once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.rectified: list[Rectified] = []
        self.seen: list[str] = []

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        base = name.strip("_")
        z = args[0] if args else kwargs.get("input")
        if not isinstance(z, Tensor) or not z.requires_grad:
            return func(*args, **kwargs)
        if base in _ELEMENTWISE:
            return self._rectify(func, z, name, args, kwargs)
        if base == "normalize":
            return z * (_length(z, *args[1:], **{k: v for k, v in kwargs.items() if k != "input"}))
        if base in _LENGTHS:
            return func(*args, **kwargs).detach()
        if base in _REFUSED and base not in self.seen:
            self.seen.append(base)
        return func(*args, **kwargs)

    def _rectify(
        self, func: Callable[..., Any], z: Tensor, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        in_place = name.endswith("_") or bool(kwargs.get("inplace"))
        if in_place:
            # The tensor is about to hold the output, and its gradient is then that of the output.
            z = z.clone()
        rest = {key: value for key, value in kwargs.items() if key != "input"}
        with torch.no_grad():
            output = func(z.detach().clone() if in_place else z.detach(), *args[1:], **rest)
            if bool((output[z == 0] != 0).any()):
                raise ValueError(f"{name} is not 0 at 0, so that it is no factor of its input (paper eq. 2)")
            factor = torch.where(z == 0, 0.0, output / z).to(z.dtype)
        y = z * factor
        if in_place:
            y = (args[0] if args else kwargs["input"]).copy_(y)
        self.rectified.append(Rectified(z, y, output))
        return y

    def graph(self, caught: Tensor) -> Tensor:
        """Return a value that was caught as the tensor that the logits were computed from."""
        found = self._find(caught)
        return caught if found is None else found.after

    def before(self, caught: Tensor) -> Tensor:
        """Return the pre-activation of a rectifier's output.

        Raises
        ------
        ValueError
            The value is not the output of a rectifier.
        """
        found = self._find(caught)
        if found is None:
            raise ValueError("this layer is not the output of a rectifier, so it has no pre-activation")
        return found.before

    def _find(self, caught: Tensor) -> "Rectified | None":
        # Values that no module sees are caught inside the rectifier, others behind it, perhaps as a view.
        for entry in reversed(self.rectified):
            for value in (entry.after, entry.output):
                if value.data_ptr() == caught.data_ptr() and value.numel() == caught.numel():
                    return entry
        return None


def _length(z: Tensor, p: float = 2.0, dim: int = 1, eps: float = 1e-12, out: None = None) -> Tensor:
    """One over the length that `torch.nn.functional.normalize` divides by."""
    with torch.no_grad():
        return torch.linalg.vector_norm(z, p, dim=dim, keepdim=True).clamp_min(eps).reciprocal()


def hidden_classifiers(
    model: nn.Module,
    layers: Mapping[str, Point],
    logits: Point,
    inputs: Tensor,
    *,
    pre_activation: bool = False,
) -> dict[str, HiddenClassifier]:
    """Return the classifiers hidden in some layers, from one linearised pass forward and one back a class.

    Parameters
    ----------
    model, inputs : a batch as the model takes it, on its device; both stay as they are.
    layers, logits : where to listen.
    pre_activation : of what the layers' rectifiers read.

    Raises
    ------
    ValueError
        See `FeatureTap.hidden`.
    """
    for name, point in {**layers, "logits": logits}.items():
        if point.copy:
            raise ValueError(f"the layer {name} is overwritten in place, and gradients cannot be followed to it")
    # Inference tensors take part in no gradient, whatever mode the caller is in.
    with torch.inference_mode(False), undisturbed(model, gradients=True):
        inputs = inputs.detach().clone().requires_grad_()
        with Linearised() as linearised:
            caught = listen(model, {**layers, _LOGITS: logits}, inputs)
        output = caught.pop(_LOGITS).flatten(1)
        find = linearised.before if pre_activation else linearised.graph
        values = {name: find(value) for name, value in caught.items()}
        for name, value in values.items():
            if not _is_affine(output, value):
                reason = f": it passes {' and '.join(linearised.seen)}" if linearised.seen else ""
                raise ValueError(f"what is behind {name} is not linear, whatever factors are fixed{reason}")
        matrices = _coefficients(output, list(values.values()))
    found = {}
    for (name, value), matrix in zip(values.items(), matrices, strict=True):
        hidden = HiddenClassifier(value.detach().flatten(1), matrix)
        found[name] = HiddenClassifier(
            hidden.activation, hidden.coefficients, output.detach() - hidden.output_logits
        )
    return found


def _coefficients(logits: Tensor, layers: Sequence[Tensor]) -> list[Tensor]:
    """Return the Jacobian of the logits in each layer: (n, K, d), d all the layer's numbers."""
    n, classes = logits.shape
    rows: list[list[Tensor]] = [[] for _ in layers]
    for start in range(0, classes, _CLASSES_AT_ONCE):
        chosen = range(start, min(start + _CLASSES_AT_ONCE, classes))
        seeds = torch.zeros(len(chosen), n, classes, dtype=logits.dtype, device=logits.device)
        for row, k in enumerate(chosen):
            seeds[row, :, k] = 1
        parts = torch.autograd.grad(
            logits, layers, seeds, retain_graph=True, is_grads_batched=True, allow_unused=True
        )
        for layer, part in zip(rows, parts, strict=True):
            if part is None:
                raise ValueError("the logits do not depend on this layer")
            layer.append(part.flatten(2))
    return [torch.cat(parts).transpose(0, 1).contiguous() for parts in rows]


def _is_affine(logits: Tensor, layer: Tensor) -> bool:
    """Whether the logits are an affine function of the layer, as far as the second derivative tells."""
    generator = torch.Generator().manual_seed(0)
    seed = torch.randn(logits.shape, generator=generator, dtype=torch.float64).to(logits)
    (first,) = torch.autograd.grad(logits, layer, seed, create_graph=True, retain_graph=True, allow_unused=True)
    if first is None or not first.requires_grad:
        return True
    direction = torch.randn(first.shape, generator=generator, dtype=torch.float64).to(first)
    try:
        (second,) = torch.autograd.grad(first, layer, direction, retain_graph=True, allow_unused=True)
    except (
        RuntimeError
    ):  # an operation on the way has no second derivative in torch: it is none of the linear ones
        return False
    if second is None:
        return True
    scale = float(first.detach().abs().max())
    return float(second.abs().max()) <= math.sqrt(torch.finfo(second.dtype).eps) * scale
