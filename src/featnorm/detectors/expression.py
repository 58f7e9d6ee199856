"""Detectors as text: ``KNN(k=50) / ReAct(NAN(), percentile=90)``, for the command line and for files."""

import ast
import difflib
from typing import Any

from featnorm._utils.checks import check_type
from featnorm.detectors.base import Detector
from featnorm.detectors.boundary import OneClassSVM
from featnorm.detectors.confidence import MSP, Energy, KLUniform, MaxLogit
from featnorm.detectors.distance import SSD, Mahalanobis
from featnorm.detectors.fusion import Fusion
from featnorm.detectors.neighbors import KNN
from featnorm.detectors.norm import NAN, EmbeddingMagnitude, HiddenConfidence, L1Norm, LpNorm, Sparsity
from featnorm.detectors.perturbation import ODIN, Views
from featnorm.detectors.rotation import CSI, RotNet
from featnorm.detectors.shaping import ReAct
from featnorm.detectors.subspace import Residual, ViM

_DETECTORS: dict[str, type[Detector]] = {
    detector.__name__: detector
    for detector in (
        NAN,
        L1Norm,
        LpNorm,
        Sparsity,
        HiddenConfidence,
        EmbeddingMagnitude,
        MSP,
        MaxLogit,
        Energy,
        KLUniform,
        Mahalanobis,
        SSD,
        KNN,
        OneClassSVM,
        Residual,
        ViM,
        ReAct,
        ODIN,
        Views,
        RotNet,
        CSI,
    )
}
_MOST_CHARACTERS = 500


def parse_detector(expression: str) -> Detector:
    """Make the detector that an expression names; the inverse of ``repr``.

    Only detectors, literal settings and ``/`` are understood (``NAN`` stands for ``NAN()``), and nothing is
    ever evaluated, so an expression may come from anywhere.

    Raises
    ------
    ValueError
        The expression is not understood, names an unknown detector, or its settings are wrong.
    TypeError
        The expression is no string.
    """
    check_type(expression, str, "the expression", 'a string such as "KNN(k=10) / NAN"')
    if len(expression) > _MOST_CHARACTERS:
        raise ValueError(f"a detector expression has at most {_MOST_CHARACTERS} characters")
    try:
        tree = ast.parse(expression.strip(), mode="eval").body
        value = _build(tree, expression)
    except (SyntaxError, TypeError, RecursionError, MemoryError) as error:
        reason = error.msg if isinstance(error, SyntaxError) else error
        raise ValueError(f"{expression!r} is not a detector: {reason}") from None
    if not isinstance(value, Detector):
        raise ValueError(f"{expression!r} is not a detector, but a {type(value).__name__}")
    return value


def _build(node: ast.expr, expression: str) -> Any:
    match node:
        case ast.BinOp(left=left, op=ast.Div(), right=right):
            return Fusion(_build(left, expression), _build(right, expression))
        case ast.Name(id="inf"):
            return float("inf")
        case ast.Name(id=name):
            return _named(name)()
        case ast.Call(func=ast.Name(id=name), args=args, keywords=keywords) if all(k.arg for k in keywords):
            settings = {str(k.arg): _build(k.value, expression) for k in keywords}
            return _named(name)(*(_build(arg, expression) for arg in args), **settings)
        case ast.Constant(value=value) if value is None or isinstance(value, (bool, int, float, str)):
            return value
        case ast.Tuple(elts=items):
            return tuple(_build(item, expression) for item in items)
    raise ValueError(f"{expression!r} is not a detector: {ast.unparse(node)!r} is not understood")


def _named(name: str) -> type[Detector]:
    if name not in _DETECTORS:
        near = difflib.get_close_matches(name.lower(), [known.lower() for known in _DETECTORS], 1, 0.5)
        meant = next((f"; did you mean {known}?" for known in _DETECTORS if known.lower() in near), "")
        raise ValueError(f"there is no detector {name!r}{meant} (known: {', '.join(_DETECTORS)})")
    return _DETECTORS[name]
