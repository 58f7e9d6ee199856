"""The detectors, one file a family, and the expressions that name them."""

from featnorm.detectors.base import Detector, NotFittedError
from featnorm.detectors.boundary import OneClassSVM
from featnorm.detectors.confidence import MSP, Energy, KLUniform, MaxLogit
from featnorm.detectors.distance import SSD, Mahalanobis
from featnorm.detectors.expression import parse_detector
from featnorm.detectors.fusion import Fusion
from featnorm.detectors.neighbors import KNN
from featnorm.detectors.norm import NAN, EmbeddingMagnitude, HiddenConfidence, L1Norm, LpNorm, Sparsity
from featnorm.detectors.perturbation import ODIN, Views
from featnorm.detectors.rotation import CSI, RotNet
from featnorm.detectors.shaping import ReAct
from featnorm.detectors.subspace import Residual, ViM

__all__ = [
    "CSI",
    "KNN",
    "MSP",
    "NAN",
    "ODIN",
    "SSD",
    "Detector",
    "EmbeddingMagnitude",
    "Energy",
    "Fusion",
    "HiddenConfidence",
    "KLUniform",
    "L1Norm",
    "LpNorm",
    "Mahalanobis",
    "MaxLogit",
    "NotFittedError",
    "OneClassSVM",
    "ReAct",
    "Residual",
    "RotNet",
    "Sparsity",
    "ViM",
    "Views",
    "parse_detector",
]
