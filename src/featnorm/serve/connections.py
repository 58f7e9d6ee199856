"""Client connections with limits that an application cannot enforce: `connection_type`."""

import asyncio
import json
import logging
import socket
import uuid
from contextlib import suppress
from http import HTTPStatus
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from featnorm.serve.limits import Limits

log = logging.getLogger("featnorm.serve")

# Maximum number of bytes of a request line with its headers.
_MAX_HEAD_BYTES = 2**16
# Maximum number of bytes that asyncio reads at once. Only the parser knows to which request each of them belongs.
_READ = 2**18
# A chunk takes as long to parse as hundreds of bytes. This many chunks may have any size; if there are more, they
# must have a minimum number of bytes on average, as lines of base64 have.
_FREE_CHUNKS = 4096
_MIN_CHUNK_BYTES = 64
# Number of bytes around the content of a chunk: its size, perhaps an extension, and line endings.
_CHUNK_FRAME = 64
# Size of the system's send buffer in bytes; a response is shorter.
_SEND_BUFFER = 2**18
# Maximum number of requests that a client may send before the first response.
_MAX_PIPELINED = 32
# Seconds for which data of a rejected client is read and discarded. If the connection were closed at once, the
# client's system would drop the response before the client reads it.
_LINGER = 1.0
# Seconds in which a client must read the rest of its response when the service shuts down.
_FLUSH = 0.5


def connection_type(limits: Limits) -> type[asyncio.Protocol]:
    """Return a class of connections with some limits, for uvicorn's ``http`` setting."""
    return type("LimitedConnection", (Connection,), {"limits": limits})


