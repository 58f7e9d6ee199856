"""`FeatureTap`, which finds and captures the features of a model."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from featnorm._utils.checks import check_text, check_type
from featnorm._utils.progress import progress_bar
from featnorm.features import PER_INPUT, Classifier, Features
from featnorm.hidden.classifier import HiddenClassifier
from featnorm.runtime import Runtime
from featnorm.tap.capture import TRACE_AGAIN, HookPoint, capture, eval_mode, locate, made
from featnorm.tap.find import Anatomy, WeightRef, base_op, find
from featnorm.tap.linear import hidden_classifiers
from featnorm.tap.trace import Node, Trace, trace

_INPUT_KEYS = ("image", "images", "pixel_values", "input", "inputs", "x", "img", "data")
_LABEL_KEYS = ("label", "labels", "y", "target", "targets", "class")
_CLASS_TYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
# Batch size of the traced forward pass, which keeps every tensor it makes.
_TRACED_ROWS = 2


class FeatureTap:
    """Captures the features of a model: its last hidden layer, pooled feature, embedding and logits.

    It finds them by tracing one forward pass on the first batch; `describe` reports the result. Every call leaves
    the model exactly as it was: no hook, mode, gradient or parameter changes, even if it raises an error. If the
    model is wrapped by `torch.nn.DataParallel` or `torch.compile`, the model inside the wrapper is used.

    Parameters
    ----------
    model : module that maps a batch of inputs to logits, to features, or to a tuple or dict of them.
    layer
        Module whose output is the last hidden layer, or its name, if the one found automatically is not the right
        one. Maps (n, d, height, width) are averaged over space.

    Raises
    ------
    ValueError
        ``layer`` is not in the model.
    TypeError
        The model is not a `torch.nn.Module`, or ``layer`` is neither a module nor a name.
    """

    def __init__(self, model: nn.Module, layer: str | nn.Module | None = None) -> None:
        check_type(model, nn.Module, "the model", "a torch.nn.Module")
        check_type(layer, (str, nn.Module, type(None)), "layer", "a module of the model or its name")
        self.model = unwrap(model)
        self.layer = self._name(layer)
        self._plan: _Plan | None = None
        self._inactive = ""
        self._advice = TRACE_AGAIN

    def trace(self, inputs: Tensor) -> "FeatureTap":
        """Find the layers by tracing the model on a batch of inputs, and return self.

        Raises
        ------
        ValueError
            The model returns neither logits nor features of shape (n, width), or the chosen layer did not run.
        TypeError
            The inputs are not a tensor.
        """
        check_type(inputs, Tensor, "the inputs", "a tensor")
        self._trace(inputs)
        return self

    def __call__(self, inputs: Tensor) -> Features:
        """Return the features of one batch, on the model's device, from one forward pass.

        The caller may change the tensors: none shares memory with the model or the inputs.
        """
        return self.capture(inputs, classifier=True)

    def capture(self, inputs: Tensor, *, classifier: bool) -> Features:
        """Return the features of one batch, with or without a copy of the classifier's weights."""
        check_type(inputs, Tensor, "the inputs", "a tensor")
        inputs = inputs.to(self.device)
        if self._plan is None:
            return self._trace(inputs)
        return self._capture(self._plan, inputs, classifier)

    def _trace(self, inputs: Tensor) -> Features:
        inputs = inputs.to(self.device)
        with eval_mode(self.model):
            traced = trace(self.model, inputs[:_TRACED_ROWS])
            plan = _Plan.of(find(traced, self.model, self.layer), traced)
        features = self._capture(plan, inputs, classifier=True)
        self._plan = plan
        self._advice = TRACE_AGAIN
        activation = features.activation
        if activation is not None and activation.numel():
            share = float((activation <= 0).float().mean())
            self._inactive = f"On average, {share:.0%} of its units were off for the {len(inputs)} inputs."
        return features

    def _capture(self, plan: "_Plan", inputs: Tensor, classifier: bool) -> Features:
        with eval_mode(self.model):
            return self._caught(inputs, plan, classifier)

    def traced(self, inputs: Tensor) -> Features:
        """Return the features of one batch without their classifier, as operations that torch can export.

        The model must have been traced, and be in evaluation mode.
        """
        return self._caught(inputs, classifier=False)

    def _caught(self, inputs: Tensor, plan: "_Plan | None" = None, classifier: bool = True) -> Features:
        """Return the features of one batch, in the current mode and with the current gradient setting."""
        plan = plan or self._planned()
        caught = capture(self.model, plan.points, inputs, advice=self._advice)
        # If two fields are one tensor, such as a pooled feature that is the last hidden layer, it stays one.
        vectors = {plan.points[name]: _as_vectors(value) for name, value in caught.items()}
        fields: dict[str, Any] = {name: vectors[plan.points[name]] for name in caught}
        fields["classifier"] = plan.classifier(self.model) if classifier else None
        return Features(**fields, absent=plan.absent, call=_ModelCall(self, inputs))

    def stream(self, loader: Iterable[Any], *, progress: bool | None = None) -> Iterator[Features]:
        """Yield the features of a loader batch by batch, on the model's device.

        Parameters
        ----------
        loader
            Iterable of batches. A batch is a tensor of inputs; a tuple of inputs and, optionally, labels; or a
            dict with keys such as ``image`` and ``label``. Labels that are not one integer per input are ignored.
        progress : whether to show a progress bar. Default: on a terminal; elsewhere a line every 30 seconds.

        Raises
        ------
        ValueError
            A batch holds no tensor of inputs, or the loader yields no batch.
        TypeError
            The loader is not an iterable of batches.
        """
        check_loader(loader)
        total = _length(loader)
        bar = progress_bar(loader, total=total, unit="batch", progress=progress)
        empty = True
        for i, batch in enumerate(bar):
            inputs, labels, why = _split(batch, i)
            if not len(inputs):
                continue
            try:
                features = self(inputs)
            except Exception as error:
                error.add_note(f"(on batch {i} of the loader, counted from 0)")
                raise
            empty = False
            if labels is None:
                yield features.replace(absent={**features.absent, "labels": why})
            else:
                yield features.replace(labels=labels.to(self.device))
        if empty:
            used_up = ": it is an iterator, which one pass uses up; pass a list or a DataLoader"
            raise ValueError(f"the loader yielded no batch{used_up if iter(loader) is loader else ''}")

    def extract(self, loader: Iterable[Any], *, progress: bool | None = None) -> Features:
        """Return the features of a whole loader, on the CPU: the batches of `stream`, concatenated.

        To fit a detector without holding all features in memory, pass the batches of `stream` to `partial_fit`.
        """
        return Features.cat([features.to("cpu") for features in self.stream(loader, progress=progress)])

    def hidden(self, inputs: Tensor, *, pre_activation: bool = False) -> HiddenClassifier:
        """Return the classifier hidden in the layer for a batch: ``logits = C a + Gamma`` (paper Prop. 1, A.2.3).

        In one forward pass, every rectifier multiplies its input by the constant gate ``s(z) / z``; one backward
        pass per class, batched, then gives C. The cost is that of 1 + 2 K forward passes from the layer on, and
        the memory is n K d.

        Parameters
        ----------
        inputs : batch of n inputs, as the model takes them.
        pre_activation : whether to use the input of the layer's rectifier instead of its output (Prop. 6).

        Returns
        -------
        The hidden classifier of the last hidden layer, or of ``layer`` if it was given to the tap. For maps, d is
        the number of all their values.

        Raises
        ------
        ValueError
            The model has no logits or no such layer, or an operation after the layer, such as attention or a
            LayerNorm, is not linear even with its gates held fixed. The message names the operation.
        TypeError
            The inputs are not a tensor.
        """
        check_type(inputs, Tensor, "the inputs", "a tensor")
        inputs = inputs.to(self.device)
        with eval_mode(self.model):
            traced = trace(self.model, inputs[:_TRACED_ROWS])
        anatomy = find(traced, self.model, self.layer)
        if anatomy.activation is None or anatomy.logits is None:
            missing = "activation" if anatomy.activation is None else "logits"
            raise ValueError(f"there is no hidden classifier without {missing}: {anatomy.absent.get(missing)}")
        name = self.layer or "the last hidden layer"
        layers = {name: made(anatomy.activation)}
        logits = locate(traced, anatomy.logits)
        return hidden_classifiers(self.model, layers, logits, inputs, pre_activation=pre_activation)[name]

    def describe(self) -> str:
        """Describe the features that were found, and whether the negative-aware norm works on them.

        If no batch was traced yet, the model is traced on noise of the input size that its layers suggest.

        Raises
        ------
        ValueError
            The input size of the model cannot be inferred; call `trace` with a batch first.
        """
        noise = self._plan is None
        if noise:
            guess = _noise_for(self.model)
            try:
                self.trace(guess)
            except (RuntimeError, TypeError, AssertionError, IndexError) as error:
                raise ValueError(
                    f"the model does not accept noise of shape {tuple(guess.shape)}, so its input size cannot be "
                    "inferred: call tap.trace with a batch first"
                ) from error
        plan = self._planned()
        lines = [plan.verdict]
        if self._inactive:
            lines.append(self._inactive + (" (They were noise: trace real inputs.)" if noise else ""))
        for name, words in plan.words.items():
            lines.append(f"{name}: {words}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Return the state of the tap as plain data, for a file; see `from_dict`."""
        return {"layer": self.layer, "inactive": self._inactive, "plan": self._planned().to_dict()}

    @classmethod
    def from_dict(cls, model: nn.Module, state: Mapping[str, Any]) -> "FeatureTap":
        """Create a tap from the state of another one, without tracing the model again.

        Raises
        ------
        KeyError, TypeError, ValueError
            The data are not a state, or do not fit the model.
        """
        tap = cls(model, state["layer"])
        tap._plan = _Plan.from_dict(state["plan"])
        tap._plan.check(tap.model)
        tap._inactive = check_text(state["inactive"])
        tap._advice = "the file that the tap was read from is damaged or does not fit the model: fit again"
        return tap

    def require(self, names: Iterable[str]) -> None:
        """Raise a ValueError if the tap, read from a file, lacks one of these fields of `Features`."""
        plan = self._planned()
        for name in names:
            if name not in plan.points and not (name == "classifier" and plan.weights):
                raise ValueError(f"the tap captures no {name}")

    def _planned(self) -> "_Plan":
        if self._plan is None:
            raise RuntimeError("the tap has not traced the model yet: call trace with a batch")
        return self._plan

    def _name(self, layer: str | nn.Module | None) -> str | None:
        names = {name: module for name, module in self.model.named_modules() if name}
        if layer is None:
            return None
        if isinstance(layer, str):  # if a module has two names, use the first
            layer = dict(self.model.named_modules(remove_duplicate=False)).get(layer, layer)
        for name, module in names.items():
            if module is layer:
                return name
        last_names = ", ".join(list(names)[-8:])
        given = layer if isinstance(layer, str) else type(layer).__name__
        raise ValueError(f"layer {given!r} is not in the model; its last modules are {last_names}")

    @property
    def device(self) -> torch.device:
        """Device of the model and of its features."""
        parameter = next(self.model.parameters(), None)
        return torch.device("cpu") if parameter is None else parameter.device


@dataclass(frozen=True)
class _ModelCall:
    """The inputs of a batch, and the tap that captured its features."""

    tap: FeatureTap
    inputs: Tensor

    def features(self, inputs: Tensor) -> Features:
        return self.tap(inputs)

    def gradient(self, loss: Callable[[Features], Tensor]) -> Tensor:
        # Inference tensors cannot be differentiated, so the caller's inference mode is turned off.
        with torch.inference_mode(False):
            inputs = self.inputs.detach().clone().requires_grad_()
            with eval_mode(self.tap.model, gradients=True):
                features = self.tap._caught(inputs)
                return torch.autograd.grad(loss(features), inputs)[0]


class AutocastTap(FeatureTap):
    """A tap that runs the model in the precision of a runtime, also for detectors that call the model again.

    Parameters
    ----------
    model : see `FeatureTap`.
    runtime : its precision is used.
    """

    def __init__(self, model: nn.Module, runtime: Runtime) -> None:
        super().__init__(model)
        self._runtime = runtime

    def capture(self, inputs: Tensor, *, classifier: bool) -> Features:
        """See `FeatureTap`."""
        with self._runtime.autocast():
            return super().capture(inputs, classifier=classifier)


class _Plan:
    """The result of tracing a model, without the tensors of the trace."""

    def __init__(
        self,
        points: dict[str, HookPoint],
        weights: list[WeightRef],
        absent: dict[str, str],
        verdict: str,
        words: dict[str, str],
    ) -> None:
        self.points = points
        self.weights = weights
        self.absent = absent
        self.verdict = verdict
        self.words = words

    @classmethod
    def of(cls, anatomy: Anatomy, traced: Trace) -> "_Plan":
        nodes = {
            name: node
            for name in ("activation", "pooled", "embedding", "logits")
            if (node := getattr(anatomy, name)) is not None
        }
        points = {name: locate(traced, node) for name, node in nodes.items()}
        words = {
            name: f"{_width(node)} wide, from {_place(node)}"
            for name, node in nodes.items()
            if name != "activation"
        }
        return cls(points, anatomy.classifier, anatomy.absent, _verdict(anatomy), words)

    def classifier(self, model: nn.Module) -> Classifier | None:
        """Return the linear map from the hidden layer to the logits, from the model's current weights."""
        product: Tensor | None = None
        offset: Tensor | None = None
        for ref in self.weights:
            weight = _attribute(model, ref.weight).detach()
            weight = weight.T if ref.transposed else weight.flatten(1)
            weight = nn.functional.normalize(weight, dim=1) if ref.unit_rows else weight
            bias = None if ref.bias is None else _attribute(model, ref.bias).detach().reshape(-1)
            if product is None:
                product, offset = weight, bias
                continue
            if bias is not None:
                offset = product @ bias if offset is None else product @ bias + offset
            product = product @ weight
        if product is None:
            return None
        # Copies: features must neither change with the user's weights nor change them.
        return product.clone(), None if offset is None else offset.clone()

    def check(self, model: nn.Module) -> None:
        """Raise a ValueError if a plan from a file does not fit the model."""
        for name, point in self.points.items():
            exists = point.side == "op" or (point.side in ("in", "out") and _has_module(model, point.module))
            if name not in PER_INPUT or not exists:
                raise ValueError(f"the hook point of {name!r} does not exist: {point.side!r} of {point.module!r}")
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        for path in (path for ref in self.weights for path in (ref.weight, ref.bias) if path is not None):
            owner, _, attribute = path.rpartition(".")
            # A parametrized weight is an attribute of its module, but neither a parameter nor a buffer.
            if path not in tensors and not (attribute in ("weight", "bias") and _has_module(model, owner)):
                raise ValueError(f"the classifier is read from {path!r}, which is not a weight of the model")
        self.classifier(model)

    def to_dict(self) -> dict[str, Any]:
        return {
            "points": {name: point.to_dict() for name, point in self.points.items()},
            "weights": [vars(ref) for ref in self.weights],
            "absent": self.absent,
            "verdict": self.verdict,
            "words": self.words,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "_Plan":
        return cls(
            {name: HookPoint.from_dict(point) for name, point in data["points"].items()},
            [WeightRef.from_dict(ref) for ref in data["weights"]],
            _texts(data["absent"]),
            check_text(data["verdict"]),
            _texts(data["words"]),
        )


def _texts(values: Any) -> dict[str, str]:
    return {check_text(name): check_text(text) for name, text in values.items()}


def check_loader(loader: object) -> None:
    """Raise a TypeError if a loader is not an iterable of batches."""
    if isinstance(loader, Tensor):
        raise TypeError("a tensor is not a loader, as its rows would be taken for batches: pass [tensor]")
    if not (hasattr(type(loader), "__iter__") or hasattr(type(loader), "__getitem__")):
        raise TypeError(
            f"the loader must be an iterable of batches such as a DataLoader, got {type(loader).__name__}"
        )


def unwrap(model: nn.Module) -> nn.Module:
    """Return the module inside `torch.compile`, data-parallel and Fabric wrappers."""
    while True:
        inner = getattr(model, "_orig_mod", None) or getattr(model, "_forward_module", None)
        if inner is None and isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def _has_module(model: nn.Module, name: str) -> bool:
    return name in dict(model.named_modules(remove_duplicate=False))


def _verdict(anatomy: Anatomy) -> str:
    node = anatomy.activation
    if node is None:
        return "No last hidden layer for NAN: " + anatomy.absent["activation"] + "."
    found = f"Last hidden layer: {_width(node)} units, from {_place(node)}. "
    if anatomy.kind == "hidden":
        return found + "It is the hidden layer of an MLP head, which is what the paper recommends for NAN."
    if anatomy.kind == "pooled":
        return found + (
            "It is a pool of rectified maps, not the hidden layer of an MLP head. NAN is less accurate there, "
            "because pooled units are rarely off (paper Table 6), and on some models worse than chance: "
            "measure it."
        )
    return found + "It was chosen by name; NAN expects the output of a rectifier."


def _width(node: Node) -> int:
    numbers = node.value.numel() // max(len(node.value), 1)
    # Maps are pooled to one value per channel; a vector may lie along any axis.
    return numbers if numbers in node.shape[1:] else int(node.shape[1])


def _place(node: Node) -> str:
    return f"{base_op(node)} in `{node.module}`" if node.module else f"{base_op(node)} in the model's forward"


def _attribute(model: nn.Module, path: str) -> Tensor:
    value: Any = model
    for part in path.split("."):
        value = getattr(value, part)
    return value


def _as_vectors(value: Tensor) -> Tensor:
    if value.ndim == 4 and value.shape[2:].numel() > 1:
        return value.mean((2, 3))
    return value.flatten(1)


def _length(loader: Iterable[Any]) -> int | None:
    """Return the number of batches, or None; the length of a DataLoader over an iterable data set raises."""
    try:
        return len(loader) if isinstance(loader, Sized) else None
    except TypeError:
        return None


def _split(batch: Any, index: int) -> tuple[Tensor, Tensor | None, str]:
    """Return the inputs, the labels or None, and the reason if there are no labels."""
    inputs: Any = batch
    labels: Any = None
    if isinstance(batch, Mapping):
        inputs = next((batch[key] for key in _INPUT_KEYS if isinstance(batch.get(key), Tensor)), None)
        labels = next((batch[key] for key in _LABEL_KEYS if isinstance(batch.get(key), Tensor)), None)
    elif isinstance(batch, (tuple, list)) and batch:
        inputs, labels = batch[0], batch[1] if len(batch) > 1 else None
    if not isinstance(inputs, Tensor) or inputs.ndim == 0:
        what = f"a dict with keys {list(batch)}" if isinstance(batch, Mapping) else f"a {type(batch).__name__}"
        raise ValueError(
            f"batch {index} of the loader is {what}; expected a tensor of inputs, a tuple that begins with "
            f"one, or a dict with one under {', '.join(_INPUT_KEYS)}"
        )
    if labels is None:
        return inputs, None, "the loader yields none"
    is_classes = isinstance(labels, Tensor) and labels.dtype in _CLASS_TYPES and labels.shape == inputs.shape[:1]
    if is_classes:
        return inputs, labels, ""
    found = (
        f"{labels.dtype} of shape {tuple(labels.shape)}" if isinstance(labels, Tensor) else type(labels).__name__
    )
    return inputs, None, f"the loader's are {found}, and must be one integer per input"


def _noise_for(model: nn.Module) -> Tensor:
    """Return a batch of noise of the input size that the model's configuration or first layer suggests."""
    config = getattr(model, "default_cfg", None)
    if any(isinstance(p, torch.nn.parameter.UninitializedParameter) for p in model.parameters()):
        raise ValueError("the input size of a lazy model cannot be inferred: call tap.trace with a batch first")
    generator = torch.Generator().manual_seed(0)
    shape: tuple[int, ...] | None = None
    if isinstance(config, Mapping) and "input_size" in config:
        shape = tuple(config["input_size"])
    for module in model.modules() if shape is None else ():
        if isinstance(module, nn.Conv2d):
            shape = (module.in_channels, 224, 224)
        elif isinstance(module, nn.Linear):
            shape = (module.in_features,)
        if shape is not None:
            break
    if shape is None:
        raise ValueError("the input size of the model cannot be inferred: call tap.trace with a batch first")
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    return torch.randn(_TRACED_ROWS, *shape, generator=generator).to(dtype)
