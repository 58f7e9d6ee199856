"""Packages that the base installation does not include."""

import importlib
from typing import Any


def vision_module(name: str) -> Any:
    """Import a module of the optional extra ``featnorm[vision]``; see `optional_module`."""
    return optional_module(name, "vision")


def optional_module(name: str, extra: str) -> Any:
    """Import a module of an optional extra.

    Raises
    ------
    ImportError
        If it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise ImportError(f"this needs {package} ({error}): pip install '.[{extra}]' in a checkout") from error
