"""The public names, and where each is defined: type checkers read this file, and so does `featnorm.__getattr__`.

All detectors are public: they need no line here.
"""

from featnorm._utils.memory import keep_freed_memory as keep_freed_memory
from featnorm.archive import ArchiveError as ArchiveError
from featnorm.calibration import Calibration as Calibration
from featnorm.calibration import benjamini_hochberg as benjamini_hochberg
from featnorm.calibration import conformal_p_values as conformal_p_values
from featnorm.calibration import threshold_at_tpr as threshold_at_tpr
from featnorm.detectors import *  # noqa: F403
from featnorm.detectors import Detector as Detector
from featnorm.detectors import NotFittedError as NotFittedError
from featnorm.detectors import parse_detector as parse_detector
from featnorm.detectors import registered_detectors as registered_detectors
from featnorm.drift import DriftMonitor as DriftMonitor
from featnorm.evaluation import Comparison as Comparison
from featnorm.evaluation import compare as compare
from featnorm.explainer import Explainer as Explainer
from featnorm.features import Features as Features
from featnorm.fitting import fit as fit
from featnorm.hidden import ActivationStatistics as ActivationStatistics
from featnorm.hidden import Explanation as Explanation
from featnorm.hidden import HiddenClassifier as HiddenClassifier
from featnorm.metrics import aupr_in as aupr_in
from featnorm.metrics import aupr_out as aupr_out
from featnorm.metrics import auroc as auroc
from featnorm.metrics import bootstrap_interval as bootstrap_interval
from featnorm.metrics import detection_accuracy as detection_accuracy
from featnorm.metrics import fpr_at_tpr as fpr_at_tpr
from featnorm.metrics import fpr_at_tpr_ood_positive as fpr_at_tpr_ood_positive
from featnorm.models import load_model as load_model
from featnorm.models import model_names as model_names
from featnorm.norms import l0_norm as l0_norm
from featnorm.norms import l1_norm as l1_norm
from featnorm.norms import lp_norm as lp_norm
from featnorm.norms import negative_aware_norm as negative_aware_norm
from featnorm.runtime import Runtime as Runtime
from featnorm.scorer import Scorer as Scorer
from featnorm.scorer_file import load as load
from featnorm.scoring import ScoringSummary as ScoringSummary
from featnorm.scoring import score_source as score_source
from featnorm.tap import FeatureTap as FeatureTap
from featnorm.tap import LayerTap as LayerTap
from featnorm.verdict import ItemVerdict as ItemVerdict
from featnorm.verdict import Verdict as Verdict

__version__: str
__all__: list[str]
