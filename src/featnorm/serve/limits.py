"""Limits on what a client may send, and the middleware that enforces them on request bodies."""

import asyncio
from dataclasses import dataclass, fields

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from featnorm.inputs.decoding import MAX_PIXELS

RETRY = {"Retry-After": "1"}
#: Maximum number of images per request whose explanations have pictures.
MAX_PICTURED = 8
# Maximum number of bodies of the largest size in memory at once. If there are more, the request whose body has
# been incomplete for longest is rejected, so that no client can block the others by not finishing.
_MAX_BODIES = 16
# Methods that need no body. A health probe must not wait for the rest of one.
_WITHOUT_BODY = ("GET", "HEAD")
# The rest of the body of a request without a valid token is not awaited.
_UNAUTHORIZED = 401
# A rejected client may first finish a body of at most this many times the largest size, which is discarded: if it
# were disconnected while it sends, it would not read the reason.
_MAX_DRAINED = 4


@dataclass(frozen=True)
class Limits:
    """The limits of a service.

    Parameters
    ----------
    body_bytes : int
        Maximum size of a request body in bytes; 413 if it is larger.
    inputs : int
        Maximum number of images, texts or rows per request; 413 if there are more.
    pixels : int
        Maximum number of pixels per image. Only the image itself is rejected.
    queue : int
        Maximum number of inputs of all requests that wait for the model; 503 if there are more. Explanations with
        pictures count as well; beyond the limit, they have no pictures.
    seconds : float
        Timeout of a request in seconds: 408 if its body is incomplete by then, else 503. In `featnorm serve`, also
        the timeout for sending the head of a request, and for reading a response.
    batch_size : int
        Maximum number of inputs that the model scores at once.
    queue_pixels : int
        Maximum number of pixels of all requests that wait to be decoded, by the headers of the images; 503 if
        there are more, and 413 if a single request has more. An encoded byte counts as at least 4 pixels, and as
        20 in formats that Pillow decodes in Python (QOI, and some PPM and BMP). Each further scan of a JPEG adds a
        tenth of its pixels.
    connections : int
        Maximum number of connections that `featnorm serve` keeps open. If there are more, it closes the one that
        has waited longest for its client to finish a request; if all requests are complete, a new connection gets
        503.
    grace : float
        Seconds after SIGTERM or Ctrl+C within which `featnorm serve` ends. Pending requests are answered in the
        first 70 % of this time.

    Raises
    ------
    ValueError
        If a limit is not above 0, or if no request of the largest size could ever be accepted.
    """

    body_bytes: int = 16 * 2**20
    inputs: int = 64
    pixels: int = 50_000_000
    queue: int = 256
    seconds: float = 30.0
    batch_size: int = 32
    queue_pixels: int = 800_000_000
    connections: int = 512
    grace: float = 10.0

    def __post_init__(self) -> None:
        for limit in fields(self):
            value = getattr(self, limit.name)
            if not 0 < value < float("inf"):
                raise ValueError(f"the limit {limit.name} is {value}: it must be above 0, and finite")
        if self.inputs > self.queue:
            raise ValueError(
                f"a request may have {self.inputs} inputs, but the queue only {self.queue}: "
                "it must allow at least as many"
            )
        if self.pixels > MAX_PIXELS:
            raise ValueError(f"the limit pixels is {self.pixels}: Pillow itself rejects more than {MAX_PIXELS}")
        if self.pixels > self.queue_pixels:
            raise ValueError(
                f"an image may have {self.pixels} pixels, but the queue only {self.queue_pixels}: "
                "it must allow at least as many"
            )


def declared_length(headers: Headers) -> int:
    """Return the length of a request body in bytes by its headers; 0 if they do not contain it."""
    declared = headers.get("content-length", "0")
    return int(declared) if declared.isascii() and declared.isdigit() else 0


def has_body(headers: Headers) -> bool:
    """Whether a request with these headers has a body."""
    return declared_length(headers) > 0 or "transfer-encoding" in headers


def closing(start: Message) -> Message:
    """Return the start of a response with the header that the connection is closed after it."""
    return {**start, "headers": [*start.get("headers", ()), (b"connection", b"close")]}


