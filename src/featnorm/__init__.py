"""featnorm tells whether a PyTorch model knows an input.

The negative-aware norm of the last hidden layer, everything it is compared with, and what turns a score into
a verdict. Source: Park et al., "Understanding the Feature Norm for Out-of-Distribution Detection", ICCV 2023.
"""

from __future__ import annotations

from importlib import import_module

# Type checkers take it for true. `typing` is not imported: that is a third of what the command line takes to get
# ready for Ctrl-C.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from featnorm.archive import ArchiveError
    from featnorm.calibration import Calibration, benjamini_hochberg, conformal_p_values, threshold_at_tpr
    from featnorm.detectors import (
        CSI,
        KNN,
        MSP,
        NAN,
        ODIN,
        SSD,
        Detector,
        EmbeddingMagnitude,
        Energy,
        Fusion,
        HiddenConfidence,
        KLUniform,
        L1Norm,
        LpNorm,
        Mahalanobis,
        MaxLogit,
        NotFittedError,
        OneClassSVM,
        ReAct,
        Residual,
        RotNet,
        Sparsity,
        Views,
        ViM,
        parse_detector,
    )
    from featnorm.drift import DriftMonitor
    from featnorm.explainer import Explainer
    from featnorm.features import Features
    from featnorm.fitting import Fitted, fit_images
    from featnorm.hidden import ActivationStatistics, Explanation, HiddenClassifier
    from featnorm.image_scorer import ImageScorer, ImageVerdict
    from featnorm.metrics import (
        aupr_in,
        aupr_out,
        auroc,
        bootstrap_interval,
        detection_accuracy,
        fpr_at_tpr,
        fpr_at_tpr_ood_positive,
    )
    from featnorm.models import load_model, model_names
    from featnorm.norms import l0_norm, l1_norm, lp_norm, negative_aware_norm
    from featnorm.runtime import Runtime
    from featnorm.scorer import Scorer, Verdict
    from featnorm.scoring import ScoringSummary, score_images
    from featnorm.tap import FeatureTap, LayerTap

__version__ = "0.1.0"

__all__ = [
    "CSI",
    "KNN",
    "MSP",
    "NAN",
    "ODIN",
    "SSD",
    "ActivationStatistics",
    "ArchiveError",
    "Calibration",
    "Detector",
    "DriftMonitor",
    "EmbeddingMagnitude",
    "Energy",
    "Explainer",
    "Explanation",
    "FeatureTap",
    "Features",
    "Fitted",
    "Fusion",
    "HiddenClassifier",
    "HiddenConfidence",
    "ImageScorer",
    "ImageVerdict",
    "KLUniform",
    "L1Norm",
    "LayerTap",
    "LpNorm",
    "Mahalanobis",
    "MaxLogit",
    "NotFittedError",
    "OneClassSVM",
    "ReAct",
    "Residual",
    "RotNet",
    "Runtime",
    "Scorer",
    "ScoringSummary",
    "Sparsity",
    "Verdict",
    "ViM",
    "Views",
    "aupr_in",
    "aupr_out",
    "auroc",
    "benjamini_hochberg",
    "bootstrap_interval",
    "conformal_p_values",
    "detection_accuracy",
    "fit_images",
    "fpr_at_tpr",
    "fpr_at_tpr_ood_positive",
    "l0_norm",
    "l1_norm",
    "load_model",
    "lp_norm",
    "model_names",
    "negative_aware_norm",
    "parse_detector",
    "score_images",
    "threshold_at_tpr",
]

# Where each public name is defined. It is imported when it is first asked for: torch alone takes a second or two,
# in which the command line could not yet answer `--help`, or Ctrl-C.
_HOMES = {
    name: f"featnorm.{module}"
    for module, names in {
        "archive": "ArchiveError",
        "calibration": "Calibration benjamini_hochberg conformal_p_values threshold_at_tpr",
        "detectors": "CSI KNN MSP NAN ODIN SSD Detector EmbeddingMagnitude Energy Fusion HiddenConfidence "
        "KLUniform L1Norm LpNorm Mahalanobis MaxLogit NotFittedError OneClassSVM ReAct Residual RotNet Sparsity "
        "Views ViM parse_detector",
        "explainer": "Explainer",
        "drift": "DriftMonitor",
        "features": "Features",
        "fitting": "Fitted fit_images",
        "hidden": "ActivationStatistics Explanation HiddenClassifier",
        "image_scorer": "ImageScorer ImageVerdict",
        "metrics": "aupr_in aupr_out auroc bootstrap_interval detection_accuracy fpr_at_tpr "
        "fpr_at_tpr_ood_positive",
        "models": "load_model model_names",
        "norms": "l0_norm l1_norm lp_norm negative_aware_norm",
        "runtime": "Runtime",
        "scorer": "Scorer Verdict",
        "scoring": "ScoringSummary score_images",
        "tap": "FeatureTap LayerTap",
    }.items()
    for name in names.split()
}


def __getattr__(name: str) -> Any:
    """Import a public name, or a module of the package, when it is first asked for."""
    from importlib.util import find_spec

    if name in _HOMES:
        value = getattr(import_module(_HOMES[name]), name)
    elif not name.startswith("_") and find_spec(f"{__name__}.{name}") is not None:
        value = import_module(f"{__name__}.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
