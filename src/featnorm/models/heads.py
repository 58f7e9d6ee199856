"""Heads: the paper's projection head with cosine logits, and how it takes the place of a model's classifier."""

import copy
import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

Activation = Literal["relu", "leaky_relu", "gelu"]

_ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "leaky_relu": nn.LeakyReLU, "gelu": nn.GELU}
# Where torchvision's classifiers keep their last layers.
_CLASSIFIERS = ("fc", "classifier", "head", "heads")


class CosineClassifier(nn.Module):
    """Cosine similarity of an embedding to class prototypes, over a temperature (paper eq. 41).

    Parameters
    ----------
    embedding : width of the embedding, which is normalised here.
    classes : number of prototypes.
    temperature : T, the similarities are divided by it.
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
    """The head that NAN is meant for: hidden layer, embedding, cosine logits (paper A.2.4, C.1).

    Parameters
    ----------
    inputs : width D of the pooled feature that it reads.
    classes : number of classes; None for none, which returns the embedding (for contrastive objectives).
    hidden : width d_L of the last hidden layer (paper Figure 7); as wide as the input where None, as MoCo-v2's.
    embedding : width of the embedding.
    activation : of the hidden layer (paper Table 7).
    temperature : 0.1 for CIFAR-10 (C.1), 0.2 for the head on ViT (D.4).

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
        """Return the logits (n, classes), or embeddings (n, embedding), of pooled features (n, inputs)."""
        return self.classifier(self.embedding(self.activation(self.hidden(pooled))))


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
    """Put a projection head on a copy of a backbone, in place of its classifier.

    Parameters
    ----------
    backbone
        A timm model, a torchvision classifier (its layers from the first linear one on are left out), or with
        ``features`` any module that returns (n, features).
    classes : number of classes, or None, see `ProjectionHead`.
    features : width of what the backbone returns; None for timm's and torchvision's models.
    hidden, embedding, activation, temperature : of the head, see `ProjectionHead`.

    Returns
    -------
    ``Sequential(backbone, head)``; `FeatureTap` finds the head's hidden layer in it.

    Raises
    ------
    ValueError
        The backbone has no classifier that could be found, or a setting of the head is wrong.
    """
    body, width = (copy.deepcopy(backbone), features) if features is not None else cut_classifier(backbone)
    head = ProjectionHead(
        width, classes, hidden=hidden, embedding=embedding, activation=activation, temperature=temperature
    )
    return nn.Sequential(body, head)


def cut_classifier(model: nn.Module) -> tuple[nn.Module, int]:
    """Return a copy of a classifier without its classifier, and the width of the features that it then returns.

    Parameters
    ----------
    model
        A timm model, a torchvision classifier (its layers from the first linear one on are left out), or one of
        ours, such as `cifar_network` returns.

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
        f"{type(model).__name__} has no linear classifier under any of {', '.join(_CLASSIFIERS)}: take its last "
        "layers off yourself and pass the width of what it then returns as features="
    )


def activation_layer(name: str) -> nn.Module:
    """Return a non-linearity by its name, one of those of `Activation`."""
    if name not in _ACTIVATIONS:
        raise ValueError(f"there is no activation {name!r}: use one of {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]()