class BodyLimit:
    """Middleware that limits the size of request bodies, whatever their headers say, and their time.

    The time by which a request must be answered is in its state as ``deadline``, by the clock of the event loop.

    Parameters
    ----------
    app : ASGIApp
        The application that reads the bodies.
    limits : Limits
        The limits.
    """

    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        self.app = app
        self.limits = limits
        self.held = 0
        self.receiving: dict[_RequestBody, None] = {}  # oldest first

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request to the application, with a limited body."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        body = _RequestBody(self, scope, receive, send)
        try:
            await self.app(scope, body.receive, body.send)
        finally:
            body.forget()


class _RequestBody:
    """The body of one request."""

    def __init__(self, limit: BodyLimit, scope: Scope, receive: Receive, send: Send) -> None:
        self._limit = limit
        self._receive = receive
        self._send = send
        headers = Headers(scope=scope)
        self._reading: asyncio.Timeout | None = None
        self._evicted = False
        self._declared = declared_length(headers)
        self._complete = not has_body(headers)
        self._drained = scope["method"] not in _WITHOUT_BODY
        # A client that waits for 100 Continue can be rejected before it sends the body.
        self._body_requested = "100-continue" not in headers.get("expect", "").lower()
        self._deadline = asyncio.get_running_loop().time() + limit.limits.seconds
        scope["state"]["deadline"] = self._deadline
        self._size = 0
        if not self._complete:
            limit.receiving[self] = None

    def forget(self) -> None:
        """Remove the body from the counts."""
        self._limit.held -= self._size
        self._size = 0
        self._limit.receiving.pop(self, None)

    def evict(self) -> None:
        """Stop waiting for the rest, so that other requests have memory."""
        self._evicted = True
        self.forget()
        if self._reading is not None and not self._reading.expired():
            self._reading.reschedule(asyncio.get_running_loop().time())

    async def receive(self) -> Message:
        """Return the next part of the body.

        Raises
        ------
        HTTPException
            If the body is too long or incomplete for too long, or if all bodies together are too long.
        """
        if self._complete:
            return await self._receive()
        limits = self._limit.limits
        if self._declared > limits.body_bytes:
            raise self._too_long()
        self._body_requested = True
        if self._evicted:
            raise self._full()
        try:
            async with asyncio.timeout_at(self._deadline) as self._reading:
                message = await self._receive()
        except TimeoutError:
            if self._evicted:
                raise self._full() from None
            raise HTTPException(
                408, f"the request body did not arrive within {limits.seconds:g} seconds"
            ) from None
        finally:
            self._reading = None
        self._update(message)
        size = len(message.get("body", b""))
        self._size += size
        self._limit.held += size
        if self._size > limits.body_bytes:
            raise self._too_long()
        while self._limit.held > _MAX_BODIES * limits.body_bytes:
            oldest = next(iter(self._limit.receiving), self)
            oldest.evict()
            if oldest is self:
                raise self._full()
        return message

    async def send(self, message: Message) -> None:
        """Send a message; before the response to a POST begins, the rest of its body is read and discarded."""
        if message["type"] == "http.response.start" and not self._complete:
            if self._drained and message["status"] != _UNAUTHORIZED:
                await self._drain()
            if not self._complete:
                message = closing(message)
        await self._send(message)

    async def _drain(self) -> None:
        left = _MAX_DRAINED * self._limit.limits.body_bytes
        if not self._body_requested or self._evicted or self._declared > left:
            return
        try:
            async with asyncio.timeout_at(self._deadline):
                while not self._complete and left > 0:
                    message = await self._receive()
                    self._update(message)
                    left -= len(message.get("body", b""))
        except TimeoutError:
            return

    def _update(self, message: Message) -> None:
        self._complete = not message.get("more_body", False)
        if self._complete:
            self._limit.receiving.pop(self, None)

    def _full(self) -> HTTPException:
        return HTTPException(503, "the service is at its memory limit for request bodies: try again later", RETRY)

    def _too_long(self) -> HTTPException:
        return HTTPException(413, f"the body is longer than {self._limit.limits.body_bytes:,} bytes")
