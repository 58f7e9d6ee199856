"""Packages that the base installation does not include."""

import importlib
from typing import Any

_EXTRAS = {
    "accelerate": "trainers",
    "av": "video",
    "fastapi": "serve",
    "httptools": "serve",
    "lightning": "trainers",
    "lightning_fabric": "images",
    "onnx": "onnx",
    "onnxruntime": "onnx",
    "onnxscript": "onnx",
    "prometheus_client": "serve",
    "pyarrow": "tables",
    "ray": "ray",
    "timm": "images",
    "torchmetrics": "trainers",
    "torchvision": "images",
    "transformers": "text",
    "uvicorn": "serve",
}


def import_extra(name: str) -> Any:
    """Import a module of an optional dependency.

    Raises
    ------
    ImportError
        If it cannot be imported; the message names the package and the extra that installs it.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise ImportError(
            f"this needs {package} ({error}): pip install 'featnorm[{_EXTRAS[package]}]'", name=package
        ) from error
