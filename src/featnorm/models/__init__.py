"""Models by name, with their transforms and weights; the packaged network; and heads."""

from featnorm.models.cifar import CifarResNet18, Normalize, cifar_network, cifar_network_with
from featnorm.models.errors import ModelError
from featnorm.models.heads import CosineClassifier, ProjectionHead, attach_head, cut_classifier
from featnorm.models.loading import DEFAULT_MODEL, LoadedModel, create_model
from featnorm.models.packaged import load_model, model_names
from featnorm.models.text import DEFAULT_TEXT_MODEL

__all__ = [
    "DEFAULT_MODEL",
    "DEFAULT_TEXT_MODEL",
    "CifarResNet18",
    "CosineClassifier",
    "LoadedModel",
    "ModelError",
    "Normalize",
    "ProjectionHead",
    "attach_head",
    "cifar_network",
    "cifar_network_with",
    "create_model",
    "cut_classifier",
    "load_model",
    "model_names",
]
