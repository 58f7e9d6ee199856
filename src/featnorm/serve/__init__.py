"""Detectors as an HTTP service: `create_app`, the `Limits` on what a client may send, and `ScorerFile`."""

try:
    import fastapi  # noqa: F401
    import httptools  # noqa: F401
    import prometheus_client  # noqa: F401
    import uvicorn  # noqa: F401
except ImportError as error:
    raise ImportError(f"serving needs {error.name}: pip install '.[serve]' in a checkout") from None

from featnorm.serve.app import create_app
from featnorm.serve.limits import Limits
from featnorm.serve.scorers import ScorerFile

__all__ = ["Limits", "ScorerFile", "create_app"]
