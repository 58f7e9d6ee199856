"""Networks that only the reproduction trains: the paper's MLP, and the heads of CSI."""

from torch import Tensor, nn

from featnorm.models import CosineClassifier, ProjectionHead
from featnorm.models.heads import Activation, activation_layer


class CSIHead(nn.Module):
    """CSI's heads: an embedding through a hidden layer, and the logits of rotations (Tack et al., NeurIPS 2020).

    Parameters
    ----------
    inputs : width D of the pooled feature that both heads read.
    hidden : width of the embedding's hidden layer. Default: D.
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
    inputs : numbers per flattened input: 3072 for CIFAR-10, 784 for MNIST.
    classes : number of classes.
    layers, hidden : number and width of the hidden layers.
    embedding : width of the embedding.
    activation : activation of the hidden layers.
    temperature : temperature of the cosine logits.

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
            body += [nn.Linear(inputs if layer == 0 else hidden, hidden), activation_layer(activation)]
        self.body = nn.Sequential(*body)
        self.embedding = nn.Linear(hidden, embedding)
        self.classifier = CosineClassifier(embedding, classes, temperature)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (n, classes) of images (n, ...)."""
        return self.classifier(self.embedding(self.body(images)))
