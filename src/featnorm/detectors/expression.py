"""Detectors as text: ``KNN(k=50) / ReAct(NAN(), percentile=90)``, for the command line and for files."""

import ast
import difflib
import inspect
from typing import Any

from featnorm._utils.checks import check_type
from featnorm.detectors.base import Detector, registered_detectors
from featnorm.detectors.fusion import Fusion, Sum

_MAX_CHARACTERS = 500


class UnknownDetectorError(ValueError):
    """An expression names a detector that is not registered.

    Attributes
    ----------
    name : str
        The name.
    """

    def __init__(self, name: str) -> None:
        known = sorted(other for other, kind in registered_detectors().items() if not kind.operator)
        near = difflib.get_close_matches(name.lower(), [other.lower() for other in known], 1, 0.5)
        meant = next((f"; did you mean {other}?" for other in known if other.lower() in near), "")
        super().__init__(f"unknown detector {name!r}{meant} (available: {', '.join(known)})")
        self.name = name


def parse_detector(expression: str) -> Detector:
    """Make the detector that an expression names; the inverse of ``repr``.

    An expression consists of registered detectors (``NAN`` stands for ``NAN()``), literal settings, ``/``, ``+``
    and numbers before ``*``. It is never run as code, so it may come from an untrusted source.

    Raises
    ------
    ValueError
        The expression is malformed, names an unknown detector, or its settings are wrong.
    TypeError
        The expression is not a string.

    Examples
    --------
    >>> parse_detector("KNN(k=50) / NAN")
    KNN() / NAN()
    """
    check_type(expression, str, "the expression", 'a string such as "KNN(k=10) / NAN"')
    if len(expression) > _MAX_CHARACTERS:
        raise ValueError(f"a detector expression has at most {_MAX_CHARACTERS} characters")
    try:
        tree = ast.parse(expression.strip(), mode="eval").body
        value = _build(tree, expression)
    except (SyntaxError, TypeError, RecursionError, MemoryError) as error:
        reason = error.msg if isinstance(error, SyntaxError) else error
        raise ValueError(f"{expression!r} is not a valid detector: {reason}") from None
    if not isinstance(value, Detector):
        raise ValueError(f"{expression!r} is not a detector, but a {type(value).__name__}")
    return value


def _build(node: ast.expr, expression: str) -> Any:
    match node:
        case ast.BinOp(left=left, op=ast.Div(), right=right):
            return Fusion(_build(left, expression), _build(right, expression))
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return Sum(_build(left, expression), _build(right, expression))
        case ast.BinOp(left=ast.Constant(value=int() | float() as weight), op=ast.Mult(), right=right):
            return Sum(_build(right, expression), weights=[weight])
        case ast.Name(id="inf"):
            return float("inf")
        case ast.UnaryOp(
            op=ast.USub(), operand=ast.Constant(value=int() | float()) | ast.Name(id="inf") as number
        ):
            return -_build(number, expression)
        case ast.Name(id=name):
            return _named(name)()
        case ast.Call(func=ast.Name(id=name), args=args, keywords=keywords) if all(k.arg for k in keywords):
            settings = {str(k.arg): _build(k.value, expression) for k in keywords}
            parameters = inspect.signature(_named(name)).parameters
            known = [one for one, parameter in parameters.items() if parameter.kind is not parameter.VAR_KEYWORD]
            if len(known) == len(parameters) and (
                unknown := next((one for one in settings if one not in known), None)
            ):
                has = f"it has {', '.join(known) or 'none'}"
                raise ValueError(
                    f"{expression!r} is not a valid detector: {name} has no setting {unknown!r}; {has}"
                )
            return _named(name)(*(_build(arg, expression) for arg in args), **settings)
        case ast.Constant(value=value) if value is None or isinstance(value, (bool, int, float, str)):
            return value
        case ast.Tuple(elts=items):
            return tuple(_build(item, expression) for item in items)
    raise ValueError(f"{expression!r} is not a valid detector: {ast.unparse(node)!r} is not understood")


def _named(name: str) -> type[Detector]:
    kind = registered_detectors().get(name)
    if kind is None or kind.operator:
        raise UnknownDetectorError(name)
    return kind
