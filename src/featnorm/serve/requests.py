"""Logging of requests: an id, a line in the log, a latency, and a response if the code fails."""

import json
import logging
import re
import time
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from featnorm.serve.metrics import Metrics

log = logging.getLogger("featnorm.serve")

_ID = re.compile(r"[!-~]{1,64}")
# nginx's status for a client that disconnected before the response.
_CLIENT_CLOSED = 499


@dataclass
class InputCounts:
    """Number of inputs of a request, of those that were flagged as OOD, and of those that were unreadable."""

    inputs: int = 0
    flagged: int = 0
    unreadable: int = 0


class RequestLog:
    """Middleware that gives each request an id, and logs and counts it.

    Parameters
    ----------
    app : ASGIApp
        The application.
    metrics : Metrics
        The metrics of the service.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request to the application, with ``request_id``, ``input_counts`` and ``scorer`` in its state.

        The application sets ``scorer`` to the name of the scorer that the request is for.
        """
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began = time.perf_counter()
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _ID.fullmatch(given) else uuid.uuid4().hex
        counts = InputCounts()
        state = scope.setdefault("state", {})
        state.update(request_id=request_id, input_counts=counts, scorer="")
        status = _CLIENT_CLOSED

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-ID"] = request_id
                headers["X-Content-Type-Options"] = "nosniff"
                headers["Referrer-Policy"] = "no-referrer"
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        except ClientDisconnect:
            pass
        except Exception:
            log.exception("a request failed", extra={"fields": {"request_id": request_id}})
            if status == _CLIENT_CLOSED:
                await problem(500, "internal error: see the log of the service at this request id", request_id)(
                    scope, receive, send_with_id
                )
        finally:
            seconds = time.perf_counter() - began
            # Not the path, which a client could use to create any number of labels, or lines in the log.
            route = getattr(scope.get("route"), "path", "none")
            self.metrics.request(state["scorer"], route, status, seconds)
            line = {
                "method": scope["method"],
                "route": route,
                "scorer": state["scorer"],
                "status": status,
                "milliseconds": round(1000 * seconds, 1),
                **vars(counts),
                "request_id": request_id,
            }
            log.info("request", extra={"fields": line})


def problem(status: int, error: str, request_id: str, headers: Any = None) -> JSONResponse:
    """Return the response to a request that is rejected as a whole."""
    return JSONResponse({"error": error, "request_id": request_id}, status, headers)


class JsonLines(logging.Formatter):
    """One line of JSON per record: time, level, message, and the fields of the record."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        when = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line = {"time": when, "level": record.levelname.lower(), "message": record.getMessage()}
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)
