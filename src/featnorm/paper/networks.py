"""Networks that only the reproduction trains: the paper's MLP, the heads of CSI, and a transformer."""

import torch
from torch import Tensor, nn

from featnorm._utils.extras import import_extra
from featnorm.models import CosineClassifier, Normalize, ProjectionHead
from featnorm.models.cifar import CIFAR10_MEAN, CIFAR10_STD
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


def cifar_transformer(
    classes: int, *, width: int, depth: int, heads: int, mlp_ratio: float, hidden: int, seed: int
) -> nn.Sequential:
    """Return a vision transformer for 32 x 32 images with the paper's head.

    It is ``Sequential(Normalize, stem, transformer, head)``. The stem is two convolutions of stride 2, with which
    transformers need fewer epochs (Xiao et al., NeurIPS 2021); the 64 positions of its output are the tokens of
    timm's `VisionTransformer`, whose average the head reads. Images may be smaller, as crops in training are:
    position embeddings are interpolated.

    Parameters
    ----------
    classes : number of classes.
    width, depth, heads, mlp_ratio : settings of the transformer.
    hidden : width of the `ProjectionHead`'s hidden layer, which is rectified.
    seed : seed of the initial weights; the caller's random state does not change.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for channels in (3, width // 2):
            layers += [nn.Conv2d(channels, width // 2, 3, stride=2, padding=1, bias=False)]
            layers += [nn.BatchNorm2d(width // 2), nn.ReLU(inplace=True)]
        body = import_extra("timm.models.vision_transformer").VisionTransformer(
            img_size=8,
            patch_size=1,
            in_chans=width // 2,
            embed_dim=width,
            depth=depth,
            num_heads=heads,
            mlp_ratio=mlp_ratio,
            num_classes=0,
            global_pool="avg",
            class_token=False,
            dynamic_img_size=True,
        )
        for block in body.blocks:
            # On a CPU, the backward pass of the fused attention takes several times as long.
            block.attn.fused_attn = False
        head = ProjectionHead(width, classes, hidden=hidden)
        return nn.Sequential(Normalize(CIFAR10_MEAN, CIFAR10_STD), nn.Sequential(*layers), body, head)
