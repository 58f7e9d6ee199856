"""`Features`: what a model computes for a batch of inputs, as far as detectors read it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from featnorm._utils.checks import check_type, shown

Classifier: TypeAlias = tuple[Tensor, Tensor | None]

PER_INPUT = ("activation", "pooled", "embedding", "logits", "labels")
FIELDS = (*PER_INPUT, "classifier")

# Largest difference between W f + b and the logits, relative to the largest logit, at which W counts as the layer
# that made them: reduced precision (bfloat16 autocast, TF32) differs by less than this, another layer by about
# one.
_LOGITS_TOLERANCE = 0.05
_COMPARED_ROWS = 32
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class ModelCall(Protocol):
    """The forward pass that made some features: its inputs, and a way to run the model again."""

    @property
    def inputs(self) -> Tensor:
        """Inputs (n, ...) of the model."""
        ...

    def features(self, inputs: Tensor) -> "Features":
        """Run the model on other inputs, and return their features."""
        ...

    def gradient(self, loss: "Callable[[Features], Tensor]") -> Tensor:
        """Return the gradient with respect to the inputs, (n, ...), of a loss that is summed over them."""
        ...


class Boxes(NamedTuple):
    """Boxes that an object detector found.

    Attributes
    ----------
    corners : (n, 4) x1, y1, x2, y2 in pixels of the image.
    labels : (n,) int64, class of each box, the index of its logit; class 0 is the background.
    confidence : (n,) the model's own, in [0, 1].
    """

    corners: Tensor
    labels: Tensor
    confidence: Tensor


@dataclass(frozen=True, eq=False)
class Parts:
    """What the rows of features are of, if an input has several: positions of a map, or detected boxes.

    Parameters
    ----------
    owners : (n,) int64, index of the input of each row, ascending.
    count : number of inputs, including those without rows.
    grid : height and width of the map whose positions the rows are, row by row.
    boxes : the boxes that the rows are of.
    """

    owners: Tensor
    count: int
    grid: tuple[int, int] | None = None
    boxes: Boxes | None = None

    def to(self, device: torch.device | str) -> "Parts":
        """Move to a device."""
        boxes = None if self.boxes is None else Boxes(*(value.to(device) for value in self.boxes))
        return replace(self, owners=self.owners.to(device), boxes=boxes)


@dataclass(frozen=True, eq=False)
class Features:
    """Features of n inputs. Any subset of the fields may be given; a detector names the field that it misses.

    Parameters
    ----------
    activation : (n, d) last hidden layer, after its non-linearity.
    pooled : (n, D) input of the head or, in a model without a head, of the classifier.
    embedding : (n, e) embedding before normalization.
    logits
        (n, C). One logit z, as of a binary classifier, becomes two, (-z / 2, z / 2), and so do W and b.
    labels : (n,) integer class of each input; negative for an input without a label.
    classifier
        ``(W, b)`` of the linear map ``logits = W f + b``, the last linear layer; W of shape (C, f), b of shape
        (C,) or None. If an embedding precedes the classifier, W is the product of the two (paper A.1).
    absent : reasons why fields are missing, by field, for the error of a detector that reads one.
    call
        Forward pass that made one batch, for detectors that run the model again. It is dropped when rows are
        selected or batches joined.
    parts : what the rows are of, if an input has several; dropped as `call` is. Default: one row per input.

    Raises
    ------
    ValueError
        A field has the wrong rank or type, the fields differ in n, or no field is given.
    TypeError
        A field is not a tensor.

    Examples
    --------
    >>> features = Features(activation=torch.rand(100, 64), logits=torch.randn(100, 10))
    >>> features
    Features(activation (100, 64), logits (100, 10))
    >>> NAN().score(features).shape
    torch.Size([100])
    """

    activation: Tensor | None = None
    pooled: Tensor | None = None
    embedding: Tensor | None = None
    logits: Tensor | None = None
    labels: Tensor | None = None
    classifier: Classifier | None = None
    absent: Mapping[str, str] = field(default_factory=dict, repr=False)
    call: ModelCall | None = field(default=None, repr=False)
    parts: Parts | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self._use_two_classes()
        # In a graph that is being traced the number of inputs is symbolic.
        if torch.compiler.is_compiling():
            return
        sizes = {}
        for name, value in self.fields():
            if not isinstance(value, Tensor):
                raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
            if name == "labels":
                if value.ndim != 1 or value.dtype not in _INTEGERS:
                    raise ValueError(
                        f"labels must be integers of shape (n,), got {value.dtype} of shape {tuple(value.shape)}"
                    )
            elif value.ndim != 2 or not value.is_floating_point():
                raise ValueError(
                    f"{name} must be floating point of shape (n, width), "
                    f"got {value.dtype} of shape {tuple(value.shape)}"
                )
            sizes[name] = value.shape[0]
        if not sizes:
            raise ValueError(f"Features need at least one of {', '.join(PER_INPUT)}")
        if len(set(sizes.values())) > 1:
            raise ValueError(f"the fields of Features differ in their number of inputs: {sizes}")
        if self.parts is not None and len(self.parts.owners) != len(self):
            raise ValueError(f"there are {len(self.parts.owners)} owners of {len(self)} rows of Features")
        if self.classifier is not None:
            self._check_classifier(self.classifier)

    def _use_two_classes(self) -> None:
        """Turn one logit into those of two classes."""
        logits, classifier = self.logits, self.classifier
        if isinstance(logits, Tensor) and logits.ndim == 2 and logits.shape[1] == 1:
            object.__setattr__(self, "logits", two_classes(logits, 1))
        if isinstance(classifier, (tuple, list)) and getattr(classifier[0], "shape", ())[:1] == (1,):
            weight, bias = classifier
            pair = (two_classes(weight), None if bias is None else two_classes(bias))
            object.__setattr__(self, "classifier", pair)

    @staticmethod
    def _check_classifier(classifier: object) -> None:
        if not isinstance(classifier, (tuple, list)) or len(classifier) != 2:
            raise TypeError(f"classifier must be a pair (W, b), got {shown(classifier)}")
        weight, bias = classifier
        check_type(weight, Tensor, "W of the classifier", "a tensor")
        check_type(bias, (Tensor, type(None)), "b of the classifier", "a tensor or None")
        if weight.ndim != 2 or (bias is not None and bias.shape != weight.shape[:1]):
            raise ValueError(
                "classifier must be (W, b) with W of shape (C, f) and b of shape (C,) or None, got "
                f"{tuple(weight.shape)} and {None if bias is None else tuple(bias.shape)}"
            )

    def fields(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the name and the tensor of every field that holds one row per input."""
        for name in PER_INPUT:
            value = getattr(self, name)
            if value is not None:
                yield name, value

    def tensor(self, name: str) -> Tensor:
        """Return a field; raise a ValueError that says why it is missing, or which fields there are."""
        return self._field(name)

    def require_call(self, detector: object) -> ModelCall:
        """Return the forward pass that made these features; raise a ValueError if there is none to run again."""
        if self.parts is not None:
            raise ValueError(
                f"{detector!r} runs the model on changed inputs, which is possible per input only, and not per "
                "position or box: choose another detector"
            )
        if self.call is None:
            raise ValueError(
                f"{detector!r} runs the model again, and these features came without their inputs: use a Scorer, "
                "or score the batches of FeatureTap.stream one by one"
            )
        return self.call

    def linear(self) -> Classifier:
        """Return the classifier's ``(W, b)``, detached; raise a ValueError if there is none."""
        weight, bias = self._field("classifier")
        return weight.detach(), None if bias is None else bias.detach()

    def __len__(self) -> int:
        return len(next(self.fields())[1])

    def __repr__(self) -> str:
        fields = ", ".join(f"{name} {tuple(value.shape)}" for name, value in self.fields())
        if self.classifier is not None:
            fields += f", classifier {tuple(self.classifier[0].shape)}"
        return f"Features({fields})"

    def __getitem__(self, rows: slice | Tensor | Sequence[int]) -> "Features":
        """Return the features of some inputs, selected by a slice, a boolean mask or indices."""
        if isinstance(rows, int):
            raise TypeError(f"one input of Features is features[{rows}:{rows} + 1], a batch of one")
        index = rows if isinstance(rows, (slice, Tensor)) else list(rows)
        return self._map(lambda value: value[index])

    def to(self, *args: torch.device | str | torch.dtype) -> "Features":
        """Move to a device, or to a floating-point type, as `torch.Tensor.to` does; labels stay integers."""
        dtypes = [arg for arg in args if isinstance(arg, torch.dtype)]
        devices = [arg for arg in args if not isinstance(arg, torch.dtype)]

        def move(value: Tensor) -> Tensor:
            for device in devices:
                value = value.to(device)
            for dtype in dtypes if value.is_floating_point() else ():
                value = value.to(dtype)
            return value

        moved = self._map(move)
        if self.parts is not None:
            parts = self.parts
            for device in devices:
                parts = parts.to(device)
            moved = moved.replace(parts=parts)
        if self.classifier is None:
            return moved
        weight, bias = self.classifier
        return moved.replace(classifier=(move(weight), None if bias is None else move(bias)))

    def replace(self, **fields: Any) -> "Features":
        """Return a copy with some fields replaced."""
        current = {name: getattr(self, name) for name in (*PER_INPUT, "classifier", "absent", "call", "parts")}
        return Features(**{**current, **fields})

    @property
    def last_layer(self) -> str:
        """Name of the field of the last layer: ``activation`` or, in a model without one, ``pooled``."""
        return "pooled" if self.activation is None else "activation"

    def classifier_reads(self, name: str) -> bool:
        """Return whether the classifier's linear map is applied to the field ``name``.

        The widths must agree and, if there are logits, ``W f + b`` must agree with them. A cosine classifier does
        not read the field in this sense, nor does a classifier behind a head.
        """
        value = getattr(self, name)
        if self.classifier is None or value is None:
            return False
        weight, bias = self.linear()
        if weight.shape[1] != value.shape[1]:
            return False
        if self.logits is None or len(value) == 0:
            return True
        rows = slice(0, _COMPARED_ROWS)
        expected = self.logits[rows].double()
        got = value[rows].double() @ weight.double().T.to(value.device)
        if bias is not None:
            got = got + bias.double().to(value.device)
        return got.shape == expected.shape and bool(
            (got - expected).abs().max() <= _LOGITS_TOLERANCE * expected.abs().max().clamp_min(1e-30)
        )

    @staticmethod
    def cat(parts: Sequence["Features"]) -> "Features":
        """Join batches of the same fields, in order.

        Raises
        ------
        ValueError
            There is no batch, or two batches have different fields.
        TypeError
            ``parts`` is not a sequence of `Features`.
        """
        check_type(parts, Sequence, "parts", "a sequence of Features")
        if not parts:
            raise ValueError("there is no batch of Features to join")
        for i, part in enumerate(parts):
            check_type(part, Features, f"batch {i}", "Features")
        names = [name for name, _ in parts[0].fields()]
        for i, part in enumerate(parts):
            if [name for name, _ in part.fields()] != names:
                raise ValueError(f"batch {i} has other fields than batch 0: {part} and {parts[0]}")
        joined: dict[tuple[int, ...], Tensor] = {}
        fields = {}
        for name in names:
            values = [getattr(part, name) for part in parts]
            # A tensor under two names (a pooled feature that is the last hidden layer) stays one tensor.
            key = tuple(id(value) for value in values)
            if len({value.shape[1:] for value in values}) > 1:
                widths = [tuple(value.shape[1:]) for value in values]
                raise ValueError(f"the batches differ in the width of {name}: {widths}")
            if key not in joined:
                joined[key] = torch.cat(values)
            fields[name] = joined[key]
        return parts[0].replace(call=None, parts=None, **fields)

    def _field(self, name: str) -> Any:
        value = getattr(self, name)
        if value is None:
            why = self.absent.get(name)
            raise ValueError(f"there is no `{name}`: {why}" if why else f"`{name}` is not in {self!r}")
        return value

    def _map(self, function: Callable[[Tensor], Tensor]) -> "Features":
        done: dict[int, Tensor] = {}
        for _, value in self.fields():
            if id(value) not in done:
                done[id(value)] = function(value)
        return self.replace(call=None, parts=None, **{name: done[id(value)] for name, value in self.fields()})


def two_classes(value: Tensor, axis: int = 0) -> Tensor:
    """Return one logit z, or what makes it, as (-z / 2, z / 2).

    The softmax is that of (0, z): the sigmoid of z. Centered, the largest logit and the energy rise with the
    confidence in either class, and not in the second alone.
    """
    return torch.cat([-value, value], axis) / 2
