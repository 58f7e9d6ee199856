"""Detectors as an HTTP service: `create_app`, the `Limits` on what a client may send, and `ScorerFile`."""

from featnorm._utils.extras import import_extra

for _module in ("fastapi", "httptools", "prometheus_client", "uvicorn"):
    import_extra(_module)

from featnorm.serve.app import create_app  # noqa: E402
from featnorm.serve.limits import Limits  # noqa: E402
from featnorm.serve.scorers import ScorerFile  # noqa: E402

__all__ = ["Limits", "ScorerFile", "create_app"]
