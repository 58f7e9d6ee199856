"""The detectors, one file per family, and the expressions that name them.

Importing a detector here registers it and makes it public, in `featnorm` too.
"""

from featnorm.detectors.base import Detector as Detector
from featnorm.detectors.base import NotFittedError as NotFittedError
from featnorm.detectors.base import registered_detectors as registered_detectors
from featnorm.detectors.boundary import OneClassSVM as OneClassSVM
from featnorm.detectors.confidence import GEN as GEN
from featnorm.detectors.confidence import MSP as MSP
from featnorm.detectors.confidence import SHE as SHE
from featnorm.detectors.confidence import Energy as Energy
from featnorm.detectors.confidence import KLMatching as KLMatching
from featnorm.detectors.confidence import KLUniform as KLUniform
from featnorm.detectors.confidence import MaxLogit as MaxLogit
from featnorm.detectors.distance import SSD as SSD
from featnorm.detectors.distance import Mahalanobis as Mahalanobis
from featnorm.detectors.distance import PredictedMahalanobis as PredictedMahalanobis
from featnorm.detectors.expression import parse_detector as parse_detector
from featnorm.detectors.fusion import Fusion as Fusion
from featnorm.detectors.fusion import Sum as Sum
from featnorm.detectors.jackknife import Jackknife as Jackknife
from featnorm.detectors.margin import FDBD as FDBD
from featnorm.detectors.margin import NCI as NCI
from featnorm.detectors.margin import ORA as ORA
from featnorm.detectors.neighbors import KNN as KNN
from featnorm.detectors.neighbors import NNGuide as NNGuide
from featnorm.detectors.norm import NAN as NAN
from featnorm.detectors.norm import EmbeddingMagnitude as EmbeddingMagnitude
from featnorm.detectors.norm import HiddenConfidence as HiddenConfidence
from featnorm.detectors.norm import L1Norm as L1Norm
from featnorm.detectors.norm import LpNorm as LpNorm
from featnorm.detectors.norm import Sparsity as Sparsity
from featnorm.detectors.pattern import ActivationPattern as ActivationPattern
from featnorm.detectors.perturbation import ODIN as ODIN
from featnorm.detectors.perturbation import Views as Views
from featnorm.detectors.rotation import CSI as CSI
from featnorm.detectors.rotation import RotNet as RotNet
from featnorm.detectors.shaping import ASH as ASH
from featnorm.detectors.shaping import RAS as RAS
from featnorm.detectors.shaping import SCALE as SCALE
from featnorm.detectors.shaping import ReAct as ReAct
from featnorm.detectors.subspace import NECO as NECO
from featnorm.detectors.subspace import Residual as Residual
from featnorm.detectors.subspace import ViM as ViM
from featnorm.detectors.temperature import TemperatureScaling as TemperatureScaling
