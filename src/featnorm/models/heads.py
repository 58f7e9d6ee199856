"""Heads: the paper's projection head with cosine logits, and functions to replace a model's classifier by it."""

import copy
import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from featnorm._utils.weights import single_precision
from featnorm.inputs.kinds import TEXTS, Kind

Activation = Literal["relu", "leaky_relu", "gelu"]

_ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "leaky_relu": nn.LeakyReLU, "gelu": nn.GELU}
# Attributes that hold the last layers of torchvision's classifiers.
_CLASSIFIERS = ("fc", "classifier", "head", "heads")


class CosineClassifier(nn.Module):
    """Cosine similarity of an embedding to class prototypes, divided by a temperature (paper eq. 41).

    Parameters
    ----------
    embedding : width of the embedding, which this layer normalizes.
    classes : number of classes, each with one prototype.
    temperature : temperature T, by which the similarities are divided.
    """

    def __init__(self, embedding: int, classes: int, temperature: float) -> None:
        super().__init__()
        if not 0 < temperature < math.inf:
            raise ValueError(f"the temperature must be positive, got {temperature!r}")
        self.temperature = temperature
        self.weight = nn.Parameter(torch.empty(classes, embedding))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def forward(self, embedding: Tensor) -> Tensor:
        """Return the logits (n, classes) of embeddings (n, embedding)."""
        cosine = nn.functional.linear(nn.functional.normalize(embedding), nn.functional.normalize(self.weight))
        return cosine / self.temperature


class ProjectionHead(nn.Module):
    """The head for which NAN is designed: hidden layer, embedding, cosine logits (paper A.2.4, C.1).

    Parameters
    ----------
    inputs : width D of the pooled feature.
    classes : number of classes. None returns the embedding instead of logits, for contrastive objectives.
    hidden : width d_L of the last hidden layer (paper Figure 7). Default: the width of the input, as in MoCo-v2.
    embedding : width of the embedding.
    activation : activation function of the hidden layer (paper Table 7).
    temperature : temperature of the cosine logits; 0.1 for CIFAR-10 (C.1), 0.2 for the head on ViT (D.4).

    Raises
    ------
    ValueError
        The activation is unknown, or the temperature is not positive.
    """

    def __init__(
        self,
        inputs: int,
        classes: int | None,
        *,
        hidden: int | None = None,
        embedding: int = 128,
        activation: Activation = "relu",
        temperature: float = 0.1,
    ) -> None:
        width = inputs if hidden is None else hidden
        super().__init__()
        self.hidden = nn.Linear(inputs, width)
        self.activation = activation_layer(activation)
        self.embedding = nn.Linear(width, embedding)
        self.classifier: nn.Module = (
            nn.Identity() if classes is None else CosineClassifier(embedding, classes, temperature)
        )

    def forward(self, pooled: Tensor) -> Tensor:
        """Return the logits (n, classes), or the embeddings (n, embedding), of pooled features (n, inputs)."""
        return self.classifier(self.embedding(self.activation(self.hidden(pooled))))


def head_settings(head: ProjectionHead) -> dict[str, Any]:
    """Return the settings of a head with a ReLU and a cosine classifier as plain data; see `head_of`."""
    classifier: Any = head.classifier
    return {
        "inputs": head.hidden.in_features,
        "classes": len(classifier.weight),
        "hidden": head.hidden.out_features,
        "embedding": head.embedding.out_features,
        "temperature": classifier.temperature,
    }


def head_of(settings: Mapping[str, Any], weights: Mapping[str, Tensor]) -> ProjectionHead:
    """Return a head with the settings that `head_settings` returned; their sizes must be those of the weights.

    Raises
    ------
    LookupError, TypeError, ValueError
        The sizes differ, or the settings are not those of a head.
    """
    hidden, embedding, classifier = (weights[f"{name}.weight"] for name in ("hidden", "embedding", "classifier"))
    sizes = {
        "inputs": hidden.shape[1],
        "classes": classifier.shape[0],
        "hidden": hidden.shape[0],
        "embedding": embedding.shape[0],
    }
    # Checked before a head is made that may not fit in memory.
    if {name: settings[name] for name in sizes} != sizes:
        raise ValueError(f"its weights are those of a head with {sizes}, but its settings are {dict(settings)}")
    with single_precision():
        return ProjectionHead(**settings)


def attach_head(
    backbone: nn.Module,
    classes: int | None,
    *,
    features: int | None = None,
    hidden: int | None = None,
    embedding: int = 128,
    activation: Activation = "relu",
    temperature: float = 0.1,
) -> nn.Sequential:
    """Replace the classifier of a copy of a backbone by a projection head.

    Parameters
    ----------
    backbone
        A timm model, a torchvision classifier (whose layers are removed from the first linear one on), or, with
        ``features``, any module that returns (n, features).
    classes : number of classes or None, see `ProjectionHead`.
    features : width of the backbone's output. Default: found in models of timm and torchvision.
    hidden, embedding, activation, temperature : settings of the head, see `ProjectionHead`.

    Returns
    -------
    ``Sequential(backbone, head)``; `FeatureTap` finds the head's hidden layer in it.

    Raises
    ------
    ValueError
        The classifier of the backbone was not found, or a setting of the head is invalid.
    """
    body, width = (copy.deepcopy(backbone), features) if features is not None else cut_classifier(backbone)
    head = ProjectionHead(
        width, classes, hidden=hidden, embedding=embedding, activation=activation, temperature=temperature
    )
    return nn.Sequential(body, head)


class _ByName(nn.Sequential):
    """A backbone that takes its inputs by name, and a head on its output."""

    def forward(self, **inputs: Tensor) -> Any:  # type: ignore[override]
        """Return the output of the head."""
        backbone, head = self
        return head(backbone(**inputs))


def with_head(backbone: nn.Module, head: nn.Module, kind: Kind) -> nn.Sequential:
    """Return a head on the output of a backbone, for inputs of a kind."""
    return (_ByName if kind is TEXTS else nn.Sequential)(backbone, head)


def cut_classifier(model: nn.Module) -> tuple[nn.Module, int]:
    """Return a copy of a model without its classifier, and the width of the features that the copy returns.

    Parameters
    ----------
    model
        A timm model, a torchvision classifier (whose layers are removed from the first linear one on), or a
        network of featnorm, such as `cifar_network` returns.

    Raises
    ------
    ValueError
        No classifier was found.
    """
    body: Any = copy.deepcopy(model)
    if hasattr(body, "reset_classifier"):
        body.reset_classifier(0)
        return body, int(getattr(body, "head_hidden_size", None) or body.num_features)
    if isinstance(body, nn.Sequential) and len(body) and isinstance(body[-1], (ProjectionHead, CosineClassifier)):
        last = body[-1]
        return body[:-1], last.hidden.in_features if isinstance(last, ProjectionHead) else last.weight.shape[1]
    for name in _CLASSIFIERS:
        head = getattr(body, name, None)
        if isinstance(head, nn.Linear):
            setattr(body, name, nn.Identity())
            return body, head.in_features
        if isinstance(head, nn.Sequential):
            for i, layer in enumerate(head):
                if isinstance(layer, nn.Linear):
                    setattr(body, name, head[:i])
                    return body, layer.in_features
    raise ValueError(
        f"{type(model).__name__} has no linear classifier named {', '.join(_CLASSIFIERS)}: remove its last layers "
        "yourself and pass the width of its output as features="
    )


def activation_layer(name: str) -> nn.Module:
    """Return an activation function by its name, see `Activation`."""
    if name not in _ACTIVATIONS:
        raise ValueError(f"unknown activation {name!r}: use one of {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]()
