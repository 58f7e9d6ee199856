"""One client's connection, held to bounds that an application cannot see: `connection_type`."""

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

# Bytes of a request line with its headers.
_MAX_HEAD = 2**16
# The most that asyncio reads at once. Which of these bytes belong to which request is known to the parser alone.
_READ = 2**18
# A chunk costs the parser as much as hundreds of bytes. So many may be of any size; more have to hold this many
# bytes on average, which lines of base64 do.
_FREE_CHUNKS = 4096
_MIN_CHUNK = 64
# Bytes around the content of a chunk: its size, perhaps an extension, and line ends.
_CHUNK_FRAME = 64
# Bytes of answers that the system keeps for a client to read; an answer is shorter than that.
_SEND_BUFFER = 2**18
# Requests that a client may send before the first of them is answered.
_MAX_PIPELINED = 32
# Seconds for which what a refused client still sends is read and thrown away. If the connection were closed at
# once, the client's system would drop our answer before the client reads it.
_LINGER = 1.0
# Seconds in which a client has to read what is left of its answer when the service shuts down.
_FLUSH = 0.5


def connection_type(limits: Limits) -> type[asyncio.Protocol]:
    """Return the class of connections, as uvicorn takes it, that hold clients to some limits."""

    class BoundConnection(Connection):
        bounds = limits

    return BoundConnection


