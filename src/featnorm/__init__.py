"""featnorm: out-of-distribution detection for PyTorch models.

The negative-aware norm of the last hidden layer, the detectors it is compared with, and what turns a score into a
verdict. Source: Park et al., "Understanding the Feature Norm for Out-of-Distribution Detection", ICCV 2023.

A public name is imported when it is first used: torch alone takes a second or two, in which the command line could
answer neither `--help` nor Ctrl-C. The names are those in ``__init__.pyi``, and the detectors.
"""

from __future__ import annotations

from importlib import import_module

# True for type checkers. Importing `typing` would take a third of the time until the command line is ready for
# Ctrl-C.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

__version__ = "0.2.0"

_HOMES: dict[str, str] = {}


def _homes() -> dict[str, str]:
    """Return the module of each name in the stub; that of the detectors, which have none there, under "*"."""
    import ast
    from pathlib import Path

    if not _HOMES:
        tree = ast.parse(Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
        for node in tree.body:
            if isinstance(node, ast.ImportFrom):
                _HOMES.update((alias.name, str(node.module)) for alias in node.names)
    return _HOMES


def _detectors() -> list[str]:
    """Return the names of featnorm's own detectors."""
    kinds = import_module(_homes()["*"]).registered_detectors().values()
    return [kind.__name__ for kind in kinds if kind.__module__.startswith("featnorm.detectors.")]


def __getattr__(name: str) -> Any:
    """Import a public name, or a module of the package, when it is first used."""
    from importlib.util import find_spec

    if name == "__all__":
        return sorted({*_homes(), *_detectors()} - {"*"})
    if name in _homes():
        value = getattr(import_module(_homes()[name]), name)
    elif not name.startswith("_") and find_spec(f"{__name__}.{name}") is not None:
        value = import_module(f"{__name__}.{name}")
    elif not name.startswith("_") and name in _detectors():
        value = getattr(import_module(_homes()["*"]), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__getattr__("__all__")})
