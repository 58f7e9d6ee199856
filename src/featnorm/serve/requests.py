"""What is done for every request: an id, a line in the log, its time, and an answer where the code fails."""

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
# As web servers name it: no answer was sent, since nobody was there to read it.
_GONE = 499


@dataclass
class RequestCounts:
    """What became of the images of a request."""

    images: int = 0
    flagged: int = 0
    unreadable: int = 0


class RequestLog:
    """Names, times, counts and logs each request.

    Parameters
    ----------
    app : what answers.
    metrics : where requests are counted.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on; its state gets ``request_id`` and ``counts``."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began = time.perf_counter()
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _ID.fullmatch(given) else uuid.uuid4().hex
        counts = RequestCounts()
        scope.setdefault("state", {}).update(request_id=request_id, counts=counts)
        status = _GONE

        async def named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-ID"] = request_id
                headers["X-Content-Type-Options"] = "nosniff"
                headers["Referrer-Policy"] = "no-referrer"
            await send(message)

        try:
            await self.app(scope, receive, named)
        except ClientDisconnect:
            pass
        except Exception:
            log.exception("a request failed", extra={"fields": {"request_id": request_id}})
            if status == _GONE:
                await problem(500, "the service failed; its log says why, by the request id", request_id)(
                    scope, receive, named
                )
        finally:
            seconds = time.perf_counter() - began
            # What a client types must not become a label or a line of its own.
            route = getattr(scope.get("route"), "path", "none")
            self.metrics.request(route, status, seconds)
            line = {
                "method": scope["method"],
                "route": route,
                "status": status,
                "milliseconds": round(1000 * seconds, 1),
                **vars(counts),
                "request_id": request_id,
            }
            log.info("request", extra={"fields": line})


def problem(status: int, error: str, request_id: str, headers: Any = None) -> JSONResponse:
    """Return the answer to a request that is refused as a whole."""
    return JSONResponse({"error": error, "request_id": request_id}, status, headers)


class JsonLines(logging.Formatter):
    """A line of JSON a record: time, level, message, and the fields that it carries."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        when = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line = {"time": when, "level": record.levelname.lower(), "message": record.getMessage()}
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)
