"""Packages that the base installation does not include."""

import importlib
from typing import Any


def vision_module(name: str) -> Any:
    """Import a module of the optional extra ``featnorm[vision]``.

    Raises
    ------
    ImportError
        If it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise ImportError(f"this needs {package} ({error}): pip install '.[vision]' in a checkout") from error
