"""Every rectified layer of a model, in one pass."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from featnorm._utils.checks import check_type
from featnorm.hidden.classifier import HiddenClassifier
from featnorm.tap.batch import Call
from featnorm.tap.capture import HookPoint, capture, eval_mode, locate, made
from featnorm.tap.find import find
from featnorm.tap.linear import hidden_classifiers
from featnorm.tap.ops import base_op, is_rectifier
from featnorm.tap.tap import unwrap
from featnorm.tap.trace import Node, trace

_TRACED_ROWS = 2


class LayerTap:
    """Captures several layers of a model in one pass, and leaves the model unchanged.

    Parameters
    ----------
    model : module that maps a batch of inputs to any output.
    inputs : batch to trace the model on.
    layers
        Names of the modules whose outputs to capture. Default: every rectified layer, whether a module or a
        function, in the order in which they run.
    last : name for the last hidden layer, as found by `FeatureTap`, which then comes first. Default: not captured.

    Raises
    ------
    ValueError
        A module is not in the model or did not run, the model has no rectified layer, or ``last`` is given and
        there is no last hidden layer.
    TypeError
        The model is not a `torch.nn.Module`, or the inputs are not a tensor.

    Examples
    --------
    >>> {name: values.shape for name, values in LayerTap(model, images)(images).items()}
    {'0: 1': torch.Size([8, 576])}
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Tensor,
        layers: Sequence[str] | None = None,
        *,
        last: str | None = None,
    ) -> None:
        check_type(model, nn.Module, "the model", "a torch.nn.Module")
        check_type(inputs, Tensor, "the inputs", "a tensor")
        self.model = unwrap(model)
        with eval_mode(self.model):
            traced = trace(self.model, Call((inputs[:_TRACED_ROWS],)))
        if layers is None:
            nodes = [node for node in traced.nodes if node.from_input and is_rectifier(node) and _is_layer(node)]
            # Of a gate that is written out in several operations, only the last counts as a layer.
            found = {f"{i}: {node.module or base_op(node)}": node for i, node in enumerate(nodes)}
        else:
            found = {}
            for name in layers:
                outputs = [io.node for io in traced.module_io if io.module == name and io.side == "out"]
                if not outputs:
                    last_names = ", ".join([n for n, _ in self.model.named_modules() if n][-8:])
                    raise ValueError(f"no module {name!r} ran; the last modules of the model are {last_names}")
                found[name] = outputs[-1]
        self._logits: HookPoint | None = None
        try:
            anatomy = find(traced, self.model)
        except ValueError as error:
            if last is not None:
                raise
            self._no_logits = str(error)  # only the hidden classifiers need them
        else:
            self._no_logits = anatomy.absent.get("logits", "")
            if anatomy.logits:
                self._logits = locate(traced, anatomy.logits[0].node)
            if last is not None:
                if len(anatomy.activation) != 1:
                    why = anatomy.absent.get("activation", "it has several parts, one per head")
                    raise ValueError(f"there is no last hidden layer: {why}")
                found = {last: anatomy.activation[0].node, **found}
        if not found:
            raise ValueError("nothing in this model is rectified: pass the names of layers")
        self.points: dict[str, HookPoint] = {name: locate(traced, node) for name, node in found.items()}
        self._made = {name: made(traced, node) for name, node in found.items()}

    @property
    def names(self) -> list[str]:
        """Names of the layers, in order."""
        return list(self.points)

    def __call__(self, inputs: Tensor) -> dict[str, Tensor]:
        """Return the flattened output of every layer for a batch, (n, d) each."""
        with eval_mode(self.model), torch.no_grad():
            caught = capture(self.model, self.points, Call((inputs,)))
        return {name: value.flatten(1) for name, value in caught.items()}

    def hidden(self, inputs: Tensor) -> dict[str, HiddenClassifier]:
        """Return the classifier hidden in every layer, from one forward pass and one backward pass per class.

        See `FeatureTap.hidden` for the result and the errors.
        """
        if self._logits is None:
            raise ValueError(f"there is no hidden classifier without logits: {self._no_logits}")
        return hidden_classifiers(self.model, self._made, self._logits, Call((inputs,)))


def _is_layer(node: Node) -> bool:
    return node.value.is_floating_point() and node.value.ndim >= 2