class _Refused(Exception):
    """Raised in a callback of the parser to stop it."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason


class _Outlet:
    """A transport for an answer. Closing it leaves the client time to read the answer."""

    def __init__(self, connection: "Connection") -> None:
        self._connection = connection

    def write(self, data: bytes) -> None:
        self._connection.transport.write(data)

    def is_closing(self) -> bool:
        return self._connection.transport.is_closing()

    def close(self) -> None:
        self._connection.close()


class Connection(HttpToolsProtocol):
    """HTTP/1.1 by uvicorn and httptools, with bounds on what uvicorn lets a client do for ever.

    - The head of a request must arrive within ``bounds.seconds``, and be at most 64 KiB long.
    - A body must not come in chunks of a few bytes.
    - An answer must be read within ``bounds.seconds``.
    - At most 32 requests may be pipelined.
    - Beyond ``bounds.connections``, the connection that has waited longest for its client to finish a request is
      closed; if all requests are complete, the new connection gets 503.
    - A request that two servers could read differently gets 400, and the connection is closed: differing lengths,
      a length beside chunks, folded headers, bare line feeds, more or less than one ``Host``.
    """

    bounds: Limits

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._since = self.loop.time()
        self._answering: RequestResponseCycle | None = None
        self._deaf = False
        self._discarded = 0
        self._refusal: _Refused | None = None
        self._head_timer: asyncio.TimerHandle | None = None
        self._unread_timer: asyncio.TimerHandle | None = None
        self._end_timer: asyncio.TimerHandle | None = None
        # Of the message that is being parsed.
        self._in_body = False
        self._head_size = 0
        self._frame_size = 0
        self._body_size = 0
        self._chunks = 0
        # How the body of a request is delimited that asks for an upgrade, as a header; httptools does not read it.
        self._left_out: bytes | None = None
        self._repeating = False

    @property
    def busy(self) -> bool:
        """Whether a request is being received or answered, its head at least being complete."""
        return bool(self.pipeline) or (self._answering is not None and not self._answering.response_complete)

    @property
    def receiving(self) -> bool:
        """Whether the client has not finished sending a request that is being answered."""
        return self._answering is not None and self._answering.more_body

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Bound the connection."""
        super().connection_made(transport)
        # The system would keep megabytes for a client that asks and does not read.
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
        # To be told whenever anything is left that does not fit there.
        transport.set_write_buffer_limits(high=0)
        self._await_head()
        if len(self.connections) > self.bounds.connections:
            self._make_room()

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell the application, and let no timer outlive the connection."""
        for timer in (self._head_timer, self._unread_timer, self._end_timer):
            if timer is not None:
                timer.cancel()
        self._unset_keepalive_if_required()
        if self._answering is not None and not self._answering.response_complete:
            # With requests in a pipeline, this is not the one that uvicorn itself tells.
            self._drop(self._answering)
        self.pipeline.clear()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse what came, and refuse what is malformed or too much."""
        if self._deaf:
            self._discarded += len(data)
            if self._discarded > self.bounds.body_bytes:
                self.transport.abort()
            return
        self._unset_keepalive_if_required()
        try:
            self._parse(data)
        except httptools.HttpParserError as error:
            refusal = self._refusal or _Refused(400, f"the request cannot be read: {error}")
            self._refuse(refusal.status, refusal.reason)

    def on_message_begin(self) -> None:
        """Begin a request, unless too many wait."""
        if self._repeating:
            return
        if len(self.pipeline) >= _MAX_PIPELINED:
            raise self._stop(429, f"more than {_MAX_PIPELINED} requests wait on this connection")
        self._in_body = False
        self._head_size = self._frame_size = self._body_size = self._chunks = 0
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        """Take a part of the target."""
        if not self._repeating:
            self._count_head(len(url))
            super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header."""
        if self._repeating:
            return
        self._count_head(len(name) + len(value) + 4)
        # What follows a chunked body is no header, and must not be taken for one.
        if not self._in_body:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Start to answer a request, unless its head is ambiguous."""
        if self._repeating:
            return
        self._in_body = True
        self._check_head()
        super().on_headers_complete()
        self.cycle.transport = _Outlet(self)  # type: ignore[assignment]
        if self.parser.should_upgrade():
            framing = [field for field in self.headers if field[0] in (b"content-length", b"transfer-encoding")]
            self._left_out = b": ".join(framing[0]) if framing else None

    def on_chunk_header(self) -> None:
        """Count a chunk."""
        self._chunks += 1
        if self._chunks > _FREE_CHUNKS and self._body_size < _MIN_CHUNK * self._chunks:
            raise self._stop(
                400, f"the body comes in chunks of less than {_MIN_CHUNK} bytes: send larger ones, or its length"
            )

    def on_body(self, body: bytes) -> None:
        """Take a part of a body."""
        self._body_size += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        """End a request."""
        if self._left_out is None:
            super().on_message_complete()

    def on_response_complete(self) -> None:
        """Wait for the next request, or close."""
        self._await_head()
        super().on_response_complete()
        if (self._deaf or self.receiving) and not self.busy:
            self._linger()

    def pause_writing(self) -> None:
        """Bound the time in which the client reads what is left of its answer."""
        super().pause_writing()
        self._unread_timer = self.loop.call_later(self.bounds.seconds, self._unread)

    def resume_writing(self) -> None:
        """Note that the client has read it all."""
        if self._unread_timer is not None:
            self._unread_timer.cancel()
        super().resume_writing()

    def shutdown(self) -> None:
        """Close the connection, or let it end with the answer to the last request that has come."""
        if self.busy:
            self.cycle.keep_alive = False
        elif self._deaf:
            self.transport.abort()
        else:
            self._end()

    def cut_off(self) -> None:
        """End the connection; a request that is not answered yet gets 503."""
        self.pipeline.clear()
        cycle = self._answering
        if cycle is not None and not cycle.response_complete:
            self._drop(cycle)
            if not cycle.response_started:
                self._write(503, "the service is shutting down: try again later")
        self._end()

    def close(self) -> None:
        """Close the connection once the client has had time to read the answer."""
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
                # The service upgrades nothing. What follows the head is its body, and then the next request.
                data = data[upgrade.args[0] :]
                if self._left_out is not None:
                    self._read_left_out(self._left_out)
        self._frame_size += size - max(0, self._body_size - before)
        if self._frame_size > _MAX_HEAD + _READ + _CHUNK_FRAME * self._chunks:
            self._refuse(
                *_TOO_LONG if not self._in_body else (400, "the chunked body has more framing than content")
            )

    def _read_left_out(self, framing: bytes) -> None:
        """Continue with a parser that expects the body of the request that the last one left."""
        self._repeating = True
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
        self.parser.feed_data(b"POST / HTTP/1.1\r\n" + framing + b"\r\n\r\n")
        self._repeating = False
        self._left_out = None

    def _check_head(self) -> None:
        version = self.parser.get_http_version()
        if version not in ("1.0", "1.1"):
            raise self._stop(505, f"HTTP/{version} is not supported: use HTTP/1.1")
        values: dict[bytes, list[bytes]] = {}
        for name, value in self.headers:
            values.setdefault(name, []).append(value)
        hosts = len(values.get(b"host", ()))
        if hosts > 1 or (hosts == 0 and version == "1.1"):
            raise self._stop(400, f"the request has {hosts} Host headers: send one")
        codings = values.get(b"transfer-encoding")
        if codings and (version == "1.0" or [coding.lower() for coding in codings] != [b"chunked"]):
            raise self._stop(400, "the transfer encoding is not read: send the body chunked, or its length")
        if not self.url.startswith(b"/"):
            raise self._stop(400, "the request is not for a path: send GET /path")

    def _count_head(self, size: int) -> None:
        self._head_size += size
        if self._head_size > _MAX_HEAD:
            raise self._stop(*_TOO_LONG)

    def _stop(self, status: int, reason: str) -> _Refused:
        self._refusal = _Refused(status, reason)
        return self._refusal

    def _refuse(self, status: int, reason: str) -> None:
        """Answer what is complete, then refuse what came last, and listen to nothing more."""
        if self._deaf:
            return
        self._deaf = True
        last = self.cycle
        broken = last is not None and last.more_body and not last.response_complete
        if broken and last is not self._answering:
            self.pipeline = type(self.pipeline)(entry for entry in self.pipeline if entry[0] is not last)
        if self.busy and not (broken and last is self._answering):
            # An answer now would be taken for that to an earlier request.
            final = self.pipeline[0][0] if self.pipeline else self._answering
            assert final is not None
            final.keep_alive = False
            return
        if broken:
            self._drop(last)
            if last.response_started:
                self.transport.abort()
                return
        self._write(status, reason)
        self._linger()

    def _write(self, status: int, reason: str) -> None:
        request_id = uuid.uuid4().hex
        log.info(
            "refused a connection",
            extra={"fields": {"status": status, "reason": reason, "request_id": request_id}},
        )
        body = json.dumps({"error": reason, "request_id": request_id}).encode()
        lines = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}"]
        lines += [f"{name.decode()}: {value.decode()}" for name, value in self.server_state.default_headers]
        if status == 503:
            lines.append("retry-after: 1")
        lines += ["content-type: application/json", f"content-length: {len(body)}", "connection: close"]
        self.transport.write("\r\n".join([*lines, "", ""]).encode() + body)

    def _drop(self, cycle: RequestResponseCycle) -> None:
        """Tell the application that its client is gone."""
        cycle.disconnected = True
        cycle.message_event.set()

    def _linger(self) -> None:
        self._deaf = True
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
        self._since = self.loop.time()
        self._head_timer = self.loop.call_later(self.bounds.seconds, self._late)

    def _late(self) -> None:
        if not self.busy:
            self.transport.close()

    def _unread(self) -> None:
        log.info("closed a connection", extra={"fields": {"reason": "the client does not read its answer"}})
        self.transport.abort()

    def _make_room(self) -> None:
        others = [
            other
            for other in self.connections
            if isinstance(other, Connection) and other is not self and (other.receiving or not other.busy)
        ]
        if not others:
            self._refuse(503, f"{self.bounds.connections} connections are open already: try again later")
            return
        oldest = min(others, key=lambda other: (other.busy, other._since))
        self.connections.discard(oldest)
        oldest.transport.abort()


_TOO_LONG = 431, f"the head of the request is longer than {_MAX_HEAD:,} bytes"
