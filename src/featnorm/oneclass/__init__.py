"""Systems of one-class classification that the paper's Table 4 compares with, trained from images of one class."""

from featnorm.oneclass.anogan import AnoGAN
from featnorm.oneclass.deep_svdd import DeepSVDD
from featnorm.oneclass.geom import Geom
from featnorm.oneclass.goad import GOAD
from featnorm.oneclass.ocgan import OCGAN
from featnorm.oneclass.svm import SVM
from featnorm.oneclass.system import System

__all__ = ["GOAD", "OCGAN", "SVM", "AnoGAN", "DeepSVDD", "Geom", "System"]
