"""The paper's networks: a projection head with cosine logits, ResNet-18 for 32 x 32 images, the 5-layer MLP."""

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

Activation = Literal["relu", "leaky_relu", "gelu"]

_ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "leaky_relu": nn.LeakyReLU, "gelu": nn.GELU}
# Of CIFAR-10's training images between 0 and 1, by channel.
CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR10_STD = (0.2470, 0.2435, 0.2616)
# Where torchvision's classifiers keep their last layers.
_CLASSIFIERS = ("fc", "classifier", "head", "heads")


class Normalize(nn.Module):
    """Takes a mean from each channel and divides by a deviation, as torchvision's transform of that name.

    As the first layer of a network it makes it one for pixels between 0 and 1.

    Parameters
    ----------
    mean, std : one number a channel.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).reshape(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).reshape(-1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Return the normalised images (n, c, h, w)."""
        return (images - self.mean) / self.std


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
        self.activation = _activation(activation)
        self.embedding = nn.Linear(width, embedding)
        self.classifier: nn.Module = (
            nn.Identity() if classes is None else CosineClassifier(embedding, classes, temperature)
        )

    def forward(self, pooled: Tensor) -> Tensor:
        """Return the logits (n, classes), or embeddings (n, embedding), of pooled features (n, inputs)."""
        return self.classifier(self.embedding(self.activation(self.hidden(pooled))))


class CSIHead(nn.Module):
    """CSI's heads: an embedding through a hidden layer, and the logits of rotations (Tack et al., NeurIPS 2020).

    Parameters
    ----------
    inputs : width D of the pooled feature that both read.
    hidden : width of the embedding's hidden layer; as wide as the input where None.
    embedding : width of the embedding.
    """

    def __init__(self, inputs: int, *, hidden: int | None = None, embedding: int = 128) -> None:
        super().__init__()
        self.projection = ProjectionHead(inputs, None, hidden=hidden, embedding=embedding)
        self.rotation = nn.Linear(inputs, 4)

    def forward(self, pooled: Tensor) -> dict[str, Tensor]:
        """Return the ``embedding`` (n, e) and the ``logits`` (n, 4) of pooled features (n, inputs)."""
        return {"embedding": self.projection(pooled), "logits": self.rotation(pooled)}


class MLP(nn.Module):
    """The paper's MLP: hidden layers of one width, an embedding, cosine logits at 0.1 (A.3.1).

    Parameters
    ----------
    inputs : numbers an input, once flattened: 3072 for CIFAR-10, 784 for MNIST.
    classes : number of classes.
    layers, hidden : number and width of the hidden layers.
    embedding : width of the embedding.
    activation : of the hidden layers.
    temperature : of the cosine logits.

    Raises
    ------
    ValueError
        The activation is unknown, or the temperature is not positive.
    """

    def __init__(
        self,
        inputs: int,
        classes: int,
        *,
        layers: int = 5,
        hidden: int = 512,
        embedding: int = 512,
        activation: Activation = "relu",
        temperature: float = 0.1,
    ) -> None:
        super().__init__()
        body: list[nn.Module] = [nn.Flatten()]
        for layer in range(layers):
            body += [nn.Linear(inputs if layer == 0 else hidden, hidden), _activation(activation)]
        self.body = nn.Sequential(*body)
        self.embedding = nn.Linear(hidden, embedding)
        self.classifier = CosineClassifier(embedding, classes, temperature)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (n, classes) of images (n, ...)."""
        return self.classifier(self.embedding(self.body(images)))


class CifarResNet18(nn.Module):
    """ResNet-18 for 32 x 32 images: a 3 x 3 stem and no first pooling (He et al., CVPR 2016, for CIFAR).

    Returns the pooled feature, of width ``8 * width``; put a `ProjectionHead` on top.

    Parameters
    ----------
    width : channels of the first stage; 64 is the paper's.
    """

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.features = 8 * width
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)
        )
        stages: list[nn.Module] = []
        channels = width
        for stage in range(4):
            outputs = width << stage
            stages += [
                _Block(channels, outputs, stride=1 if stage == 0 else 2),
                _Block(outputs, outputs, stride=1),
            ]
            channels = outputs
        self.stages = nn.Sequential(*stages)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Return the pooled features (n, 8 * width) of images (n, 3, h, w)."""
        return self.stages(self.stem(images)).mean((2, 3))


class _Block(nn.Module):
    """Two convolutions and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu_(self.body(x) + self.shortcut(x))


def cifar_network(
    width: int,
    classes: int | None,
    *,
    hidden: int | None = 512,
    embedding: int = 128,
    activation: Activation = "relu",
    temperature: float = 0.1,
    mean: Sequence[float] = CIFAR10_MEAN,
    std: Sequence[float] = CIFAR10_STD,
    seed: int = 0,
) -> nn.Sequential:
    """Return the network of the paper's 32 x 32 benchmarks (C.1): ``Sequential(Normalize, CifarResNet18, head)``.

    Parameters
    ----------
    width : of the `CifarResNet18`.
    classes : number of classes; None for none, which takes a hidden layer and returns the embedding.
    hidden : width of the `ProjectionHead`'s hidden layer; None for cosine logits of the pooled feature itself.
    embedding, activation : of the head; nothing without a hidden layer.
    temperature : of the cosine logits.
    mean, std : of the pixels between 0 and 1 that it takes, by channel; those of CIFAR-10's training images.
    seed : of the initial weights; the caller's random state stays as it is.

    Raises
    ------
    ValueError
        The activation is unknown, the temperature is not positive, or there is neither class nor hidden layer.
    """

    def head(features: int) -> nn.Module:
        if hidden is not None:
            return ProjectionHead(
                features,
                classes,
                hidden=hidden,
                embedding=embedding,
                activation=activation,
                temperature=temperature,
            )
        if classes is None:
            raise ValueError("a head without classes is a projection: give it a hidden layer")
        return CosineClassifier(features, classes, temperature)

    return cifar_network_with(head, width, mean=mean, std=std, seed=seed)


def cifar_network_with(
    head: Callable[[int], nn.Module],
    width: int,
    *,
    mean: Sequence[float] = CIFAR10_MEAN,
    std: Sequence[float] = CIFAR10_STD,
    seed: int = 0,
) -> nn.Sequential:
    """Return ``Sequential(Normalize, CifarResNet18, head)`` with a head of one's own.

    Parameters
    ----------
    head : makes it from the width of the pooled feature, such as `CSIHead`.
    width, mean, std, seed : see `cifar_network`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = CifarResNet18(width)
        return nn.Sequential(Normalize(mean, std), backbone, head(backbone.features))


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


def _activation(name: str) -> nn.Module:
    if name not in _ACTIVATIONS:
        raise ValueError(f"there is no activation {name!r}: use one of {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]()
