"""Networks whose last hidden layer carries the norm, heads for networks that have none, and how to train them."""

from featnorm.augmentation import augment
from featnorm.training.loop import train, train_head
from featnorm.training.networks import (
    MLP,
    CifarResNet18,
    CosineClassifier,
    CSIHead,
    Normalize,
    ProjectionHead,
    attach_head,
    cifar_network,
    cifar_network_with,
    cut_classifier,
)
from featnorm.training.probe import Probe
from featnorm.training.recipe import PRESETS, Recipe, scheme_labels

__all__ = [
    "MLP",
    "PRESETS",
    "CSIHead",
    "CifarResNet18",
    "CosineClassifier",
    "Normalize",
    "Probe",
    "ProjectionHead",
    "Recipe",
    "attach_head",
    "augment",
    "cifar_network",
    "cifar_network_with",
    "cut_classifier",
    "scheme_labels",
    "train",
    "train_head",
]
