"""The one-class models of the paper's Table 4, which are trained on images of one class."""

from featnorm.paper.systems.anogan import AnoGAN
from featnorm.paper.systems.base import OneClassModel
from featnorm.paper.systems.deep_svdd import DeepSVDD
from featnorm.paper.systems.frameworks import CSI, MoCo
from featnorm.paper.systems.geom import Geom
from featnorm.paper.systems.goad import GOAD
from featnorm.paper.systems.ocgan import OCGAN
from featnorm.paper.systems.svm import SVM

__all__ = ["CSI", "GOAD", "OCGAN", "SVM", "AnoGAN", "DeepSVDD", "Geom", "MoCo", "OneClassModel"]