class _Rejected(Exception):
    """Raised in a callback of the parser to reject the request."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason


class _ResponseTransport:
    """A transport for a response. Closing it gives the client time to read the response."""

    def __init__(self, connection: "Connection") -> None:
        self._connection = connection

    def write(self, data: bytes) -> None:
        self._connection.transport.write(data)

    def is_closing(self) -> bool:
        return self._connection.transport.is_closing()

    def close(self) -> None:
        self._connection.close()


class Connection(HttpToolsProtocol):
    """HTTP/1.1 by uvicorn and httptools, with limits that uvicorn does not have.

    - The head of a request must arrive within ``limits.seconds``, and be at most 64 KiB long.
    - A body must not be sent in chunks of a few bytes.
    - A response must be read within ``limits.seconds``.
    - At most 32 requests may be pipelined.
    - If there are more than ``limits.connections``, the one that has waited longest for its client to finish a
      request is closed; if all requests are complete, the new connection gets 503.
    - A request that two servers could parse differently gets 400, and the connection is closed: differing lengths,
      both a length and chunks, folded headers, bare line feeds, more or fewer than one ``Host``.
    """

    limits: Limits

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._idle_since = self.loop.time()
        self._answering: RequestResponseCycle | None = None
        self._discarding = False
        self._discarded = 0
        self._rejection: _Rejected | None = None
        self._head_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._end_timer: asyncio.TimerHandle | None = None
        # State of the message that is being parsed.
        self._in_body = False
        self._head_size = 0
        self._frame_size = 0
        self._body_size = 0
        self._chunks = 0
        # The header that delimits the body of a request for an upgrade, since httptools does not read that body.
        self._upgrade_framing: bytes | None = None
        self._replaying = False

    @property
    def busy(self) -> bool:
        """Whether a request is being answered; its head is complete, its body need not be."""
        return bool(self.pipeline) or (self._answering is not None and not self._answering.response_complete)

    @property
    def receiving(self) -> bool:
        """Whether the client has not finished sending a request that is being answered."""
        return self._answering is not None and self._answering.more_body

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the limits of the connection."""
        super().connection_made(transport)
        # The system would buffer megabytes for a client that sends requests but does not read.
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
        # So that `pause_writing` is called as soon as data does not fit into the system's buffer.
        transport.set_write_buffer_limits(high=0)
        self._await_head()
        if len(self.connections) > self.limits.connections:
            self._evict()

    def connection_lost(self, exc: Exception | None) -> None:
        """Notify the application, and cancel the timers."""
        for timer in (self._head_timer, self._write_timer, self._end_timer):
            if timer is not None:
                timer.cancel()
        self._unset_keepalive_if_required()
        if self._answering is not None and not self._answering.response_complete:
            # With pipelined requests, uvicorn notifies another request than this one.
            self._disconnect(self._answering)
        self.pipeline.clear()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse data, and reject a request that is malformed or exceeds a limit."""
        if self._discarding:
            self._discarded += len(data)
            if self._discarded > self.limits.body_bytes:
                self.transport.abort()
            return
        self._unset_keepalive_if_required()
        try:
            self._parse(data)
        except httptools.HttpParserError as error:
            rejection = self._rejection or _Rejected(400, f"the request cannot be parsed: {error}")
            self._reject(rejection.status, rejection.reason)

    def on_message_begin(self) -> None:
        """Begin a request, unless too many are pending."""
        if self._replaying:
            return
        if len(self.pipeline) >= _MAX_PIPELINED:
            raise self._stop(429, f"more than {_MAX_PIPELINED} requests are pending on this connection")
        self._in_body = False
        self._head_size = self._frame_size = self._body_size = self._chunks = 0
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        """Receive a part of the target."""
        if not self._replaying:
            self._count_head(len(url))
            super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Receive a header."""
        if self._replaying:
            return
        self._count_head(len(name) + len(value) + 4)
        # Fields after a chunked body are trailers, and must not count as headers.
        if not self._in_body:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Begin to answer a request, unless its head is ambiguous."""
        if self._replaying:
            return
        self._in_body = True
        self._check_head()
        super().on_headers_complete()
        self.cycle.transport = _ResponseTransport(self)  # type: ignore[assignment]
        if self.parser.should_upgrade():
            framing = [field for field in self.headers if field[0] in (b"content-length", b"transfer-encoding")]
            self._upgrade_framing = b": ".join(framing[0]) if framing else None

    def on_chunk_header(self) -> None:
        """Count a chunk."""
        self._chunks += 1
        if self._chunks > _FREE_CHUNKS and self._body_size < _MIN_CHUNK_BYTES * self._chunks:
            raise self._stop(
                400,
                f"the body is sent in chunks of less than {_MIN_CHUNK_BYTES} bytes: send larger ones, or a length",
            )

    def on_body(self, body: bytes) -> None:
        """Receive a part of a body."""
        self._body_size += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        """End a request."""
        if self._upgrade_framing is None:
            super().on_message_complete()

    def on_response_complete(self) -> None:
        """Wait for the next request, or close."""
        self._await_head()
        super().on_response_complete()
        if (self._discarding or self.receiving) and not self.busy:
            self._linger()

    def pause_writing(self) -> None:
        """Limit the time in which the client reads the rest of its response."""
        super().pause_writing()
        self._write_timer = self.loop.call_later(self.limits.seconds, self._write_timeout)

    def resume_writing(self) -> None:
        """Stop the timer, because the client has read everything."""
        if self._write_timer is not None:
            self._write_timer.cancel()
        super().resume_writing()

    def shutdown(self) -> None:
        """Close the connection, after the response to the last complete request."""
        if self.busy:
            self.cycle.keep_alive = False
        elif self._discarding:
            self.transport.abort()
        else:
            self._end()

    def cut_off(self) -> None:
        """Close the connection; a request without a response gets 503."""
        self.pipeline.clear()
        cycle = self._answering
        if cycle is not None and not cycle.response_complete:
            self._disconnect(cycle)
            if not cycle.response_started:
                self._write(503, "the service is shutting down: try again later")
        self._end()

    def close(self) -> None:
        """Close the connection once the client has had time to read the response."""
        if self.receiving:
            self._linger()
        else:
            self.transport.close()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._answering = cycle
        super()._start_asgi_task(cycle, app)

    def _parse(self, data: bytes) -> None:
        before = self._body_size
        size = len(data)
        while data:
            try:
                self.parser.feed_data(data)
                break
            except httptools.HttpParserUpgrade as upgrade:
                # The service does not upgrade. The head is followed by the body, and then by the next request.
                data = data[upgrade.args[0] :]
                if self._upgrade_framing is not None:
                    self._read_left_out(self._upgrade_framing)
        self._frame_size += size - max(0, self._body_size - before)
        if self._frame_size > _MAX_HEAD_BYTES + _READ + _CHUNK_FRAME * self._chunks:
            self._reject(
                *_TOO_LONG if not self._in_body else (400, "the chunked body has more framing than content")
            )

    def _read_left_out(self, framing: bytes) -> None:
        """Continue with a new parser that expects the body that the last parser did not read."""
        self._replaying = True
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
        self.parser.feed_data(b"POST / HTTP/1.1\r\n" + framing + b"\r\n\r\n")
        self._replaying = False
        self._upgrade_framing = None

    def _check_head(self) -> None:
        version = self.parser.get_http_version()
        if version not in ("1.0", "1.1"):
            raise self._stop(505, f"HTTP/{version} is not supported: use HTTP/1.1")
        values: dict[bytes, list[bytes]] = {}
        for name, value in self.headers:
            values.setdefault(name, []).append(value)
        hosts = len(values.get(b"host", ()))
        if hosts > 1 or (hosts == 0 and version == "1.1"):
            raise self._stop(400, f"the request has {hosts} Host headers: send exactly one")
        codings = values.get(b"transfer-encoding")
        if codings and (version == "1.0" or [coding.lower() for coding in codings] != [b"chunked"]):
            raise self._stop(400, "the transfer encoding is not supported: send the body chunked, or its length")
        if not self.url.startswith(b"/"):
            raise self._stop(400, "the request target is not a path: send GET /path")

    def _count_head(self, size: int) -> None:
        self._head_size += size
        if self._head_size > _MAX_HEAD_BYTES:
            raise self._stop(*_TOO_LONG)

    def _stop(self, status: int, reason: str) -> _Rejected:
        self._rejection = _Rejected(status, reason)
        return self._rejection

    def _reject(self, status: int, reason: str) -> None:
        """Answer complete requests, then reject the last one, and discard all further data."""
        if self._discarding:
            return
        self._discarding = True
        last = self.cycle
        broken = last is not None and last.more_body and not last.response_complete
        if broken and last is not self._answering:
            self.pipeline = type(self.pipeline)(entry for entry in self.pipeline if entry[0] is not last)
        if self.busy and not (broken and last is self._answering):
            # A response now would be read as the response to an earlier request.
            final = self.pipeline[0][0] if self.pipeline else self._answering
            assert final is not None
            final.keep_alive = False
            return
        if broken:
            self._disconnect(last)
            if last.response_started:
                self.transport.abort()
                return
        self._write(status, reason)
        self._linger()

    def _write(self, status: int, reason: str) -> None:
        request_id = uuid.uuid4().hex
        log.info(
            "rejected a connection",
            extra={"fields": {"status": status, "reason": reason, "request_id": request_id}},
        )
        body = json.dumps({"error": reason, "request_id": request_id}).encode()
        lines = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}"]
        lines += [f"{name.decode()}: {value.decode()}" for name, value in self.server_state.default_headers]
        if status == 503:
            lines.append("retry-after: 1")
        lines += ["content-type: application/json", f"content-length: {len(body)}", "connection: close"]
        self.transport.write("\r\n".join([*lines, "", ""]).encode() + body)

    def _disconnect(self, cycle: RequestResponseCycle) -> None:
        """Notify the application that its client has disconnected."""
        cycle.disconnected = True
        cycle.message_event.set()

    def _linger(self) -> None:
        self._discarding = True
        if self.transport.is_closing() or self._end_timer is not None:
            return
        if self.transport.can_write_eof():
            # A client that has reset the connection meanwhile is no fault of the request's.
            with suppress(OSError):
                self.transport.write_eof()
        self.flow.resume_reading()
        self._end_timer = self.loop.call_later(_LINGER, self.transport.abort)

    def _end(self) -> None:
        self.transport.close()
        if self._end_timer is None:
            self._end_timer = self.loop.call_later(_FLUSH, self.transport.abort)

    def _await_head(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
        self._idle_since = self.loop.time()
        self._head_timer = self.loop.call_later(self.limits.seconds, self._head_timeout)

    def _head_timeout(self) -> None:
        if not self.busy:
            self.transport.close()

    def _write_timeout(self) -> None:
        log.info("closed a connection", extra={"fields": {"reason": "the client does not read its response"}})
        self.transport.abort()

    def _evict(self) -> None:
        others = [
            other
            for other in self.connections
            if isinstance(other, Connection) and other is not self and (other.receiving or not other.busy)
        ]
        if not others:
            self._reject(503, f"{self.limits.connections} connections are already open: try again later")
            return
        oldest = min(others, key=lambda other: (other.busy, other._idle_since))
        self.connections.discard(oldest)
        oldest.transport.abort()


_TOO_LONG = 431, f"the head of the request is longer than {_MAX_HEAD_BYTES:,} bytes"
