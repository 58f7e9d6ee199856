"""The systems of one-class classification of the paper's Table 4, trained from images of one class."""

from featnorm.oneclass.anogan import AnoGAN
from featnorm.oneclass.deep_svdd import DeepSVDD
from featnorm.oneclass.frameworks import CSI, MoCo
from featnorm.oneclass.geom import Geom
from featnorm.oneclass.goad import GOAD
from featnorm.oneclass.ocgan import OCGAN
from featnorm.oneclass.svm import SVM
from featnorm.oneclass.system import System

__all__ = ["CSI", "GOAD", "OCGAN", "SVM", "AnoGAN", "DeepSVDD", "Geom", "MoCo", "System"]
