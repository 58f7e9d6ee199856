"""What a client may ask for at most, and what holds it to that while it sends."""

import asyncio
from dataclasses import dataclass, fields

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from featnorm.inputs.decoding import MAX_PIXELS

RETRY = {"Retry-After": "1"}
# Bodies of the largest size that may be in memory at once, of all requests together. Beyond, the request whose
# body has been coming for longest gives way, so that nobody keeps the others out by not finishing.
_BODIES = 16
# A client that asks for something need not send a body, and a probe must not wait for the rest of one.
_ASKING = ("GET", "HEAD")
# Who sends no token has no claim on our time: the rest of its body is not awaited.
_UNAUTHORIZED = 401
# A client that is refused may first finish a body of this many times the largest size, which is thrown away: one
# that is cut off while it sends does not read why.
_DRAINED = 4


@dataclass(frozen=True)
class Limits:
    """The bounds of a service.

    Parameters
    ----------
    body_bytes : of a request; 413 beyond.
    images : of a request; 413 beyond.
    pixels : of an image, which is refused by itself.
    queue : images that wait for the model, of all requests; 503 beyond.
    seconds : that a request may take in all: 408 if its body is not there by then, else 503. `featnorm serve`
        gives a client as long to send the head of a request, and to read an answer.
    batch_size : images that the model judges at once.
    queue_pixels : pixels that wait to be decoded, as the headers of the images declare them, of all requests; 503
        beyond, and 413 for a request that holds more by itself. An encoded byte counts as 4 pixels at least, and
        as 20 in formats that Pillow decodes in Python (QOI, and some PPM and BMP); a JPEG counts a tenth of its
        pixels more for each further scan.
    connections : that `featnorm serve` keeps open. Beyond, it closes the one that has waited longest for its
        client to finish a request; if all requests are complete, a new connection gets 503.
    grace : seconds after SIGTERM or Ctrl+C within which `featnorm serve` ends. Requests that are under way are
        answered in the first 70 % of them.

    Raises
    ------
    ValueError
        A bound is not above 0, or no request of the largest size would ever be let in.
    """

    body_bytes: int = 16 * 2**20
    images: int = 64
    pixels: int = 50_000_000
    queue: int = 256
    seconds: float = 30.0
    batch_size: int = 32
    queue_pixels: int = 800_000_000
    connections: int = 512
    grace: float = 10.0

    def __post_init__(self) -> None:
        for bound in fields(self):
            value = getattr(self, bound.name)
            if not 0 < value < float("inf"):
                raise ValueError(f"the bound {bound.name} is {value}: it must be above 0, and finite")
        if self.images > self.queue:
            raise ValueError(
                f"a request may hold {self.images} images, and the queue only {self.queue}: it must hold as many"
            )
        if self.pixels > MAX_PIXELS:
            raise ValueError(f"the bound pixels is {self.pixels}: Pillow itself refuses more than {MAX_PIXELS}")
        if self.pixels > self.queue_pixels:
            raise ValueError(
                f"an image may have {self.pixels} pixels, and the queue only {self.queue_pixels}: "
                "it must hold as many"
            )


def declared_length(headers: Headers) -> int:
    """Return the length of a request's body by its headers, in bytes; 0 where they do not tell."""
    declared = headers.get("content-length", "0")
    return int(declared) if declared.isascii() and declared.isdigit() else 0


def has_body(headers: Headers) -> bool:
    """Return whether a request with these headers has a body."""
    return declared_length(headers) > 0 or "transfer-encoding" in headers


def closing(start: Message) -> Message:
    """Return the start of a response with the announcement that the connection ends with it."""
    return {**start, "headers": [*start.get("headers", ()), (b"connection", b"close")]}


class BodyBound:
    """Counts the bytes of a request's body as they come, whatever its headers say, and the seconds.

    The time by which a request has to be answered is left in its state as ``deadline``, of the loop's clock.

    Parameters
    ----------
    app : what reads the bodies.
    limits : the bounds.
    """

    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        self.app = app
        self.limits = limits
        self.held = 0
        self.coming: dict[_Body, None] = {}  # oldest first

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, with its body bounded."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        body = _Body(self, scope, receive, send)
        try:
            await self.app(scope, body.receive, body.send)
        finally:
            body.forget()


class _Body:
    """The body of one request."""

    def __init__(self, bound: BodyBound, scope: Scope, receive: Receive, send: Send) -> None:
        self._bound = bound
        self._receive = receive
        self._send = send
        headers = Headers(scope=scope)
        self._reading: asyncio.Timeout | None = None
        self._evicted = False
        self._declared = declared_length(headers)
        self._complete = not has_body(headers)
        self._drained = scope["method"] not in _ASKING
        # Whoever waits to be asked for the body is refused before sending it.
        self._asked = "100-continue" not in headers.get("expect", "").lower()
        self._deadline = asyncio.get_running_loop().time() + bound.limits.seconds
        scope["state"]["deadline"] = self._deadline
        self._size = 0
        if not self._complete:
            bound.coming[self] = None

    def forget(self) -> None:
        """Count the body no longer."""
        self._bound.held -= self._size
        self._size = 0
        self._bound.coming.pop(self, None)

    def evict(self) -> None:
        """Stop waiting for the rest, for the sake of other requests."""
        self._evicted = True
        self.forget()
        if self._reading is not None and not self._reading.expired():
            self._reading.reschedule(asyncio.get_running_loop().time())

    async def receive(self) -> Message:
        """Return the next part of the body.

        Raises
        ------
        HTTPException
            The body is too long or too late, or all bodies together are.
        """
        if self._complete:
            return await self._receive()
        limits = self._bound.limits
        if self._declared > limits.body_bytes:
            raise self._too_long()
        self._asked = True
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
        self._note(message)
        size = len(message.get("body", b""))
        self._size += size
        self._bound.held += size
        if self._size > limits.body_bytes:
            raise self._too_long()
        while self._bound.held > _BODIES * limits.body_bytes:
            oldest = next(iter(self._bound.coming), self)
            oldest.evict()
            if oldest is self:
                raise self._full()
        return message

    async def send(self, message: Message) -> None:
        """Pass a message on; before the answer to a POST begins, the rest of its body is read and thrown away."""
        if message["type"] == "http.response.start" and not self._complete:
            if self._drained and message["status"] != _UNAUTHORIZED:
                await self._drain()
            if not self._complete:
                message = closing(message)
        await self._send(message)

    async def _drain(self) -> None:
        left = _DRAINED * self._bound.limits.body_bytes
        if not self._asked or self._evicted or self._declared > left:
            return
        try:
            async with asyncio.timeout_at(self._deadline):
                while not self._complete and left > 0:
                    message = await self._receive()
                    self._note(message)
                    left -= len(message.get("body", b""))
        except TimeoutError:
            return

    def _note(self, message: Message) -> None:
        self._complete = not message.get("more_body", False)
        if self._complete:
            self._bound.coming.pop(self, None)

    def _full(self) -> HTTPException:
        return HTTPException(503, "the service is at its memory limit for request bodies: try again later", RETRY)

    def _too_long(self) -> HTTPException:
        return HTTPException(413, f"the body is longer than {self._bound.limits.body_bytes:,} bytes")
